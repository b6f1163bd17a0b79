"""An export is what serving engines read, and loads back unchanged."""

import json
import os
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle3fn.base.draft_config import DraftConfig, aux_layers
from eagle3fn.base.draft_keys import draft_config_to_json
from eagle3fn.base.errors import UserError
from eagle3fn.base.tree import equal
from eagle3fn.base.types import Frozen
from eagle3fn.model.rope import rope_table
from eagle3fn.testing.builders import Case, tiny_frozen, tiny_params
from eagle3fn.testing.strategies import VALUES
from eagle3fn.train.drafts import stored_dtype
from eagle3fn.train.foreign_drafts import read_foreign
from eagle3fn.use.export import export, load_draft

LAYERS = 8
DEFAULT_TAPS = (1, 3, 4)
TAPS = "eagle_aux_hidden_state_layer_ids"
PLAIN = Case(dtype="float32")
OWN = Case(target_hidden=20, hidden=16)
FULL = Case(vocab=24, draft_vocab=24)


def write(
    folder, case: Case = PLAIN, dtype: torch.dtype = torch.float32, **changes
) -> tuple[DraftConfig, Frozen]:
    config = replace(case.draft(), **changes)
    frozen = tiny_frozen(case)
    export(tiny_params(case), frozen, config, folder, LAYERS, dtype)
    return config, frozen


@pytest.mark.parametrize(
    "case", [PLAIN, OWN, FULL], ids=["reduced", "own embedding", "full vocabulary"]
)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": 50_000.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"aux_layers": (0, 2, 7)},
    ],
    ids=["default", "theta", "scaled", "layers"],
)
def test_round_trip(tmp_path, case, changes):
    config, frozen = write(tmp_path / "draft", case, **changes)
    draft = load_draft(tmp_path / "draft", torch.float32)
    assert draft.config == replace(config, aux_layers=config.aux_layers or DEFAULT_TAPS)
    assert equal(draft.params, tiny_params(case))
    assert list(draft.params) == list(tiny_params(case))
    assert equal(draft.vocab._asdict(), {"t2d": frozen.t2d, "d2t": frozen.d2t})
    if frozen.embed_tokens is None:
        assert draft.embed_tokens is None
    else:
        assert draft.embed_tokens is not None
        assert torch.equal(draft.embed_tokens, frozen.embed_tokens)


@pytest.mark.parametrize("switches", VALUES["switches"], ids=str)
def test_switches_come_back(tmp_path, switches):
    case = replace(OWN, switches=switches)
    config, _ = write(tmp_path, case)
    draft = load_draft(tmp_path, torch.float32)
    assert draft.config == replace(config, aux_layers=DEFAULT_TAPS)
    assert equal(draft.params, tiny_params(case))

    # Off in the configuration, the weights that it brings are refused by name.
    more = tiny_params(case).keys() - tiny_params(OWN).keys()
    plain = replace(OWN.draft(), aux_layers=DEFAULT_TAPS)
    tree = draft_config_to_json(plain, LAYERS, "float32")
    (tmp_path / "config.json").write_text(json.dumps(tree))
    if more:
        with pytest.raises(UserError, match=rf"({'|'.join(more)}) is not a parameter"):
            load_draft(tmp_path, torch.float32)
    else:
        assert load_draft(tmp_path, torch.float32).config == plain


def test_weights_as_engines_read_them(tmp_path):
    _, frozen = write(tmp_path, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    assert set(tensors) == set(tiny_params(PLAIN)) | {"embed_tokens.weight", "d2t", "t2d"}
    assert (tensors["d2t"].dtype, tensors["t2d"].dtype) == (torch.int64, torch.bool)
    offsets = tensors["d2t"] + torch.arange(PLAIN.draft_vocab)
    assert torch.equal(offsets, frozen.t2d.nonzero().flatten())
    assert {v.dtype for k, v in tensors.items() if k not in ("d2t", "t2d")} == {torch.bfloat16}


def test_full_vocabulary_has_no_maps(tmp_path):
    write(tmp_path, FULL)
    assert not {"d2t", "t2d"} & set(load_file(tmp_path / "model.safetensors"))


def test_config_as_engines_read_it(tmp_path):
    write(tmp_path, dtype=torch.bfloat16, rope_theta=50_000.0)
    tree = json.loads((tmp_path / "config.json").read_text())
    assert tree["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (tree["model_type"], tree["num_hidden_layers"]) == ("llama", 1)
    assert tree["rope_parameters"] == {"rope_type": "default", "rope_theta": 50_000.0}
    assert (tree["rope_theta"], tree["rope_scaling"]) == (50_000.0, None)
    assert tree["tie_word_embeddings"] is False
    assert tree["draft_vocab_size"] == PLAIN.draft_vocab
    assert tree["torch_dtype"] == tree["dtype"] == "bfloat16"
    assert "target_hidden_size" not in tree

    # The taps are always written: as outputs below eagle_config, as inputs at the top.
    assert tree["eagle_config"] == {TAPS: [1, 3, 4], "use_aux_hidden_state": True}
    assert tree[TAPS] == [2, 4, 5]


def test_rope_theta_of_the_configuration_wins(tmp_path):
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}
    write(tmp_path, rope_scaling=scaling, rope_theta=50_000.0)
    tree = json.loads((tmp_path / "config.json").read_text())
    assert tree["rope_parameters"] == {
        "rope_type": "linear",
        "rope_theta": 50_000.0,
        "factor": 2.0,
    }


def test_other_taps_and_target_size_are_written(tmp_path):
    write(tmp_path, OWN, aux_layers=(0, 2, 7), rope_scaling={"type": "dynamic", "factor": 4.0})
    tree = json.loads((tmp_path / "config.json").read_text())
    assert tree["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2, 7]
    assert tree["eagle_aux_hidden_state_layer_ids"] == [1, 3, 8]
    assert tree["target_hidden_size"] == 20
    assert tree["rope_scaling"] == {"type": "dynamic", "factor": 4.0}
    assert tree["rope_parameters"]["rope_type"] == "dynamic"
    assert tree["rope_parameters"]["factor"] == 4.0


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def test_rope_that_not_every_engine_loads_needs_any_rope(tmp_path):
    with pytest.raises(UserError, match=r"'llama3'.*any_rope=True"):
        write(tmp_path / "draft", rope_scaling=LLAMA3)
    assert not (tmp_path / "draft").exists()
    config = replace(PLAIN.draft(), rope_scaling=LLAMA3)
    params = tiny_params(PLAIN)
    folder = tmp_path / "draft"
    export(params, tiny_frozen(PLAIN), config, folder, LAYERS, torch.float32, any_rope=True)
    assert load_draft(folder, torch.float32).config == replace(config, aux_layers=DEFAULT_TAPS)


def test_a_failed_export_leaves_the_old_one(tmp_path):
    write(tmp_path / "draft")
    before = (tmp_path / "draft" / "model.safetensors").read_bytes()
    params = tiny_params(PLAIN)
    del params["fc.weight"]
    with pytest.raises(UserError, match=r"fc\.weight is missing"):
        export(params, tiny_frozen(PLAIN), PLAIN.draft(), tmp_path / "draft", LAYERS, torch.float32)
    assert (tmp_path / "draft" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match=r"holds thesis\.txt, and only what eagle3fn wrote is"):
        write(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years"


def to_strangers(folder):
    """Make an export what another trainer writes: another card, another configuration."""
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# As eagle3fn's\n")
    with_another_configuration(folder)


def add_a_folder(folder):
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    (folder / "README.md/thesis").write_text("years")


@pytest.mark.parametrize(
    "change",
    [
        to_strangers,
        add_a_folder,
        lambda folder: (folder / "thesis").write_text("years"),
        lambda folder: (folder / "README.md").rename(folder / "LICENSE"),
    ],
    ids=["another trainer's", "a folder in it", "a file in it", "a file renamed"],
)
def test_a_draft_that_was_not_exported_here_is_not_replaced(tmp_path, change):
    write(tmp_path / "draft")
    change(tmp_path / "draft")
    before = sorted(path.stat().st_ino for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match="only what eagle3fn wrote is replaced"):
        write(tmp_path / "draft")
    assert sorted(path.stat().st_ino for path in tmp_path.rglob("*")) == before


def with_another_configuration(folder):
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {"transformers_version": "4.57.1"}))


def of_the_first_version(folder):
    (folder / "README.md").unlink()
    tree = json.loads((folder / "config.json").read_text())
    without = {key: tree[key] for key in tree.keys() - {TAPS, "eagle_config"}}
    (folder / "config.json").write_text(json.dumps(without))


def with_a_damaged_configuration(folder):
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    "change", [with_another_configuration, of_the_first_version, with_a_damaged_configuration]
)
def test_older_exports_are_replaced(tmp_path, change):
    write(tmp_path / "draft")
    new = (tmp_path / "draft/model.safetensors").read_bytes()
    change(tmp_path / "draft")
    write(tmp_path / "draft")
    assert (tmp_path / "draft/model.safetensors").read_bytes() == new


def drop(name):
    return lambda tensors: tensors.pop(name)


def add(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("norm.weight"), r"norm\.weight is missing"),
        (drop("d2t"), "d2t is missing"),
        (add("extra.weight", torch.zeros(2)), r"extra\.weight is not a parameter"),
        (add("fc.weight", torch.zeros(2, 2)), r"fc\.weight has shape \(2, 2\)"),
        (
            add("embed_tokens.weight", torch.zeros(2, 16)),
            r"embed_tokens\.weight has shape \(2, 16\)",
        ),
        (add("d2t", torch.tensor(3)), r"d2t has shape \(\)"),
        (add("d2t", torch.zeros(2, 8, dtype=torch.int64)), r"d2t has shape \(2, 8\)"),
        (add("t2d", torch.tensor(True)), r"t2d has shape \(\)"),
        (add("d2t", tiny_frozen(PLAIN).t2d.nonzero().flatten()), "must be offsets"),
        (add("t2d", torch.ones(40, dtype=torch.bool)), "name different tokens"),
    ],
)
def test_wrong_weights_are_refused_by_file(tmp_path, change, message):
    write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"model\.safetensors.*{message}"):
        load_draft(tmp_path, torch.float32)


def test_missing_t2d_is_made_from_d2t(tmp_path):
    _, frozen = write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "t2d"}, tmp_path / "model.safetensors")
    assert torch.equal(load_draft(tmp_path, torch.float32).vocab.t2d, frozen.t2d)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 8]}, "one above"),
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLMEagle3"),
        ({"draft_vocab_size": 30}, "lm_head|d2t"),
        ({"eagle_aux_hidden_state_layer_ids": 3}, "eagle_aux_hidden_state_layer_ids = 3"),
        ({"eagle_aux_hidden_state_layer_ids": ["1", "3", "8"]}, "eagle_aux_hidden_state_layer_ids"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": 3}}, r"eagle_config\.eagle_\w+ = 3"),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": "abc"}},
            "eagle_aux_hidden_state_layer_ids",
        ),
        ({"eagle_config": [3]}, "eagle_config|aux_layers"),
        ({"architectures": 3}, "architectures = 3"),
        ({"hidden_size": "big"}, "hidden_size|not a number"),
        ({"rope_scaling": [2]}, "rope_scaling"),
    ],
)
def test_wrong_configs_are_refused(tmp_path, change, message):
    write(tmp_path, aux_layers=(0, 2, 7))
    tree = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(tree | change))
    with pytest.raises(UserError, match=message) as caught:
        load_draft(tmp_path, torch.float32)
    assert "config.json" in str(caught.value) or "model.safetensors" in str(caught.value)


def test_a_config_without_sizes_is_refused(tmp_path):
    write(tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    del tree["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"config\.json.*hidden_size"):
        load_draft(tmp_path, torch.float32)


def test_input_layers_alone_give_the_taps(tmp_path):
    write(tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    del tree["eagle_config"]
    (tmp_path / "config.json").write_text(
        json.dumps(tree | {"eagle_aux_hidden_state_layer_ids": [1, 3, 8]})
    )
    assert load_draft(tmp_path, torch.float32).config.aux_layers == (0, 2, 7)


@pytest.mark.parametrize("name", ["draft", "train/draft"])
@pytest.mark.parametrize(
    "read",
    [lambda folder: load_draft(folder, torch.float32), stored_dtype, read_foreign],
    ids=["load_draft", "stored_dtype", "read_foreign"],
)
def test_a_runs_folder_in_place_of_its_draft_names_the_draft(read, name, tmp_path):
    write(tmp_path / name)
    with pytest.raises(UserError) as raised:
        read(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path}/config.json: no such file; {tmp_path} is a run's folder: name its "
        f"{tmp_path / name}"
    )
    assert read(tmp_path / name)


def test_a_target_in_place_of_a_draft_is_refused_as_none(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    message = r"\['LlamaForCausalLM'\]: not an EAGLE-3 draft, .*; name a draft, .*, not its target$"
    with pytest.raises(UserError, match=message):
        load_draft(tmp_path, torch.float32)


def test_missing_or_damaged_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load_draft(tmp_path, torch.float32)
    write(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        load_draft(tmp_path, torch.float32)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{", None])
def test_a_config_that_is_no_object_is_named(tmp_path, text):
    write(tmp_path)
    file = tmp_path / "config.json"
    file.unlink()
    file.mkdir() if text is None else file.write_text(text)
    with pytest.raises(UserError, match=r"config\.json: "):
        load_draft(tmp_path, torch.float32)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, None])
def test_weights_that_are_no_file_of_tensors_are_named(tmp_path, content):
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    file.unlink()
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: "):
        load_draft(tmp_path, torch.float32)


def test_truncated_weights_and_a_file_in_place_of_the_folder_are_named(tmp_path):
    write(tmp_path / "draft")
    file = tmp_path / "draft/model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        load_draft(tmp_path / "draft", torch.float32)
    with pytest.raises(UserError, match=r"model\.safetensors.config\.json: "):
        load_draft(file, torch.float32)


def test_taps_are_written_where_the_target_has_no_default(tmp_path):
    """Three layers are too few for the default taps."""
    config = replace(PLAIN.draft(), aux_layers=(0, 1, 2))
    export(tiny_params(PLAIN), tiny_frozen(PLAIN), config, tmp_path, 3, torch.float32)
    assert load_draft(tmp_path, torch.float32).config.aux_layers == (0, 1, 2)


def test_an_older_export_without_taps_is_read(tmp_path):
    write(tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    del tree["eagle_config"], tree[TAPS]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert load_draft(tmp_path, torch.float32).config == PLAIN.draft()


@pytest.mark.parametrize("layers", [(4, 1, 3), (1, 1, 3)])
def test_taps_that_engines_gather_otherwise_are_refused(tmp_path, layers):
    """Engines collect the taps while they run upwards, each layer once."""
    with pytest.raises(UserError, match=r"draft\.aux_layers = .*(\[1, 3, 4\]|twice)"):
        write(tmp_path, aux_layers=layers)


@pytest.mark.parametrize("layers", [6, 5, 4, 3])
def test_a_target_too_shallow_for_the_default_taps_is_refused_with_taps_that_fit(tmp_path, layers):
    frozen = tiny_frozen(PLAIN)
    with pytest.raises(UserError, match=r"--set draft\.aux_layers=\[") as caught:
        export(tiny_params(PLAIN), frozen, PLAIN.draft(), tmp_path, layers, torch.float32)
    named = re.search(r"aux_layers=\[(\d+),(\d+),(\d+)\]", str(caught.value))
    assert named
    assert f"extract --aux-layers {','.join(named.groups())} and" in str(caught.value)
    taps = tuple(int(layer) for layer in named.groups())
    config = replace(PLAIN.draft(), aux_layers=taps)
    assert aux_layers(config, layers) == taps
    assert (max(taps) < layers - 1) == (layers > 3)  # SGLang does not capture the last layer


def test_a_target_of_two_layers_has_no_taps():
    with pytest.raises(UserError, match="at least 3 layers"):
        aux_layers(PLAIN.draft(), 2)


PARTIAL = {"partial_rotary_factor": 0.25, "rope_theta": 1e6}
SCALED = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "llama3": LLAMA3,
    "mrope": {"rope_type": "mrope", "mrope_section": [1, 1, 1]},
}


@pytest.mark.parametrize("name", SCALED)
def test_rope_is_written_as_it_was_trained(tmp_path, name):
    """All dimensions rotated; an mrope target's draft as the default, which transformers reads."""
    from transformers import AutoConfig

    config = replace(PLAIN.draft(), rope_scaling=SCALED[name] | PARTIAL)
    params = tiny_params(PLAIN)
    export(params, tiny_frozen(PLAIN), config, tmp_path, LAYERS, torch.float32, any_rope=True)
    tree = json.loads((tmp_path / "config.json").read_text())
    for rope in (tree["rope_parameters"], tree["rope_scaling"] or {}):
        assert not {"partial_rotary_factor", "mrope_section"} & set(rope)
    assert tree["rope_parameters"]["rope_type"] == ("default" if name == "mrope" else name)
    if name == "yarn":  # vLLM has no default for it
        length = config.max_position_embeddings
        assert tree["rope_parameters"]["original_max_position_embeddings"] == length

    # Read by transformers, and read back, it rotates as before.
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_type"] == tree["rope_parameters"]["rope_type"]
    cpu = torch.device("cpu")
    before = rope_table(config, 40, torch.float32, cpu)
    after = rope_table(load_draft(tmp_path, torch.float32).config, 40, torch.float32, cpu)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "missing"])
def test_weights_that_are_no_file_are_refused_without_waiting(tmp_path, kind):
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    said = "no such file" if kind == "missing" else f"is a {kind}; name a regular file"
    with pytest.raises(UserError, match=rf"model\.safetensors: {said}"):
        load_draft(tmp_path, torch.float32)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("norm.weight", torch.full((16,), torch.nan), r"norm\.weight holds NaN or infinity"),
        ("norm.weight", torch.full((16,), -torch.inf), r"norm\.weight holds NaN or infinity"),
        ("norm.weight", torch.ones(16, dtype=torch.complex64), r"norm\.weight is no dense tensor"),
        ("norm.weight", torch.ones(16).to(torch.float8_e4m3fn), r"norm\.weight is float8_e4m3fn"),
        ("a\n\x1b[2J", torch.full((16,), torch.nan), r"a\\n\\x1b\[2J holds NaN or infinity"),
        ("d2t", torch.full((8,), 0.5), r"d2t is torch\.float32; must be whole numbers"),
    ],
    ids=["NaN", "infinity", "complex", "quantised", "evil name", "d2t"],
)
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, name, value, message):
    write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    try:
        save_file(tensors | {name: value}, tmp_path / "model.safetensors")
    except KeyError:  # safetensors 0.6.1 has no complex numbers
        pytest.skip(f"this release of safetensors cannot write {value.dtype}")
    with pytest.raises(UserError, match=rf"model\.safetensors: {message}"):
        load_draft(tmp_path, torch.float32)


def test_parameters_that_are_not_finite_are_not_exported(tmp_path):
    params = tiny_params(PLAIN)
    params["fc.weight"] = params["fc.weight"] * torch.nan
    with pytest.raises(UserError, match=r"export: fc\.weight holds NaN or infinity"):
        export(params, tiny_frozen(PLAIN), PLAIN.draft(), tmp_path / "draft", LAYERS, torch.float32)
    assert not (tmp_path / "draft").exists()
