"""What has to be settled before torch is loaded: allocator, threads, and how Triton kernels run.

A script calls `settle()` first when it is run. Where the environment is another one, the process is
replaced by a new one with the right variables.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable

BEGIN = time.monotonic()  # of the process, if this is loaded first
RAISED = str(4 << 30)  # bytes; large temporaries then stay in the heap: not mapped anew each step
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
    about = "a file for the JSON, or a folder, where the settings name it (default: only printed)"
    add("--out", help=about)


def environment(device: str, threads: int, allocator: str) -> dict[str, str | None]:
    """Variables as they must be; None: absent.

    On the CPU SpecForge's Triton kernels are interpreted and dynamo is off; on CUDA neither.
    """
    on_cpu = "1" if device == "cpu" else None
    threshold = RAISED if allocator == "raised" else None
    return {
        "OMP_NUM_THREADS": str(threads),
        "TRITON_INTERPRET": on_cpu,
        "TORCHDYNAMO_DISABLE": on_cpu,
        **dict.fromkeys(THRESHOLDS, threshold),
    }


def exact(device: str, threads: int, allocator: str) -> dict[str, str | None]:
    """As `environment`, for comparisons by exact value: no dynamo, fixed cuBLAS workspaces."""
    wanted = environment(device, threads, allocator)
    return wanted | {"TORCHDYNAMO_DISABLE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def settle(of: Callable[[str, int, str], dict[str, str | None]] = environment) -> None:
    """Continue in the environment that the command line needs; may replace the process."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_arguments(parser)
    options = parser.parse_known_args()[0]
    continue_in(of(options.device, options.threads, options.allocator))


def continue_in(wanted: dict[str, str | None]) -> None:
    """Continue with these variables, None for an absent one; may replace the process."""
    if all(os.environ.get(name) == value for name, value in wanted.items()):
        return

    variables = dict(os.environ)
    for name, value in wanted.items():
        variables.pop(name, None)
        if value is not None:
            variables[name] = value
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], variables)
