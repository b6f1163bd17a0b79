"""One training step, timed in turns: ours under the plain and the fast numerics, and SpecForge's.

    SPECFORGE_SRC=CHECKOUT python -m bench.step --seq 1024 --masked 0.5

A step is teacher, forward, backward, clip and AdamW on one batch. All sides share a process; in
each round every side makes one step. Medians are printed, the last line is JSON:

- `ratio`: SpecForge's time over the fast side's (median of the rounds' ratios), `memory_ratio`: the
  fast side's peak memory of a step over SpecForge's; both null where SpecForge is not at hand
- `ratio_plain`, `memory_ratio_plain`: the same against our own plain numerics
- `mfu`: the fast side's share of the matmul rate measured in the same rounds, counting what the
  needed rows must compute
- `mesh_overhead` (`--mesh`): what a mesh of one rank costs the fast side

Memory is measured in a child process for each side; with `--memory-here` in this process, before
the rounds: as exact on CUDA, where allocated bytes are counted, and rough on the CPU. `--partial
FILE` gets the result without SpecForge before its side is made.

Under torchrun each rank has its own batch of one sharded state; SpecForge and memory are then left
out.
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
from functools import partial
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

from bench import common, memory, sides
from bench.launch import add_arguments
from bench.problem import Problem, draft_of, draw_params, make_problem
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import write_json
from eagle3fn.base.launch import World, ranks
from eagle3fn.base.provenance import provenance
from eagle3fn.specforge.oracle import Oracle

ROUNDS = 5
MEMORY_STEPS = 2
WARM_ON_CUDA = 3  # rounds before the timed ones
SETTINGS = ("shape", "seq", "batch", "masked", "k", "dtype", "device", "seed", "allocator")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    common.add_problem_arguments(parser)
    add = parser.add_argument
    add("--seq", type=int, default=1024, help="tokens of a sample (default 1024)")
    add("--batch", type=int, default=1, help="samples of a step, on each rank (default 1)")
    add("--draft-vocab", type=int, help="draft vocabulary (default: the shape's)")
    add("--mesh", action="store_true", help="also the fast side on a mesh of one rank")
    add("--no-memory", action="store_true", help="leave memory out")
    about = "measure memory in this process, without a child for each side"
    add("--memory-here", action="store_true", help=about)
    add("--partial", help="a file that gets our own sides' result first")
    add("--memory-of", choices=sides.MEASURED, help="measure the memory of this side alone")
    add_arguments(parser)
    return parser.parse_args(arguments)


def problem_of(options: argparse.Namespace, rank: int = 0) -> Problem:
    return make_problem(
        draft_of(options.shape, options.draft_vocab, options.seq),
        batch=options.batch,
        seq=options.seq,
        masked=options.masked,
        k=options.k,
        seed=options.seed,
        dtype=getattr(torch, options.dtype),
        device=options.device,
        rank=rank,
    )


def side_of(
    name: str,
    options: argparse.Namespace,
    problem: Problem,
    oracle: Oracle | None,
    mesh: DeviceMesh | None = None,
) -> sides.Update:
    params = draw_params(problem.draft, options.seed, getattr(torch, options.dtype), options.device)
    return sides.make_side(name, problem, params, oracle, options.k, mesh)


def memory_of(options: argparse.Namespace) -> dict[str, int]:
    """Peak memory of one side in this process; bytes, by `memory.MEANING`'s names.

    A step of a tiny problem has loaded the side's libraries beforehand.
    """
    name = options.memory_of
    oracle = sides.find_oracle(options.device)[0] if name == "specforge" else None
    smallest = {"shape": "tiny", "seq": 64, "batch": 1, "draft_vocab": None}
    tiny = argparse.Namespace(**(vars(options) | smallest))
    with sides.specforge_loss(oracle, options.device):
        side_of(name, tiny, problem_of(tiny), oracle)()

        problem = problem_of(options)
        make = partial(side_of, name, options, problem, oracle)
        return memory.measure(make, MEMORY_STEPS, options.device).used


def memory_in_child(name: str, *arguments: str) -> dict[str, int]:
    """A side's memory under these arguments, from a process of its own.

    Raises:
        UserError: the process failed.
    """
    call = [sys.executable, "-m", "bench.step", *arguments, "--memory-of", name, "--json"]
    done = subprocess.run(call, cwd=common.ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"memory of {name}: its process ended with exit code {done.returncode}; "
            "--no-memory leaves it out"
        )
    return json.loads(done.stdout.splitlines()[-1])


class Sides(NamedTuple):
    """All sides, made and called once."""

    calls: dict[str, sides.Update]
    losses: dict[str, float]  # of their first steps
    used: dict[str, dict[str, int]]  # memory by side; empty where it is measured elsewhere


def make_sides(
    options: argparse.Namespace,
    names: list[str],
    problem: Problem,
    oracle: Oracle | None,
    mesh: DeviceMesh | None,
) -> Sides:
    """Every side with its first step, under `--memory-here` with its memory."""
    found = Sides({}, {}, {})
    if options.memory_here:
        # The workspace of matrix products is no side's.
        common.best_matmul(getattr(torch, options.dtype), options.device)

    for name in names:
        make = partial(side_of, name, options, problem, oracle, mesh)
        if options.memory_here:
            measured = memory.measure(make, MEMORY_STEPS, options.device)
            found.calls[name] = measured.update
            found.losses[name] = float(measured.first)
            found.used[name] = measured.used
        else:
            found.calls[name] = make()

    # All sides are made before the first one's step.
    if not options.memory_here:
        for name, call in found.calls.items():
            found.losses[name] = float(call())
    return found


def measure(
    options: argparse.Namespace,
    names: list[str],
    oracle: Oracle | None,
    world: World,
    mesh: DeviceMesh | None,
) -> dict[str, Any]:
    """Times of every side, FLOPs, and shares of the matmul rate, over all ranks."""
    device = options.device
    problem = problem_of(options, world.rank)
    with sides.specforge_loss(oracle, device):
        made = make_sides(options, names, problem, oracle, mesh)
        common.check_losses(made.losses)
        timing = common.in_turns(
            made.calls,
            options.rounds or ROUNDS,
            getattr(torch, options.dtype),
            device,
            world,
            warm=0 if device == "cpu" else WARM_ON_CUDA,
        )

    # What the rows need, a mean over ranks, each of which has a batch of its own.
    mask = problem.scored
    needed = common.flops(problem.draft, mask)
    dense = common.flops(problem.draft, mask, dense=True)
    totals = world.every(needed.total)
    shares = world.every(common.row_shares(mask))

    times = timing.summary()
    tokens = world.size * problem.batch.attention_mask.numel()
    return {
        "ratio": timing.ratio("specforge", "fast") if "specforge" in names else None,
        "ratio_plain": timing.ratio("plain", "fast"),
        "mesh_overhead": timing.ratio("mesh", "fast") - 1 if "mesh" in names else None,
        "mfu": timing.share("fast", mean(totals)),
        "mfu_dense": {
            name: timing.share(name, dense.total)
            for name in names
            if name in ("plain", "specforge")
        },
        "tokens_per_s": {name: tokens / took for name, took in times["seconds"].items()},
        **times,
        "memory_here": made.used,
        "first_loss": made.losses,
        "flops_needed": needed._asdict() | {"total": needed.total},
        "flops_dense": dense.total,
        "shares": {name: mean(rank[name] for rank in shares) for name in shares[0]},
    }


def run(options: argparse.Namespace, world: World) -> dict[str, Any]:
    """Everything about one case."""
    oracle = None
    reason: str | None = sides.ONE_RANK
    if world.size == 1:
        oracle, reason = sides.find_oracle(options.device)
    with_mesh = ["mesh"] if options.mesh else []
    ours = [*sides.OURS, *with_mesh]
    names = [*sides.OURS, "specforge", *with_mesh] if oracle else ours

    # Memory from child processes, before anything large is in this one.
    used = {}
    if world.size == 1 and not options.no_memory and not options.memory_here:
        for name in names:
            if name in sides.MEASURED:
                used[name] = memory_in_child(name, *sys.argv[1:])

    options.device = world.device(options.device)
    mesh = world.mesh(options.device)
    if options.partial and oracle:
        measured = measure(options, ours, None, world, mesh)
        why = sides.describe(None, "its side was not measured yet", options.device)
        write_json(options.partial, result_of(options, world, measured, used, why))

    measured = measure(options, names, oracle, world, mesh)
    about = sides.describe(oracle, reason, options.device)
    return result_of(options, world, measured, used, about)


def result_of(
    options: argparse.Namespace,
    world: World,
    measured: dict[str, Any],
    used: dict[str, Any],
    specforge: dict[str, Any],
) -> dict[str, Any]:
    """The result: the main numbers, then settings and the rest.

    Args:
        options: as parsed.
        world: the ranks.
        measured: what `measure` returned.
        used: memory by side from child processes.
        specforge: what `sides.describe` returned.
    """
    used = used | measured.pop("memory_here")
    step = {name: value["step"] for name, value in used.items()}
    draft = draft_of(options.shape, options.draft_vocab, options.seq)
    settings = common.settings_of(options, SETTINGS, ROUNDS, world)
    return {
        "ratio": measured.pop("ratio"),
        "memory_ratio": step["fast"] / step["specforge"] if "specforge" in step else None,
        "mfu": measured.pop("mfu"),
        "ratio_plain": measured.pop("ratio_plain"),
        "memory_ratio_plain": step["fast"] / step["plain"] if step else None,
        "settings": settings | {"draft_vocab": draft.draft_vocab_size},
        **measured,
        "memory": used,
        "memory_meaning": memory.MEANING if used else None,
        **specforge,
        **provenance(),
    }


def show(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """The result for people."""
    specforge = result["specforge"]
    if specforge:
        lines = [f"SpecForge: {specforge['kind']} {specforge['digest'][:16]}"]
    else:
        lines = [f"SpecForge: {result['specforge_missing']}"]
    lines += [f"  {note}" for note in result.get("notes", ())]

    shares = result["shares"]
    lines.append(
        f"seed {options.seed}: {shares['masked']:.1%} of the rows masked, "
        f"{shares['needed']:.1%} needed at step 0, {shares['needed_over_steps']:.1%} over all steps"
    )
    for name, took in result["seconds"].items():
        rate = result["tokens_per_s"][name]
        line = f"{name:9} {took * 1000:9.1f} ms, {rate:9.1f} tokens/s"
        if name in result["memory"]:
            line += f", {result['memory'][name]['step'] / 2**20:8.0f} MiB"
        lines.append(line)
    lines.append(
        f"matmul {result['matmul_gflops']:.0f} GFLOP/s; "
        f"fast: {result['mfu']:.1%} of it on the needed rows"
    )
    common.show(options, "\n".join(lines))


def file_name(options: argparse.Namespace, result: dict[str, Any]) -> str:
    """The result's file, named by its settings."""
    settings = result["settings"]
    words = [
        f"step-{options.shape}-s{options.seq}-b{options.batch}-d{settings['draft_vocab']}",
        f"m{options.masked:g}-{options.dtype}-{options.device}-{options.allocator}",
    ]
    if settings["ranks"] > 1:
        words.append(f"{settings['ranks']}ranks")
    return "-".join(words)


def main() -> None:
    options = parse()
    if options.memory_of:
        print(json.dumps(memory_of(options)))
        return

    with ranks() as world:
        result = run(options, world)
        if world.main:
            show(options, result)
            common.finish(result, options.out, file_name(options, result))


if __name__ == "__main__":
    sys.exit(common.program("bench.step", main))
