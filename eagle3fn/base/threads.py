"""How many CPU threads a command computes with: as given, as its work began, or by measurement.

The measurement times products like those of the command's work, at 1, 2, 4, … threads in turn. It
counts what this process may use now: a machine that is busy has fewer threads to give.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from eagle3fn.base.cores import local_ranks, own_cores
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import write_json
from eagle3fn.base.launch import World
from eagle3fn.base.read import read_json
from eagle3fn.base.thread_timing import Work, candidates, fastest

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class Kept(NamedTuple):
    """The number of threads that a piece of work began with."""

    count: int
    where: Path  # the file that keeps it


def take_threads(
    make_work: Callable[[], Work],
    device: str,
    given: int | None = None,
    kept: Kept | None = None,
    world: World = World(),  # noqa: B008
    bits_depend: bool = False,
) -> str:
    """Set torch's number of threads for this process; every rank calls, and gets the same number.

    The number that is given (`--threads`, else OMP_NUM_THREADS) comes first, then the one kept,
    then a measurement. On a device other than the CPU nothing is measured and torch's number stays.

    Args:
        make_work: makes what is measured; called only if something is.
        device: where the command computes.
        given: the number that the command line names.
        kept: the number that the work began with; measured anew where there are now fewer cores,
            unless the bits depend on it.
        world: the ranks.
        bits_depend: another number than the kept one is refused.

    Returns:
        A line that says the number and why; "" where torch's own stays.

    Raises:
        UserError: a number other than the kept one is given, and the bits depend on it.
    """
    source = "--threads"
    if given is None:
        given = _of_environment()
        source = "OMP_NUM_THREADS"
    if given is not None and kept is not None and bits_depend and given != kept.count:
        raise UserError(
            f"{kept.where}: begun with {threads(kept.count)}, now {source} sets {given}: under "
            f"train.reduce = 'tree' the bits would differ; set {kept.count}, or train into another "
            "folder"
        )

    if given is not None:
        torch.set_num_threads(given)
        return f"{threads(given)}: {source} sets the number"
    cores = min(world.every(own_cores()))
    if kept is not None and (bits_depend or kept.count <= cores):
        torch.set_num_threads(kept.count)
        return f"{threads(kept.count)}: as it began ({kept.where})"
    if torch.device(device).type != "cpu":
        return ""

    if cores == 1:
        torch.set_num_threads(1)
        return "1 thread: there is one core for it; --threads sets another number"
    found = fastest(make_work, candidates(cores), world)
    torch.set_num_threads(found.count)
    tried = ", ".join(map(str, found.relative))
    return (
        f"{threads(found.count)}: fastest of {tried} in a measurement of {found.seconds:.1f} s; "
        "--threads sets another number"
    )


def threads(count: int) -> str:
    """The number as words."""
    return "1 thread" if count == 1 else f"{count} threads"


def _of_environment() -> int | None:
    """torch's number, if a variable sets it; None where torchrun wrote that variable by itself."""
    if any(os.environ.get(name) for name in VARIABLES) and not _written_by_torchrun():
        return torch.get_num_threads()
    return None


def _written_by_torchrun() -> bool:
    """torchrun gives each of several ranks OMP_NUM_THREADS=1 where its own environment has none."""
    if local_ranks() == 1 or os.environ.get("OMP_NUM_THREADS") != "1":
        return False
    try:
        inherited = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return not any(entry.startswith(b"OMP_NUM_THREADS=") for entry in inherited)


def keep_threads(path: Path) -> None:
    """Write torch's number of threads into a file of work that begins, unless it is there."""
    if not path.exists():
        write_json(path, {"threads": torch.get_num_threads()})


def read_kept(path: Path) -> Kept | None:
    """The number under `threads` in a JSON file; None without such a file or entry.

    Raises:
        UserError: unreadable, or no number.
    """
    tree = read_json(path) if os.path.lexists(path) else None
    count = tree.get("threads") if isinstance(tree, dict) else None
    if count is None:
        return None
    if type(count) is not int or count < 1:
        raise UserError(f"{path}: threads = {count!r}: must be a number of threads; delete it")
    return Kept(count, path)
