"""Attention alone over sequence lengths, forward and backward of all steps: plain against fast.

    python -m bench.attention --seqs 512 1024

Queries, keys and values are random; the fast side has the rows that `--masked` leaves. The last
line is JSON: `ratio` is plain over fast time at each length, `mfu` the fast side's share of the
matmul rate.
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
from eagle3fn.base.provenance import provenance
from eagle3fn.model.attention import block_mask, unrolled_attention
from eagle3fn.model.fast import attention_on
from eagle3fn.train.launch import World, ranks

ROUNDS = 5
WARM = 2  # rounds before the timed ones
SETTINGS = ("shape", "batch", "masked", "k", "dtype", "device", "seed")

Attend = Callable[[list[Tensor], list[Tensor], list[Tensor]], Tensor]
"""`(queries, keys, values)` of all unroll steps → what each step attends, stacked."""


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
        numerics: "plain": every row, heads expanded; "fast": the rows that contribute.
        seed: of queries, keys and values.
    """
    batch = problem.batch
    draft = problem.draft
    b, s = batch.input_ids.shape
    n = draft.num_attention_heads
    j = draft.num_key_value_heads
    e = draft.head_dim
    assert batch.rows is not None

    if numerics == "fast":
        attend = _fast(problem)
        query = (len(batch.rows), n, e)
        step0_key = (b, s, j, e)
        later_key = (len(batch.rows), j, e)
    else:
        attend = _plain(problem)
        query = step0_key = later_key = (b, n, s, e)

    source = torch.Generator(batch.input_ids.device).manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randn(shape, generator=source, device=batch.input_ids.device)
        return drawn.to(batch.aux_hidden.dtype)

    def draw_keys() -> list[Tensor]:
        return [draw(step0_key), *(draw(later_key) for _ in range(k - 1))]

    queries = [draw(query) for _ in range(k)]
    keys = draw_keys()
    values = draw_keys()
    weight = draw((k, *query))  # of the sum that is differentiated

    def call() -> object:
        pull_back = torch.func.vjp(attend, queries, keys, values)[1]
        with torch.no_grad():
            return pull_back(weight)

    return call


def _plain(problem: Problem) -> Attend:
    """Every row over keys and values of all steps so far."""
    mask = block_mask(problem.batch.attention_mask, problem.batch.aux_hidden.dtype)

    def attend(queries: list[Tensor], keys: list[Tensor], values: list[Tensor]) -> Tensor:
        steps = []
        for i, query in enumerate(queries):
            steps.append(unrolled_attention(query, keys[: i + 1], values[: i + 1], mask))
        return torch.stack(steps)

    return attend


def _fast(problem: Problem) -> Attend:
    """Contributing rows over their sample's step-0 keys and their own later ones."""
    batch = problem.batch
    dtype = batch.aux_hidden.dtype
    assert batch.rows is not None
    attend_rows = attention_on(
        batch.rows.device, dtype, problem.draft.head_dim, batch.rows, batch.input_ids.shape[1]
    )

    def attend(queries: list[Tensor], keys: list[Tensor], values: list[Tensor]) -> Tensor:
        steps = []
        for i, query in enumerate(queries):
            step_keys = keys[1 : i + 1]
            step_values = values[1 : i + 1]
            steps.append(attend_rows(query, keys[0], values[0], step_keys, step_values))
        return torch.stack(steps)

    return attend


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

    mask = problem.batch.row_mask
    needed = common.flops(problem.draft, mask, options.k).attention
    return {
        "seq": seq,
        "ratio": timing.ratio("plain", "fast"),
        "mfu": timing.share("fast", needed),
        "flops_needed": needed,
        "shares": common.row_shares(mask, options.k),
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
