"""Memory of a process that trains as its features come, while samples go through it.

    python -m bench.online_memory --target FOLDER --conversations FILE --vocab MAP

Trains by `train --online --engine transformers`, so that the target is another process's, and reads
the training process's resident memory after each update. Samples are short and packed, the unroll
is one step and the buffer is 32 MiB: what is looked at is what samples that have passed leave in
memory. The last line is JSON: resident memory and its maximum so far, in bytes, after some of the
samples.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from bench.launch import settle

    settle()

import argparse
import os
import subprocess
import tempfile
import time
from typing import Any, NamedTuple

from bench import common
from bench.launch import add_arguments
from bench.memory import status
from eagle3fn.base.errors import UserError
from eagle3fn.base.provenance import provenance

MARKS = (200, 500, 1000, 1500)  # samples after which memory is read, and at the end
BUFFER = 1 / 32  # GiB
BATCH = 20  # samples of an update
LENGTH = 48  # tokens of a sample
SETTINGS = (
    "data.held_out=0",
    f"data.max_length={LENGTH}",
    f"data.pack_tokens={BATCH * LENGTH}",
    "objective.ttt_length=1",
    "optimizer.name=adamw",
)
_PAUSE = 0.05  # seconds between two looks


class Look(NamedTuple):
    """Memory of the training after some samples."""

    samples: int
    resident: int  # bytes, now
    peak: int  # bytes, since the process began


def parse() -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    add("--target", required=True)
    add("--conversations", required=True)
    add("--vocab", required=True, help="a vocabulary map of the target")
    add("--samples", type=int, default=2000, help="trained on (default 2000)")
    common.add_dtype(parser)
    add_arguments(parser)
    return parser.parse_args()


def memory_of_a_run(options: argparse.Namespace) -> dict[str, Any]:
    """The resident memory of a training, at the marks and at the end.

    Raises:
        UserError: the training ends with an error.
    """
    updates = max(1, options.samples // BATCH)
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
            variables = {**os.environ, "PYTHONPATH": str(common.ROOT)}
            process = subprocess.Popen(command, stdout=output, stderr=output, env=variables)
            begin = time.perf_counter()
            looks = _watch(process, out / "metrics.jsonl")
            seconds = time.perf_counter() - begin
        if process.returncode:
            raise UserError(f"the training whose memory is read failed: {log.read_text()[-500:]}")

    marks = [mark for mark in MARKS if mark < options.samples]
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


def main() -> int:
    options = parse()
    names = ("dtype", "threads", "samples")
    result = {
        "settings": {name: getattr(options, name) for name in names},
        "target": Path(options.target).name,
        **memory_of_a_run(options),
        **provenance(),
    }
    common.finish(result, options.out, "online-memory")
    return 0


if __name__ == "__main__":
    sys.exit(common.program("bench.online_memory", main))
