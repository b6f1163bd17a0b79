"""The plan's numbers are those of tensors that are really allocated, and a plan that cannot fit is refused."""

import json

import pytest
import torch

import eagle3fn as e3
from eagle3fn.base.config import to_dict
from eagle3fn.base.toml import to_toml
from eagle3fn.base.tree import named_leaves
from eagle3fn.cli import main
from eagle3fn.train.memory import GIB, check_fits, plan_memory
from tests.factories import random_sample, write_folder
from tests.small import config_of, frozen_of

QWEN_7B = dict(
    hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
    max_position_embeddings=32768, rms_norm_eps=1e-6, rope_theta=1e6, model_type="qwen2", num_hidden_layers=28,
)  # fmt: skip
LLAMA_70B = dict(
    hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8, vocab_size=128256,
    max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=5e5, model_type="llama", num_hidden_layers=80,
)  # fmt: skip


def size(tree) -> int:
    return sum(leaf.nbytes for leaf in named_leaves(tree).values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_one_rank_holds_what_is_allocated(dtype):
    config, plan = config_of(dtype), plan_memory(config_of(dtype))
    frozen = frozen_of(config)
    state = e3.bind(config, frozen).init_state(
        e3.init_params(config.draft, 0, getattr(torch, dtype))
    )
    held = {
        "parameters": state.params,
        "masters": state.masters,
        "moments": state.opt,
        "frozen tensors": frozen,
    }
    assert {name: plan.held[name] for name in held} == {
        name: size(tree) for name, tree in held.items()
    }
    assert plan.held["gradients"] == size(state.params)
    assert plan.held["gathered parameters"] == sum(plan.moved.values()) == 0
    assert plan.params == sum(leaf.numel() for leaf in state.params.values())


def test_tied_and_own_embeddings_are_counted_once():
    config = config_of()
    whole, tied = plan_memory(config).held, plan_memory(config, tied=True).held
    assert whole["frozen tensors"] - tied["frozen tensors"] == frozen_of(config).target_head.nbytes
    own = e3.load_config(None, ["draft.target_hidden_size=8"], config.draft)
    plan = plan_memory(own)
    assert plan.held["frozen tensors"] == 40 * 8 * 2 + 40 + 24 * 8
    assert plan.params == sum(leaf.numel() for leaf in e3.init_params(own.draft, 0).values())


def test_features_have_the_size_that_is_told(tmp_path):
    folder = write_folder(tmp_path, [random_sample(60, seed) for seed in range(4)], per_shard=4)
    whole = (folder / "shard-00000.safetensors").stat().st_size
    config = e3.load_config(None, ["draft.target_hidden_size=4"], config_of().draft)
    told = plan_memory(config, tokens=240).disk
    header = whole - told["features"]
    assert told["features"] == 240 * told["features of a token"]
    assert 0 < header < 4 * 600  # names and places of four samples' tensors


@pytest.mark.parametrize("tree", [QWEN_7B, LLAMA_70B], ids=["7B", "70B"])
def test_a_plan_from_a_target_a_draft_or_numbers(tmp_path, capsys, tree):
    (tmp_path / "config.json").write_text(json.dumps(tree))
    draft = {**tree, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 32_000}
    (tmp_path / "draft.json").write_text(json.dumps(draft))
    config = e3.Config(e3.draft_config_from_target(tree, "tree"))
    (tmp_path / "plain.toml").write_text(to_toml(to_dict(config)))
    plan = plan_memory(config, 8, 10**8)
    features = (8 * tree["hidden_size"] + 16) * 10**8
    for source in (
        ["--target", tmp_path],
        ["--draft-config", tmp_path / "draft.json"],
        ["--config", tmp_path / "plain.toml"],
    ):
        assert main(["plan", *map(str, source), "--ranks", "8", "--tokens", str(10**8)]) == 0
        text = capsys.readouterr().out
        for number in (
            f"{plan.params:,} trained values",
            f"{plan.needed / GIB:,.2f} GiB",
            f"{features / GIB:,.2f} GiB",
        ):
            assert number in text
    assert main(["plan"]) == 2
    assert "name a target" in capsys.readouterr().err


def test_a_plan_that_cannot_fit_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    call = ["plan", "--target", str(tmp_path), "--memory"]
    assert main([*call, "24"]) == 2
    assert "start 2 ranks" in capsys.readouterr().err
    assert main([*call, "24", "--ranks", "2"]) == 0
    assert main([*call, "4"]) == 2
    assert "more ranks won't do" in capsys.readouterr().err
    config = config_of()
    needed = plan_memory(config).needed
    check_fits(config, 1, needed, "here")
    with pytest.raises(e3.UserError, match="here is"):
        check_fits(config, 1, needed - 1, "here")
