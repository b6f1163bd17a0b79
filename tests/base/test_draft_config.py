"""A draft's `config.json`: tapped layers, and switches by the fields of `DraftConfig` alone."""

import json
from dataclasses import dataclass, replace

import pytest

from eagle3fn.base import draft_config
from eagle3fn.base.config import from_dict, to_dict
from eagle3fn.base.draft_config import (
    DraftConfig,
    draft_config_from_json,
    draft_config_from_target,
    draft_config_to_json,
)
from eagle3fn.base.errors import UserError
from eagle3fn.testing.strategies import switch_values

TREE = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "vocab_size": 20,
    "draft_vocab_size": 10,
    "max_position_embeddings": 32,
}
KEY = "eagle_aux_hidden_state_layer_ids"


def written(tmp_path, **changes):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TREE | changes))
    return path


@pytest.mark.parametrize(
    ("eagle", "layers"),
    [(None, None), ({}, None), ({KEY: None}, None), ({KEY: [1, 2, 4]}, (1, 2, 4))],
)
def test_tapped_layers_are_read(tmp_path, eagle, layers):
    config = draft_config_from_json(written(tmp_path, eagle_config=eagle))
    assert config.aux_layers == layers
    assert config.num_key_value_heads == 2
    assert config.target_hidden_size == 8


@pytest.mark.parametrize("eagle", [[1, 2, 4], "x", {KEY: 3}, {KEY: [1, 2, "4"]}, {KEY: [1, 2]}])
def test_other_lists_of_layers_are_refused(tmp_path, eagle):
    with pytest.raises(UserError, match=r"config.json: .*must (list|name) three"):
        draft_config_from_json(written(tmp_path, eagle_config=eagle))


def test_taps_at_the_top_are_one_higher(tmp_path):
    for eagle in ({}, {KEY: [1, 2, 4]}):
        path = written(tmp_path, eagle_config=eagle, **{KEY: [2, 3, 5]})
        assert draft_config_from_json(path).aux_layers == (1, 2, 4)
    path = written(tmp_path, eagle_config={KEY: [1, 2, 4]}, **{KEY: [1, 2, 4]})
    with pytest.raises(UserError, match=r"config.json: .*must be one above"):
        draft_config_from_json(path)


@dataclass(frozen=True)
class Switched(DraftConfig):
    """A draft with a switch of each type."""

    fc_norm: bool = False
    window: int | None = None


ON = {"fc_norm": True, "window": 3}


@pytest.fixture
def switched(monkeypatch):
    """The configuration as it is once fields are added to it."""
    monkeypatch.setattr(draft_config, "DraftConfig", Switched)


def test_switches_are_read_from_a_drafts_configuration(tmp_path, switched):
    plain = draft_config_from_json(written(tmp_path))
    assert plain == Switched(**vars(plain) | {"fc_norm": False, "window": None})
    assert draft_config_from_json(written(tmp_path, **ON)) == replace(plain, **ON)


def test_switches_are_not_taken_from_a_target(switched):
    target = TREE | ON
    assert draft_config_from_target(target, "target") == draft_config_from_target(TREE, "target")


@pytest.mark.parametrize("on", [{}, {"fc_norm": True}, {"window": 3}, ON], ids=str)
def test_switches_that_are_on_are_written(tmp_path, switched, on):
    plain = draft_config_from_target(TREE, "target")
    config = replace(plain, **on)
    tree = draft_config_to_json(config, 8, "bfloat16")
    assert tree == draft_config_to_json(plain, 8, "bfloat16") | on
    assert ON.keys() & tree.keys() == on.keys()
    (tmp_path / "config.json").write_text(json.dumps(tree))
    read = draft_config_from_json(tmp_path / "config.json")
    assert read == replace(config, aux_layers=(1, 3, 4))  # the default ones of 8 layers
    assert from_dict(Switched, to_dict(config), "file") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fc_norm": 1}, "draft.fc_norm = 1: must be true or false"),
        ({"fc_norm": None}, "draft.fc_norm = None: must be true or false"),
        ({"window": 0}, "draft.window = 0: must be a whole number, at least 1"),
        ({"window": True}, "draft.window = True: must be a whole number"),
        ({"hidden_size": 2.0}, "draft.hidden_size = 2.0: must be a whole number, at least 1"),
        ({"rms_norm_eps": 0}, "draft.rms_norm_eps = 0: must be a finite number above 0"),
    ],
)
def test_values_of_another_type_are_refused(tmp_path, switched, values, message):
    with pytest.raises(UserError, match=rf"config.json: {message}"):
        draft_config_from_json(written(tmp_path, **values))


def test_every_combination_of_switches_is_drawn(switched):
    added = [field for field in draft_config.switches() if field.name in ON]
    found = [dict(values) for values in switch_values(added)]
    assert found[0] == {}
    assert {"fc_norm": True, "window": 1} in found and {"window": 3} in found
    assert len(found) == 2 * 3
