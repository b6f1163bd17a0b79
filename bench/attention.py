"""The attention part alone over sequence lengths: all unroll steps, forward and backward, legacy against fast.

Queries, keys and values are random; the fast side has the rows that `--masked` leaves. Ends with one line of JSON:
`ratio` is legacy over fast time at each length, `mfu` the fast side's share of the matmul rate.
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
from bench.problem import SHAPES, Problem, draft_of, make_problem
from eagle3fn.model.attention import block_mask, unrolled_attention
from eagle3fn.model.fast import attention_on
from eagle3fn.testing.provenance import provenance
from eagle3fn.train.launch import World, ranks

ROUNDS = 5


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="smollm2", help="the draft's shape (default smollm2)")
    add(
        "--seqs",
        type=int,
        nargs="+",
        default=[512, 1024, 2048],
        help="lengths (default 512 1024 2048)",
    )
    add("--batch", type=int, default=1, help="samples (default 1)")
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


def attention_call(problem: Problem, k: int, numerics: str, seed: int = 0) -> Callable[[], object]:
    """All steps' attention and its gradients by queries, keys and values, under these numerics."""
    batch, draft = problem.batch, problem.draft
    (b, s), dtype, device = batch.input_ids.shape, batch.aux_hidden.dtype, batch.input_ids.device
    fast = numerics == "fast"
    source = torch.Generator(device).manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=source, device=device).to(dtype)  # noqa: E731
    n, j, e = draft.num_attention_heads, draft.num_key_value_heads, draft.head_dim
    mask, rows = block_mask(batch.attention_mask, dtype), batch.rows
    assert rows is not None
    attend_rows = attention_on(rows.device, dtype, e, rows, s)
    query, own, block = (
        ((len(rows), n, e), (len(rows), j, e), (b, s, j, e)) if fast else ((b, n, s, e),) * 3
    )
    inputs = [
        [draw(*query) for _ in range(k)],
        *([draw(*block), *(draw(*own) for _ in range(k - 1))] for _ in "kv"),
    ]
    weight, none = draw(k, *query), draw(0, *own)

    def attend(queries: list[Tensor], keys: list[Tensor], values: list[Tensor]) -> Tensor:
        if not fast:
            return torch.stack(
                [
                    unrolled_attention(queries[i], keys[: i + 1], values[: i + 1], mask)
                    for i in range(k)
                ]
            )
        later = [
            (torch.stack(keys[1:i]), torch.stack(values[1:i])) if i > 1 else (none, none)
            for i in range(1, k + 1)
        ]
        each = zip(queries, later, strict=True)
        return torch.stack([attend_rows(q, keys[0], values[0], *mine) for q, mine in each])

    def call() -> object:
        pull = torch.func.vjp(attend, *inputs)[1]
        with torch.no_grad():
            return pull(weight)

    return call


def measure(options: argparse.Namespace, seq: int, world: World) -> dict[str, Any]:
    """One length."""
    dtype, device = getattr(torch, options.dtype), options.device
    problem = make_problem(
        draft_of(options.shape, None, seq), batch=options.batch, seq=seq, masked=options.masked, k=options.k,
        seed=options.seed, dtype=dtype, device=device, rank=world.rank,
    )  # fmt: skip
    calls = {
        name: attention_call(problem, options.k, name, options.seed) for name in ("plain", "fast")
    }
    timing = common.in_turns(calls, options.rounds or ROUNDS, dtype, device, world, 2)
    count = common.flops(problem.draft, problem.batch.row_mask, options.k).attention
    return {
        "seq": seq,
        "ratio": timing.ratio("plain", "fast"),
        "mfu": timing.share("fast", count),
        "flops_needed": count,
        "shares": common.row_shares(problem.batch.row_mask, options.k),
        **timing.told(),
    }


def run(options: argparse.Namespace, world: World) -> dict[str, Any]:
    """Every length."""
    options.device = world.device(options.device)
    cases = [measure(options, seq, world) for seq in options.seqs]
    settings = {
        name: getattr(options, name)
        for name in ("shape", "batch", "masked", "k", "dtype", "device", "seed")
    }
    return {
        "ratio": {str(case["seq"]): case["ratio"] for case in cases},
        "mfu": {str(case["seq"]): case["mfu"] for case in cases},
        "settings": settings | {"rounds": options.rounds or ROUNDS, "ranks": world.size},
        "cases": cases,
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
                    f"S {case['seq']}: {took}; ratio {case['ratio']:.2f}, mfu {case['mfu']:.1%}",
                )
            common.finish(
                result,
                options.out,
                f"attention-{options.shape}-{options.device}-{options.allocator}",
            )


if __name__ == "__main__":
    common.guarded(main)
