"""docs/getting-started.md: the five commands from prompts to a draft, run on a tiny target."""

import json
import re
import shlex
from pathlib import Path

import pytest

from eagle3fn.base.read import read_jsonl
from eagle3fn.cli import main
from tests.factories import tiny_model, tiny_tokenizer

PAGE = Path(__file__).resolve().parent.parent / "docs/getting-started.md"

TINY = {
    "regenerate": ["--max-new", "12"],
    "extract": [],
    "vocab": ["--size", "200"],
    "train": [
        word
        for setting in (
            "train.steps=2",
            "train.eval_every=2",
            "data.held_out=1",
            "data.global_batch=2",
            "objective.ttt_length=2",
        )
        for word in ("--set", setting)
    ],
    "evaluate": ["--max-new", "6", "--draft-length", "2"],
}
"""By command, what makes it quick; it is added to the page's line."""


def block(kind: str) -> str:
    """The page's first block of a kind."""
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)[0]


def test_five_commands_lead_from_own_conversations_to_a_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model(eos_token_id=1, num_hidden_layers=7, max_position_embeddings=2048)
    model.save_pretrained("target")
    tiny_tokenizer().save_pretrained("target")
    Path("PROMPTS.jsonl").write_text(block("json"), encoding="utf-8")
    Path("TEST.jsonl").write_text(json.dumps({"prompt": "hello"}) + "\n")

    lines = block("bash").replace("\\\n", " ").splitlines()
    assert len(lines) == 5
    for line in lines:
        program, command, *words = shlex.split(line)
        assert program == "eagle3fn"
        place = words.index("--target") + 1
        words[place] = "target"
        if "--minutes" in words:  # the number of steps is named in its place
            place = words.index("--minutes")
            del words[place : place + 2]
        assert main([command, *words, *TINY[command]]) == 0, capsys.readouterr().err

    # Each row has the target's own answers, and the draft was evaluated.
    rows = read_jsonl("run/chats.jsonl")
    assert len(rows) == 4
    assert "Seven minutes." not in json.dumps(rows)
    assert {"config.json", "model.safetensors"} <= {
        path.name for path in Path("run/train/draft").iterdir()
    }
    assert json.loads(Path("run/evaluation.json").read_text())["lossless"]
