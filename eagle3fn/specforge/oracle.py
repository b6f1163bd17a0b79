"""SpecForge, run in this process as the oracle.

`SPECFORGE_SRC` names a checkout at the commit of its pull request 600. Without it the wheel is
used, for forward and backward only. Both are identified by the hashes of the files that are used,
never by a version number.

Comparisons have two levels:

- level 1: SpecForge computes its loss with its own Triton kernel, and our side with ours.
- level 2: on SpecForge's side that kernel is replaced by the eager expression that our side uses
  (`eager_loss`). Everything but the kernel is compared.
"""

import contextlib
import functools
import hashlib
import importlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.sections import ObjectiveConfig
from eagle3fn.base.types import Batch, Frozen, Params
from eagle3fn.specforge.cases import for_specforge
from eagle3fn.testing.builders import Case, on, tiny_batch, tiny_frozen, tiny_params
from eagle3fn.testing.equivalence import Side
from eagle3fn.testing.results import Result

COMMIT = "7a81ce53a0381c6438fd19d6e247d34c68497012"
COMMIT_FILES = {  # sha256 at COMMIT
    "core/eagle3.py": "6c11e822a1b4706f9dd2b13ff52557c09338d0d3bd5ca4019351f1c4012a71a7",
    "core/eagle3_adapters.py": "ec42b262412e8dc528d379879e837f6b6e573c904cd8cc6c74bb4b95947fc312",
    "core/loss.py": "860c42f0fe4312b94093c8abf58e1312c82fb74d6932d0639f8b63c640e696a2",
    "core/lk_loss.py": "d40dca2a2535becc0d3840d96bd2c503875697131b505ab08f78bfc6ae6d3e9a",
    "core/compact_teacher.py": "c07e3eae487cac34d04af661d3487cb042355ea28fc32d12c47a4f956a4c540f",
    "modeling/draft/base.py": "51c7746373c643342f190bc2c6ad97a34db19cb3b5f3e45f3ab3ca4bf1cd0856",
    "modeling/draft/llama3_eagle.py": (
        "fe53249c254c616d67a9de5b3d0931ddb122c259348d73c01679d59353a6e656"
    ),
    "modeling/_mask_utils.py": "564ad8e78563e94be90512b103ecadb88c533d988cf3d49f373d6bdb2f7eb2d1",
    "optimizer.py": "f0aedfad5fe11100470e7f49518b20d439cf47ec9afc195af089dfeca3affc54",
    "lr_scheduler.py": "288dd6b474765a8708d4579e2ab0d485e29326367eb119dba26b95b362356914",
    "utils.py": "5325ba182b67ad690492b0560ede73877775aa66878cb540f30554046dc10364",
}
INSTALL = (
    "set SPECFORGE_SRC to a checkout of github.com/sgl-project/SpecForge at "
    f"{COMMIT[:12]} and pip install --no-deps triton==3.8.0 yunchang==0.6.4; "
    "or, for forward and backward alone, also pip install --no-deps specforge==0.2.0"
)
ENVIRONMENT = {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
LK = {"kl": None, "lk_alpha": "alpha", "lk_lambda": "lambda"}


class Oracle(NamedTuple):
    """The SpecForge that is at hand."""

    kind: Literal["commit", "checkout", "wheel"]  # "commit": every used file has the commit's hash
    hashes: dict[str, str]  # sha256 of the used files, by name
    eagle3: ModuleType  # OnlineEagle3Model
    draft: ModuleType  # LlamaForCausalLMEagle3
    optimizer: ModuleType  # BF16Optimizer

    @property
    def digest(self) -> str:
        """One sha256 over the names and hashes of the used files."""
        return hashlib.sha256(repr(sorted(self.hashes.items())).encode()).hexdigest()

    def describe(self) -> str:
        """Kind, torch version, and the used files by hash."""
        lines = [f"oracle: SpecForge, {self.kind}, torch {torch.__version__}"]
        for name, value in self.hashes.items():
            lines.append(f"  {value[:16]}  {name}")
        return "\n".join(lines)


class OracleMissingError(Exception):
    """SpecForge is not at hand; the message says why, and what to install."""


def load_oracle(*, commit: bool = False, native: bool = False) -> Oracle:
    """The SpecForge at hand.

    Args:
        commit: accept the commit's own files alone.
        native: for CUDA: Triton's kernels are compiled, and dynamo is as the environment has it.
            Else the kernels are interpreted and dynamo is off.

    Raises:
        OracleMissingError: none is at hand, or torch was loaded without SpecForge's environment.
    """
    oracle = _load(native)
    if commit and oracle.kind != "commit":
        raise OracleMissingError(
            f"the oracle at hand is a {oracle.kind}, whose optimizer is another one: {INSTALL}"
        )
    return oracle


@functools.cache
def _load(native: bool) -> Oracle:
    _check_environment(native)
    source = os.environ.get("SPECFORGE_SRC")
    if source:
        if not (Path(source) / "specforge" / "optimizer.py").is_file():
            raise OracleMissingError(
                f"SPECFORGE_SRC={source}: no specforge/optimizer.py there; {INSTALL}"
            )
        sys.path.insert(0, source)

    # Its imports print and warn. With other versions of its dependencies it fails in other ways
    # than by an ImportError.
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            draft = importlib.import_module("specforge.modeling.draft.llama3_eagle")
            eagle3 = _first_module("specforge.core.eagle3", "specforge.algorithms.eagle3.model")
            optimizer = importlib.import_module("specforge.optimizer")
    except Exception as error:
        raise OracleMissingError(
            f"SpecForge cannot be imported ({type(error).__name__}: {error}): {INSTALL}"
        ) from None

    # Which files these are; the wheel has the model elsewhere, and not every file.
    root = Path(str(optimizer.__file__)).parent
    names = [name for name in COMMIT_FILES if (root / name).is_file()]
    model_file = Path(str(eagle3.__file__))
    if model_file != root / "core/eagle3.py":
        names.insert(0, str(model_file.relative_to(root)))
    hashes = {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in names}

    if hashes == COMMIT_FILES:
        kind = "commit"
    elif source:
        kind = "checkout"
    else:
        kind = "wheel"
    return Oracle(kind, hashes, eagle3, draft, optimizer)


def _check_environment(native: bool) -> None:
    """Refuse an environment in which SpecForge's kernels run otherwise than asked for."""
    if native:
        fits = "TRITON_INTERPRET" not in os.environ
        wanted = "no TRITON_INTERPRET"
    else:
        fits = all(os.environ.get(name) == value for name, value in ENVIRONMENT.items())
        wanted = str(ENVIRONMENT)
    if not fits:
        raise OracleMissingError(
            f"the oracle needs {wanted} in the environment before torch is loaded"
        )


def _first_module(*names: str) -> ModuleType:
    """The first of these modules that exists."""
    for name in names[:-1]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            # One of its own imports may be what is missing.
            if error.name is None or not name.startswith(error.name):
                raise
    return importlib.import_module(names[-1])


class EagerLoss:
    """What replaces SpecForge's loss kernel at level 2: the expression that our side uses."""

    @staticmethod
    def apply(logits: Tensor, p: Tensor, mask: Tensor) -> Tensor:
        """`-mean(mask · Σ_v p[v] · log_softmax(logits)[v])` over all rows; scalar.

        `logits` and `p` are `(B, S, D)`, `mask` is `(B, S, 1)`.
        """
        log_draft = torch.log_softmax(logits.float(), dim=-1)
        row = -(p * log_draft).sum(-1) * mask.squeeze(-1).float()
        return row.mean()


@contextlib.contextmanager
def eager_loss(oracle: Oracle) -> Iterator[None]:
    """Level 2: SpecForge computes its loss with `EagerLoss` while this is open."""
    module: Any = oracle.eagle3
    kernel = module.LogSoftmaxLoss
    module.LogSoftmaxLoss = EagerLoss
    try:
        yield
    finally:
        module.LogSoftmaxLoss = kernel


def specforge_draft(
    oracle: Oracle, config: DraftConfig, params: Params, frozen: Frozen, attention: str = "sdpa"
) -> torch.nn.Module:
    """SpecForge's draft model with these weights, on their device and in their dtype.

    `attention` is the backend. SpecForge has only drafts as wide as their target.
    """
    assert frozen.embed_tokens is not None
    with contextlib.redirect_stdout(io.StringIO()):  # its constructor prints
        draft = oracle.draft.LlamaForCausalLMEagle3(
            _llama_config(config), attention_backend=attention
        )

    # Our weights instead of its own draw.
    draft.to(params["fc.weight"])
    with torch.no_grad():
        for name, leaf in draft.named_parameters():
            leaf.copy_(frozen.embed_tokens if name == "embed_tokens.weight" else params[name])
        draft.t2d.copy_(frozen.t2d)
        draft.d2t.copy_(frozen.d2t)
    draft.freeze_embedding()
    return draft


def _llama_config(config: DraftConfig) -> Any:
    """The draft's shape as SpecForge reads it."""
    from transformers import LlamaConfig

    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=1,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        num_hidden_layers=1,
        rope_parameters=rope,
        tie_word_embeddings=False,
    )

    # Set after LlamaConfig's own check, which refuses heads that don't divide the hidden size.
    llama.num_attention_heads = config.num_attention_heads
    llama.num_key_value_heads = config.num_key_value_heads
    llama.rope_theta = config.rope_theta
    llama.rope_parameters = dict(rope)
    llama.draft_vocab_size = config.draft_vocab_size
    return llama


class SpecForgeForward(NamedTuple):
    """What is compared of the lists that `OnlineEagle3Model.forward` returns; one entry a step."""

    losses: list[Tensor]  # ()
    acceptance: list[Tensor]  # (), the rate
    correct: list[Tensor]  # (), rows
    rows: list[Tensor]  # (), at least 1e-6


def specforge_forward(
    oracle: Oracle,
    draft: torch.nn.Module,
    frozen: Frozen,
    batch: Batch,
    objective: ObjectiveConfig,
    attention: str = "sdpa",
) -> SpecForgeForward:
    """`OnlineEagle3Model.forward`; its callers' shifts of data and target are the batch's own.

    Of `objective`, unroll length, teacher and loss are taken. It divides by all rows, whatever
    `normalization` is.
    """
    model = oracle.eagle3.OnlineEagle3Model(
        draft,
        length=objective.ttt_length,
        attention_backend=attention,
        kl_scale=objective.kl_scale,
        kl_decay=objective.kl_decay,
        lk_loss_type=LK[str(objective.loss)],
    )

    # The full teacher is given as logits (B, S, V), the compact one as hidden states and head.
    hidden = batch.label_hidden
    teacher: dict[str, Any]
    if objective.teacher == "full":
        teacher = {"target": F.linear(hidden, frozen.target_head)}
    else:
        teacher = {
            "target": None,
            "target_hidden_for_compact": hidden,
            "target_head_weight": frozen.target_head,
        }

    result = model(
        input_ids=batch.next_ids[:, : hidden.shape[1]],
        attention_mask=batch.attention_mask,
        loss_mask=batch.row_mask[:, 0, :, None],
        hidden_states=batch.aux_hidden,
        position_ids=batch.position_ids,
        compact_teacher_chunk_size=objective.teacher_chunk,
        **teacher,
    )
    losses, acceptance, _, correct, rows, *_ = result
    return SpecForgeForward(losses, acceptance, correct, rows)


class Unaligned(NamedTuple):
    """A batch as SpecForge's scripts read it, before their shifts."""

    input_ids: Tensor  # (B, S); the first, which no row reads, is 0
    loss_mask: Tensor  # (B, S): the rows of step 0
    target: Tensor  # (B, S, Ht): last hidden states; the first, which no label needs, is 0


def unaligned(batch: Batch) -> Unaligned:
    """A batch without its shifts."""
    s = batch.attention_mask.shape[1]
    return Unaligned(
        input_ids=F.pad(batch.next_ids[:, : s - 1], (1, 0)),
        loss_mask=batch.row_mask[:, 0],
        target=F.pad(batch.label_hidden[:, :-1], (0, 0, 1, 0)),
    )


def run_oracle(
    oracle: Oracle,
    case: Case,
    level: Literal[1, 2] = 2,
    attention: str = "sdpa",
    device: str = "cpu",
) -> Result:
    """Everything that is compared of SpecForge's forward and backward pass, by name.

    Gradients have their leaf's name. `level`: see this file's docstring.
    """
    frozen = on(device, tiny_frozen(case))
    params = on(device, tiny_params(case))
    batch = on(device, tiny_batch(case))
    objective = case.config().objective
    draft = specforge_draft(oracle, case.draft(), params, frozen, attention)
    with eager_loss(oracle) if level == 2 else contextlib.nullcontext():
        seen = specforge_forward(oracle, draft, frozen, batch, objective, attention)

    # Its script's sum over steps.
    loss = torch.zeros((), device=device)
    for step, value in enumerate(seen.losses):
        loss = loss + objective.decay**step * value
    loss.backward()

    result = {
        "loss": loss.detach(),
        "losses": torch.stack([value.detach() for value in seen.losses]),
        "acceptance": torch.stack(seen.acceptance),
        "correct": torch.stack(seen.correct),
        "rows": torch.stack(seen.rows),
    }
    for name, leaf in draft.named_parameters():
        if leaf.grad is not None:
            result[name] = leaf.grad
    return result


def side() -> Side:
    """SpecForge as `against` of `eagle3fn.testing.assert_equivalent`, at level 2 on the CPU.

    Raises:
        OracleMissingError: SpecForge is not at hand; the message says what to install.
    """
    oracle = load_oracle()
    environment = ", ".join(f"{name}={value!r}" for name, value in ENVIRONMENT.items())
    return Side(
        name="side()",
        run=lambda case: run_oracle(oracle, case),
        adapt=for_specforge,
        lines=(
            "import os",
            "",
            f"os.environ.update({environment})  # before torch is loaded",
            "",
            "from eagle3fn.specforge.oracle import side",
        ),
    )
