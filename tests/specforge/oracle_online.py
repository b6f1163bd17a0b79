"""The old tool's online side at its commit: its script's functions, its Hugging Face target, its pruned logits.

Put in on its side, and nothing else: `Tensor.cuda` does nothing; its collator and its adapter are made without the
process group that their constructors ask for; `shard_target_output` is set, which on one rank is the whole batch; and
the eager loss of level 2.
"""

import ast
import contextlib
import hashlib
import importlib
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eagle3fn.base.types import Frozen
from eagle3fn.data.extract import Encoded
from eagle3fn.specforge.oracle import INSTALL, LK, Oracle, OracleMissingError, eager_loss, old_draft
from eagle3fn.testing.builders import Case, generator, tiny_frozen, tiny_params
from eagle3fn.testing.results import Result

SCRIPT = "scripts/train_eagle3.py"
TARGET = "specforge/modeling/target/eagle3_target_model.py"
COLLATOR = "specforge/data/utils.py"
ADAPTER = "specforge/runtime/inference/sglang_adapter.py"
STRATEGY = "specforge/runtime/training/strategy.py"
FILES = {  # sha256 at the commit
    SCRIPT: "7f9089ea903af3ba4e299c8f691d15fd3fdc638355450c5da3f76d5593f2b718",
    TARGET: "35189c66259dfda350f74f421dbcd099909892e847d512b366620fb5735c5070",
    COLLATOR: "04719a60bf0b30abfd3ae499718be849e072588a77a853f240fac950faba530e",
    STRATEGY: "46b52eaab185b4ba2f7d50820c1dc3a7a2a999085027fb59a7969e9c2b49fd72",
    ADAPTER: "76961ecf0d56aa80c042bddc9ca4916f65c59b4eed9f5c104e283e8b1da19978",
}


def old_file(oracle: Oracle, name: str) -> Path:
    """A file of the checkout, one of `FILES`, with the commit's bytes.

    Raises:
        OracleMissingError: it is not there, or other bytes are.
    """
    path = Path(str(oracle.optimizer.__file__)).parent.parent / name
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != FILES[name]:
        raise OracleMissingError(f"{path}: not the commit's file: {INSTALL}")
    return path


def old_module(oracle: Oracle, name: str) -> Any:
    """The module of one of `FILES`; errors as `old_file`."""
    old_file(oracle, name)
    try:
        return importlib.import_module(name.removesuffix(".py").replace("/", "."))
    except ImportError as error:
        wanted = "pip install datasets accelerate, which it imports, and"
        raise OracleMissingError(
            f"{name} cannot be imported ({error}): {wanted} {INSTALL}"
        ) from None


def script_functions(oracle: Oracle, *names: str) -> dict[str, Any]:
    """Functions of the old training script as they stand, read out of it: the rest of the script is not run."""
    path = old_file(oracle, SCRIPT)
    wanted = [
        node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) in names
    ]
    future = ast.parse(
        "from __future__ import annotations"
    ).body  # its annotations name what is not imported here
    scope: dict[str, Any] = {"dist": torch.distributed, "torch": torch}
    exec(compile(ast.Module([*future, *wanted], []), str(path), "exec"), scope)
    return {name: scope[name] for name in names}


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """`Tensor.cuda` gives the tensor itself while this is open."""
    real: Any = Tensor.cuda
    Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.cuda = real  # type: ignore[method-assign]


def tame_target(case: Case) -> Any:
    """A Hugging Face Llama of five layers, as wide as the case's, in its dtype; weights from its seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=case.vocab,
        hidden_size=case.target_hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=case.tied,
    )
    source = generator(case, 3)
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for leaf in model.parameters():
            noise = torch.randn(leaf.shape, generator=source, dtype=torch.float64)
            leaf.copy_(1 + noise / 10 if leaf.ndim == 1 else noise * 2 * leaf.shape[1] ** -0.5)
    return model.to(case.torch_dtype).eval().requires_grad_(False)


def target_frozen(case: Case, model: Any) -> Frozen:
    """The target's own embedding and head, with the case's vocabulary map."""
    embed, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return tiny_frozen(case)._replace(embed_tokens=embed.detach(), target_head=head.detach())


def old_target(oracle: Oracle, model: Any, layers: Sequence[int]) -> Any:
    """The old tool's Hugging Face backend around `model`, tapping `layers`."""
    target = old_module(oracle, TARGET).HFEagle3TargetModel(model)
    target.set_aux_hidden_states_layers(list(layers))
    return target


def old_collate(oracle: Oracle, rows: Sequence[Encoded]) -> dict[str, Any]:
    """Its collator on tokens and masks; the masks go through as they are."""
    collator = old_module(oracle, COLLATOR).DataCollatorWithPadding
    made = collator.__new__(collator)
    made.sp_degree = made.ulysses_degree = 1
    ones = [torch.ones_like(row.input_ids) for row in rows]
    fields = [(row.input_ids, one, row.token_mask) for row, one in zip(rows, ones, strict=True)]
    names = ("input_ids", "attention_mask", "loss_mask")
    return made(
        [{name: value[None] for name, value in zip(names, three, strict=True)} for three in fields]
    )


def old_trainer(oracle: Oracle, case: Case, model: Any) -> tuple[Any, torch.nn.Module]:
    """The old model with the case's loss and its draft, for the target `model`."""
    draft = old_draft(oracle, case.draft(), tiny_params(case), target_frozen(case, model))
    trainer = oracle.eagle3.OnlineEagle3Model(
        draft,
        length=case.steps,
        attention_backend="sdpa",
        lk_loss_type=LK[case.loss],
        kl_scale=case.kl_scale,
        kl_decay=case.kl_decay,
    )
    return trainer, draft


def run_online(
    oracle: Oracle, case: Case, model: Any, rows: Sequence[Encoded], layers: Sequence[int]
) -> Result:
    """What `testing.oracle.run_oracle` gives, from the script's online `run_forward` on `rows` as one batch.

    The target runs inside, and its logits are the teacher: the old compact teacher is for offline features alone.
    """
    trainer, draft = old_trainer(oracle, case, model)
    run_forward = script_functions(oracle, "run_forward", "get_dp_data_shard_from_tp")[
        "run_forward"
    ]
    args = Namespace(is_vlm=False, target_model_backend="hf", shard_target_output=True)
    data, target = old_collate(oracle, rows), old_target(oracle, model, layers)
    with on_cpu(), eager_loss(oracle):
        losses, _, rates, correct, counts, *_ = run_forward(
            args, trainer, data, target, is_online=True
        )
    loss = sum((0.8**i * value for i, value in enumerate(losses)), start=torch.zeros(()))
    loss.backward()
    seen = {"loss": loss.detach(), "losses": torch.stack([value.detach() for value in losses])}
    seen |= {
        "acceptance": torch.stack(rates),
        "correct": torch.stack(correct),
        "rows": torch.stack(counts),
    }
    return seen | {
        name: leaf.grad for name, leaf in draft.named_parameters() if leaf.grad is not None
    }
