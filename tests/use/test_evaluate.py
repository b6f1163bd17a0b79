"""Evaluation: losslessness is measured, numbers by hand, bad input is named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from eagle3fn.base.draft_keys import draft_config_from_target
from eagle3fn.base.errors import UserError
from eagle3fn.base.types import Frozen
from eagle3fn.data.target import load_target
from eagle3fn.model.table import init_params
from eagle3fn.use import eval_pair, target_answers
from eagle3fn.use import evaluate as module
from eagle3fn.use.costs import Costs, best_length, expected_length, measure_costs
from eagle3fn.use.counts import (
    acceptance_by_position,
    accepted_length,
    differing_tokens,
    repeated_share,
    tokens_per_second,
)
from eagle3fn.use.decode import Decoded, speculate, until_end
from eagle3fn.use.eval_settings import EvalSettings
from eagle3fn.use.evaluate import evaluate
from eagle3fn.use.export import export
from tests.data.families import make_family
from tests.factories import make_map
from tests.use.tiny_target import VOCAB, prompt, random_draft, target, write_draft, write_pair

SMALL = EvalSettings(
    tasks=3,
    max_new=12,
    draft_length=3,
    speed_tasks=2,
    speed_dtype="float32",
    few=1,
    repeats=2,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target whose tokens are characters, and a random draft of it."""
    return write_pair(tmp_path_factory.mktemp("pair"))


def test_report(folders: tuple[Path, Path]):
    seen = []
    report = evaluate(
        *folders,
        ["one", "two", "three", "four"],
        SMALL,
        folders[1],
        on_progress=lambda *at: seen.append(at),
        prompts_name="numbers.jsonl",
    )
    assert report["prompts"] == "numbers.jsonl"
    assert report["lossless"] is True
    assert report["tasks"] == 3
    assert len(report["acceptance_by_position"]) == 3
    assert len(report["costs"]["predicted_seconds_per_token"]) == 3
    assert len(report["costs"]["verify_seconds"]) == 4
    assert 1 <= report["accepted_length"] < 2
    assert report["untrained_accepted_length"] >= 1
    assert report["speedup"] == report["tokens_per_s"] / report["plain_tokens_per_s"] > 0
    assert report["break_even_accepted_length"] > 0
    assert report["speed_tasks"] == 2
    assert report["timed_tokens"] == 24
    assert report["differing_tokens"] == 0
    assert report["speed_dtype"] == "float32"
    assert report["threads"] == torch.get_num_threads()
    assert [at for at in seen if at[0] == "draft"] == [("draft", i, 3) for i in (1, 2, 3)]
    assert [at for at in seen if at[0] == "speed"] == [("speed", i, 2) for i in (1, 2)]
    json.dumps(report)


def test_report_by_category_and_length(folders: tuple[Path, Path]):
    """Each group is what its prompts alone give; the groups add up to all."""
    texts = ["x" * 70, "one", "three"]
    report = evaluate(*folders, texts, SMALL, categories=["letters", "words", "words"])
    whole = evaluate(*folders, texts[1:], SMALL)
    groups = report["by_category"]
    assert list(groups) == ["letters", "words"]
    assert groups["words"] == whole["by_prompt_length"]["1-64"]
    assert groups["words"]["accepted_length"] == whole["accepted_length"]
    assert groups["words"]["prompts"] == 2
    assert list(report["by_prompt_length"]) == ["1-64", "65-128"]
    assert report["by_prompt_length"]["65-128"] == groups["letters"]
    tokens = sum(group["tokens"] for group in groups.values())
    verifications = sum(group["verifications"] for group in groups.values())
    assert report["accepted_length"] == (tokens - 3) / verifications
    assert "by_category" not in whole


# At a temperature

WARM = replace(SMALL, temperature=2.0, seed=3)


def test_sampled_report(folders: tuple[Path, Path]):
    report = evaluate(*folders, ["one", "two", "three"], WARM, folders[1])
    assert report["sampling"] == {"temperature": 2.0, "top_p": 1.0, "seed": 3}
    assert report["lossless"] is None
    assert report["lossless_note"].startswith(
        "sampled (temperature 2), by the target's own distribution: probabilities within "
    )
    check = report["sampling_check"]
    assert check["passed"] is True
    assert check["probability_error"] < 1e-5
    assert check["expected_accepted"] > 0 and check["standard_error"] > 0
    assert len(report["expected_acceptance_by_position"]) == 3
    assert all(0 < chance < 1 for chance in report["expected_acceptance_by_position"])
    assert not {"timed_tokens", "differing_tokens"} & report.keys()
    assert report["untrained_accepted_length"] >= 1
    assert report["speedup"] > 0
    json.dumps(report)


def test_sampled_answers_depend_on_no_other_prompt(folders: tuple[Path, Path]):
    """The second prompt's answer is the same after another first one, and with another seed not.

    The same prompt in two places has two answers.
    """
    pairs = [
        eval_pair.load_eval_pair(*folders, texts, torch.float32, WARM)
        for texts in (["one", "two"], ["two", "two"])
    ]
    first, second = (eval_pair.decode_each(pair, WARM) for pair in pairs)
    assert first[1].tokens == second[1].tokens
    assert second[0].tokens != second[1].tokens
    reseeded = eval_pair.decode_each(pairs[0], replace(WARM, seed=4))
    assert first[1].tokens != reseeded[1].tokens


def test_tokens_of_another_distribution_are_found(folders: tuple[Path, Path], monkeypatch):
    """Verification that forgets nothing of what was rejected: the cache holds wrong rows."""
    monkeypatch.setattr("eagle3fn.use.decode.Target.forget", lambda target, rows: None)
    report = evaluate(*folders, ["one", "two"], WARM)
    assert report["sampling_check"]["passed"] is False
    assert report["sampling_check"]["probability_error"] > 0.01
    assert "NOT by the target's distribution" in report["lossless_note"]


def test_too_many_accepted_tokens_are_found(folders: tuple[Path, Path], monkeypatch):
    monkeypatch.setattr(
        "eagle3fn.use.choosers.verify",
        lambda drafted, p, q, uniforms: [*drafted, int(p[-1].argmax())],
    )
    report = evaluate(*folders, ["one", "two", "three"], replace(WARM, max_new=40))
    check = report["sampling_check"]
    assert check["passed"] is False
    assert check["accepted"] > check["expected_accepted"] + 5 * check["standard_error"]


def test_kept_greedy_answers_are_refused_at_a_temperature(folders: tuple[Path, Path], tmp_path):
    store = tmp_path / "plain.json"
    with pytest.raises(UserError, match=r"--plain .*plain\.json: keeps greedy answers"):
        evaluate(*folders, ["one"], WARM, plain_store=store)
    assert not store.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, r"temperature = -1\.0: must be at least 0"),
        ({"temperature": 0.009}, r"temperature = 0\.009: must be at least 0\.01, .*without --temp"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p = 0\.0: must be above 0"),
    ],
)
def test_sampling_out_of_range_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        replace(SMALL, **changes)


@pytest.mark.parametrize(("fast", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_speed_is_measured_in_what_the_device_multiplies(
    folders: tuple[Path, Path], monkeypatch, fast, dtype
):
    monkeypatch.setattr("eagle3fn.base.device.multiplies_bf16", lambda device: fast)
    report = evaluate(*folders, ["one"], replace(SMALL, speed_dtype=None))
    assert report["speed_dtype"] == dtype
    assert report["lossless"] is True
    assert report["timed_tokens"] == 12


def test_stored_answers_are_reused(folders: tuple[Path, Path], tmp_path: Path, monkeypatch):
    store, quick = tmp_path / "plain.json", replace(SMALL, tasks=2)
    first = evaluate(*folders, ["one", "two"], quick, plain_store=store)
    assert first["lossless"] is True
    kept = json.loads(store.read_text())
    assert len(kept) == 2
    calls = []
    original = target_answers.greedy_together

    def counted(model: Any, prompts: Any, *args: Any) -> list[list[int]]:
        calls.append(len(prompts))
        return original(model, prompts, *args)

    monkeypatch.setattr(target_answers, "greedy_together", counted)
    monkeypatch.setattr(module, "greedy_together", counted)
    again = evaluate(*folders, ["one", "two"], quick, plain_store=store)
    assert calls == []
    assert again["lossless"] is True

    # One that differs is compared with the target's answer to its prompt alone.
    changed = {}
    for key, entry in kept.items():
        tokens = entry["tokens"]
        changed[key] = target_answers._kept(key, [*tokens[:-1], tokens[-1] ^ 1])
    store.write_text(json.dumps(changed))
    assert evaluate(*folders, ["one", "two"], quick, plain_store=store)["lossless"] is True
    assert calls == [1, 1]
    evaluate(*folders, ["three", "four"], quick, plain_store=store)
    assert calls == [1, 1, 2]

    # Those of earlier versions, without a digest, are not used: the target answers anew.
    store.write_text(json.dumps({key: entry["tokens"] for key, entry in kept.items()}))
    evaluate(*folders, ["one", "two"], quick, plain_store=store)
    assert calls == [1, 1, 2, 2]
    assert json.loads(store.read_text()) == kept


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_answers_of_other_files_of_the_target_are_not_used(
    folders: tuple[Path, Path], tmp_path: Path, name: str
):
    """The last value of the last tensor, or a tokenizer's file that reads the same."""
    target = tmp_path / "target"
    shutil.copytree(folders[0], target)
    store = tmp_path / "plain.json"
    quick = replace(SMALL, tasks=1, speed_tasks=1)
    evaluate(target, folders[1], ["one"], quick, plain_store=store)
    first = json.loads(store.read_text())

    file = target / name
    data = bytearray(file.read_bytes())
    if name == "tokenizer.json":
        data += b"\n"
    else:
        data[-4] ^= 1
    file.write_bytes(data)
    evaluate(target, folders[1], ["one"], quick, plain_store=store)
    both = json.loads(store.read_text())
    assert len(first) == 1 and len(both) == 2 and first.items() < both.items()


def swap_keys(kept: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(kept, reversed(kept.values()), strict=True))


def with_last(token: Any) -> Any:
    def change(kept: dict[str, Any]) -> dict[str, Any]:
        key = min(kept)
        tokens = [*kept[key]["tokens"][:-1], token]
        return kept | {key: kept[key] | {"tokens": tokens}}

    return change


def answered(tokens: list[int]) -> Any:
    return lambda kept: {key: target_answers._kept(key, tokens) for key in kept}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_last(5), "an answer was changed since it was kept; delete the file"),
        (swap_keys, "an answer was changed since it was kept"),
        (with_last("5"), "does not hold the target's kept answers"),
        (with_last(True), "does not hold the target's kept answers"),
        (lambda kept: kept | {"a": 3}, "does not hold the target's kept answers"),
        (lambda kept: [kept], "must be a JSON object"),
        (answered([VOCAB]), "holds an answer that the target cannot give"),
        (answered([-1]), "holds an answer that the target cannot give"),
        (answered([]), "holds an answer that the target cannot give"),
        (answered([1] * 13), "holds an answer that the target cannot give"),
    ],
)
def test_damaged_answers_are_refused_by_file(
    folders: tuple[Path, Path], kept_answers, tmp_path, change, message
):
    store = tmp_path / "plain.json"
    store.write_text(json.dumps(change(kept_answers)))
    with pytest.raises(UserError, match=rf"plain\.json: .*{message}"):
        evaluate(*folders, ["one", "two"], replace(SMALL, tasks=2), plain_store=store)


@pytest.fixture(scope="module")
def kept_answers(folders: tuple[Path, Path], tmp_path_factory: Any) -> dict[str, Any]:
    store = tmp_path_factory.mktemp("kept") / "plain.json"
    evaluate(*folders, ["one", "two"], replace(SMALL, tasks=2), plain_store=store)
    return json.loads(store.read_text())


def with_nan(folder: Path, name: str, out: Path) -> Path:
    """A copy of a model's folder with a NaN in one tensor."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    tensors[name][0, 0] = torch.nan
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_files_are_checked_before_anything_is_decoded(
    folders: tuple[Path, Path], tmp_path, monkeypatch
):
    def load(*_: Any) -> None:
        raise AssertionError("the target is loaded")

    monkeypatch.setattr(eval_pair, "load_target", load)
    target, draft = folders
    with pytest.raises(UserError, match=r"typo/config\.json: no such file"):
        evaluate(target, draft, ["one"], SMALL, untrained_folder=tmp_path / "typo")
    with pytest.raises(UserError, match=r"typo/config\.json: no such file"):
        evaluate(target, tmp_path / "typo", ["one"], SMALL)
    with pytest.raises(UserError, match=r"is a folder; name a file"):
        evaluate(target, draft, ["one"], SMALL, plain_store=tmp_path)
    (tmp_path / "plain.target.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match=r"plain\.target\.json: is there, and does not hold hash"):
        evaluate(target, draft, ["one"], SMALL, plain_store=tmp_path / "plain.json")
    broken = with_nan(draft, "lm_head.weight", tmp_path / "nan")
    with pytest.raises(UserError, match=r"model\.safetensors: lm_head\.weight holds NaN"):
        evaluate(target, broken, ["one"], SMALL)


def test_answers_together_are_those_alone():
    """Prompts of different lengths, an end token within one answer, and a tail of its own group."""
    model = target()
    prompts = [prompt(seed, size) for seed, size in ((0, 3), (1, 11), (2, 7))]
    alone = [target_answers.greedy_together(model, [one], 8, {2})[0] for one in prompts]
    assert [len(answer) for answer in alone] == [8, 8, 8]
    assert target_answers.greedy_together(model, prompts, 8, {2}) == alone
    end = alone[1][3]
    ended = target_answers.greedy_together(model, prompts, 8, {2, end})
    assert ended[1] == until_end(alone[1], {end})
    for one, tokens in zip(prompts, alone, strict=True):
        assert speculate(model, None, one, 0, 8, ()).tokens == tokens


def test_one_wrong_token_is_not_lossless(folders: tuple[Path, Path], monkeypatch):
    original = eval_pair.speculate

    def wrong(*args: Any) -> Decoded:
        found = original(*args)
        return found._replace(tokens=[*found.tokens[:-1], found.tokens[-1] ^ 1])

    monkeypatch.setattr(eval_pair, "speculate", wrong)
    assert evaluate(*folders, ["one"], SMALL)["lossless"] is False


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(4, VOCAB, 2))},
        {"begin_suppress_tokens": list(range(4, VOCAB))},
        {"bad_words_ids": [[i] for i in range(4, VOCAB, 2)]},
        {"num_beams": 3},
        {"min_new_tokens": 12, "do_sample": True, "temperature": 0.3},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_generation_config_changes_no_answer(folders: tuple[Path, Path], changes):
    """Processors, beams and lengths in the target's files have no effect on either side."""
    file = folders[0] / "generation_config.json"
    before = file.read_text()
    asked = end_of_second_token(folders[0]) if "min_new_tokens" in changes else {}
    file.write_text(json.dumps(json.loads(before) | changes | asked))
    try:
        assert evaluate(*folders, ["one"], SMALL)["lossless"] is True
    finally:
        file.write_text(before)


def end_of_second_token(folder: Path) -> dict[str, int]:
    """An end token that plain greedy decoding reaches at its second token."""
    model, tokenizer = load_target(folder, torch.float32)
    ids = tokenizer("<one>", return_tensors="pt", add_special_tokens=False).input_ids
    return {"eos_token_id": target_answers.greedy_together(model, [ids], 2, {2})[0][1]}


def test_generation_config_is_restored(monkeypatch):
    model = target()
    own = GenerationConfig(eos_token_id=2, num_beams=2, suppress_tokens=[5])
    monkeypatch.setattr(model, "generation_config", own)
    target_answers.greedy_together(model, [prompt(0, 4)], 3, {2})
    assert model.generation_config is own
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        target_answers.greedy_together(model, [prompt(0, 4)], 3, {2})
    assert model.generation_config is own


@pytest.mark.parametrize("text", ["[]", '{"a": 3}', '{"a": ["x"]}', "{", None])
def test_a_damaged_store_is_named(tmp_path, text):
    store = tmp_path / "plain.json"
    store.mkdir() if text is None else store.write_text(text)
    with pytest.raises(UserError, match=r"plain\.json"):
        target_answers.greedy_answers(target(), [prompt(0, 4)], 3, {2}, store)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts: 0 given"),
        (["fine", "  "], "none may be empty"),
        (
            ["fine", "x" * 250],
            r"prompt 2: prompt of 252 tokens.*beyond max_position_embeddings = 256",
        ),
    ],
)
def test_bad_prompts_are_refused(folders: tuple[Path, Path], prompts, message):
    with pytest.raises(UserError, match=message):
        evaluate(*folders, prompts, SMALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 130}, "draft130.*vocab_size 130, but .*target has 128"),
        ({"target_hidden_size": 40}, "draft40.*hidden_size 40, but .*target has 32"),
    ],
)
def test_a_draft_of_another_target_is_refused(
    folders: tuple[Path, Path], tmp_path, changes, message
):
    folder = tmp_path / f"draft{next(iter(changes.values()))}"
    write_draft(folder, **changes)
    with pytest.raises(UserError, match=message):
        evaluate(folders[0], folder, ["one"], SMALL)
    with pytest.raises(UserError, match=message):
        evaluate(*folders, ["one"], SMALL, untrained_folder=folder)


@pytest.mark.parametrize("name", ["tasks", "draft_length", "few", "repeats"])
def test_settings_out_of_range_are_refused(name):
    with pytest.raises(UserError, match=rf"evaluate\.{name} = 0: must be at least 1"):
        replace(SMALL, **{name: 0})


def decoded(
    count: int, rounds: int, accepted: list[int], reached: list[int], seconds: float = 1.0
) -> Decoded:
    return Decoded(list(range(count)), rounds, accepted, reached, reached, seconds, 0.0)


def test_metrics_by_hand():
    answers = [decoded(7, 2, [2, 2], [2, 2], 1.5), decoded(3, 2, [0, 0], [2, 0], 0.5)]
    assert accepted_length(answers) == 8 / 4  # each prefill's token left out
    assert acceptance_by_position(answers) == [2 / 4, 2 / 2]
    assert tokens_per_second(answers) == 10 / 2.0
    assert accepted_length([decoded(1, 0, [], [])]) == 0.0
    assert acceptance_by_position([decoded(1, 0, [0, 0], [0, 0])]) == [0.0, 0.0]


def test_differing_tokens_by_hand():
    assert differing_tokens([1, 2, 3], [1, 2, 3]) == 0
    assert differing_tokens([1, 2, 3], [1, 5, 3]) == 1
    assert differing_tokens([1, 2, 3, 4], [1, 2]) == 2


def test_repeats_by_hand():
    run = list(range(8))
    assert repeated_share([list(range(40))]) == 0
    assert repeated_share([[*run, 99, *run, 98]]) == 8 / 18
    assert repeated_share([[*run, *run, 0]]) == 9 / 17  # the runs at 8 and at 9 overlap
    assert repeated_share([run, run]) == 0  # another answer does not count
    assert repeated_share([]) == 0


def test_best_length_by_hand():
    costs = Costs(verify=[10.0, 10.0, 10.0, 10.0], commit=2.0, extend=1.0)
    assert [costs.round(k) for k in range(4)] == [10.0, 12.0, 13.0, 14.0]
    assert expected_length([0.5, 0.5, 0.0], 3) == 1.75
    # seconds a token: 12 / 1.5 = 8, 13 / 1.75 = 7.43, 14 / 1.75 = 8
    assert best_length(costs, [0.5, 0.5, 0.0]) == 2
    assert best_length(costs, [1.0, 1.0, 1.0]) == 3
    assert best_length(costs, [0.0, 0.0, 0.0]) == 1


def test_costs_are_measured():
    costs = measure_costs(target(), random_draft(), prompt(0, 10), 3, 2)
    assert len(costs.verify) == 4
    assert min(*costs.verify, costs.commit) > 0
    assert costs.extend >= 0


def test_target_that_cannot_roll_back_is_refused_before_it_decodes(tmp_path):
    """A family with recurrent layers, and a draft that fits it."""
    model = make_family("qwen3_next", tmp_path / "target")
    vocab = model.config.vocab_size
    config = draft_config_from_target(model.config.to_dict(), "t", 64)
    config = replace(config, aux_layers=(0, 1, 2))
    params = init_params(config, 0, torch.float32)
    frozen = Frozen(None, torch.zeros(1), *make_map(vocab, 64, torch.Generator().manual_seed(0)))
    layers = model.config.num_hidden_layers
    export(params, frozen, config, tmp_path / "draft", layers, torch.float32)
    stages = []
    with pytest.raises(UserError, match=r"'qwen3_next': its cache cannot be rolled back"):
        evaluate(
            tmp_path / "target",
            tmp_path / "draft",
            ["one"],
            SMALL,
            on_progress=lambda *stage: stages.append(stage),
        )
    assert not stages
