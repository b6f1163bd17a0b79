"""Updates of SpecForge's script against ours on random features: what is claimed, and when."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from bench import launch, replacements, specforge_script, updates
from bench.problem import draft_of
from bench.random_run import target_tree
from bench.recipe_step import DRAFT
from bench.specforge_data import draft_tree
from eagle3fn.base.read import read_json
from eagle3fn.specforge import script
from eagle3fn.specforge.oracle import Oracle
from eagle3fn.train.track import append_row

ROOT = Path(__file__).resolve().parents[2]


def options(out: Path) -> Any:
    words = ["--device", "cpu", "--out", str(out), "--updates", "3", "--seconds", "600"]
    return updates.parse(words)


def test_both_sides_are_equal_and_result_names_what_was_replaced(
    commit: Oracle, tmp_path: Path
) -> None:
    with patch("tempfile.tempdir", str(tmp_path)):
        result = updates.measure(commit, options(tmp_path / "r.json"))
    assert result["equal"] and result["complete"] and result["nontrivial"]
    assert result["faults"] == []
    assert result["steps"] == [3, 3] and result["level"] == 2 and result["updates"] == 3
    assert result["state_equal"] == dict.fromkeys(("weights", "masters", "mu", "nu"), True)
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(result))
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    replaced = [one.about for one in replacements.replacements(commit, "cpu", None)]
    files = [specforge_script.NOT_SAVED, updates.OUR_FILES]
    assert result["replaced"] == [*replaced, *files]


@pytest.mark.parametrize(
    "change",
    [["--learning-rate", "1.0000001e-3"], ["--seed", "1"], ["--warmup-ratio", "0.5"]],
)
def test_difference_on_one_side_is_found(commit: Oracle, tmp_path: Path, change: list[str]) -> None:
    result = updates.measure(commit, options(tmp_path / "r.json"), change)
    assert not result["equal"] and result["faults"] == [] and result["unequal_values"] > 0
    assert not result["state_equal"]["masters"] and not read_json(tmp_path / "r.json")["equal"]


def test_fault_of_ours_keeps_specforges_rows(commit: Oracle, tmp_path: Path) -> None:
    result = updates.measure(commit, options(tmp_path / "r.json"), ["--batch-size", "0"])
    assert [fault["where"] for fault in result["faults"]] == ["ours"]
    assert "--batch-size = 0" in result["faults"][0]["traceback"]
    assert result["steps"] == [3, 0] and not result["equal"]
    assert read_json(tmp_path / "r.json") == json.loads(json.dumps(result))


def test_fault_of_specforge_keeps_our_rows(commit: Oracle, tmp_path: Path) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("planted")

    with patch.object(specforge_script, "row_of", broken):
        result = updates.measure(commit, options(tmp_path / "r.json"))
    assert [fault["where"] for fault in result["faults"]] == ["SpecForge"]
    text = result["faults"][0]["traceback"]
    assert "planted" in text and "its output ends" in text
    assert result["steps"] == [0, 3] and not result["equal"] and not dist.is_initialized()


SLOW = """
import sys, threading
from pathlib import Path
from bench.stages import Stages

root = Path(sys.argv[1])
(root / "work").mkdir()
(root / "log").write_text("last words")
stages = Stages(
    root / "r.json",
    {"device": "cpu"},
    seconds=float(sys.argv[2]),
    more=lambda result: {"equal": False},
    report=lambda result: print("faults:", len(result["faults"]), flush=True),
    remove=root / "work",
    logs={"slow": root / "log"},
)
with stages.stage("quick"):
    raise ValueError("planted")
with stages.stage("slow"):
    while True:
        (root / "work").mkdir(exist_ok=True)
"""


def test_result_has_the_stack_when_time_is_up(tmp_path: Path) -> None:
    call = [sys.executable, "-c", SLOW, str(tmp_path), "0.5"]
    done = subprocess.run(call, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == "faults: 2\n", done.stderr
    result = read_json(tmp_path / "r.json")
    assert not result["complete"] and not (tmp_path / "work").exists()
    assert [fault["where"] for fault in result["faults"]] == ["quick", "slow"]
    text = result["faults"][1]["traceback"]
    assert 'File "<string>"' in text and "last words" in text
    assert "not finished within 0.5 s" in text
    assert "planted" in result["faults"][0]["traceback"]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--updates", "0"], "--updates 0"),
        (["--seconds", "-1"], "--seconds -1"),
        (["--length", "3"], "--length 3"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_one_line_of_error_where_nothing_can_be_compared(
    more: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with patch.object(torch.cuda, "is_available", lambda: False):
        assert updates.main(["--device", "cpu", "--out", str(tmp_path / "r.json"), *more]) == 2
    line = capsys.readouterr().err
    assert named in line and line.count("\n") == 1 and not (tmp_path / "r.json").exists()


def test_another_script_is_refused_in_one_line(
    commit: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = ["--device", "cpu", "--out", str(tmp_path / "r.json")]
    other = {"train_eagle3.py": "0" * 64}
    with patch.object(specforge_script, "SCRIPTS", other):
        assert updates.main(out) == 2
    assert "set SPECFORGE_SRC" in capsys.readouterr().err and not (tmp_path / "r.json").exists()


def test_card_with_less_memory_gets_a_smaller_draft(tmp_path: Path) -> None:
    options = updates.parse(["--device", "cuda", "--out", str(tmp_path / "r.json")])
    with patch.object(torch.cuda, "mem_get_info", lambda: (80e9, 80e9)):
        assert updates.sizes_of(options) == (updates.SIZES["cuda"], None)
    with patch.object(torch.cuda, "mem_get_info", lambda: (24e9, 80e9)):
        sizes, why = updates.sizes_of(options)
    assert sizes == updates.SMALLER and why is not None and "22 GiB" in why


def test_on_cuda_draft_is_the_recipes_and_kernels_are_compiled() -> None:
    draft = draft_of(updates.SIZES["cuda"].shape, None, updates.SIZES["cuda"].length)
    made = draft_tree(target_tree(draft), draft.draft_vocab_size)
    recipe = read_json(DRAFT)
    for name in recipe.keys() - {"max_position_embeddings", "torch_dtype"}:
        assert made[name] == recipe[name], name

    card = launch.exact("cuda", 1, "raised")
    cpu = launch.exact("cpu", 1, "raised")
    assert card["TRITON_INTERPRET"] is None and cpu["TRITON_INTERPRET"] == "1"
    assert card["TORCHDYNAMO_DISABLE"] == cpu["TORCHDYNAMO_DISABLE"] == "1"
    assert card["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert launch.environment("cuda", 1, "raised")["TORCHDYNAMO_DISABLE"] is None


def test_script_trains_on_the_named_device() -> None:
    places = ["--target-model-path", "t", "--train-data-path", "c", "--output-dir", "o"]
    found = script.parser().parse_args(places)
    draft = draft_of("tiny", None, 40)
    for has_card, named, device in (
        (True, "cpu", "cpu"),
        (True, None, "cuda"),
        (False, None, "cpu"),
    ):
        with patch.object(torch.cuda, "is_available", lambda has_card=has_card: has_card):
            assert script.config_of(found, draft, 5, 1, named).train.device == device


def test_exit_code_is_0_if_equal_else_1(
    commit: Oracle, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    names = {"steps": [3, 3], "unequal_values": 0, "first_difference": None, "seconds": {}}
    out = ["--device", "cpu", "--out", str(tmp_path / "r.json")]
    was = torch.are_deterministic_algorithms_enabled()
    try:
        for equal, faults, code in (
            (True, [], 0),
            (False, [{"where": "ours", "traceback": "here"}], 1),
        ):
            found = names | {"equal": equal, "faults": faults}
            with patch.object(updates, "measure", lambda *_, found=found, **__: found):
                assert updates.main(out) == code
            shown = capfd.readouterr()
            summary = json.loads(shown.out.splitlines()[-1])
            assert summary["equal"] == equal and summary["faults"] == len(faults)
            assert ("here" in shown.err) == bool(faults)
    finally:
        torch.use_deterministic_algorithms(was)


@pytest.mark.parametrize(
    ("change", "equal"),
    [
        ({}, True),
        ({"faults": [{"where": "ours", "traceback": ""}]}, False),
        ({"updates": 3}, False),
        ({"state_equal": {"weights": True, "nu": False}}, False),
        ({"state_equal": {"compared": False}}, False),
        ({"ours": {"grad_norm": 2.5}}, False),
        ({"ours": {"losses": [0.5, 0.25]}}, False),
        ({"both": {"grad_norm": 0.0}}, False),
        ({"both": {"loss": 1.0}}, False),
    ],
)
def test_equal_needs_a_whole_run_whose_losses_move(
    change: dict, equal: bool, tmp_path: Path
) -> None:
    for side in ("specforge", "ours"):
        (tmp_path / side).mkdir()
        for step in (1, 2):
            row = {"step": step, "loss": 1 / step, "grad_norm": 2.0, "learning_rate": 0.1}
            row |= {name: [0.5, 0.75] for name in ("losses", "accuracy", "acceptance")}
            row |= change.get("both", {}) | change.get(side, {})
            append_row(tmp_path / side / "metrics.jsonl", row)
    result = {"faults": [], "updates": 2, "state_equal": {"weights": True, "nu": True}} | change
    assert updates.judged(result, tmp_path)["equal"] is equal
