"""A draft's `config.json`: tapped layers, and switches by the fields of `DraftConfig` alone."""

import json
from dataclasses import dataclass, replace

import pytest

from eagle3fn.base import draft_config, draft_keys
from eagle3fn.base.config import from_dict, to_dict
from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.draft_json import draft_config_from_json
from eagle3fn.base.draft_keys import draft_config_from_target, draft_config_to_json
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


@pytest.mark.parametrize("eagle", [[1, 2, 4], "x", {KEY: 3}, {KEY: []}, {KEY: [1, 2, "4"]}])
def test_other_lists_of_layers_are_refused(tmp_path, eagle):
    with pytest.raises(UserError, match=r"config.json: .*must (list layers|be an object)"):
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

    own_norm: bool = False
    own_window: int | None = None


ON = {"own_norm": True, "own_window": 3}


@pytest.fixture
def switched(monkeypatch):
    """The configuration as it is once fields are added to it."""
    for module in (draft_config, draft_keys):
        monkeypatch.setattr(module, "DraftConfig", Switched)


def test_switches_are_read_from_a_drafts_configuration(tmp_path, switched):
    plain = draft_config_from_json(written(tmp_path))
    assert plain == Switched(**vars(plain) | {"own_norm": False, "own_window": None})
    assert draft_config_from_json(written(tmp_path, **ON)) == replace(plain, **ON)


def test_switches_are_not_taken_from_a_target(switched):
    target = TREE | ON
    assert draft_config_from_target(target, "target") == draft_config_from_target(TREE, "target")


@pytest.mark.parametrize("on", [{}, {"own_norm": True}, {"own_window": 3}, ON], ids=str)
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
        ({"own_norm": 1}, "draft.own_norm = 1: must be true or false"),
        ({"own_window": 0}, "draft.own_window = 0: must be a whole number, at least 1"),
        ({"own_window": True}, "draft.own_window = True: must be a whole number"),
        ({"hidden_size": 2.0}, "draft.hidden_size = 2.0: must be a whole number, at least 1"),
        ({"rms_norm_eps": 0}, "draft.rms_norm_eps = 0: must be a finite number above 0"),
        ({"rms_norm_eps": 1.5}, "draft.rms_norm_eps = 1.5: must be at most 1"),
        ({"rms_norm_eps": True}, "draft.rms_norm_eps = True: must be a finite number above 0"),
        ({"rope_theta": 1e-300}, "draft.rope_theta = 1e-300: must be at least 1"),
        ({"initializer_range": 1e300}, r"draft.initializer_range = 1e\+300: must be at most 100"),
        ({"max_position_embeddings": 2}, "draft.max_position_embeddings = 2: must be at least 3"),
        ({"hidden_size": 2**63}, r"draft.hidden_size = 9\d+: must be .* below 2\*\*31"),
        ({"vocab_size": 10**299}, r"draft.vocab_size = 10{99}…: must be .* below 2\*\*31"),
        ({"num_key_value_heads": 0}, "draft.num_key_value_heads = 0: must be a whole number"),
        ({"head_dim": False}, "draft.head_dim = False: must be a whole number"),
        ({"target_hidden_size": 0}, "draft.target_hidden_size = 0: must be a whole number"),
        ({"rope_theta": "1e4"}, "rope_theta = '1e4': must be a number above 0"),
        ({"rope_theta": 0}, "rope_theta = 0: must be a number above 0"),
        ({"rope_theta": 10**299}, "rope_theta = 10{99}…: must be a number above 0"),
        ({"rope_theta": 2, "rope_parameters": {"rope_theta": 3}}, "rope_theta = 2, and 3 in rope_"),
        ({"rope_parameters": [3]}, r"rope_parameters = \[3\]: must be an object"),
        ({"rope_parameters": {"full_attention": 3}}, "rope_parameters = 3: must be an object"),
        ({KEY: [10**20, 10**21, 10**22]}, "draft.aux_layers = .*must be layers of a target"),
        ({"eagle_config": []}, r"eagle_config = \[\]: must be an object"),
    ],
)
def test_values_of_another_type_are_refused(tmp_path, switched, values, message):
    with pytest.raises(UserError, match=rf"config.json: {message}"):
        draft_config_from_json(written(tmp_path, **values))


def test_null_is_off_and_engines_look_under_eagle_config_first(tmp_path, switched):
    off = draft_config_from_json(written(tmp_path, own_norm=None, own_window=None))
    assert off == draft_config_from_json(written(tmp_path))
    eagle = {KEY: [1, 2, 4], "own_norm": True}
    found = draft_config_from_json(written(tmp_path, eagle_config=eagle, own_norm=False))
    assert vars(found)["own_norm"] is True


def test_each_switch_is_listed_alone_and_all_together(switched):
    added = [field for field in draft_config.switches() if field.name in ON]
    found = [dict(values) for values in switch_values(added)]
    assert found[0] == {} and found[-1] == {"own_norm": True, "own_window": 9}
    assert found[1:-1] == [{"own_norm": True}, *({"own_window": w} for w in (1, 3, 9))]


LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 2.0}


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (False, "rope_scaling = False: its rope_type must be one of"),
        ("yarn", "rope_scaling = 'yarn': its rope_type must be one of"),
        ({"rope_type": ["yarn"]}, ".*: its rope_type must be one of"),
        ({"rope_type": {}}, ".*: its rope_type must be one of"),
        (LINEAR | {"factor": True}, "rope_scaling.factor = True: must be a finite number above 0"),
        (LINEAR | {"factor": "2"}, "rope_scaling.factor = '2': must be a finite number above 0"),
        (LINEAR | {"factor": 10**299}, "rope_scaling.factor = 10{99}…: must be a finite number"),
        (LINEAR | {"factor": None}, "rope_scaling.factor = None: must be a finite number above 0"),
        ({"rope_type": "linear"}, "rope_scaling.factor = None: linear needs a finite number"),
        (LINEAR | {"type": "yarn"}, "rope_scaling.type = 'yarn': must be rope_type's 'linear'"),
        (LINEAR | {"more": {"a": 1}}, "rope_scaling.more = .*: must be a number, a text or a list"),
        (LINEAR | {"a\nb": [None]}, r"rope_scaling.a\\nb = \[None\]: must be a number, a text"),
        (YARN | {"beta_fast": "32"}, "rope_scaling.beta_fast = '32': must be a finite number"),
        (YARN | {"beta_slow": 0}, "rope_scaling.beta_slow = 0: must be a finite number above 0"),
        (YARN | {"attention_factor": [1]}, r"rope_scaling.attention_factor = \[1\]: must be"),
        (YARN | {"mscale": -1}, "rope_scaling.mscale = -1: must be a finite number, at least 0"),
        (YARN | {"mscale_all_dim": {}}, "rope_scaling.mscale_all_dim = {}: must be a finite"),
        (YARN | {"truncate": "no"}, "rope_scaling.truncate = 'no': must be true or false"),
        (YARN | {"original_max_position_embeddings": "4k"}, ".*original_max_.* = '4k': must be"),
    ],
    ids=str,
)
def test_scaling_that_cannot_be_computed_is_refused(tmp_path, scaling, message):
    with pytest.raises(UserError, match=rf"config.json: draft.{message}") as caught:
        draft_config_from_json(written(tmp_path, rope_scaling=scaling))
    assert "\n" not in str(caught.value)


def test_scaling_that_would_divide_by_zero_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"rope_theta = 1.0: must be above 1 for yarn"):
        draft_config_from_json(written(tmp_path, rope_scaling=YARN, rope_theta=1))
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(UserError, match=r"head_dim = 2: must be above 2 for dynamic"):
        draft_config_from_json(written(tmp_path, rope_scaling=dynamic, head_dim=2))


def test_null_is_a_value_that_is_not_given(tmp_path):
    scaling = YARN | {"attention_factor": None, "mscale": 0, "truncate": False}
    nulls = dict.fromkeys(("head_dim", "num_key_value_heads", "rope_theta", "rope_parameters"))
    config = draft_config_from_json(written(tmp_path, rope_scaling=scaling, **nulls))
    assert (config.head_dim, config.num_key_value_heads, config.rope_theta) == (4, 2, 10_000.0)
    assert config.rope_scaling == scaling
    assert draft_config_from_json(written(tmp_path, rope_scaling={})).rope_scaling is None


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_act": "gelu"},
        {"use_last_layernorm": False},
        {"mlp_bias": True},
        {"eagle_config": {"mlp_bias": True}},
        {"layer_types": ["chunked_attention"]},
    ],
    ids=str,
)
def test_switches_that_are_not_built_are_refused_by_name(tmp_path, values):
    """In every draft's configuration, a shape to train too; an engine may compute them."""
    (name,) = values.get("eagle_config", values)
    path = written(tmp_path, **values)
    with pytest.raises(UserError, match=rf"config.json: (eagle_config.)?{name} = .*not supported"):
        draft_config_from_json(path)
    assert draft_config_from_json(path, None).hidden_size == 8


EVERY_SWITCH = {
    "norm_before_fc": True,
    "fc_norm": True,
    "norm_output": True,
    "norm_before_residual": True,
    "attention_bias": True,
    "qk_norm": True,
    "num_hidden_layers": 2,
    "draft_window": 64,
    "train_embedding": True,
}


def test_the_switches_of_these_tests_are_all():
    found = {field.name for field in draft_config.switches()}
    assert found == EVERY_SWITCH.keys()


@pytest.mark.parametrize("name", EVERY_SWITCH)
def test_each_switch_comes_back_from_its_config_json(tmp_path, name):
    config = replace(draft_config_from_target(TREE, "target"), **{name: EVERY_SWITCH[name]})
    tree = draft_config_to_json(config, 8, "bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert draft_config_from_json(tmp_path / "config.json") == replace(config, aux_layers=(1, 3, 4))


@pytest.mark.parametrize("name", EVERY_SWITCH)
def test_each_switch_is_read_by_its_own_name_too(tmp_path, name):
    """At the top of a JSON, or under `eagle_config`; of two of them engines have other keys."""
    hf = {"num_hidden_layers": 1}  # always there
    for values in ({name: EVERY_SWITCH[name]}, {"eagle_config": {name: EVERY_SWITCH[name]}}):
        found = draft_config_from_json(written(tmp_path, **hf | values), "hf")
        assert getattr(found, name) == EVERY_SWITCH[name]


def test_keys_are_those_that_engines_read():
    config = replace(draft_config_from_target(TREE, "target"), **EVERY_SWITCH, aux_layers=(1, 5))
    tree = draft_config_to_json(config, 8, "bfloat16")
    assert tree["architectures"] == ["Eagle3Qwen3ForCausalLM"] and tree["model_type"] == "qwen3"
    assert tree["sliding_window"] == 64 and tree["use_sliding_window"] is True
    assert tree["layer_types"] == ["sliding_attention"] * 2 and tree["num_hidden_layers"] == 2
    assert tree["num_aux_hidden_states"] == 2 and tree["attention_bias"] is True
    names = ("norm_before_fc", "fc_norm", "norm_output", "norm_before_residual")
    assert [tree[name] for name in names] == [True] * 4
    assert not {"qk_norm", "draft_window"} & tree.keys()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sliding_window": 128}, "sliding_window = 128, layer_types = .*all layers must have"),
        (
            {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
            "sliding_window = 8, layer_types = .*all layers must have the window",
        ),
        ({"layer_types": ["sliding_attention"]}, "layer_types = .* without sliding_window"),
        ({"layer_types": "sliding_attention"}, "layer_types = .*must be a list"),
        ({"num_aux_hidden_states": 4}, "num_aux_hidden_states = 4, but .* lists none"),
        ({"num_hidden_layers": 9}, "draft.num_hidden_layers = 9: must be at most 8"),
        ({"norm_output": True}, "norm_output = True: .*--from hf, or --from specforge"),
        ({"norm_output": "yes"}, "norm_output = 'yes': must be true or false"),
        ({"eagle_config": {KEY: list(range(17))}}, "draft.aux_layers = .*must name 1 to 16"),
    ],
)
def test_switches_that_say_too_little_or_too_much_are_refused(tmp_path, values, message):
    with pytest.raises(UserError, match=rf"config.json: {message}"):
        draft_config_from_json(written(tmp_path, **values))


def test_norm_output_is_read_by_its_origin(tmp_path):
    """SpecForge's means whether the head reads the normed state, which it does here always."""
    path = written(tmp_path, norm_output=True, eagle_config={KEY: [1, 2, 4], "norm_output": True})
    assert draft_config_from_json(path, "specforge").norm_output is False
    assert draft_config_from_json(path, "hf").norm_output is True
    path = written(tmp_path, norm_output=False)
    with pytest.raises(UserError, match="norm_output = False: at SpecForge"):
        draft_config_from_json(path, "specforge")
    assert draft_config_from_json(path, "hf").norm_output is False


def test_a_window_that_is_off_is_full_attention(tmp_path):
    full = {"sliding_window": 8, "layer_types": ["full_attention"]}
    for values in (full, {"sliding_window": 8, "use_sliding_window": False}):
        assert draft_config_from_json(written(tmp_path, **values)).draft_window is None
