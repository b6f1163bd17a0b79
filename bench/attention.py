"""Attention alone over sequence lengths, forward and backward of all steps: plain against fast.

    python -m bench.attention --seqs 512 1024

Queries, keys and values are random; the fast side has each step's rows, which `--masked` leaves.
The last line is JSON: `ratio` is plain over fast time at each length, `mfu` the fast side's share
of the matmul rate.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from bench.launch import settle

    settle()

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import common
from bench.launch import add_arguments
from bench.problem import Problem, draft_of, make_problem
from eagle3fn.base.launch import World, ranks
from eagle3fn.base.provenance import provenance
from eagle3fn.model.forward import NUMERICS
from eagle3fn.model.visibility import visible

ROUNDS = 5
WARM = 2  # rounds before the timed ones
SETTINGS = ("shape", "batch", "masked", "k", "dtype", "device", "seed")


def parse() -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    common.add_problem_arguments(parser)
    add = parser.add_argument
    about = "lengths (default 512 1024 2048)"
    add("--seqs", type=int, nargs="+", default=[512, 1024, 2048], help=about)
    add("--batch", type=int, default=1, help="samples (default 1)")
    add_arguments(parser)
    return parser.parse_args()


def attention_call(problem: Problem, k: int, numerics: str, seed: int = 0) -> Callable[[], object]:
    """All steps' attention and its gradients by queries, keys and values.

    Args:
        problem: draft and batch.
        k: unroll steps.
        numerics: "plain": every row, heads expanded; "fast": the plan's rows of each step.
        seed: of queries, keys and values.
    """
    batch = problem.batch
    draft = problem.draft
    ops = NUMERICS[numerics]
    b, s = batch.attention_mask.shape
    n = draft.num_attention_heads
    j = draft.num_key_value_heads
    e = draft.head_dim
    plan = ops.plan(batch)
    place = torch.arange(s, device=batch.attention_mask.device).expand(b, s)

    # Shapes of the steps' tensors: of every place with expanded heads, or of each step's rows.
    if plan is None:
        query_shapes = key_shapes = [(b, n, s, e)] * k
    else:
        sizes = plan.sizes.tolist()
        query_shapes = [(size, n, e) for size in sizes]
        key_shapes = [(b, s, j, e), *((size, j, e) for size in sizes[1:])]

    source = torch.Generator(place.device).manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randn(shape, generator=source, device=place.device)
        return drawn.to(batch.aux_hidden.dtype)

    queries = [draw(shape) for shape in query_shapes]
    keys = [draw(shape) for shape in key_shapes]
    values = [draw(shape) for shape in key_shapes]
    weights = [draw(shape) for shape in query_shapes]  # of the sum that is differentiated

    # What each step's rows see, cut beforehand.
    sights = []
    for query in queries:
        rows = None if plan is None else plan.rows[: len(query)]
        at = place if rows is None else place.flatten()[rows]
        seen = visible(draft, at, 0)
        sights.append(ops.sight(seen, rows, batch, draft, keys[0].dtype))

    def attend(queries: list[Tensor], keys: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        """Every step over step 0's keys and its rows' own later ones so far."""
        steps = []
        for i, (query, sight) in enumerate(zip(queries, sights, strict=True)):
            step_keys, step_values = (
                [x[0], *(own[: len(query)] for own in x[1 : i + 1])] for x in (keys, values)
            )
            steps.append(ops.attend(query, step_keys, step_values, sight))
        return steps

    def call() -> object:
        pull_back = torch.func.vjp(attend, queries, keys, values)[1]
        with torch.no_grad():
            return pull_back(weights)

    return call


def measure(options: argparse.Namespace, seq: int, world: World) -> dict[str, Any]:
    """One length."""
    dtype = getattr(torch, options.dtype)
    device = options.device
    problem = make_problem(
        draft_of(options.shape, None, seq),
        batch=options.batch,
        seq=seq,
        masked=options.masked,
        k=options.k,
        seed=options.seed,
        dtype=dtype,
        device=device,
        rank=world.rank,
    )
    calls = {
        name: attention_call(problem, options.k, name, options.seed) for name in ("plain", "fast")
    }
    timing = common.in_turns(calls, options.rounds or ROUNDS, dtype, device, world, WARM)

    needed = common.flops(problem.draft, problem.scored).attention
    return {
        "seq": seq,
        "ratio": timing.ratio("plain", "fast"),
        "mfu": timing.share("fast", needed),
        "flops_needed": needed,
        "shares": common.row_shares(problem.scored),
        **timing.summary(),
    }


def run(options: argparse.Namespace, world: World) -> dict[str, Any]:
    """Every length."""
    options.device = world.device(options.device)
    cases = [measure(options, seq, world) for seq in options.seqs]
    return {
        "ratio": {str(case["seq"]): case["ratio"] for case in cases},
        "mfu": {str(case["seq"]): case["mfu"] for case in cases},
        "settings": common.settings_of(options, SETTINGS, ROUNDS, world),
        "cases": cases,
        **provenance(),
    }


def main() -> None:
    options = parse()
    with ranks() as world:
        result = run(options, world)
        if world.main:
            for case in result["cases"]:
                common.show_case(options, f"S {case['seq']}", case)
            name = f"attention-{options.shape}-{options.device}-{options.allocator}"
            common.finish(result, options.out, name)


if __name__ == "__main__":
    sys.exit(common.program("bench.attention", main))
