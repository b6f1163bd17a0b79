"""Memory of a process that trains as its features come, against one that reads them from a folder.

    python -m bench.online_memory --target FOLDER --conversations FILE --vocab MAP

Trains by `train --online --engine transformers`, so that the target is another process's, and by
`train --features` on what `extract` writes of the same conversations. After each update the
training process's anonymous memory is read, which has no mapped file in it. Samples are short, the
unroll is one step and the buffer is 32 MiB: what is looked at is what samples that have passed
leave in memory.

Each of `KINDS` is trained both ways. glibc gives freed blocks of 128 KiB and more back to the
system, as otherwise its heap grows by fragments. In bfloat16 oneDNN compiles a kernel for each
shape of a product, and the number of supervised rows differs from update to update: it keeps up to
1,024 of them, or none. The last line is JSON: bytes after some of the samples.
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

MARKS = (200, 500, 1000, 1500, 1900)  # samples after which memory is read, and at the end
BUFFER = 1 / 32  # GiB
BATCH = 20  # samples of an update
LENGTH = 48  # tokens of a sample
SETTINGS = (
    "data.held_out=0",
    f"data.max_length={LENGTH}",
    f"data.micro_batch={BATCH}",
    "objective.ttt_length=1",
    "optimizer.name=adamw",
)
_PAUSE = 0.05  # seconds between two looks


class Kind(NamedTuple):
    """How a training computes."""

    dtype: str
    variables: dict[str, str]  # of the process's environment


_GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}  # bytes
KINDS = {
    "float32": Kind("float32", _GIVES_BACK),
    "bfloat16": Kind("bfloat16", _GIVES_BACK),
    "bfloat16, no kernel kept": Kind(
        "bfloat16", {**_GIVES_BACK, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
    ),
}


class Look(NamedTuple):
    """Memory of the training after some samples."""

    samples: int
    memory: int  # bytes


def parse() -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    add("--target", required=True)
    add("--conversations", required=True)
    add("--vocab", required=True, help="a vocabulary map of the target")
    add("--samples", type=int, default=2000, help="trained on (default 2000)")
    add("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="default: all")
    add_arguments(parser)
    return parser.parse_args()


def memory_of_all(options: argparse.Namespace) -> dict[str, Any]:
    """The memory of both trainings of each kind, at the marks and at the end.

    Raises:
        UserError: a command ends with an error.
    """
    result: dict[str, Any] = {
        "buffer": int(BUFFER * 2**30),
        "batch": BATCH,
        "max_length": LENGTH,
        "samples": max(1, options.samples // BATCH) * BATCH,
        "kinds": {},
    }
    for name in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            result["kinds"][name] = _memory_of_both(options, KINDS[name], Path(folder))
    return result


def _memory_of_both(options: argparse.Namespace, kind: Kind, folder: Path) -> dict[str, Any]:
    """The memory of a training from files, and of one whose features come as it goes."""
    features = folder / "features"
    extraction = ["extract", "--conversations", options.conversations, "--out", str(features)]
    extraction += ["--max-length", str(LENGTH), "--dtype", kind.dtype]
    _end(_start(options, extraction, kind, folder / "log"), folder)

    online = ["--online", options.conversations, "--max-length", str(LENGTH)]
    online += ["--engine", "transformers", "--dtype", kind.dtype, "--buffer", str(BUFFER)]
    words = {"files": ["--features", str(features)], "online": online}
    return {side: _memory_of(options, words[side], kind, folder / side) for side in words}


def _memory_of(
    options: argparse.Namespace, words: list[str], kind: Kind, folder: Path
) -> list[dict[str, int]]:
    """The memory of one training."""
    folder.mkdir()
    updates = max(1, options.samples // BATCH)
    out = folder / "run"
    command = ["train", "--vocab", options.vocab, "--out", str(out), *words]
    settings = [*SETTINGS, f"data.global_batch={BATCH}", f"train.steps={updates}"]
    for setting in [*settings, f"train.dtype={kind.dtype}"]:
        command += ["--set", setting]

    process = _start(options, command, kind, folder / "log")
    try:
        looks = _watch(process, out / "metrics.jsonl")
    finally:
        process.terminate()
        _end(process, folder)

    marks = [mark for mark in MARKS if mark < options.samples]
    chosen = [next(look for look in looks if look.samples >= mark) for mark in marks]
    return [look._asdict() for look in [*chosen, looks[-1]]]


def _start(
    options: argparse.Namespace, words: list[str], kind: Kind, log: Path
) -> subprocess.Popen[bytes]:
    """A command of the package, which prints to a log."""
    command = [sys.executable, "-m", "eagle3fn.cli", words[0], "--target", options.target]
    command += ["--threads", str(options.threads), *words[1:]]
    variables = {**os.environ, **kind.variables, "PYTHONPATH": str(common.ROOT)}
    with log.open("w") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=variables)


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait for a command.

    Raises:
        UserError: it ends with an error.
    """
    if process.wait():
        raise UserError(f"a command failed: {(folder / 'log').read_text()[-500:]}")


def _watch(process: subprocess.Popen[bytes], metrics: Path) -> list[Look]:
    """Memory after each update that is seen, until the process ends."""
    looks: list[Look] = []
    while process.poll() is None:
        time.sleep(_PAUSE)
        updates = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if updates and (not looks or updates * BATCH > looks[-1].samples):
            looks.append(Look(updates * BATCH, status("RssAnon", process.pid)))
    return looks


def main() -> int:
    options = parse()
    names = ("threads", "samples")
    result = {
        "settings": {name: getattr(options, name) for name in names},
        "target": Path(options.target).name,
        **memory_of_all(options),
        **provenance(),
    }
    common.finish(result, options.out, "online-memory")
    return 0


if __name__ == "__main__":
    sys.exit(common.program("bench.online_memory", main))
