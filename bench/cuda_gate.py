"""Speed and memory on one CUDA card, a part of the CUDA gate: `python -m bench.cuda_gate --seconds 100 --out FILE`.

The step of Qwen2.5-7B's and Llama-3-8B's draft shapes at 2,048 tokens, half masked: fast, plain (legacy) and SpecForge;
where time is left, loss and attention alone. Each is a process of its own with its share of the time. Our own sides'
numbers are written before SpecForge's side is compiled; a card with too little memory gets smaller shapes, and the
result says so. `--device cpu` goes through the same code on tiny shapes and is no measurement.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import common
from bench.problem import draft_of
from eagle3fn.testing.gate_part import Report, parse_part, part_options, run_part
from eagle3fn.testing.provenance import provenance

SHAPES = ("qwen2.5-7b", "llama-3-8b")
SEQ, K = 2048, 7
SEQS = (2048, 1024, 512)  # the longest that the memory allows
SMALL = "smollm2"  # where not even the shortest fits
SPARE = 0.92  # of the free memory
LEAST_SECONDS = 5.0  # nothing begins with less
AIMS = {"ratio": "at least 3", "memory_ratio": "at most 1/3", "mfu": "at least 0.55"}


class Item(NamedTuple):
    """A process that measures: its share of the time, and its command after `python -m`."""

    share: float
    words: list[str]
    chosen: dict[str, Any] | None = None  # which shape, and why


def chosen_shape(shape: str, device: str) -> dict[str, Any]:
    """The shape and length that the card's free memory allows, and why another than asked.

    `needed` is `bench.floors.bytes_needed`, an estimate of what all sides need together.
    """
    from bench.floors import bytes_needed

    free = torch.cuda.mem_get_info(device)[0]
    for name, seq in [*((shape, seq) for seq in SEQS), *((SMALL, seq) for seq in SEQS)]:
        needed = bytes_needed(draft_of(name, None, seq), 1, seq, K)
        if needed <= SPARE * free or (name, seq) == (SMALL, SEQS[-1]):
            break
    found = {"shape": name, "seq": seq, "needed_bytes": needed, "free_bytes": free}
    if (name, seq) != (shape, SEQ):
        found["because"] = (
            f"{shape} at {SEQ:,} tokens needs more than the {free / 2**30:.1f} GiB that are free"
        )
    return found


def items(device: str) -> dict[str, Item]:
    """What is measured, the most important first."""
    if device == "cpu":
        options = [
            "--shape",
            "tiny",
            "--rounds",
            "1",
            "--device",
            device,
            "--dtype",
            "float32",
        ]  # bf16 is slow here
        return {
            "step-tiny": Item(60, ["bench.step", *options, "--seq", "96", "--memory-here"]),
            "loss-tiny": Item(20, ["bench.loss", *options, "--seq", "96"]),
            "attention-tiny": Item(20, ["bench.attention", *options, "--seqs", "96"]),
        }
    found = {}
    for shape in SHAPES:
        chosen = chosen_shape(shape, device)
        words = [
            "bench.step",
            "--shape",
            chosen["shape"],
            "--seq",
            str(chosen["seq"]),
            "--masked",
            "0.5",
        ]
        words += ["--rounds", "7", "--memory-here", "--device", device]
        found[f"step-{shape}"] = Item(50, words, chosen)
    for shape in SHAPES:
        words = [
            "bench.loss",
            "--shape",
            shape,
            "--seq",
            "2048",
            "--vocabs",
            "16000",
            "32000",
            "--device",
            device,
        ]
        found[f"loss-{shape}"] = Item(1, words)
    words = ["bench.attention", "--shape", SHAPES[0], "--seqs", "2048", "4096", "--device", device]
    return found | {f"attention-{SHAPES[0]}": Item(1, words)}


def run_item(report: Report, name: str, item: Item, seconds: float) -> None:
    """Keep an item's numbers, those it wrote before it failed or ran out of time too."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out, partial, log = (Path(folder) / part for part in ("out.json", "partial.json", "log"))
        call = [sys.executable, "-m", *item.words, "--json", "--out", str(out)]
        call += ["--partial", str(partial)] if item.words[0] == "bench.step" else []
        with log.open("wb") as stream:
            try:
                done = subprocess.run(
                    call, cwd=common.ROOT, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, check=False,
                    timeout=seconds,
                )  # fmt: skip
                code = done.returncode
            except subprocess.TimeoutExpired:
                code = None
        said = log.read_bytes()[-8000:].decode("utf-8", "replace")
        whole = read_numbers(out)
        found = whole or read_numbers(partial)
    about = {"chosen": item.chosen} if item.chosen else {}
    about |= {"item_seconds": round(time.monotonic() - begin, 1)}
    report.change(lambda result: result["parts"].update({name: about | (found or {})}))
    if code is None and not whole:
        report.leave_out(f"{name}: SpecForge's side" if found else name)
    elif code:
        report.fault(name, f"{said}\nexit code {code}")
    elif found and item.words[0] == "bench.step" and found.get("old_tool") is None:
        report.fault(name, f"SpecForge was not measured: {found.get('old_tool_missing')}")


def read_numbers(path: Path) -> dict[str, Any] | None:
    """A result that an item wrote; None if it did not get to that."""
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def run(report: Report, todo: dict[str, Item]) -> None:
    """Every item that time allows."""
    names = list(todo)
    for place, name in enumerate(names):
        later = sum(todo[other].share for other in names[place:])
        left = report.left()
        if left < LEAST_SECONDS:
            report.leave_out(name)
            continue
        with report.guarded(name):
            run_item(report, name, todo[name], left * todo[name].share / later)
        report.write()


def main(arguments: list[str] | None = None) -> int:
    """The part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    part_options(parser)
    options = parse_part(parser, arguments)
    kind = "rehearsal on a CPU, no measurement" if options.device == "cpu" else "measurement"
    report = Report(
        options.out, options.seconds, {"kind": kind, "aims": AIMS, "parts": {}, **provenance()}
    )
    report.write()
    with report.guarded("bench"):
        run(report, items(options.device))
    if not any("seconds" in part for part in report.result["parts"].values()):
        report.fault("bench", "nothing was measured")
    return report.finish()


if __name__ == "__main__":
    run_part(main)
