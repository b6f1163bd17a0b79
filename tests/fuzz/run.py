"""Many cases in a few processes, and their counts."""

import gc
import importlib
import json
import os
import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.fuzz.case import (
    CHANGED,
    CLEAR,
    OTHER,
    UNHARMED,
    Baseline,
    Main,
    Verdict,
    copy_inputs,
    draw,
    result_with_text,
    run_case,
)
from tests.fuzz.process import Limits, call
from tests.fuzz.tasks import TASKS
from tests.fuzz.world import write_world

VERDICTS = (CLEAR, UNHARMED, CHANGED, OTHER)


class Ground(NamedTuple):
    """What the cases stand on."""

    folder: Path  # of all that is written here
    world: Path
    baseline: Baseline
    main: Main
    limits: Limits


def prepare(folder: Path, main: Main, limits: Limits) -> Ground:
    """Write the world, learn what the commands import, and the results of unmutated files.

    Raises:
        RuntimeError: a command fails on its unmutated files, or gives two results.
    """
    world = folder / "world"
    world.mkdir(parents=True)
    ended = call(lambda: write_world(world), folder / "world-said", Limits(cpu_s=120))
    if ended.code:
        raise RuntimeError(f"the world was not written: {ended.err[-2000:]}")
    _import(ended.imported)

    baseline: Baseline = {}
    for name, task in TASKS.items():
        for choice in task.choices:
            inner = folder / "unmutated"
            inner.mkdir()
            copy_inputs(task, choice, world, inner)
            arguments = task.call(choice)

            def work(inner: Path = inner, arguments: list[str] = arguments) -> int:
                os.chdir(inner)
                return main(arguments)

            ended = call(work, folder / "unmutated-said", limits)
            _import(ended.imported)
            if ended.code:
                raise RuntimeError(f"{name} {choice}: exit code {ended.code}: {ended.err[-2000:]}")
            baseline[name, choice] = result_with_text(task, ended, inner)
            shutil.rmtree(inner)

    # What is here stays: the forks then copy fewer pages.
    gc.collect()
    gc.freeze()
    return Ground(folder, world, baseline, main, limits)


def _import(names: list[str]) -> None:
    """Import what a fork imported, so that the next forks have it."""
    for name in sorted(names):
        try:
            importlib.import_module(name)
        except BaseException:  # noqa: S112
            continue


def run_one(ground: Ground, seed: int, number: int, keep: bool = False) -> Verdict:
    """One case; with `keep` its folder stays."""
    folder = ground.folder / f"case-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    case = draw(seed, number, ground.world)
    try:
        return run_case(case, ground.world, folder, ground.main, ground.limits, ground.baseline)
    except Exception as error:
        traceback.print_exc()
        what = f"these tests themselves failed: {error!r:.200}"
        return Verdict(number, case.kind, case.task, case.file, "", False, OTHER, what, [])
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def run_many(
    ground: Ground, seed: int, count: int, workers: int, on_done: Callable[[Verdict], None]
) -> list[Verdict]:
    """Cases 0 to `count` - 1, in processes that are forks of this one."""
    readers = []
    pids = []
    for worker in range(workers):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _be_worker(ground, seed, range(worker, count, workers), writer)
        os.close(writer)
        readers.append(reader)
        pids.append(pid)

    verdicts = []
    for verdict in _read(readers):
        verdicts.append(verdict)
        on_done(verdict)
    for pid in pids:
        os.waitpid(pid, 0)
    if len(verdicts) != count:
        raise RuntimeError(f"{count - len(verdicts)} cases have no verdict: a worker ended early")
    return sorted(verdicts, key=lambda verdict: verdict.number)


def _be_worker(ground: Ground, seed: int, numbers: range, writer: int) -> None:
    """What a worker does: it never returns."""
    try:
        with os.fdopen(writer, "w") as file:
            for number in numbers:
                verdict = run_one(ground, seed, number)
                file.write(json.dumps(verdict._asdict()) + "\n")
                file.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _read(readers: list[int]) -> Iterator[Verdict]:
    """The verdicts as they come."""
    import selectors

    selector = selectors.DefaultSelector()
    for reader in readers:
        selector.register(os.fdopen(reader, "r"), selectors.EVENT_READ)
    open_files = len(readers)
    while open_files:
        for key, _ in selector.select():
            file: Any = key.fileobj
            line = file.readline()
            if line:
                yield Verdict(**json.loads(line))
            else:
                selector.unregister(file)
                file.close()
                open_files -= 1


def counts(verdicts: list[Verdict]) -> dict[str, Any]:
    """How many cases there were of each verdict, in all and by kind."""
    total = Counter(verdict.verdict for verdict in verdicts)
    remarks = Counter(remark for verdict in verdicts for remark in verdict.remarks)
    by_kind: dict[str, Counter[str]] = {}
    for verdict in verdicts:
        by_kind.setdefault(verdict.kind, Counter())[verdict.verdict] += 1
    return {
        "cases": len(verdicts),
        **{name: total[name] for name in VERDICTS},
        "remarks": dict(sorted(remarks.items())),
        "by_kind": {kind: dict(by_kind[kind]) for kind in sorted(by_kind)},
    }
