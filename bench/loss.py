"""Teacher, head and loss alone over draft vocabularies, forward and backward: plain against fast.

    python -m bench.loss --vocabs 8192 16384

The hidden states of all unroll steps are random; gradients are by them, the head and the norm. The
fast side has each step's rows, which `--masked` leaves. On CUDA SpecForge's Triton loss, where it
is at hand, is a third side. The last line is JSON: `ratio` is plain over fast time at each draft
vocabulary, `mfu` the fast side's share of the matmul rate.
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
from typing import Any, Literal

import torch
from torch import Tensor

import eagle3fn as e3
from bench import common, sides
from bench.launch import add_arguments
from bench.problem import Drawer, Problem, draft_of, draw_params, make_problem
from eagle3fn.base.config import Config
from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.grad import value_and_grad
from eagle3fn.base.launch import World, ranks
from eagle3fn.base.provenance import provenance
from eagle3fn.base.types import Params
from eagle3fn.model import table
from eagle3fn.model.forward import NUMERICS
from eagle3fn.model.losses import correct_rows
from eagle3fn.model.named_loss import find_loss
from eagle3fn.model.plain import logits
from eagle3fn.model.teacher import make_teacher
from eagle3fn.specforge.oracle import Oracle

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


Numerics = Literal["plain", "fast"]


def config_of(draft: DraftConfig, k: int, numerics: Numerics) -> Config:
    """A loss that is a mean over all rows, with SpecForge's teacher under the plain numerics."""
    objective = e3.ObjectiveConfig(
        numerics=numerics, ttt_length=k, normalization="rows", teacher="full"
    )
    return Config(draft, objective)


def our_call(
    problem: Problem, leaves: Params, hidden: Tensor, k: int, numerics: Numerics
) -> Gradients:
    """What our numerics do after the last hidden state: teacher, head, loss and metrics.

    "plain": step by step on all rows; "fast": on the plan's rows of each step.

    Args:
        problem: draft, frozen tensors, batch.
        leaves: head and norm.
        hidden: the last hidden states of all unroll steps, `(K, B, S, H)`.
        k: unroll steps.
        numerics: "plain" or "fast".
    """
    ops = NUMERICS[numerics]
    config = config_of(problem.draft, k, numerics)
    row_loss = find_loss(config.objective)
    plan = ops.plan(problem.batch)

    if plan is not None:
        # The rows of all steps, one step after another.
        steps = zip(hidden.flatten(1, 2), plan.sizes, strict=False)
        hidden = torch.cat([places[plan.rows[:size]] for places, size in steps])  # (R, H)

    def loss(inner: Params) -> Tensor:
        states = inner[HIDDEN]
        states = states.unbind() if plan is None else states.split(plan.sizes.tolist())
        parts = plan, problem.batch, config, problem.frozen, row_loss
        return ops.score(inner, states, *parts)[0]

    return partial(value_and_grad(loss), leaves | {HIDDEN: hidden})


def specforge_call(
    problem: Problem, leaves: Params, hidden: Tensor, k: int, oracle: Oracle
) -> Gradients:
    """As `our_call` under "plain", with SpecForge's Triton loss and acceptance rate."""
    batch = problem.batch
    frozen = problem.frozen
    s = batch.attention_mask.shape[1]
    objective = config_of(problem.draft, k, "plain").objective

    def loss(inner: Params) -> Tensor:
        teacher = make_teacher(batch.label_hidden, frozen, objective)
        total = torch.zeros((), device=hidden.device)
        for i in range(k):
            # Row t is scored against the label at t + i.
            at = slice(i, i + s)
            mask = (teacher.known[:, at] * batch.row_mask[:, i])[..., None]
            draft_logits = logits(inner, problem.draft, inner[HIDDEN][i])
            correct_rows(draft_logits.detach(), teacher.token[:, at], frozen)
            probabilities = teacher.p_draft[:, at], teacher.p_full[:, at]
            part = _specforge_step(oracle, draft_logits, *probabilities, mask)
            total = total + objective.decay**i * part
        return total

    return partial(_by_autograd, loss, leaves | {HIDDEN: hidden})


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
        "plain": our_call(problem, leaves, hidden, k, "plain"),
        "fast": our_call(problem, leaves, hidden, k, "fast"),
    }
    if oracle is not None and device != "cpu":
        calls["specforge"] = specforge_call(problem, leaves, hidden, k, oracle)
    losses = {name: float(call()[0]) for name, call in calls.items()}
    common.check_losses(losses)
    timing = common.in_turns(calls, options.rounds or ROUNDS, dtype, device, world, warm=0)

    work = common.flops(draft, problem.scored)
    needed = work.head + work.teacher
    return {
        "draft_vocab": draft.draft_vocab_size,
        "ratio": timing.ratio("plain", "fast"),
        "mfu": timing.share("fast", needed),
        "flops_needed": needed,
        "first_loss": losses,
        "shares": common.row_shares(problem.scored),
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
