"""Sides in processes of their own: timed in the same rounds, and left out where they fail."""

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import common, peers, sides, step, step_result, table
from bench.answers import serve
from eagle3fn.base.errors import UserError
from eagle3fn.base.launch import World

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--shape", "tiny", "--seq", "96", "--rounds", "2", "--dtype", "float32", "--no-memory"]
READY = "import sys, json, time\nprint(json.dumps({'first_loss': 2.0}), flush=True)\n"
STEP = "print(json.dumps({'loss': 1.0, 'processor_seconds': 7.0}), flush=True)\n"


def fake_environment(folder: Path) -> None:
    """An environment of speculators whose interpreter runs fake_peer.py."""
    made = folder / "speculators"
    (made / "bin").mkdir(parents=True)
    python = made / "bin" / "python"
    fake = f"{sys.executable} {ROOT}/tests/bench/fake_peer.py"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {fake} "$@"\n')
    python.chmod(0o755)
    (made / peers.STAMP).write_text(peers.stamp())


def started_peer(program: str, name: str = "fake") -> peers.Peer:
    return peers.Peer(name, [sys.executable, "-c", program], {})


def quick_matmul(dtype: torch.dtype, device: str) -> common.Matmul:
    return common.Matmul((1, 1, 1), 2, lambda: None)


def test_peers_and_survivors_are_timed_in_the_same_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_environment(tmp_path)
    monkeypatch.delenv(peers.SOURCE, raising=False)
    monkeypatch.setattr(sides, "find_oracle", lambda device: (None, "not here"))
    monkeypatch.setattr(common, "best_matmul", quick_matmul)
    words = [*TINY, "--survival", "0.5", "--peers", "--peers-folder", str(tmp_path), "--json"]
    monkeypatch.setattr("sys.argv", ["step", *words])
    result = step.run(step.parse(), World())

    # One that runs on the file of the same problem, and one that cannot.
    assert result["peers"]["speculators"] == {
        "versions": {"fake": "1.0"},
        "notes": ["it is our own step"],
        "own_loss": sides.DECAY,
    }
    assert peers.SOURCE in result["peers"]["specforge_main"]["missing"]
    losses = result["first_loss"]
    assert losses["speculators"] == losses["plain"]

    # Ratios against both of ours.
    times = result["all_seconds"]
    assert times.keys() == {"plain", "fast", "survivors", "speculators"}
    for ours, found in (("fast", result), ("survivors", result["survivors"])):
        pairs = zip(times["speculators"], times[ours], strict=True)
        assert found["ratio_speculators"] == pytest.approx(median(a / b for a, b in pairs))
        assert found["ratio"] is None and found["ratio_specforge_main"] is None
        assert found["quartiles"].keys() == {"ratio_plain", "ratio_speculators"}
        assert all(ratio > 0 for ratio in found["processor_ratios"].values())
        first, third = found["quartiles"]["ratio_speculators"]
        assert first <= found["ratio_speculators"] <= third

    # The survivors' own work, and their loss, which is right in expectation.
    survivors = result["survivors"]
    assert survivors["flops_needed"]["head"] < 0.5 * result["flops_needed"]["head"]
    assert survivors["flops_needed"]["teacher"] == result["flops_needed"]["teacher"]
    assert survivors["shares"]["needed_over_steps"] < result["shares"]["needed_over_steps"]
    assert losses["survivors"] == pytest.approx(losses["fast"], rel=0.5)
    assert losses["survivors"] != losses["fast"]
    assert result["settings"]["survival"] == 0.5


def test_side_that_is_served_is_the_side_itself() -> None:
    words = [*TINY, "--serve", "fast"]
    served = peers.Peer("fast", [sys.executable, "-m", "bench.step", *words], {})
    options = step.parse(TINY)
    call = step.side_of("fast", options, step.problem_of(options), None)
    wanted = [float(call()) for _ in range(step.MEMORY_STEPS + 1)]
    assert served.ready["first_loss"] == wanted[0]
    made = served.step()
    assert made.loss == wanted[-1] and made.processor_seconds > 0
    served.close()
    assert served.process.returncode == 0
    used = served.ready["memory"]
    assert used["step"] == used["peak"] - used["inputs"] > 0


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise SystemExit(3)", "exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
        ("import time; time.sleep(60)", "no answer in 0.5 s"),
        ("print('no JSON', flush=True)", "answered 'no JSON'"),
    ],
)
def test_process_that_never_is_ready_is_named(
    program: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "sleep" in program:
        monkeypatch.setattr(peers, "READY_S", 0.5)
    with pytest.raises(peers.PeerError, match=f"fake: .*{reason}"):
        started_peer(program)


def test_process_that_ends_or_hangs_is_left_out_of_the_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one_step = f"{READY}sys.stdin.readline()\n{STEP}"
    programs = {
        "ends": one_step + "sys.exit(4)",
        "ended": READY,
        "hangs": one_step + "time.sleep(60)",
        "closes": one_step + "import os; os.close(1); time.sleep(60)",
        "works": f"{READY}for _ in sys.stdin:\n {STEP}",
    }
    monkeypatch.setattr(peers, "END_S", 1.0)
    monkeypatch.setattr(peers, "STEP_S", 1.0)
    monkeypatch.setattr(common, "best_matmul", quick_matmul)
    found = peers.Peers({name: started_peer(text, name) for name, text in programs.items()}, {})
    options = step.parse([*TINY, "--rounds", "3"])

    timing = step.time_sides(options, {"fast": lambda: torch.zeros(())}, found, World())
    assert timing.seconds.keys() == {"fast", "works"}
    assert [len(values) for values in timing.seconds.values()] == [3, 3]
    assert timing.processor["works"] == [7.0] * 3 and max(timing.processor["fast"]) < 1
    assert found.running.keys() == {"works"}
    assert "exit code 4" in found.missing["ends"] and "exit code 0" in found.missing["ended"]
    assert "no answer" in found.missing["hangs"] and "exit code -9" in found.missing["closes"]
    assert found.describe()["hangs"] == {"missing": found.missing["hangs"]}
    found.running["works"].close()


def test_peers_are_left_out_on_cards_and_ranks() -> None:
    for device, size, reason in (("cuda", 1, peers.ON_CPU), ("cpu", 2, sides.ONE_RANK)):
        options = SimpleNamespace(peers=["speculators"], device=device)
        with ExitStack() as stack:
            found = step.start_peers(options, World(size=size), stack)  # pyright: ignore
        assert found == ({}, {"speculators": reason})


def test_environment_is_made_once_for_its_requirements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    codes = [0, 1]
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("speculators==0.9.0\n")
    monkeypatch.setattr(peers, "REQUIREMENTS", requirements)

    def run(call: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(call)
        if "venv" in call:
            Path(call[-1]).mkdir(parents=True, exist_ok=True)
        return subprocess.CompletedProcess(call, codes.pop(0), "", "WARNING\nno such package\n")

    monkeypatch.setattr(peers.subprocess, "run", run)
    with pytest.raises(peers.PeerError, match=r"pip install .*: no such package"):
        peers.environment("speculators", tmp_path)

    # It failed, so that it begins anew; then it is kept, until its requirements change.
    for content, made in ((None, 2), (None, 0), ("speculators==0.9.1\n", 2)):
        if content:
            requirements.write_text(content)
        calls.clear()
        codes[:] = [0, 0]
        python = peers.environment("speculators", tmp_path)
        assert python == str(tmp_path / "speculators" / "bin" / "python")
        assert len(calls) == made


def test_requirements_are_exact_and_have_the_version_that_is_named() -> None:
    lines = [line for line in peers.stamp().splitlines() if not line.startswith("#")]
    assert all(line.count("==") == 1 for line in lines)
    assert "speculators==0.9.0" in lines and "torch==2.13.0" in lines


def test_answers_are_lines_of_json(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.stdin", iter(["step\n", "step\n"]))
    losses = iter([3.0, torch.tensor(2.0)])
    serve(sys.stdout, {"ready": 1}, lambda: next(losses))
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answers[0] == {"ready": 1}
    assert [answer["loss"] for answer in answers[1:]] == [3.0, 2.0]
    assert all(0 <= answer["processor_seconds"] < 1 for answer in answers[1:])


def test_survival_out_of_range_is_refused() -> None:
    with pytest.raises(UserError, match="survival"):
        step.parse([*TINY, "--survival", "1.5"])


def test_dtype_follows_the_device_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(common, "multiplies_bf16", lambda device, fast=fast: fast)
        assert step.parse(["--shape", "tiny"]).dtype == dtype
        assert step.parse(["--dtype", "bfloat16"]).dtype == "bfloat16"


def test_speculators_loss_is_ours_by_specforges_definition(tmp_path: Path) -> None:
    """Its own model from the same weights: needs its environment, which `--peers` makes."""
    mark = peers.FOLDER / "speculators" / peers.STAMP
    if not mark.is_file() or mark.read_text(encoding="utf-8") != peers.stamp():
        pytest.skip(f"{peers.FOLDER}: no speculators there; python -m bench.step --peers makes it")
    options = step.parse([*TINY, "--batch", "2"])
    path = tmp_path / "case.safetensors"
    peers.write_case(path, step.case_of(options))
    command = [peers.environment("speculators", peers.FOLDER), "bench/speculators_step.py"]
    peer = peers.Peer("speculators", [*command, str(path), str(path)], {"HF_HUB_OFFLINE": "1"})
    ours = step.side_of("plain", options, step.problem_of(options), None)
    assert peer.ready["first_loss"] == pytest.approx(float(ours()), rel=1e-5)

    # It learns: the rate is 0 in its first step and rises.
    losses = [peer.ready["own_loss"], *(peer.step().loss for _ in range(6))]
    peer.close()
    assert losses[-1] < losses[0] - 0.01


def result_with_peers() -> dict[str, Any]:
    """A result as the table reads it."""
    quartiles = {name: [1.0, 2.0] for name in step_result.RATIOS}
    ratios = {
        "ratio": 2.0,
        "ratio_plain": 1.5,
        "ratio_specforge_main": 2.5,
        "ratio_speculators": 3.0,
        "quartiles": quartiles,
        "mfu": 0.7,
    }
    return ratios | {
        "settings": {"allocator": "raised", "dtype": "float32", "survival": 0.65},
        "command": "python -m bench.step --seq 512 --peers speculators --survival 0.65",
        "hardware": {"instructions": "AVX2"},
        "load_average": 1.0,
        "shares": {"needed": 0.5},
        "seconds": {
            "specforge": 4.0,
            "plain": 3.0,
            "fast": 2.0,
            "survivors": 1.0,
            "specforge_main": 5.0,
            "speculators": 6.0,
        },
        "memory": {
            name: {"step": number << 20}
            for number, name in enumerate(("fast", "specforge", "specforge_main", "speculators"), 1)
        },
        "memory_ratio": 0.5,
        "memory_ratio_specforge_main": 0.33,
        "memory_ratio_speculators": 0.25,
        "matmul_gflops": 70.0,
        "survivors": ratios | {"ratio": 4.0, "ratio_speculators": 6.0, "mfu": 0.8},
    }


def test_table_has_a_column_for_what_some_result_has() -> None:
    result = result_with_peers()
    header, _, row = table.step_table([result]).splitlines()
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert cells["| `python -m bench.step …`"] == "| `--seq 512 --survival 0.65 --dtype float32`"
    assert cells["SpecForge main, speculators: ms"] == "5,000, 6,000"
    assert cells["SpecForge main / fast"] == "2.50"
    assert cells["speculators / fast"] == "3.00"
    assert cells["their memory, MiB"] == "3, 4"
    assert cells["survivors: ms"] == "1,000"
    assert cells["SpecForge, main, speculators / survivors"] == "4.00, 2.50, 6.00"

    # Without them the columns are gone, and another case's row has dashes.
    alone = result | {"survivors": None, "ratio_specforge_main": None, "ratio_speculators": None}
    for part in ("seconds", "memory"):
        alone[part] = {name: x for name, x in result[part].items() if name in table.OURS}
    header, _, row = table.step_table([alone]).splitlines()
    assert "speculators" not in header and "survivors" not in header
    both = table.step_table([alone, result]).splitlines()
    assert both[2].count("| - ") == both[0].count("|") - header.count("|")
