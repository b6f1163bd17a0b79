"""One training step, timed in turns: ours under the plain and the fast numerics, and SpecForge's.

    SPECFORGE_SRC=CHECKOUT python -m bench.step --seq 1024 --masked 0.5

A step is teacher, forward, backward, clip and AdamW on one batch. In each round every side makes
one step, one after the other; all but the peers share a process. Medians are printed, the last line
is JSON:

- `ratio`: SpecForge's time over the fast side's (median of the rounds' ratios), `memory_ratio`: the
  fast side's peak memory of a step over SpecForge's; both null where SpecForge is not at hand
- `ratio_plain`, `memory_ratio_plain`: the same against our own plain numerics
- `ratio_speculators`, `ratio_specforge_main`, and memory alike (`--peers`): the same against other
  projects' steps (`bench.peers`); null where one is left out, `peers` then says why
- `quartiles`: of the rounds' ratios, by the name of the ratio; `processor_ratios`: medians of the
  same by processor time, which other work on the machine disturbs less
- `survivors` (`--survival` below 1, or `objective.survival`'s default where that is): all of these
  and `mfu` with the side of that name in the fast side's place; the fast one computes every row
- `mfu`: the fast side's share of the matmul rate measured in the same rounds, counting what the
  needed rows must compute
- `mesh_overhead` (`--mesh`): what a mesh of one rank costs the fast side

    SPECFORGE_MAIN_SRC=CHECKOUT python -m bench.step --peers     # all peers; or name some

Memory is measured in a child process for each side; with `--memory-here` in this process, before
the rounds: as exact on CUDA, where allocated bytes are counted, and rough on the CPU. `--partial
FILE` gets the result without SpecForge before its side is made.

Under torchrun each rank has its own batch of one sharded state; SpecForge, peers and memory are
then left out.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from bench.launch import settle

    settle()

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

from bench import common, memory, peers, sides
from bench.answers import open_answers, serve
from bench.launch import add_arguments
from bench.problem import Problem, draft_of, draw_params, make_problem, with_survival
from bench.step_result import ROUNDS, compare, file_name, needs, result_of, show
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import write_json
from eagle3fn.base.launch import World, ranks
from eagle3fn.base.sections import ObjectiveConfig
from eagle3fn.specforge.oracle import Oracle, load_oracle

MEMORY_STEPS = 2
WARM_ON_CUDA = 3  # rounds before the timed ones
SMALLEST = {"shape": "tiny", "seq": 64, "batch": 1, "draft_vocab": None}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    common.add_problem_arguments(parser)
    add = parser.add_argument
    add("--seq", type=int, default=1024, help="tokens of a sample (default 1024)")
    add("--batch", type=int, default=1, help="samples of a step, on each rank (default 1)")
    add("--draft-vocab", type=int, help="draft vocabulary (default: the shape's)")
    about = "chance that a row goes on to the next unroll step (default: the configuration's)"
    add("--survival", type=float, default=ObjectiveConfig().survival, metavar="RHO", help=about)
    add("--mesh", action="store_true", help="also the fast side on a mesh of one rank")
    add("--no-memory", action="store_true", help="leave memory out")
    about = "measure memory in this process, without a child for each side"
    add("--memory-here", action="store_true", help=about)
    add("--partial", help="a file that gets our own sides' result first")
    about = "other projects' steps as well (none named: all)"
    add("--peers", nargs="*", choices=peers.NAMES, metavar="NAME", help=about)
    about = "the peers' environments (default .venv-peers), made where missing"
    add("--peers-folder", type=Path, default=peers.FOLDER, help=about)
    about = "make this side alone and answer lines on stdin (see bench.answers)"
    add("--serve", choices=sides.MEASURED, help=about)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    if options.peers == []:
        options.peers = list(peers.NAMES)
    ObjectiveConfig(survival=options.survival)  # refuses what is out of range
    return options


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
    survival = options.survival if name == "survivors" else 1.0
    return sides.make_side(name, problem, params, oracle, options.k, mesh, survival)


def tiny_of(options: argparse.Namespace) -> argparse.Namespace:
    """The same on a tiny problem, whose step loads a side's libraries."""
    return argparse.Namespace(**(vars(options) | SMALLEST))


def serve_side(options: argparse.Namespace) -> None:
    """Be one side's process: memory and the first loss, then a step for each line on stdin.

    Raises:
        OracleMissingError: SpecForge's side was asked for and is not at hand.
    """
    answers = open_answers()
    name = options.serve
    oracle = None
    if name == "specforge":
        oracle = load_oracle(native=options.device != "cpu")

    with sides.specforge_loss(oracle, options.device):
        tiny = tiny_of(options)
        side_of(name, tiny, problem_of(tiny), oracle)()

        problem = problem_of(options)
        make = partial(side_of, name, options, problem, oracle)
        measured = memory.measure(make, MEMORY_STEPS, options.device)
        ready = {"memory": measured.used, "first_loss": float(measured.first)}
        if oracle is not None:
            ready |= sides.describe(oracle, None, options.device)
        serve(answers, ready, measured.update)


def memory_in_child(name: str, *arguments: str) -> dict[str, int]:
    """A side's memory under these arguments, from a process of its own; bytes, by
    `memory.MEANING`'s names.

    Raises:
        UserError: the process failed.
    """
    command = [sys.executable, "-m", "bench.step", *arguments, "--serve", name]
    try:
        child = peers.Peer(name, command, {})
    except peers.PeerError as error:
        raise UserError(f"memory of {error}; --no-memory leaves it out") from None
    child.close()
    return child.ready["memory"]


def case_of(options: argparse.Namespace) -> peers.Case:
    """The problem and the first parameters, for a side that gets them as a file."""
    problem = problem_of(options)
    params = draw_params(problem.draft, options.seed, getattr(torch, options.dtype), options.device)
    return peers.Case(problem, params, options.k, sides.DECAY)


def start_peers(options: argparse.Namespace, world: World, stack: ExitStack) -> peers.Peers:
    """The peers that were asked for, until the stack is closed."""
    names = options.peers or []
    why = sides.ONE_RANK if world.size > 1 else None
    if options.device != "cpu":
        why = peers.ON_CPU
    if not names or why:
        return peers.Peers({}, dict.fromkeys(names, why or ""))
    started = peers.started(
        names,
        case=partial(case_of, options),
        tiny=partial(case_of, tiny_of(options)),
        arguments=sys.argv[1:],
        folder=options.peers_folder,
    )
    return stack.enter_context(started)


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


def time_sides(
    options: argparse.Namespace,
    calls: dict[str, sides.Update],
    others: peers.Peers,
    world: World,
) -> common.Timing:
    """All rounds; from the start again without a peer whose process ended."""
    while True:
        every: dict[str, Callable[[], object]] = {**calls}
        every |= {name: peer.step for name, peer in others.running.items()}
        try:
            return common.in_turns(
                every,
                options.rounds or ROUNDS,
                getattr(torch, options.dtype),
                options.device,
                world,
                warm=0 if options.device == "cpu" else WARM_ON_CUDA,
            )
        except peers.PeerError as error:
            others.drop(error)


def measure(
    options: argparse.Namespace,
    names: list[str],
    oracle: Oracle | None,
    world: World,
    mesh: DeviceMesh | None,
    others: peers.Peers,
) -> dict[str, Any]:
    """Times of every side, FLOPs, and shares of the matmul rate, over all ranks."""
    device = options.device
    problem = problem_of(options, world.rank)
    with sides.specforge_loss(oracle, device):
        made = make_sides(options, names, problem, oracle, mesh)
        for name, peer in others.running.items():
            made.losses[name] = peer.ready["first_loss"]
        # The survivors' loss is right in expectation alone.
        common.check_losses({k: loss for k, loss in made.losses.items() if k != "survivors"})
        timing = time_sides(options, made.calls, others, world)

    times = timing.summary()
    tokens = world.size * problem.batch.attention_mask.numel()
    found = {
        **compare(timing, "fast"),
        "mesh_overhead": timing.ratio("mesh", "fast") - 1 if "mesh" in names else None,
        "mfu_dense": {},
        "tokens_per_s": {name: tokens / took for name, took in times["seconds"].items()},
        **times,
        "memory_here": made.used,
        "first_loss": made.losses,
        **needs(timing, "fast", problem, problem.batch.row_mask, world),
        "survivors": None,
    }
    for name in ("plain", "specforge"):
        if name in names:
            found["mfu_dense"][name] = timing.share(name, found["flops_dense"])
    if "survivors" in names:
        scored = with_survival(problem, options.survival, options.k).scored
        found["survivors"] = {
            **compare(timing, "survivors"),
            **needs(timing, "survivors", problem, scored, world),
        }
    return found


def run(options: argparse.Namespace, world: World) -> dict[str, Any]:
    """Everything about one case."""
    oracle = None
    reason: str | None = sides.ONE_RANK
    if world.size == 1:
        oracle, reason = sides.find_oracle(options.device)
    ours = ["plain", "fast"]
    if options.survival < 1:
        ours.append("survivors")
    if options.mesh:
        ours.append("mesh")
    names = [*ours, "specforge"] if oracle else ours

    # Memory from child processes, before anything large is in this one.
    used = {}
    with_memory = world.size == 1 and not options.no_memory
    if with_memory and not options.memory_here:
        for name in names:
            if name in sides.MEASURED:
                used[name] = memory_in_child(name, *sys.argv[1:])

    with ExitStack() as stack:
        others = start_peers(options, world, stack)
        for name, why in others.missing.items():
            common.show(options, f"{name} is left out: {why}")
        if with_memory:
            used |= {name: peer.ready["memory"] for name, peer in others.running.items()}

        options.device = world.device(options.device)
        mesh = world.mesh(options.device)
        if options.partial and oracle:
            none = peers.Peers({}, {})
            measured = measure(options, ours, None, world, mesh, none)
            why = sides.describe(None, "its side was not measured yet", options.device)
            write_json(options.partial, result_of(options, world, measured, used, none, why))

        measured = measure(options, names, oracle, world, mesh, others)
        about = sides.describe(oracle, reason, options.device)
        return result_of(options, world, measured, used, others, about)


def main() -> None:
    options = parse()
    if options.serve:
        serve_side(options)
        return

    with ranks() as world:
        result = run(options, world)
        if world.main:
            show(options, result)
            common.finish(result, options.out, file_name(options, result))


if __name__ == "__main__":
    sys.exit(common.program("bench.step", main))
