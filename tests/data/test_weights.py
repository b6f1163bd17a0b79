"""One source of weights: training reads the tensors that the model ran with, or refuses."""

import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle3fn.base.errors import UserError
from eagle3fn.data.extract import extract
from eagle3fn.data.features import open_features, tensors_of
from eagle3fn.data.sources import model_source
from eagle3fn.data.target import load_target
from eagle3fn.data.target_tensors import read_target_tensors, tensors_record
from eagle3fn.data.template import ChatTemplate
from tests.factories import tiny_model, tiny_tokenizer, write_talks

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def fresh(folder, **changes):
    """A target in a folder, in one file of weights."""
    model = tiny_model(**changes)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def other_weights(seed, **changes):
    """The same architecture with other weights."""
    model = tiny_model(**changes)
    torch.manual_seed(seed)
    for value in model.parameters():
        value.normal_()
    return model


def change(folder, **tensors):
    """Other tensors in the one file of weights."""
    path = folder / "model.safetensors"
    save_file({**load_file(path), **tensors}, path, metadata={"format": "pt"})


def tied_with_an_own_head(folder):
    fresh(folder, tie_word_embeddings=True)
    change(folder, **{HEAD: torch.randn(300, 16)})


def index_beside_another_file(folder):
    model = fresh(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    other_weights(7).save_pretrained(folder / "other")
    shutil.copy(folder / "other" / "model.safetensors", folder / "model.safetensors")


def saved_twice(folder):
    """Saved in one file over many: the old index stays, its files are gone."""
    model = fresh(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    other_weights(3).save_pretrained(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert not any((folder / name).exists() for name in index["weight_map"].values())


FOLDERS = {
    "tied": lambda folder: fresh(folder, tie_word_embeddings=True),
    "own head": fresh,
    "tied, with the same head once more": lambda folder: change(
        folder, **{HEAD: fresh(folder, tie_word_embeddings=True).lm_head.weight.clone()}
    ),
    "tied, with an own head": tied_with_an_own_head,
    "index beside another file": index_beside_another_file,
    "saved twice": saved_twice,
}


def features_of(model, tokenizer, out):
    talks = write_talks(out.parent / "talks.jsonl", 4)
    source = model_source(model, (0, 1, 2))
    extract(source, ChatTemplate(tokenizer), talks, out, max_length=64)
    return open_features(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", FOLDERS.values(), ids=FOLDERS)
def test_training_reads_what_extraction_ran_with(tmp_path, make, dtype):
    """By the features' record and, for features without one, by transformers' own order."""
    folder = tmp_path / "t"
    make(folder)
    model, tokenizer = load_target(folder, dtype)
    record = tensors_of(features_of(model, tokenizer, tmp_path / "f"))
    assert record is not None
    for given in (record, None):
        found = read_target_tensors(folder, dtype, given)
        assert torch.equal(found.embed_tokens, model.model.embed_tokens.weight)
        assert torch.equal(found.head, model.lm_head.weight)
        assert torch.equal(found.norm, model.model.norm.weight)
        same = torch.equal(found.head, found.embed_tokens)
        assert (found.head is found.embed_tokens) == same  # one tensor where they are tied


@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16, torch.float16])
def test_record_is_found_again_in_any_dtype(tmp_path, computed, trained):
    model = fresh(tmp_path)
    record = tensors_record(load_target(tmp_path, computed)[0])
    found = read_target_tensors(tmp_path, trained, record)
    assert torch.equal(found.head, model.lm_head.weight.to(trained))


def test_record_of_a_tied_model_picks_the_embedding_beside_an_own_head(tmp_path):
    """Older releases of transformers tie whatever the file holds."""
    tied_with_an_own_head(tmp_path)
    model, _ = load_target(tmp_path, torch.float32)
    record = tensors_record(model)
    tied = record | {"head": record["embed_tokens"]}
    found = read_target_tensors(tmp_path, torch.float32, tied)
    assert torch.equal(found.head, model.model.embed_tokens.weight)
    assert not torch.equal(found.head, model.lm_head.weight)


@pytest.mark.parametrize(
    ("key", "name"), [(HEAD, "head"), (EMBEDDING, "embed_tokens"), ("model.norm.weight", "norm")]
)
def test_another_tensor_than_extraction_ran_with_is_refused_by_name(tmp_path, key, name):
    folder = tmp_path / "t"
    fresh(folder)
    record = tensors_record(load_target(folder, torch.float32)[0])
    value = load_file(folder / "model.safetensors")[key]
    value.view(-1)[-1] += 1e-3
    change(folder, **{key: value})
    refusal = rf"t: {key}.*: not the {name} that the features were made with; name the target"
    with pytest.raises(UserError, match=refusal):
        read_target_tensors(folder, torch.float32, record)
    read_target_tensors(folder, torch.float32)


def test_model_that_ran_with_other_weights_than_the_files_is_refused(tmp_path, monkeypatch):
    """As where transformers initializes a row anew when it loads."""
    fresh(tmp_path)
    from transformers import LlamaForCausalLM

    load: Any = LlamaForCausalLM.from_pretrained

    def loaded(*arguments, **options):
        model, report = load(*arguments, **options)
        model.model.embed_tokens.weight.data[0] = 0.5
        return model, report

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", loaded)
    refusal = rf"{EMBEDDING}: not the embed_tokens that transformers runs with; save the target"
    with pytest.raises(UserError, match=refusal):
        load_target(tmp_path, torch.float32)


def test_folder_with_a_pickle_alone_is_refused_before_extraction(tmp_path):
    fresh(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    refusal = r"no \*.safetensors; pytorch_model.bin is there.*save_pretrained.*another folder"
    for reader in (load_target, read_target_tensors):
        with pytest.raises(UserError, match=refusal):
            reader(tmp_path, torch.float32)
