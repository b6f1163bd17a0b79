"""Is the teacher the target? Found by running the model's own code, not by its configuration.

A draft is trained against `last_hidden @ head.T` and starts from the factor of the final norm. Both
are compared with what the model's code does: with a short input where the model is there, and with
given states where only its architecture and three tensors are.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eagle3fn.base.errors import UserError
from eagle3fn.data.decoder import decoder, final_norm, hidden_states

_TOKENS = 4  # of the short input
_ROWS = 8  # of the head that an architecture is tried with
_LARGEST_LOGIT = 64.0  # a soft cap of 30 or 50 changes it
_NORM_ERROR = 0.01  # relative to the largest factor


def check_teacher(model: Any, where: str) -> None:
    """Run a model on a short input and compare its logits with `last_hidden @ head.T`.

    In the model's dtype, at its own states and at larger ones. Its taps and its final norm must be
    where extraction looks for them.

    Args:
        model: the target, with weights, on any device.
        where: names it in errors.

    Raises:
        UserError: names the model type and what differs, by how much.
    """
    config = model.config
    layers = (0, config.num_hidden_layers // 2, config.num_hidden_layers - 1)
    ids = torch.arange(1, 1 + _TOKENS) * config.vocab_size // (_TOKENS + 1)  # all over it
    ids = ids[None].to(model.get_input_embeddings().weight.device)  # (1, R)

    # The states that extraction stores.
    with _named(model, where), _outputs_of(final_norm(model)[1]) as normed:
        aux, last = hidden_states(model, ids, torch.ones_like(ids), layers)
        shape = (1, _TOKENS, config.hidden_size)
        if last.shape != shape or aux.shape != (*shape[:2], 3 * shape[2]):
            raise _refusal(
                model,
                where,
                f"its layers give {tuple(aux.shape)} and {tuple(last.shape)}, not three states and "
                f"one of {shape}",
            )
        if len(normed) != 1 or not torch.equal(normed[0], last):
            raise _refusal(model, where, "its last hidden state is not its final norm's output")

    # Its logits, of these states and of larger ones.
    with _named(model, where), torch.no_grad():
        head = model.get_output_embeddings().weight
        logits = model(input_ids=ids, use_cache=False).logits
        _compare(model, where, logits, last, head)
        check_head(model, last, where)


def check_architecture(model: Any, where: str) -> None:
    """Compare a model's logits with `last_hidden @ head.T` without its weights.

    Args:
        model: as `architecture` makes it. Its head gets a small, random weight.
        where: names it in errors.

    Raises:
        UserError: names the model type and what differs, by how much.
    """
    with _named(model, where):
        head = model.get_output_embeddings()
        source = torch.Generator().manual_seed(0)
        hidden = model.config.hidden_size
        weight = torch.randn(_ROWS, hidden, generator=source, dtype=torch.float32)
        states = torch.randn(1, _TOKENS, hidden, generator=source, dtype=torch.float32)
        head.weight = nn.Parameter(weight * hidden**-0.5, requires_grad=False)
        check_head(model, states, where)


def architecture(config: Any, where: str) -> Any:
    """The model of a configuration without weights, on the device "meta".

    Raises:
        UserError: its class cannot be built.
    """
    from eagle3fn.data.target_loading import build

    with _built(config, where), torch.device("meta"):
        model = build(config)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def check_head(model: Any, states: Tensor, where: str) -> None:
    """Give a model `states` `(1, R, Ht)` as its decoder's output, as they are and enlarged.

    Enlarged until the largest logit is 64, where soft caps of logits are plain to see.

    Raises:
        UserError: its logits are not `states @ head.T`.
    """
    head = model.get_output_embeddings().weight
    largest = F.linear(states.to(head.device), head).abs().max().clamp_min(1e-6)
    for factor in (1.0, float(_LARGEST_LOGIT / largest)):
        given = states * factor
        with _decoder_gives(model, given):
            ids = torch.zeros(given.shape[:2], dtype=torch.int64)
            ids = ids.to(model.get_input_embeddings().weight.device)
            logits = model(input_ids=ids, use_cache=False).logits
        _compare(model, where, logits, given, head)


def _compare(model: Any, where: str, logits: Tensor, states: Tensor, head: Tensor) -> None:
    """Refuse logits that are not `states @ head.T` but for rounding."""
    if logits.is_meta:
        raise _refusal(model, where, "its logits depend on more weights than lm_head.weight")
    ours = F.linear(states.to(head.device), head)  # (1, R, V)
    if logits.shape != ours.shape:
        raise _refusal(
            model,
            where,
            f"its logits have shape {tuple(logits.shape)}, last_hidden @ lm_head.T "
            f"{tuple(ours.shape)}",
        )
    theirs, ours = logits.float().to(ours.device), ours.float()
    error = float((theirs - ours).norm() / theirs.norm().clamp_min(1e-30))
    if not error <= _tolerance(head.dtype):
        raise _refusal(
            model,
            where,
            f"its logits are not last_hidden @ lm_head.T: they differ by {error:.0%}, the largest "
            f"is {float(theirs.abs().max()):.3g} and not {float(ours.abs().max()):.3g}",
        )


def _tolerance(dtype: torch.dtype) -> float:
    """How far logits of one dtype may differ, relative to their size."""
    return 1e-3 if dtype == torch.float32 else 0.03


# The final norm


@torch.no_grad()
def norm_factor(model: Any, weight: Tensor, where: str) -> Tensor:
    """The factor `(Ht,)` that a model's final norm multiplies the normed value by.

    The norm's own code is run with `weight`, and without a bias, on a unit input without mean. What
    comes out is compared with `weight` and `1 + weight`.

    Args:
        model: the target; its architecture is enough.
        weight: the norm's, `(Ht,)`, of any dtype.
        where: names the model in errors.

    Returns:
        The one that it is, in `weight`'s dtype.

    Raises:
        UserError: it is neither.
    """
    _, norm = final_norm(model)
    with _named(model, where):
        norm = copy.deepcopy(norm).to_empty(device="cpu").float()
        for value in norm.parameters():
            value.zero_()
        norm.weight.copy_(weight.cpu())

        unit = torch.ones(1, len(weight), dtype=torch.float32)
        unit[:, 1::2] = -1
        measured = (norm(unit) * unit)[0]  # (Ht,)

    candidates = (weight, weight + 1)
    errors = [float((measured - one.float().cpu()).abs().max()) for one in candidates]
    if not min(errors) <= _NORM_ERROR * float(measured.abs().max().clamp_min(1e-6)):
        raise _refusal(
            model,
            where,
            "its final norm multiplies neither by its weight nor by 1 + weight: it differs by "
            f"{min(errors):.2g}",
        )
    return candidates[errors.index(min(errors))]


@torch.no_grad()
def stored_norm(model: Any, weight: Tensor, where: str) -> nn.Module:
    """A model's final norm on the CPU, its own code with `weight` `(Ht,)`, in the weight's dtype.

    Args:
        model: the target; its architecture is enough.
        weight: the norm's.
        where: names the model in errors.

    Raises:
        UserError: the norm has more tensors than its weight.
    """
    norm = final_norm(model)[1]
    names = {name for name, _ in [*norm.named_parameters(), *norm.named_buffers()]}
    if names != {"weight"}:
        more = ", ".join(sorted(names - {"weight"}))
        fault = f"its final norm, {type(norm).__name__}, has {more} next to its weight"
        raise _refusal(model, where, fault)

    norm = copy.deepcopy(norm).to_empty(device="cpu").to(weight.dtype)
    norm.weight.copy_(weight)
    return norm


# Parts


class _Output:
    """A decoder's output that holds states alone; whatever else is asked for is None."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, place: int | slice) -> Any:
        return (self.last_hidden_state,)[place]


@contextmanager
def _decoder_gives(model: Any, states: Tensor) -> Iterator[None]:
    """Let the model's decoder return `states` instead of running."""
    base = decoder(model)
    own = vars(base).get("forward")
    base.forward = lambda *_args, **_options: _Output(states)
    try:
        yield
    finally:
        del base.forward
        if own is not None:
            base.forward = own


@contextmanager
def _outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that gets the module's output at each call."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append(output)

    handle = module.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def _named(model: Any, where: str) -> Iterator[None]:
    """Turn whatever a family's own code raises into a refusal of the target."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise _refusal(model, where, f"a short run fails ({_first_line(error)})") from None


@contextmanager
def _built(config: Any, where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{where}: model_type {config.model_type!r}: no causal language model can be built "
            f"({_first_line(error)}); choose another target"
        ) from None


def _first_line(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which is never run"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def _refusal(model: Any, where: str, fault: str) -> UserError:
    return UserError(
        f"{where}: model_type {model.config.model_type!r}: {fault}; such targets are not "
        "supported, choose another"
    )
