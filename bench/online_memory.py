"""Memory of the process that trains with features from another one, as samples go through it."""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench.common import ROOT
from bench.memory import status
from eagle3fn.base.errors import UserError

MARKS = (200, 500, 1000, 1500, 2000)  # samples after which memory is read
BUFFER = 1 / 32  # GiB
BATCH = 20  # samples of an update
LENGTH = 64  # tokens of a sample
SETTINGS = ("data.held_out=0", "objective.ttt_length=1", "optimizer.name=adamw")
_PAUSE = 0.05  # seconds between two looks


class Look(NamedTuple):
    """Memory of the training after some samples."""

    samples: int
    resident: int  # bytes, now
    peak: int  # bytes, since the process began


def memory_of_a_run(options: argparse.Namespace) -> dict[str, Any]:
    """The resident memory of `train --online --engine transformers`, at the marks and at the end.

    Samples are short, the unroll is one step and the buffer is small: what is looked at is what
    passing samples leave in memory.

    Args:
        options: of `bench.online`; read are `target`, `conversations`, `vocab`, `threads`, `dtype`
            and `memory_samples`.

    Raises:
        UserError: the training ends with an error.
    """
    updates = max(1, options.memory_samples // BATCH)
    settings = [*SETTINGS, f"data.global_batch={BATCH}", f"train.steps={updates}"]
    settings.append(f"train.dtype={options.dtype}")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "eagle3fn.cli", "train", "--online", options.conversations]
        command += ["--target", options.target, "--vocab", options.vocab, "--out", str(out)]
        command += ["--engine", "transformers", "--dtype", options.dtype, "--buffer", str(BUFFER)]
        command += ["--max-length", str(LENGTH), "--threads", str(options.threads)]
        for setting in settings:
            command += ["--set", setting]

        log = Path(folder) / "log"
        with log.open("w") as output:
            variables = {**os.environ, "PYTHONPATH": str(ROOT)}
            process = subprocess.Popen(command, stdout=output, stderr=output, env=variables)
            begin = time.perf_counter()
            looks = _watch(process, out / "metrics.jsonl")
            seconds = time.perf_counter() - begin
        if process.returncode:
            raise UserError(f"the training whose memory is read failed: {log.read_text()[-500:]}")

    marks = [mark for mark in MARKS if mark < options.memory_samples]
    chosen = [next(look for look in looks if look.samples >= mark) for mark in marks]
    return {
        "buffer": int(BUFFER * 2**30),
        "batch": BATCH,
        "max_length": LENGTH,
        "samples": updates * BATCH,
        "seconds": seconds,
        "at": [look._asdict() for look in [*chosen, looks[-1]]],
    }


def _watch(process: subprocess.Popen[bytes], metrics: Path) -> list[Look]:
    """Memory after each update that is seen, until the process ends."""
    looks: list[Look] = []
    try:
        while process.poll() is None:
            time.sleep(_PAUSE)
            updates = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            if updates and (not looks or updates * BATCH > looks[-1].samples):
                resident = status("VmRSS", process.pid)
                looks.append(Look(updates * BATCH, resident, status("VmHWM", process.pid)))
    finally:
        process.terminate()
        process.wait()
    return looks
