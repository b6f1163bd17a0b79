"""How the fast step's cost changes with sequence length, draft vocabulary, batch, unroll steps,
threads and ranks.

    python -m bench.scaling --rounds 2

A picture goes next to the result. Sequence lengths share a fixed number of tokens. The points of a
sweep are timed in turns in one process; memory, over draft vocabularies, comes from one child
process a point. Ranks are started by torchrun, each with a batch of its own; they and threads are
left out where this runs on several ranks itself. The last line is JSON:

- `seq_growth`: the time a token at the longest sequence over that at the shortest, both without
  attention's own time
- `memory_growth`: the bytes beyond weights, gradients, masters and moments at the largest draft
  vocabulary over those at the smallest; null on several ranks
- `thread_choice`: for the work of each command (`bench.threads`) the number of threads that the
  short measurement of its start chooses, the best one, and the time at the one over the other
- `sweeps`: every point

What was not swept (`--sweeps`) is null.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from bench.launch import settle

    settle()

import argparse
import json
import subprocess
from math import prod
from typing import Any

import torch

from bench import common, step, threads
from bench.attention import attention_call
from bench.launch import add_arguments
from bench.problem import draft_of
from eagle3fn.base.cores import own_cores
from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.errors import UserError
from eagle3fn.base.launch import World, ranks
from eagle3fn.base.provenance import provenance
from eagle3fn.base.thread_timing import candidates
from eagle3fn.model.table import shapes

ROUNDS = 3
WARM = 1  # rounds before the timed ones
SETTINGS = ("shape", "masked", "dtype", "device", "seed", "allocator")
SWEPT = ("seq", "batch", "draft_vocab", "k")
# Of a parameter: weight, gradient, fp32 master and two fp32 moments.
STATE_BYTES = {"bfloat16": 16, "float32": 20}
LABELS = {
    "seq": "sequence length S",
    "draft_vocab": "draft vocabulary D",
    "batch": "batch B",
    "k": "unroll steps K",
    "threads": "threads",
    "ranks": "ranks",
}
ONE_PROCESS = ("threads", "ranks")  # swept by a process that is no rank itself


def parse() -> argparse.Namespace:
    parser = common.parser_of(__doc__)

    def add_list(name: str, default: list[int], about: str) -> None:
        parser.add_argument(name, type=int, nargs="+", default=default, help=about)

    common.add_shape(parser)
    common.add_masked(parser)
    common.add_dtype(parser)
    about = "lengths; the longest is the fixed number of tokens"
    add_list("--seqs", [512, 1024, 2048, 4096, 8192], about)
    add_list("--vocabs", [8192, 16384, 32768, 49152], "draft vocabularies")
    add_list("--batches", [1, 2, 4], "samples of a step")
    add_list("--ks", [1, 3, 5, 7], "unroll steps")
    about = "numbers of threads (default: 1, 2, 4, … up to all cores)"
    add_list("--thread-counts", candidates(own_cores()), about)
    add_list("--ranks", [1, 2], "numbers of ranks, each with --threads threads")
    about = "layers of the target that threads are measured with (default 30)"
    parser.add_argument("--layers", type=int, default=30, help=about)
    about = "which sweeps are made (default all)"
    parser.add_argument("--sweeps", nargs="+", choices=LABELS, default=list(LABELS), help=about)
    add_arguments(parser)
    return parser.parse_args()


def sweeps(options: argparse.Namespace) -> dict[str, list[argparse.Namespace]]:
    """The points of each sweep in this process, as `bench.step`'s options."""
    base = base_of(options)
    tokens = max(options.seqs)
    changes = {
        "seq": [{"seq": seq, "batch": tokens // seq} for seq in options.seqs],
        "draft_vocab": [{"draft_vocab": vocab} for vocab in options.vocabs],
        "batch": [{"batch": batch} for batch in options.batches],
        "k": [{"k": k} for k in options.ks],
    }

    points = {}
    for name, rows in changes.items():
        if name in options.sweeps:
            points[name] = [argparse.Namespace(**(vars(options) | base | row)) for row in rows]
    return points


def base_of(options: argparse.Namespace) -> dict[str, int]:
    """The values of what is not swept: its list's first, K's last, one sample."""
    return {
        "seq": options.seqs[0],
        "batch": 1,
        "draft_vocab": options.vocabs[0],
        "k": options.ks[-1],
    }


def over_threads(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each number of threads, and how good the short measurement's choices are."""
    base = base_of(options)
    point = argparse.Namespace(**(vars(options) | base))
    counts = sorted({1, *options.thread_counts})
    rows, choice = threads.measure(point, counts, options.rounds or ROUNDS)
    return [base | row for row in rows], choice


def over_ranks(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of ranks, from as many processes; tokens are those of all ranks.

    Raises:
        UserError: the processes failed.
    """
    base = base_of(options)
    words: list[object] = ["--sweeps", "batch", "--batches", 1, "--json"]
    words += ["--seqs", base["seq"], "--vocabs", base["draft_vocab"], "--ks", base["k"]]
    words += ["--rounds", options.rounds or ROUNDS, "--threads", options.threads]
    for name in SETTINGS:
        words += [f"--{name}", getattr(options, name)]

    rows = []
    for count in options.ranks:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
        call = [sys.executable, *launcher, "bench/scaling.py", *words]
        done = subprocess.run(
            list(map(str, call)), cwd=common.ROOT, stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            raise UserError(
                f"{count} ranks: their processes ended with exit code {done.returncode}; "
                "--sweeps leaves ranks out"
            )
        (row,) = json.loads(done.stdout.splitlines()[-1])["sweeps"]["batch"]
        tokens = count * row["tokens"]
        per_token = 1e6 * row["seconds"] / tokens
        rows.append({"ranks": count, **row, "tokens": tokens, "us_per_token": per_token})
    return rows


def measure(name: str, points: list[argparse.Namespace], world: World) -> list[dict[str, Any]]:
    """Time and FLOPs of one sweep's points; `name` is the option that is swept."""
    options = points[0]
    mesh = world.mesh(options.device)
    problems = [step.problem_of(point, world.rank) for point in points]
    calls: dict[str, Any] = {}
    for point, problem in zip(points, problems, strict=True):
        value = getattr(point, name)
        calls[f"step {value}"] = step.side_of("fast", point, problem, None, mesh)
        if name == "seq":
            calls[f"attention {value}"] = attention_call(problem, point.k, "fast", point.seed)
    timing = common.in_turns(
        calls,
        options.rounds or ROUNDS,
        getattr(torch, options.dtype),
        options.device,
        world,
        WARM,
    )

    times = timing.summary()
    rows = []
    for point, problem in zip(points, problems, strict=True):
        value = getattr(point, name)
        tokens = problem.batch.attention_mask.numel()
        needed = common.flops(problem.draft, problem.scored)
        took = times["seconds"][f"step {value}"]
        row = {key: getattr(point, key) for key in SWEPT}
        row |= {
            "tokens": tokens,
            "seconds": took,
            "us_per_token": 1e6 * took / tokens,
            "flops_needed": needed.total,
            "mfu": timing.share(f"step {value}", needed.total),
            "matmul_gflops": times["matmul_gflops"],
        }
        if name == "seq":
            took = times["seconds"][f"attention {value}"]
            row["attention_us_per_token"] = 1e6 * took / tokens
        rows.append(row)
    return rows


def memory_of(point: argparse.Namespace) -> dict[str, int]:
    """Peak bytes of a step at this point, and those beyond what every parameter must hold."""
    options = {
        "--shape": point.shape,
        "--seq": point.seq,
        "--batch": point.batch,
        "--draft-vocab": point.draft_vocab,
        "--k": point.k,
        "--masked": point.masked,
        "--dtype": point.dtype,
        "--seed": point.seed,
        "--device": point.device,
        "--threads": point.threads,
        "--allocator": point.allocator,
    }
    words = [str(word) for pair in options.items() for word in pair]
    used = step.memory_in_child("fast", *words)["step"]
    state = parameters(draft_of(point.shape, point.draft_vocab, point.seq))
    return {
        "memory": used,
        "memory_beyond_state": used - state * STATE_BYTES[point.dtype],
    }


def parameters(draft: DraftConfig) -> int:
    """Trained numbers."""
    return sum(prod(shape) for shape in shapes(draft).values())


def run(options: argparse.Namespace, world: World) -> dict[str, Any]:
    """All sweeps."""
    options.device = world.device(options.device)
    points = sweeps(options)
    found = {name: measure(name, rows, world) for name, rows in points.items()}

    memory_growth = None
    if world.size == 1 and "draft_vocab" in found:
        for row, point in zip(found["draft_vocab"], points["draft_vocab"], strict=True):
            row.update(memory_of(point))
        memory_growth = growth([row["memory_beyond_state"] for row in found["draft_vocab"]])

    choice = None
    if world.size == 1:
        if "threads" in options.sweeps:
            found["threads"], choice = over_threads(options)
        if "ranks" in options.sweeps:
            found["ranks"] = over_ranks(options)
    return {
        "seq_growth": growth([own_time(row) for row in found["seq"]]) if "seq" in found else None,
        "memory_growth": memory_growth,
        "thread_choice": choice,
        "settings": common.settings_of(options, SETTINGS, ROUNDS, world),
        "sweeps": found,
        **provenance(),
    }


def own_time(row: dict[str, Any]) -> float:
    """Microseconds a token without attention."""
    return row["us_per_token"] - row["attention_us_per_token"]


def growth(values: list[float]) -> float:
    """The last over the first."""
    return values[-1] / values[0]


def draw(result: dict[str, Any], path: Path) -> None:
    """A panel a sweep: time a token; over D also memory, over threads also the other work."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    count = -(-len(result["sweeps"]) // 2)
    figure, panels = plt.subplots(
        count, 2, figsize=(10, 3.5 * count), layout="constrained", squeeze=False
    )
    for panel in panels.flat[len(result["sweeps"]) :]:
        panel.set_visible(False)
    for panel, (name, rows) in zip(panels.flat, result["sweeps"].items(), strict=False):
        if name == "threads":
            draw_threads(panel, rows)
            continue
        places = [row[name] for row in rows]
        panel.plot(places, [row["us_per_token"] for row in rows], marker="o", label="step")
        if name == "seq":
            own = [own_time(row) for row in rows]
            panel.plot(places, own, marker="o", label="without attention")
            panel.set_xscale("log", base=2)
        if "memory_beyond_state" in rows[0]:
            other = panel.twinx()
            beyond = [row["memory_beyond_state"] / 2**20 for row in rows]
            other.plot(places, beyond, marker="s", color="tab:red", label="memory beyond the state")
            other.set(ylabel="MiB", ylim=(0, None))
            other.legend(loc="lower right")
        panel.set(xlabel=LABELS[name], ylabel="µs a token", ylim=(0, None))
        panel.legend(loc="lower left")

    settings = result["settings"]
    figure.suptitle(
        f"the fast step, {settings['shape']}, {settings['masked']:.0%} masked, "
        f"{result['date'][:10]}"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_threads(panel: Any, rows: list[dict[str, Any]]) -> None:
    """Each command's work: its time over that with one thread."""
    counts = [row["threads"] for row in rows]
    for name, alone in rows[0]["all_work_seconds"].items():
        ratios = [row["all_work_seconds"][name] / alone for row in rows]
        panel.plot(counts, ratios, marker="o", label=name)
    panel.set(xlabel=LABELS["threads"], ylabel="time / with one thread", ylim=(0, None))
    panel.legend(loc="lower left")


def main() -> None:
    options = parse()
    with ranks() as world:
        result = run(options, world)
        if not world.main:
            return

        for name, rows in result["sweeps"].items():
            for row in rows:
                cost = f"{row['us_per_token']:.0f} µs a token, mfu {row['mfu']:.1%}"
                common.show(options, f"{name} {row[name]}: {cost}")
        for name, choice in (result["thread_choice"] or {}).items():
            text = f"chosen in {choice['measurement_seconds']:.1f} s: {choice['chosen']} threads"
            text += f", best {choice['best']}: {choice['time_over_best']:.2f} times its time"
            common.show(options, f"{name}: {text}")

        about = "scaling" if "seq" in result["sweeps"] else "-".join(result["sweeps"])
        name = f"{about}-{options.shape}-{options.device}-{options.allocator}"
        path = common.result_path(options.out, name)
        if path is not None:
            draw(result, path.with_suffix(".png"))
        common.finish(result, options.out, name)


if __name__ == "__main__":
    sys.exit(common.program("bench.scaling", main))
