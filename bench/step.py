"""One training step in turns in one process: ours under the legacy and the fast numerics, and the installed old tool's.

Prints medians and ends with one line of JSON: `ratio` is the old tool's time over the fast one's (median of the
rounds' ratios), `memory_ratio` fast over old (peak memory of a step, one child process a side), `mfu` the fast side's
share of the matmul rate measured in the same rounds, counting what the needed rows must compute. Without the old tool
`ratio` and `memory_ratio` are null; `ratio_plain` and `memory_ratio_plain` hold the fast side against our own legacy
numerics in any case. `--mesh` adds the fast side on a mesh of one rank, `mesh_overhead` is what that costs.

Memory is measured in a child process for each side; with `--memory-here` in this process, before the rounds: as exact
on CUDA, where allocated bytes are counted, and rough on the CPU. `--partial FILE` gets the result without SpecForge
before its side is made.

Under torchrun each rank has its own batch of one sharded state; the old tool and memory are then left out.
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
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from bench import common, memory, sides
from bench.launch import add_arguments
from bench.problem import SHAPES, Problem, draft_of, draw_params, make_problem
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import write_json
from eagle3fn.specforge.oracle import Oracle
from eagle3fn.testing.provenance import provenance
from eagle3fn.train.launch import World, ranks

ROUNDS, MEMORY_STEPS = 5, 2


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="smollm2", help="the draft's shape (default smollm2)")
    add("--seq", type=int, default=1024, help="tokens of a sample (default 1024)")
    add("--batch", type=int, default=1, help="samples of a step, on each rank (default 1)")
    add("--draft-vocab", type=int, help="draft vocabulary (default: the shape's)")
    add(
        "--masked",
        type=float,
        default=0.5,
        help="share of masked tokens, in turns of 64 to 256 (default 0.5)",
    )
    add("--k", type=int, default=7, help="unroll steps (default 7)")
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="compute dtype (default bfloat16)",
    )
    add("--mesh", action="store_true", help="also the fast side on a mesh of one rank")
    add("--no-memory", action="store_true", help="leave memory out")
    add(
        "--memory-here",
        action="store_true",
        help="measure memory in this process, without a child for each side",
    )
    add("--partial", help="a file that gets our own sides' result first")
    add("--memory-of", choices=(*sides.OURS, "old"), help="measure the memory of this side alone")
    add_arguments(parser)
    return parser.parse_args(arguments)


def problem_of(options: argparse.Namespace, rank: int = 0) -> Problem:
    draft = draft_of(options.shape, options.draft_vocab, options.seq)
    return make_problem(
        draft, batch=options.batch, seq=options.seq, masked=options.masked, k=options.k, seed=options.seed,
        dtype=getattr(torch, options.dtype), device=options.device, rank=rank,
    )  # fmt: skip


def side_of(
    name: str,
    options: argparse.Namespace,
    problem: Problem,
    oracle: Oracle | None,
    mesh: DeviceMesh | None = None,
) -> sides.Update:
    params = draw_params(problem.draft, options.seed, getattr(torch, options.dtype), options.device)
    return sides.make_side(name, problem, params, oracle, options.k, mesh)


def memory_of(options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of one side in this process, whose libraries a step of a tiny problem has loaded beforehand."""
    oracle = sides.find_oracle(options.device)[0] if options.memory_of == "old" else None
    tiny = argparse.Namespace(
        **(vars(options) | {"shape": "tiny", "seq": 64, "batch": 1, "draft_vocab": None})
    )
    with sides.old_loss(oracle, options.device):
        side_of(options.memory_of, tiny, problem_of(tiny), oracle)()
        problem = problem_of(options)
        return memory.measure(
            lambda: side_of(options.memory_of, options, problem, oracle),
            MEMORY_STEPS,
            options.device,
        )


def in_child(name: str, *arguments: str) -> dict[str, Any]:
    """A side's memory under these arguments, from a process of its own."""
    call = [sys.executable, "-m", "bench.step", *arguments, "--memory-of", name, "--json"]
    done = subprocess.run(call, cwd=common.ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"memory of {name}: its process ended with exit code {done.returncode}; --no-memory leaves it out"
        )
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    options: argparse.Namespace,
    names: list[str],
    oracle: Oracle | None,
    world: World,
    mesh: DeviceMesh | None,
) -> dict[str, Any]:
    """Times of every side, FLOPs, and shares of the matmul rate, over all ranks."""
    problem, device = problem_of(options, world.rank), options.device
    makes = {name: partial(side_of, name, options, problem, oracle, mesh) for name in names}
    with sides.old_loss(oracle, device):
        if options.memory_here:
            common.best_matmul(getattr(torch, options.dtype), device)  # its workspace is no side's
            found = {
                name: memory.measured(make, MEMORY_STEPS, device) for name, make in makes.items()
            }
            calls = {name: side.update for name, side in found.items()}
            losses = {name: float(side.first) for name, side in found.items()}
            used = {name: side.used for name, side in found.items()}
        else:
            calls = {name: make() for name, make in makes.items()}
            losses = {name: float(call()) for name, call in calls.items()}
            used = {}
        common.check_losses(losses)
        warm = 0 if device == "cpu" else 3
        timing = common.in_turns(
            calls, options.rounds or ROUNDS, getattr(torch, options.dtype), device, world, warm
        )
    mask = problem.batch.row_mask
    needed, dense = (common.flops(problem.draft, mask, options.k, every) for every in (False, True))
    spread = world.every((needed.total, common.row_shares(mask, options.k)))
    times = timing.told()
    return {
        "ratio": timing.ratio("old", "fast") if "old" in names else None,
        "ratio_plain": timing.ratio("plain", "fast"),
        "mesh_overhead": timing.ratio("mesh", "fast") - 1 if "mesh" in names else None,
        "mfu": timing.share("fast", mean(part[0] for part in spread)),
        "mfu_dense": {
            name: timing.share(name, dense.total) for name in names if name in ("plain", "old")
        },
        "tokens_per_s": {
            name: world.size * mask.numel() / took for name, took in times["seconds"].items()
        },
        **times,
        "memory_here": used,
        "first_loss": losses,
        "flops_needed": needed._asdict() | {"total": needed.total},
        "flops_dense": dense.total,
        "shares": {name: mean(part[1][name] for part in spread) for name in spread[0][1]},
    }


def run(options: argparse.Namespace, world: World) -> dict[str, Any]:
    """Everything about one case."""
    oracle, reason = (
        sides.find_oracle(options.device) if world.size == 1 else (None, sides.ONE_RANK)
    )
    ours = [*sides.OURS, *(["mesh"] if options.mesh else [])]
    names = [*sides.OURS, *(["old"] if oracle else []), *(["mesh"] if options.mesh else [])]
    children = world.size == 1 and not options.no_memory and not options.memory_here
    used = (
        {name: in_child(name, *sys.argv[1:]) for name in names if name != "mesh"}
        if children
        else {}
    )
    options.device = world.device(options.device)
    mesh = world.mesh(options.device)
    if options.partial and oracle:
        measured = measure(options, ours, None, world, mesh)
        write_json(
            options.partial,
            told(options, world, measured, used, None, "its side was not measured yet"),
        )
    return told(options, world, measure(options, names, oracle, world, mesh), used, oracle, reason)


def told(
    options: argparse.Namespace,
    world: World,
    result: dict[str, Any],
    used: dict[str, Any],
    oracle: Oracle | None,
    reason: str | None,
) -> dict[str, Any]:
    """The result of what was measured: first what is asked most, then the settings and the rest."""
    used = used | result.pop("memory_here")
    step = {name: value["step"] for name, value in used.items()}
    about = ("shape", "seq", "batch", "masked", "k", "dtype", "device", "seed", "allocator")
    draft_vocab = draft_of(options.shape, options.draft_vocab, options.seq).draft_vocab_size
    settings = {name: getattr(options, name) for name in about} | {
        "draft_vocab": draft_vocab,
        "ranks": world.size,
    }
    return {
        "ratio": result.pop("ratio"),
        "memory_ratio": step["fast"] / step["old"] if "old" in step else None,
        "mfu": result.pop("mfu"),
        "ratio_plain": result.pop("ratio_plain"),
        "memory_ratio_plain": step["fast"] / step["plain"] if step else None,
        "settings": settings | {"rounds": options.rounds or ROUNDS},
        **result,
        "memory": used,
        "memory_meaning": memory.MEANING if used else None,
        **sides.describe(oracle, reason, options.device),
        **provenance(),
    }


def show(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """The result for people."""
    tool, shares = result["old_tool"], result["shares"]
    lines = [
        f"old tool: {tool['kind'] + ' ' + tool['digest'][:16] if tool else result['old_tool_missing']}"
    ]
    lines += [f"  {note}" for note in result.get("notes", ())]
    lines.append(
        f"seed {options.seed}: {shares['masked']:.1%} of the rows masked, {shares['needed']:.1%} needed at step 0, "
        f"{shares['needed_over_steps']:.1%} over all steps"
    )
    for name, took in result["seconds"].items():
        used = result["memory"].get(name)
        memory_text = f", {used['step'] / 2**20:8.0f} MiB" if used else ""
        lines.append(
            f"{name:7} {took * 1000:9.1f} ms, {result['tokens_per_s'][name]:9.1f} tokens/s{memory_text}"
        )
    lines.append(
        f"matmul {result['matmul_gflops']:.0f} GFLOP/s; fast: {result['mfu']:.1%} of it on the needed rows"
    )
    common.say(options, "\n".join(lines))


def main() -> None:
    options = parse()
    if options.memory_of:
        print(json.dumps(memory_of(options)))
        return
    with ranks() as world:
        result = run(options, world)
        if world.main:
            show(options, result)
            settings = result["settings"]
            name = f"step-{options.shape}-s{options.seq}-b{options.batch}-d{settings['draft_vocab']}-m{options.masked:g}"
            name += (
                f"-{options.dtype}-{options.device}-{options.allocator}"
                + f"-{world.size}ranks" * (world.size > 1)
            )
            common.finish(result, options.out, name)


if __name__ == "__main__":
    common.guarded(main)
