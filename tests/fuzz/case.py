"""One case: files copied, one mutated (seldom two), a command called, and what came judged."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tests.fuzz import hashes, surroundings
from tests.fuzz.ground import Ground, copy_inputs
from tests.fuzz.judge import CLEAR, Judged, judge, remarks
from tests.fuzz.kinds import KINDS, Rule, draw_mutator, find
from tests.fuzz.rows import Rows
from tests.fuzz.tasks import TASKS
from tests.fuzz.texts import NO_FILE

OUT_KIND = "what is written"
"""Not a file that is read: something lies where a command writes."""


class File(NamedTuple):
    """A file to mutate."""

    kind: str
    path: str  # in the case's folder
    match: bool  # whether the hashes are made to match, where they can be


class Case(NamedTuple):
    """What is done."""

    number: int
    task: str
    choice: str
    files: list[File]
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
        return Case(number, task, choice, [File(name, TASKS[task].writes[0], False)], random)

    task = random.choice(list(KINDS[name].tasks))
    pairs = []
    for choice in TASKS[task].choices:
        pairs += [(choice, path) for path in _paths(name, task, choice, world)]
    choice, path = random.choice(pairs)
    files = [_file(name, path, random)]

    # Seldom a second one, of another kind that the task reads.
    if random.random() < 0.1:
        others = []
        for other, kind in KINDS.items():
            if task in kind.tasks and other != name:
                others += [(other, path) for path in _paths(other, task, choice, world)]
        if others:
            other, path = random.choice(others)
            files.append(_file(other, path, random))
    return Case(number, task, choice, files, random)


def _paths(kind: str, task: str, choice: str, world: Path) -> list[str]:
    """The files of a kind among those that a task reads."""
    tops = TASKS[task].folders(choice)
    return [path for path in find(world, KINDS[kind].pattern) if path.partition("/")[0] in tops]


def _file(kind: str, path: str, random: Random) -> File:
    return File(kind, path, KINDS[kind].hashed and random.random() < 0.5)


# Mutating


def mutate(case: Case, inner: Path) -> tuple[str, bool]:
    """Mutate the case's files; what was done, and whether hashes were made to match."""
    done = []
    matched = False
    for file in case.files:
        path = inner / file.path
        if file.kind == OUT_KIND:
            done.append(mutate_out(path, case.random))
            continue
        mutator = draw_mutator(KINDS[file.kind], case.random)
        text = mutator(path, case.random)
        done.append(f"{mutator.__name__.removeprefix('mutate_')}: {text}")
        matched |= file.match and hashes.match(path)
    return "; and ".join(done), matched


def mutate_out(path: Path, random: Random) -> str:
    """Put something where a command writes."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    outside = next(parent for parent in path.parents if parent.name == "case").parent / "outside"
    entries: dict[str, Callable[[], Any]] = {
        surroundings.SOMEBODYS: lambda: shutil.copytree(outside, path),
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


def run_case(case: Case, folder: Path, ground: Ground) -> Verdict:
    """Prepare a case in `folder`/case, call the command, judge."""
    task = TASKS[case.task]
    inner = folder / "case"
    inner.mkdir(parents=True)
    surroundings.write_outside(folder / "outside")
    copy_inputs(task, case.choice, ground.world, inner)
    mutation, matched = mutate(case, inner)
    first = case.files[0]
    listed = [file.path for file in case.files if file.path.endswith(".jsonl")]
    rows = Rows(inner / (listed or [first.path])[0])
    before = surroundings.take(folder)

    ended = ground.call(inner, task.call(case.choice), folder / "said")
    after = surroundings.compare(before, folder, task, inner / first.path, mutation)
    judged = Judged(
        case.task,
        case.choice,
        [file.path for file in case.files],
        _rule(case, matched, mutation),
        case.files[0].kind == "sidecar",
        rows,
    )
    verdict, what = judge(judged, ended, after, inner, ground)
    found = remarks(judged, ended) if verdict == CLEAR else []
    return Verdict(
        case.number, first.kind, case.task, first.path, mutation, matched, verdict, what, found
    )


def _rule(case: Case, matched: bool, mutation: str) -> Rule:
    """What another result would be; of two files the looser rule counts.

    A folder, a pipe or a device in a file's place is no file that says something, and not as if
    there were none.
    """
    if any(f"entry: {name}" == mutation for name in NO_FILE):
        return Rule.NEVER
    rules = []
    for file in case.files:
        rules.append(Rule.KEPT if file.kind == OUT_KIND else KINDS[file.kind].tasks[case.task])
    if matched:
        rules.append(Rule.MAY)
    if len(rules) > 1 and Rule.FRESH in rules and Rule.MAY not in rules:
        return Rule.MAY
    return min(rules, key=list(Rule).index)
