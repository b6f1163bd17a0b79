"""Origin of a result: revision, versions, hardware, threads, allocator, load, date, command."""

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

ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")  # glibc's variables
PACKAGES = ("torch", "transformers", "triton", "yunchang")
REVISION = "EAGLE3FN_REVISION"  # names the revision on a machine without git


def provenance(command: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """What a result's file has besides its numbers.

    Args:
        command: what made the result; None: this process's command line.
        revision: of the code; None: EAGLE3FN_REVISION's, else git's (`git_revision`).
    """
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "revision": revision or os.environ.get(REVISION) or git_revision(),
        "command": own_command() if command is None else command,
        "versions": {"python": sys.version.split()[0], **versions(PACKAGES)},
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "allocator": {name: os.environ.get(name, "glibc's default") for name in ALLOCATOR},
        "load_average": round(os.getloadavg()[0], 2),
    }


def git_revision(folder: Path = Path(__file__).parent) -> str:
    """A checkout's commit, this package's unless a folder is named; "unknown" outside of git.

    It ends in -dirty where files differ from the commit. The checkout is only read: no lock is
    taken, which a git that is killed here would leave (`git describe --dirty` writes the index).
    """
    commit = _printed(["git", "rev-parse", "HEAD"], folder)
    if not commit:
        return "unknown"
    changes = ["git", "--no-optional-locks", "status", "--porcelain", "--untracked-files=no"]
    return f"{commit}-dirty" if _printed(changes, folder) else commit


def own_command(script: str | None = None) -> str:
    """The command line, its script named as a module of bench, or as it is given here.

    Without `--out`; of absolute paths the last part, also of those in `NAME=PATH`.
    """
    words = list(sys.argv[1:])
    if "--out" in words:
        place = words.index("--out")
        del words[place : place + 2]
    program = [script] if script else ["-m", f"bench.{Path(sys.argv[0]).stem}"]
    return shlex.join(["python", *program, *map(_without_folders, words)])


def _without_folders(word: str) -> str:
    """A word of a command line, its absolute path cut to the last part."""
    name, mark, path = word.rpartition("=")
    return f"{name}{mark}{Path(path).name}" if Path(path).is_absolute() else word


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed versions by package."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores, memory, and the card if there is one."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {
        "cpu": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "libc": " ".join(platform.libc_ver()),
    }
    return found | (_card() if torch.cuda.is_available() else {})


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _card() -> dict[str, Any]:
    """The CUDA card and its driver."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": _printed(query) or "unknown",
        "cuda": torch.version.cuda,
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
    }


def _printed(command: list[str], folder: Path | None = None) -> str:
    """A program's first line of output; empty where it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            cwd=folder,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().split("\n")[0]
