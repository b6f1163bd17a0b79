"""The mutator's verdicts, on programs that do one wrong thing: each is `other`."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.fuzz import surroundings
from tests.fuzz.case import Case, File, Verdict, run_case
from tests.fuzz.ground import Ground
from tests.fuzz.judge import CHANGED, CLEAR, OTHER, UNHARMED
from tests.fuzz.kinds import KINDS, TOML, Rule
from tests.fuzz.process import Limits
from tests.fuzz.tasks import TASKS
from tests.fuzz.trees import VALUES, Raw, Twice, dump, mutate_tree

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")

CONTENT = b'{"a": 1}\n' * 20
"""Of every file here."""

Program = Callable[[list[str]], int]


def well(arguments: list[str]) -> int:
    """Reads no file: the result is always the same."""
    Path("made.json").write_text('{"lossless": true}')
    return 0


def clear(arguments: list[str]) -> int:
    print("eagle3fn evaluate: plain.json: damaged; delete it", file=sys.stderr)
    return 2


def take(tmp_path: Path, program: Program, kind: str = "kept plain answers") -> Verdict:
    """What one case of `evaluate --plain` comes to, where the program does this on a mutated file.

    On files that are as they were it does well.
    """
    task = "evaluate-plain"
    path = KINDS[kind].pattern
    world = tmp_path / "world"
    for name in (*TASKS[task].folders(""), path):
        file = world / name
        if not file.suffix:
            file.mkdir(parents=True)
        else:
            file.write_bytes(CONTENT)

    def main(arguments: list[str]) -> int:
        mutated = Path(path).read_bytes() != CONTENT
        return (program if mutated else well)(arguments)

    ground = Ground(tmp_path, world, main, Limits(cpu_s=1, idle_s=0.7, wall_s=10))
    case = Case(7, task, "", [File(kind, path, match=False)], Random(1))
    return run_case(case, tmp_path / "case-7", ground)


def traceback(arguments: list[str]) -> int:
    raise KeyError("planted")


def spins(arguments: list[str]) -> int:
    while True:
        pass


def waits(arguments: list[str]) -> int:
    os.mkfifo("pipe")
    return len(Path("pipe").read_text())


def other_result(arguments: list[str]) -> int:
    Path("made.json").write_text('{"lossless": false}')
    return 0


def runs_code(arguments: list[str]) -> int:
    Path("CANARY").mkdir()
    return clear(arguments)


def leaves_a_part(arguments: list[str]) -> int:
    Path(".made.json.x.tmp").touch()
    return clear(arguments)


def writes_outside(arguments: list[str]) -> int:
    Path("../outside/victim.json").write_text("mine")
    return clear(arguments)


def writes_an_input(arguments: list[str]) -> int:
    Path("prompts.jsonl").write_text("mine")
    return clear(arguments)


def two_lines(arguments: list[str]) -> int:
    clear(arguments)
    return clear(arguments)


def no_line(arguments: list[str]) -> int:
    return 2


def another_code(arguments: list[str]) -> int:
    clear(arguments)
    return 1


def escape_codes(arguments: list[str]) -> int:
    print("eagle3fn evaluate: row \x1b[2J: not JSON", file=sys.stderr)
    return 2


def leaves_a_process(arguments: list[str]) -> int:
    subprocess.Popen(["sleep", "60"])
    return clear(arguments)


def killed(arguments: list[str]) -> int:
    os.kill(os.getpid(), signal.SIGTERM)
    return 0


PLANTED = {
    "traceback: KeyError": traceback,
    "hang: 1 s of CPU time": spins,
    "hang: waited": waits,
    "silently another result: made.json": other_result,
    "code of the file ran": runs_code,
    "left: .made.json.x.tmp": leaves_a_part,
    "files outside": writes_outside,
    "inputs were written: prompts.jsonl": writes_an_input,
    "2 lines": two_lines,
    "0 lines": no_line,
    "exit code 1": another_code,
    "control characters": escape_codes,
    "a process was left": leaves_a_process,
    "exit code -15": killed,
}


@pytest.mark.parametrize("what", PLANTED)
def test_planted_fault_is_other(tmp_path, what):
    found = take(tmp_path, PLANTED[what])
    assert (found.verdict, what in found.what) == (OTHER, True), found


def test_hang_ends_with_all_its_processes(tmp_path):
    def work(arguments: list[str]) -> int:
        Path(tmp_path / "pid").write_text(str(subprocess.Popen(["sleep", "60"]).pid))
        time.sleep(60)
        return 0

    assert take(tmp_path, work).verdict == OTHER
    pid = (tmp_path / "pid").read_text()
    stat = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 10
    while stat.exists() and stat.read_text().rpartition(") ")[2][0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_right_answers_are_not_other(tmp_path):
    assert take(tmp_path / "clear", clear).verdict == CLEAR
    assert take(tmp_path / "same", well).verdict == UNHARMED
    may = take(tmp_path / "may", other_result, kind="untrained draft")
    assert may.verdict == CHANGED, may


def test_clear_error_that_names_no_file_is_a_remark(tmp_path):
    def unnamed(arguments: list[str]) -> int:
        print("noise\neagle3fn evaluate: something is wrong", file=sys.stderr)
        return 2

    assert take(tmp_path, clear).remarks == []
    assert take(tmp_path / "unnamed", unnamed).remarks == ["unnamed", "noise"]


def test_result_that_is_not_finite_is_other(tmp_path):
    import torch
    from safetensors.torch import save_file

    from tests.fuzz.results import unfinite

    (tmp_path / "made").mkdir()
    save_file(
        {"a": torch.ones(2), "b": torch.tensor([1, torch.nan])}, tmp_path / "made/x.safetensors"
    )
    assert unfinite(tmp_path, ("made",)) == "made/x.safetensors: b"
    assert unfinite(tmp_path, ("made",), ["made/x.safetensors"]) == ""
    save_file({"a": torch.ones(2)}, tmp_path / "made/x.safetensors")
    assert unfinite(tmp_path, ("made",)) == ""


def test_folder_of_somebodys_that_is_gone_is_seen(tmp_path):
    inner = tmp_path / "case"
    surroundings.write_outside(tmp_path / "outside")
    surroundings.write_outside(inner)
    before = surroundings.take(tmp_path)
    task = TASKS["extract"]
    args = (before, tmp_path, task, inner, surroundings.SOMEBODYS)
    assert not surroundings.compare(*args).somebody
    (inner / "victim.json").unlink()
    assert surroundings.compare(*args).somebody


# What is mutated


def test_every_file_of_the_tables_is_read_by_its_tasks():
    for name, kind in KINDS.items():
        top = kind.pattern.partition("/")[0]
        for task in kind.tasks:
            read = [
                folder for choice in TASKS[task].choices for folder in TASKS[task].folders(choice)
            ]
            assert any(Path(folder).match(top) for folder in read), (name, task)


@pytest.mark.parametrize("seed", range(40))
def test_mutated_tree_is_another_one_and_can_be_written(seed):
    tree = {"a": [1, {"b": "text"}], "c": None, "d": {"e": 1.5, "f": True}}
    text = json.dumps(tree)
    changed, done = mutate_tree(json.loads(text), Random(seed))
    assert done
    assert dump(changed) != text or "exchanged" in done


def test_dump_writes_doubled_keys_and_raw_values():
    assert dump({"a": 1, Twice("a"): Raw("NaN")}) == '{"a": 1, "a": NaN}'
    assert len(dump(VALUES["5,000 digits"])) == 5000


def test_settings_files_have_a_rule_of_their_own():
    assert KINDS["config.toml"].mutators is TOML
    assert KINDS["meta.json"].hashed and KINDS["meta.json"].tasks == {"resume": Rule.NEVER}
