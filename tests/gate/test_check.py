"""What the CUDA gate and the tests on a card refuse at once: one sentence, exit code 2."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eagle3fn.specforge.oracle import COMMIT, COMMIT_FILES
from tests.gate import check
from tests.gate.check import RefusedError

ROOT = Path(__file__).resolve().parents[2]
TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The sentence of a refusal."""
    assert check.main(list(words)) == 2
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1 and error.startswith("scripts/")
    return error


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The printed plan, line by line."""
    assert check.main(list(words)) == 0
    return capsys.readouterr().out.split("\n")[:-1]


def test_a_machine_without_a_card_is_refused(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA card is here" in refusal(capsys, "gate", "all")
    assert "no CUDA card is here" in refusal(capsys, "tests", "--device", "cuda")


def card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], *built: str) -> None:
    """A made-up card, and the architectures that torch was built for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "made up")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built))


def test_a_card_that_is_too_old_or_too_new_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    card(monkeypatch, (7, 5), "sm_75", "sm_90")
    assert "made up has compute capability 7.5; 8.0 or newer is needed" in refusal(
        capsys, "gate", "all"
    )
    card(monkeypatch, (12, 0), "sm_80", "sm_90")
    assert "no code for made up of compute capability 12.0 (it has sm_80, sm_90)" in refusal(
        capsys, "gate", "all"
    )
    card(monkeypatch, (9, 0), "sm_80", "sm_90")
    check.check_card()


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_90"], True),  # machine code of its generation
        ((9, 0), ["sm_80"], False),
        ((9, 0), ["sm_80", "compute_80"], True),  # PTX of an older one
        ((8, 0), ["sm_86"], False),
        ((12, 1), ["sm_90a", "sm_120"], True),
        ((9, 0), ["sm_90a"], True),
        ((10, 0), ["compute_90a"], False),  # of that card alone
        ((10, 3), ["sm_100f"], True),
        ((9, 0), ["gfx942"], False),
        ((9, 0), [], False),
    ],
)
def test_a_card_runs_machine_code_of_its_generation_and_older_ptx(
    capability: tuple[int, int], built: list[str], runs: bool
) -> None:
    assert check.has_code(capability, built) == runs


def test_an_old_python_is_refused(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(check.sys, "version_info", (3, 9, 1))
    assert "3.11 or newer is needed" in refusal(capsys, "gate", "all", "--device", "cpu")


@pytest.mark.parametrize("package", ["torch", "triton", "pytest", "hypothesis"])
def test_a_python_without_a_package_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys, package: str
) -> None:
    find = check.importlib.util.find_spec
    monkeypatch.setattr(
        check.importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    error = refusal(capsys, "gate", "all", "--device", "cpu")
    assert f"has no {package}:" in error and "PYTHON" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", "0"], "--minutes 0: must be above 0"),
        (["--minutes", "nan"], "--minutes nan: must be above 0"),
        (["--minutes", "inf"], "--minutes inf: must be above 0"),
        (["--minutes", "soon"], "invalid float value: 'soon'"),
        (["--parts", "smoke,speed"], "speed is no part"),
        (["--parts", ""], "nothing is no part"),
        (["--parts", "failed:/nowhere.json"], "no result of the gate there"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--wheels", "/nowhere"], "--wheels /nowhere: no such folder"),
        (["--src", "/nowhere"], "--src /nowhere: no checkout of SpecForge there"),
        (["--out", "/proc/nowhere/x.json"], "cannot be written"),
        (["--out", "/"], "cannot be written"),
        (["--speed"], "unrecognized arguments: --speed"),
    ],
)
def test_impossible_options_are_refused(capsys, words: list[str], message: str) -> None:
    assert message in refusal(capsys, "gate", "all", "--device", "cpu", *words)


def test_all_is_the_only_gate(capsys) -> None:
    assert "invalid choice: 'parity'" in refusal(capsys, "gate", "parity")


def parts(*words: str) -> list[str]:
    return check.parts_of(check.gate_parser().parse_args(["all", *words]))


def test_parts_are_chosen_by_name_or_by_an_earlier_result(tmp_path: Path) -> None:
    assert parts() == ["smoke", "parity", "bench", "profile"]
    assert parts("--parts", "updates,smoke,smoke") == ["smoke", "updates"]
    states = {"smoke": "failed", "parity": "passed", "bench": "out of time"}
    earlier = {
        "parts": {name: {"state": state} for name, state in states.items()},
        "left_out": ["profile", "smoke: x"],
    }
    file = tmp_path / "gate.json"
    file.write_text(json.dumps(earlier))
    assert parts("--parts", f"failed:{file}") == ["smoke", "bench", "profile", "updates"]
    file.write_text("[]")
    with pytest.raises(RefusedError, match="no result of the gate"):
        parts("--parts", f"failed:{file}")


def checkout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up checkout, and the hashes of its files in the commit's place."""
    for name in COMMIT_FILES:
        path = folder / "specforge" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in COMMIT_FILES}
    monkeypatch.setattr(check, "commit_files", lambda: hashes)
    return folder


def test_a_checkout_of_another_commit_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path
) -> None:
    src = checkout(tmp_path, monkeypatch)
    assert plan(capsys, "tests", "--device", "cpu", "--src", str(src))[2] == str(src)
    (src / "specforge/core/loss.py").write_text("changed")
    error = refusal(capsys, "tests", "--device", "cpu", "--src", str(src))
    assert "specforge/core/loss.py is not the file of pull request 600" in error
    (src / "specforge/core/loss.py").unlink()
    assert "specforge/core/loss.py is not" in refusal(
        capsys, "gate", "all", "--device", "cpu", "--src", str(src)
    )
    monkeypatch.setenv("SPECFORGE_SRC", str(src))
    assert "specforge/core/loss.py is not" in refusal(capsys, "gate", "all", "--device", "cpu")


def test_parsed_constants_are_those_of_the_modules() -> None:
    assert check.commit_files() == COMMIT_FILES
    assert f"={COMMIT}\n" in (ROOT / "scripts/cuda_env.sh").read_text()
    lines = check.requirements([*check.ADDED, "specforge"])
    assert [line.split()[0] for line in lines] == [
        "optree==0.20.0",
        "yunchang==0.6.4",
        "specforge==0.2.0",
    ]
    assert all(
        word.startswith("--hash=sha256:") and len(word) == 78
        for line in lines
        for word in line.split()[1:]
    )


def test_a_wheel_that_is_missing_or_changed_is_refused(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"wheel").hexdigest()
    lines = [f"optree==0.20.0 --hash=sha256:{digest}", f"yunchang==0.6.4 --hash=sha256:{digest}"]
    (tmp_path / "optree-0.20.0-cp27-cp27-manylinux_2_28_x86_64.whl").write_bytes(b"wheel")
    (tmp_path / f"optree-0.20.0-{TAG}-{TAG}-win_amd64.whl").write_bytes(b"wheel")
    python = ".".join(map(str, sys.version_info[:2]))
    with pytest.raises(RefusedError, match=rf"no wheel of optree 0.20.0 for Python {python}"):
        check.check_wheels(tmp_path, lines)
    (tmp_path / f"optree-0.20.0-{TAG}-{TAG}-manylinux_2_28_{os.uname().machine}.whl").write_bytes(
        b"wheel"
    )
    with pytest.raises(RefusedError, match=r"no wheel of yunchang 0.6.4"):
        check.check_wheels(tmp_path, lines)
    (tmp_path / "yunchang-0.6.4-py3-none-any.whl").write_bytes(b"another")
    with pytest.raises(RefusedError, match=r"yunchang-0.6.4-py3-none-any.whl has other bytes"):
        check.check_wheels(tmp_path, lines)
    (tmp_path / "yunchang-0.6.4-py3-none-any.whl").write_bytes(b"wheel")
    check.check_wheels(tmp_path, lines)


def test_only_missing_packages_are_installed(
    monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path
) -> None:
    src = str(checkout(tmp_path / "src", monkeypatch))
    words = ("tests", "--device", "cpu", "--src", src)
    monkeypatch.setattr(check, "SITE", tmp_path / "site")
    monkeypatch.setattr(check, "importable", lambda package, site=None: True)
    assert plan(capsys, *words) == ["ready", "", src]
    monkeypatch.setattr(
        check, "importable", lambda package, site=None: package == "yunchang" or site is not None
    )
    found = plan(capsys, *words)
    assert (
        found[0] == "install" and len(found) == 4 and found[3].startswith("optree==0.20.0 --hash")
    )
    (tmp_path / "site").mkdir()
    assert plan(capsys, *words) == ["site", "", src]
    assert "no wheel of specforge 0.2.0 for Python 3." in refusal(
        capsys, "tests", "--device", "cpu", "--wheels", str(wheels(tmp_path, monkeypatch))
    )


def wheels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of wheels, on a machine without SpecForge."""
    monkeypatch.setattr(check, "importable", lambda package, site=None: package != "specforge")
    monkeypatch.delenv("SPECFORGE_SRC", raising=False)
    made = folder / "wheels"
    made.mkdir()
    return made


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scripts/cuda_gate.sh"], "usage: scripts/cuda_gate.sh all"),
        (["scripts/cuda_gate.sh", "bench"], "usage: scripts/cuda_gate.sh all"),
        (
            ["scripts/cuda_gate.sh", "all", "--parts", "speed"],
            "scripts/cuda_gate.sh: --parts speed: speed is no part",
        ),
        (["scripts/test.sh", "--device"], "scripts/test.sh: argument --device: invalid choice"),
        (
            ["scripts/test.sh", "--device", "cpu", "--src", "/nowhere"],
            "scripts/test.sh: --src /nowhere: no checkout",
        ),
    ],
)
def test_the_scripts_refuse(words: list[str], message: str) -> None:
    variables = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(
        words, cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr.startswith(message) and not done.stdout
