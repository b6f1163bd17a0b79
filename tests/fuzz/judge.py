"""The verdict on a call."""

import json
import re
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.ground import Ground
from tests.fuzz.kinds import Rule
from tests.fuzz.process import Ended
from tests.fuzz.results import Result, result_of, unfinite
from tests.fuzz.rows import Rows
from tests.fuzz.surroundings import Changes
from tests.fuzz.tasks import TASKS

CLEAR = "clear_errors"
UNHARMED = "unharmed"
CHANGED = "changed"
OTHER = "other"
VERDICTS = (CLEAR, UNHARMED, CHANGED, OTHER)

_TRACEBACK = "Traceback (most recent call last)"
_LONG = 1000  # letters of a line that nobody reads to its end
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Judged(NamedTuple):
    """What a call was given."""

    task: str
    choice: str
    paths: list[str]  # the mutated files
    rule: Rule
    is_own_result: bool  # the mutated file is among what is compared, and says nothing there
    rows: Rows


def judge(
    given: Judged, ended: Ended, after: Changes, inner: Path, ground: Ground
) -> tuple[str, str]:
    """The verdict and its reason."""
    problem = _problem(ended, after)
    if problem:
        return OTHER, problem
    if ended.code == 0:
        return _judge_result(given, ended, inner, ground)

    lines = own_lines(given.task, ended)
    if len(lines) != 1:
        return OTHER, f"{len(lines)} lines of its own on stderr: {ended.err[-300:]!r}"
    return CLEAR, lines[0]


def _problem(ended: Ended, after: Changes) -> str:
    """What no call may do, whatever was mutated; "" if nothing of it happened."""
    said = f"{ended.out}\n{ended.err}"
    problems = {
        "code of the file ran": after.canary,
        f"hang: {ended.hang}": bool(ended.hang),
        "files outside the folder changed": after.outside,
        "a folder of somebody else's was replaced": after.somebody,
        f"traceback: {_last_line(ended.err)}": _TRACEBACK in said,
        f"exit code {ended.code}: {_last_line(ended.err)}": ended.code not in (0, 2),
        f"left: {', '.join(after.left)}": bool(after.left),
        f"inputs were written: {', '.join(after.written)}": bool(after.written),
        "a process was left": ended.children,
        "control characters were printed": _has_control(said),
    }
    return next((problem for problem, found in problems.items() if found), "")


def _judge_result(given: Judged, ended: Ended, inner: Path, ground: Ground) -> tuple[str, str]:
    """A call that ended well: is its result the same, and if not, may it be another one?"""
    task = TASKS[given.task]
    bad = unfinite(inner, task.writes, given.paths)
    if bad:
        return OTHER, f"the result is not finite: {bad}"

    found = result_of(task, inner, ended.out)
    expected = ground.unmutated(given.task, given.choice)
    if given.rule is Rule.FRESH:
        anew = _result_anew(given, inner, ground)
        if anew != found:
            return OTHER, f"a call that begins anew gives another result: {_differing(anew, found)}"

    # Somebody's own files stay where a command writes; a sidecar lies among the results.
    if given.rule is Rule.KEPT:
        found = {name: digest for name, digest in found.items() if name in expected}
    if given.is_own_result:
        found, expected = (_without(one, Path(given.paths[0]).name) for one in (found, expected))
    if found == expected:
        return UNHARMED, ""

    other = f"another result: {_differing(found, expected)}"
    if given.rule in (Rule.NEVER, Rule.KEPT):
        return OTHER, f"silently {other}"
    if given.rule is Rule.SAID:
        said = any(Path(path).name in ended.out + ended.err for path in given.paths)
        if given.rows.lost() and not said:
            return OTHER, f"{given.rows.lost()} rows are lost silently"
    return CHANGED, other


_ANEW = {"extract-on": ("--out", "made"), "evaluate-plain": ("--plain", "other.json")}
"""By which option's value a task that goes on begins anew."""


def _result_anew(given: Judged, inner: Path, ground: Ground) -> Result:
    """The result of the same call that finds nothing to go on with."""
    task = TASKS[given.task]
    option, value = _ANEW[given.task]
    arguments = task.call(given.choice)
    arguments[arguments.index(option) + 1] = value
    ended = ground.call(inner, arguments, inner.with_name("anew"))
    if ended.code:
        return {"exit code": str(ended.code)}
    if option == "--out":
        task = task._replace(writes=(value,))
    return result_of(task, inner, ended.out)


def _differing(one: Result, other: Result) -> str:
    names = sorted(name for name in one | other if one.get(name) != other.get(name))
    return ", ".join(names[:5])


def _without(found: Result, name: str) -> Result:
    return {key: digest for key, digest in found.items() if key != name}


def own_lines(task: str, ended: Ended) -> list[str]:
    """Lines on stderr that begin with the program's name; of `--json` the errors."""
    start = f"eagle3fn {TASKS[task].name}: "
    lines = ended.err.split("\n")
    if "--json" in TASKS[task].command.split():
        lines = [json.loads(line)["error"] for line in lines if line.startswith('{"error": ')]
    return [line for line in lines if line.startswith(start)]


def _has_control(text: str) -> bool:
    """Whether a text has escape codes, but for a library's colours, or other control characters."""
    text = _COLOUR.sub("", text)
    return any((ord(letter) < 32 and letter not in "\n\t\r") or letter == "\x7f" for letter in text)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def remarks(given: Judged, ended: Ended) -> list[str]:
    """What could be better about a clear error."""
    (line,) = own_lines(given.task, ended)
    names = {given.choice}
    for path in map(Path, given.paths):
        names |= {path.name, path.parent.name, path.parts[0]}

    found = []
    if not any(name in line for name in names - {"", "."}):
        found.append("unnamed")
    if ended.err.strip() != line.strip():
        found.append("noise")
    if len(line) > _LONG:
        found.append("long")
    return found
