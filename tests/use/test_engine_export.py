"""A draft written for an engine: its layout, what the engine cannot represent, the model card."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.errors import UserError
from eagle3fn.base.tree import equal
from eagle3fn.testing.builders import Case, tiny_frozen, tiny_params
from eagle3fn.train.drafts import Draft
from eagle3fn.use.engine_limits import (
    EAGLE,
    ENGINES,
    SGLANG,
    SPECULATORS,
    VLLM,
    Engine,
    engines_line,
    unrepresentable,
)
from eagle3fn.use.export import export, export_for, load_draft
from eagle3fn.use.model_card import Facts, public_name, read_facts
from tests.engine_table import PAGE, written

LAYERS = 8
TAPS = (1, 3, 4)  # the default ones
CASE = Case(dtype="float32", heads=(4, 2), head_dim=4, hidden=16, target_hidden=16)
OWN = Case(dtype="float32", heads=(4, 2), head_dim=4, target_hidden=20, hidden=16)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FACTS = Facts("org/target", "talks", 12, 345, 67, 1.5)


def draft_of(case: Case = CASE, **changes) -> Draft:
    config = replace(case.draft(), **{"aux_layers": TAPS, **changes})
    frozen = tiny_frozen(case)
    embed = None if config.own_embedding else frozen.embed_tokens
    return Draft(config, tiny_params(case), (frozen.t2d, frozen.d2t), embed)  # type: ignore


def write(folder: Path, engine: Engine, draft: Draft | None = None) -> dict:
    export_for(
        draft or draft_of(),
        engine,
        folder,
        LAYERS,
        torch.float32,
        "org/target",
        ("LlamaForCausalLM",),
        FACTS,
    )
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_every_engines_folder_is_read_back_unchanged(tmp_path, engine):
    draft = draft_of()
    write(tmp_path, engine, draft)
    found = load_draft(tmp_path, torch.float32)
    assert found.config == draft.config
    assert equal(found.params, draft.params)
    assert found.embed_tokens is not None and draft.embed_tokens is not None
    assert torch.equal(found.embed_tokens, draft.embed_tokens)


def test_one_folder_has_vllms_keys_and_speculators(tmp_path):
    """`vllm serve` needs the block and reads the plain keys; speculators reads the block's."""
    tree = write(tmp_path, VLLM)
    assert (tree["model_type"], tree["architectures"]) == ("llama", ["LlamaForCausalLMEagle3"])
    block = tree["speculators_config"]
    assert block["verifier"] == {
        "name_or_path": "org/target",
        "architectures": ["LlamaForCausalLM"],
    }
    assert block["default_proposal_method"] in {
        method["proposal_type"] for method in block["proposal_methods"]
    }
    assert tree["speculators_model_type"] == "eagle3"

    # The layer's own configuration, and the switches, said outright: vLLM's default for one is on.
    layer = tree["transformer_layer_config"]
    assert all(layer[key] == tree[key] for key in layer if key != "architectures")
    assert {"hidden_size", "head_dim", "rope_parameters", "vocab_size"} <= layer.keys()
    switches = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    assert [tree[name] for name in switches] == [False] * 4

    # Without a name that speculators would leave at its random start.
    names = load_file(tmp_path / "model.safetensors").keys()
    assert not any("midlayer" in name for name in names)
    assert "layers.0.self_attn.q_proj.weight" in names


def test_an_export_names_the_layer_as_specforge_and_eagle_do_and_has_no_block(tmp_path):
    """speculators would take a folder with the block, and leave `midlayer` out without a word."""
    tree = write(tmp_path, SGLANG)
    assert "speculators_config" not in tree
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "midlayer.self_attn.q_proj.weight" in names


def test_eagles_scaling_has_its_two_keys_alone(tmp_path):
    linear = draft_of(rope_scaling={"rope_type": "linear", "factor": 2})
    assert write(tmp_path, EAGLE, linear)["rope_scaling"] == {"type": "linear", "factor": 2.0}
    assert load_draft(tmp_path, torch.float32).config.rope_type == "linear"


CASES = [
    ("eagle", CASE, {"rope_scaling": YARN}, "no RoPE of type yarn"),
    (
        "eagle",
        CASE,
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 5e4},
        "rotates by base 10000, not 50000",
    ),
    ("eagle", replace(CASE, head_dim=6), {}, "its head size is hidden_size"),
    ("eagle", CASE, {"aux_layers": (0, 2, 4)}, r"it taps layers \(1, 3, 4\) alone"),
    ("sglang", CASE, {"aux_layers": (1, 3, 7)}, "does not capture .* last layer, 7"),
    ("speculators", OWN, {}, "no draft of another width"),
    ("llamacpp", CASE, {"rope_scaling": YARN | {"truncate": False}}, "YaRN's truncate"),
    ("llamacpp", CASE, {"rope_scaling": YARN | {"attention_factor": 1.2}}, "attention_factor"),
    (
        "llamacpp",
        CASE,
        {"rope_scaling": YARN | {"mscale": 1.3, "mscale_all_dim": 0.7}},
        "YaRN's mscale",
    ),
]


@pytest.mark.parametrize(("name", "case", "changes", "text"), CASES)
def test_what_an_engine_cannot_represent_is_refused_with_who_can(
    tmp_path, name, case, changes, text
):
    draft = draft_of(case, **changes)
    with pytest.raises(UserError, match=rf"--for {name}: .*{text}.*; .*vllm.* can; train"):
        write(tmp_path / "out", ENGINES[name], draft)
    assert not (tmp_path / "out").exists()
    assert re.search(text, str(unrepresentable(name, draft.config, LAYERS)))
    assert unrepresentable("vllm", draft.config, LAYERS) is None


def test_a_refusal_names_all_that_an_engine_lacks(tmp_path):
    changes = {"aux_layers": (0, 2, 4), "qk_norm": True, "draft_window": 8}
    draft = draft_of(**changes)
    with pytest.raises(UserError) as caught:
        write(tmp_path / "out", EAGLE, draft)
    said = str(caught.value)
    for name in ("qk_norm", "draft_window"):
        assert f"it has no {name}, which is {changes[name]} in this draft" in said
        assert f"it has no {name}" in str(unrepresentable("eagle", draft.config, LAYERS))
    assert "it taps layers (1, 3, 4) alone" in said and "\n" not in said
    assert said.endswith(
        "; vllm, speculators can; train a draft with other taps and without what it lacks"
    )


def test_a_line_says_which_engines_can_and_what_the_others_lack():
    config = draft_of(fc_norm=True, norm_output=True).config
    assert engines_line(config, LAYERS) == (
        "engines: vllm, sglang, speculators can represent this draft; cannot represent it: "
        "llamacpp (it has no fc_norm, which is True in this draft; it has no norm_output, which is "
        "True in this draft), eagle (it has no fc_norm, which is True in this draft; it has no "
        "norm_output, which is True in this draft)"
    )
    both = draft_of(aux_layers=(0, 7), qk_norm=True, attention_bias=True, fc_norm=True).config
    assert engines_line(replace(both, norm_before_fc=True), LAYERS).startswith(
        "engines: none can represent this draft; cannot represent it: vllm (its layer with qk_norm"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": YARN | {"mscale": 0.5}},  # alone it changes nothing
        {"rope_scaling": {"rope_type": "mrope", "mrope_section": [1, 1]}},  # written as default
        {"aux_layers": (0, 2, 6)},
    ],
    ids=str,
)
def test_what_can_be_represented_is_not_refused(changes):
    config: DraftConfig = draft_of(**changes).config
    for name in ("vllm", "sglang", "llamacpp", "speculators"):
        assert unrepresentable(name, config, LAYERS) is None


def test_the_page_has_the_tables_of_the_code():
    text = PAGE.read_text(encoding="utf-8")
    assert written(text) == text, "the tables have changed; run python -m tests.engine_table"


# The card


def test_the_card_has_the_facts_and_no_path(tmp_path):
    config, frozen = replace(CASE.draft(), aux_layers=TAPS), tiny_frozen(CASE)
    target = tmp_path / "models/some-target"
    target.mkdir(parents=True)
    facts = FACTS._replace(target=str(target))
    folder = tmp_path / "draft"
    export(tiny_params(CASE), frozen, config, folder, LAYERS, torch.float32, facts=facts)

    text = (folder / "README.md").read_text()
    assert text.startswith("---\n")
    assert "some-target" in text and str(tmp_path) not in text
    assert "base_model" not in text  # a folder is no model of the hub
    for said in ("1, 3, 4", "talks: 12 samples, 345 supervised tokens", "| 67 |", "1.500"):
        assert said in text
    for command in ("vllm serve TARGET", "sglang.launch_server", "convert_hf_to_gguf.py"):
        assert command in text
    assert read_facts(folder) == facts._replace(target="some-target")


def test_the_card_lists_the_engines_that_can_and_says_which_cannot(tmp_path):
    export_for(
        draft_of(draft_window=8), VLLM, tmp_path, LAYERS, torch.float32, "org/target", ("A",)
    )
    text = (tmp_path / "README.md").read_text()
    assert "vllm serve DRAFT  # takes" in text and "vllm serve TARGET" in text
    assert "sglang.launch_server" not in text and "llama-server" not in text
    lines = [line for line in text.splitlines() if "cannot represent it" in line]
    assert lines == [
        "These engines cannot represent it: "
        + ", ".join(
            f"{name} (it has no draft_window, which is 8 in this draft)"
            for name in ("sglang", "llamacpp", "eagle")
        )
        + "."
    ]


def test_the_card_of_a_draft_that_no_engine_serves_has_no_command(tmp_path):
    """speculators trains drafts and serves none."""
    draft = draft_of(qk_norm=True, attention_bias=True)
    export_for(draft, SPECULATORS, tmp_path, LAYERS, torch.float32, "org/target", ("A",))
    text = (tmp_path / "README.md").read_text()
    assert "```" not in text and "vllm serve" not in text
    assert "These engines cannot represent it: vllm (its layer with qk_norm has no bias" in text


def test_a_folder_that_looks_like_a_hub_id_is_none(tmp_path, monkeypatch):
    (tmp_path / "run/target").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("run/target") == ("target", False)
    assert public_name("run/other") == ("run/other", True)


def test_the_card_names_a_target_of_the_hub(tmp_path):
    write(tmp_path, VLLM)
    text = (tmp_path / "README.md").read_text()
    header = text.split("---\n")[1]
    assert "base_model: org/target\n" in header
    assert not re.search(r"^license:", header, re.M)  # left to the user
    assert "vllm serve DRAFT" in text and "--model-path org/target" in text
    assert read_facts(tmp_path) == FACTS


def test_a_plain_export_has_a_card_without_facts(tmp_path):
    config = replace(CASE.draft(), aux_layers=TAPS)
    export(tiny_params(CASE), tiny_frozen(CASE), config, tmp_path, LAYERS, torch.float32)
    text = (tmp_path / "README.md").read_text()
    assert "| tapped layers of the target | 1, 3, 4, counted from 0 |" in text
    assert "samples" not in text and "updates" not in text
    assert read_facts(tmp_path) == Facts()


def test_facts_of_a_strange_name_stay_in_their_comment(tmp_path):
    facts = FACTS._replace(data="a --> b <!-- c")
    config = replace(CASE.draft(), aux_layers=TAPS)
    params, frozen = tiny_params(CASE), tiny_frozen(CASE)
    export(params, frozen, config, tmp_path, LAYERS, torch.float32, facts=facts)
    assert read_facts(tmp_path) == facts
    comment = (tmp_path / "README.md").read_text().split("<!-- eagle3fn ")[1]
    assert comment.count("-->") == 1


def test_a_targets_folder_is_not_replaced(tmp_path):
    """It has the same file names as an export."""
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(UserError, match="only what eagle3fn wrote is replaced"):
        write(tmp_path, VLLM)
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"


def test_an_export_with_files_of_the_users_is_not_replaced(tmp_path):
    write(tmp_path, VLLM)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        write(tmp_path, VLLM)
    (tmp_path / "notes.txt").unlink()
    write(tmp_path, SGLANG)


@pytest.mark.parametrize(
    "facts",
    [
        '{"target": 3}',
        '{"steps": "many"}',
        '{"accepted_length": NaN}',
        '{"data": "a\\nb"}',
        '{"other": 1}',
        '{"samples": true}',
        '{"steps": -1}',
        '{"unroll": 0}',
        '{"unroll": -3}',
        '{"unroll": true}',
        '{"unroll": 1000000000}',  # evaluate would draft so many tokens a round
        "{",
        "[" * 1000,
    ],
)
def test_facts_of_a_damaged_card_are_not_known(tmp_path, facts):
    (tmp_path / "README.md").write_text(f"<!-- eagle3fn {facts} -->\n")
    assert read_facts(tmp_path) == Facts()


NO_CARDS = {
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "large": lambda path: path.write_bytes(bytes(2**24 + 1)),
    "bytes": lambda path: path.write_bytes(b"\xff"),
}


@pytest.mark.parametrize("make", NO_CARDS.values(), ids=NO_CARDS)
def test_a_card_that_is_no_text_is_refused(tmp_path, make):
    make(tmp_path / "README.md")
    with pytest.raises(UserError, match=r"README\.md: (is a|no such file|larger|not UTF-8)"):
        read_facts(tmp_path)
