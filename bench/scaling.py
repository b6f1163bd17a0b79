"""How the fast step's cost grows with sequence length, draft vocabulary, batch and unroll, with a picture.

Sequence lengths share a fixed number of tokens. The points of a sweep are timed in turns in one process; memory, over
draft vocabularies, comes from one child process a point. Ends with one line of JSON: `seq_growth` is the time a token
at the longest sequence over that at the shortest, attention's own time taken out on both, `memory_growth` the bytes
beyond weights, gradients, masters and moments at the largest draft vocabulary over those at the smallest.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from bench.launch import settle

    settle()

import argparse
from math import prod
from typing import Any

import torch

from bench import common, step
from bench.attention import attention_call
from bench.launch import add_arguments
from bench.problem import SHAPES, draft_of
from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.model.table import shapes
from eagle3fn.testing.provenance import provenance
from eagle3fn.train.launch import World, ranks

ROUNDS = 3
STATE_BYTES = {
    "bfloat16": 16,
    "float32": 20,
}  # a parameter's weight, gradient, master and two moments


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, many = parser.add_argument, {"type": int, "nargs": "+"}
    add("--shape", choices=SHAPES, default="smollm2", help="the draft's shape (default smollm2)")
    add(
        "--seqs",
        **many,
        default=[512, 1024, 2048, 4096, 8192],
        help="lengths; the longest is the fixed tokens",
    )
    add("--vocabs", **many, default=[8192, 16384, 32768, 49152], help="draft vocabularies")
    add("--batches", **many, default=[1, 2, 4], help="samples of a step")
    add("--ks", **many, default=[1, 3, 5, 7], help="unroll steps")
    add("--masked", type=float, default=0.5, help="share of masked tokens (default 0.5)")
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="compute dtype (default bfloat16)",
    )
    add_arguments(parser)
    return parser.parse_args()


def sweeps(options: argparse.Namespace) -> dict[str, list[argparse.Namespace]]:
    """The points of each sweep, as `bench.step`'s options; what is not swept is its list's first, K the last."""
    base = {
        "seq": options.seqs[0],
        "batch": 1,
        "draft_vocab": options.vocabs[0],
        "k": options.ks[-1],
    }
    tokens = max(options.seqs)
    changes = {
        "seq": [{"seq": seq, "batch": tokens // seq} for seq in options.seqs],
        "draft_vocab": [{"draft_vocab": vocab} for vocab in options.vocabs],
        "batch": [{"batch": batch} for batch in options.batches],
        "k": [{"k": k} for k in options.ks],
    }
    point = lambda change: argparse.Namespace(**(vars(options) | base | change))  # noqa: E731
    return {name: [point(change) for change in rows] for name, rows in changes.items()}


def measure(name: str, points: list[argparse.Namespace], world: World) -> list[dict[str, Any]]:
    """Time and FLOPs of one sweep's points."""
    options, dtype = points[0], getattr(torch, points[0].dtype)
    problems = [step.problem_of(point, world.rank) for point in points]
    mesh = world.mesh(options.device)
    calls = {}
    for point, problem in zip(points, problems, strict=True):
        value = getattr(point, name)
        calls[f"step {value}"] = step.side_of("fast", point, problem, None, mesh)
        if name == "seq":
            calls[f"attention {value}"] = attention_call(problem, point.k, "fast", point.seed)
    timing = common.in_turns(calls, options.rounds or ROUNDS, dtype, options.device, world, 1)
    took = timing.told()["seconds"]
    rows = []
    for point, problem in zip(points, problems, strict=True):
        value, tokens = getattr(point, name), problem.batch.input_ids.numel()
        count = common.flops(problem.draft, problem.batch.row_mask, point.k)
        row = {key: getattr(point, key) for key in ("seq", "batch", "draft_vocab", "k")} | {
            "tokens": tokens,
            "seconds": took[f"step {value}"],
            "us_per_token": 1e6 * took[f"step {value}"] / tokens,
            "flops_needed": count.total,
            "mfu": timing.share(f"step {value}", count.total),
            "matmul_gflops": timing.told()["matmul_gflops"],
        }
        if name == "seq":
            row["attention_us_per_token"] = 1e6 * took[f"attention {value}"] / tokens
        rows.append(row)
    return rows


def memory_of(point: argparse.Namespace) -> dict[str, int]:
    """Peak bytes of a step at this point, and those beyond what every parameter must hold."""
    named = {
        "--shape": point.shape,
        "--seq": point.seq,
        "--batch": point.batch,
        "--draft-vocab": point.draft_vocab,
    }
    named |= {
        "--k": point.k,
        "--masked": point.masked,
        "--dtype": point.dtype,
        "--seed": point.seed,
    }
    named |= {"--device": point.device, "--threads": point.threads, "--allocator": point.allocator}
    used = step.in_child("fast", *(str(word) for pair in named.items() for word in pair))["step"]
    draft = draft_of(point.shape, point.draft_vocab, point.seq)
    return {
        "memory": used,
        "memory_beyond_state": used - parameters(draft) * STATE_BYTES[point.dtype],
    }


def parameters(draft: DraftConfig) -> int:
    """Trained numbers."""
    return sum(prod(shape) for shape in shapes(draft).values())


def run(options: argparse.Namespace, world: World) -> dict[str, Any]:
    """All sweeps."""
    options.device = world.device(options.device)
    found = {name: measure(name, points, world) for name, points in sweeps(options).items()}
    result: dict[str, Any] = {
        "seq_growth": growth([own_time(row) for row in found["seq"]]),
        "memory_growth": None,
    }
    if world.size == 1:
        for row, point in zip(found["draft_vocab"], sweeps(options)["draft_vocab"], strict=True):
            row.update(memory_of(point))
        result["memory_growth"] = growth(
            [row["memory_beyond_state"] for row in found["draft_vocab"]]
        )
    told = ("shape", "masked", "dtype", "device", "seed", "allocator")
    settings = {name: getattr(options, name) for name in told} | {
        "rounds": options.rounds or ROUNDS
    }
    return result | {"settings": settings | {"ranks": world.size}, "sweeps": found, **provenance()}


def own_time(row: dict[str, Any]) -> float:
    """Microseconds a token without attention."""
    return row["us_per_token"] - row["attention_us_per_token"]


def growth(values: list[float]) -> float:
    """The last over the first."""
    return values[-1] / values[0]


def draw(result: dict[str, Any], path: Path) -> None:
    """Four panels: time a token over S, D, B and K; memory beside it over D."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    labels = {
        "seq": "sequence length S",
        "draft_vocab": "draft vocabulary D",
        "batch": "batch B",
        "k": "unroll steps K",
    }
    for panel, (name, rows) in zip(panels.flat, result["sweeps"].items(), strict=True):
        places = [row[name] for row in rows]
        panel.plot(places, [row["us_per_token"] for row in rows], marker="o", label="step")
        if name == "seq":
            panel.plot(
                places, [own_time(row) for row in rows], marker="o", label="without attention"
            )
            panel.set_xscale("log", base=2)
        if "memory_beyond_state" in rows[0]:
            other = panel.twinx()
            beyond = [row["memory_beyond_state"] / 2**20 for row in rows]
            other.plot(places, beyond, marker="s", color="tab:red", label="memory beyond the state")
            other.set(ylabel="MiB", ylim=(0, None))
            other.legend(loc="lower right")
        panel.set(xlabel=labels[name], ylabel="µs a token", ylim=(0, None))
        panel.legend(loc="lower left")
    shape = result["settings"]["shape"]
    figure.suptitle(
        f"the fast step, {shape}, {result['settings']['masked']:.0%} masked, {result['date'][:10]}"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    options = parse()
    with ranks() as world:
        result = run(options, world)
        if not world.main:
            return
        for name, rows in result["sweeps"].items():
            for row in rows:
                common.say(
                    options,
                    f"{name} {row[name]}: {row['us_per_token']:.0f} µs a token, mfu {row['mfu']:.1%}",
                )
        name = f"scaling-{options.shape}-{options.device}-{options.allocator}"
        if options.out != "-":
            draw(result, Path(options.out or common.RESULTS / f"{name}.json").with_suffix(".png"))
        common.finish(result, options.out, name)


if __name__ == "__main__":
    common.guarded(main)
