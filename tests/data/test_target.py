"""Taps on tiny targets of several families; weights read without the model; refused targets."""

import copy
import json
import shutil
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import json_sha256
from eagle3fn.data.decoder import hidden_states
from eagle3fn.data.encode import encode_all
from eagle3fn.data.extract import extract
from eagle3fn.data.features import open_features, read_sample
from eagle3fn.data.online import roll_out
from eagle3fn.data.samples import SampleMaker
from eagle3fn.data.sources import model_source, token_batches
from eagle3fn.data.stored_config import check_name, gguf_config
from eagle3fn.data.target import load_target, stop_ids, weights_digest
from eagle3fn.data.target_files import loaded_digest
from eagle3fn.data.target_loading import load_tokenizer
from eagle3fn.data.target_source import (
    config_hash,
    config_hashes,
    model_config_hash,
    target_config,
    weights_folder,
)
from eagle3fn.data.target_tensors import read_target_tensors, tensors_record
from eagle3fn.data.template import ChatTemplate
from tests.data.gguf_file import write_gguf
from tests.factories import SIZES, tiny_model, tiny_template, tiny_tokenizer, write_talks

FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Phi3": {},
    "Gemma3Text": {"sliding_window": 4, "final_logit_softcapping": None},
    "GptOss": {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "attn_implementation": "eager",
        "sliding_window": 4,
    },
    "Qwen3Moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8},
}
LAYERS = (1, 3, 4)
INDEX = "model.safetensors.index.json"


def load(folder):
    return load_target(folder, torch.float32)


def read(folder):
    return read_target_tensors(folder, torch.float32)


def write_json(path, tree):
    path.write_text(json.dumps(tree))


def edit(folder, **changes):
    path = folder / "config.json"
    write_json(path, {**json.loads(path.read_text()), **changes})


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request):
    return tiny_model(request.param, **FAMILIES[request.param])


@pytest.fixture(scope="module")
def placed(model, device):
    """The same target on the device."""
    return model if device == "cpu" else copy.deepcopy(model).to(device)


@pytest.fixture
def saved(tmp_path):
    """A target and the folder that it is saved in, in one file of weights."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "t")
    tiny_tokenizer().save_pretrained(tmp_path / "t")
    return model, tmp_path / "t"


@pytest.fixture
def sharded(saved):
    """The folder of a target in many files of weights, with an index."""
    model, folder = saved
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    assert (folder / INDEX).is_file()
    return folder


# Features


def test_taps_are_the_outputs_of_the_layers(placed):
    model = placed
    ids = torch.randint(300, (1, 11), generator=torch.Generator().manual_seed(1)).to(model.device)
    aux, last = hidden_states(model, ids, torch.ones_like(ids), LAYERS)
    out = model(input_ids=ids, output_hidden_states=True)
    first, second, third = aux.split(16, -1)
    assert torch.equal(first, out.hidden_states[2])
    assert torch.equal(second, out.hidden_states[4])
    assert torch.equal(last, out.hidden_states[-1])
    assert torch.equal(model.get_decoder().norm(third), last)
    assert torch.equal(model.lm_head(last), out.logits)
    assert not aux.requires_grad


def independent(model, rows):
    """Outputs of all five layers and the normed last one, `(S, Ht)` each, by row.

    All rows in one padded run, from `output_hidden_states`. That has the last layer's output after
    the norm; before it, it is the norm's input.
    """
    ids = pad_sequence(rows, batch_first=True).to(model.device)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    norm_inputs = []
    hook = model.get_decoder().norm.register_forward_pre_hook(
        lambda _module, inputs: norm_inputs.append(inputs[0])
    )
    out = model(input_ids=ids, attention_mask=mask.to(model.device), output_hidden_states=True)
    hook.remove()

    states = [*out.hidden_states[1:-1], *norm_inputs, out.hidden_states[-1]]
    assert len(states) == 6
    return [
        [state[number, : len(row)].cpu() for state in states] for number, row in enumerate(rows)
    ]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 120))
def test_batches_hold_every_row_once_within_the_budget(lengths, budget):
    batches = token_batches(lengths, budget)
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    in_order = [lengths[number] for batch in batches for number in batch]
    assert in_order == sorted(lengths)
    for batch, later in pairwise([*batches, []]):
        assert len(batch) == 1 or len(batch) * lengths[batch[-1]] <= budget
        # The next row would have been too much.
        assert not later or (len(batch) + 1) * lengths[later[0]] > budget


@pytest.mark.parametrize("tokens", [1, 160])
def test_extraction_stores_the_bits_of_an_independent_forward(placed, tmp_path, tokens):
    """Every layer as a tap, from the written files, at every real row; alone and in batches."""
    model = placed
    template = tiny_template()
    talks = write_talks(tmp_path / "c.jsonl", 8)
    rows = [row.input_ids for row in encode_all(SampleMaker(template, 90), talks, 300)]

    # The same batches as extraction's: of like length.
    batches = token_batches([len(row) for row in rows], tokens)
    assert tokens == 1 or any(
        len({len(rows[number]) for number in chosen}) > 1 for chosen in batches
    )
    expected = {}
    for chosen in batches:
        states = independent(model, [rows[number] for number in chosen])
        expected |= dict(zip(chosen, states, strict=True))

    for taps in ((0, 1, 2), (4, 3, 2)):
        out = tmp_path / str(taps)
        source = model_source(model, taps, batch_tokens=tokens)
        extract(source, template, talks, out, max_length=90, samples_per_shard=8)
        features = open_features(out)
        for number in range(8):
            sample = read_sample(features, number)
            assert torch.equal(sample.input_ids, rows[number])
            for tap, found in zip(taps, sample.aux_hidden.split(16, -1), strict=True):
                assert torch.equal(found, expected[number][tap]), (number, tap)
            assert torch.equal(sample.last_hidden, expected[number][5]), number


def test_padding_does_not_move_real_rows(placed):
    model = placed
    lengths = (12, 7, 3)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(300, (3, 12), generator=generator).to(model.device)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, length:] = 0

    aux, last = hidden_states(model, ids * mask, mask, LAYERS)
    for row, length in enumerate(lengths):
        own_ids = ids[row : row + 1, :length]
        own_aux, own_last = hidden_states(model, own_ids, torch.ones_like(own_ids), LAYERS)
        torch.testing.assert_close(aux[row, :length], own_aux[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(last[row, :length], own_last[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("token", "layers"), [(10_000, LAYERS), (1, (0, 1, 99))])
def test_hooks_are_removed_when_the_target_fails(model, token, layers):
    def hooks():
        return [len(layer._forward_hooks) for layer in model.get_decoder().layers]

    before = hooks()
    ids = torch.full((1, 3), token)
    with pytest.raises(IndexError):
        hidden_states(model, ids, torch.ones_like(ids), layers)
    assert hooks() == before


# Loading


def test_saved_target_loads_frozen_with_the_same_digests(saved):
    model, folder = saved
    loaded, tokenizer = load(folder)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert tokenizer.chat_template
    assert loaded.dtype == torch.float32
    assert model_config_hash(loaded) == config_hash(folder)
    assert weights_digest(loaded) == weights_digest(model)


def test_configurations_digest_is_of_what_the_file_says(saved, tmp_path):
    """Not of the path, the dtype, the library's version, and the defaults of its loaded form."""
    _, folder = saved
    before = config_hash(folder)
    edit(folder, _name_or_path="x", dtype="float64", transformers_version="0", use_cache=False)
    assert config_hash(shutil.copytree(folder, tmp_path / "copy")) == before

    tree = json.loads((folder / "config.json").read_text())
    del tree["attention_bias"]  # the library's default is the same
    assert target_config(folder)["attention_bias"] is False
    write_json(folder / "config.json", tree)
    assert config_hash(folder) != before
    edit(tmp_path / "copy", rms_norm_eps=1e-5)
    assert config_hash(tmp_path / "copy") != before


def test_a_loaded_targets_digest_is_of_its_configuration_too(saved):
    """Answers and batches of another RoPE are not taken for this target's."""
    _, folder = saved
    before = loaded_digest(load(folder)[0])
    edit(folder, use_cache=False)
    assert loaded_digest(load(folder)[0]) == before
    edit(folder, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    assert loaded_digest(load(folder)[0]) != before


def test_an_earlier_versions_digest_is_still_the_targets(saved):
    """Earlier versions hashed the loaded configuration, the library's defaults among it."""
    _, folder = saved
    volatile = ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype")
    tree = target_config(folder)
    stable = {key: tree[key] for key in tree if key not in (*volatile, "use_cache")}
    assert config_hashes(folder) == (config_hash(folder), json_sha256(stable, default=str))


def test_weights_digest_differs_with_the_weights(saved):
    model, _ = saved
    before = weights_digest(model)
    model.model.norm.weight[3] += 1
    assert weights_digest(model) != before


def test_all_weights_of_each_family_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert weights_digest(load(tmp_path)[0]) == weights_digest(model)


def test_tied_head_loads_as_the_embedding(tmp_path):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, _ = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


# Tensors


@pytest.mark.parametrize("shard_size", ["5GB", "10KB"])
def test_tensors_are_read_from_one_file_or_many(tmp_path, shard_size):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / INDEX).is_file() == (shard_size == "10KB")
    found = read(tmp_path)
    assert torch.equal(found.embed_tokens, model.model.embed_tokens.weight)
    assert torch.equal(found.head, model.lm_head.weight)
    assert torch.equal(found.norm, model.model.norm.weight)
    assert read_target_tensors(tmp_path, torch.bfloat16).head.dtype == torch.bfloat16


def test_tied_head_is_the_embedding(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    found = read(tmp_path)
    assert torch.equal(found.head, model.lm_head.weight)
    assert torch.equal(found.head, found.embed_tokens)


def test_missing_head_is_refused(tmp_path):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    edit(tmp_path, tie_word_embeddings=False)
    refusal = r"no tensor named lm_head.weight.*tie_word_embeddings.*fetch"
    with pytest.raises(UserError, match=refusal):
        read(tmp_path)


def test_norm_of_gemma_is_the_factor_that_it_multiplies_by(tmp_path):
    model = tiny_model("Gemma3Text", **FAMILIES["Gemma3Text"])
    torch.nn.init.normal_(model.model.norm.weight)
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 16)
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps)
    torch.testing.assert_close(normed * read(tmp_path).norm, model.model.norm(x))


# Damaged and unfit files


def test_missing_shard_is_refused(sharded):
    name = json.loads((sharded / INDEX).read_text())["weight_map"]["lm_head.weight"]
    (sharded / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: missing or damaged.*fetch"):
        read(sharded)


def test_biased_head_is_refused(saved):
    _, folder = saved
    path = folder / "model.safetensors"
    save_file({**load_file(path), "lm_head.bias": torch.zeros(300)}, path)
    with pytest.raises(UserError, match=r"lm_head.bias.*choose another target"):
        read(folder)


def test_folder_without_weights_is_refused(saved):
    _, folder = saved
    (folder / "model.safetensors").unlink()
    for reader in (load, read):
        with pytest.raises(UserError, match=r"t: no \*.safetensors; fetch"):
            reader(folder)


@pytest.mark.parametrize("reader", [load, read])
@pytest.mark.parametrize("data", [None, b"", b"junk", b"\x08\0\0\0\0\0\0\0notjson!"])
def test_damaged_weights_are_refused(saved, reader, data):
    _, folder = saved
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8] if data is None else data)
    with pytest.raises(UserError, match=r"t/model.safetensors: missing or damaged.*fetch"):
        reader(folder)


@pytest.mark.parametrize("reader", [load, read])
@pytest.mark.parametrize(
    "tree",
    [
        {},
        [],
        {"weight_map": 3},
        {"weight_map": []},
        {"weight_map": {"model.embed_tokens.weight": 3}},
        {"weight_map": {"model.embed_tokens.weight": "a\0b\x1b[2J"}},
        {"weight_map": {"model.embed_tokens.weight": "../model.safetensors"}},
        {"weight_map": {"model.embed_tokens.weight": ""}},
        None,
    ],
)
def test_damaged_index_of_weights_is_refused(sharded, reader, tree):
    (sharded / INDEX).write_text("{" if tree is None else json.dumps(tree))
    with pytest.raises(UserError, match=rf"{INDEX}: .*(fetch|write it anew)"):
        reader(sharded)


@pytest.mark.parametrize("reader", [load, read])
def test_index_that_names_a_wrong_file_is_refused(sharded, reader):
    tree = json.loads((sharded / INDEX).read_text())
    tree["weight_map"]["lm_head.weight"] = tree["weight_map"]["model.norm.weight"]
    (sharded / INDEX).write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"no tensor lm_head.weight.*fetch"):
        reader(sharded)


@pytest.mark.parametrize("reader", [load, read])
@pytest.mark.parametrize("changes", [{"hidden_size": 32}, {"vocab_size": 400}])
def test_weights_of_other_shapes_than_the_configurations_are_refused(saved, reader, changes):
    _, folder = saved
    edit(folder, **changes)
    with pytest.raises(UserError, match=r"t(/model.safetensors)?: .*config.json.*fetch"):
        reader(folder)


def test_weights_that_the_files_lack_are_not_drawn(saved):
    _, folder = saved
    edit(folder, num_hidden_layers=6, layer_types=None)
    with pytest.raises(UserError, match=r"t: .*model.layers.5.*config.json.*fetch"):
        load(folder)


def test_truncated_gguf_file_is_refused(tmp_path):
    path = tmp_path / "t.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + (5).to_bytes(8, "little"))
    for reader in (target_config, load, read):
        with pytest.raises(UserError, match=r"t.gguf: not loadable as a target"):
            reader(path)


# Targets that are refused


def test_adapter_next_to_the_weights_is_refused(saved):
    _, folder = saved
    write_json(folder / "adapter_config.json", {})
    for loaded in (load, target_config):
        with pytest.raises(UserError, match=r"adapter_config\.json: an adapter lies .* merge it"):
            loaded(folder)


def test_vision_target_is_refused_with_its_setting(saved):
    _, folder = saved
    edit(folder, vision_config={"depth": 1})
    for reader in (target_config, load, read):
        with pytest.raises(
            UserError, match=r"t/config.json: .*vision_config: vision-language targets are"
        ):
            reader(folder)


def test_path_or_id_without_a_target_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config.json there; name a folder"):
        target_config(tmp_path)
    with pytest.raises(UserError, match=r"none.gguf: no such file; name"):
        target_config(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    "name", ["run/nosuch", "./nosuch", "../nosuch", "~/nosuch", "a/b/c", "/nosuch/x"]
)
@pytest.mark.parametrize("reader", [target_config, config_hash, load_tokenizer, weights_folder])
def test_path_with_a_typing_error_is_refused_without_the_hub(reader, name, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the hub is asked")

    monkeypatch.setattr("transformers.utils.hub.cached_file", asked)
    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    with pytest.raises(UserError) as raised:
        reader(name)
    assert str(raised.value).startswith(f"{name}: no such folder; name a model folder, a GGUF file")


@pytest.mark.parametrize("name", ["gpt2", "owner/name"])
def test_hub_id_is_no_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_name(name) is None
    (tmp_path / "owner").mkdir()
    if "/" in name:
        with pytest.raises(UserError, match="owner/name: no such folder"):
            check_name(name)


def test_configuration_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: not readable as JSON .*write it anew"):
        target_config(tmp_path)


@pytest.mark.parametrize("reader", [target_config, load, read])
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": "big"}, "'hidden_size' expected int"),
        ({"vocab_size": None}, "'vocab_size' expected int"),
        ({"num_hidden_layers": 1.5}, "'num_hidden_layers' expected int"),
        ({"tie_word_embeddings": "no"}, "'tie_word_embeddings' expected bool"),
        ({"dtype": "nix"}, "nix"),
    ],
)
def test_setting_of_a_wrong_type_is_refused(saved, reader, changes, named):
    _, folder = saved
    edit(folder, **changes)
    with pytest.raises(UserError, match=rf"t/config.json: .*{named}.*name a folder"):
        reader(folder)


# Stop tokens


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": 5}, (1, 7)),
        ({"eos_token_id": [9, 7]}, {}, (1, 7, 9)),
        ({"eos_token_id": []}, {"eos_token_id": [5, 1]}, (1, 5)),
        ({"eos_token_id": None}, {"text_config": {"eos_token_id": 6}}, (1, 6)),
        (None, {"eos_token_id": 5}, (1, 5)),
        (None, None, (1,)),
    ],
)
def test_stop_tokens_are_the_generations_or_the_configurations_and_the_tokenizers(
    tmp_path, generation, config, expected
):
    """The generation config comes first, as where the model generates; no model is built."""
    for name, tree in (("generation_config.json", generation), ("config.json", config)):
        if tree is not None:
            write_json(tmp_path / name, tree)
    tokenizer = tiny_tokenizer()
    assert tokenizer.eos_token_id == 1
    assert stop_ids(tmp_path, tokenizer) == expected


def test_stop_tokens_are_those_that_the_loaded_model_ends_with(saved):
    model, folder = saved
    model.generation_config.eos_token_id = [5, 9]
    model.save_pretrained(folder)
    loaded, tokenizer = load(folder)
    assert stop_ids(folder, tokenizer) == stop_ids(loaded, tokenizer) == (1, 5, 9)


def test_target_without_a_stop_token_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    write_json(tmp_path / "generation_config.json", {"eos_token_id": []})
    with pytest.raises(UserError, match=r"no eos_token_id in generation_config.json.*add the id"):
        stop_ids(tmp_path, tokenizer)
    write_json(tmp_path / "generation_config.json", [])
    with pytest.raises(UserError, match=r"generation_config.json: not a JSON object; fetch"):
        stop_ids(tmp_path, tokenizer)


# Chat templates


def test_named_templates_without_a_default_are_refused(saved):
    _, folder = saved
    (folder / "additional_chat_templates").mkdir()
    one = folder / "chat_template.jinja"
    one.rename(folder / "additional_chat_templates" / "tool_use.jinja")
    _, tokenizer = load(folder)
    refusal = r"t: no default chat template, only tool_use; copy.*chat_template.jinja"
    with pytest.raises(UserError, match=refusal):
        ChatTemplate(tokenizer).check()
    shutil.copy(folder / "additional_chat_templates" / "tool_use.jinja", one)
    ChatTemplate(load(folder)[1]).check()


# GGUF files


def test_gguf_file_has_its_own_digest_stop_tokens_and_tensors(tmp_path):
    """The digest is of the file's header: the library's reading of it changes nothing."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    path = tmp_path / "t.gguf"
    write_gguf(path, model, tokenizer)
    assert stop_ids(path, tokenizer) == (1,)
    found = gguf_config(path)
    assert (found["architecture"], found["vocab_size"], found["llama.block_count"]) == (
        "llama",
        SIZES["vocab_size"],
        SIZES["num_hidden_layers"],
    )

    loaded, _ = load(path)
    assert config_hash(path) == model_config_hash(loaded)
    record = tensors_record(loaded)
    tensors = read_target_tensors(path, torch.bfloat16, record)
    assert torch.equal(tensors.head, model.lm_head.weight.bfloat16())
    assert torch.equal(tensors.norm, model.model.norm.weight.bfloat16())
    with pytest.raises(UserError, match=r"t.gguf: its head: not the head that the features"):
        read_target_tensors(path, torch.bfloat16, record | {"head": "0"})


# Targets that a user loaded


class Onward(torch.nn.Module):
    """A layer before which states move to a device."""

    def __init__(self, layer, device):
        super().__init__()
        self.layer, self.device = layer.to(device), device

    def forward(self, states, **options):
        return states.to(self.device)


def test_taps_on_several_devices_are_brought_to_the_last():
    """The device "meta" stands for another card: tensors of both cannot be joined."""
    model = tiny_model()
    for number in (3, 4):
        model.model.layers[number] = Onward(model.model.layers[number], "meta")
    model.model.norm.to("meta")
    ids = torch.tensor([[3, 4, 5]])
    aux, last = hidden_states(model, ids, torch.ones_like(ids), LAYERS)
    assert aux.device == last.device == torch.device("meta")
    assert aux.shape == (1, 3, 48)


def test_offloaded_weights_are_refused(tmp_path):
    model, template = tiny_model(), tiny_template()
    talks = write_talks(tmp_path / "c.jsonl", 2)
    rows = encode_all(SampleMaker(template, 90), talks, 300)
    model.model.layers[2].to("meta")
    refusal = r"model.layers.2.*offloaded \(on the device 'meta'\); load the target without"
    with pytest.raises(UserError, match=refusal):
        next(roll_out(model, rows, LAYERS))
    with pytest.raises(UserError, match=refusal):
        extract(model_source(model, LAYERS), template, talks, tmp_path / "out", max_length=90)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ends", [None, [], [-1]])
def test_model_without_a_stop_token_of_its_own_ends_with_the_tokenizers(ends):
    """Where its generation configuration names none, its configuration's come before."""
    model, tokenizer = tiny_model(eos_token_id=4), tiny_tokenizer()
    model.generation_config.eos_token_id = ends
    assert stop_ids(model, tokenizer) == (1, 4)
    model.config.eos_token_id = None
    assert stop_ids(model, tokenizer) == (1,)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"no eos_token_id in generation_config.json.*add the id"):
        stop_ids(model, tokenizer)
