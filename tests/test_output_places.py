"""Outputs that are inputs, or hold what no command wrote, are refused before anything is read."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eagle3fn.cli import main
from eagle3fn.data.parts import check_out_conversations
from eagle3fn.data.vocab import read_map, save_map
from eagle3fn.use.convert import check_out_map
from eagle3fn.use.evaluation_file import check_out_evaluation
from tests.factories import make_map

HELD = "TARGET/config.json TARGET/model.safetensors talks.jsonl prompts.jsonl features/index.json"
EVALUATE = "evaluate --target TARGET --draft draft --prompts prompts.jsonl"
VOCAB = "vocab --target TARGET --features features"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files of a user's, none of which any command should change."""
    monkeypatch.chdir(tmp_path)
    for name in HELD.split():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("mine\n")
    save_file({"weight": torch.zeros(2)}, "TARGET/model.safetensors")
    Path("draft").mkdir()
    Path("link").symlink_to("TARGET")
    os.link("prompts.jsonl", "hard.jsonl")
    row = {"id": "a", "conversations": [{"role": "user", "content": "x"}]}
    Path("talks.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def refused(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with; nothing was changed."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert main(line.split()) == 2
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1
    return text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{VOCAB} --out TARGET/model.safetensors", "--out .*: lies in the target's folder"),
        (f"{VOCAB} --out link/new", "--out link/new: lies in the target's folder"),
        (f"{VOCAB} --out features", "--out features: is --features too, and would replace it"),
        (
            "regenerate --target TARGET --conversations prompts.jsonl --out prompts.jsonl",
            "--out prompts.jsonl: is --conversations too",
        ),
        (
            "regenerate --target TARGET --conversations prompts.jsonl --out hard.jsonl",
            "--out hard.jsonl: is --conversations too",
        ),
        (
            "synthesize --target TARGET --exclude talks.jsonl --out talks.jsonl",
            "--out talks.jsonl: is --exclude too",
        ),
        (f"{EVALUATE} --out e.json --plain ./e.json", "--plain ./e.json: is --out too"),
        (f"{EVALUATE} --out TARGET/config.json", "--out .*: lies in the target's folder"),
        (f"{EVALUATE} more.jsonl --out more.jsonl", "--out more.jsonl: is --prompts number 2 too"),
        (f"{EVALUATE} --out e.json --plain prompts.jsonl", "--plain .*: is --prompts too"),
        (
            "extract --target TARGET --conversations talks.jsonl --out link",
            "--out link: is --target too",
        ),
        (
            "train --target TARGET --features features --vocab map --out features",
            "--out features: is --features too",
        ),
        ("export --draft draft --for eagle --out draft", "--out draft: is --draft too"),
        ("convert --vocab talks.jsonl --out talks.jsonl", "--out talks.jsonl: is --vocab too"),
    ],
)
def test_an_output_that_is_an_input_is_refused(folder, capsys, line, message):
    assert re.search(message, refused(line, capsys))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{VOCAB} --out talks.jsonl", "talks.jsonl: is there and no older map"),
        (f"{VOCAB} --out weights", "weights: is there and no older map"),
        (
            "synthesize --target TARGET --out talks.jsonl",
            "talks.jsonl: holds rows that eagle3fn did not write",
        ),
        (
            "train --target TARGET --features features --vocab map --out talks.jsonl",
            "talks.jsonl: is a file; name a folder",
        ),
        (f"{EVALUATE} --out talks.jsonl", "talks.jsonl: is there and no older evaluation"),
        (f"{EVALUATE} --out mine.json", "mine.json: is there and no older evaluation"),
    ],
)
def test_a_file_that_no_command_wrote_is_not_replaced(folder, capsys, line, message):
    os.rename("TARGET/model.safetensors", "weights")
    Path("mine.json").write_text('{"mine": 1}')
    assert message in refused(line, capsys)


def test_older_outputs_may_be_replaced(folder):
    for row in ({"id": "0-17"}, {"id": "a", "answers": 1, "cut": 0}):
        Path("own.jsonl").write_text(json.dumps(row) + "\n")
        check_out_conversations("own.jsonl")
    save_map("map", make_map(64, 16, torch.Generator()), {})
    check_out_map("map", "eagle3fn", read_map)
    Path("e.json").write_text(json.dumps({"draft_length": 7, "accepted_length": 2.0}))
    check_out_evaluation("e.json")
    for check in (check_out_conversations, check_out_evaluation):
        Path("empty").touch()
        check("empty")
