"""A checkout's side of `bench.paired`: this file, run from one checkout with another one's package.

    python bench/paired_worker.py CHECKOUT SIDE [bench.step's options]

It imports CHECKOUT's `bench.step` and makes the side on its problem. Then it reads lines on stdin
and makes one step for each. Every answer is a line of JSON on stdout: first the memory, then a
step's times and loss. Of this package it uses bench/memory.py alone, loaded by its path, so that
both sides are measured alike.
"""

import argparse
import importlib
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

MEMORY_STEPS = 2
SMALLEST = {"shape": "tiny", "seq": 64, "batch": 1, "draft_vocab": None}


def load_memory() -> ModuleType:
    """Our bench/memory.py, which needs nothing but torch."""
    path = Path(__file__).with_name("memory.py")
    spec = importlib.util.spec_from_file_location("paired_memory", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def timed_step(update: Any, synchronize: Any, device: str) -> dict[str, float]:
    """One step's wall and processor seconds, and its loss."""
    synchronize(device)
    wall = time.perf_counter()
    processor = time.process_time()
    loss = update()
    synchronize(device)
    return {
        "seconds": time.perf_counter() - wall,
        "processor_seconds": time.process_time() - processor,
        "loss": float(loss),
    }


def main() -> None:
    # Answers go out on the real stdout; whatever libraries print goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    checkout, side, *arguments = sys.argv[1:]
    sys.path[0] = checkout
    step: Any = importlib.import_module("bench.step")
    common: Any = importlib.import_module("bench.common")
    memory: Any = load_memory()
    options = step.parse(arguments)

    def make() -> Any:
        return step.side_of(side, options, problem, None)

    # A step of a tiny problem loads the libraries, so that they are not counted.
    tiny = argparse.Namespace(**(vars(options) | SMALLEST))
    step.side_of(side, tiny, step.problem_of(tiny), None)()
    problem = step.problem_of(options)
    measured = memory.measure(make, MEMORY_STEPS, options.device)
    package = importlib.import_module("eagle3fn")
    ready = {"memory": measured.used, "package": str(Path(str(package.__file__)).parent)}
    print(json.dumps(ready), file=answers, flush=True)

    for _ in sys.stdin:
        answer = timed_step(measured.update, common.synchronize, options.device)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
