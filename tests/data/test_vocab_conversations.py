"""`eagle3fn vocab --conversations`: the map that features of the same conversations give."""

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from eagle3fn.cli import main
from eagle3fn.data.vocab import load_map, read_map
from tests.factories import CHATML, talk, tiny_model, tiny_tokenizer, write_talks

TEMPLATE = "{{ mark | default('') }}" + CHATML
KNOWN_FROM_FEATURES = {"choices_held_out", "choices_counted"}
"""What a map's file says of its target's hidden states."""


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    """A tiny target with as many layers as the default taps need."""
    folder = tmp_path_factory.mktemp("target")
    model = tiny_model(eos_token_id=1, num_hidden_layers=7)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    tiny_tokenizer(TEMPLATE).save_pretrained(folder)
    return folder


def call(target: Path, command: str, *arguments: object) -> int:
    """`eagle3fn COMMAND --target …` in this process; its exit code."""
    return main([command, "--target", str(target), *map(str, arguments)])


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, code: int) -> str:
    """The one line of a command that ended with exit code 2 and wrote nothing."""
    error = capsys.readouterr().err
    assert code == 2
    assert len(error.splitlines()) == 1
    assert not list(folder.glob("map*"))
    return error


# The same map

GOOD = st.builds(
    lambda question, answer: {"messages": talk(question, answer)},
    st.text("abc", min_size=1, max_size=9),
    st.text("defghijkl", min_size=1, max_size=60),
)
NO_SAMPLE = st.just({"messages": talk("a")})
BAD = st.just({"messages": 3})


@given(
    rows=st.lists(st.one_of(GOOD, GOOD, GOOD, NO_SAMPLE, BAD), min_size=4, max_size=9),
    max_length=st.sampled_from([24, 128]),
    limit=st.none() | st.integers(3, 6),
    mark=st.sampled_from(["", "xyz"]),
    size=st.none() | st.integers(2, 12),
    held_out=st.integers(0, 1),
)
@settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # an example takes half a second: no shrinking
)
def test_map_is_the_one_that_is_counted_on_features(
    target, rows, max_length, limit, mark, size, held_out
):
    rows = [{"messages": talk("a", "b")}, {"messages": talk("a", "defghijkl" * 3)}, *rows]
    reading = ["--max-length", max_length, "--skip-bad", 1, "--template-arg", f"mark={mark}"]
    reading += [] if limit is None else ["--limit", limit]
    making = ["--held-out", held_out]
    making += [] if size is None else ["--size", size]
    with TemporaryDirectory() as folder:
        world = Path(folder)
        talks = world / "talks.jsonl"
        talks.write_text("".join(json.dumps(row) + "\n" for row in rows))
        read = ["--conversations", talks, *reading]
        features = ["--features", world / "features"]
        extract = ["--out", world / "features", "--threads", 1]
        assert call(target, "extract", *read, *extract) == 0
        assert call(target, "vocab", *features, "--out", world / "stored", *making) == 0
        assert call(target, "vocab", *read, "--out", world / "map", *making) == 0

        stored = read_map(world / "stored")
        made = read_map(world / "map")
        rejects = world / "features/rejects.jsonl"
        assert (world / "map.rejects.jsonl").read_bytes() == rejects.read_bytes()

    assert made.tensors.keys() == stored.tensors.keys()
    for name, tensor in made.tensors.items():
        assert torch.equal(tensor, stored.tensors[name])
    known = {key: stored.provenance[key] for key in stored.provenance.keys() - KNOWN_FROM_FEATURES}
    assert made.provenance == known
    assert made.provenance["samples"] and made.provenance["held_out"] == held_out


def test_run_on_the_features_knows_the_map(target, tmp_path, capsys):
    talks = write_talks(tmp_path / "talks.jsonl", 10)
    read = ["--conversations", talks, "--max-length", 128]
    assert call(target, "extract", *read, "--out", tmp_path / "features", "--threads", 1) == 0
    assert call(target, "vocab", *read, "--out", tmp_path / "map", "--held-out", 3) == 0
    assert len(load_map(tmp_path / "map").d2t) == 300
    capsys.readouterr()

    data = ["--features", tmp_path / "features", "--vocab", tmp_path / "map"]
    steps = ["--set", "train.steps=1", "--set", "objective.ttt_length=2", "--threads", 1]
    assert call(target, "train", *data, "--out", tmp_path / "run", *steps, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "data.held_out=3 (those that the vocabulary map was not counted on)" in said
    assert "counted on other samples" not in said


# What is said


def test_what_was_left_out_is_said_as_extraction_says_it(target, tmp_path, capsys):
    rows = [{"messages": talk("a", "b")}] * 3
    rows += [{"messages": talk("a")}, {"messages": 3}, {"messages": talk("a", "b"), "colour": 1}]
    talks = tmp_path / "talks.jsonl"
    talks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = ["--conversations", talks, "--max-length", 128, "--skip-bad", 0.5]
    assert call(target, "extract", *read, "--out", tmp_path / "features", "--threads", 1) == 0
    extracted = capsys.readouterr().out
    assert call(target, "vocab", *read, "--out", tmp_path / "map", "--held-out", 1) == 0
    said = capsys.readouterr().out

    rejects = (str(tmp_path / "features/rejects.jsonl"), f"{tmp_path / 'map'}.rejects.jsonl")
    for line in (
        f"1 of 6 rows are bad, written to {rejects[0]}\n",
        "1 of 6 conversations dropped: 1 have no assistant turn\n",
        "keys that are not read: colour (1)\n",
    ):
        assert line in extracted
        assert line.replace(*rejects) in said

    # The target's own choices are in its hidden states.
    assert "own choices in them are not counted" in said
    assert "eagle3fn vocab --features counts them" in said
    assert "of the target's own choices in them, at" not in said


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "1 of 2 rows is bad: .*talks.jsonl:2: .*--skip-bad 0.05"),
        (["--skip-bad", 0], "1 of 2 rows is bad, more than the share 0 that is left out"),
    ],
)
def test_bad_rows_beyond_the_share_are_refused(target, tmp_path, capsys, options, message):
    talks = tmp_path / "talks.jsonl"
    rows = [{"messages": talk("a", "b")}, {"messages": 3}]
    talks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = ["--conversations", talks, "--max-length", 128, *options, "--out", tmp_path / "map"]
    assert re.search(message, refusal(capsys, tmp_path, call(target, "vocab", *read)))


@pytest.mark.parametrize("option", ["--max-length=9", "--limit=3", "--skip-bad", "--template-arg"])
def test_options_of_conversations_are_refused_with_features(target, tmp_path, capsys, option):
    value = ["a=1"] if option == "--template-arg" else []
    features = ["--features", tmp_path / "features", option, *value]
    error = refusal(capsys, tmp_path, call(target, "vocab", *features, "--out", tmp_path / "map"))
    assert f"{option.partition('=')[0]}: the samples of --features were made with their" in error
    assert "name --conversations" in error


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ([], "one of the arguments --features --conversations is required"),
        (["--features", "f", "--conversations", "c"], "not allowed with argument --features"),
    ],
)
def test_either_features_or_conversations_must_be_named(target, capsys, given_, message):
    with pytest.raises(SystemExit) as ended:
        call(target, "vocab", *given_, "--out", "map")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_prompts_without_answers_are_refused_with_the_way_to_answers(target, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello"}\n{"prompt": "why"}\n')
    read = ["--conversations", prompts, "--max-length", 128, "--out", tmp_path / "map"]
    error = refusal(capsys, tmp_path, call(target, "vocab", *read))
    assert "no sample: 2 of 2 conversations dropped: 2 have no assistant turn; " in error
    assert re.search(r"eagle3fn regenerate \(.* --limit 500\)", error)
    assert "train --online lets the target write them by --generate" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-length", 257], "max_length = 257: the target's max_position_embeddings is 256"),
        (["--max-length", 128, "--size", 301], r"draft_vocab_size = 301: must be in \[1, 300\]"),
        (["--max-length", 128, "--size", 1], "draft_vocab_size = 1: must be at least 2"),
    ],
)
def test_impossible_sizes_are_refused_before_conversations_are_read(
    target, tmp_path, capsys, options, message
):
    talks = tmp_path / "talks.jsonl"
    talks.write_text("not JSON\n")
    read = ["--conversations", talks, *options, "--out", tmp_path / "map"]
    assert re.search(message, refusal(capsys, tmp_path, call(target, "vocab", *read)))


def test_bad_rows_do_not_replace_the_conversations(target, tmp_path, capsys):
    talks = write_talks(tmp_path / "a.rejects.jsonl", 3)
    before = talks.read_bytes()
    read = ["--conversations", talks, "--max-length", 128, "--skip-bad"]
    error = refusal(capsys, tmp_path, call(target, "vocab", *read, "--out", tmp_path / "a"))
    assert "a.rejects.jsonl: is --conversations too, and would replace it" in error
    assert talks.read_bytes() == before
    assert not (tmp_path / "a").exists()
