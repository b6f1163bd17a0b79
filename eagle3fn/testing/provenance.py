"""What a result says of itself: revision, versions, hardware, threads, allocator, load, date and command."""

import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

THRESHOLDS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")  # the allocator's
PACKAGES = ("torch", "transformers", "triton", "yunchang")


def provenance(command: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """The revision ends in -dirty where files differ from it; `command` is this process's own unless given.

    A machine without git is told the revision: by `revision`, or by EAGLE3FN_REVISION in the environment.
    """
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    given = revision or os.environ.get("EAGLE3FN_REVISION")
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "revision": given or said(git) or "unknown",
        "command": own_command() if command is None else command,
        "versions": {"python": sys.version.split()[0]}
        | {name: _version(name) for name in PACKAGES},
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "allocator": {name: os.environ.get(name, "glibc's default") for name in THRESHOLDS},
        "load_average": round(os.getloadavg()[0], 2),
    }


def own_command() -> str:
    """The command line, its script named as a module; without `--out`, and of absolute paths the last part."""
    words = list(sys.argv[1:])
    if "--out" in words:
        place = words.index("--out")
        del words[place : place + 2]
    words = [Path(word).name if Path(word).is_absolute() else word for word in words]
    return shlex.join(["python", "-m", f"bench.{Path(sys.argv[0]).stem}", *words])


def hardware() -> dict[str, Any]:
    """Processor, cores, memory, and the card if there is one."""
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "libc": " ".join(platform.libc_ver()),
    }
    return found | (card() if torch.cuda.is_available() else {})


def card() -> dict[str, Any]:
    """The CUDA card, its driver and what it can do."""
    properties = torch.cuda.get_device_properties(0)
    driver = said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver or "unknown",
        "cuda": torch.version.cuda,
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
    }


def said(command: list[str]) -> str:
    """What a program printed; empty where it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().split("\n")[0]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
