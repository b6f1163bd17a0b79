"""The benchmarks: what they count, refuse and print. No time is asserted."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from bench import common, memory, peers, problem, sides, table
from bench.launch import RAISED, THRESHOLDS, environment
from eagle3fn.base.errors import UserError
from eagle3fn.base.rows import over_steps, plan_rows, surviving

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--shape", "tiny", "--seq", "96", "--rounds", "1", "--json")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node")


def call(*words: object, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def last_line(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return json.loads(done.stdout.splitlines()[-1])


def test_result_is_printed_and_written_only_where_out_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No result of a try lands next to the published ones."""
    written: list[Path] = []
    monkeypatch.setattr(common, "write_json", lambda path, result: written.append(path))
    for out in (None, tmp_path / "mine.json", tmp_path):
        common.finish({"ratio": 2}, None if out is None else str(out), "step-tiny")
        assert capsys.readouterr().out == '{"ratio": 2}\n'
    assert written == [tmp_path / "mine.json", tmp_path / "step-tiny.json"]


def test_step_measures_time_and_memory_of_every_side(tmp_path: Path, oracle) -> None:
    source = os.environ.get("SPECFORGE_SRC", "")
    others = ("--mesh", "--peers", "specforge_main", "--out", tmp_path / "step.json")
    done = call("bench/step.py", *TINY, *others, SPECFORGE_MAIN_SRC=source)
    result = last_line(done)
    assert result == json.loads((tmp_path / "step.json").read_text())
    assert done.stdout.count("\n") == 1
    times = result["all_seconds"]
    used = result["memory"]
    about = result["peers"]["specforge_main"]
    if "missing" in about:
        assert oracle.kind == "wheel" and peers.SOURCE in about["missing"]
    else:
        # SpecForge once more, in a process of its own.
        assert about["specforge"]["hashes"] == oracle.hashes
        assert times.pop("specforge_main")[0] > 0 and used.pop("specforge_main")["step"] > 0
        assert result["first_loss"]["specforge_main"] == result["first_loss"]["specforge"]
        assert result["memory_ratio_specforge_main"] > 0
    assert times.keys() == {"plain", "fast", "specforge", "mesh"}
    assert result["ratio"] == pytest.approx(times["specforge"][0] / times["fast"][0])
    assert result["ratio_plain"] == pytest.approx(times["plain"][0] / times["fast"][0])
    assert result["mesh_overhead"] == pytest.approx(times["mesh"][0] / times["fast"][0] - 1)
    rate = result["matmul_gflops"] * 1e9
    assert result["mfu"] == pytest.approx(result["flops_needed"]["total"] / times["fast"][0] / rate)
    assert used.keys() == {"plain", "fast", "specforge"}
    assert result["memory_ratio"] == pytest.approx(used["fast"]["step"] / used["specforge"]["step"])
    assert all(value["step"] == value["peak"] - value["inputs"] > 0 for value in used.values())
    assert result["specforge"]["hashes"] == oracle.hashes
    assert result["notes"] == list(sides.ON_CPU)
    assert set(result["allocator"].values()) == {RAISED}
    assert {"revision", "date", "versions", "hardware", "threads", "command"} <= result.keys()
    assert result["first_loss"]["specforge"] == pytest.approx(
        result["first_loss"]["fast"], rel=1e-3
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_step_on_ranks_and_without_specforge(tmp_path: Path, ranks: int) -> None:
    out = ("--no-memory", "--allocator", "default", "--out", tmp_path / "step.json")
    done = call(*TORCHRUN, ranks, "bench/step.py", *TINY, *out, SPECFORGE_SRC=str(tmp_path))
    result = last_line(done)
    assert result["settings"]["ranks"] == ranks
    assert result["ratio"] is None and result["memory_ratio"] is None and result["memory"] == {}
    assert result["ratio_plain"] > 0
    assert result["specforge"] is None
    assert result["specforge_missing"].startswith(
        sides.ONE_RANK if ranks > 1 else f"SPECFORGE_SRC={tmp_path}"
    )
    rate = ranks * 96 / result["seconds"]["fast"]
    assert result["tokens_per_s"]["fast"] == pytest.approx(rate)
    assert set(result["allocator"].values()) == {"glibc's default"}


def test_scaling_measures_every_point_and_draws_a_picture(tmp_path: Path) -> None:
    small = ("--seqs", 64, 128, "--vocabs", 64, 128, "--batches", 1, 2, "--ks", 1, 2)
    shape = ("--shape", "tiny", "--rounds", "1", "--json", "--dtype", "float32")
    small += ("--thread-counts", 1, 2, "--ranks", 2, "--layers", 2)
    result = last_line(call("bench/scaling.py", *shape, *small, "--out", tmp_path / "scaling.json"))
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    points = {name: [row[name] for row in rows] for name, rows in result["sweeps"].items()}
    assert points == {
        "seq": [64, 128],
        "draft_vocab": [64, 128],
        "batch": [1, 2],
        "k": [1, 2],
        "threads": [1, 2],
        "ranks": [2],
    }
    assert {row["tokens"] for row in result["sweeps"]["seq"]} == {128}
    own = []
    for row in result["sweeps"]["seq"]:
        own.append(row["us_per_token"] - row["attention_us_per_token"])
    assert result["seq_growth"] == pytest.approx(own[1] / own[0])
    beyond = [row["memory_beyond_state"] for row in result["sweeps"]["draft_vocab"]]
    assert result["memory_growth"] == pytest.approx(beyond[1] / beyond[0])

    # Threads: the same tokens a step, and a choice for the work of every command.
    rows = result["sweeps"]["threads"]
    assert [row["tokens"] for row in rows] == [64, 64]
    assert result["thread_choice"].keys() == {"train", "extract", "evaluate", "synthesize"}
    for name, choice in result["thread_choice"].items():
        seconds = {row["threads"]: row["all_work_seconds"][name] for row in rows}
        assert seconds[choice["best"]] == min(seconds.values())
        ratio = seconds[choice["chosen"]] / min(seconds.values())
        assert choice["time_over_best"] == pytest.approx(ratio)

    # Ranks: each has its own tokens.
    (row,) = result["sweeps"]["ranks"]
    assert row["tokens"] == 128
    assert row["us_per_token"] == pytest.approx(1e6 * row["seconds"] / 128)


def test_sweeps_that_are_not_asked_for_are_left_out(tmp_path: Path) -> None:
    words = ("--shape", "tiny", "--rounds", "1", "--json", "--dtype", "float32")
    words += ("--seqs", 64, "--vocabs", 64, "--ks", 2)
    chosen = ("--sweeps", "batch", "--batches", 1, "--out", tmp_path / "scaling.json")
    result = last_line(call("bench/scaling.py", *words, *chosen))
    assert list(result["sweeps"]) == ["batch"]
    assert result["seq_growth"] is None and result["thread_choice"] is None


def test_cuda_gate_refuses_without_cuda_and_rehearses_on_cpu(tmp_path: Path, oracle) -> None:
    out = tmp_path / "gate.json"
    if not torch.cuda.is_available():
        refused = call("-m", "bench.cuda_gate", "--seconds", "9", "--out", out, code=2)
        assert "no CUDA device is there" in refused.stderr
        assert not out.exists()
    call("-m", "bench.cuda_gate", "--device", "cpu", "--seconds", "1", "--out", out, code=1)
    result = json.loads(out.read_text())
    assert result["left_out"] == ["step-tiny", "loss-tiny", "attention-tiny"]
    assert result["faults"][0]["traceback"] == "nothing was measured"
    call("-m", "bench.cuda_gate", "--device", "cpu", "--seconds", "300", "--out", out)
    result = json.loads(out.read_text())
    assert result["kind"] == "rehearsal on a CPU, no measurement"
    assert result["left_out"] == [] and result["faults"] == []
    assert result["parts"]["loss-tiny"]["mfu"]["64"] > 0
    assert result["parts"]["attention-tiny"]["ratio"]["96"] > 0
    step = result["parts"]["step-tiny"]
    assert step["ratio"] > 0 and step["memory"].keys() == {"plain", "fast", "specforge"}
    assert all(used["step"] == used["peak"] - used["inputs"] for used in step["memory"].values())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("length", "masked"), [(1024, 0.5), (512, 0.75), (1024, 0.0), (2048, 0.3), (700, 1.0)]
)
def test_turns_have_their_lengths_and_the_masked_share(
    length: int, masked: float, seed: int
) -> None:
    shown = problem.turns(length, masked, torch.Generator().manual_seed(seed))
    assert len(shown) == length
    assert int((shown == 0).sum()) == round(length * masked)
    edges = [0, *(i for i in range(1, length) if shown[i] != shown[i - 1]), length]
    sizes = [b - a for a, b in pairwise(edges)]
    if 0 < masked < 1:
        assert shown[0] == 0
        assert all(size >= 64 for size in sizes)
        assert all(size <= 256 for size in sizes) or masked != 0.5
    again = problem.turns(length, masked, torch.Generator().manual_seed(seed))
    assert torch.equal(shown, again)


def test_flops_equal_those_of_plain_loops() -> None:
    draft = problem.draft_of("tiny", None, 10)
    k = 3
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]])
    h = draft.hidden_size
    i = draft.intermediate_size
    n = draft.num_attention_heads
    j = draft.num_key_value_heads
    e = draft.head_dim
    d = draft.draft_vocab_size
    v = draft.vocab_size
    want = dict.fromkeys(common.Flops._fields, 0)
    for row in mask.tolist():
        want["teacher"] += 2 * sum(row) * h * v
        for t in range(len(row)):
            want["projection"] += 4 * 3 * h * h
            for step in range(k):
                later = any(row[t + ahead] for ahead in range(step, k) if t + ahead < len(row))
                if step == 0 or later:
                    want["keys_values"] += 6 * 2 * (2 * h * j * e)
                if later:
                    want["queries_output"] += 6 * (2 * h * n * e + n * e * h)
                    want["mlp"] += 6 * 3 * h * i
                    want["attention"] += 6 * 2 * n * e * (t + 1 + step)
                if t + step < len(row) and row[t + step]:
                    want["head"] += 6 * h * d
    row_mask = over_steps(mask, k)
    assert common.flops(draft, row_mask)._asdict() == want
    full = common.flops(draft, torch.ones_like(row_mask))
    assert common.flops(draft, row_mask, dense=True) == full
    assert full.head == 6 * k * 20 * h * d
    assert full.teacher == 2 * 20 * h * v


@pytest.mark.parametrize("survival", [1.0, 0.6])
def test_needed_rows_and_flops_are_those_of_the_plan(survival: float) -> None:
    k = 4
    mask = (torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.1).long()
    row_mask = over_steps(mask, k)
    survives = problem.survives_of(3, 40, k, survival)
    scored = surviving(row_mask, survives)
    plan = plan_rows(row_mask, survives)
    need = common.needed_rows(scored)
    for step, size in enumerate(plan.sizes):
        rows = plan.rows[:size].sort().values
        assert torch.equal(need[step].flatten().nonzero()[:, 0], rows)
    if survival == 1:
        assert torch.equal(need[3][:, :-3], mask[:, 3:] > 0)
    else:
        assert plan.sizes[-1] < 0.5 * plan.sizes[0]

    draft = problem.draft_of("tiny", None, 40)
    count = common.flops(draft, scored)
    assert count.head == 6 * len(plan.row) * draft.hidden_size * draft.draft_vocab_size
    assert count.teacher == 2 * len(plan.labels) * draft.target_hidden_size * draft.vocab_size
    weights = 3 * draft.hidden_size * draft.intermediate_size
    assert count.mlp == 6 * int(plan.sizes.sum()) * weights


def test_problem_with_survival_has_its_plan() -> None:
    """Each row lives 1 … K steps; without survival the same batch, and every row lives on."""
    draft = problem.draft_of("tiny", None, 300)
    kind = {"batch": 2, "seq": 300, "masked": 0.5, "k": 4, "seed": 0, "device": "cpu"}
    every, some = (
        problem.make_problem(draft, **kind, dtype=torch.float32, survival=survival)
        for survival in (1.0, 0.5)
    )
    assert torch.equal(every.batch.next_ids, some.batch.next_ids)
    assert torch.equal(every.batch.aux_hidden, some.batch.aux_hidden)
    assert every.batch.survives is None
    assert torch.equal(every.scored, every.batch.row_mask)

    survives = some.batch.survives
    plan = some.batch.plan
    assert survives is not None and plan is not None
    shares = survives.flatten().bincount() / 600
    assert shares.tolist() == pytest.approx([0, 0.5, 0.25, 0.125, 0.125], abs=0.06)
    assert torch.equal(some.scored.sum((0, 2)), plan.step.bincount())


def test_ratios_are_medians_of_rounds() -> None:
    times = {"specforge": [4.0, 9.0, 8.0], "fast": [2.0, 3.0, 1.0]}
    timing = common.Timing(times, [1.0, 2.0, 4.0], (1, 1, 1), times)
    assert timing.ratio("specforge", "fast") == 3.0
    assert timing.share("fast", 6.0) == median([3.0, 1.0, 1.5])


def test_sides_that_compute_different_things_are_refused() -> None:
    common.check_losses({"specforge": 9.0, "fast": 9.1})
    with pytest.raises(UserError, match="more than 2% apart"):
        common.check_losses({"specforge": 9.0, "fast": 9.3})
    with pytest.raises(UserError):
        common.check_losses({"specforge": 9.0, "fast": float("nan")})


def test_memory_is_the_peak_of_the_steps_alone() -> None:
    kept = 40 << 20
    passing = 120 << 20

    def make():
        torch.ones(passing).max()  # four times as much, but before the steps
        weights = torch.ones(kept // 4)
        return lambda: torch.ones(passing // 4).max() + weights[0]

    used = memory.measure(make, 2, "cpu").used
    slack = 24 << 20
    assert kept - slack < used["idle"] - used["inputs"] < kept + slack
    assert kept + passing - slack < used["step"] < kept + passing + slack


def test_environment_of_a_device() -> None:
    assert environment("cpu", 1, "raised") == {
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
        "TORCHDYNAMO_DISABLE": "1",
        **dict.fromkeys(THRESHOLDS, RAISED),
    }
    assert environment("cuda", 4, "default") == {
        "OMP_NUM_THREADS": "4",
        "TRITON_INTERPRET": None,
        "TORCHDYNAMO_DISABLE": None,
        **dict.fromkeys(THRESHOLDS),
    }


def test_pages_have_the_tables_of_the_results() -> None:
    assert "--seq 1024" in table.text()
    for name, tables in table.PAGES.items():
        page = (ROOT / name).read_text(encoding="utf-8")
        assert table.put(page, tables()) == page, name
