"""Many cases in a few processes, and their counts."""

import json
import os
import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from tests.fuzz.case import Verdict, draw, run_case
from tests.fuzz.ground import Ground
from tests.fuzz.judge import OTHER, VERDICTS
from tests.fuzz.process import limit_memory


def run_one(ground: Ground, seed: int, number: int, keep: bool = False) -> Verdict:
    """One case; with `keep` its folder stays."""
    folder = ground.folder / f"case-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    case = draw(seed, number, ground.world)
    try:
        return run_case(case, folder, ground)
    except Exception as error:
        traceback.print_exc()
        what = f"these tests themselves failed: {error!r:.200}"
        first = case.files[0]
        return Verdict(number, first.kind, case.task, first.path, "", False, OTHER, what, [])
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
    limit_memory(2 * ground.limits.memory)
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
