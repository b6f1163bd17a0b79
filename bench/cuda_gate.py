"""The benchmarks of one CUDA card, at most 8 minutes: `scripts/cuda_gate.sh bench` calls this.

The step of Qwen2.5-7B's and Llama-3-8B's draft shapes at 2,048 tokens, half masked, against the old tool; then loss
and attention alone. The result grows in `--out` as parts finish; what time did not allow is listed under `left_out`.
Without CUDA it refuses. `--device cpu` goes through the same parts on tiny shapes and is no measurement.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import common
from bench.provenance import provenance
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import write_json

MINUTES = 8.0
SHAPES = ("qwen2.5-7b", "llama-3-8b")
AIMS = {"ratio": "at least 3", "memory_ratio": "at most 1/3", "mfu": "at least 0.55"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the result's file")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run on tiny shapes (default cuda)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="limit in all (default 8)")
    return parser.parse_args()


def parts(device: str) -> dict[str, list[str]]:
    """Name of each part, and its command line behind `python -m`."""
    if device == "cpu":
        common_options = ["--shape", "tiny", "--rounds", "1", "--device", device]
        step = {"step-tiny": ["bench.step", *common_options, "--seq", "96", "--no-memory"]}
        loss = ["bench.loss", *common_options, "--seq", "96"]
        return step | {"loss-tiny": loss, "attention-tiny": ["bench.attention", *common_options, "--seqs", "96"]}
    steps = {
        f"step-{shape}": ["bench.step", "--shape", shape, "--seq", "2048", "--masked", "0.5", "--rounds", "10"]
        for shape in SHAPES
    }
    loss = {f"loss-{shape}": ["bench.loss", "--shape", shape, "--seq", "2048"] for shape in SHAPES}
    loss = {name: [*words, "--vocabs", "16000", "32000"] for name, words in loss.items()}
    attention = ["bench.attention", "--shape", SHAPES[0], "--seqs", "2048", "4096"]
    every = steps | loss | {f"attention-{SHAPES[0]}": attention}
    return {name: [*words, "--device", device] for name, words in every.items()}


def run_part(words: list[str], seconds: float) -> dict[str, Any]:
    """A part's JSON, or how it failed."""
    call = [sys.executable, "-m", *words, "--json", "--out", "-"]
    try:
        done = subprocess.run(call, cwd=common.ROOT, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"not finished within {seconds:.0f} s"}
    if done.returncode:
        return {"failed": f"exit code {done.returncode}", "stderr": done.stderr[-2000:]}
    return json.loads(done.stdout.splitlines()[-1])


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Every part that time allows; the file holds what is finished."""
    begin, todo = time.monotonic(), parts(options.device)
    kind = "dry run on CPU, no measurement" if options.device == "cpu" else "measurement"
    result = {"kind": kind, "aims": AIMS, "parts": {}, "left_out": list(todo), **provenance()}
    for name, words in todo.items():
        left = 60 * options.minutes - (time.monotonic() - begin)
        if left <= 0:
            break
        result["parts"][name] = run_part(words, left)
        result["left_out"].remove(name)
        result["seconds"] = time.monotonic() - begin
        write_json(options.out, result)
    return result


def main() -> None:
    options = parse()
    if options.device != "cpu" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is there; run this on a machine with a card")
    result = run(options)
    summary = {name: part.get("failed") or part["ratio"] for name, part in result["parts"].items()}
    print(json.dumps({"parts": summary, "left_out": result["left_out"], "out": str(options.out)}))
    if result["left_out"] or any("failed" in part for part in result["parts"].values()):
        sys.exit(1)


if __name__ == "__main__":
    common.guarded(main)
