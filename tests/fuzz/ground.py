"""What the cases stand on: the world of files, and what the commands make of them unmutated."""

import gc
import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.process import Ended, Limits, call
from tests.fuzz.results import Result, result_of
from tests.fuzz.tasks import TASKS, Task
from tests.fuzz.world import write_world

Main = Callable[[list[str]], int]
"""The command line: arguments to an exit code."""

_HEAVY = [
    "torch",
    "torch.distributed.checkpoint",
    "transformers.models.llama.modeling_llama",
    "pyarrow.parquet",
    "eagle3fn.data.inspection",
    "eagle3fn.data.regenerate",
    "eagle3fn.use.report",
]
"""What takes longest to import, and what the making of the world does not import."""


class Ground(NamedTuple):
    """Where the cases are, what is called, and within which limits."""

    folder: Path  # of all that is written here
    world: Path
    main: Main
    limits: Limits

    def call(self, inner: Path, arguments: list[str], log: Path) -> Ended:
        """Call the command line in the folder `inner`, in a fork."""

        def work() -> int:
            os.chdir(inner)
            return self.main(arguments)

        return call(work, log, self.limits)

    def unmutated(self, name: str, choice: str) -> Result:
        """The result of a task on its files as they are; made once, whoever asks first.

        Raises:
            RuntimeError: the command fails.
        """
        key = f"{name}-{choice}"
        kept = self.folder / f"{key}.json"
        if kept.is_file():
            return json.loads(kept.read_text())

        task = TASKS[name]
        inner = self.folder / f"{key}-{os.getpid()}"
        inner.mkdir()
        copy_inputs(task, choice, self.world, inner)
        ended = self.call(inner, task.call(choice), inner.with_name(f"{inner.name}-said"))
        if ended.code:
            raise RuntimeError(f"{name} {choice}: exit code {ended.code}: {ended.err[-2000:]}")
        found = result_of(task, inner, ended.out)
        shutil.rmtree(inner)

        temporary = self.folder / f"{key}-{os.getpid()}.json"
        temporary.write_text(json.dumps(found))
        os.replace(temporary, kept)
        return found


def prepare(folder: Path, main: Main, limits: Limits) -> Ground:
    """Import what the commands import, and write the world.

    Raises:
        RuntimeError: a command fails while the world is written.
    """
    _import(_HEAVY)
    world = folder / "world"
    world.mkdir(parents=True)
    ended = call(lambda: write_world(world), folder / "world-said", Limits(cpu_s=120))
    if ended.code:
        raise RuntimeError(f"the world was not written: {ended.err[-2000:]}")
    _import(ended.imported)

    # What is here stays: the forks then copy fewer pages.
    gc.collect()
    gc.freeze()
    return Ground(folder, world, main, limits)


def _import(names: list[str]) -> None:
    """Import what a fork imported, so that the next forks have it."""
    for name in sorted(names):
        try:
            importlib.import_module(name)
        except Exception:  # a module of another's making, not to be found by its name
            continue


def copy_inputs(task: Task, choice: str, world: Path, folder: Path) -> None:
    """Copy what a task reads from the world."""
    for name in task.folders(choice):
        if (world / name).is_dir():
            shutil.copytree(world / name, folder / name, symlinks=True)
        else:
            shutil.copy2(world / name, folder / name)
