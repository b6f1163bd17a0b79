"""SpecForge's feature files and vocabulary maps are read as ours are, and damaged ones refused."""

import gzip
import io

import pytest
import torch

from eagle3fn.base.errors import UserError
from eagle3fn.data.features import check_made_for, open_features, read_sample, read_tokens
from eagle3fn.data.vocab import build_map, load_map, map_size, save_map
from eagle3fn.specforge.feature_files import READER, read_map
from tests.factories import random_sample

GOOD = random_sample(6, 1)
NAN = GOOD.last_hidden.clone()
NAN[3, 1] = float("nan")
MAP = build_map(torch.tensor([0, 3, 0, 2, 9]), 3)

# No file of torch.save; the unpickler fails on each in its own way.
NO_TENSORS = (
    b"hello world, this is text\n",
    b'{"a": 1}\n',
    b"abc",
    b"q\x00",
    b"t2d: 1\n",
    b"K",
    b"Gabc",
    b"N.",
    b"ctorch._utils\n_rebuild_tensor_v2\n(tR.",
)


def same(left, right):
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(left, right, strict=True))


def tree_of(sample):
    return {
        "input_ids": sample.input_ids,
        "loss_mask": sample.token_mask,
        "hidden_state": sample.last_hidden[None],
        "aux_hidden_state": sample.aux_hidden[None],
    }


def opened(folder, **sizes):
    return open_features(folder, reader=READER, **sizes)


class Code:
    """Runs when it is unpickled, if anything is."""

    def __reduce__(self):
        return (print, ("run",))


def test_files_are_read_in_the_order_of_their_paths(tmp_path):
    samples = [random_sample(4 + i, i) for i in range(3)]
    (tmp_path / "aa").mkdir()
    torch.save(tree_of(samples[1]), tmp_path / "aa" / "c.ckpt")
    torch.save(tree_of(samples[0]), tmp_path / "a.ckpt")
    packed = io.BytesIO()
    torch.save(tree_of(samples[2]), packed)
    (tmp_path / "b.ckpt.gz").write_bytes(gzip.compress(packed.getvalue()))

    features = opened(tmp_path, vocab_size=50, hidden_size=4)
    assert [entry["shard"] for entry in features.samples] == ["a.ckpt", "aa/c.ckpt", "b.ckpt.gz"]
    for number, sample in enumerate(samples):
        assert same(read_sample(features, number), sample)
        assert same(read_tokens(features, number), (sample.input_ids, sample.token_mask))
    check_made_for(features, "abc", (1, 2, 3), "the run")


def test_sizes_are_checked_when_a_file_is_read(tmp_path):
    torch.save(tree_of(GOOD), tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"a.ckpt.*aux_hidden.*delete"):
        read_sample(opened(tmp_path, hidden_size=8), 0)


def test_folder_without_files_is_refused_with_their_endings(tmp_path):
    refusal = r"no index.json and no .ckpt or .ckpt.gz there; run eagle3fn extract again"
    with pytest.raises(UserError, match=refusal):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({**tree_of(GOOD), "hidden_state": Code()}, "damaged"),
        ([1], "holds a list"),
        ({k: v for k, v in tree_of(GOOD).items() if k != "loss_mask"}, "no tensor loss_mask"),
        (
            {**tree_of(GOOD), "hidden_state": torch.zeros(2, 6, 4)},
            r"hidden_state has shape \(2, 6, 4\)",
        ),
        ({**tree_of(GOOD), "hidden_state": NAN[None]}, "last_hidden holds NaN"),
    ],
)
def test_file_with_other_content_is_refused_and_runs_no_code(tmp_path, capsys, value, named):
    torch.save(value, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=rf"a.ckpt.*{named}.*delete"):
        read_sample(opened(tmp_path), 0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["a.ckpt", "a.ckpt.gz"])
def test_truncated_file_is_refused(tmp_path, name):
    packed = io.BytesIO()
    torch.save(tree_of(GOOD), packed)
    data = packed.getvalue()
    if name.endswith(".gz"):
        data = gzip.compress(data)
    (tmp_path / name).write_bytes(data[:100])
    with pytest.raises(UserError, match=rf"{name}: damaged.*delete"):
        read_sample(opened(tmp_path), 0)


@pytest.mark.parametrize("data", NO_TENSORS)
@pytest.mark.parametrize("name", ["a.ckpt", "a.ckpt.gz"])
def test_file_that_torch_did_not_save_is_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(UserError, match=rf"{name}: damaged.*delete") as caught:
        read_sample(opened(tmp_path), 0)
    assert "weights_only" not in str(caught.value)
    assert "Weights only" not in str(caught.value)


def test_map_of_specforge_is_read_and_checked(tmp_path):
    path = tmp_path / "map.pt"
    torch.save({"d2t": MAP.d2t, "t2d": MAP.t2d}, path)
    assert same(load_map(path, 5, 3, "xyz", read_map), MAP)
    assert map_size(path, read_map) == 3
    torch.save({"d2t": MAP.d2t}, path)
    with pytest.raises(UserError, match=r"map.pt: no tensor t2d.*again"):
        load_map(path, 5, 3, read=read_map)


def test_map_of_ours_is_read_whatever_its_name(tmp_path):
    save_map(tmp_path / "map.pt", MAP, {"target_hash": "abc"})
    assert same(load_map(tmp_path / "map.pt", 5, 3, "abc", read_map), MAP)
    with pytest.raises(UserError, match=r"map.pt: made for another target"):
        load_map(tmp_path / "map.pt", 5, 3, "xyz", read_map)


@pytest.mark.parametrize("load", [lambda path, read: load_map(path, 5, 3, read=read), map_size])
@pytest.mark.parametrize(
    "data",
    [
        b"hello world\n",
        b"t2d,d2t\n",
        b"abc",
        b"",
        b"K",
        b"Gabc",
        b'{"a": 1}',
        b"12345678{",
        b"PK\x03\x04zip",
    ],
)
def test_damaged_map_is_refused(tmp_path, load, data):
    path = tmp_path / "map.pt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"map.pt: damaged.*again") as caught:
        load(path, read_map)
    assert "weights_only" not in str(caught.value)


def test_missing_map_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none.pt: no such file"):
        load_map(tmp_path / "none.pt", 5, 3, read=read_map)
