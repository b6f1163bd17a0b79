"""The result of `bench.step`: ratios of time and memory, what the rows need, and its lines for
people.
"""

import argparse
from statistics import mean
from typing import Any

from torch import Tensor

from bench import common, memory, peers
from bench.paired import ratios
from bench.problem import Problem, draft_of
from eagle3fn.base.launch import World
from eagle3fn.base.provenance import provenance

ROUNDS = 5
SETTINGS = (
    "shape",
    "seq",
    "batch",
    "masked",
    "k",
    "survival",
    "dtype",
    "device",
    "seed",
    "allocator",
)
RATIOS = {  # each ratio's name, and whose time and memory the fast side's is held against
    "ratio": "specforge",
    "ratio_plain": "plain",
    "ratio_specforge_main": "specforge_main",
    "ratio_speculators": "speculators",
}


def compare(timing: common.Timing, ours: str) -> dict[str, Any]:
    """Every side's time over one of ours: medians of the rounds' ratios, quartiles, and medians by
    processor time.
    """
    found: dict[str, Any] = {}
    quartiles = {}
    processor = {}
    for name, side in RATIOS.items():
        found[name] = None
        if side in timing.seconds:
            of_rounds = ratios(timing.seconds[side], timing.seconds[ours])
            found[name] = of_rounds["median"]
            quartiles[name] = [of_rounds["first_quartile"], of_rounds["third_quartile"]]
            by_processor = ratios(timing.processor[side], timing.processor[ours])
            processor[name] = by_processor["median"]
    return found | {"quartiles": quartiles, "processor_ratios": processor}


def compare_memory(used: dict[str, Any], ours: str) -> dict[str, float | None]:
    """Peak memory of a step of one of ours over every side's."""
    found = {}
    for name, side in RATIOS.items():
        known = side in used
        found[f"memory_{name}"] = used[ours]["step"] / used[side]["step"] if known else None
    return found


def needs(
    timing: common.Timing, side: str, problem: Problem, row_mask: Tensor, world: World
) -> dict[str, Any]:
    """What the rows of a mask need, a mean over ranks, each of which has a batch of its own."""
    needed = common.flops(problem.draft, row_mask)
    shares = world.every(common.row_shares(row_mask))
    return {
        "mfu": timing.share(side, mean(world.every(needed.total))),
        "flops_needed": needed._asdict() | {"total": needed.total},
        "flops_dense": common.flops(problem.draft, row_mask, dense=True).total,
        "shares": {name: mean(rank[name] for rank in shares) for name in shares[0]},
    }


def result_of(
    options: argparse.Namespace,
    world: World,
    measured: dict[str, Any],
    used: dict[str, Any],
    others: peers.Peers,
    specforge: dict[str, Any],
) -> dict[str, Any]:
    """The result: the main numbers, then settings and the rest.

    Args:
        options: as parsed.
        world: the ranks.
        measured: what `measure` returned.
        used: memory by side from child processes.
        others: the peers.
        specforge: what `sides.describe` returned.
    """
    used = used | measured.pop("memory_here")
    if measured["survivors"]:
        measured["survivors"] |= compare_memory(used, "survivors")
    draft = draft_of(options.shape, options.draft_vocab, options.seq)
    settings = common.settings_of(options, SETTINGS, ROUNDS, world)
    return {
        **{name: measured.pop(name) for name in RATIOS},
        **compare_memory(used, "fast"),
        "mfu": measured.pop("mfu"),
        "settings": settings | {"draft_vocab": draft.draft_vocab_size},
        **measured,
        "memory": used,
        "memory_meaning": memory.MEANING if used else None,
        "peers": others.describe(),
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
    for name, about in result["peers"].items():
        lines += [f"{name}: {peers.said(about)}"]
        lines += [f"  {note}" for note in about.get("notes", ())]

    shares = result["shares"]
    lines.append(
        f"seed {options.seed}: {shares['masked']:.1%} of the rows masked, "
        f"{shares['needed']:.1%} needed at step 0, {shares['needed_over_steps']:.1%} over all steps"
    )
    for name, took in result["seconds"].items():
        rate = result["tokens_per_s"][name]
        line = f"{name:14} {took * 1000:9.1f} ms, {rate:9.1f} tokens/s"
        if name in result["memory"]:
            line += f", {result['memory'][name]['step'] / 2**20:8.0f} MiB"
        line += f", first loss {result['first_loss'][name]:.4f}"
        lines.append(line)
    lines.append(
        f"matmul {result['matmul_gflops']:.0f} GFLOP/s; "
        f"fast: {result['mfu']:.1%} of it on the needed rows"
    )
    lines += ratio_lines("fast", result)
    if result["survivors"]:
        lines += ratio_lines("survivors", result["survivors"])
    common.show(options, "\n".join(lines))


def ratio_lines(ours: str, result: dict[str, Any]) -> list[str]:
    """One line for each side that was held against one of ours: the ratio, its quartiles, and the
    ratio by processor time.
    """
    lines = []
    for name, (first, third) in result["quartiles"].items():
        processor = result["processor_ratios"][name]
        quartiles = f"{first:.2f} to {third:.2f}; by processor time {processor:.2f}"
        lines.append(f"{RATIOS[name]} / {ours}: {result[name]:.2f} ({quartiles})")
    return lines


def file_name(options: argparse.Namespace, result: dict[str, Any]) -> str:
    """The result's file, named by its settings."""
    settings = result["settings"]
    words = [
        f"step-{options.shape}-s{options.seq}-b{options.batch}-d{settings['draft_vocab']}",
        f"m{options.masked:g}-{options.dtype}-{options.device}-{options.allocator}",
    ]
    if options.survival < 1:
        words.append(f"r{options.survival:g}")
    if settings["ranks"] > 1:
        words.append(f"{settings['ranks']}ranks")
    return "-".join(words)
