"""The plan's numbers are those of allocated tensors; a plan that cannot fit is refused."""

import json
from dataclasses import replace
from typing import Any

import pytest

import eagle3fn as e3
from eagle3fn.base.config import to_dict
from eagle3fn.base.toml import to_toml
from eagle3fn.base.tree import named_leaves
from eagle3fn.cli import main
from eagle3fn.data.feature_writing import write_shard
from eagle3fn.data.storage import STORES
from eagle3fn.train.memory import GIB, check_fits, plan_memory
from eagle3fn.train.optimizer import OPTIMIZERS
from tests.factories import make_config, make_frozen, random_sample, write_folder

QWEN_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
LLAMA_70B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
}


def size(tree: Any) -> int:
    """Bytes of all leaves."""
    return sum(leaf.nbytes for leaf in named_leaves(tree).values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_planned_bytes_of_one_rank_are_those_allocated(optimizer, dtype):
    config = replace(make_config(dtype), optimizer=e3.OptimizerConfig(name=optimizer))
    plan = plan_memory(config)
    frozen = make_frozen(config)
    fns = e3.bind(config, frozen)
    state = fns.init_state(fns.init(0))

    assert plan.held["parameters"] == size(state.params)
    assert plan.held["masters"] == size(state.masters)
    assert plan.held["optimizer state"] == size(state.opt)
    assert plan.held["frozen tensors"] == size(frozen)
    assert plan.disk["a checkpoint"] == size(state) + size(state.params)
    assert plan.held["gradients"] == size(state.params)
    assert plan.held["gathered parameters"] == sum(plan.moved.values()) == 0
    assert plan.params == sum(leaf.numel() for leaf in state.params.values())


def test_tied_and_own_embeddings_are_counted_once():
    config = make_config()
    whole = plan_memory(config).held
    tied = plan_memory(config, tied=True).held
    head = make_frozen(config).target_head
    assert whole["frozen tensors"] - tied["frozen tensors"] == head.nbytes

    # A draft of another width trains its own embedding: of the target it needs the head alone.
    own = e3.load_config(None, ["draft.target_hidden_size=8"], config.draft)
    plan = plan_memory(own)
    assert plan.held["frozen tensors"] == 40 * 8 * 2 + 40 + 24 * 8
    assert plan.params == sum(leaf.numel() for leaf in e3.init_params(own.draft, 0).values())


def test_planned_bytes_of_features_are_those_written(tmp_path):
    folder = write_folder(tmp_path, [random_sample(60, seed) for seed in range(4)], per_shard=4)
    written = (folder / "shard-00000.safetensors").stat().st_size
    config = e3.load_config(None, ["draft.target_hidden_size=4"], make_config().draft)
    planned = plan_memory(config, tokens=240).disk
    assert planned["features"] == 240 * planned["features of a token"]

    header = written - planned["features"]
    assert 0 < header < 4 * 600  # names and places of four samples' tensors


@pytest.mark.parametrize("store", STORES)
def test_planned_bytes_of_smaller_features_are_those_written(tmp_path, store):
    samples = {str(seed): random_sample(60, seed) for seed in range(4)}
    written = write_shard(tmp_path, 0, samples, {}, store)["bytes"]
    config = e3.load_config(None, ["draft.target_hidden_size=4"], make_config().draft)
    header = written - plan_memory(config, tokens=240).disk[f"features in {store}"]
    assert 0 < header < 4 * 1500


@pytest.mark.parametrize("tree", [QWEN_7B, LLAMA_70B], ids=["7B", "70B"])
def test_plan_is_the_same_from_a_target_a_draft_and_a_configuration(tmp_path, capsys, tree):
    (tmp_path / "config.json").write_text(json.dumps(tree))
    draft = {**tree, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 32_000}
    draft["num_hidden_layers"] = 1
    (tmp_path / "draft.json").write_text(json.dumps(draft))
    config = e3.Config(e3.draft_config_from_target(tree, "tree"))
    (tmp_path / "plain.toml").write_text(to_toml(to_dict(config)))

    plan = plan_memory(config, 8, 10**8)
    features = (8 * tree["hidden_size"] + 16) * 10**8
    sources = (
        ["--target", tmp_path],
        ["--draft-config", tmp_path / "draft.json"],
        ["--config", tmp_path / "plain.toml"],
    )
    for source in sources:
        assert main(["plan", *map(str, source), "--ranks", "8", "--tokens", str(10**8)]) == 0
        text = capsys.readouterr().out
        assert f"{plan.params:,} trained values" in text
        assert f"{plan.needed / GIB:,.2f} GiB" in text
        assert f"{features / GIB:,.2f} GiB" in text


def test_plan_of_nothing_is_refused(capsys):
    assert main(["plan"]) == 2
    assert "name a target" in capsys.readouterr().err


def test_plan_that_cannot_fit_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    call = ["plan", "--target", str(tmp_path), "--memory"]
    assert main([*call, "24"]) == 2
    assert "start 2 ranks" in capsys.readouterr().err
    assert main([*call, "24", "--ranks", "2"]) == 0
    assert main([*call, "4"]) == 2
    assert "more ranks won't do" in capsys.readouterr().err


def test_limit_is_compared_to_the_byte():
    config = make_config()
    needed = plan_memory(config).needed
    check_fits(config, 1, needed, "here")
    with pytest.raises(e3.UserError, match="here is"):
        check_fits(config, 1, needed - 1, "here")
