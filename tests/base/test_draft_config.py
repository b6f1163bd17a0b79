"""What a draft's `config.json` may list as tapped layers."""

import json

import pytest

from eagle3fn.base.draft_config import draft_config_from_json
from eagle3fn.base.errors import UserError

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
