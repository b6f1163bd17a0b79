"""Head, teacher and loss alone over draft vocabularies, forward and backward: the legacy expressions against the fast.

The hidden states of all unroll steps are random; gradients are by them, the head and the norm. The fast side has the
rows that `--masked` leaves. On CUDA the old tool's Triton loss, where it is at hand, is a third side. Ends with one
line of JSON: `ratio` is legacy over fast time at each draft vocabulary, `mfu` the fast side's share of the matmul rate.
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
from bench.problem import SHAPES, Drawer, Problem, draft_of, draw_params, make_problem
from eagle3fn.base.grad import value_and_grad
from eagle3fn.base.rows import shift
from eagle3fn.base.types import Params
from eagle3fn.model import layers, table
from eagle3fn.model.fast import label_targets, plan_rows
from eagle3fn.model.fused_layers import fused_rms_norm
from eagle3fn.model.head_loss import Labels, head_and_kl
from eagle3fn.model.losses import correct_rows, step_loss
from eagle3fn.model.teacher import make_teacher
from eagle3fn.specforge.oracle import Oracle
from eagle3fn.testing.provenance import provenance
from eagle3fn.train.launch import World, ranks

ROUNDS = 5
Call = Callable[[], tuple[Tensor, Params]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="smollm2", help="the draft's shape (default smollm2)")
    add("--seq", type=int, default=512, help="tokens of a sample (default 512)")
    add("--batch", type=int, default=1, help="samples (default 1)")
    add(
        "--vocabs",
        type=int,
        nargs="+",
        help="draft vocabularies (default 8192 16384 32768, tiny: 64)",
    )
    add("--masked", type=float, default=0.5, help="share of masked tokens (default 0.5)")
    add("--k", type=int, default=7, help="unroll steps (default 7)")
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="dtype (default bfloat16)",
    )
    add_arguments(parser)
    return parser.parse_args()


def plain_call(
    problem: Problem, leaves: Params, hidden: Tensor, k: int, oracle: Oracle | None
) -> Call:
    """Teacher, head, loss and metrics step by step on all rows; with an oracle, by its loss kernel."""
    batch, frozen, s = problem.batch, problem.frozen, problem.batch.input_ids.shape[1]
    objective = e3.ObjectiveConfig(
        numerics="plain", ttt_length=k, normalization="rows", teacher="full"
    )

    def loss(inner: Params) -> Tensor:
        teacher = make_teacher(shift(batch.last_hidden, 1), batch.row_mask, frozen, objective)
        mask, total = teacher.position_mask, torch.zeros((), device=hidden.device)
        for i in range(k):
            logits = layers.logits(inner, problem.draft, inner["hidden"][i])
            p, q = teacher.p_draft[:, i : i + s], teacher.p_full[:, i : i + s]
            correct_rows(logits.detach(), teacher.token[:, i : i + s], frozen)
            if oracle is None:
                part, _ = step_loss(logits, p, q, mask, None, objective)
            else:
                part, _ = _old_loss(oracle, logits, p, q, mask)
            total = total + objective.decay**i * part
            mask = shift(mask, 1)
        return total

    take = gradients if oracle is None else _by_tape
    return partial(take, loss, leaves | {"hidden": hidden})


def _by_tape(loss: Callable[[Params], Tensor], leaves: Params) -> tuple[Tensor, Params]:
    """Loss and gradients by autograd's own tape: torch.func refuses SpecForge's loss Function."""
    inputs = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    value = loss(inputs)
    return value.detach(), dict(
        zip(inputs, torch.autograd.grad(value, list(inputs.values())), strict=True)
    )


def _old_loss(
    oracle: Oracle, logits: Tensor, p: Tensor, q: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    module: Any = oracle.eagle3
    loss = module.LogSoftmaxLoss.apply(logits, p.contiguous(), mask)
    with torch.no_grad():
        return loss, module.compute_acceptance_rate(
            logits=logits, target_probs=q, position_mask=mask, reduce_fn=None
        )[0]


def fast_call(problem: Problem, leaves: Params, hidden: Tensor, k: int) -> Call:
    """What the fast numerics do behind the last hidden state, on the rows that contribute."""
    batch, frozen, objective = problem.batch, problem.frozen, e3.ObjectiveConfig()
    plan = plan_rows(batch, k)
    rows = hidden.flatten(1, 2)[:, plan.rows]
    factor = objective.decay ** torch.arange(k, device=hidden.device) / batch.input_ids.numel()
    labels = Labels(
        label_targets(batch, plan.labels, frozen), plan.row_of_label, plan.scored * factor[:, None]
    )

    def loss(inner: Params) -> Tensor:
        draft = fused_rms_norm(inner["hidden"], inner[table.NORM], problem.draft.rms_norm_eps)
        return head_and_kl(
            draft, inner[table.HEAD], labels, frozen.target_head, frozen.t2d, frozen.d2t
        ).loss

    return partial(gradients, loss, leaves | {"hidden": rows})


def gradients(loss: Callable[[Params], Tensor], leaves: Params) -> tuple[Tensor, Params]:
    """Loss and its gradients by every leaf."""
    return value_and_grad(loss)(leaves)


def measure(
    options: argparse.Namespace, vocab: int | None, oracle: Oracle | None, world: World
) -> dict[str, Any]:
    """One draft vocabulary."""
    dtype, device, k = getattr(torch, options.dtype), options.device, options.k
    draft = draft_of(options.shape, vocab, options.seq)
    problem = make_problem(
        draft, batch=options.batch, seq=options.seq, masked=options.masked, k=k, seed=options.seed, dtype=dtype,
        device=device, rank=world.rank,
    )  # fmt: skip
    params = draw_params(draft, options.seed, dtype, device)
    leaves = {name: params[name] for name in (table.NORM, table.HEAD)}
    hidden = Drawer(options.seed + 7, dtype, device)(
        (k, options.batch, options.seq, draft.hidden_size), 1.0
    )
    calls = {
        "plain": plain_call(problem, leaves, hidden, k, None),
        "fast": fast_call(problem, leaves, hidden, k),
    }
    if oracle is not None and device != "cpu":
        calls["old"] = plain_call(problem, leaves, hidden, k, oracle)
    losses = {name: float(call()[0]) for name, call in calls.items()}
    common.check_losses(losses)
    timing = common.in_turns(calls, options.rounds or ROUNDS, dtype, device, world, 0)
    work = common.flops(draft, problem.batch.row_mask, k)
    return {
        "draft_vocab": draft.draft_vocab_size,
        "ratio": timing.ratio("plain", "fast"),
        "mfu": timing.share("fast", work.head + work.teacher),
        "flops_needed": work.head + work.teacher,
        "first_loss": losses,
        "shares": common.row_shares(problem.batch.row_mask, k),
        **timing.told(),
    }


def run(options: argparse.Namespace, world: World) -> dict[str, Any]:
    """Every draft vocabulary."""
    options.device = world.device(options.device)
    oracle, reason = sides.find_oracle(options.device)
    vocabs = options.vocabs or ([None] if options.shape == "tiny" else [8192, 16384, 32768])
    cases = [measure(options, vocab, oracle, world) for vocab in vocabs]
    told = ("shape", "seq", "batch", "masked", "k", "dtype", "device", "seed", "allocator")
    return {
        "ratio": {str(case["draft_vocab"]): case["ratio"] for case in cases},
        "mfu": {str(case["draft_vocab"]): case["mfu"] for case in cases},
        "settings": {n: getattr(options, n) for n in told}
        | {"rounds": options.rounds or ROUNDS, "ranks": world.size},
        "cases": cases,
        **(sides.describe(oracle, reason, options.device) if options.device != "cpu" else {}),
        **provenance(),
    }


def main() -> None:
    options = parse()
    with ranks() as world:
        result = run(options, world)
        if world.main:
            for case in result["cases"]:
                took = ", ".join(
                    f"{name} {value * 1000:.1f} ms" for name, value in case["seconds"].items()
                )
                common.say(
                    options,
                    f"D {case['draft_vocab']}: {took}; ratio {case['ratio']:.2f}, mfu {case['mfu']:.1%}",
                )
            common.finish(
                result, options.out, f"loss-{options.shape}-{options.device}-{options.allocator}"
            )


if __name__ == "__main__":
    common.guarded(main)
