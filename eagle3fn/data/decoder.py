"""The target's decoder: its layers, its final norm, and the hidden states that a draft reads."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eagle3fn.base.errors import UserError
from eagle3fn.data.hooks import layer_outputs


def decoder(model: Any) -> Any:
    """The base model: its `layers` are the decoder layers, its output comes after the final norm.

    Looked for in `model.get_decoder()`, in `model`, and in what they hold as `model` and
    `language_model`.

    Raises:
        UserError: none found.
    """
    candidates = []
    if callable(getattr(model, "get_decoder", None)):
        candidates.append(model.get_decoder())
    candidates.append(model)

    for module in candidates:  # grows while it is read
        if isinstance(getattr(module, "layers", None), nn.ModuleList):
            return module
        for name in ("model", "language_model"):
            inner = getattr(module, name, None)
            if inner is not None and inner is not module:
                candidates.append(inner)
    raise UserError(
        f"{type(model).__name__}: no list of decoder layers found; choose another target"
    )


def final_norm(model: Any) -> tuple[str, Any]:
    """The name in the decoder of its final norm, and the norm, which has a `weight` `(Ht,)`.

    It is the child `norm`, or else the only one with "norm" in its name. Whether its output is the
    decoder's is found where the model is run: `data.teacher_check.check_teacher`.

    Raises:
        UserError: none or several found, or one without a weight.
    """
    children = dict(decoder(model).named_children())
    found = ["norm"] if "norm" in children else [name for name in children if "norm" in name]
    if len(found) == 1 and isinstance(getattr(children[found[0]], "weight", None), Tensor):
        return found[0], children[found[0]]

    fault = "no weight in the final norm" if len(found) == 1 else f"{len(found)} final norms"
    raise UserError(f"{type(model).__name__}: {fault} found; choose another target")


@torch.no_grad()
def hidden_states(
    model: Any, input_ids: Tensor, attention_mask: Tensor, layers: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Outputs of A decoder layers `(B, S, A·Ht)` and the final, normed state `(B, S, Ht)`.

    Of layers on several devices, the outputs are brought to the last one's.

    `input_ids` and `attention_mask` are `(B, S)` int64, padded on the right; padded rows hold no
    meaning.
    """
    base = decoder(model)
    with layer_outputs([base.layers[index] for index in layers]) as outputs:
        out = base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    device = outputs[-1].device
    return torch.cat([output.to(device) for output in outputs], dim=-1), out.last_hidden_state


def check_present(model: Any) -> None:
    """Refuse a model some of whose weights are not in memory.

    Raises:
        UserError: names the first such parameter.
    """
    for name, value in model.named_parameters():
        if value.is_meta:
            raise UserError(
                f"{type(model).__name__}: {name} is offloaded (on the device 'meta'); load the "
                "target without offloading, on one device or spread over more, in a narrower "
                "dtype, or let an engine compute it"
            )
