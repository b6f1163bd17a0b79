"""SpecForge's online side at its commit: its script's functions, its target, its pruned logits.

Replaced on its side, and nothing else:

- `Tensor.cuda` does nothing.
- Its collator and its adapter are made without the process group that their constructors ask for.
- `shard_target_output` is set, which on one rank is the whole batch.
- The loss is the eager one of level 2.
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
from eagle3fn.data.samples import Encoded
from eagle3fn.specforge.oracle import (
    INSTALL,
    LK,
    Oracle,
    OracleMissingError,
    eager_loss,
    specforge_draft,
)
from eagle3fn.testing.builders import Case, generator, tiny_frozen, tiny_params
from eagle3fn.testing.results import Result

SCRIPT = "scripts/train_eagle3.py"
TARGET = "specforge/modeling/target/eagle3_target_model.py"
COLLATOR = "specforge/data/utils.py"
ADAPTER = "specforge/runtime/inference/sglang_adapter.py"
STRATEGY = "specforge/runtime/training/strategy.py"
CONTRACTS = "specforge/runtime/contracts.py"
CONTROLLER = "specforge/runtime/control_plane/controller.py"
STORE = "specforge/runtime/control_plane/metadata_store.py"
QUEUE = "specforge/runtime/data_plane/sample_ref_queue.py"
FILES = {  # sha256 at the commit
    SCRIPT: "7f9089ea903af3ba4e299c8f691d15fd3fdc638355450c5da3f76d5593f2b718",
    TARGET: "35189c66259dfda350f74f421dbcd099909892e847d512b366620fb5735c5070",
    COLLATOR: "04719a60bf0b30abfd3ae499718be849e072588a77a853f240fac950faba530e",
    STRATEGY: "46b52eaab185b4ba2f7d50820c1dc3a7a2a999085027fb59a7969e9c2b49fd72",
    ADAPTER: "76961ecf0d56aa80c042bddc9ca4916f65c59b4eed9f5c104e283e8b1da19978",
    CONTRACTS: "17c2dbd987e6cd17b59bcc96211eefe1891256282f0f299a31c5e02d09d53c4d",
    CONTROLLER: "f6ee40476975f01ea2be10b86fd229682ab265e5a02a9105ef26f14ffd2e82df",
    STORE: "1d5a418ac17f49af95d59ef1e18ce1165b53aae3b07a2e772afa8efe72eae0b1",
    QUEUE: "dcb40200abf28d616fd4fbb577f9a26b3e975effa6cbd9581fc3b3b887d1efef",
}


# SpecForge's files


def specforge_file(oracle: Oracle, name: str) -> Path:
    """A file of the checkout, one of `FILES`, with the commit's bytes.

    Raises:
        OracleMissingError: it is not there, or has other bytes.
    """
    path = Path(str(oracle.optimizer.__file__)).parent.parent / name
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != FILES[name]:
        raise OracleMissingError(f"{path}: not the commit's file: {INSTALL}")
    return path


def specforge_module(oracle: Oracle, name: str) -> Any:
    """The module of one of `FILES`.

    Raises:
        OracleMissingError: as `specforge_file`, or it cannot be imported.
    """
    specforge_file(oracle, name)
    try:
        return importlib.import_module(name.removesuffix(".py").replace("/", "."))
    except ImportError as error:
        wanted = "pip install datasets accelerate, which it imports, and"
        raise OracleMissingError(
            f"{name} cannot be imported ({error}): {wanted} {INSTALL}"
        ) from None


def script_functions(oracle: Oracle, *names: str) -> dict[str, Any]:
    """Functions of SpecForge's training script as they are; the rest of the script is not run."""
    path = specforge_file(oracle, SCRIPT)
    body = ast.parse(path.read_text()).body
    wanted = [node for node in body if getattr(node, "name", None) in names]

    # Their annotations name what is not imported here: they are not evaluated.
    future = ast.parse("from __future__ import annotations").body
    scope: dict[str, Any] = {"dist": torch.distributed, "torch": torch}
    exec(compile(ast.Module([*future, *wanted], []), str(path), "exec"), scope)
    return {name: scope[name] for name in names}


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """`Tensor.cuda` returns the tensor itself while this is open."""
    real: Any = Tensor.cuda
    Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.cuda = real  # type: ignore[method-assign]


# A target for both sides


def tiny_target(case: Case) -> Any:
    """A Hugging Face Llama of five layers, with the case's widths, dtype and seed."""
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
    model: Any = LlamaForCausalLM(config)

    # Norms around 1, matrices scaled by their fan-in.
    source = generator(case, 3)
    with torch.no_grad():
        for leaf in model.parameters():
            noise = torch.randn(leaf.shape, generator=source, dtype=torch.float64)
            if leaf.ndim == 1:
                leaf.copy_(1 + noise / 10)
            else:
                leaf.copy_(noise * 2 * leaf.shape[1] ** -0.5)
    return model.to(case.torch_dtype).eval().requires_grad_(False)


def target_frozen(case: Case, model: Any) -> Frozen:
    """The target's own embedding and head, with the case's vocabulary map."""
    embed = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    return tiny_frozen(case)._replace(embed_tokens=embed.detach(), target_head=head.detach())


# SpecForge's side


def specforge_target(oracle: Oracle, model: Any, layers: Sequence[int]) -> Any:
    """SpecForge's Hugging Face backend around `model`; it taps `layers`."""
    target = specforge_module(oracle, TARGET).HFEagle3TargetModel(model)
    target.set_aux_hidden_states_layers(list(layers))
    return target


def specforge_collate(oracle: Oracle, rows: Sequence[Encoded]) -> dict[str, Any]:
    """SpecForge's collator on tokens and masks; the masks are left as they are."""
    kind = specforge_module(oracle, COLLATOR).DataCollatorWithPadding
    collator = kind.__new__(kind)
    collator.sp_degree = 1
    collator.ulysses_degree = 1

    features = []
    for row in rows:
        features.append(
            {
                "input_ids": row.input_ids[None],
                "attention_mask": torch.ones_like(row.input_ids)[None],
                "loss_mask": row.token_mask[None],
            }
        )
    return collator(features)


def specforge_trainer(oracle: Oracle, case: Case, model: Any) -> tuple[Any, torch.nn.Module]:
    """SpecForge's training model with the case's loss, and its draft, for the target `model`."""
    draft = specforge_draft(oracle, case.draft(), tiny_params(case), target_frozen(case, model))
    trainer = oracle.eagle3.OnlineEagle3Model(
        draft,
        length=case.steps,
        attention_backend="sdpa",
        lk_loss_type=LK[str(case.loss)],
        kl_scale=case.kl_scale,
        kl_decay=case.kl_decay,
    )
    return trainer, draft


def run_online(
    oracle: Oracle, case: Case, model: Any, rows: Sequence[Encoded], layers: Sequence[int]
) -> Result:
    """As `specforge.oracle.run_oracle`, from the script's online `run_forward` on one batch.

    The target runs inside, and its logits are the teacher: SpecForge's compact teacher is for
    stored features alone.
    """
    trainer, draft = specforge_trainer(oracle, case, model)
    functions = script_functions(oracle, "run_forward", "get_dp_data_shard_from_tp")
    args = Namespace(is_vlm=False, target_model_backend="hf", shard_target_output=True)
    data = specforge_collate(oracle, rows)
    target = specforge_target(oracle, model, layers)
    with on_cpu(), eager_loss(oracle):
        lists = functions["run_forward"](args, trainer, data, target, is_online=True)
    losses, _, acceptance, correct, counts, *_ = lists

    loss = torch.zeros(())
    for step, value in enumerate(losses):
        loss = loss + 0.8**step * value
    loss.backward()

    result = {
        "loss": loss.detach(),
        "losses": torch.stack([value.detach() for value in losses]),
        "acceptance": torch.stack(acceptance),
        "correct": torch.stack(correct),
        "rows": torch.stack(counts),
    }
    for name, leaf in draft.named_parameters():
        if leaf.grad is not None:
            result[name] = leaf.grad
    return result
