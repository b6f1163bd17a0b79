"""How many cores this process may use."""

import math
import os
from pathlib import Path


def own_cores() -> int:
    """Cores that this process may use: of its affinity and its control groups' quota, its share.

    The ranks that torchrun started on this machine (LOCAL_WORLD_SIZE) share them alike.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    cores = math.ceil(min(cores, quota()))
    return max(1, cores // local_ranks())


def local_ranks() -> int:
    """Ranks that torchrun started on this machine; 1 without it."""
    return _ranks("LOCAL_WORLD_SIZE")


def all_ranks() -> int:
    """Ranks that torchrun started on all machines; 1 without it."""
    return _ranks("WORLD_SIZE")


def _ranks(name: str) -> int:
    """A number of ranks in the environment; 1 where it is none."""
    try:
        return max(1, int(os.environ.get(name, "1")))
    except ValueError:
        return 1


def quota(root: Path = Path("/")) -> float:
    """Cores' worth of time that the control groups of this process allow; inf without a limit.

    Version 2 writes `cpu.max` ("quota period", in microseconds, or "max period"), version 1 a file
    for each of the two. A group is limited by those above it as well.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf

    allowed = math.inf
    for line in lines:  # "0::/path" in version 2, "4:cpu,cpuacct:/path" in version 1
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup"
        if controllers:
            mount = mount / "cpu"
        group = mount / path.lstrip("/")
        while group.is_relative_to(mount):
            allowed = min(allowed, _quota_of(group))
            group = group.parent
    return allowed


def _quota_of(group: Path) -> float:
    """A single group's limit."""
    try:
        if (group / "cpu.max").exists():
            limit, period = (group / "cpu.max").read_text().split()
        else:
            limit = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        if limit == "max" or int(limit) <= 0:
            return math.inf
        return int(limit) / int(period)
    except (OSError, ValueError):
        return math.inf
