"""From Python a conversation's samples are those that the commands make of its line."""

import json
from pathlib import Path

import pytest
import torch

import eagle3fn as e3
from eagle3fn.cli import main
from tests.factories import talk, tiny_tokenizer

TEMPLATE = (
    "{{ mark | default('') }}"
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer alone."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(TEMPLATE).save_pretrained(folder)
    return folder


def test_it_shows_what_inspect_shows(target, tmp_path, capsys):
    row = {"id": "row", "conversations": talk("2 + 2?", "4", "and 3 + 3?", "6, I think")}
    (tmp_path / "talks.jsonl").write_text(json.dumps(row))
    capsys.readouterr()
    arguments = ["--target", target, "--conversations", tmp_path / "talks.jsonl"]
    assert main(["inspect", *map(str, arguments)]) == 0
    printed = capsys.readouterr().out

    encoder = e3.open_encoder(target)
    (sample,) = encoder.encode(row).samples
    shown = encoder.show(sample)
    assert printed.startswith(shown + "\n")
    assert "answer │ ⟦4<|im_end|>⟧" in shown and "answer │ ⟦6, I think<|im_end|>⟧" in shown


def test_mask_is_on_what_the_target_writes(target):
    encoder = e3.open_encoder(target)
    (sample,) = encoder.encode({"messages": talk("2 + 2?", "4")}).samples
    text = encoder.tokenizer.decode(sample.input_ids)
    assert text == "user:2 + 2?<|im_end|>assistant:4<|im_end|>"
    trained = sample.input_ids[sample.token_mask == 1]
    assert encoder.tokenizer.decode(trained) == "4<|im_end|>"
    assert sample.token_mask.dtype == torch.int64


def test_it_cuts_at_the_maximal_length_and_says_why_nothing_is_left(target):
    row = {"conversations": talk("2 + 2?", "four")}
    whole = e3.open_encoder(target).encode(row).samples[0]
    begin = int(whole.token_mask.argmax())
    cut = e3.open_encoder(target, max_length=begin + 2).encode(row)
    assert len(cut.samples[0].input_ids) == begin + 2
    assert cut.cut == int(whole.token_mask.sum()) - 2

    none = e3.open_encoder(target, max_length=begin).encode(row)
    assert not none.samples
    assert none.dropped == ["have no supervised token within the maximal length"]


def test_template_arguments_reach_the_template(target):
    encoder = e3.open_encoder(target, template_arguments={"mark": "MARK "})
    (sample,) = encoder.encode({"conversations": talk("q", "a")}).samples
    assert encoder.tokenizer.decode(sample.input_ids).startswith("MARK user:q")


def test_what_cannot_be_encoded_is_refused_by_name(target, tmp_path):
    encoder = e3.open_encoder(target)
    with pytest.raises(e3.UserError, match=r"^row: turn 1: .*'robot'"):
        encoder.encode({"conversations": [{"role": "robot", "content": "x"}]})
    with pytest.raises(e3.UserError, match=r"^template_arguments.*messages"):
        e3.open_encoder(target, template_arguments={"messages": []})
    with pytest.raises(e3.UserError, match="missing"):
        e3.open_encoder(tmp_path / "missing")
