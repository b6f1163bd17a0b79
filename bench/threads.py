"""What the commands compute, timed at each number of threads, next to what the short measurement
of their start chooses.

| work | what it is |
|---|---|
| `train` | the fast training step |
| `extract` | the target's forward over one sample |
| `evaluate` | the target's next tokens of one sequence, and a block that it verifies |
| `synthesize` | the next tokens of many sequences at once |

The target has the shape's sizes and random weights.
"""

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch

from bench import common, step
from bench.problem import SHAPES, Problem
from eagle3fn.base.thread_timing import (
    Measured,
    Sizes,
    Work,
    fastest,
    large_products,
    thin_products,
)
from eagle3fn.data.decoder import hidden_states
from eagle3fn.use.decode import open_target

PROMPT = 32  # tokens before those that are decoded
TOKENS = 4  # decoded one after another
BLOCK = 8  # a verified block
SEQUENCES = 64  # of synthesis


class Job(NamedTuple):
    """Work of a command, and what its start measures instead."""

    call: Work
    make_work: Callable[[], Work]


def jobs_of(point: argparse.Namespace, problem: Problem) -> dict[str, Job]:
    """The commands' work in one dtype."""
    dtype = getattr(torch, point.dtype)
    draft = problem.draft
    shape = SHAPES[point.shape]
    sizes = Sizes(shape.hidden_size, shape.intermediate_size, point.layers, shape.vocab_size)
    model = target_of(point)
    ids = torch.ones(1, point.seq, dtype=torch.int64)
    return {
        "train": Job(
            step.side_of("fast", point, problem, None),
            lambda: large_products(draft.hidden_size, draft.draft_vocab_size, dtype),
        ),
        "extract": Job(
            lambda: hidden_states(model, ids, ids, [0, 0, 0]),
            lambda: large_products(sizes.hidden, sizes.intermediate, dtype),
        ),
        "evaluate": Job(
            decoding(model, 1, [1] * TOKENS + [BLOCK]),
            lambda: thin_products(sizes, [1, BLOCK], dtype),
        ),
        "synthesize": Job(
            decoding(model, SEQUENCES, [1]),
            lambda: thin_products(sizes, [SEQUENCES], dtype),
        ),
    }


def target_of(point: argparse.Namespace) -> Any:
    """A target of the shape's sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[point.shape]
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=point.layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=max(point.seq, 2048),
        tie_word_embeddings=True,
    )
    torch.manual_seed(point.seed)
    model: Any = LlamaForCausalLM(config)
    return model.to(getattr(torch, point.dtype)).eval().requires_grad_(False)


def decoding(model: Any, sequences: int, blocks: list[int]) -> Work:
    """Reads blocks of so many tokens one after another, after a prompt that stays in the cache."""
    prompt = torch.ones(sequences, PROMPT, dtype=torch.int64)
    with torch.inference_mode(), open_target(model, None) as target:
        target.read(prompt, keep=1)

    @torch.inference_mode()
    def call() -> None:
        for size in blocks:
            target.read(prompt[:, :size])
        target.forget(sum(blocks))

    return call


def measure(
    point: argparse.Namespace, counts: list[int], rounds: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Seconds of every job at every count, a row a count; and what the short measurement chose.

    In each round every job is called at every count, after a first call that is not timed.
    """
    problem = step.problem_of(point)
    jobs = jobs_of(point, problem)
    before = torch.get_num_threads()
    chosen = {name: fastest(job.make_work, counts) for name, job in jobs.items()}

    matmul = common.best_matmul(getattr(torch, point.dtype), point.device)
    calls = {name: job.call for name, job in jobs.items()} | {"matmul": matmul.call}
    times: dict[str, dict[int, list[float]]] = {
        name: {count: [] for count in counts} for name in calls
    }
    for number in range(rounds):
        for name, call in calls.items():
            for count in counts if number % 2 == 0 else counts[::-1]:
                torch.set_num_threads(count)
                call()
                times[name][count].append(common.seconds(call, point.device))
    torch.set_num_threads(before)

    tokens = problem.batch.attention_mask.numel()
    needed = common.flops(problem.draft, problem.batch.row_mask).total
    rows = []
    for count in counts:
        took = {name: median(by_count[count]) for name, by_count in times.items()}
        rate = matmul.flops / took.pop("matmul")
        rows.append(
            {
                "threads": count,
                "tokens": tokens,
                "seconds": took["train"],
                "us_per_token": 1e6 * took["train"] / tokens,
                "flops_needed": needed,
                "mfu": needed / took["train"] / rate,
                "matmul_gflops": rate / 1e9,
                "all_work_seconds": took,
                "all_seconds": {name: by_count[count] for name, by_count in times.items()},
            }
        )
    return rows, {name: against_truth(name, found, rows) for name, found in chosen.items()}


def against_truth(name: str, found: Measured, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the short measurement chose, and its time over that of the best count."""
    seconds = {row["threads"]: row["all_work_seconds"][name] for row in rows}
    best = min(seconds, key=seconds.__getitem__)
    return {
        "chosen": found.count,
        "best": best,
        "time_over_best": seconds[found.count] / seconds[best],
        "measurement_seconds": found.seconds,
        "measured": {str(count): ratio for count, ratio in found.relative.items()},
        "truth": {str(count): took / seconds[1] for count, took in seconds.items()},
    }
