"""What is converted to and from SpecForge, held against SpecForge's own classes."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from eagle3fn.base.tree import equal
from eagle3fn.cli import main
from eagle3fn.specforge.oracle import Oracle, specforge_draft
from eagle3fn.testing.builders import Case, tiny_frozen, tiny_params
from eagle3fn.train.foreign_drafts import read_foreign
from eagle3fn.use.export import export
from tests.factories import random_sample, write_folder

CASE = Case(dtype="float32", heads=(4, 2), head_dim=4, hidden=16, target_hidden=16)
CONFIG = replace(CASE.draft(), aux_layers=(1, 3, 4))


def module_of(oracle: Oracle) -> Any:
    """SpecForge's draft module, every value in it 3; its own `from_pretrained` needs transformers
    4.
    """
    zeros = {name: torch.zeros_like(value) for name, value in tiny_params(CASE).items()}
    module = specforge_draft(oracle, CONFIG, zeros, tiny_frozen(CASE))
    with torch.no_grad():
        for value in module.state_dict().values():
            value.fill_(3)
    return module


def test_its_draft_class_loads_our_export(oracle: Oracle, tmp_path: Path) -> None:
    """Every tensor is where it was, and none is missing or left over."""
    export(tiny_params(CASE), tiny_frozen(CASE), CONFIG, tmp_path, 8, torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    module = module_of(oracle)
    module.load_state_dict(stored, strict=True)
    assert equal(dict(module.state_dict()), {name: stored[name] for name in module.state_dict()})


def test_what_its_trainer_saves_is_read(oracle: Oracle, tmp_path: Path) -> None:
    """As its checkpoints are written: `save_pretrained` without the embedding."""
    frozen = tiny_frozen(CASE)
    module: Any = specforge_draft(oracle, CONFIG, tiny_params(CASE), frozen)
    kept = {name: value for name, value in module.state_dict().items() if "embed" not in name}
    module.config.architectures = ["LlamaForCausalLMEagle3"]
    module.config.eagle_config = {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}
    module.config.save_pretrained(tmp_path)
    save_file(kept, tmp_path / "model.safetensors")

    found = read_foreign(tmp_path, "specforge")
    assert equal(found.draft.params, tiny_params(CASE))
    assert found.draft.embed_tokens is None
    names = ("hidden_size", "head_dim", "rms_norm_eps", "rope_theta", "rope_type", "aux_layers")
    for name in names:
        assert getattr(found.draft.config, name) == getattr(CONFIG, name), name


def test_its_draft_class_loads_our_map(oracle: Oracle, tmp_path: Path) -> None:
    frozen = tiny_frozen(CASE)
    export(tiny_params(CASE), frozen, CONFIG, tmp_path / "draft", 8, torch.float32)
    words = ("--vocab", tmp_path / "draft", "--out", tmp_path / "map.pt", "--for", "specforge")
    assert main(["convert", *map(str, words)]) == 0
    module = module_of(oracle)
    module.load_vocab_mapping(str(tmp_path / "map.pt"))
    assert torch.equal(module.d2t, frozen.d2t) and torch.equal(module.t2d, frozen.t2d)


def test_its_loader_reads_our_features(oracle: Oracle, tmp_path: Path) -> None:
    data = importlib.import_module("specforge.data.preprocessing")
    samples = [random_sample(6 + i, i, 50, 4) for i in range(3)]
    ours = write_folder(tmp_path / "ours", samples, 50, 4)
    words = ("--features", ours, "--out", tmp_path / "ckpt", "--for", "specforge")
    assert main(["convert", *map(str, words)]) == 0

    files = data.list_local_files(str(tmp_path / "ckpt"))
    theirs = data.OfflineEagle3Dataset(sorted(files))
    assert len(theirs) == len(samples)
    for sample, read in zip(samples, theirs, strict=True):
        assert torch.equal(read["input_ids"][0], sample.input_ids)
        assert torch.equal(read["hidden_state"][0], sample.aux_hidden)
        assert torch.equal(read["target"][0], sample.last_hidden)
        assert torch.equal(read["loss_mask"][0, :-1], sample.token_mask[:-1])
