"""A training step of speculators, in an environment that has it and not this package.

    python bench/speculators_step.py CASE TINY

Both are files that `bench.peers.write_case` wrote; one step of the second loads the libraries. The
process answers as `bench.answers` says: first versions, memory, the first step's loss and the same
by SpecForge's definition, then one line a step.

The step is its trainer's: forward with its loss, backward, clip, AdamW, schedule. The model is the
one that the other sides have: its Llama layer with the norms of EAGLE-3.1 off, K unroll steps.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import contextlib
import importlib
import json
from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from bench import memory
from bench.answers import open_answers, serve

MEMORY_STEPS = 2
STEPS = 1000  # of the schedule
CLIP = 1.0  # its trainer's, of the gradient norm
PACKAGES = ("speculators", "torch", "transformers")
EPSILON = 1e-5  # that its losses add to the number of rows
NOTES = (
    "its draft's head is a frozen copy of the target's rows: no gradient of it, no update",
    "its teacher covers the draft vocabulary alone: no logits of other tokens",
    "its loss is KL over the supervised rows, divided by their number; a row whose likeliest token "
    "is not in the draft vocabulary counts too",
    "run with K unroll steps and the decay of the other sides (its own: 3 and 1.0), the norms of "
    "EAGLE-3.1 off, residual before the norm, full attention, AdamW (its own: Muon)",
    "eager attention and loss: its Triton losses, flex_attention and compiled forward need a card",
    "bfloat16: weights in fp32 under autocast, as its trainer has them",
    "samples of a batch are packed into one row, as its collator packs them; a row near a sample's "
    "end is then scored against the next sample's first tokens, if these are supervised",
)


class Inputs(NamedTuple):
    """What is there before the side is made: frozen tensors and the batch of every step."""

    embed_tokens: Tensor  # (V, H) fp32
    teacher_head: Tensor  # (D, H) fp32, the target's rows of the draft vocabulary
    teacher_norm: Tensor  # () what its final norm multiplies by
    t2d: Tensor  # (V,) bool
    d2t: Tensor  # (D,) int64
    batch: dict[str, Tensor]  # its forward's arguments, (1, B·S, …)


class Problem(NamedTuple):
    """A case's file, and what its head says."""

    path: str
    draft: dict[str, Any]  # as the fields of our DraftConfig
    k: int
    decay: float
    dtype: torch.dtype

    def read(self, *names: str) -> list[Tensor]:
        """Tensors of the file, in memory of their own."""
        with safe_open(self.path, "pt") as file:
            return [file.get_tensor(name).clone() for name in names]

    def params(self) -> dict[str, Tensor]:
        """The first parameters, by our names."""
        with safe_open(self.path, "pt") as file:
            names = [name for name in file.keys() if name.startswith("params.")]  # noqa: SIM118
        return {
            name.removeprefix("params."): value
            for name, value in zip(names, self.read(*names), strict=True)
        }


def open_problem(path: str) -> Problem:
    """A case's file."""
    with safe_open(path, "pt") as file:
        head = file.metadata()
    return Problem(
        path=path,
        draft=json.loads(head["draft"]),
        k=int(head["k"]),
        decay=float(head["decay"]),
        dtype=getattr(torch, head["dtype"]),
    )


def make_inputs(problem: Problem) -> Inputs:
    """Frozen tensors and batch as speculators takes them."""
    embed, head, t2d, d2t = problem.read(
        "frozen.embed_tokens", "frozen.target_head", "frozen.t2d", "frozen.d2t"
    )
    next_ids, row_mask, aux, last = problem.read(
        "batch.next_ids", "batch.row_mask", "batch.aux_hidden", "batch.label_hidden"
    )

    # Row t of ours has the features of token t, the embedding of t + 1 and the label for t + 2:
    # the rows that its own data pipeline makes by dropping the first token.
    b, s, _ = aux.shape
    places = torch.arange(b).repeat_interleave(s)[None]
    batch = {
        "hidden_states": aux.reshape(1, b * s, -1),
        "input_ids": next_ids[:, :s].reshape(1, b * s),
        "document_ids": places,
        "loss_mask": row_mask[:, 0].reshape(1, b * s) > 0,
        "position_ids": 1 + torch.arange(s).repeat(b)[None],
        "verifier_last_hidden_states": last.reshape(1, b * s, -1),
    }

    # The features are those after the target's final norm, which speculators applies itself:
    # a weight that keeps their size.
    size = last.float().square().mean().sqrt()
    return Inputs(embed.float(), head[t2d].float(), size, t2d, d2t, batch)


def make_model(problem: Problem, inputs: Inputs) -> Any:
    """Its draft model with the problem's weights, in fp32."""
    from transformers import LlamaConfig

    eagle3: Any = importlib.import_module("speculators.models.eagle3")
    draft = problem.draft
    layer = LlamaConfig(
        vocab_size=draft["vocab_size"],
        hidden_size=draft["hidden_size"],
        intermediate_size=draft["intermediate_size"],
        num_attention_heads=1,
        head_dim=draft["head_dim"],
        max_position_embeddings=draft["max_position_embeddings"],
        rms_norm_eps=draft["rms_norm_eps"],
        num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": draft["rope_theta"]},
        tie_word_embeddings=False,
        pad_token_id=None,
    )
    # Set after LlamaConfig's own check, which refuses heads that don't divide the hidden size.
    layer.num_attention_heads = draft["num_attention_heads"]
    layer.num_key_value_heads = draft["num_key_value_heads"]
    layer._attn_implementation = "eager"
    config = eagle3.Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=draft["draft_vocab_size"],
        norm_before_residual=False,
        norm_before_fc=False,
        norm_output=False,
    )
    model = eagle3.Eagle3DraftModel(config)
    model.load_vocab_mappings(inputs.t2d, inputs.d2t)

    # The problem's weights instead of its own draw.
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in problem.params().items():
            own[name.replace("midlayer.", "layers.0.")].copy_(value)
        model.verifier_norm.weight.fill_(inputs.teacher_norm)
    model.embed_tokens.weight.data = inputs.embed_tokens  # not a second time in memory
    model.verifier_lm_head.weight.data = inputs.teacher_head
    return model


def forward(model: Any, problem: Problem, batch: dict[str, Tensor], loss: Any) -> tuple[Any, ...]:
    """Its forward under its trainer's autocast: drafted tokens, loss, metrics."""
    low = problem.dtype is torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16) if low else contextlib.nullcontext():
        return model(
            **batch, ttt_steps=problem.k, ttt_step_loss_decay=problem.decay, loss_config=loss
        )


def make_update(problem: Problem, inputs: Inputs) -> Callable[[], Tensor]:
    """A step of its own, as a call."""
    from transformers import get_linear_schedule_with_warmup

    losses: Any = importlib.import_module("speculators.losses")
    optimizers: Any = importlib.import_module("speculators.train.optimizers")
    model = make_model(problem, inputs).train()
    loss_config = losses.resolve_loss_config("kl_div", "eager")
    plan = SimpleNamespace(optimizer="adamw", lr=1e-4, weight_decay=0.01)
    (optimizer,) = optimizers.build_optimizers(model, plan)
    schedule = get_linear_schedule_with_warmup(optimizer, STEPS // 100, STEPS)

    def update() -> Tensor:
        loss = forward(model, problem, inputs.batch, loss_config)[1]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        return loss.detach()

    return update


@torch.no_grad()
def comparable_loss(problem: Problem, inputs: Inputs) -> float:
    """The first step's loss by SpecForge's definition, from this model's logits.

    That is `Σ_i decay^i · Σ_rows cross entropy / (B·S)`, over rows whose likeliest target token is
    in the draft vocabulary.
    """
    (head,) = problem.read("frozen.target_head")
    mask = inputs.batch["loss_mask"]
    last = inputs.batch["verifier_last_hidden_states"]
    tokens = torch.cat([(rows @ head.T).argmax(-1) for rows in last[0].split(128)])
    known = mask & inputs.t2d[tokens]

    def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        log_draft = torch.log_softmax(logits.float(), -1)
        return -(torch.softmax(targets.float(), -1) * log_draft).sum(-1)

    model = make_model(problem, inputs)
    model.verifier_norm = torch.nn.Identity()  # the features are past it
    batch = inputs.batch | {"loss_mask": known}
    metrics = forward(model, problem, batch, {"cross_entropy": (cross_entropy, 1.0)})[2]

    # Its means over rows become sums.
    total = 0.0
    for step in range(problem.k):
        rows = float(known[:, step:].sum())
        total += float(metrics[f"loss_{step}_sum"]) * (rows + EPSILON)
    return total / mask.numel()


def main() -> None:
    answers = open_answers()
    problem, tiny = (open_problem(path) for path in sys.argv[1:3])
    make_update(tiny, make_inputs(tiny))()

    inputs = make_inputs(problem)
    measured = memory.measure(lambda: make_update(problem, inputs), MEMORY_STEPS, "cpu")
    ready = {
        "versions": {name: version(name) for name in PACKAGES},
        "notes": NOTES,
        "memory": measured.used,
        "own_loss": float(measured.first),
        "first_loss": comparable_loss(problem, inputs),
    }
    serve(answers, ready, measured.update)


if __name__ == "__main__":
    main()
