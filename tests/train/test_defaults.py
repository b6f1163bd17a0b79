"""What a run takes where its user names nothing."""

from dataclasses import replace

import pytest
import torch

from eagle3fn.base.config import Config, load_config, to_dict
from eagle3fn.base.errors import UserError
from eagle3fn.base.sections import ObjectiveConfig, OptimizerConfig
from eagle3fn.base.toml import to_toml
from eagle3fn.data.vocab import held_out_of
from eagle3fn.train import defaults
from eagle3fn.train.defaults import (
    Choice,
    begun_settings,
    by_section,
    check_rate,
    chosen_defaults,
    describe,
    not_named,
    rate_of,
)
from tests.factories import make_draft

CHOICES = [
    Choice("objective.ttt_length", 3, "because"),
    Choice("optimizer.learning_rate", 0.5, "x"),
]


def config_of(choices: list[Choice], *overrides: str) -> Config:
    return load_config(None, list(overrides), make_draft(), by_section(choices))


@pytest.mark.parametrize("samples", [1, 9, 60, 1748, 10**6])
@pytest.mark.parametrize("width", [16, 576, 3584, 8192])
def test_every_choice_is_a_setting_of_its_range(samples, width):
    choices = chosen_defaults(make_draft(hidden_size=width), samples)
    tree = to_dict(config_of(choices))
    for choice in choices:
        section, key = choice.setting.split(".")
        assert tree[section][key] == choice.value
        assert choice.reason
    assert tree["data"]["held_out"] < samples


def test_rate_meets_its_two_points_and_falls_between_them():
    assert rate_of(576) == 1e-3
    assert rate_of(3584) == rate_of(4096) == 1e-4
    rates = [rate_of(width) for width in (16, 576, 1024, 1536, 2048, 3072, 3584, 16384)]
    assert rates == sorted(rates, reverse=True)
    assert set(rates[2:-2]) == {0.00049, 0.00029, 0.0002, 0.00012}


def rate_in(choices: list[Choice]) -> Choice | None:
    return next((one for one in choices if one.setting == "optimizer.learning_rate"), None)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("lion", "a third of AdamW's"), ("sgd", "a hundred times AdamW's"), ("mine:make", "")],
)
def test_other_optimizers_get_no_rate_and_need_one(name, hint):
    chosen = chosen_defaults(make_draft(hidden_size=576), 60, optimizer=name)
    assert rate_in(chosen) is None
    optimizer = OptimizerConfig(name=name)
    with pytest.raises(UserError) as caught:
        check_rate(optimizer, 576, {"optimizer": {"name": name}}, by_section(chosen))
    text = str(caught.value)
    assert text.startswith(
        f"optimizer.learning_rate: none is chosen for optimizer.name = {name!r}; name one with "
    )
    assert (
        hint and f"{hint}" in text and "AdamW's, which would be 0.001 for this draft" in text
    ) or text[-5:] == "=RATE"

    # One that is named, or that a run began with, is taken.
    check_rate(optimizer, 576, {}, {"optimizer": {"learning_rate": 0.1}})
    check_rate(optimizer, 576, {"optimizer": {"learning_rate": 0.1}}, {})


def test_a_trained_draft_is_trained_on_at_a_third_of_the_rate():
    draft = make_draft(hidden_size=576)
    for start in ("target", "random"):
        assert rate_in(chosen_defaults(draft, 60, init=start)) == Choice(
            "optimizer.learning_rate", 1e-3, "by hidden size 576"
        )
    assert rate_in(chosen_defaults(draft, 60, optimizer="adamw", init="runs/a/draft")) == Choice(
        "optimizer.learning_rate", 3.3e-4, "from a trained draft, a third of 0.001"
    )


def test_a_tenth_is_held_out_at_most_24():
    assert [held_out_of(n) for n in (1, 9, 10, 60, 240, 10**6)] == [0, 0, 1, 6, 24, 24]


def test_settings_that_are_named_are_not_chosen():
    assert not_named(CHOICES, {"objective": {"ttt_length": 7}, "optimizer": "x"}) == CHOICES[1:]
    assert not_named(CHOICES, {}) == CHOICES
    assert config_of(CHOICES, "objective.ttt_length=7").objective.ttt_length == 7


def test_a_run_that_has_begun_keeps_what_it_began_with(tmp_path):
    began = config_of(CHOICES, "optimizer.learning_rate=0.25", "train.steps=9")
    text = to_toml(to_dict(began)).replace("ttt_length = 3\n", "of_another_version = 1\n")
    (tmp_path / "config.toml").write_text(text)
    assert begun_settings(tmp_path) is None  # no checkpoint: it begins anew

    meta = tmp_path / "checkpoints/step-00000004/meta.json"
    meta.parent.mkdir(parents=True)
    meta.write_text("{}")
    kept = begun_settings(tmp_path)
    assert kept
    config = load_config(None, ["optimizer.beta1=0.5"], make_draft(), kept)
    assert config.optimizer == replace(began.optimizer, beta1=0.5)
    # A setting that its file does not have is younger than the run.
    assert config.objective == ObjectiveConfig()
    assert config.train.steps == 0


def test_the_lines_printed_name_values_and_reasons_and_are_three_at_most():
    lines = describe(chosen_defaults(make_draft(hidden_size=576), 60)).splitlines()
    assert 1 <= len(lines) <= 3
    assert all(len(line) <= 200 for line in lines)
    text = "\n".join(lines)
    for part in ("learning_rate=0.001 (by hidden size 576", "held_out=6 (a tenth of 60 samples"):
        assert part in text
    assert describe([]) == ""


@pytest.mark.parametrize(
    ("samples", "steps", "survival"), [(60, 3, 0.8), (4999, 3, 0.8), (5000, 7, 0.65)]
)
def test_unroll_and_survival_are_by_the_number_of_samples(samples, steps, survival):
    objective = config_of(chosen_defaults(make_draft(), samples)).objective
    assert (objective.ttt_length, objective.survival) == (steps, survival)


def test_the_dtype_is_the_one_that_the_device_multiplies_fast(monkeypatch):
    for fast, name in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32")):
        monkeypatch.setattr(defaults, "fast_dtype", lambda device, fast=fast: fast)
        assert config_of(chosen_defaults(make_draft(), 60)).train.dtype == name


def test_a_batch_for_all_ranks_is_chosen_on_several():
    def batch(ranks: int, *overrides: str, micro_batch: int = 1) -> int:
        choices = chosen_defaults(make_draft(), 60, ranks=ranks, micro_batch=micro_batch)
        return config_of(choices, *overrides).data.global_batch

    assert batch(1) == Config(make_draft()).data.global_batch
    assert batch(2) == 2
    assert batch(2, "data.micro_batch=4", micro_batch=4) == 8
    assert batch(2, "data.global_batch=6") == 6  # a named one is taken
    said = describe(chosen_defaults(make_draft(), 60, ranks=2))
    assert "data.global_batch=2 (data.micro_batch = 1 on each of 2 ranks)" in said
    assert "global_batch" not in describe(chosen_defaults(make_draft(), 60))
