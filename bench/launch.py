"""What has to be settled before torch is loaded: allocator, threads, and how the old tool's kernels run.

A script calls `settle()` first when it is run; where the environment is another one, the process starts itself anew.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable

BEGIN = time.monotonic()  # of the process, if this is loaded first
RAISED = "4294967296"  # bytes: large temporaries stay in the heap, so they are not mapped and zeroed anew at each step
THRESHOLDS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every script here."""
    add = parser.add_argument
    add("--device", default="cpu", help="torch device (default cpu)")
    add("--threads", type=int, default=1, help="CPU threads (default 1)")
    about = "glibc's mmap and trim thresholds: raised to 4 GiB, or as they are (default raised)"
    add("--allocator", choices=("raised", "default"), default="raised", help=about)
    add("--rounds", type=int, help="timed rounds, every side once in each")
    add("--seed", type=int, default=0, help="seed of weights, features and mask (default 0)")
    add("--json", action="store_true", help="print nothing but the line of JSON")
    add(
        "--out", help="the JSON's file (default: named by the settings, in bench/results/; -: none)"
    )


def environment(device: str, threads: int, allocator: str) -> dict[str, str | None]:
    """Variables as they must be; None: absent.

    On CPU the old tool's Triton kernels are interpreted and dynamo is off; on CUDA neither.
    """
    cpu = device == "cpu"
    wanted = {"OMP_NUM_THREADS": str(threads), "TRITON_INTERPRET": "1" if cpu else None}
    wanted |= {"TORCHDYNAMO_DISABLE": "1" if cpu else None}
    return wanted | dict.fromkeys(THRESHOLDS, RAISED if allocator == "raised" else None)


def exact(device: str, threads: int, allocator: str) -> dict[str, str | None]:
    """As `environment`, for comparisons by exact value: dynamo is off, and cuBLAS keeps to its workspace."""
    wanted = environment(device, threads, allocator)
    return wanted | {"TORCHDYNAMO_DISABLE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def settle(of: Callable[[str, int, str], dict[str, str | None]] = environment) -> None:
    """Go on in the environment that the command line asks for; may replace this process by a new one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_arguments(parser)
    options = parser.parse_known_args()[0]
    go_on_in(of(options.device, options.threads, options.allocator))


def go_on_in(wanted: dict[str, str | None]) -> None:
    """Go on with these variables, None for an absent one; may replace this process by a new one."""
    if all(os.environ.get(name) == value for name, value in wanted.items()):
        return
    kept = {name: value for name, value in os.environ.items() if name not in wanted}
    new = kept | {name: value for name, value in wanted.items() if value is not None}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], new)
