"""`eagle3fn inspect`: what it shows of samples, and its numbers."""

import json

import pytest
import torch

from eagle3fn.base.errors import UserError
from eagle3fn.base.types import VocabMap
from eagle3fn.cli import main
from eagle3fn.data.encode import encode_all
from eagle3fn.data.extract import extract
from eagle3fn.data.feature_size import bytes_per_token
from eagle3fn.data.features import open_features
from eagle3fn.data.inspection import describe, inspect_file, numbers, show_sample
from eagle3fn.data.samples import SampleMaker
from eagle3fn.data.sources import model_source
from eagle3fn.data.storage import STORES
from tests.factories import talk, tiny_model, tiny_template, tiny_tokenizer, write_talks

TEMPLATE = tiny_template()
MAKER = SampleMaker(TEMPLATE, 90)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_numbers_are_those_of_the_samples(tmp_path):
    path = write_talks(tmp_path / "c.jsonl", 8)
    found = inspect_file(MAKER, path)
    samples = encode_all(MAKER, path, 300)
    lengths = sorted(len(sample.input_ids) for sample in samples)
    assert found.samples == 8
    assert found.tokens == sum(lengths)
    assert found.supervised == sum(int(sample.token_mask.sum()) for sample in samples)
    assert (found.longest, found.long_length) == (lengths[-1], lengths[7])
    assert found.full == lengths.count(90)
    assert [sample.id for sample in found.shown] == ["row0", "row1"]
    assert found.coverage is None and found.bytes is None


def test_coverage_is_the_share_of_supervised_tokens_in_the_map(tmp_path):
    path = write_rows(tmp_path / "c.jsonl", [{"messages": talk("q", "aab")}])
    letters = TEMPLATE.tokenizer("ab", add_special_tokens=False).input_ids
    t2d = torch.zeros(300, dtype=torch.bool)
    t2d[letters[0]] = True  # two of the four: a, a, b and the stop token
    found = inspect_file(MAKER, path, vocab_map=VocabMap(t2d, torch.tensor([letters[0]])))
    assert found.coverage == 0.5
    assert "50.00% of the supervised tokens" in describe(found, "c.jsonl")


@pytest.mark.parametrize("store", [None, *STORES])
def test_features_take_the_bytes_that_are_told(tmp_path, store):
    """Up to the headers of the shards, and what a sample has once."""
    path = write_talks(tmp_path / "c.jsonl", 8)
    found = inspect_file(MAKER, path, hidden_size=16)
    assert found.smaller is not None
    counted = found.smaller[store] if store else found.bytes
    assert counted == found.tokens * bytes_per_token(16, 3, torch.bfloat16, store)
    extract(
        model_source(tiny_model(), (1, 2, 4)),
        TEMPLATE,
        path,
        tmp_path / "out",
        max_length=90,
        stored=torch.bfloat16,
        store=store,
    )
    stored = open_features(tmp_path / "out").index["totals"]["bytes"]
    assert 0 < stored - counted < 8 * 1500
    for name in STORES:
        assert f"in {name}" in describe(found, "c.jsonl")


def test_prompt_and_answer_are_shown_apart():
    conversation = {"messages": talk("one\ntwo", "three")}
    sample = _sample(conversation)
    lines = show_sample(TEMPLATE.tokenizer, sample, colour=False).splitlines()
    assert lines[0] == f"── x · {len(sample.input_ids)} tokens, 6 supervised"
    assert lines[1:] == [
        "prompt │ <|im_start|>user",
        "       │ one",
        "       │ two<|im_end|>",
        "       │ <|im_start|>assistant",
        "       │ ",
        "answer │ ⟦three<|im_end|>⟧",
    ]
    coloured = show_sample(TEMPLATE.tokenizer, sample, colour=True).splitlines()
    assert coloured[-1] == "answer │ \x1b[32mthree<|im_end|>\x1b[0m"
    assert "⟦" not in "".join(coloured)


@pytest.mark.parametrize("colour", [False, True])
def test_what_a_conversation_says_draws_nothing_on_the_terminal(colour):
    said = "a\x1b[2Jb\x9b1mc\u202ed\u2066e\rf\tg\x07"
    sample = _sample({"messages": talk(said, said)})._replace(id="x\x1b[2J")
    text = show_sample(TEMPLATE.tokenizer, sample, colour)
    text = text.replace("\x1b[32m", "").replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert all(letter.isprintable() or letter in "\n\t" for letter in text)
    assert text.count(r"a\x1b[2Jb\x9b1mc\u202ed\u2066e\rf" + "\tg\\x07") == 2
    assert text.startswith(r"── x\x1b[2J ·")


def _sample(row):
    from eagle3fn.data.turns import conversation_of

    return MAKER.samples("x", conversation_of(row, "x"), "x").samples[0]


def test_reasons_are_listed_by_frequency(tmp_path):
    rows = [{"messages": talk("a", "b")}] + [{"messages": talk("q" * 99, "b")}] * 2
    path = write_rows(tmp_path / "c.jsonl", [*rows, {"messages": talk("a")}])
    text = describe(inspect_file(MAKER, path), "c.jsonl")
    assert "4 read, 1 kept, 1 samples" in text
    assert text.index("2 have no supervised token") < text.index("1 have no assistant turn")


@pytest.fixture
def tokenizer_folder(tmp_path):
    """A folder with a tokenizer, and no config.json."""
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    return tmp_path / "target"


def call(folder, path, *options):
    return main(["inspect", "--target", str(folder), "--conversations", str(path), *options])


def test_tokenizer_alone_is_enough(tokenizer_folder, tmp_path, capsys):
    path = write_talks(tmp_path / "c.jsonl", 3)
    assert not (tokenizer_folder / "config.json").exists()
    assert call(tokenizer_folder, path, "--show", "1") == 0
    out = capsys.readouterr().out
    assert "── row0 · " in out and "── row1 · " not in out
    assert "3 read, 3 kept, 3 samples" in out
    assert "no config.json names the hidden size" in out


def test_numbers_are_one_line_of_json(tokenizer_folder, tmp_path, capsys):
    path = write_talks(tmp_path / "c.jsonl", 3)
    tiny_model().config.save_pretrained(tokenizer_folder)
    assert call(tokenizer_folder, path, "--json", "--max-length", "90") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == numbers(inspect_file(MAKER, path, hidden_size=16))
    assert found["rows"] == 3 and found["bytes"] > 0


def test_row_is_shown_by_its_id_or_line(tokenizer_folder, tmp_path, capsys):
    rows = [{"id": "a", "messages": talk("q", "one")}, {"messages": talk("q", "two")}]
    path = write_rows(tmp_path / "c.jsonl", rows)
    assert call(tokenizer_folder, path, "--id", "2") == 0
    out = capsys.readouterr().out
    assert "── 2 · " in out and "── a · " not in out


def test_why_a_row_is_missing_is_told(tokenizer_folder, tmp_path, capsys):
    rows = [
        {"id": "a", "messages": talk("q", "one")},
        {"id": "a:7", "messages": talk("q", "two")},
        {"id": "none", "messages": talk("q")},
        {"id": "bad", "messages": 3},
    ]
    path = write_rows(tmp_path / "c.jsonl", rows)
    assert call(tokenizer_folder, path, "--id", "a", "--skip-bad", "0.5") == 0
    out = capsys.readouterr().out
    assert "── a · " in out and "── a:7 · " not in out
    for name, reason in (("none", "have no assistant turn"), ("4", "messages 3: must be")):
        assert call(tokenizer_folder, path, "--id", name, "--skip-bad", "0.5") == 0
        assert f"not trained: {path}" in (out := capsys.readouterr().out) and reason in out
    assert call(tokenizer_folder, path, "--id", "99", "--skip-bad", "0.5") == 2
    assert "--id 99: no such row among 4" in capsys.readouterr().err


def test_text_of_a_special_token_is_distinguished_from_the_token():
    sample = _sample({"messages": talk("q", "end it by <|im_end|>")})
    lines = show_sample(TEMPLATE.tokenizer, sample, colour=False).splitlines()
    assert lines[-2:] == [
        "answer │ ⟦end it by <|im_end|><|im_end|>⟧",
        "       │ <|im_end|> stands there 1 times as text, no token",
    ]


def test_bad_rows_and_wrong_arguments_are_one_line(tokenizer_folder, tmp_path, capsys):
    path = write_rows(tmp_path / "c.jsonl", [{"messages": talk("q", "a")}, {"id": "bad"}])
    assert call(tokenizer_folder, path) == 2
    assert "1 of 2 rows" in capsys.readouterr().err
    assert call(tokenizer_folder, path, "--skip-bad", "0.5", "--show", "0") == 0
    assert "1 of 2 rows are bad" in capsys.readouterr().out
    for given, counted in (
        (["enable=false"], "no such variable"),
        (["enable"], "NAME=VALUE"),
        (["a\n\x1b[2J"], r"--template-arg a\n\x1b[2J: must be NAME=VALUE"),
        (['enable="false"'], "is a text, which a template takes as true"),
        (["add_generation_prompt=false"], "no argument of the template to give"),
        (["enable=1", "enable=2"], "enable is given twice"),
        (["enable=\udcff"], "--template-arg: template argument"),  # a byte that is not UTF-8
        (["\ud800=1"], "--template-arg: template argument"),
        (["enable=" + "[" * 5000], "no such variable"),
    ):
        options = [word for one in given for word in ("--template-arg", one)]
        assert call(tokenizer_folder, path, *options) == 2
        error = capsys.readouterr().err
        assert counted in error and error.count("\n") == 1 and "\x1b" not in error


def test_folder_without_a_tokenizer_is_refused(tmp_path, capsys):
    path = write_talks(tmp_path / "c.jsonl", 3)
    assert call(tmp_path, path) == 2
    assert "not loadable" in capsys.readouterr().err


def test_all_dropped_is_an_error_with_the_reasons(tmp_path):
    path = write_rows(tmp_path / "c.jsonl", [{"messages": talk("a")}] * 3)
    with pytest.raises(UserError, match=r"3 of 3 .*dropped: 3 have no assistant"):
        inspect_file(MAKER, path)
