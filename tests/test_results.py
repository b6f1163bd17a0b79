"""What each command ends with under `--json`, and what it says of what it chose by itself."""

import json
from pathlib import Path
from typing import Any

import pytest

from eagle3fn.cli import COMMANDS, main
from eagle3fn.use.model_card import read_facts
from tests.factories import write_talks
from tests.small_run import write_run

UNROLL = 3
SETTINGS = (
    "train.steps=2",
    "train.eval_every=1",
    "data.held_out=2",
    "data.global_batch=2",
    f"objective.ttt_length={UNROLL}",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, conversations, prompts, features, a map and a finished run."""
    root = tmp_path_factory.mktemp("results")
    write_run(root)
    (root / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    assert main(arguments(root, "train")) == 0
    return root


def arguments(root: Path, command: str) -> list[str]:
    """A call of each command on the world's files, which writes into its folder `out`."""
    target = ["--target", root / "target"]
    talks = ["--conversations", root / "talks.jsonl"]
    draft = ["--draft", root / "run/draft"]
    out = root / "out"
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    words: dict[str, list[object]] = {
        "synthesize": [*target, "--count", 2, "--batch", 4, "--out", out / "new.jsonl"],
        "regenerate": [*target, *talks, "--max-new", 4, "--out", out / "own.jsonl"],
        "inspect": [*target, *talks],
        "extract": [*target, *talks, "--out", out / "features"],
        "vocab": [*target, "--features", root / "features", "--out", out / "map", "--size", 64],
        "train": [
            *target,
            *("--features", root / "features", "--vocab", root / "vocab.safetensors"),
            *("--out", root / "run", *settings),
        ],
        "plan": target,
        "evaluate": [
            *(*target, *draft, "--prompts", root / "prompts.jsonl", "--max-new", 4),
            *("--out", out / "evaluation.json"),
        ],
        "report": ["--run", root / "run"],
        "export": [*target, *draft, "--for", "vllm", "--out", out / "vllm"],
        "convert": ["--features", root / "features", "--for", "specforge", "--out", out / "ckpt"],
        "completion": ["bash"],
    }
    return [command, *map(str, words[command])]


EXPECTED: dict[str, dict[str, Any]] = {
    "synthesize": {},
    "regenerate": {"conversations": 10},
    "inspect": {"rows": 10, "samples": 10},
    "extract": {"samples": 10, "remaining": 0},
    "vocab": {"draft_vocab_size": 64, "vocab_size": 300},
    "train": {"step": 2, "total": 2, "ended": "steps", "signal": None},
    "plan": {"ranks": 1},
    "evaluate": {"draft_length": UNROLL, "lossless": True, "tasks": 1},
    "report": {"steps": 2},
    "export": {"for": "vllm"},
    "convert": {"samples": 10},
    "completion": {"shell": "bash"},
}


def test_every_command_is_tried() -> None:
    """But parity, which needs SpecForge: tests/specforge/test_parity_command.py tries that."""
    assert {command.name for command in COMMANDS} - set(EXPECTED) == {"parity"}


@pytest.mark.parametrize("command", EXPECTED)
def test_a_command_ends_with_one_line_of_json(world, capsys, command):
    (world / "out").mkdir(exist_ok=True)
    capsys.readouterr()
    assert main([*arguments(world, command), "--json"]) == 0
    printed = capsys.readouterr()
    (line,) = printed.out.splitlines()
    found = json.loads(line)
    assert EXPECTED[command].items() <= found.items()
    assert found.get("conversations", 10) >= 2
    assert printed.err, "what people read is on stderr"
    for name in ("out", "draft"):
        if found.get(name):
            assert Path(found[name]).exists()
    if command == "train":
        assert found["held_out_accepted_length"] > 0


# What is chosen, and said


def test_the_longest_sample_is_the_targets_limit_and_said(world, capsys):
    read = ["--target", str(world / "target"), "--conversations", str(world / "talks.jsonl")]
    limit = json.loads((world / "target/config.json").read_text())["max_position_embeddings"]
    said = f"--max-length is {limit}: the target takes {limit} tokens"

    assert limit < 2048
    for command, out in (("inspect", []), ("vocab", ["--out", str(world / "counted")])):
        capsys.readouterr()
        assert main([command, *read, *out]) == 0
        assert said in capsys.readouterr().out
        assert main([command, *read, *out, "--max-length", str(limit)]) == 0
        assert "--max-length is" not in capsys.readouterr().out
        assert main([command, *read, *out, "--max-length", str(limit + 1)]) == 2
        assert f"set --max-length to at most {limit}" in capsys.readouterr().err


def test_the_draft_length_is_the_trained_unroll_and_prompts_are_shown(world, capsys):
    assert read_facts(world / "run/draft").unroll == UNROLL
    assert main(arguments(world, "evaluate")) == 0
    text = capsys.readouterr().out
    assert f"--draft-length is {UNROLL}, which the draft was trained with\n" in text
    (line,) = [line for line in text.splitlines() if line.startswith("prompts go into")]
    assert "PROMPT" in line and str(world / "target") in line

    (world / "run/untrained/README.md").unlink(missing_ok=True)
    words = arguments(world, "evaluate")
    words[words.index("--draft") + 1] = str(world / "run/untrained")
    assert main(words) == 0
    assert "--draft-length is 7, as its card names no trained unroll" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "command", "rows", "message"),
    [
        ("--prompts", "evaluate", '"hello"\n', 'not a JSON object, such as {"prompt": "hello"}'),
        ("--exclude", "regenerate", '["hello"]', 'not a JSON object, such as {"text": "hello"}'),
        ("--conversations", "inspect", '["hello"]', "must be a JSON object"),
        ("--prompts", "evaluate", '{\n "prompt": "hello"\n}', "write one object a line"),
        ("--system", "synthesize", '{\n "system": "hello"\n}', "write one object a line"),
        ("--draft-config", "train", "{}\n{}\n", "it must be one value, not JSONL's one a line"),
    ],
)
def test_rows_of_another_shape_are_refused_with_the_right_one(
    world, tmp_path, capsys, option, command, rows, message
):
    path = write_talks(tmp_path / "rows.jsonl", 1)
    path.write_text(rows)
    capsys.readouterr()
    assert main([*arguments(world, command), option, str(path)]) == 2
    assert message in capsys.readouterr().err
