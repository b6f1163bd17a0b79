"""A run that starts from a draft: its head follows the tokens; what it cannot be is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import eagle3fn as e3
from eagle3fn.base.tree import equal
from eagle3fn.base.types import Frozen, VocabMap
from eagle3fn.model.table import EMBED, HEAD
from eagle3fn.train.warm_start import check_start, map_rows
from tests.factories import make_config, make_draft, make_frozen, make_map

LAYERS = 8
VOCAB = 40
TAPS = (1, 3, 4)  # the default ones of the target's eight layers


def config_of(folder: Path, **draft: object) -> e3.Config:
    """A run that starts from the folder's draft."""
    return make_config(draft=make_draft(**draft), train={"init": str(folder)})  # pyright: ignore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported draft of `make_config`'s shape, with the vocabulary of `make_frozen`."""
    config = make_config()
    params = e3.init_params(config.draft, 8, torch.float32)
    e3.export(params, make_frozen(config), config.draft, tmp_path / "draft", LAYERS, torch.float32)
    return tmp_path / "draft"


def kept(frozen: Frozen) -> VocabMap:
    return VocabMap(frozen.t2d, frozen.d2t)


def ids(vocab: VocabMap) -> list[int]:
    """A draft's tokens, in the order of its head's rows."""
    return (vocab.d2t + torch.arange(len(vocab.d2t))).tolist()


@given(st.data())
def test_every_row_is_that_of_its_token(data):
    """Of any two vocabularies: the row's token is the same, and no shared token is missed."""
    sizes = st.integers(1, VOCAB)
    old = make_map(VOCAB, data.draw(sizes), torch.Generator().manual_seed(data.draw(sizes)))
    new = make_map(VOCAB, data.draw(sizes), torch.Generator().manual_seed(data.draw(sizes)))
    rows = map_rows(old, new).rows.tolist()
    assert len(rows) == len(ids(new))
    for token, row in zip(ids(new), rows, strict=True):
        assert row == (ids(old).index(token) if token in ids(old) else -1)


def test_same_vocabulary_takes_every_parameter(folder):
    config = config_of(folder)
    frozen = make_frozen(config)
    assert equal(e3.bind(config, frozen).init(0), e3.load_draft(folder, torch.float32).params)
    line = check_start(config, LAYERS, kept(frozen))
    assert line == f"train.init = '{folder}': its head has rows of 24 of 24 draft tokens"


@pytest.mark.parametrize("size", [10, 24, 31])
def test_another_vocabulary_keeps_rows_of_shared_tokens_and_takes_the_targets(folder, size):
    config = config_of(folder, draft_vocab_size=size)
    target = make_frozen(make_config())
    frozen = make_frozen(config, seed=7)._replace(embed_tokens=target.embed_tokens)
    draft = e3.load_draft(folder, torch.float32)
    params = e3.bind(config, frozen).init(0)
    assert params[HEAD].shape == (size, 16)

    shared = 0
    for token, row in zip(ids(kept(frozen)), params[HEAD], strict=True):
        if token in ids(draft.vocab):
            shared += 1
            assert torch.equal(row, draft.params[HEAD][ids(draft.vocab).index(token)])
        else:
            assert torch.equal(row, frozen.target_head[token])
    others = {name: value for name, value in params.items() if name != HEAD}
    assert equal(others, {name: draft.params[name] for name in others})

    line = check_start(config, LAYERS, kept(frozen))
    assert f"rows of {shared} of {size} draft tokens, {size - shared} begin with the tar" in line
    assert line.endswith(f"; {24 - shared} of its own are left out")


def test_where_the_widths_differ_a_new_token_begins_with_the_mean_row(tmp_path):
    shape = {"target_hidden_size": 12}
    config = make_config(draft=make_draft(**shape))
    frozen = make_frozen(config)._replace(embed_tokens=None)
    params = e3.init_params(config.draft, 8, torch.float32)
    folder = tmp_path / "draft"
    e3.export(params, frozen, config.draft, folder, LAYERS, torch.float32)

    other = make_frozen(config, seed=7)._replace(embed_tokens=None)
    found = e3.bind(config_of(folder, **shape), other).init(0)
    rows = map_rows(kept(frozen), kept(other)).rows
    assert (rows < 0).any()
    torch.testing.assert_close(
        found[HEAD][rows < 0], params[HEAD].mean(0).expand(int((rows < 0).sum()), -1)
    )
    assert torch.equal(found[HEAD][rows >= 0], params[HEAD][rows[rows >= 0]])
    line = check_start(config_of(folder, **shape), LAYERS, kept(other))
    assert "begin with the mean of its rows" in line


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"intermediate_size": 28}, r"its intermediate_size is 24, the run's is 28; .*--draft-con"),
        ({"hidden_size": 8}, r"its hidden_size is 16, the run's is 8"),
        ({"rope_theta": 5e5}, r"its rope_theta is 10000\.0, the run's is 500000\.0"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            r"its rope_scaling is None, the run's is \{'rope_type': 'linear'",
        ),
        ({"aux_layers": (0, 3, 4)}, r"its aux_layers is \(1, 3, 4\), the run's is \(0, 3, 4\)"),
        ({"vocab_size": 50}, r"its vocab_size is 40, the run's is 50"),
    ],
)
def test_another_draft_is_refused_by_name(folder, shape, message):
    config = config_of(folder, **shape)
    with pytest.raises(e3.UserError, match=message) as caught:
        check_start(config, LAYERS, kept(make_frozen(config)))
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(e3.UserError, match=message):
        e3.bind(config, make_frozen(config)).init(0)


def test_switch_that_is_not_built_is_refused_by_name(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mlp_bias": True}))
    config = config_of(folder)
    with pytest.raises(e3.UserError, match=r"config\.json: mlp_bias = True: biases"):
        check_start(config, LAYERS, kept(make_frozen(config)))


def test_origin_that_must_be_known_is_said_to_convert(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"norm_output": False}))
    config = config_of(folder)
    with pytest.raises(e3.UserError, match=r"norm_output = False: .*convert --draft .* --from hf"):
        check_start(config, LAYERS, kept(make_frozen(config)))


@pytest.mark.parametrize("offset", [VOCAB, -VOCAB])
def test_map_with_ids_outside_the_vocabulary_is_refused(folder, offset):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["d2t"][-1] += offset
    save_file(tensors, file)
    config = config_of(folder)
    with pytest.raises(e3.UserError, match=r"model\.safetensors: t2d and d2t name different"):
        check_start(config, LAYERS, kept(make_frozen(config)))

    del tensors["t2d"]
    save_file(tensors, file)
    with pytest.raises(e3.UserError, match=r"model\.safetensors: t2d and d2t name different"):
        check_start(config, LAYERS, kept(make_frozen(config)))


def test_runs_own_map_outside_the_vocabulary_is_refused(folder):
    config = config_of(folder)
    frozen = make_frozen(config)
    wrong = frozen.d2t.clone()
    wrong[-1] += VOCAB
    with pytest.raises(e3.UserError, match="t2d and d2t name different tokens"):
        e3.bind(config, replace_map(frozen, wrong))
    assert e3.bind(config, frozen).init(0)[HEAD].shape == (24, 16)


def replace_map(frozen: Frozen, d2t: torch.Tensor) -> Frozen:
    return frozen._replace(d2t=d2t)


def test_start_that_names_no_draft_is_none():
    config = make_config()
    assert check_start(config, LAYERS, kept(make_frozen(config))) == ""
    other = replace(config, train=replace(config.train, init="rnadom"))
    with pytest.raises(e3.UserError, match=r"must be 'target' or 'random', or the folder of a dr"):
        check_start(other, LAYERS, kept(make_frozen(config)))


def test_embedding_that_is_not_the_targets_is_kept_or_refused(folder):
    """Other trainers may have trained it without a word in their configuration."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[EMBED] = tensors[EMBED] + 0.5
    save_file(tensors, file)
    config = config_of(folder)
    frozen = make_frozen(config)
    with pytest.raises(e3.UserError, match=r"embed_tokens are not.*draft\.train_embedding=true"):
        check_start(config, LAYERS, kept(frozen), frozen.embed_tokens)
    with pytest.raises(e3.UserError, match=r"embed_tokens are not the target's"):
        e3.bind(config, frozen).init(0)

    trained = config_of(folder, train_embedding=True)
    check_start(trained, LAYERS, kept(frozen), frozen.embed_tokens)
    params = e3.bind(trained, frozen).init(0)
    assert torch.equal(params[EMBED], tensors[EMBED])


def test_embedding_in_another_dtype_is_the_targets(folder):
    """Rounded to bf16 in the draft's file, or in the run."""
    config = config_of(folder)
    frozen = make_frozen(config)
    assert frozen.embed_tokens is not None
    rounded = frozen.embed_tokens.bfloat16()
    check_start(config, LAYERS, kept(frozen), rounded)
    file = folder / "model.safetensors"
    save_file(load_file(file) | {EMBED: rounded}, file)
    check_start(config, LAYERS, kept(frozen), frozen.embed_tokens)
