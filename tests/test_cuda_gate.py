"""The CUDA gate: its dry run, what a certificate must hold, and what does not pass."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle3fn.testing import cuda_gate
from eagle3fn.testing.certificate import PARITY, UNVERIFIED, failures, rows, sources
from eagle3fn.testing.cuda_gate import certificate, fold, parse
from eagle3fn.testing.oracle import COMMIT_FILES, Oracle

ROOT = Path(__file__).resolve().parent.parent
ROW = {"case": "x", "nontrivial": True, "decided": True, "old_kernel": {}, "own_kernel": {}, "reordering_seen": True}


def passed(**change: Any) -> dict[str, Any]:
    """A made-up certificate: two equal cases of each claim of parity, one of them changed."""
    made = certificate(parse(["--out", "x.json", "--device", "cpu"])) | {"device": "cuda", "card": "made up"}
    fold(made, "sdpa", {"oracle": {"kind": "commit", "sha256": "0", "hashes": dict(COMMIT_FILES)}})
    for name in PARITY:
        fold(made, name, ROW)
        fold(made, name, ROW | change)
    return made


def test_the_dry_run_passes_and_writes_a_certificate(oracle: Oracle, tmp_path: Path, capsys) -> None:
    out = tmp_path / "dry.json"
    code = cuda_gate.main(["--device", "cpu", "--out", str(out), "--cases", "2", "--minutes", "4"])
    seen = json.loads(out.read_text())
    assert code == 0, capsys.readouterr().out
    assert seen["complete"] and seen["oracle"]["sha256"] == oracle.digest and seen["sources"] == sources()
    assert {name: claim["cases"] for name, claim in seen["claims"].items()} == {"kernel": 2, "sdpa": 2}
    assert "flex_attention" in seen["not_run"] and failures(seen, PARITY) == ["flex_attention: not run"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"own_kernel": {"loss": 1}}, "equal_own_kernel in 1 of 2"),
        ({"old_kernel": {"loss": 1}}, "equal_old_kernel in 1 of 2"),
        ({"reordering_seen": False}, "reordering was detected in 1 of 2"),
        ({"nontrivial": False}, "1 of 2 cases are not trivial"),
    ],
)
def test_what_does_not_pass(change: dict[str, Any], message: str) -> None:
    assert failures(passed(), PARITY) == []
    found = failures(passed(**change), PARITY)
    assert len(found) == 3 and all(message in line for line in found)


def test_nothing_compared_is_a_failure() -> None:
    made = passed()
    del made["claims"]["flex_attention"]
    made["claims"]["sdpa"] |= {"cases": 0}
    made["claims"]["kernel"] |= {"undecidable": 2}
    assert [line.split(":")[0] for line in failures(made, PARITY)] == ["kernel", "sdpa", "flex_attention"]
    assert "no oracle: nothing was compared" in failures(made | {"oracle": None}, PARITY)
    fold(made, "sdpa", {"error": "RuntimeError: no"})
    assert "sdpa: RuntimeError: no" in failures(made, PARITY)


def test_an_undecidable_case_is_counted_apart() -> None:
    made = passed(decided=False, own_kernel={"loss": 1})
    assert made["claims"]["sdpa"]["undecidable"] == 1 and failures(made, PARITY) == []


def test_without_a_gpu_nothing_is_verified(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_gate.main(["--out", str(tmp_path / "x.json")]) == 1
    assert "nothing is verified" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_without_an_old_tool_the_code_is_3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_gate, "claim_rows", lambda *_: iter([{"error": "no oracle: install it"}]))
    assert cuda_gate.main(["--device", "cpu", "--out", str(tmp_path / "x.json")]) == 3


def test_a_process_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    options = parse(["--out", "x.json", "--device", "cpu", "--cases", "1"])
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert list(cuda_gate.claim_rows("sdpa", 60, options)) == [{"error": "its process ended with exit code 1"}]


def test_a_claim_without_a_row_fails_and_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    """Its process had an oracle, and no time for a case."""
    found = {"oracle": {"kind": "commit", "sha256": "0", "hashes": dict(COMMIT_FILES)}}
    monkeypatch.setattr(cuda_gate, "claim_rows", lambda *_: iter([found]))
    assert cuda_gate.main(["--device", "cpu", "--out", str(tmp_path / "x.json")]) == 1
    assert "failed: sdpa: not run" in capsys.readouterr().out
    assert json.loads((tmp_path / "x.json").read_text())["failures"] == ["kernel: not run", "sdpa: not run"]


@pytest.mark.parametrize("seconds", [-3e-5, 0, 1e-5])
def test_a_claim_without_time_is_asked_for_nothing(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """A time that is written with an exponent is an option's value too."""
    seen = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **rest: seen.append(command) or popen(["/bin/true"], **rest)
    )
    options = parse(["--out", "x.json", "--device", "cpu", "--seed", "-3"])
    assert list(cuda_gate.claim_rows("sdpa", seconds, options)) == []
    assert parse(seen[0][3:]).minutes == max(seconds, 0) / 60 and parse(seen[0][3:]).seed == -3


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--minutes", "nan"], ["--cases", "0"], ["--cases", "-1"]])
def test_nothing_to_compare_is_refused(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(["--out", "x.json", *arguments])
    assert "nothing is compared" in capsys.readouterr().err


def test_a_distance_that_is_none_is_an_error() -> None:
    made = passed()
    row = {"case": "x", "nontrivial": True, "ulps": {"loss": 3, "gradients": 5}}
    fold(made, "dynamo", row)
    assert failures(made, ("dynamo",)) == []
    fold(made, "dynamo", row | {"ulps": {"loss": 3, "gradients": -1}})
    assert failures(made, ("dynamo",)) == ["dynamo: not finite, so no distance: x"]


def test_a_stand_in_is_named(tmp_path: Path) -> None:
    made = passed()
    made["oracle"]["kind"] = "wheel"
    (tmp_path / "2026-cuda-parity.json").write_text(json.dumps(made))
    assert all("the wheel specforge" in line for line in rows(tmp_path))


def test_rows_pass_fail_and_go_stale(tmp_path: Path) -> None:
    assert rows(tmp_path) == [UNVERIFIED]
    file, made = tmp_path / "2026-cuda-parity.json", passed()
    file.write_text(json.dumps(made))
    lines = rows(tmp_path)
    assert not any("wheel" in line for line in lines)
    assert sum(" passed, 2 of 2 cases" in line for line in lines) == 3 and "not passed: dynamo: not run" in lines[3]
    file.write_text(json.dumps(made | {"sources": made["sources"] | {"model/rope.py": "0"}}))
    assert all("stale: model/rope.py changed" in line for line in rows(tmp_path))
    made["oracle"]["hashes"]["optimizer.py"] = "0"
    file.write_text(json.dumps(made))
    assert all("stale: specforge/optimizer.py changed" in line for line in rows(tmp_path))


def test_readme_has_the_rows_of_the_result_files() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    expected = rows(ROOT / "bench" / "results")
    assert all(row in text for row in expected)
    assert (UNVERIFIED in text) == (expected == [UNVERIFIED])
    assert sum(line.startswith("| CUDA, `") for line in text.splitlines()) == sum(r != UNVERIFIED for r in expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage:"),
        (["speed"], "usage:"),
        (["parity", "--src", "/nowhere"], "no checkout"),
        (["bench", "--out"], "--out"),
    ],
)
def test_the_script_refuses(arguments: list[str], message: str) -> None:
    done = subprocess.run(["scripts/cuda_gate.sh", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr
