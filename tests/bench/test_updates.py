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

from bench import launch, replacements, updates
from bench import specforge_script as old_script
from bench.problem import draft_of
from bench.random_run import target_tree
from bench.recipe_step import DRAFT
from bench.specforge_data import draft_tree
from eagle3fn.base.files import read_json
from eagle3fn.specforge import script
from eagle3fn.specforge.oracle import Oracle
from eagle3fn.train.track import append_row

ROOT = Path(__file__).resolve().parents[2]


def options(out: Path, *more: str) -> Any:
    return updates.parse(
        ["--device", "cpu", "--out", str(out), "--updates", "3", "--seconds", "600", *more]
    )


def test_both_sides_are_equal_and_the_result_tells_how(commit: Oracle, tmp_path: Path) -> None:
    with patch("tempfile.tempdir", str(tmp_path)):
        result = updates.measure(commit, options(tmp_path / "r.json"))
    assert (
        result["equal"] and result["complete"] and result["nontrivial"] and result["faults"] == []
    )
    assert result["steps"] == [3, 3] and result["level"] == 2 and result["updates"] == 3
    assert result["state_equal"] == dict.fromkeys(("weights", "masters", "mu", "nu"), True)
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(result))
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    said = [chosen.said for chosen in replacements.replacements(commit, "cpu", None)]
    files = [old_script.NOT_SAVED, updates.OUR_FILES]
    assert result["replaced"] == [*said, *files]


@pytest.mark.parametrize(
    "change",
    [["--learning-rate", "1.0000001e-3"], ["--seed", "1"], ["--warmup-ratio", "0.5"]],
)
def test_a_difference_on_one_side_is_seen(
    commit: Oracle, tmp_path: Path, change: list[str]
) -> None:
    result = updates.measure(commit, options(tmp_path / "r.json"), change)
    assert not result["equal"] and result["faults"] == [] and result["unequal_values"] > 0
    assert not result["state_equal"]["masters"] and not read_json(tmp_path / "r.json")["equal"]


def test_a_fault_of_ours_leaves_the_other_sides_rows(commit: Oracle, tmp_path: Path) -> None:
    result = updates.measure(commit, options(tmp_path / "r.json"), ["--batch-size", "0"])
    assert [fault["where"] for fault in result["faults"]] == ["ours"]
    assert "--batch-size = 0" in result["faults"][0]["traceback"]
    assert (
        result["steps"] == [3, 0]
        and not result["equal"]
        and read_json(tmp_path / "r.json") == json.loads(json.dumps(result))
    )


def test_a_fault_of_specforge_leaves_our_rows(commit: Oracle, tmp_path: Path) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("planted")

    with patch.object(old_script, "row_of", broken):
        result = updates.measure(commit, options(tmp_path / "r.json"))
    assert [fault["where"] for fault in result["faults"]] == ["SpecForge"]
    assert (
        "planted" in result["faults"][0]["traceback"]
        and "its output ends" in result["faults"][0]["traceback"]
    )
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
    tell=lambda result: print("faults:", len(result["faults"]), flush=True),
    remove=root / "work",
    logs={"slow": root / "log"},
)
with stages.stage("quick"):
    raise ValueError("planted")
with stages.stage("slow"):
    while True:
        (root / "work").mkdir(exist_ok=True)
"""


def test_when_time_is_up_the_result_says_where_it_was(tmp_path: Path) -> None:
    call = [sys.executable, "-c", SLOW, str(tmp_path), "0.5"]
    done = subprocess.run(call, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == "faults: 2\n", done.stderr
    result = read_json(tmp_path / "r.json")
    assert not result["complete"] and not (tmp_path / "work").exists()
    assert [fault["where"] for fault in result["faults"]] == ["quick", "slow"]
    text = result["faults"][1]["traceback"]
    assert (
        'File "<string>"' in text and "not finished within 0.5 s" in text and "last words" in text
    )
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
def test_without_anything_to_compare_one_line_says_why(
    more: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with patch.object(torch.cuda, "is_available", lambda: False):
        assert updates.main(["--device", "cpu", "--out", str(tmp_path / "r.json"), *more]) == 2
    line = capsys.readouterr().err
    assert named in line and line.count("\n") == 1 and not (tmp_path / "r.json").exists()


def test_a_missing_checkout_or_script_is_one_line(
    commit: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = ["--device", "cpu", "--out", str(tmp_path / "r.json")]
    other = {"train_eagle3.py": "0" * 64}
    with patch.object(old_script, "SCRIPTS", other):
        assert updates.main(out) == 2
    assert "set SPECFORGE_SRC" in capsys.readouterr().err and not (tmp_path / "r.json").exists()


def test_a_card_with_less_memory_gets_a_smaller_draft(tmp_path: Path) -> None:
    asked = updates.parse(["--device", "cuda", "--out", str(tmp_path / "r.json")])
    with patch.object(torch.cuda, "mem_get_info", lambda: (80e9, 80e9)):
        assert updates.sizes_of(asked) == (updates.SIZES["cuda"], None)
    with patch.object(torch.cuda, "mem_get_info", lambda: (24e9, 80e9)):
        sizes, why = updates.sizes_of(asked)
    assert sizes == updates.SMALLER and why is not None and "22 GiB" in why


def test_on_cuda_the_draft_is_the_recipes_and_no_kernel_is_interpreted() -> None:
    draft = draft_of(updates.SIZES["cuda"].shape, None, updates.SIZES["cuda"].length)
    made, recipe = draft_tree(target_tree(draft), draft.draft_vocab_size), read_json(DRAFT)
    free = {"max_position_embeddings", "torch_dtype"}
    assert {name: made[name] for name in recipe.keys() - free} == {
        name: recipe[name] for name in recipe.keys() - free
    }
    card, none = (launch.exact(device, 1, "raised") for device in ("cuda", "cpu"))
    assert card["TRITON_INTERPRET"] is None and none["TRITON_INTERPRET"] == "1"
    assert card["TORCHDYNAMO_DISABLE"] == none["TORCHDYNAMO_DISABLE"] == "1"
    assert card["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert launch.environment("cuda", 1, "raised")["TORCHDYNAMO_DISABLE"] is None


def test_our_script_trains_where_it_is_told() -> None:
    places = ["--target-model-path", "t", "--train-data-path", "c", "--output-dir", "o"]
    found = script.parser().parse_args(places)
    draft = draft_of("tiny", None, 40)
    for seen, asked, device in ((True, "cpu", "cpu"), (True, None, "cuda"), (False, None, "cpu")):
        with patch.object(torch.cuda, "is_available", lambda seen=seen: seen):
            assert script.config_of(found, draft, 5, 1, asked).train.device == device


def test_exit_codes_tell_equal_from_unequal(
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
        ({"new": {"grad_norm": 2.5}}, False),
        ({"new": {"losses": [0.5, 0.25]}}, False),
        ({"both": {"grad_norm": 0.0}}, False),
        ({"both": {"loss": 1.0}}, False),
    ],
)
def test_equal_is_claimed_of_a_whole_and_moving_run_alone(
    change: dict, equal: bool, tmp_path: Path
) -> None:
    for side in ("old", "new"):
        (tmp_path / side).mkdir()
        for step in (1, 2):
            lists = {name: [0.5, 0.75] for name in ("losses", "accuracy", "acceptance")}
            row = {"step": step, "loss": 1 / step, "grad_norm": 2.0, "learning_rate": 0.1} | lists
            row |= change.get("both", {}) | (change.get("new", {}) if side == "new" else {})
            append_row(tmp_path / side / "metrics.jsonl", row)
    result = {"faults": [], "updates": 2, "state_equal": {"weights": True, "nu": True}} | change
    assert updates.judged(result, tmp_path)["equal"] is equal
