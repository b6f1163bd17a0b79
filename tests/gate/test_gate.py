"""The CUDA gate: its parts, tests and claims; what a certificate contains; what does not pass."""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from eagle3fn.specforge.oracle import COMMIT_FILES
from eagle3fn.testing import gate_part
from eagle3fn.testing.gate_part import Report
from tests import devices
from tests.gate import device_tests
from tests.gate import parity as cuda_gate
from tests.gate import process as gate_process
from tests.gate import run as gate
from tests.gate.check import gate_parser
from tests.gate.parity import fold, parse, run_claim
from tests.gate.run import Part
from tests.specforge import cuda_claims
from tests.specforge.certificate import (
    CLAIMS,
    NOT_SEEN,
    PARITY,
    UNVERIFIED,
    failures,
    rows,
    seen,
    sources,
)

ROOT = Path(__file__).resolve().parents[2]
ROW = {
    "case": "x",
    "nontrivial": True,
    "decided": True,
    "old_kernel": {},
    "own_kernel": {},
    "reordering_seen": True,
}
ORACLE = {"oracle": {"kind": "commit", "sha256": "0", "hashes": dict(COMMIT_FILES)}}

# Small programs in place of a part; the last of their options is the result's file.
OUT = "import json, os, signal, sys, time\nout = sys.argv[-1]\n"
IGNORE = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
GOOD = "open(out, 'w').write(json.dumps({'faults': [], 'left_out': ['more'], 'number': 7}))\n"
CHILD = f"child = os.fork()\nif not child:\n    {IGNORE}    time.sleep(60)\n"
FAULT = "{'faults': [{'where': 'a', 'traceback': 'b\\nE: c'}]}"
LOUD = "for _ in range(3000): sys.stdout.write('x' * 100_000); sys.stderr.write('y' * 1000)"
PROGRAMS = {
    "raises": GOOD + "raise ValueError('planted')",
    "dies": GOOD + "os.kill(os.getpid(), signal.SIGSEGV)",
    "hangs": GOOD + "time.sleep(60)",
    "ignores": IGNORE + GOOD + "time.sleep(60)",
    "forks": CHILD + "open(out, 'w').write(json.dumps({'faults': [], 'child': child}))",
    "writes no JSON": "open(out, 'w').write('{')",
    "writes a list": "open(out, 'w').write('[]')",
    "writes nothing": "",
    "is loud": GOOD + LOUD,
    "has a fault": f"open(out, 'w').write(json.dumps({FAULT}))",
}


def part(program: str, share: float = 1.0) -> Part:
    return Part(share, ("-c", OUT + program))


@pytest.fixture(autouse=True)
def short_graces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "GRACE", 0.3)
    monkeypatch.setattr(gate, "SECONDS_TO_EXIT", 0.3)


class GateRun(NamedTuple):
    """What a call of the gate came to."""

    code: int
    result: dict[str, Any]
    seconds: float


def run_gate(tmp_path: Path, seconds: float, parts: dict[str, Part]) -> GateRun:
    """Run the gate with these parts."""
    words = [
        "all",
        "--device=cpu",
        f"--minutes={seconds / 60}",
        f"--out={tmp_path / 'gate.json'}",
        "--revision=abc",
    ]
    begin = time.monotonic()
    code = gate.run_gate(gate_parser().parse_args(words), parts)
    result = json.loads((tmp_path / "gate.json").read_text())
    return GateRun(code, result, time.monotonic() - begin)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_planted_fault_leaves_other_parts_intact(tmp_path: Path, capsys) -> None:
    shares = {"hangs": 0.5, "ignores": 0.5}
    parts = {name: part(program, shares.get(name, 3.0)) for name, program in PROGRAMS.items()}
    code, result, took = run_gate(tmp_path, 12, parts | {"good": part(GOOD, 3.0)})
    found = result["parts"]
    assert code == 1 and result["complete"] and took < 12

    good = found["good"]
    assert good["state"] == "passed" and good["exit_code"] == 0 and good["result"]["number"] == 7
    assert good.keys() >= {"seconds", "limit", "stderr"}
    assert {name: one["state"] for name, one in found.items() if name != "good"} == {
        "raises": "failed",
        "dies": "died",
        "hangs": "out of time",
        "ignores": "out of time",
        "forks": "passed",
        "writes no JSON": "failed",
        "writes a list": "failed",
        "writes nothing": "failed",
        "is loud": "passed",
        "has a fault": "failed",
    }
    assert "ValueError: planted" in found["raises"]["stderr"]
    assert found["raises"]["result"]["number"] == 7
    assert found["dies"]["exit_code"] == -signal.SIGSEGV
    assert found["ignores"]["exit_code"] == -signal.SIGKILL
    assert found["ignores"]["result"]["number"] == 7
    assert not alive(found["forks"]["result"]["child"])
    assert "not JSON" in found["writes no JSON"]["reason"]
    assert "no result" in found["writes nothing"]["reason"]
    assert len(found["is loud"]["stderr"]) == gate.KEPT_OUTPUT

    assert "good: more" in result["left_out"]
    assert "a: E: c" in capsys.readouterr().out
    assert result["kind"].startswith("rehearsal") and result["revision"] == "abc"
    assert rows(tmp_path) == [UNVERIFIED]


def test_time_is_shared_and_parts_without_time_are_listed(tmp_path: Path) -> None:
    parts = {"long": part(PROGRAMS["ignores"], 1.0), "late": part(GOOD, 0.01)}
    code, result, took = run_gate(tmp_path, 0.5, parts)
    assert code == 1 and took < 3
    assert result["parts"].keys() == {"long"} and result["left_out"] == ["late", "long: more"]
    shares = {name: Part(share, ()) for name, share in (("a", 75.0), ("b", 100.0), ("c", 25.0))}
    assert gate.limit_of("a", shares, 100) == 37.5 and gate.limit_of("b", shares, 80) == 64
    assert sum(gate.PARTS[name].share for name in ("smoke", "parity", "bench", "profile")) == 300


def test_a_growing_log_is_cut_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its writer goes on."""
    monkeypatch.setattr(gate, "LARGEST_LOG", 100_000)
    log = tmp_path / "log"
    line = "print('z' * 100_000, flush=True); time.sleep(0.03)"
    program = f"import time\nfor _ in range(40): {line}\nprint('end')"
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=stream, start_new_session=True
        )
    assert gate.ended(process, time.monotonic() + 20, (log,))
    gate.end_group(process)
    assert log.stat().st_size < 2_000_000 and gate.tail(log).endswith("zz\nend\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_gate_that_is_stopped_kills_its_part_and_writes(tmp_path: Path, number: int) -> None:
    """The part's result by then is kept, and the gate's is marked as incomplete."""
    result = "{'faults': [], 'left_out': [], 'pid': os.getpid()}"
    program = f"open(out, 'w').write(json.dumps({result}))\ntime.sleep(60)"

    def stop() -> None:
        time.sleep(1)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop).start()
    code, result, took = run_gate(tmp_path, 100, {"first": part(program), "second": part(GOOD)})
    assert code == 1 and took < 5 and not result["complete"] and result["left_out"] == ["second"]
    assert result["parts"]["first"]["state"] == "died" and not alive(
        result["parts"]["first"]["result"]["pid"]
    )
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_every_part_passed_is_exit_code_0(tmp_path: Path) -> None:
    code, result, _ = run_gate(tmp_path, 20, {"a": part(GOOD), "b": part(PROGRAMS["forks"])})
    assert code == 0 and result["complete"] and result["left_out"] == ["a: more"]
    hashes = sources(every=True)
    assert result["sources"] == hashes and sources().items() < hashes.items()
    assert {"date", "versions", "hardware"} <= result.keys()
    parts = "smoke,parity,bench,profile"
    assert (
        result["command"]
        == f"scripts/cuda_gate.sh all --parts {parts} --minutes 0.333333 --device cpu"
    )


def test_the_script_rehearses_on_the_cpu(tmp_path: Path) -> None:
    """The real script and parts in very little time: the rest is listed, and the gate ends."""
    out = tmp_path / "gate.json"
    words = ["--device", "cpu", "--parts", "smoke,profile", "--minutes", "0.4", "--out", str(out)]
    begin = time.monotonic()
    variables = os.environ | {"PYTHON": sys.executable}
    command = ["scripts/cuda_gate.sh", "all", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    assert time.monotonic() - begin < 24 + 60
    result = json.loads(out.read_text())
    assert result["kind"] == "rehearsal on a CPU, certifies nothing" and result["complete"]
    seen = result["parts"]["smoke"]["result"]
    assert seen["checks"] and all(row["passed"] for row in seen["checks"])
    assert any(name.startswith("smoke: real") for name in result["left_out"])
    assert "profile" in result["parts"] or "profile" in result["left_out"]


# The result of a part.


def test_a_part_records_faults_and_counts_those_beyond_a_limit(tmp_path: Path) -> None:
    report = Report(tmp_path / "part.json", 10)
    for number in range(gate_part.KEPT_FAULTS + 2):
        with report.guarded(f"place {number}"):
            raise ValueError(number)
    assert report.finish() == 1
    seen = json.loads((tmp_path / "part.json").read_text())
    assert len(seen["faults"]) == gate_part.KEPT_FAULTS and seen["more_faults"] == 2
    assert (
        seen["faults"][1]["where"] == "place 1"
        and "ValueError: 1" in seen["faults"][1]["traceback"]
    )


def follow(program: str, tmp_path: Path, seconds: float) -> list[dict[str, Any]]:
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, "-c", program, str(rows)]
    return list(gate_process.follow(command, dict(os.environ), rows, time.monotonic() + seconds))


def test_a_part_counts_its_time_from_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the gate's clock, so that a part's imports count."""
    monkeypatch.setenv(gate_part.BEGAN, str(time.monotonic() - 4))
    assert Report(tmp_path / "x.json", 10).left() == pytest.approx(6, abs=0.5)
    for other in ("soon", str(time.monotonic() + 9), str(time.monotonic() - 1e6), "nan"):
        monkeypatch.setenv(gate_part.BEGAN, other)
        assert Report(tmp_path / "x.json", 10).left() == pytest.approx(10, abs=0.5)
    assert gate.environment("cpu", "")[gate_part.BEGAN]


def test_lines_of_a_process_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_process, "GRACE", 0.1)
    text = '{"a": 1}\nno JSON\n[]\n{"b": 2}\n{"cut'
    program = f"import sys\nopen(sys.argv[1], 'w').write({text!r})\n"
    found = follow(program + "print('printed'); sys.exit(3)", tmp_path, 20)
    assert found == [{"a": 1}, {"b": 2}, {"exit_code": 3, "log": "printed\n"}]
    assert follow(program + "import time; time.sleep(60)", tmp_path, 1)[-1]["exit_code"] is None


# Tests on the device.


def test_modules_that_run_first_exist() -> None:
    modules = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(devices.FIRST) <= modules


def run_tests(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *runs: list[dict[str, Any]]
) -> dict[str, Any]:
    """The part's result when pytest's processes write these rows, one after the other.

    `selected` are the tests that each was called with.
    """
    rows_of_process = iter(runs)
    selected: list[list[str]] = []

    def lines(command: list[str], *_: object) -> Iterator[dict[str, Any]]:
        selected.append(command[command.index("no:cacheprovider") + 1 :])
        yield from next(rows_of_process)

    monkeypatch.setattr(device_tests, "follow", lines)
    report = Report(tmp_path / "part.json", 10)
    device_tests.run_tests(report, "cpu", {}, 10)
    return report.result | {"selected": selected}


def outcome(test: str, what: str, text: str = "") -> dict[str, Any]:
    return {"test": test, "outcome": what, "seconds": 0.1, "text": text}


def test_failures_and_skips_are_faults_and_late_tests_are_left_out(
    monkeypatch, tmp_path: Path
) -> None:
    names = ["a", "b", "c", "d"]
    ends = [
        outcome("a", "passed"),
        outcome("b", "failed", "E: wrong"),
        outcome("c", "skipped", "no oracle"),
    ]
    late = {"test": "d", "outcome": "left out"}
    found = run_tests(
        monkeypatch, tmp_path, [{"collected": names}, *ends, late, {"exit_code": 1, "log": ""}]
    )
    assert [fault["where"] for fault in found["faults"]] == ["failed: b", "skipped: c"]
    counts = {"collected": 4, "passed": 1, "failed": 1, "skipped": 1, "left_out": 1}
    assert found["tests"].items() >= counts.items() and found["left_out"] == ["test d"]


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([{"exit_code": 5, "log": "none"}], "no test ran"),
        (
            [{"collected": ["a"]}, outcome("a", "skipped"), {"exit_code": 0, "log": ""}],
            "no test ran",
        ),
        (
            [{"collected": ["a"]}, outcome("a", "passed"), {"exit_code": 3, "log": "boom"}],
            "exit code 3",
        ),
        (
            [{"collected": ["a"]}, outcome("a", "passed"), {"exit_code": -11, "log": ""}],
            "exit code -11",
        ),
    ],
)
def test_no_test_or_a_broken_run_is_a_fault(
    monkeypatch, tmp_path: Path, rows: list, what: str
) -> None:
    assert what in run_tests(monkeypatch, tmp_path, rows)["faults"][-1]["traceback"]


def test_tests_go_on_in_another_process_after_a_lost_context(monkeypatch, tmp_path: Path) -> None:
    lost = outcome(
        "b",
        "failed",
        "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
    )
    first = [
        {"collected": ["a", "b", "c"]},
        outcome("a", "passed"),
        lost,
        outcome("c", "failed", "CUDA error: same"),
    ]
    end = {"exit_code": 0, "log": ""}
    found = run_tests(
        monkeypatch, tmp_path, first, [{"collected": ["c"]}, outcome("c", "passed"), end]
    )
    assert found["selected"][1] == ["c"]
    assert [fault["where"] for fault in found["faults"]] == ["failed: b"]
    assert found["tests"]["passed"] == 2 and found["tests"]["collected"] == 3
    assert not device_tests.CONTEXT_LOST.search("CUDA error: out of memory")


# Claims.


def made(**change: Any) -> dict[str, Any]:
    """A made-up result of the part: two cases of each claim of parity, one of them changed."""
    options = argparse.Namespace(device="cuda", seed=0)
    result = cuda_gate.first_result(options)
    fold(result, "sdpa", ORACLE)
    for name in PARITY:
        fold(result, name, ROW)
        fold(result, name, ROW | change)
    return json.loads(json.dumps(result))


def test_the_rehearsal_of_a_claim_passes(tmp_path: Path, oracle) -> None:
    out = tmp_path / "parity.json"
    words = [
        "--device",
        "cpu",
        "--seconds",
        "60",
        "--out",
        str(out),
        "--cases",
        "2",
        "--only",
        "sdpa",
    ]
    assert cuda_gate.main(words) == 0, out.read_text()
    seen = json.loads(out.read_text())
    assert seen["oracle"]["sha256"] == oracle.digest and seen["claims"]["sdpa"]["cases"] == 2
    assert "flex_attention" in seen["not_run"]
    assert failures(seen, PARITY) == ["kernel: not run", "flex_attention: not run"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"own_kernel": {"loss": 1}}, "equal_own_kernel in 1 of 2"),
        ({"old_kernel": {"loss": 1}}, "equal_old_kernel in 1 of 2"),
        ({"reordering_seen": False}, "reordering was detected in 1 of 2"),
        ({"nontrivial": False}, "1 of 2 cases are not trivial"),
    ],
)
def test_a_changed_case_fails_its_claim(change: dict[str, Any], message: str) -> None:
    assert failures(made(), PARITY) == []
    found = failures(made(**change), PARITY)
    assert len(found) == 3 and all(message in line for line in found)


def test_nothing_compared_is_a_failure() -> None:
    result = made()
    del result["claims"]["flex_attention"]
    result["claims"]["sdpa"] |= {"cases": 0}
    result["claims"]["kernel"] |= {"undecidable": 2}
    assert [line.split(":")[0] for line in failures(result, PARITY)] == [
        "kernel",
        "sdpa",
        "flex_attention",
    ]
    assert "no oracle: nothing was compared" in failures(result | {"oracle": None}, PARITY)
    fold(result, "sdpa", {"error": "RuntimeError: no"})
    assert "sdpa: RuntimeError: no" in failures(result, PARITY)


def test_an_undecidable_case_is_counted_and_fails_nothing() -> None:
    result = made(decided=False, own_kernel={"loss": 1})
    assert result["claims"]["sdpa"]["undecidable"] == 1 and failures(result, PARITY) == []


def test_a_distance_that_is_not_finite_is_an_error() -> None:
    result = made()
    row = {"case": "x", "nontrivial": True, "ulps": {"loss": 3, "gradients": 5}}
    fold(result, "dynamo", row)
    assert failures(result, ("dynamo",)) == []
    fold(result, "dynamo", row | {"ulps": {"loss": 3, "gradients": -1}})
    assert failures(result, ("dynamo",)) == ["dynamo: not finite, so no distance: x"]


def options_of(tmp_path: Path, *words: str) -> argparse.Namespace:
    return parse(["--device", "cpu", "--seconds", "10", "--out", str(tmp_path / "x.json"), *words])


def run_claims(
    monkeypatch, tmp_path: Path, *runs: list[dict[str, Any]]
) -> tuple[Report, list[list[str]]]:
    """The report after a claim's processes wrote these rows, and the processes' commands."""
    rows_of_process = iter(runs)
    called: list[list[str]] = []

    def lines(command: list[str], *_: object) -> Iterator[dict[str, Any]]:
        called.append(command)
        yield from next(rows_of_process)

    monkeypatch.setattr(cuda_gate, "follow", lines)
    report = Report(tmp_path / "x.json", 10, cuda_gate.first_result(options_of(tmp_path)))
    run_claim("sdpa", options_of(tmp_path, "--seed=-3"), report, 10)
    return report, called


def test_every_fault_of_a_claim_is_recorded_and_cases_go_on(monkeypatch, tmp_path: Path) -> None:
    wrong = {"raised": "Case(seed=5)", "traceback": "Traceback …\nRuntimeError: planted"}
    end = {"exit_code": 0, "log": ""}
    report, called = run_claims(monkeypatch, tmp_path, [ORACLE, ROW, wrong, ROW, wrong, end])
    claim = report.result["claims"]["sdpa"]
    assert claim["cases"] == 2 and claim["raised"] == 2 and "--seed=-3" in called[0]
    assert [fault["where"] for fault in report.result["faults"]] == ["sdpa: Case(seed=5)"] * 2
    assert failures(report.result, ("sdpa",)) == ["sdpa: 2 cases ended with an exception"]


def test_a_claim_goes_on_in_another_process_after_a_lost_context(
    monkeypatch, tmp_path: Path
) -> None:
    wrong, end = {"raised": "x", "traceback": "CUDA error"}, {"exit_code": 0, "log": ""}
    report, called = run_claims(
        monkeypatch, tmp_path, [ORACLE, ROW, wrong, {"lost": 1}, end], [ORACLE, ROW, end]
    )
    assert "--first=2" in called[1] and report.result["claims"]["sdpa"]["cases"] == 2
    lost = [[ORACLE, wrong, {"lost": number}, end] for number in range(9)]
    assert len(run_claims(monkeypatch, tmp_path, *lost)[1]) == 1 + cuda_gate.RESTARTS


def test_a_process_that_dies_is_an_error(monkeypatch, tmp_path: Path) -> None:
    report, _ = run_claims(
        monkeypatch, tmp_path, [ORACLE, ROW, {"exit_code": -11, "log": "Segmentation fault"}]
    )
    assert "exit code -11: Segmentation fault" in failures(report.result, ("sdpa",))[0]


def test_a_case_that_raises_does_not_end_its_claim(monkeypatch, tmp_path: Path) -> None:
    def raises() -> dict[str, Any]:
        raise RuntimeError("planted")

    options = cuda_claims.parse(
        ["--claim=sdpa", "--device=cpu", "--seconds=9", "--rows=x", "--first=1", "--stop=4"]
    )
    cases = [
        cuda_claims.Named(str(i), raises if i == 2 else lambda i=i: {"case": i}) for i in range(9)
    ]
    written: list[dict[str, Any]] = []
    cuda_claims.run(iter(cases), options, time.monotonic() + 9, written.append)
    assert [row.get("case", row.get("raised")) for row in written] == [1, "2", 3]
    assert "RuntimeError: planted" in written[1]["traceback"]
    monkeypatch.setattr(cuda_claims, "context_lost", lambda device: True)
    written.clear()
    cuda_claims.run(iter(cases), options, time.monotonic() + 9, written.append)
    assert written[-1] == {"lost": 2}
    late = argparse.Namespace(first=0, stop=9, device="cpu")
    cuda_claims.run(iter(cases), late, time.monotonic() - 1, written.append)
    assert written[-1] == {"case": 0}


def test_jobs_share_the_time_or_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other each has its share of what is left; at once each has all of it.

    A job that raises leaves the others alone.
    """
    got: dict[str, float] = {}

    def fails(seconds: float) -> None:
        got["tests"] = seconds
        raise RuntimeError("planted")

    jobs = {"tests": fails} | {
        name: (lambda seconds, name=name: got.update({name: seconds})) for name in CLAIMS
    }
    assert [
        cuda_gate.share_of(left) for left in (["tests"], ["tests", "sdpa"], ["sdpa", "dynamo"])
    ] == [1, 0.6, 0.5]
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert cuda_gate.jobs_at_once() == 1
    report = Report(tmp_path / "x.json", 100)
    cuda_gate.run_jobs(jobs, report, 1)
    assert got["tests"] == pytest.approx(60, abs=1) and got["kernel"] == pytest.approx(25, abs=1)
    assert (
        got["dynamo"] == pytest.approx(100, abs=1)
        and "planted" in report.result["faults"][0]["traceback"]
    )
    cuda_gate.run_jobs(jobs, report, 5)
    assert all(seconds == pytest.approx(100, abs=1) for seconds in got.values())
    report.end = time.monotonic()
    cuda_gate.run_jobs(jobs, report, 1)
    assert report.result["left_out"] == list(jobs)


@pytest.mark.parametrize(
    "words", [["--seconds", "0"], ["--seconds", "nan"], ["--cases", "0"], ["--cases", "-1"]]
)
def test_nothing_to_compare_is_refused(tmp_path: Path, words: list[str], capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        options_of(tmp_path, *words)
    assert "nothing is" in capsys.readouterr().err


# The rows of docs/verification.md.


def written(path: Path, **change: Any) -> Path:
    """A made-up result of the gate in this file."""
    state = {"state": "passed", "exit_code": 0, "seconds": 1.0, "limit": 2.0, "stderr": ""}
    tests = {"collected": 5, "passed": 4, "failed": 0, "skipped": 0, "left_out": 1, "slowest": {}}
    tests["files"] = {"tests/test_a.py": {"all": 3, "ended": 3, "passed": 3}}
    tests["files"]["tests/test_b.py"] = {"all": 2, "ended": 2, "passed": 1}
    result = {
        "kind": "cuda gate",
        "date": "2026-12-01T00:00:00Z",
        "revision": "0123456789abcdef",
        "versions": {"torch": "2.11.0"},
        "hardware": {"gpu": "made up"},
        "sources": sources(every=True),
        "parts": {
            "smoke": state | {"result": {"faults": [], "left_out": ["a", "b"]}},
            "parity": state | {"result": made() | {"tests": tests}},
            "bench": state | {"state": "died", "result": None},
        },
    }
    path.write_text(json.dumps(result | change))
    return path


def test_rows_pass_fail_and_go_stale(tmp_path: Path) -> None:
    assert rows(tmp_path) == [UNVERIFIED]
    file = tmp_path / "2026-12-01-cuda-gate.json"
    result = json.loads(written(file).read_text())
    lines = rows(tmp_path)
    assert all("| made up, torch 2.11.0 |" in line and file.name in line for line in lines)
    assert all(line.count(" | ") == 3 for line in lines)
    assert lines[0].startswith("| CUDA, `smoke`:") and "| passed, 2 left out; " in lines[0]
    assert "revision 0123456789ab" in lines[0]
    assert (
        lines[1].startswith("| CUDA, `tests`:")
        and "4 passed, 0 failed, 0 skipped, 1 left out" in lines[1]
    )
    assert sum(" passed, 2 of 2 cases" in line for line in lines) == 3
    assert (
        "not passed: dynamo: not run" in lines[5]
        and "not passed: died" in lines[6]
        and len(lines) == 7
    )

    written(file, sources=sources(every=True) | {"model/rope.py": "0"})
    assert sum("stale: model/rope.py changed" in line for line in rows(tmp_path)) == 4
    written(file, sources=sources(every=True) | {"use/decode.py": "0"})
    assert not any("stale" in line for line in rows(tmp_path))
    result["parts"]["parity"]["result"]["oracle"]["hashes"]["optimizer.py"] = "0"
    written(file, parts=result["parts"])
    assert sum("stale: specforge/optimizer.py changed" in line for line in rows(tmp_path)) == 4
    written(file, kind="rehearsal on a CPU, certifies nothing")
    assert rows(tmp_path) == [UNVERIFIED]


def test_rows_of_the_wheel_and_of_a_part_without_result(tmp_path: Path) -> None:
    file = tmp_path / "2026-12-01-cuda-gate.json"
    parts = json.loads(written(file).read_text())["parts"]
    parts["parity"]["result"]["oracle"]["kind"] = "wheel"
    written(file, parts=parts)
    assert sum("its wheel specforge" in line for line in rows(tmp_path)) == 5
    parts["parity"] |= {"result": None, "state": "died"}
    written(file, parts=parts)
    assert any(
        "`parity`: nothing was compared |" in x and "| not passed: died" in x
        for x in rows(tmp_path)
    )


def test_a_row_that_names_tests_reports_their_newest_run_on_a_card(tmp_path: Path) -> None:
    good, bad = {"tests/test_a.py"}, {"tests/test_a.py", "tests/test_b.py"}
    assert seen(good, tmp_path) == NOT_SEEN
    file = written(tmp_path / "2026-12-01-cuda-gate.json")
    assert seen(good, tmp_path) == f"passed, [2026-12-01](../bench/results/{file.name})"
    assert (
        seen(bad, tmp_path).startswith("4 of 5 passed, ")
        and seen({"tests/test_c.py"}, tmp_path) == NOT_SEEN
    )
    assert seen(good | {"tests/test_c.py"}, tmp_path).startswith(
        "3 of 3 passed, "
    )  # not all that the row names

    # A later run of the tests alone counts more, but for the files that it did not get to.
    name = "tests/test_b.py::test"
    head = {
        "run": {
            "date": "2026-12-02",
            "sources": sources(every=True),
            "revision": "a",
            "versions": {"torch": "2"},
        }
    }
    head["run"]["hardware"] = {"gpu": "made up"}
    lines = [
        head,
        {"collected": [name, "tests/test_a.py::test"]},
        {"test": name, "outcome": "passed"},
    ]
    later = tmp_path / "2026-12-02-cuda-tests.jsonl"
    later.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert (
        seen({"tests/test_b.py"}, tmp_path)
        == f"passed, [2026-12-02](../bench/results/{later.name})"
    )
    assert seen(good, tmp_path) == f"passed, [2026-12-01](../bench/results/{file.name})"
    assert sum("`tests`" in row and "1 passed, 0 failed" in row for row in rows(tmp_path)) == 1
    later.unlink()
    written(file, sources={})
    assert seen(good, tmp_path).endswith(", sources have changed since")
    written(file, kind="rehearsal on a CPU, certifies nothing")
    assert seen(good, tmp_path) == NOT_SEEN


def test_the_page_has_the_rows_of_the_result_files() -> None:
    text = (ROOT / "docs/verification.md").read_text(encoding="utf-8")
    expected = rows(ROOT / "bench" / "results")
    assert all(row in text for row in expected)
    assert (UNVERIFIED in text) == (expected == [UNVERIFIED])
    assert sum(line.startswith("| CUDA, `") for line in text.splitlines()) == sum(
        r != UNVERIFIED for r in expected
    )
