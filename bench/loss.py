"""Teacher, head and loss alone over draft vocabularies, forward and backward: plain against fast.

    python -m bench.loss --vocabs 8192 16384

The hidden states of all unroll steps are random; gradients are by them, the head and the norm. The
fast side has the rows that `--masked` leaves. On CUDA SpecForge's Triton loss, where it is at hand,
is a third side. The last line is JSON: `ratio` is plain over fast time at each draft vocabulary,
`mfu` the fast side's share of the matmul rate.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from bench.launch import settle

    settle()

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import eagle3fn as e3
from bench import common, sides
from bench.launch import add_arguments
from bench.problem import Drawer, Problem, draft_of, draw_params, make_problem
from eagle3fn.base.grad import value_and_grad
from eagle3fn.base.provenance import provenance
from eagle3fn.base.rows import shift
from eagle3fn.base.types import Params
from eagle3fn.model import layers, table
from eagle3fn.model.fast import label_targets, plan_rows
from eagle3fn.model.fused_layers import fused_rms_norm
from eagle3fn.model.head_loss import Labels, head_and_loss
from eagle3fn.model.losses import acceptance, correct_rows, find_loss, step_loss
from eagle3fn.model.teacher import make_teacher
from eagle3fn.specforge.oracle import Oracle
from eagle3fn.train.launch import World, ranks

ROUNDS = 5
SETTINGS = ("shape", "seq", "batch", "masked", "k", "dtype", "device", "seed", "allocator")
VOCABS = (8192, 16384, 32768)
HIDDEN = "hidden"  # the hidden states, among the leaves that are differentiated by

Gradients = Callable[[], tuple[Tensor, Params]]
"""Makes the loss and its gradients by every leaf."""


def parse() -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    common.add_problem_arguments(parser)
    add = parser.add_argument
    add("--seq", type=int, default=512, help="tokens of a sample (default 512)")
    add("--batch", type=int, default=1, help="samples (default 1)")
    about = "draft vocabularies (default 8192 16384 32768, tiny: 64)"
    add("--vocabs", type=int, nargs="+", help=about)
    add_arguments(parser)
    return parser.parse_args()


def plain_call(
    problem: Problem, leaves: Params, hidden: Tensor, k: int, oracle: Oracle | None
) -> Gradients:
    """Teacher, head, loss and metrics step by step on all rows.

    Args:
        problem: draft, frozen tensors, batch.
        leaves: head and norm.
        hidden: the last hidden states of all unroll steps, `(K, B, S, H)`.
        k: unroll steps.
        oracle: SpecForge, whose loss kernel is then taken; None: the plain expression.
    """
    batch = problem.batch
    frozen = problem.frozen
    s = batch.input_ids.shape[1]
    objective = e3.ObjectiveConfig(
        numerics="plain", ttt_length=k, normalization="rows", teacher="full"
    )

    def loss(inner: Params) -> Tensor:
        teacher = make_teacher(shift(batch.last_hidden, 1), batch.row_mask, frozen, objective)
        mask = teacher.position_mask
        total = torch.zeros((), device=hidden.device)
        for i in range(k):
            logits = layers.logits(inner, problem.draft, inner[HIDDEN][i])
            p_draft = teacher.p_draft[:, i : i + s]
            p_full = teacher.p_full[:, i : i + s]
            correct_rows(logits.detach(), teacher.token[:, i : i + s], frozen)
            if oracle is None:
                part = step_loss(logits, p_draft, p_full, mask, None, find_loss(objective))
                acceptance(logits.detach(), p_full)
            else:
                part = _specforge_step(oracle, logits, p_draft, p_full, mask)
            total = total + objective.decay**i * part
            mask = shift(mask, 1)
        return total

    take = value_and_grad(loss) if oracle is None else partial(_by_autograd, loss)
    return partial(take, leaves | {HIDDEN: hidden})


def _by_autograd(loss: Callable[[Params], Tensor], leaves: Params) -> tuple[Tensor, Params]:
    """Loss and gradients by autograd's own graph: torch.func refuses SpecForge's loss Function."""
    inputs = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    value = loss(inputs)
    gradients = torch.autograd.grad(value, list(inputs.values()))
    return value.detach(), dict(zip(inputs, gradients, strict=True))


def _specforge_step(
    oracle: Oracle, logits: Tensor, p_draft: Tensor, p_full: Tensor, mask: Tensor
) -> Tensor:
    """One step's loss by SpecForge's kernel; its acceptance rate is made too, and dropped."""
    module: Any = oracle.eagle3
    loss = module.LogSoftmaxLoss.apply(logits, p_draft.contiguous(), mask)
    with torch.no_grad():
        module.compute_acceptance_rate(
            logits=logits, target_probs=p_full, position_mask=mask, reduce_fn=None
        )
    return loss


def fast_call(problem: Problem, leaves: Params, hidden: Tensor, k: int) -> Gradients:
    """What the fast numerics do after the last hidden state, on the rows that contribute.

    Args:
        problem: draft, frozen tensors, batch.
        leaves: head and norm.
        hidden: the last hidden states of all unroll steps, `(K, B, S, H)`.
        k: unroll steps.
    """
    batch = problem.batch
    frozen = problem.frozen
    objective = e3.ObjectiveConfig()
    plan = plan_rows(batch, k)
    rows = hidden.flatten(1, 2)[:, plan.rows]  # (K, T, H)

    # The weight of a step's term: decay^i over all rows.
    weight = objective.decay ** torch.arange(k, device=hidden.device) / batch.input_ids.numel()
    targets = label_targets(batch, plan.labels, frozen)
    labels = Labels(targets, plan.row_of_label, plan.scored * weight[:, None])

    def loss(inner: Params) -> Tensor:
        normed = fused_rms_norm(inner[HIDDEN], inner[table.NORM], problem.draft.rms_norm_eps)
        head = inner[table.HEAD]
        row_loss = find_loss(objective)
        return head_and_loss(
            normed, head, labels, frozen.target_head, frozen.t2d, frozen.d2t, row_loss
        ).loss

    return partial(value_and_grad(loss), leaves | {HIDDEN: rows})


def measure(
    options: argparse.Namespace, vocab: int | None, oracle: Oracle | None, world: World
) -> dict[str, Any]:
    """One draft vocabulary."""
    dtype = getattr(torch, options.dtype)
    device = options.device
    k = options.k
    draft = draft_of(options.shape, vocab, options.seq)
    problem = make_problem(
        draft,
        batch=options.batch,
        seq=options.seq,
        masked=options.masked,
        k=k,
        seed=options.seed,
        dtype=dtype,
        device=device,
        rank=world.rank,
    )
    params = draw_params(draft, options.seed, dtype, device)
    leaves = {name: params[name] for name in (table.NORM, table.HEAD)}
    draw = Drawer(options.seed + 7, dtype, device)
    hidden = draw((k, options.batch, options.seq, draft.hidden_size), 1.0)

    calls = {
        "plain": plain_call(problem, leaves, hidden, k, None),
        "fast": fast_call(problem, leaves, hidden, k),
    }
    if oracle is not None and device != "cpu":
        calls["specforge"] = plain_call(problem, leaves, hidden, k, oracle)
    losses = {name: float(call()[0]) for name, call in calls.items()}
    common.check_losses(losses)
    timing = common.in_turns(calls, options.rounds or ROUNDS, dtype, device, world, warm=0)

    work = common.flops(draft, problem.batch.row_mask, k)
    needed = work.head + work.teacher
    return {
        "draft_vocab": draft.draft_vocab_size,
        "ratio": timing.ratio("plain", "fast"),
        "mfu": timing.share("fast", needed),
        "flops_needed": needed,
        "first_loss": losses,
        "shares": common.row_shares(problem.batch.row_mask, k),
        **timing.summary(),
    }


def run(options: argparse.Namespace, world: World) -> dict[str, Any]:
    """Every draft vocabulary."""
    options.device = world.device(options.device)
    oracle, reason = sides.find_oracle(options.device)
    vocabs = options.vocabs or ([None] if options.shape == "tiny" else VOCABS)
    cases = [measure(options, vocab, oracle, world) for vocab in vocabs]

    on_card = options.device != "cpu"
    return {
        "ratio": {str(case["draft_vocab"]): case["ratio"] for case in cases},
        "mfu": {str(case["draft_vocab"]): case["mfu"] for case in cases},
        "settings": common.settings_of(options, SETTINGS, ROUNDS, world),
        "cases": cases,
        **(sides.describe(oracle, reason, options.device) if on_card else {}),
        **provenance(),
    }


def main() -> None:
    options = parse()
    with ranks() as world:
        result = run(options, world)
        if world.main:
            for case in result["cases"]:
                common.show_case(options, f"D {case['draft_vocab']}", case)
            name = f"loss-{options.shape}-{options.device}-{options.allocator}"
            common.finish(result, options.out, name)


if __name__ == "__main__":
    sys.exit(common.program("bench.loss", main))
