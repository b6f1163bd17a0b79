"""The sources of `train --online`: the target here, an engine's processes, or its servers."""

import threading
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from eagle3fn.base import progress
from eagle3fn.commands.online_rows import sampling_of
from eagle3fn.commands.sources import as_transformers, engine_source, model_source

if TYPE_CHECKING:
    from eagle3fn.base.launch import World
    from eagle3fn.data.generate import Sampling
    from eagle3fn.data.source_pool import Source
    from eagle3fn.data.sources import FeatureSource

T = TypeVar("T")


def sources_of(
    options: Any, tree: dict[str, Any], layers: tuple[int, ...], world: "World", logs: "Logs"
) -> "Sequence[Source]":
    """The target in this process; or an engine's processes; or its running servers.

    Args:
        options: the command's, checked.
        tree: the target's configuration.
        layers: the tapped decoder layers, ascending and counted from 0.
        world: the ranks, each of which has its own.
        logs: knows the files that engines write into, and their faults.

    Raises:
        UserError: `--target-device` is not there.
    """
    from eagle3fn.base.device import check_device
    from eagle3fn.data.source_pool import Source

    writing = sampling_of(options)
    if not options.engine:
        device = check_device(world.device(options.target_device, "--target-device"))
        return [Source("the target", partial(_target, options, layers, device, writing))]

    def source(name: str, given: Any, log: str) -> "Source":
        return Source(name, partial(_engine, given, tree, layers, log, writing, logs))

    if options.engine == "vllm" and options.engine_url:
        return [source(url, _with(options, engine_url=[url]), "") for url in options.engine_url]
    found = []
    tried = "dry-run." if options.dry_run else ""  # the run's own are left as they are
    for number in range(1, 1 + (1 if options.engine_url else options.sources or 1)):
        rank = f"-{world.rank}" if world.size > 1 else ""
        name = f"source {number}" + (f" of rank {world.rank}" if world.size > 1 else "")
        log = f"{options.out}.{tried}{options.engine}{rank}-{number}.log"
        found.append(source(name, options, log))
    return found


@contextmanager
def _target(
    options: Any,
    layers: tuple[int, ...],
    device: str,
    writing: "Sampling | None",
    _abandoned: threading.Event,
) -> "Iterator[FeatureSource]":
    """The target in this process, known as the engine transformers, whose bits it has."""
    with model_source(options, layers, device, writing) as (source, _):
        yield as_transformers(source, options.target, device)


@contextmanager
def _engine(
    options: Any,
    tree: dict[str, Any],
    layers: tuple[int, ...],
    log: str,
    writing: "Sampling | None",
    logs: "Logs",
    abandoned: threading.Event,
) -> "Iterator[FeatureSource]":
    """An engine, whose faults are noted."""
    with ExitStack() as own:
        with logs.fault_noted(log):
            source, _ = own.enter_context(
                engine_source(options, tree, layers, log, progress.say, writing, abandoned)
            )
        yield source._replace(
            features=logs.faults_noted(source.features),
            write=source.write and logs.faults_noted(source.write),
        )


class Logs:
    """What engines print, in files that are removed where nothing came of the call.

    That is a dry run, or a call that was refused before its first update was saved, and by no fault
    of an engine.
    """

    def __init__(self, out: str, dry_run: bool) -> None:
        self.out = Path(out)
        self.dry_run = dry_run
        self.seen: list[Path] = []
        self.files: list[Path] = []  # of these, those that were not there before
        self.at_fault = False
        self.closing = False  # what engines raise now is no fault

    def __enter__(self) -> "Logs":
        self._begun_at = self._checkpoint()
        parents = self.out.absolute().parents
        self._new = [folder for folder in parents if not folder.exists()]  # the innermost first
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        refused = kind is not None and self._checkpoint() == self._begun_at
        if self.at_fault or not (refused or self.dry_run):
            return
        for path in self.files:
            path.unlink(missing_ok=True)
        for folder in self._new:
            with suppress(OSError):  # it is not empty, or was never made
                folder.rmdir()

    def _checkpoint(self) -> Path | None:
        from eagle3fn.train.checkpoint import checkpoints

        return max(checkpoints(self.out / "checkpoints"), default=None)

    def close(self) -> None:
        """From now on engines are ended."""
        self.closing = True

    @contextmanager
    def fault_noted(self, log: str = "") -> Iterator[None]:
        """What is raised in the block is an engine's fault, which may write into the file `log`."""
        path = Path(log)
        if log and path not in self.seen:
            self.seen.append(path)
            if not path.exists():
                self.files.append(path)
        try:
            yield
        except BaseException:
            self.at_fault = self.at_fault or not self.closing
            raise

    def faults_noted(self, asked: Callable[..., T]) -> Callable[..., T]:
        """A function of an engine's, the same."""

        def ask(*given: Any) -> T:
            with self.fault_noted():
                return asked(*given)

        return ask


def _with(options: Any, **changes: Any) -> Any:
    """The options with others in their places."""
    return Namespace(**{**vars(options), **changes})
