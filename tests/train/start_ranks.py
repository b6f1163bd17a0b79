"""Start a few ranks of a program, by torchrun or as bare processes, and collect what they print."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Ended(NamedTuple):
    """How the ranks ended."""

    codes: list[int]  # exit codes, in the ranks' order; torchrun has one
    text: str  # what all of them printed
    seconds: float


def torchrun(ranks: int, *command: object, timeout: float = 240) -> Ended:
    """`torchrun --nproc-per-node ranks command`."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += ["--nproc-per-node", str(ranks), *map(str, command)]
    return _run([start], [{}], timeout)


def processes(ranks: int, *command: object, timeout: float = 240) -> Ended:
    """The same ranks without torchrun: when one fails, nothing ends the others.

    Rank 0 holds the store.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    settings = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return _run([[sys.executable, *map(str, command)]] * ranks, settings, timeout)


def run_job(module: str, folder: Path) -> None:
    """`python -m module folder` in a process of one thread, which must end well."""
    log = folder / "job.log"
    with log.open("w") as file:
        ended = subprocess.run(
            [sys.executable, "-m", module, str(folder)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=file,
            check=False,
        )
    assert ended.returncode == 0, log.read_text()


def _run(commands: list[list[str]], settings: list[dict[str, str]], timeout: float) -> Ended:
    """Run all commands at once, each with its own settings in the environment."""
    begin = time.perf_counter()
    common = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = []
    for command, own in zip(commands, settings, strict=True):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=common | own,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        started.append(process)

    try:
        text = "".join(process.communicate(timeout=timeout)[0] for process in started)
    finally:
        for process in started:
            process.kill()
    return Ended([process.returncode for process in started], text, time.perf_counter() - begin)
