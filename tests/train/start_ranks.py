"""Start a few ranks of a script, by torchrun or as bare processes, and hear what they say."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Ended(NamedTuple):
    """How the ranks ended: exit codes (torchrun: one), what all wrote together, seconds."""

    codes: list[int]
    text: str
    seconds: float


def torchrun(ranks: int, *command: object, timeout: float = 240) -> Ended:
    """`torchrun --nproc-per-node ranks command`."""
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
    ]
    return _run([start + list(map(str, command))], [{}], timeout)


def processes(ranks: int, *command: object, timeout: float = 240) -> Ended:
    """The same ranks without torchrun: nobody ends the others when one fails, and rank 0 holds the store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    settings = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return _run([[sys.executable, *map(str, command)]] * ranks, settings, timeout)


def _run(commands: list[list[str]], settings: list[dict[str, str]], timeout: float) -> Ended:
    begin = time.perf_counter()
    plain = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(command, cwd=ROOT, env={**os.environ, **plain, **more}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for command, more in zip(commands, settings, strict=True)
    ]  # fmt: skip
    try:
        text = "".join(process.communicate(timeout=timeout)[0] for process in started)
    finally:
        for process in started:
            process.kill()
    return Ended([process.returncode for process in started], text, time.perf_counter() - begin)
