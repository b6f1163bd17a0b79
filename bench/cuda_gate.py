"""Speed and memory on one CUDA card, a part of the CUDA gate.

    python -m bench.cuda_gate --seconds 100 --out FILE

The step at Qwen2.5-7B's and Llama-3-8B's draft shapes, 2,048 tokens, half masked: fast, plain and
SpecForge; where time is left, loss and attention alone. Each item is a process of its own with its
share of the time. Our own sides' numbers are written before SpecForge's side is compiled. A card
with too little memory gets smaller shapes, and the result names the reason. `--device cpu` runs the
same code on tiny shapes and is no measurement.

`FILE` gets, under `parts`, each item's own result (see `bench.step`, `bench.loss`,
`bench.attention`), and what was left out for time.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import common
from bench.floors import bytes_needed
from bench.problem import draft_of
from eagle3fn.base.provenance import provenance
from eagle3fn.testing.gate_part import Report, parse_part, part_options, run_part

SHAPES = ("qwen2.5-7b", "llama-3-8b")
SEQ = 2048
K = 7
SEQS = (2048, 1024, 512)  # the longest that the memory allows
SMALL = "smollm2"  # where not even the shortest fits
SPARE = 0.92  # of the free memory
LEAST_SECONDS = 5.0  # nothing begins with less
LOG_BYTES = 8000  # of an item's output, its end
AIMS = {"ratio": "at least 3", "memory_ratio": "at most 1/3", "mfu": "at least 0.55"}


class Item(NamedTuple):
    """A process that measures."""

    share: float  # of the time, relative to the other items
    words: list[str]  # its command after `python -m`
    chosen: dict[str, Any] | None = None  # which shape, and why


def chosen_shape(shape: str, device: str) -> dict[str, Any]:
    """The shape and length that the card's free memory allows, and why they are smaller, if so.

    `needed_bytes` is `bench.floors.bytes_needed`, an estimate of what all sides need together.
    """
    free = torch.cuda.mem_get_info(device)[0]
    candidates = [(name, seq) for name in (shape, SMALL) for seq in SEQS]
    for name, seq in candidates:
        needed = bytes_needed(draft_of(name, None, seq), 1, seq, K)
        if needed <= SPARE * free:
            break

    # The loop leaves the first that fits, else the smallest.
    found = {"shape": name, "seq": seq, "needed_bytes": needed, "free_bytes": free}
    if (name, seq) != (shape, SEQ):
        found["because"] = (
            f"{shape} at {SEQ:,} tokens needs more than the {free / 2**30:.1f} GiB that are free"
        )
    return found


def items(device: str) -> dict[str, Item]:
    """What is measured, the most important first."""
    return _rehearsal(device) if device == "cpu" else _measurement(device)


def _rehearsal(device: str) -> dict[str, Item]:
    """Tiny shapes; fp32, as bf16 is slow on many CPUs."""
    options = f"--shape tiny --rounds 1 --device {device} --dtype float32".split()
    return {
        "step-tiny": Item(60, ["bench.step", *options, "--seq", "96", "--memory-here"]),
        "loss-tiny": Item(20, ["bench.loss", *options, "--seq", "96"]),
        "attention-tiny": Item(20, ["bench.attention", *options, "--seqs", "96"]),
    }


def _measurement(device: str) -> dict[str, Item]:
    found = {}
    for shape in SHAPES:
        chosen = chosen_shape(shape, device)
        sizes = f"--shape {chosen['shape']} --seq {chosen['seq']} --masked 0.5"
        words = f"bench.step {sizes} --rounds 7 --memory-here --device {device}".split()
        found[f"step-{shape}"] = Item(50, words, chosen)
    for shape in SHAPES:
        sizes = f"--shape {shape} --seq 2048 --vocabs 16000 32000"
        found[f"loss-{shape}"] = Item(1, f"bench.loss {sizes} --device {device}".split())
    sizes = f"--shape {SHAPES[0]} --seqs 2048 4096"
    words = f"bench.attention {sizes} --device {device}".split()
    found[f"attention-{SHAPES[0]}"] = Item(1, words)
    return found


def run_item(report: Report, name: str, item: Item, seconds: float) -> None:
    """Keep an item's numbers, those it wrote before it failed or ran out of time too."""
    is_step = item.words[0] == "bench.step"
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        partial = Path(folder) / "partial.json"
        log = Path(folder) / "log"
        call = [sys.executable, "-m", *item.words, "--json", "--out", str(out)]
        if is_step:
            call += ["--partial", str(partial)]

        code = _call(call, log, seconds)
        text = log.read_bytes()[-LOG_BYTES:].decode("utf-8", "replace")
        whole = read_numbers(out)
        found = whole or read_numbers(partial)

    about: dict[str, Any] = {"chosen": item.chosen} if item.chosen else {}
    about["item_seconds"] = round(time.monotonic() - begin, 1)
    report.change(lambda result: result["parts"].update({name: about | (found or {})}))
    if code is None and not whole:
        report.leave_out(f"{name}: SpecForge's side" if found else name)
    elif code:
        report.fault(name, f"{text}\nexit code {code}")
    elif found and is_step and found.get("specforge") is None:
        report.fault(name, f"SpecForge was not measured: {found.get('specforge_missing')}")


def _call(call: list[str], log: Path, seconds: float) -> int | None:
    """A process's exit code, None if its time was up; its output goes into `log`."""
    with log.open("wb") as stream:
        try:
            done = subprocess.run(
                call,
                cwd=common.ROOT,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                check=False,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return None
    return done.returncode


def read_numbers(path: Path) -> dict[str, Any] | None:
    """A result that an item wrote; None if it did not get to that."""
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def run(report: Report, todo: dict[str, Item]) -> None:
    """Every item that time allows; each gets its share of the time that is left."""
    names = list(todo)
    for place, name in enumerate(names):
        shares = sum(todo[other].share for other in names[place:])
        left = report.left()
        if left < LEAST_SECONDS:
            report.leave_out(name)
            continue
        with report.guarded(name):
            run_item(report, name, todo[name], left * todo[name].share / shares)
        report.write()


def main(arguments: list[str] | None = None) -> int:
    """The part."""
    parser = common.parser_of(__doc__)
    part_options(parser)
    options = parse_part(parser, arguments)
    kind = "rehearsal on a CPU, no measurement" if options.device == "cpu" else "measurement"
    head = {"kind": kind, "aims": AIMS, "parts": {}, **provenance()}
    report = Report(options.out, options.seconds, head)
    report.write()

    with report.guarded("bench"):
        run(report, items(options.device))
    if not any("seconds" in part for part in report.result["parts"].values()):
        report.fault("bench", "nothing was measured")
    return report.finish()


if __name__ == "__main__":
    run_part(main)
