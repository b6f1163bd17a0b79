"""Parts of the CUDA gate: waits in a profile, the shapes of a small card, results after a fault."""

import json
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cuda_gate as bench_gate
from bench import profile_step
from bench.profile_step import (
    STEP,
    Event,
    Wait,
    covered,
    found_in,
    is_read,
    is_wait,
    judge,
    summary,
)
from eagle3fn.model.losses import LOSSES
from eagle3fn.testing.gate_part import Report
from eagle3fn.train.optimizer import OPTIMIZERS
from tests.gate import smoke as gate_smoke

STEP_EVENT = Event(STEP, "user_annotation", 100, 200, "1 1")
GIB = 1 << 30


def test_covered_is_the_length_of_the_union() -> None:
    assert covered([]) == 0
    assert covered([(0, 2), (1, 3), (5, 6), (5, 5.5), (2.5, 2.75)]) == 4


def test_a_profile_of_made_up_events() -> None:
    """The step is 100 long on the host; its last kernel ends 20 later."""
    events = [
        Event("early", "kernel", 50, 90, "0 7"),
        Event(STEP, "gpu_user_annotation", 110, 220, "0 7"),
        STEP_EVENT,
        Event("gemm", "kernel", 110, 150, "0 7"),
        Event("add", "kernel", 140, 160, "0 8"),
        Event("gemm", "kernel", 180, 210, "0 7"),
        Event("Memcpy DtoD (Device -> Device)", "gpu_memcpy", 215, 220, "0 7"),
        Event("cudaLaunchKernel", "cuda_runtime", 101, 102, "1 1"),
        Event(
            "cudaDeviceSynchronize", "cuda_runtime", 205, 230, "1 1"
        ),  # the profiler's own, after the step
    ]
    found = summary(events, "cuda")
    assert found["span_ms"] == 0.12 and found["host_ms"] == 0.1 and found["launches"] == 4
    assert found["busy_ms"] == pytest.approx(0.085) and found["idle_share"] == pytest.approx(
        1 - 85 / 120
    )
    assert [(one["name"], one["launches"]) for one in found["kernels"][:2]] == [
        ("gemm", 2),
        ("add", 1),
    ]
    assert found["waits"] == [] and found["copies"] == {"Memcpy DtoD (Device -> Device)": 1}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cudaStreamSynchronize", "cuda_runtime"),
        ("cudaDeviceSynchronize", "cuda_runtime"),
        ("cudaEventSynchronize", "cuda_runtime"),
        ("cudaMemcpy", "cuda_runtime"),
        ("cuStreamSynchronize", "cuda_driver"),
        ("Memcpy DtoH (Device -> Pageable)", "gpu_memcpy"),
    ],
)
def test_a_wait_is_found_with_what_is_around_it(name: str, kind: str, tmp_path: Path) -> None:
    wait = Event(name, kind, 150, 151, "1 1")
    others = [
        STEP_EVENT,
        Event("aten::item", "cpu_op", 148, 155, "1 1"),
        Event("aten::_local_scalar_dense", "cpu_op", 149, 154, "1 1"),
        Event("aten::mm", "cpu_op", 140, 160, "1 2"),  # another thread
        Event("aten::add", "cpu_op", 120, 130, "1 1"),
        Event("cudaLaunchKernel", "cuda_runtime", 121, 122, "1 1"),
        Event("Memcpy DtoH (Device -> Pinned)", "gpu_memcpy", 125, 126, "0 7"),
        Event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 125, 126, "0 7"),
    ]
    assert found_in(others, is_wait) == []
    assert found_in([*others, wait], is_wait) == [
        Wait(name, ("aten::item", "aten::_local_scalar_dense"))
    ]
    assert summary([*others, wait], "cuda")["waits"][0]["what"] == name
    report = Report(tmp_path / "x.json", 9)
    judge(report, [], [])
    assert report.finish() == 0
    judge(report, ["stack of a\n"] * 2, found_in([*others, wait], is_wait) * 3)
    assert report.finish() == 1
    first, second = (fault["traceback"] for fault in report.result["faults"])
    assert first.startswith("stack of a\n2 times") and second.startswith("inside of\naten::item\n")
    assert second.endswith(f"3 times in a step: {name}")


@pytest.mark.parametrize("planted", [False, True])
def test_a_planted_read_is_found_in_a_real_profile(planted: bool) -> None:
    x = torch.arange(12.0)

    def update() -> None:
        y = x.sin().sum()
        if planted:
            y.item()

    found = found_in(profile_step.traced(update, "cpu"), is_read)
    assert Counter(read.what for read in found) == Counter(
        {"aten::_local_scalar_dense": 1} if planted else {}
    )
    assert all(read.inside == ("aten::item",) for read in found)


def test_a_warning_of_a_wait_is_kept_with_its_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def reads_a_value() -> None:
        warnings.warn(f"{profile_step.SYNC_WARNING} (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    with profile_step.sync_stacks("cuda") as stacks:
        reads_a_value()
        reads_a_value()
    assert modes == ["warn", "default"] and len(stacks) == 2
    assert all("in reads_a_value" in stack for stack in stacks)


def test_a_step_on_the_cpu_is_profiled(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    assert profile_step.main(["--device", "cpu", "--seconds", "60", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    profile = found["profile"]
    assert len(profile["kernels"]) == profile_step.SHOWN and 0 <= profile["idle_share"] < 1
    assert profile["waits"] == [] and found["sync_warnings"] == 0 and found["step_ms"] > 0
    assert profile["value_reads"]["aten::_local_scalar_dense"] > 0


def room(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """A card with so much free memory, and an estimate by tokens and width."""

    def bytes_needed(draft: Any, batch: int, seq: int, k: int) -> int:
        return batch * seq * draft.hidden_size * 1024 * k

    monkeypatch.setattr(bench_gate, "bytes_needed", bytes_needed)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, 80 * GIB))


@pytest.mark.parametrize(
    ("free", "shape", "seq"),
    [(60, "qwen2.5-7b", 2048), (40, "qwen2.5-7b", 1024), (9, "smollm2", 2048)],
)
def test_a_small_card_gets_a_smaller_problem_and_says_so(
    monkeypatch, free: int, shape: str, seq: int
) -> None:
    room(monkeypatch, free * GIB)
    found = bench_gate.chosen_shape("qwen2.5-7b", "cuda")
    assert (found["shape"], found["seq"]) == (shape, seq) and found["free_bytes"] == free * GIB
    assert ("because" in found) == ((shape, seq) != ("qwen2.5-7b", 2048))
    items = bench_gate.items("cuda")
    assert list(items)[:2] == ["step-qwen2.5-7b", "step-llama-3-8b"]
    words = " ".join(items["step-qwen2.5-7b"].words)
    assert f"--shape {shape} --seq {seq}" in words and "--memory-here" in words


def bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, seconds: float = 20
) -> Report:
    """The report after an item that runs this program in the place of bench.step."""
    folder = tmp_path / "made_up"
    folder.mkdir()
    begin = "import json, sys, time\nout, partial = sys.argv[3], sys.argv[5]\n"
    (folder / "bench.step.py").write_text(begin + program)
    monkeypatch.setattr(bench_gate.sys, "executable", str(runner(folder)))
    report = Report(tmp_path / "bench.json", seconds, {"parts": {}})
    bench_gate.run(report, {"step": bench_gate.Item(1, ["bench.step"])})
    return report


def runner(folder: Path) -> Path:
    """A Python whose `-m bench.step` is the program in this folder."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {folder}/bench.step.py "$@"\n')
    path.chmod(0o755)
    return path


PARTIAL = "open(partial, 'w').write(json.dumps({'seconds': {'fast': 1}, 'specforge': None}))\n"
WHOLE = (
    "open(out, 'w').write(json.dumps({'seconds': {'fast': 1, 'specforge': 3}, 'specforge': {}}))\n"
)
MISSING = (
    "found = {'seconds': {'fast': 1}, 'specforge': None, 'specforge_missing': 'gone'}\n"
    "open(out, 'w').write(json.dumps(found))\n"
)


@pytest.mark.parametrize(
    ("program", "fault", "left_out", "sides"),
    [
        (PARTIAL + WHOLE, None, [], 2),
        (PARTIAL + "raise RuntimeError('planted')", "RuntimeError: planted", [], 1),
        (PARTIAL + "time.sleep(60)", None, ["step: SpecForge's side"], 1),
        ("time.sleep(60)", None, ["step"], 0),
        (MISSING, "SpecForge was not measured: gone", [], 1),
    ],
)
def test_numbers_written_before_a_fault_are_kept(
    tmp_path, monkeypatch, program, fault, left_out, sides
) -> None:
    monkeypatch.setattr(bench_gate, "LEAST_SECONDS", 0.1)
    report = bench(tmp_path, monkeypatch, program, 2 if "sleep" in program else 20)
    assert report.result["left_out"] == left_out
    assert [fault] * bool(fault) == [
        what for one in report.result["faults"] if (what := fault) in one["traceback"]
    ]
    assert len(report.result["parts"]["step"].get("seconds", {})) == sides


def test_smoke_goes_on_after_a_check_that_left_no_usable_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults are a result beyond its bound, NaN and an exception; each leaves the others alone."""

    def raises() -> dict[str, float]:
        raise RuntimeError("planted")

    checks = [
        gate_smoke.Named("good", lambda: {"loss": 0.5}),
        gate_smoke.Named("far", lambda: {"loss": 1.5}),
        gate_smoke.Named("no number", lambda: {"loss": float("nan")}),
        gate_smoke.Named("raises", raises),
        gate_smoke.Named("last", dict),
    ]
    again: list[int] = []
    report = Report(tmp_path / "smoke.json", 20, {"checks": []})
    gate_smoke.run(report, checks, 0, "cpu", again.append)
    assert [row["passed"] for row in report.result["checks"]] == [
        True,
        False,
        False,
        False,
        True,
    ] and not again
    assert [fault["where"] for fault in report.result["faults"]] == ["far", "no number", "raises"]
    monkeypatch.setattr(gate_smoke, "context_lost", lambda device: True)
    gate_smoke.run(report, checks, 3, "cpu", again.append)
    assert again == [4]
    report.end = time.monotonic()
    gate_smoke.run(report, checks, 3, "cpu", again.append)
    assert report.result["left_out"] == ["raises", "last"]


def test_smoke_names_every_kernel_numerics_and_dtype() -> None:
    names = [one.name for one in gate_smoke.checks("cpu")]
    assert len(names) == len(set(names)) and names[0].startswith("tiny")
    for size in ("tiny", "real"):
        kernels = ("score kernel", "KL kernel", "flash attention", "rotation")
        kernels += ("packed flash attention",)
        losses = [f"loss {name} " for name in LOSSES]
        for what in (*kernels, *losses, "extract", "decode"):
            assert any(name.startswith(f"{size} {what}") for name in names)
        steps = [name for name in names if name.startswith(f"{size} ") and " step" in name]
        # Each dtype: two numerics in four ways and with survival, SpecForge; packed, and some
        # switches.
        packed = [name for name in steps if " packed " in name]
        assert len(packed) == 3 * (2 if size == "tiny" else 1)
        switched = [name for name in steps if " switch " in name]
        assert len(steps) == 3 * (2 * 5 + 1) + len(packed) + len(switched)
        assert len(switched) == (2 * len(gate_smoke.STEPPED) if size == "tiny" else 0)
    for name in ("fast", "plain", "SpecForge"):
        assert f"tiny {name} refuses autocast" in names
        assert f"tiny {name} under another default dtype" in names
    assert {"tiny start from the target", "tiny resume", "tiny resume mesh"} <= set(names)
    assert "tiny gradients by sample" in names
    for name in (*gate_smoke.SWITCHES, *gate_smoke.SHAPES):
        for dtype in ("fp32", "bf16"):
            assert f"tiny switch {name} {dtype} backward" in names
    for name in OPTIMIZERS:
        assert {f"tiny optimizer {name}", f"tiny optimizer {name} mesh"} <= set(names)
