"""SpecForge's features and vocabulary maps are read, and every damage is named with its file."""

import gzip
import io
import os
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eagle3fn import specforge
from eagle3fn.base.errors import UserError
from eagle3fn.base.types import Sample
from eagle3fn.data.features import (
    FeatureSet,
    check_made_for,
    open_features,
    read_sample,
    read_tokens,
)
from eagle3fn.data.vocab import build_map, count_tokens, load_map, map_size, save_map
from eagle3fn.specforge import feature_files
from eagle3fn.specforge.feature_files import find_ckpts, read_ckpt, write_ckpt, write_map
from tests.factories import random_sample

GOOD = random_sample(6, 1)
MAP = build_map(torch.tensor([0, 3, 0, 2, 9]), 3)


def open_ckpts(folder: Path, vocab: int | None = None, hidden: int | None = None) -> FeatureSet:
    return open_features(folder, vocab, hidden, specforge.READER)


def stored(sample: Sample) -> dict[str, Any]:
    """A sample as SpecForge stores it."""
    return {
        "input_ids": sample.input_ids,
        "loss_mask": sample.token_mask,
        "hidden_state": sample.last_hidden[None],
        "aux_hidden_state": sample.aux_hidden[None],
    }


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(left, right, strict=True))


# Features


def test_files_are_sorted_by_path_as_text(tmp_path: Path) -> None:
    names = ("a-b/y.ckpt", "a/w.ckpt.gz", "a/x.ckpt", "z.ckpt")
    for name in (*reversed(names), "a/notes.txt", "a/x.ckpt.tmp"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    # What another process is writing now.
    (tmp_path / ".v.ckpt.12345678.tmp").mkdir()
    (tmp_path / ".v.ckpt.12345678.tmp/v.ckpt").touch()
    assert find_ckpts(tmp_path) == [tmp_path / name for name in names]


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").touch()
    (tmp_path / "b.ckpt").mkdir()
    with pytest.raises(UserError, match=r"b.ckpt: is a folder; delete it or restore the file"):
        find_ckpts(tmp_path)


def test_files_are_read_in_path_order(tmp_path: Path) -> None:
    samples = [random_sample(4 + i, i) for i in range(3)]
    (tmp_path / "aa").mkdir()
    torch.save(stored(samples[1]), tmp_path / "aa" / "c.ckpt")
    torch.save(stored(samples[0]), tmp_path / "a.ckpt")
    compressed = io.BytesIO()
    torch.save(stored(samples[2]), compressed)
    (tmp_path / "b.ckpt.gz").write_bytes(gzip.compress(compressed.getvalue()))

    opened = open_ckpts(tmp_path, vocab=50, hidden=4)
    assert [entry["shard"] for entry in opened.samples] == ["a.ckpt", "aa/c.ckpt", "b.ckpt.gz"]
    for number, sample in enumerate(samples):
        assert same(read_sample(opened, number), sample)
        assert same(read_tokens(opened, number), sample[:2])


def test_fields_without_a_batch_axis_and_older_formats_are_read(tmp_path: Path) -> None:
    """`hidden_state` as `(S, size)`, ids as `(1, S)` int32, torch's format before the zip file."""
    tree = stored(GOOD) | {
        "input_ids": GOOD.input_ids[None].int(),
        "hidden_state": GOOD.last_hidden,
    }
    torch.save(tree, tmp_path / "a.ckpt", _use_new_zipfile_serialization=False)
    assert same(read_ckpt(tmp_path / "a.ckpt"), GOOD)


def test_sizes_are_checked_against_the_targets(tmp_path: Path) -> None:
    torch.save(stored(GOOD), tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"no vocabulary size; name the target"):
        count_tokens(open_ckpts(tmp_path), [0])
    with pytest.raises(UserError, match=r"a.ckpt.*aux_hidden.*delete"):
        read_sample(open_ckpts(tmp_path, hidden=8), 0)
    with pytest.raises(UserError, match=r"a.ckpt.*token id .*must be in \[0, 3\)"):
        read_tokens(open_ckpts(tmp_path, vocab=3), 0)


def test_another_configurations_files_cannot_be_told(tmp_path: Path) -> None:
    """They don't name their target: its hash and layers are not compared."""
    torch.save(stored(GOOD), tmp_path / "a.ckpt")
    check_made_for(open_ckpts(tmp_path), "abc", (1, 2, 3), "the run")


def test_a_folder_without_files_is_refused_with_their_endings(tmp_path: Path) -> None:
    message = r"no index\.json and no \.ckpt or \.ckpt\.gz there; run eagle3fn extract again"
    with pytest.raises(UserError, match=message):
        open_ckpts(tmp_path)
    with pytest.raises(UserError, match="missing: no such folder; run eagle3fn extract again"):
        open_ckpts(tmp_path / "missing")


def test_without_the_reader_files_are_not_found(tmp_path: Path) -> None:
    torch.save(stored(GOOD), tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"no index\.json"):
        open_features(tmp_path)


class Code:
    """Pickled, it runs a function where it is loaded."""

    def __reduce__(self):
        return (print, ("run",))


def without(tree: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if name != key}


NAN = GOOD.last_hidden.clone()
NAN[3, 1] = float("nan")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (stored(GOOD) | {"hidden_state": Code()}, "damaged"),
        ([1], "holds a list"),
        (without(stored(GOOD), "loss_mask"), "no tensor loss_mask"),
        (stored(GOOD) | {"input_ids": [1, 2]}, "no tensor input_ids"),
        (stored(GOOD) | {"hidden_state": torch.zeros(2, 6, 4)}, r"hidden_state has shape \(2, 6"),
        (stored(GOOD) | {"hidden_state": NAN[None]}, "last_hidden holds NaN"),
    ],
)  # fmt: skip
def test_unsound_files_are_refused(
    tmp_path: Path, value: Any, named: str, capsys: pytest.CaptureFixture
) -> None:
    torch.save(value, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=rf"a.ckpt.*{named}.*delete"):
        read_sample(open_ckpts(tmp_path), 0)
    assert capsys.readouterr().out == "", "code in the file has run"


IDS, STATE = GOOD.input_ids, GOOD.last_hidden.float()


@pytest.mark.parametrize("name", ["a.ckpt", "a.ckpt.gz"])
@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("hidden_state", lambda: STATE.to("meta"), "(more than tensors|has no values)"),
        (
            "hidden_state",
            lambda: torch.quantize_per_tensor(STATE, 0.1, 0, torch.qint8),
            "more than tensor",
        ),
        ("hidden_state", lambda: torch.nested.nested_tensor([STATE, STATE]), "more than tensors"),
        ("hidden_state", STATE.to_sparse, "more than tensors"),
        ("hidden_state", STATE.to_sparse_csr, "more than tensors"),
        ("hidden_state", lambda: torch.complex(STATE, STATE), "more than tensors"),
        ("hidden_state", lambda: torch.complex(STATE, STATE).conj(), "more than tensors"),
        (
            "hidden_state",
            lambda: torch.zeros(1).expand(10**6, 10**6),
            "hidden_state has shape.*more than",
        ),
        ("input_ids", lambda: IDS.float() + 0.5, "input_ids is torch.float32 and holds fractions"),
        ("input_ids", IDS.float, "input_ids is torch.float32: must be of whole numbers"),
        ("input_ids", lambda: IDS.to("meta"), "(more than tensors|has no values)"),
        (
            "loss_mask",
            lambda: GOOD.token_mask / 2,
            "loss_mask is torch.float32 and holds fractions",
        ),
        ("loss_mask", lambda: torch.device("cpu"), "more than tensors: torch.device"),
        ("loss_mask", lambda: Counter([1]), "more than tensors: collections.Counter"),
    ],
)
def test_other_than_plain_tensors_are_refused_by_file_and_field(
    tmp_path: Path, name: str, field: str, value: Callable[[], Any], named: str
) -> None:
    data = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # torch's, of kinds that are not finished
        torch.save(stored(GOOD) | {field: value()}, data)
    bytes_of = gzip.compress(data.getvalue()) if name.endswith(".gz") else data.getvalue()
    (tmp_path / name).write_bytes(bytes_of)
    with pytest.raises(UserError, match=rf"{name}: .*{named}.*delete") as caught:
        read_sample(open_ckpts(tmp_path), 0)
    assert "\n" not in str(caught.value)


def test_a_mask_of_whole_floats_and_parameters_are_read(tmp_path: Path) -> None:
    state = torch.nn.Parameter(GOOD.last_hidden[None])
    tree = stored(GOOD) | {"loss_mask": GOOD.token_mask.float(), "hidden_state": state}
    torch.save(tree, tmp_path / "a.ckpt")
    assert same(read_sample(open_ckpts(tmp_path), 0), GOOD)


@pytest.mark.parametrize("legacy", [True, False])
def test_no_class_but_tensors_is_made(tmp_path: Path, legacy: bool) -> None:
    """Not even one that torch's reader takes, in either of its formats."""
    torch.save(
        stored(GOOD) | {"more": Counter("a")},
        tmp_path / "a.ckpt",
        _use_new_zipfile_serialization=not legacy,
    )
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["more"] == Counter("a")
    with pytest.raises(UserError, match=r"a.ckpt: .*more than tensors: collections.Counter"):
        read_sample(open_ckpts(tmp_path), 0)


def test_a_file_that_unpacks_to_far_more_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_files, "_SMALL", 1000)
    torch.save(stored(GOOD) | {"hidden_state": torch.zeros(1, 6, 20_000)}, tmp_path / "big")
    data = (tmp_path / "big").read_bytes()
    (tmp_path / "a.ckpt.gz").write_bytes(gzip.compress(data))
    with (
        zipfile.ZipFile(tmp_path / "big") as plain,
        zipfile.ZipFile(tmp_path / "b.ckpt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry))
    for number, named in enumerate(("a.ckpt.gz: .*unpacks to more", "b.ckpt: .*is compressed")):
        with pytest.raises(UserError, match=rf"{named}.*delete"):
            read_sample(open_ckpts(tmp_path), number)


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_is_no_file_among_the_features_is_named(tmp_path: Path, kind: str) -> None:
    torch.save(stored(GOOD), tmp_path / "a.ckpt")
    path = tmp_path / "b.ckpt"
    path.symlink_to("nowhere") if kind == "link" else os.mkfifo(path)
    with pytest.raises(UserError, match=r"b.ckpt: is (a link to nothing|no regular file); delete"):
        open_ckpts(tmp_path)


def test_a_pipe_in_place_of_a_map_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "map.pt")
    with pytest.raises(UserError, match=r"map.pt: is a .*pipe.*again"):
        load(tmp_path / "map.pt")


def test_written_files_are_whole_and_alike(tmp_path: Path) -> None:
    for name in ("a.ckpt", "other.ckpt"):
        write_ckpt(tmp_path / name, GOOD)
        write_map(tmp_path / f"{name}.pt", MAP)
    assert (tmp_path / "a.ckpt").read_bytes() == (tmp_path / "other.ckpt").read_bytes()
    assert (tmp_path / "a.ckpt.pt").read_bytes() == (tmp_path / "other.ckpt.pt").read_bytes()
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(UserError, match=r"a.ckpt"):
        write_ckpt(tmp_path / "a.ckpt" / "b", GOOD)


@pytest.mark.parametrize("name", ["a.ckpt", "a.ckpt.gz"])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    torch.save(stored(GOOD), path)
    data = path.read_bytes()
    if name.endswith(".gz"):
        data = gzip.compress(data)
    path.write_bytes(data[:100])
    with pytest.raises(UserError, match=rf"{name}: damaged.*delete"):
        read_sample(open_ckpts(tmp_path), 0)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(stored(GOOD), path)
    opened = open_ckpts(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"a.ckpt: no such file"):
        read_sample(opened, 0)


TEXTS = (
    b"hello world, this is text\n",
    b'{"a": 1}\n',
    b"abc",
    b"q\x00",
    b"t2d: 1\n",
    b"K",
    b"Gabc",
    b"N.",
    b"",
    b"ctorch._utils\n_rebuild_tensor_v2\n(tR.",
)
"""Bytes on which the unpickler fails in ways of its own."""


@pytest.mark.parametrize("text", TEXTS)
def test_other_files_in_place_of_features_are_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.ckpt").write_bytes(text)
    (tmp_path / "b.ckpt.gz").write_bytes(gzip.compress(text))
    for number, name in enumerate(("a.ckpt", "b.ckpt.gz")):
        with pytest.raises(UserError, match=rf"{name}: damaged.*delete") as caught:
            read_sample(open_ckpts(tmp_path), number)
        assert "weights_only" not in str(caught.value)
        assert "Weights only" not in str(caught.value)


# Vocabulary maps


def load(path: Path, target_hash: str | None = None) -> Any:
    return load_map(path, 5, 3, target_hash, specforge.read_map)


def test_specforges_map_is_read(tmp_path: Path) -> None:
    """It doesn't name its target: any is accepted."""
    path = tmp_path / "map.pt"
    torch.save({"d2t": MAP.d2t, "t2d": MAP.t2d}, path)
    assert same(load(path), MAP)
    assert same(load(path, "xyz"), MAP)
    assert map_size(path, specforge.read_map) == 3


@pytest.mark.parametrize("name", ["map.safetensors", "map.pt"])
def test_our_map_is_read_too_and_its_target_checked(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save_map(path, MAP, {"target_hash": "abc", "target": "tiny"})
    assert same(load(path, "abc"), MAP)
    assert map_size(path, specforge.read_map) == 3
    with pytest.raises(UserError, match=rf"{name}.*another target \(tiny\).*again"):
        load(path, "xyz")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"d2t": MAP.d2t}, "no tensor t2d"),
        ({"d2t": MAP.d2t, "t2d": [1]}, "no tensor t2d"),
        ([1], "no tensor t2d"),
        ({"d2t": MAP.d2t[:2], "t2d": MAP.t2d}, "d2t has shape"),
        ({"d2t": MAP.d2t.to("meta"), "t2d": MAP.t2d}, "more than tensors"),
        ({"d2t": MAP.d2t.to_sparse(), "t2d": MAP.t2d}, "more than tensors"),
        ({"d2t": MAP.d2t + torch.arange(3), "t2d": MAP.t2d}, "different tokens"),
        ({"d2t": MAP.d2t, "t2d": Code()}, "damaged"),
    ],
)
def test_unsound_maps_are_refused(
    tmp_path: Path, value: Any, named: str, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "map.pt"
    torch.save(value, path)
    with pytest.raises(UserError, match=rf"map.pt: .*{named}.*again"):
        load(path)
    assert capsys.readouterr().out == "", "code in the file has run"


def test_a_map_without_its_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.pt"
    torch.save({"t2d": MAP.t2d}, path)
    with pytest.raises(UserError, match=r"map.pt: no tensor d2t.*again"):
        map_size(path, specforge.read_map)


def test_missing_and_truncated_maps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.pt: no such file"):
        load(tmp_path / "none.pt")
    path = tmp_path / "map.safetensors"
    save_map(path, MAP, {})
    for data in (path.read_bytes()[:-4], b"junk", b"", b"PK\x03\x04zip"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"map.safetensors: damaged.*again") as caught:
            load(path)
        assert str(caught.value).count("damaged") == 1


@pytest.mark.parametrize(
    "text", [b"hello world\n", b"t2d,d2t\n", b"abc", b"K", b"Gabc", b'{"a": 1}', b"12345678{"]
)
def test_text_in_place_of_a_map_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "map.pt"
    path.write_bytes(text)
    for read in (load, lambda path: map_size(path, specforge.read_map)):
        with pytest.raises(UserError, match=r"map.pt: damaged.*again") as caught:
            read(path)
        assert "weights_only" not in str(caught.value)
