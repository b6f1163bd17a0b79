"""One case: files copied, one of them mutated, a command called, and what came judged."""

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tests.fuzz import hashes
from tests.fuzz.kinds import KINDS, Rule, draw_mutator, find
from tests.fuzz.pickles import CANARY
from tests.fuzz.process import Ended, Limits, call
from tests.fuzz.results import result_of, unfinite
from tests.fuzz.rows import Rows
from tests.fuzz.tasks import TASKS, Task

CLEAR = "clear_errors"
UNHARMED = "unharmed"
CHANGED = "changed"
OTHER = "other"
OUT_KIND = "what is written"

Main = Callable[[list[str]], int]
Baseline = dict[tuple[str, str], dict[str, str]]  # results by task and choice


class Case(NamedTuple):
    """What is done."""

    number: int
    kind: str
    task: str
    choice: str
    file: str
    matched: bool  # whether the hashes are made to match, where they can be
    random: Random


class Verdict(NamedTuple):
    """How it was taken."""

    number: int
    kind: str
    task: str
    file: str
    mutation: str
    matched: bool
    verdict: str
    what: str
    remarks: list[str]


# Drawing


def draw(seed: int, number: int, world: Path) -> Case:
    """Case `number` of a seed."""
    random = Random(f"{seed}/{number}")
    name = random.choice([*KINDS, OUT_KIND])
    if name == OUT_KIND:
        task = random.choice([task for task in TASKS if TASKS[task].writes])
        choice = random.choice(TASKS[task].choices)
        return Case(number, name, task, choice, TASKS[task].writes[0], False, random)

    kind = KINDS[name]
    task = random.choice(list(kind.tasks))
    pairs = []
    for choice in TASKS[task].choices:
        tops = TASKS[task].folders(choice)
        pairs += [(choice, file) for file in find(world, kind.pattern) if _top(file) in tops]
    choice, file = random.choice(pairs)
    return Case(number, name, task, choice, file, kind.hashed and random.random() < 0.5, random)


def _top(file: str) -> str:
    return file.partition("/")[0]


# Preparing


def copy_inputs(task: Task, choice: str, world: Path, folder: Path) -> None:
    """Copy what a task reads from the world."""
    for name in task.folders(choice):
        if (world / name).is_dir():
            shutil.copytree(world / name, folder / name, symlinks=True)
        else:
            shutil.copy2(world / name, folder / name)


def mutate(case: Case, folder: Path) -> tuple[str, bool]:
    """Mutate the case's file; what was done, and whether hashes were made to match."""
    path = folder / case.file
    if case.kind == OUT_KIND:
        return mutate_out(path, folder, case.random), False
    mutator = draw_mutator(KINDS[case.kind], case.random)
    try:
        done = mutator(path, case.random)
    except UnicodeEncodeError as error:
        raise RuntimeError(f"{case.file}: {error}") from error
    matched = case.matched and hashes.match(path)
    return f"{mutator.__name__.removeprefix('mutate_')}: {done}", matched


def mutate_out(path: Path, folder: Path, random: Random) -> str:
    """Put something where a command writes."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    outside = folder.parent / "outside"
    entries: dict[str, Callable[[], Any]] = {
        "a folder of somebody's": lambda: shutil.copytree(outside, path),
        "a file of somebody's": lambda: path.write_text("somebody's\n"),
        "a pipe": lambda: os.mkfifo(path),
        "a link to /dev/null": lambda: path.symlink_to("/dev/null"),
        "a link to a file outside": lambda: path.symlink_to(outside / "victim.json"),
        "a link to a folder outside": lambda: path.symlink_to(outside),
        "a dangling link": lambda: path.symlink_to(outside / "nowhere"),
        "a link to itself": lambda: path.symlink_to(path.name),
    }
    done = random.choice(list(entries))
    entries[done]()
    return done


# Running


def run_case(
    case: Case, world: Path, folder: Path, main: Main, limits: Limits, baseline: Baseline
) -> Verdict:
    """Prepare a case in `folder`/case, call the command, judge."""
    task = TASKS[case.task]
    inner = folder / "case"
    inner.mkdir(parents=True)
    _write_outside(folder / "outside")
    copy_inputs(task, case.choice, world, inner)
    mutation, matched = mutate(case, inner)
    before = _stamps(inner)
    rows = Rows(inner / case.file)
    outside = _contents(folder / "outside")

    ended = call(lambda: _in_folder(inner, main, task.call(case.choice)), folder / "said", limits)
    after = Surroundings(
        canary=(inner / CANARY).exists() or _wrote(inner / "target" / CANARY),
        outside=_contents(folder / "outside") != outside,
        left=_left(inner, before),
        written=_written(inner, before, task),
        somebody=_somebody_gone(inner / case.file, mutation),
    )
    verdict, what = judge(case, task, ended, after)
    if not verdict:
        verdict, what = _judge_result(
            case._replace(matched=matched), mutation, ended, world, inner, main, limits, baseline, rows
        )
    return Verdict(
        case.number,
        case.kind,
        case.task,
        case.file,
        mutation,
        matched,
        verdict,
        what,
        _remarks(case, ended) if verdict == CLEAR else [],
    )


def _in_folder(folder: Path, main: Main, arguments: list[str]) -> int:
    os.chdir(folder)
    return main(arguments)


class Surroundings(NamedTuple):
    """What a call did besides its result."""

    canary: bool  # code of a file ran
    outside: bool  # files outside the folder changed
    left: list[str]  # half-written files
    written: list[str]  # inputs that changed
    somebody: bool  # a folder of somebody else's was replaced


def judge(case: Case, task: Task, ended: Ended, after: Surroundings) -> tuple[str, str]:
    """The verdict and its reason; "" if it is the result that decides."""
    said = f"{ended.out}\n{ended.err}"
    problems = {
        "code of the file ran": after.canary,
        f"hang: {ended.hang}": bool(ended.hang),
        "files outside the folder changed": after.outside,
        "a folder of somebody else's was replaced": after.somebody,
        f"traceback: {_last_line(ended.err)}": "Traceback (most recent call last)" in said,
        f"exit code {ended.code}: {_last_line(ended.err)}": ended.code not in (0, 2),
        f"left: {', '.join(after.left)}": bool(after.left),
        f"inputs were written: {', '.join(after.written)}": bool(after.written),
        "a process was left": ended.children,
        "control characters were printed": _has_control(said),
    }
    for problem, found in problems.items():
        if found:
            return OTHER, problem
    if ended.code == 0:
        return "", ""

    lines = own_lines(case, ended)
    if len(lines) != 1:
        return OTHER, f"{len(lines)} lines of its own on stderr: {ended.err[-300:]!r}"
    return CLEAR, lines[0]


def own_lines(case: Case, ended: Ended) -> list[str]:
    """Lines on stderr that begin with the program's name."""
    command = TASKS[case.task].arguments[0]
    return [line for line in ended.err.split("\n") if line.startswith(f"eagle3fn {command}: ")]


def _judge_result(
    case: Case,
    mutation: str,
    ended: Ended,
    world: Path,
    inner: Path,
    main: Main,
    limits: Limits,
    baseline: Baseline,
    rows: Rows,
) -> tuple[str, str]:
    """A call that ended well: is its result the same, and if not, may it be another one?"""
    task = TASKS[case.task]
    bad = unfinite(inner, task.writes)
    if bad:
        return OTHER, f"the result is not finite: {bad}"

    found = result_with_text(task, ended, inner)
    expected = baseline[case.task, case.choice]
    if case.kind == OUT_KIND:  # files of somebody's may stay
        found = {name: digest for name, digest in found.items() if name in expected}
    if case.kind == "sidecar":  # what it says of itself is not a result
        found = _without(found, Path(case.file).name)
        expected = _without(expected, Path(case.file).name)
    same = found == expected
    rule = Rule.MAY if case.kind == OUT_KIND else KINDS[case.kind].tasks[case.task]
    if rule is Rule.FRESH:
        fresh = _fresh(case, inner, main, limits)
        if fresh is not None and fresh != found:
            names = [name for name in fresh | found if fresh.get(name) != found.get(name)]
            return OTHER, f"a call that begins anew gives another result: {', '.join(names)}"
    if same:
        return UNHARMED, ""

    names = sorted(
        name for name in found | expected if found.get(name) != expected.get(name)
    )
    other = f"another result: {', '.join(names[:5])}"
    if case.kind == OUT_KIND:
        return OTHER, other
    if rule is Rule.NEVER and not case.matched:
        return OTHER, f"silently {other}"
    if rule is Rule.SAID and rows.lost() and Path(case.file).name not in ended.out + ended.err:
        return OTHER, f"rows are lost silently: {rows.lost()}"
    return CHANGED, other


_ANEW = {
    "extract-on": ("--out", "features", "made"),
    "evaluate-plain": ("--plain", "plain.json", "other.json"),
}
"""How a task that goes on is made to begin anew: an option's value is replaced."""


def _fresh(case: Case, inner: Path, main: Main, limits: Limits) -> dict[str, str] | None:
    """The result of the same call that finds nothing to go on with; None if it fails."""
    task = TASKS[case.task]
    option, _, new = _ANEW[case.task]
    arguments = task.call(case.choice)
    arguments[arguments.index(option) + 1] = new
    ended = call(
        lambda: _in_folder(inner, main, arguments), inner.parent / "anew", limits
    )
    if ended.code:
        return {"": f"exit code {ended.code}"}
    writes = (new,) if option == "--out" else task.writes
    return result_of(inner, writes)


def _without(found: dict[str, str], name: str) -> dict[str, str]:
    return {key: digest for key, digest in found.items() if key != name}


def result_with_text(task: Task, ended: Ended, inner: Path) -> dict[str, str]:
    """A call's result, with what it printed where that belongs to it."""
    found = result_of(inner, task.writes)
    if task.printed and not task.writes:
        found["stdout"] = hashlib.sha256(ended.out.encode()).hexdigest()[:16]
    return found


# Around the call


def _write_outside(folder: Path) -> None:
    """Files of somebody else, next to the case's folder."""
    folder.mkdir()
    (folder / "victim.json").write_text('{"victim": true}\n')
    (folder / "config.json").write_text("{}\n")


def _contents(folder: Path) -> dict[str, str]:
    """What is in a folder, and under which names: links and their targets' texts too."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = path.read_bytes().hex() if path.is_file() else "folder"
    return found


def _stamps(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for root, folders, files in os.walk(folder):
        for name in files + folders:
            path = os.path.join(root, name)
            stat = os.lstat(path)
            size = () if name in folders else (stat.st_size, stat.st_mtime_ns)
            found[os.path.relpath(path, folder)] = (stat.st_ino, *size)
    return found


def _left(folder: Path, before: dict[str, tuple[int, ...]]) -> list[str]:
    """New names of files that are being written."""
    new = _stamps(folder).keys() - before.keys()
    return sorted(name for name in new if name.endswith((".tmp", ".old")))


def _written(folder: Path, before: dict[str, tuple[int, ...]], task: Task) -> list[str]:
    """What was there, lies outside what the task writes, and is another file now."""
    after = _stamps(folder)
    own = (*task.writes, "run/report.json", "run/curves.png")
    found = []
    for name, stamp in before.items():
        if after.get(name) != stamp and not name.startswith(own) and name != "plain.json":
            found.append(name)
    return found


def _somebody_gone(path: Path, mutation: str) -> bool:
    if mutation == "a folder of somebody's":
        return not (path / "victim.json").is_file()
    return False


def _wrote(path: Path) -> bool:
    return path.exists()


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def _has_control(text: str) -> bool:
    """Whether a text has escape codes, but for a library's colours, or other control characters."""
    text = _COLOUR.sub("", text)
    return any(ord(letter) < 32 and letter not in "\n\t\r" or letter == "\x7f" for letter in text)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


_LONG = 1000


def _remarks(case: Case, ended: Ended) -> list[str]:
    """What could be better about a clear error: unnamed file, other lines, a long line."""
    (line,) = own_lines(case, ended)
    remarks = []
    path = Path(case.file)
    names = {path.name, path.parent.name, _top(case.file), case.choice} - {"", "."}
    if not any(name in line for name in names):
        remarks.append("unnamed")
    if ended.err.strip() != line.strip():
        remarks.append("noise")
    if len(line) > _LONG:
        remarks.append("long")
    return remarks
