"""Drafts of other trainers: each layout is read as the very same function, or refused by name."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import eagle3fn as e3
from eagle3fn.base.draft_keys import draft_config_to_json, taps_keys
from eagle3fn.base.errors import UserError
from eagle3fn.base.tree import equal
from eagle3fn.base.types import VocabMap
from eagle3fn.cli import main
from eagle3fn.testing.builders import Case, tiny_frozen, tiny_params
from eagle3fn.train.foreign_drafts import read_foreign
from eagle3fn.train.warm_start import check_start
from eagle3fn.use.engine_limits import ENGINES
from eagle3fn.use.export import Draft, export_for, load_draft
from eagle3fn.use.layouts import speculators_keys
from tests.factories import tiny_model

LAYERS = 8
TAPS = (1, 3, 4)
KEY = "eagle_aux_hidden_state_layer_ids"
CASE = Case(dtype="float32", heads=(4, 2), head_dim=4, hidden=16, target_hidden=16)
PARAMS = tiny_params(CASE)
FROZEN = tiny_frozen(CASE)
TREE = draft_config_to_json(replace(CASE.draft(), aux_layers=TAPS), LAYERS, "float32")
TENSORS = {**PARAMS, "d2t": FROZEN.d2t, "t2d": FROZEN.t2d}


def by_number(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("midlayer.", "layers.0."): value for name, value in tensors.items()}


def put(folder: Path, tree: dict[str, Any], tensors: dict[str, Tensor] = TENSORS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tree))
    save_file(tensors, folder / "model.safetensors")
    return folder


def hf(folder: Path) -> Path:
    return put(folder, TREE)


def eagle(folder: Path) -> Path:
    """SafeAILab's: a pickle, and a configuration that names no draft."""
    tree = {key: value for key, value in TREE.items() if "eagle" not in key and "rope" not in key}
    tree |= {"architectures": ["LlamaForCausalLM"]}
    put(folder, tree)
    (folder / "model.safetensors").unlink()
    torch.save(TENSORS, folder / "pytorch_model.bin")
    return folder


def shards(folder: Path) -> Path:
    """Two files and an index, with a prefix before the names."""
    put(folder, TREE)
    (folder / "model.safetensors").unlink()
    names = list(TENSORS)
    files = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in files.items():
        save_file({f"model.{name}": TENSORS[name] for name in part}, folder / file)
    places = {f"model.{name}": file for file, part in files.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def speculators(folder: Path) -> Path:
    """Sizes under `transformer_layer_config` alone; copies of the target's head and norm."""
    keys = speculators_keys(TREE, "org/target", ["LlamaForCausalLM"])
    tree = {"architectures": ["Eagle3Speculator"], "target_hidden_size": None, **keys}
    tree |= {"draft_vocab_size": TREE["draft_vocab_size"], KEY: TREE[KEY]}
    more = {"verifier_norm.weight": torch.ones(16), "verifier_lm_head.weight": torch.ones(2, 16)}
    return put(folder, tree, by_number(TENSORS) | more)


LAYOUTS = {"hf": hf, "eagle": eagle, "shards": shards, "speculators": speculators}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read_as_the_same_draft(tmp_path, name):
    found = read_foreign(LAYOUTS[name](tmp_path))
    assert found.origin == ("hf" if name == "shards" else name)
    taps = None if name == "eagle" else TAPS
    theta = 10_000.0
    assert found.draft.config == replace(CASE.draft(), aux_layers=taps, rope_theta=theta)
    assert equal(found.draft.params, PARAMS)
    assert list(found.draft.params) == list(PARAMS)
    assert equal(found.draft.vocab._asdict(), {"t2d": FROZEN.t2d, "d2t": FROZEN.d2t})
    assert found.draft.embed_tokens is None and not found.changes


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_starts_a_run(tmp_path, name):
    folder = LAYOUTS[name](tmp_path)
    draft = replace(CASE.draft(), aux_layers=TAPS, rope_theta=10_000.0)
    train = e3.TrainConfig(dtype="float32", init=str(folder))
    config = e3.Config(draft, e3.ObjectiveConfig(), e3.OptimizerConfig(), e3.DataConfig(), train)
    assert equal(e3.bind(config, FROZEN).init(0), PARAMS)

    kept = VocabMap(FROZEN.t2d, FROZEN.d2t)
    if name == "eagle":  # it lists no taps: those are the default ones of the target
        with pytest.raises(UserError, match=r"its aux_layers is \(1, 3, 4\), the run's is \(0,"):
            check_start(replace(config, draft=replace(draft, aux_layers=(0, 3, 4))), LAYERS, kept)
    assert check_start(config, LAYERS, kept).endswith("24 of 24 draft tokens")


def test_values_keep_the_widest_dtype_of_the_file(tmp_path):
    tensors = TENSORS | {"fc.weight": PARAMS["fc.weight"].half()}
    tensors |= {"lm_head.weight": PARAMS["lm_head.weight"].bfloat16()}
    tensors = {k: v.half() if v.dtype == torch.float32 else v for k, v in tensors.items()}
    found = read_foreign(put(tmp_path, TREE, tensors))
    assert found.dtype == torch.float32  # of float16 and bfloat16
    assert torch.equal(found.draft.params["lm_head.weight"].bfloat16(), tensors["lm_head.weight"])


# Another order of taps or tokens


def test_unsorted_taps_are_the_same_function_sorted(tmp_path):
    """Projected features are those of the file, whichever order the features are laid in."""
    order = (2, 0, 1)  # places of the sorted taps
    blocks = PARAMS["fc.weight"].chunk(3, dim=1)
    tensors = TENSORS | {"fc.weight": torch.cat([blocks[i] for i in order], dim=1)}
    listed = [TAPS[i] for i in order]
    tree = TREE | {KEY: [layer + 1 for layer in listed], "eagle_config": {KEY: listed}}
    found = read_foreign(put(tmp_path, tree, tensors))

    assert found.draft.config.aux_layers == TAPS
    assert found.changes and "(4" not in found.changes[0] and "[4, 1, 3]" in found.changes[0]
    features = {layer: torch.randn(5, 16) for layer in TAPS}
    theirs = torch.cat([features[layer] for layer in listed], dim=1) @ tensors["fc.weight"].T
    ours = torch.cat([features[layer] for layer in TAPS], dim=1) @ found.draft.params["fc.weight"].T
    torch.testing.assert_close(ours, theirs)


def test_repeated_taps_are_refused(tmp_path):
    tree = TREE | {KEY: [2, 2, 4], "eagle_config": None}
    with pytest.raises(UserError, match=r"config\.json.*\(1, 1, 3\).*twice"):
        read_foreign(put(tmp_path, tree))


def test_draft_tokens_in_another_order_are_sorted_with_the_heads_rows(tmp_path):
    ids = FROZEN.d2t + torch.arange(CASE.draft_vocab)
    mixed = torch.randperm(CASE.draft_vocab, generator=torch.Generator().manual_seed(1))
    tensors = TENSORS | {
        "d2t": ids[mixed] - torch.arange(CASE.draft_vocab),
        "lm_head.weight": PARAMS["lm_head.weight"][mixed],
    }
    found = read_foreign(put(tmp_path, TREE, tensors))
    assert torch.equal(found.draft.vocab.d2t, FROZEN.d2t)
    assert torch.equal(found.draft.params["lm_head.weight"], PARAMS["lm_head.weight"])
    assert "draft tokens are sorted" in found.changes[0]


# Switches


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("num_aux_hidden_states", 4, "num_aux_hidden_states = 4, but"),
        ("mlp_bias", True, "biases"),
        ("hidden_act", "gelu", "silu is built"),
        ("quantization_config", {"bits": 4}, "quantised"),
        ("sliding_window", 64, "all layers must have the window"),
        ("layer_types", ["chunked_attention"], "attention of another kind"),
        ("eagle_config", {"use_aux_hidden_state": False}, "reads no taps"),
        ("eagle_config", {"mlp_bias": True}, r"eagle_config\.mlp_bias"),
        ("eagle_config", {"parallel_draft_step": 2}, "several tokens"),
        ("eagle_config", {"something_new": 1}, "something_new = 1: not known here"),
        ("model_type", "deepseek_v3", "llama's and qwen3's are built"),
        ("partial_rotary_factor", 0.5, "a part of each head is rotated"),
        ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "a part of each"),
        ("architectures", ["LlamaForCausalLMEagle"], ""),
    ],
)
def test_switches_that_are_on_are_refused_by_name(tmp_path, key, value, text):
    folder = put(tmp_path, TREE | {key: value})
    if key == "architectures":  # of no draft, but with its keys: as EAGLE's files are
        assert read_foreign(folder).origin == "eagle"
        return
    with pytest.raises(UserError, match=rf"config\.json: .*{text}"):
        read_foreign(folder)
    if key not in ("model_type", "partial_rotary_factor", "rope_parameters"):
        with pytest.raises(UserError, match=rf"config\.json: .*{text}"):
            load_draft(folder, torch.float32)


@pytest.mark.parametrize("layout", [hf, speculators])
def test_switches_of_a_speculators_file_are_read_at_its_top(tmp_path, layout):
    folder = layout(tmp_path)
    path = folder / "config.json"
    tree = json.loads(path.read_text())
    assert read_foreign(folder).draft.config.norm_before_residual is False
    path.write_text(json.dumps(tree | {"norm_before_residual": True}))
    assert read_foreign(folder).draft.config.norm_before_residual is True


@pytest.mark.parametrize(
    ("switches", "engine"),
    [
        ({"fc_norm": True, "norm_output": True, "norm_before_residual": True}, "speculators"),
        ({"norm_before_fc": True, "qk_norm": True, "num_hidden_layers": 3}, "vllm"),
        ({"attention_bias": True, "draft_window": 8, "train_embedding": True}, "vllm"),
        ({"fc_norm": True, "num_hidden_layers": 2}, "sglang"),
    ],
    ids=str,
)
def test_a_draft_with_switches_comes_back_from_an_engines_layout(tmp_path, switches, engine):
    case = Case(switches=tuple(switches.items()))
    frozen = tiny_frozen(case)
    config = replace(case.draft(), aux_layers=(1, 3, 4))
    vocab = VocabMap(frozen.t2d, frozen.d2t)
    embed = None if config.own_embedding else frozen.embed_tokens
    draft = Draft(config, tiny_params(case), vocab, embed)
    export_for(draft, ENGINES[engine], tmp_path / "draft", 8, torch.float32, "target")
    found = read_foreign(tmp_path / "draft").draft
    assert found.config == config
    assert equal(found.params, draft.params)


def test_taps_out_of_order_move_their_norms(tmp_path):
    """Of each tap and of all together; the function of sorted taps is the same."""
    case = Case(switches=(("norm_before_fc", True), ("fc_norm", True)), dtype="float64")
    params = tiny_params(case)
    order = [2, 0, 1]  # where each tap of the file is in the sorted list
    moved = dict(params)
    for name in ("fc.weight", "input_norm.weight"):
        blocks = params[name].chunk(3, dim=-1)
        moved[name] = torch.cat([blocks[i] for i in order], dim=-1)
    for place, i in enumerate(order):
        moved[f"fc_norm.{place}.weight"] = params[f"fc_norm.{i}.weight"]
    tree = draft_config_to_json(replace(case.draft(), aux_layers=(1, 3, 4)), 8, "float64")
    tree |= taps_keys((4, 1, 3))
    frozen = tiny_frozen(case)
    maps = {"t2d": frozen.t2d, "d2t": frozen.d2t}
    found = read_foreign(put(tmp_path, tree, moved | maps))
    assert found.draft.config.aux_layers == (1, 3, 4)
    assert equal(found.draft.params, params)


def test_norm_output_has_two_meanings(tmp_path):
    """On by default at SpecForge, where the head then reads the normed state, as here."""
    on = put(tmp_path / "on", TREE | {"norm_output": True})
    off = put(tmp_path / "off", TREE | {"norm_output": False})
    for folder in (on, off):
        with pytest.raises(UserError, match=r"norm_output = .*vLLM.*SpecForge.*--from"):
            read_foreign(folder)
    assert read_foreign(on, "specforge").origin == "specforge"
    assert read_foreign(off, "hf").origin == "hf"
    assert read_foreign(on, "specforge").draft.config.norm_output is False
    assert read_foreign(on, "hf").draft.config.norm_output is True
    with pytest.raises(UserError, match="the head reads the state before the final norm"):
        read_foreign(off, "specforge")


def test_biases_of_zero_change_nothing(tmp_path):
    bias = {"midlayer.self_attn.q_proj.bias": torch.zeros(16)}
    tree = TREE | {"attention_bias": True}
    found = read_foreign(put(tmp_path / "zero", tree, TENSORS | bias))
    assert equal(found.draft.params, PARAMS)
    bias = {"midlayer.self_attn.q_proj.bias": torch.full((16,), 1e-3)}
    with pytest.raises(UserError, match=r"k_proj\.bias is missing"):
        read_foreign(put(tmp_path / "other", tree, TENSORS | bias))


def test_a_bias_after_attention_that_is_missing_is_zero(tmp_path):
    """vLLM's layer of Qwen3 has none."""
    case = Case(switches=(("attention_bias", True),))
    tensors = dict(tiny_params(case))
    del tensors["midlayer.self_attn.o_proj.bias"]
    tree = draft_config_to_json(replace(case.draft(), aux_layers=(1, 3, 4)), 8, "float32")
    frozen = tiny_frozen(case)
    found = read_foreign(put(tmp_path, tree, tensors | {"t2d": frozen.t2d, "d2t": frozen.d2t}))
    params = found.draft.params
    assert params["midlayer.self_attn.o_proj.bias"].count_nonzero() == 0
    assert equal({name: params[name] for name in tensors}, tensors)


def test_eagle_ignores_the_rope_base_where_it_scales(tmp_path):
    folder = eagle(tmp_path)
    path = folder / "config.json"
    tree = json.loads(path.read_text()) | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    path.write_text(json.dumps(tree | {"rope_theta": 5e5}))
    with pytest.raises(UserError, match="rotates by base 10000"):
        read_foreign(folder)
    path.write_text(json.dumps(tree))
    assert read_foreign(folder).draft.config.rope_type == "linear"


# Files


class Harm:
    """What a pickle can do where it is loaded without care."""

    def __reduce__(self) -> Any:
        return (open, ("harm.txt", "w"))


def test_nothing_in_a_pickle_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = eagle(tmp_path / "draft")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"fc.weight": Harm()}, 2))
    with pytest.raises(UserError, match=r"pytorch_model\.bin: damaged or not tensors alone") as e:
        read_foreign(folder)
    assert "weights_only" not in str(e.value)
    assert not (tmp_path / "harm.txt").exists()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"config\.json: no such file"),
        (lambda folder: (folder / "a.safetensors").unlink(), r"a\.safetensors: no such file"),
        (lambda folder: (folder / "b.safetensors").write_bytes(b"x"), r"b\.safetensors: damaged"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
            "has no weight_map",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"fc.weight": "../secret.safetensors"}})
            ),
            "must be a file of its folder",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").unlink(),
            r"no model\.safetensors and no pytorch_model\.bin",
        ),
    ],
)
def test_missing_and_damaged_files_are_named(tmp_path, change, text):
    folder = shards(tmp_path / "draft")
    change(folder)
    with pytest.raises(UserError, match=text):
        read_foreign(folder)


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "not an EAGLE-3 draft"),
        ({"speculators_model_type": "dflash"}, "another algorithm"),
        ({"speculators_model_type": "eagle3"}, "transformer_layer_config = None"),
        ([], "must be a JSON object"),
        ({"architectures": 5}, "architectures = 5: must be a list"),
        (TREE | {"eagle_config": [1]}, r"eagle_config = \[1\]: must be an object"),
        (TREE | {"layer_types": 7}, "layer_types = 7: must be a list"),
        (TREE | {"rope_scaling": "x"}, "rope_scaling = 'x': must be an object"),
        (TREE | {"transformer_layer_config": 3}, "transformer_layer_config = 3"),
        (TREE | {"rope_theta": "x"}, "rope_theta = 'x': must be a number"),
        (TREE | {"rope_parameters": [1]}, r"rope_parameters = \[1\]: must be an object"),
        (TREE | {"norm_output": "no"}, "norm_output = 'no': must be true or false"),
    ],
)
def test_what_is_no_draft_is_named(tmp_path, tree, text):
    with pytest.raises(UserError, match=rf"config\.json: .*{text}"):
        read_foreign(put(tmp_path, tree))


def test_another_layout_than_the_origin_said_is_refused(tmp_path):
    with pytest.raises(UserError, match="looks as one of speculators"):
        read_foreign(speculators(tmp_path), "hf")


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"fc.weight": TENSORS["fc.weight"] * float("nan")}, "fc.weight holds NaN or infinity"),
        ({"norm.weight": torch.ones(16).to(torch.float8_e4m3fn)}, "norm.weight is float8_e4m3fn"),
        ({"model.norm.weight": torch.ones(16)}, "holds norm.weight under two names"),
        (
            by_number({"midlayer.hidden_norm.weight": torch.ones(16)}),
            "hidden_norm.weight under two",
        ),
        ({"lm_head.weight": torch.tensor(1.0)}, r"lm_head.weight has shape \(\)"),
    ],
)
def test_weights_that_are_no_draft_are_named(tmp_path, changed, text):
    with pytest.raises(UserError, match=rf"model\.safetensors: .*{text}"):
        read_foreign(put(tmp_path, TREE, TENSORS | changed))


def test_a_pickle_of_names_that_are_none_is_refused(tmp_path):
    folder = eagle(tmp_path)
    torch.save(TENSORS | {5: torch.ones(1)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="not a dict of named tensors"):
        read_foreign(folder)


# The command


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of eight layers, with the draft's vocabulary and width."""
    folder = tmp_path_factory.mktemp("target")
    model = tiny_model(num_hidden_layers=LAYERS, vocab_size=CASE.vocab, hidden_size=16)
    model.save_pretrained(folder)
    return folder


def convert(*words: object) -> int:
    return main(["convert", *map(str, words)])


@pytest.mark.parametrize("name", LAYOUTS)
def test_convert_writes_an_export(tmp_path, target, name, capsys):
    folder = LAYOUTS[name](tmp_path / "foreign")
    out = tmp_path / "ours"
    assert convert("--draft", folder, "--out", out, "--target", target) == 0
    found = e3.load_draft(out, torch.float32)
    assert found.config.aux_layers == TAPS
    assert equal(found.params, PARAMS)
    assert {file.name for file in out.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    assert "a draft of" in capsys.readouterr().out


def test_a_draft_without_taps_needs_its_target(tmp_path, target, capsys):
    folder = eagle(tmp_path / "foreign")
    assert convert("--draft", folder, "--out", tmp_path / "ours") == 2
    assert "--target" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_a_target_of_other_sizes_is_refused(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "target")
    folder = hf(tmp_path / "foreign")
    words = ("--draft", folder, "--out", tmp_path / "ours", "--target", tmp_path / "target")
    assert convert(*words) == 2
    assert "its vocab_size is 300, the draft's target has 40" in capsys.readouterr().err


def test_a_converted_draft_goes_to_vllm_and_back(tmp_path, target):
    folder = eagle(tmp_path / "foreign")
    assert convert("--draft", folder, "--out", tmp_path / "ours", "--target", target) == 0
    words = ["export", "--draft", tmp_path / "ours", "--out", tmp_path / "vllm", "--for", "vllm"]
    assert main([*map(str, words), "--target", str(target)]) == 0
    tree = json.loads((tmp_path / "vllm/config.json").read_text())
    verifier = tree["speculators_config"]["verifier"]
    assert verifier == {"name_or_path": str(target), "architectures": ["LlamaForCausalLM"]}
    assert convert("--draft", tmp_path / "vllm", "--out", tmp_path / "back") == 0
    before = load_file(tmp_path / "ours/model.safetensors")
    assert equal(before, load_file(tmp_path / "back/model.safetensors"))


def verifier_of(folder: Path) -> str:
    tree = json.loads((folder / "config.json").read_text())
    return tree["speculators_config"]["verifier"]["name_or_path"]


def test_a_targets_path_is_written_as_it_was_named_and_said(tmp_path, target, monkeypatch, capsys):
    """Absolute, as vLLM may be started elsewhere; a link stays one."""
    draft = hf(tmp_path / "draft")
    (tmp_path / "current").symlink_to(target)
    monkeypatch.chdir(tmp_path)
    words = ["export", "--draft", str(draft), "--out", "out", "--target", "current"]
    assert main([*words, "--for", "vllm"]) == 0
    assert verifier_of(tmp_path / "out") == str(tmp_path / "current")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "out/config.json names the target by its path here" in said[0]
    assert str(tmp_path / "current") in said[0] and "--target-name" in said[0]

    # Nothing is said where another name is given, or the layout names no target.
    assert main([*words, "--for", "vllm", "--target-name", "org/served"]) == 0
    assert verifier_of(tmp_path / "out") == "org/served"
    assert main([*words, "--for", "sglang"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "out: for vLLM 0.32.0, run",
        "out: for SGLang 0.5.23, read",
    ]


@pytest.mark.parametrize("engine", ["sglang", "eagle"])
def test_an_engine_of_some_taps_needs_the_targets_depth(tmp_path, engine, capsys):
    words = ["export", "--draft", str(hf(tmp_path / "draft")), "--out", str(tmp_path / "out")]
    assert main([*words, "--for", engine]) == 2
    assert f"--for {engine}: which layers it taps depends on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_vllms_folder_needs_the_targets_name(tmp_path, capsys):
    words = ["export", "--draft", hf(tmp_path / "draft"), "--out", tmp_path / "v", "--for", "vllm"]
    assert main([*map(str, words)]) == 2
    assert "add --target" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--draft", "x", "--for", "specforge"), "by eagle3fn export"),
        (("--vocab", "x", "--from", "hf"), "of drafts alone"),
        (("--features", "x", "--for", "speculators"), "before the target's final norm"),
        (("--features", "x"), "--target"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, words, text, capsys):
    assert convert(*words, "--out", tmp_path / "out") == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("convert", "--draft", "draft"), "--draft"),
        (("convert", "--vocab", "draft"), "--vocab"),
        (("convert", "--features", "draft"), "--features"),
        (("export", "--for", "vllm", "--draft", "draft", "--target", "t"), "--draft"),
    ],
)
def test_what_is_read_is_not_written_over(tmp_path, monkeypatch, words, option, capsys):
    before = hf(tmp_path / "draft")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(before)
    for out in ("draft", "link"):
        assert main([*words, "--out", out]) == 2
        assert f"--out {out}: is {option} too" in capsys.readouterr().err
    assert load_file(before / "model.safetensors").keys() == TENSORS.keys()


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64", "float8_e4m3fn"])
def test_a_dtype_that_no_draft_has_is_refused(tmp_path, dtype, capsys):
    folder = put(tmp_path / "draft", TREE | {"dtype": dtype})
    words = ["export", "--for", "vllm", "--draft", str(folder), "--target-name", "t"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert f"dtype = {dtype!r}: must be one of torch's" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.ones(16).to_sparse(), "is sparse|holds more than tensors"),
        (torch.ones(16, device="meta"), "meta|holds more than tensors"),
        (torch.ones(16, dtype=torch.complex64), "is complex|holds more than tensors"),
        (
            torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
            "is nested|holds more than tensors",
        ),
    ],
)
def test_a_pickle_of_other_tensors_than_plain_ones_is_refused(tmp_path, value, text):
    folder = eagle(tmp_path)
    torch.save(TENSORS | {"norm.weight": value}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=rf"pytorch_model\.bin: damaged or not .*({text})"):
        read_foreign(folder)
