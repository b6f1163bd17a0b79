"""Answers given anew by the target in this process: order, turns, resuming, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import write_jsonl
from eagle3fn.base.read import read_jsonl
from eagle3fn.data import regenerate as module
from eagle3fn.data.generate import Sampling
from eagle3fn.data.regenerate import ByModel, Regenerated, regenerate
from eagle3fn.data.turns import conversation_of
from tests.factories import CHATML, talk, tiny_model, tiny_template, tiny_tokenizer

GREEDY = Sampling(0, 1, 6)
DRAWN = Sampling(1.0, 0.95, 6)
END = 1
SYSTEM = {"role": "system", "content": "be brief"}

ROWS: list[dict[str, Any]] = [
    {"prompt": "first"},
    {"id": "b", "conversations": talk("one", "theirs", "two", "theirs too")},
    {"messages": [SYSTEM, *talk("three")]},
    {"id": "d", "prompt": "not read", "conversations": talk("four", "theirs", "five")},
    {"id": "e", "conversations": [{"from": "human", "value": "six"}]},
]


def target():
    """A random target whose answers are of bytes alone, and end by themselves or by the limit."""
    model = tiny_model(eos_token_id=END, vocab_size=258)
    model.generation_config.eos_token_id = END
    model.lm_head.weight[0] = 0  # the special token that begins a turn
    return model


TOOLS = CHATML.replace(
    "m['content']", "(m['content'] or '') + ((m['tool_calls']|tojson) if m.tool_calls else '')"
)
"""It renders calls of tools."""


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    write_jsonl(path, rows)
    return path


def answer(
    prompts: Path, out: Path, sampling=GREEDY, model=None, batch: int = 64, **options: Any
) -> Regenerated:
    template = tiny_template(TOOLS)
    source = ByModel(model or target(), template, batch)
    return regenerate(source, template, prompts, out, sampling, **options)


def plain_greedy(model, text: str, limit: int) -> str:
    """The target's greedy answer, one run over all tokens for each new one."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    new: list[int] = []
    while len(new) < limit:
        token = int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())
        if token == END:
            break
        new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True)


def test_rows_keep_their_order_turns_and_ids(tmp_path):
    done = answer(write(tmp_path / "p.jsonl"), tmp_path / "c.jsonl", batch=2)
    assert done.conversations == 5 and done.answers == 7 and done.excluded == 0

    found = read_jsonl(tmp_path / "c.jsonl")
    assert [row["id"] for row in found] == ["1", "b", "3", "d", "e"]
    users = []
    for row in found:
        turns = conversation_of(row, "c.jsonl").turns
        roles = [turn["role"] for turn in turns if turn["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        users.append([turn["content"] for turn in turns if turn["role"] == "user"])
        assert "theirs" not in json.dumps(turns)
    assert users == [["first"], ["one", "two"], ["three"], ["four", "five"], ["six"]]
    assert found[2]["conversations"][0] == SYSTEM


def test_greedy_answers_are_those_of_a_plain_decode_of_each_prompt_alone(tmp_path):
    """In fp64. The second answer is given after the target's own first one."""
    model = target().double()
    answer(write(tmp_path / "p.jsonl"), tmp_path / "c.jsonl", model=model)
    answers = []
    for row in read_jsonl(tmp_path / "c.jsonl"):
        prompt = ""
        for turn in row["conversations"]:
            if turn["role"] == "assistant":
                expected = plain_greedy(model, prompt + "<|im_start|>assistant\n", GREEDY.max_new)
                assert turn["content"] == expected
                answers.append(expected)
            prompt += f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n"
    assert len(answers) == 7
    assert len(set(answers)) > 2


def test_an_answer_before_any_other_turn_stays(tmp_path):
    greeting = {"role": "assistant", "content": "hello there"}
    rows = [{"conversations": [greeting, *talk("one", "theirs")]}]
    assert answer(write(tmp_path / "p.jsonl", rows), tmp_path / "c.jsonl").answers == 1
    (row,) = read_jsonl(tmp_path / "c.jsonl")
    assert row["conversations"][0] == greeting
    assert row["conversations"][2]["content"] != "theirs"


def test_answers_cut_by_the_limit_are_kept_and_counted(tmp_path):
    prompts = write(tmp_path / "p.jsonl")
    done = answer(prompts, tmp_path / "c.jsonl")
    assert done.cut == sum(row["cut"] for row in read_jsonl(tmp_path / "c.jsonl")) > 0

    ending = target()
    ending.lm_head.weight[:] = 0  # equal logits: the lowest token that is not zero wins a draw
    ending.generation_config.eos_token_id = 0
    assert answer(prompts, tmp_path / "d.jsonl", model=ending).cut == 0


def test_drawn_answers_depend_on_the_seed_alone(tmp_path):
    prompts = write(tmp_path / "p.jsonl")
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        answer(prompts, tmp_path / name, DRAWN, seed=seed)
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1] != texts[2]


def test_only_the_first_rows_are_answered_with_a_limit(tmp_path):
    done = answer(write(tmp_path / "p.jsonl"), tmp_path / "c.jsonl", limit=2)
    assert done.conversations == 2
    assert [row["id"] for row in read_jsonl(tmp_path / "c.jsonl")] == ["1", "b"]


def test_conversations_that_share_words_with_an_excluded_file_are_left_out(tmp_path):
    long = " ".join(f"w{i}" for i in range(13))
    rows = [{"prompt": f"say {long}"}, {"prompt": "free"}]
    write_jsonl(tmp_path / "test.jsonl", [{"question": long}])
    prompts = write(tmp_path / "p.jsonl", rows)
    done = answer(prompts, tmp_path / "c.jsonl", exclude=tmp_path / "test.jsonl")
    assert (done.conversations, done.excluded) == (1, 1)
    assert [row["id"] for row in read_jsonl(tmp_path / "c.jsonl")] == ["2"]


# Resuming


def test_killed_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    prompts = write(tmp_path / "p.jsonl")
    whole, again = tmp_path / "whole.jsonl", tmp_path / "again.jsonl"
    answer(prompts, whole, DRAWN, batch=2)

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer(prompts, again, DRAWN, batch=2, on_progress=stop)
    assert not again.exists()
    parts = Path(f"{again}.parts")
    assert len(list(parts.glob("*.jsonl"))) == 2
    assert not list(parts.glob(".*.tmp"))

    # Batches that are there are not written again.
    written = []
    real = module._answer_batch

    def counted(write, template, tokens, rows):
        written.append([row.id for row in rows])
        return real(write, template, tokens, rows)

    monkeypatch.setattr(module, "_answer_batch", counted)
    answer(prompts, again, DRAWN, batch=2)
    assert written == [["e"]]
    assert again.read_bytes() == whole.read_bytes()
    assert not parts.exists()


@pytest.mark.parametrize("change", ["prompts", "sampling", "seed", "batch", "template", "target"])
def test_batches_of_other_settings_are_not_taken_up(tmp_path, monkeypatch, change):
    prompts = write(tmp_path / "p.jsonl")
    out = tmp_path / "c.jsonl"

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer(prompts, out, on_progress=stop)

    written = []
    real = module._answer_batch
    monkeypatch.setattr(module, "_answer_batch", lambda *given: written.append(1) or real(*given))
    template = tiny_template(TOOLS)
    model = target()
    if change == "prompts":
        write(prompts, [*ROWS, {"prompt": "more"}])
    if change == "template":
        template = tiny_template(TOOLS + " ")
    if change == "target":
        model.model.norm.weight += 1
    source = ByModel(model, template, batch=4 if change == "batch" else 64)
    sampling = GREEDY._replace(max_new=5) if change == "sampling" else GREEDY
    regenerate(source, template, prompts, out, sampling, seed=change == "seed")
    assert written


def test_other_answers_in_the_file_change_nothing(tmp_path):
    """They are replaced, so a run takes up the batches of the same prompts."""
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    answer(write(tmp_path / "p.jsonl", [{"messages": talk("q", "x")}]), first, DRAWN)
    answer(write(tmp_path / "q.jsonl", [{"messages": talk("q", "y")}]), second, DRAWN)
    assert first.read_bytes() == second.read_bytes()


# Refusals, before the target runs.


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": " "}, r"p.jsonl:2: turn 1 is empty; mend"),
        ({"prompt": 3}, r"p.jsonl:2: prompt 3: must be a text or a list"),
        ({"messages": talk("a", "b", "")}, r"p.jsonl:2: turn 3 is empty"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, r"p.jsonl:2: nothing to answer"),
        ({"messages": []}, r"p.jsonl:2: no list of turns"),
        ([1], r"p.jsonl:2: .1.: must be a JSON object"),
        ({"prompt": "x" * 235}, r"p.jsonl:2: 2\d\d tokens and 1 answers of up to 6 exceed .* 256"),
        ({"messages": talk(*"abc" * 20)}, r"p.jsonl:2: .* 30 answers .* exceed"),
    ],
)
def test_malformed_empty_and_long_rows_are_refused_by_file_and_line(
    tmp_path, monkeypatch, row, text
):
    monkeypatch.setattr(module, "generate", lambda *given: pytest.fail("the target was run"))
    prompts = write(tmp_path / "p.jsonl", [ROWS[0], row])
    with pytest.raises(UserError, match=text):
        answer(prompts, tmp_path / "c.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_a_file_without_rows_and_a_target_without_a_template_are_refused(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"p.jsonl: no rows"):
        answer(tmp_path / "p.jsonl", tmp_path / "c.jsonl")
    with pytest.raises(UserError, match="no chat template"):
        template = tiny_template(None)
        source = ByModel(target(), template)
        regenerate(source, template, tmp_path / "p.jsonl", tmp_path / "c.jsonl")


def test_all_bad_rows_are_counted_or_left_out(tmp_path):
    """Long ones too; what is left out is in a file next to the conversations."""
    bad = [{"prompt": "x" * 235}, {"prompt": ""}]
    prompts = write(tmp_path / "p.jsonl", [*ROWS, *bad])
    with pytest.raises(UserError, match=r"2 of 7 rows .*:6: .* exceed .*:7: turn 1 is empty"):
        answer(prompts, tmp_path / "c.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]

    done = answer(prompts, tmp_path / "c.jsonl", skip_bad=0.5)
    assert done.conversations == 5 and "2 of 7 rows are bad" in done.rejects
    assert [row["row"] for row in read_jsonl(tmp_path / "c.jsonl.rejects.jsonl")] == bad


# What is kept.

CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "weather", "arguments": '{"in": "Oslo"}'}}],
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def test_calls_of_tools_are_kept_untrained_and_what_follows_is_answered(tmp_path):
    result = {"role": "tool", "content": ""}
    row = {
        "id": "a",
        "tools": [WEATHER],
        "messages": [*talk("how is it?"), CALL, result, *talk("theirs")[::-1], *talk("so?")],
    }
    row["messages"][3]["role"] = "assistant"
    done = answer(write(tmp_path / "p.jsonl", [row]), tmp_path / "c.jsonl")
    assert (done.answers, done.kept) == (2, 1)

    (written,) = read_jsonl(tmp_path / "c.jsonl")
    turns = written["conversations"]
    assert [turn["role"] for turn in turns] == [
        *("user", "assistant", "tool", "assistant", "user", "assistant")
    ]
    assert turns[1]["weight"] == 0
    assert turns[1]["tool_calls"][0]["function"]["arguments"] == {"in": "Oslo"}
    assert written["tools"] == [WEATHER]

    # What is trained of the written row: the two new answers.
    assert conversation_of(written, "c").supervised == (3, 5)
    model = target()
    prompt = "<|im_start|>user\nhow is it?<|im_end|>\n<|im_start|>assistant\n"
    prompt += json.dumps(turns[1]["tool_calls"]) + "<|im_end|>\n<|im_start|>tool\n<|im_end|>\n"
    expected = plain_greedy(model, prompt + "<|im_start|>assistant\n", GREEDY.max_new)
    assert turns[3]["content"] == expected


def test_answers_of_weight_zero_are_kept_as_context(tmp_path):
    shown = {"role": "assistant", "content": "an example", "weight": 0}
    rows = [
        {"id": "a", "messages": [*talk("one"), shown, *talk("two", "theirs")]},
        {"id": "b", "messages": talk("three", "theirs"), "train": False},
        {"id": "c", "messages": talk("four", "theirs", "five"), "weight": 0},
    ]
    done = answer(write(tmp_path / "p.jsonl", rows), tmp_path / "c.jsonl")
    assert (done.conversations, done.answers, done.kept) == (3, 1, 3)

    first, second, third = (row["conversations"] for row in read_jsonl(tmp_path / "c.jsonl"))
    assert first[:2] == [*talk("one"), shown]
    assert first[3]["content"] != "theirs" and "weight" not in first[3]
    assert second[1] == {"role": "assistant", "content": "theirs", "weight": 0}
    assert [turn["content"] for turn in third] == ["four", "theirs", "five"]


def test_greedy_answers_are_those_of_the_models_own_generate(tmp_path):
    """Of every size of batch, in fp64."""
    model = target().double()
    tokenizer = tiny_tokenizer()
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "x" * (3 * i + 1)} for i in range(6)])
    texts = set()
    for batch in (1, 4, 64):
        out = tmp_path / f"{batch}.jsonl"
        answer(prompts, out, GREEDY._replace(max_new=12), model, batch)
        texts.add(out.read_text())
    assert len(texts) == 1

    for row in read_jsonl(tmp_path / "1.jsonl"):
        user, said = row["conversations"]
        text = f"<|im_start|>user\n{user['content']}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        limits = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": END}
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **limits)
        expected = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
        assert said["content"] == expected
