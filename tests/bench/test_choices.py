"""Choices compared in equal time: each is a valid configuration; and what is counted of them."""

import pytest

from bench.choices import EAGLE_31, GROUPS, steps_to
from eagle3fn.base.config import load_config, to_dict
from eagle3fn.base.draft_config import switches
from eagle3fn.model.checks import check_loss
from eagle3fn.model.named_loss import LOSSES
from eagle3fn.testing.builders import Case
from eagle3fn.train.optimizer import OPTIMIZERS, named_optimizer
from eagle3fn.train.schedules import SCHEDULES

EVERY = [(group, name) for group, choices in GROUPS.items() for name in choices]
MUON = {"optimizer": {"name": "muon"}}  # as `eagle3fn train` takes it by itself


@pytest.mark.parametrize(("group", "name"), EVERY)
def test_each_choice_is_a_configuration_of_its_own(group: str, name: str) -> None:
    settings = GROUPS[group][name]
    draft = Case().draft()
    config = load_config(None, settings, draft, MUON)
    check_loss(config)
    named_optimizer(config.optimizer)
    first = next(iter(GROUPS[group]))
    plain = load_config(None, GROUPS[group][first], draft, MUON)
    assert (config == plain) is (name == first)


def test_nothing_that_can_be_named_is_left_out() -> None:
    """Every switch, loss, optimizer and schedule is compared with the first of its group."""
    set_by = {
        group: {text.partition("=")[0] for texts in choices.values() for text in texts}
        for group, choices in GROUPS.items()
    }
    assert set_by["switches"] == {f"draft.{field.name}" for field in switches()}
    draft = Case().draft()

    def found(group: str, section: str, key: str) -> set[str]:
        configs = [to_dict(load_config(None, each, draft, MUON)) for each in GROUPS[group].values()]
        return {config[section][key] for config in configs if isinstance(config[section][key], str)}

    assert found("losses", "objective", "loss") == set(LOSSES)
    assert found("optimizers", "optimizer", "name") == set(OPTIMIZERS)
    assert found("schedules", "optimizer", "schedule") == set(SCHEDULES)
    assert GROUPS["switches"]["EAGLE-3.1"] == EAGLE_31


def test_steps_to_what_another_reaches_are_its_first_there() -> None:
    def run(*lengths: float) -> dict:
        by_step = {str(10 * (i + 1)): length for i, length in enumerate(lengths)}
        return {"by_step": by_step, "accepted_length": lengths[-1]}

    found = {
        "adamw": [run(1.1, 1.3, 1.2), run(1.0, 1.1, 1.2)],
        "better": [run(1.2, 1.1, 1.4), run(1.1, 1.15, 1.3)],
        "worse": [run(1.0, 1.1, 1.1), run(1.0, 1.0, 1.1)],
    }
    assert steps_to(found, "adamw") == {
        "adamw": [20, 30],
        "better": [10, 30],
        "worse": [None, None],
    }
