"""Taps on tiny targets of several families; weights read without the model; targets that are refused."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle3fn.base.errors import UserError
from eagle3fn.data.extract import encode_all, extract
from eagle3fn.data.features import open_features, read_sample
from eagle3fn.data.fingerprint import config_hash, weights_digest
from eagle3fn.data.target import hidden_states, load_target, read_target_tensors, target_config
from tests.data_tools import SIZES, tiny_model, tiny_tokenizer, write_talks

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


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request):
    return tiny_model(request.param, **FAMILIES[request.param])


@pytest.fixture(scope="module")
def placed(model, device):
    """The same target on the device."""
    return model if device == "cpu" else copy.deepcopy(model).to(device)


def test_taps_are_the_layers_outputs(placed):
    model = placed
    ids = torch.randint(300, (1, 11), generator=torch.Generator().manual_seed(1)).to(model.device)
    aux, last = hidden_states(model, ids, torch.ones_like(ids), LAYERS)
    out = model(input_ids=ids, output_hidden_states=True)
    first, second, third = aux.split(16, -1)
    assert torch.equal(first, out.hidden_states[2]) and torch.equal(second, out.hidden_states[4])
    assert torch.equal(last, out.hidden_states[-1])
    assert torch.equal(model.get_decoder().norm(third), last)
    assert torch.equal(model.lm_head(last), out.logits)
    assert not aux.requires_grad


def independent(model, rows):
    """Outputs of all five layers and the normed last one, `(S, Ht)` each, by row; all rows in one padded run.

    From `output_hidden_states`, which has the last layer's behind the norm; its own is what the norm is given.
    """
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones_like(row) for row in rows], batch_first=True
    ).to(model.device)
    caught = []
    hook = model.get_decoder().norm.register_forward_pre_hook(
        lambda _module, inputs: caught.append(inputs[0])
    )
    out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    hook.remove()
    states = [*out.hidden_states[1:-1], *caught, out.hidden_states[-1]]
    assert len(states) == 6
    return [
        [state[number, : len(row)].cpu() for state in states] for number, row in enumerate(rows)
    ]


@pytest.mark.parametrize("batch", [1, 4])
def test_extraction_stores_what_an_independent_forward_gives(placed, tmp_path, batch):
    """Every layer as a tap, from the written files, bit for bit at every real row: alone and in padded batches."""
    model, talks, tokenizer = placed, write_talks(tmp_path / "c.jsonl", 8), tiny_tokenizer()
    rows = [row.input_ids for row in encode_all(tokenizer, talks, 90, 300)]
    ascending = sorted(range(8), key=lambda number: len(rows[number]))
    seen = {}
    for start in range(0, 8, batch):
        chosen = ascending[start : start + batch]
        assert batch == 1 or len({len(rows[number]) for number in chosen}) > 1
        seen |= dict(
            zip(chosen, independent(model, [rows[number] for number in chosen]), strict=True)
        )
    for taps in ((0, 1, 2), (4, 3, 2)):
        out = tmp_path / str(taps)
        extract(model, tokenizer, talks, out, taps, max_length=90, batch=batch, samples_per_shard=8)
        opened = open_features(out)
        for number in range(8):
            sample = read_sample(opened, number)
            assert torch.equal(sample.input_ids, rows[number])
            for tap, found in zip(taps, sample.aux_hidden.split(16, -1), strict=True):
                assert torch.equal(found, seen[number][tap]), (number, tap)
            assert torch.equal(sample.last_hidden, seen[number][5]), number


def test_padded_rows_change_nothing(placed):
    model = placed
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(300, (3, 12), generator=generator).to(model.device)
    mask = torch.ones_like(ids)
    for row, length in enumerate((12, 7, 3)):
        mask[row, length:] = 0
    aux, last = hidden_states(model, ids * mask, mask, LAYERS)
    for row, length in enumerate((12, 7, 3)):
        alone = hidden_states(
            model, ids[row : row + 1, :length], mask[row : row + 1, :length], LAYERS
        )
        torch.testing.assert_close(aux[row, :length], alone[0][0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(last[row, :length], alone[1][0], atol=2e-5, rtol=1e-4)


def test_hooks_are_removed_even_when_the_target_fails(model):
    before = [len(layer._forward_hooks) for layer in model.get_decoder().layers]
    with pytest.raises(IndexError):
        hidden_states(
            model, torch.full((1, 3), 10_000), torch.ones(1, 3, dtype=torch.int64), LAYERS
        )
    with pytest.raises(IndexError):
        hidden_states(
            model,
            torch.ones(1, 3, dtype=torch.int64),
            torch.ones(1, 3, dtype=torch.int64),
            (0, 1, 99),
        )
    assert [len(layer._forward_hooks) for layer in model.get_decoder().layers] == before


@pytest.fixture
def saved(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "t")
    tiny_tokenizer().save_pretrained(tmp_path / "t")
    return model, tmp_path / "t"


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_saved_target_loads_and_has_one_hash(saved):
    model, folder = saved
    loaded, tokenizer = load_target(folder, dtype=torch.float32)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert tokenizer.chat_template and loaded.dtype == torch.float32
    assert config_hash(loaded.config.to_dict()) == config_hash(target_config(folder))
    assert config_hash(target_config(folder)) != config_hash(
        {**target_config(folder), "hidden_size": 1}
    )
    assert weights_digest(loaded) == weights_digest(model)
    loaded.model.norm.weight[3] += 1
    assert weights_digest(loaded) != weights_digest(model)


@pytest.mark.parametrize("shard_size", ["5GB", "10KB"])
def test_tensors_are_read_from_one_file_or_many(tmp_path, shard_size):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shard_size == "10KB")
    embed, head, norm = read_target_tensors(tmp_path, torch.float32)
    assert torch.equal(embed, model.model.embed_tokens.weight)
    assert torch.equal(head, model.lm_head.weight) and torch.equal(norm, model.model.norm.weight)
    assert read_target_tensors(tmp_path, torch.bfloat16).head.dtype == torch.bfloat16


def test_a_missing_shard_is_named(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="10KB")
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    (tmp_path / weight_map["lm_head.weight"]).unlink()
    with pytest.raises(
        UserError, match=rf"{weight_map['lm_head.weight']}: missing or damaged.*fetch"
    ):
        read_target_tensors(tmp_path, torch.float32)


def test_tied_heads_are_the_embedding_and_missing_ones_are_refused(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    embed, head, _ = read_target_tensors(tmp_path, torch.float32)
    assert torch.equal(head, model.lm_head.weight) and torch.equal(head, embed)
    edit(tmp_path, tie_word_embeddings=False)
    with pytest.raises(
        UserError, match=r"no tensor named lm_head.weight.*tie_word_embeddings.*fetch"
    ):
        read_target_tensors(tmp_path, torch.float32)


def test_a_gemma_norm_is_the_factor_applied(tmp_path):
    model = tiny_model("Gemma3Text", **FAMILIES["Gemma3Text"])
    torch.nn.init.normal_(model.model.norm.weight)
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 16)
    factor = read_target_tensors(tmp_path, torch.float32).norm
    plain = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps)
    torch.testing.assert_close(plain * factor, model.model.norm(x))


def test_biased_heads_and_missing_weights_are_refused(saved):
    _, folder = saved
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.bias": torch.zeros(300)}, path)
    with pytest.raises(UserError, match=r"lm_head.bias.*choose another target"):
        read_target_tensors(folder, torch.float32)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"model.safetensors: missing or damaged.*fetch"):
        read_target_tensors(folder, torch.float32)
    path.unlink()
    with pytest.raises(UserError, match=r"no \*.safetensors; save"):
        read_target_tensors(folder, torch.float32)
    with pytest.raises(UserError, match=r"not loadable as a target"):
        load_target(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"vision_config": {"depth": 1}},
            "vision_config: vision-language targets are not supported",
        ),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0.*choose another"),
        ({"logit_scale": 0.5}, "logit_scale = 0.5.*choose another"),
        ({"logits_scaling": 8.0}, "logits_scaling = 8.0.*choose another"),
    ],
)
def test_unsupported_targets_are_refused_by_name(saved, changes, named):
    _, folder = saved
    assert target_config(folder)["hidden_size"] == SIZES["hidden_size"]
    edit(folder, logit_scale=1.0)
    target_config(folder)
    edit(folder, **changes)
    for read in (target_config, load_target, lambda path: read_target_tensors(path, torch.float32)):
        with pytest.raises(UserError, match=f"{folder.name}.*{named}"):
            read(folder)


def test_folders_and_ids_that_hold_no_target_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no config.json there; name a folder"):
        target_config(tmp_path)
    with pytest.raises(UserError, match=r"none.gguf: no such file; name"):
        target_config(tmp_path / "none.gguf")
    with pytest.raises(UserError, match=r"not loadable as a target.*name a folder"):
        target_config(tmp_path / "not" / "there")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"not loadable as a target.*name a folder"):
        target_config(tmp_path)


def load(folder):
    return load_target(folder, torch.float32)


def read(folder):
    return read_target_tensors(folder, torch.float32)


@pytest.mark.parametrize("reader", [load, read])
@pytest.mark.parametrize("data", [b"", b"junk", b"\x08\0\0\0\0\0\0\0notjson!"])
def test_damaged_weights_are_named(saved, reader, data):
    path = saved[1] / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"t/model.safetensors: missing or damaged.*fetch"):
        reader(saved[1])


@pytest.fixture
def many(saved):
    model, folder = saved
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    return folder


@pytest.mark.parametrize("reader", [load, read])
@pytest.mark.parametrize(
    "tree",
    [
        {},
        [],
        {"weight_map": 3},
        {"weight_map": []},
        {"weight_map": {"model.embed_tokens.weight": 3}},
        None,
    ],
)
def test_a_damaged_index_of_weights_is_named(many, reader, tree):
    (many / "model.safetensors.index.json").write_text("{" if tree is None else json.dumps(tree))
    with pytest.raises(UserError, match=r"model.safetensors.index.json: .*(fetch|write it anew)"):
        reader(many)


@pytest.mark.parametrize("reader", [load, read])
def test_an_index_of_weights_that_lies_is_named(many, reader):
    path = many / "model.safetensors.index.json"
    tree = json.loads(path.read_text())
    tree["weight_map"]["lm_head.weight"] = tree["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"no tensor lm_head.weight.*fetch"):
        reader(many)


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
def test_config_values_of_a_wrong_type_are_named(saved, reader, changes, named):
    edit(saved[1], **changes)
    with pytest.raises(UserError, match=rf"t/config.json: .*{named}.*name a folder"):
        reader(saved[1])


@pytest.mark.parametrize("reader", [load, read])
@pytest.mark.parametrize("changes", [{"hidden_size": 32}, {"vocab_size": 400}])
def test_weights_that_do_not_fit_are_refused(saved, reader, changes):
    edit(saved[1], **changes)
    with pytest.raises(UserError, match=r"t(/model.safetensors)?: .*config.json.*fetch"):
        reader(saved[1])


def test_missing_weights_are_not_made_up(saved):
    edit(saved[1], num_hidden_layers=6, layer_types=None)
    with pytest.raises(UserError, match=r"t: .*model.layers.5.*config.json.*fetch"):
        load(saved[1])


def test_no_family_misses_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert weights_digest(load(tmp_path)[0]) == weights_digest(model)


def test_a_cut_gguf_file_is_refused(tmp_path):
    path = tmp_path / "t.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + (5).to_bytes(8, "little"))
    for reader in (target_config, load, read):
        with pytest.raises(UserError, match=r"t.gguf: not loadable as a target"):
            reader(path)


def test_tied_heads_load(tmp_path):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, _ = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
