"""The feature folder's reader: round trips, and every damage named with its file."""

import gzip
import io
import json

import pytest
import torch

from eagle3fn.base.errors import UserError
from eagle3fn.data import features as folder_module
from eagle3fn.data.features import (
    check_made_for,
    check_shards,
    open_features,
    read_sample,
    read_tokens,
)
from eagle3fn.data.vocab import count_tokens
from tests.data_tools import random_sample, write_folder


def same(left, right):
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_samples_come_back_bit_for_bit(tmp_path):
    samples = [random_sample(4 + i, i) for i in range(7)]
    opened = open_features(write_folder(tmp_path, samples), vocab_size=50, hidden_size=4)
    check_shards(opened)
    assert len(opened.samples) == 7 and opened.index["totals"]["tokens"] == sum(
        4 + i for i in range(7)
    )
    for number, sample in enumerate(samples):
        assert same(read_sample(opened, number), sample)
        assert same(read_tokens(opened, number), sample[:2])


def test_opening_and_reading_tokens_touch_no_features(tmp_path, monkeypatch):
    write_folder(tmp_path, [random_sample(4, i) for i in range(4)])
    read = []
    real = folder_module._tensors
    monkeypatch.setattr(
        folder_module,
        "_tensors",
        lambda path, entry, names: read.append(names) or real(path, entry, names),
    )
    opened = open_features(tmp_path)
    assert read == []
    read_tokens(opened, 2)
    assert read == [("input_ids", "loss_mask")]


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_missing_or_truncated_shard_is_named(tmp_path, damage):
    opened = open_features(write_folder(tmp_path, [random_sample(6, i) for i in range(7)]))
    shard = tmp_path / "shard-00001.safetensors"
    data = shard.read_bytes()
    shard.unlink()
    if damage == "truncated":
        shard.write_bytes(data[:-10])
    with pytest.raises(UserError, match=r"shard-00001.safetensors.*run eagle3fn extract again"):
        open_features(tmp_path)
    with pytest.raises(
        UserError, match=r"shard-00001.safetensors.*row4.*run eagle3fn extract again"
    ):
        read_sample(opened, 4)
    assert len(read_tokens(opened, 0)[0]) == 6


def test_changed_bytes_are_found_by_the_hash(tmp_path):
    opened = open_features(write_folder(tmp_path, [random_sample(6, 0)]))
    shard = tmp_path / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"shard-00000.safetensors: its bytes have changed"):
        check_shards(opened)
    with pytest.raises(
        UserError,
        match=r"shard-00000.safetensors: its bytes have changed.*run eagle3fn extract again",
    ):
        read_sample(opened, 0)


def test_a_shard_is_hashed_once_an_opening(tmp_path, monkeypatch):
    folder = write_folder(tmp_path, [random_sample(6, i) for i in range(5)])
    hashed = []
    real = folder_module.sha256
    monkeypatch.setattr(
        folder_module, "sha256", lambda path: hashed.append(path.name) or real(path)
    )
    opened = open_features(folder)
    for number in (0, 1, 4, 2, 3, 0):
        read_sample(opened, number)
    assert hashed == ["shard-00000.safetensors", "shard-00001.safetensors"]
    read_sample(open_features(folder), 0)
    assert len(hashed) == 3


GOOD = random_sample(6, 1)
NAN = GOOD.last_hidden.clone()
NAN[3, 1] = float("nan")
INF = GOOD.aux_hidden.clone()
INF[2, 5] = float("inf")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"last_hidden": NAN}, "last_hidden holds NaN or infinity at token 3"),
        ({"aux_hidden": INF}, "aux_hidden holds NaN or infinity at token 2"),
        ({"input_ids": GOOD.input_ids.clone().fill_(50)}, r"token id 50: must be in \[0, 50\)"),
        ({"input_ids": GOOD.input_ids.clone().fill_(-1)}, "token id -1"),
        ({"token_mask": GOOD.token_mask + 1}, "values other than 0 and 1"),
        ({"token_mask": GOOD.token_mask[:5]}, r"token_mask \(5,\)"),
        ({"input_ids": GOOD.input_ids.int()}, "input_ids torch.int32"),
        ({"aux_hidden": GOOD.aux_hidden[:, :8]}, r"aux_hidden \(6, 8\)"),
        ({"last_hidden": GOOD.last_hidden[:5]}, r"last_hidden \(5, 4\)"),
        ({"last_hidden": GOOD.last_hidden.float()}, "last_hidden torch.float32"),
    ],
)
def test_bad_tensors_are_named_by_file_and_sample(tmp_path, change, named):
    opened = open_features(write_folder(tmp_path, [random_sample(6, 1), GOOD._replace(**change)]))
    assert same(read_sample(opened, 0), GOOD)
    with pytest.raises(
        UserError,
        match=rf"shard-00000.safetensors: sample 'row1': .*{named}.*run eagle3fn extract again",
    ):
        read_sample(opened, 1)


def test_a_length_other_than_the_indexs_is_refused(tmp_path):
    opened = open_features(write_folder(tmp_path, [GOOD]))
    opened.samples[0]["length"] = 5
    with pytest.raises(UserError, match=r"shard-00000.safetensors.*both must be \(5,\)"):
        read_tokens(opened, 0)


def test_a_bad_index_is_refused(tmp_path):
    write_folder(tmp_path, [GOOD])
    path = tmp_path / "index.json"
    index = json.loads(path.read_text())
    for change, named in (
        ({"schema": 99}, "schema 99"),
        ({"samples": []}, "no samples"),
        ({"shards": None}, "shards is missing"),
    ):
        tree = {key: value for key, value in {**index, **change}.items() if value is not None}
        path.write_text(json.dumps(tree))
        with pytest.raises(UserError, match=f"index.json: {named}.*run eagle3fn extract again"):
            open_features(tmp_path)
    path.write_text("{")
    with pytest.raises(UserError, match=r"index.json: not readable"):
        open_features(tmp_path)


def without(entry, name):
    return {key: value for key, value in entry.items() if key != name}


@pytest.mark.parametrize(
    ("place", "change", "named"),
    [
        *(
            ("samples", lambda e, k=k: without(e, k), rf"samples\[0\].{k}")
            for k in ("id", "key", "shard", "length")
        ),
        ("samples", lambda e: {**e, "key": 3}, r"samples\[0\].key is 3: must be a str"),
        ("samples", lambda e: {**e, "length": "6"}, r"samples\[0\].length is '6': must be an? int"),
        ("samples", lambda e: {**e, "length": True}, r"samples\[0\].length is True"),
        (
            "samples",
            lambda e: {**e, "shard": "other"},
            r"samples\[0\].shard is 'other': must be one of its shards",
        ),
        ("samples", lambda _: 7, r"samples\[0\] is 7: must be a dict"),
        *(
            ("shards", lambda e, k=k: without(e, k), rf"shards\[0\].{k}")
            for k in ("file", "bytes", "sha256")
        ),
        ("shards", lambda e: {**e, "file": None}, r"shards\[0\].file is None: must be a str"),
    ],
)
def test_a_bad_entry_of_the_index_is_refused(tmp_path, place, change, named):
    path = write_folder(tmp_path, [GOOD]) / "index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, place: [change(index[place][0])]}))
    with pytest.raises(UserError, match=f"index.json: {named}.*run eagle3fn extract again"):
        open_features(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("samples", {"a": 1}),
        ("shards", "all"),
        ("target", []),
        ("target", {"name": "x"}),
        ("dtype", 3),
    ],
)
def test_a_field_of_a_wrong_type_in_the_index_is_refused(tmp_path, key, value):
    path = write_folder(tmp_path, [GOOD]) / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=f"index.json: {key}.*run eagle3fn extract again"):
        open_features(tmp_path, vocab_size=50)


def test_features_of_another_configuration_or_other_layers_are_refused(tmp_path):
    path = write_folder(tmp_path / "f", [GOOD]) / "index.json"
    check_made_for(
        open_features(tmp_path / "f"), "abc", [1, 2, 4], "the run"
    )  # neither key is there
    index = json.loads(path.read_text())
    index["target"] |= {"config_hash": "a" * 64, "aux_layers": [1, 2, 4]}
    path.write_text(json.dumps(index))
    opened = open_features(tmp_path / "f")
    check_made_for(opened, "a" * 64, (1, 2, 4), "the run")
    with pytest.raises(
        UserError,
        match=r"index.json: .*config_hash a{12}.*the run.*b{12}.*run eagle3fn extract again",
    ):
        check_made_for(opened, "b" * 64, (1, 2, 4), "the run")
    with pytest.raises(
        UserError,
        match=r"index.json: .*aux_layers \[1, 2, 4\].*the run.*\[0, 2, 4\].*run eagle3fn extract again",
    ):
        check_made_for(opened, "a" * 64, (0, 2, 4), "the run")
    (tmp_path / "old").mkdir()
    torch.save(old_dict(GOOD), tmp_path / "old" / "a.ckpt")
    check_made_for(open_features(tmp_path / "old"), "abc", (1, 2, 3), "the run")


def test_another_targets_folder_and_an_empty_one_are_refused(tmp_path):
    write_folder(tmp_path / "a", [GOOD])
    with pytest.raises(
        UserError, match=r"index.json: made with target 'tiny', vocab_size 50, not 60"
    ):
        open_features(tmp_path / "a", vocab_size=60)
    with pytest.raises(UserError, match=r"hidden_size 4, not 8"):
        open_features(tmp_path / "a", hidden_size=8)
    (tmp_path / "b").mkdir()
    for name in ("b", "c"):
        with pytest.raises(UserError, match=r"no index.json, no .ckpt.*run eagle3fn extract again"):
            open_features(tmp_path / name)


def old_dict(sample):
    return {
        "input_ids": sample.input_ids,
        "loss_mask": sample.token_mask,
        "hidden_state": sample.last_hidden[None],
        "aux_hidden_state": sample.aux_hidden[None],
    }


def test_the_older_trainers_files_are_read_in_path_order(tmp_path):
    samples = [random_sample(4 + i, i) for i in range(3)]
    (tmp_path / "aa").mkdir()
    torch.save(old_dict(samples[1]), tmp_path / "aa" / "c.ckpt")
    torch.save(old_dict(samples[0]), tmp_path / "a.ckpt")
    held = io.BytesIO()
    torch.save(old_dict(samples[2]), held)
    (tmp_path / "b.ckpt.gz").write_bytes(gzip.compress(held.getvalue()))
    opened = open_features(tmp_path, vocab_size=50, hidden_size=4)
    assert [entry["shard"] for entry in opened.samples] == ["a.ckpt", "aa/c.ckpt", "b.ckpt.gz"]
    for number, sample in enumerate(samples):
        assert same(read_sample(opened, number), sample)
        assert same(read_tokens(opened, number), sample[:2])
    with pytest.raises(UserError, match=r"no vocabulary size; name the target"):
        count_tokens(open_features(tmp_path), [0])
    with pytest.raises(UserError, match=r"a.ckpt.*aux_hidden.*delete"):
        read_sample(open_features(tmp_path, hidden_size=8), 0)


class Code:
    def __reduce__(self):
        return (print, ("run",))


def test_damaged_older_files_are_refused(tmp_path, capsys):
    path = tmp_path / "a.ckpt"
    tree = old_dict(GOOD)
    for value, named in (
        ({**tree, "hidden_state": Code()}, "damaged"),
        ([1], "holds a list"),
        ({k: v for k, v in tree.items() if k != "loss_mask"}, "no tensor loss_mask"),
        ({**tree, "hidden_state": torch.zeros(2, 6, 4)}, r"hidden_state has shape \(2, 6, 4\)"),
        ({**tree, "hidden_state": NAN[None]}, "last_hidden holds NaN"),
    ):
        torch.save(value, path)
        with pytest.raises(UserError, match=rf"a.ckpt.*{named}.*delete"):
            read_sample(open_features(tmp_path), 0)
    assert capsys.readouterr().out == ""
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"a.ckpt: damaged.*delete"):
        read_sample(open_features(tmp_path), 0)
    path.rename(tmp_path / "a.ckpt.gz")
    with pytest.raises(UserError, match=r"a.ckpt.gz: damaged.*delete"):
        read_sample(open_features(tmp_path), 0)


TEXTS = (
    *(
        b"hello world, this is text\n",
        b'{"a": 1}\n',
        b"abc",
        b"q\x00",
        b"t2d: 1\n",
        b"K",
        b"Gabc",
        b"N.",
    ),
    b"ctorch._utils\n_rebuild_tensor_v2\n(tR.",
)


@pytest.mark.parametrize("text", TEXTS)
def test_other_files_in_place_of_older_ones_are_refused(tmp_path, text):
    (tmp_path / "a.ckpt").write_bytes(text)
    (tmp_path / "b.ckpt.gz").write_bytes(gzip.compress(text))
    for number, name in enumerate(("a.ckpt", "b.ckpt.gz")):
        with pytest.raises(UserError, match=rf"{name}: damaged.*delete") as caught:
            read_sample(open_features(tmp_path), number)
        assert "weights_only" not in str(caught.value) and "Weights only" not in str(caught.value)
