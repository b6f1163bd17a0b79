"""Checkpoints by somebody else, whose hashes match: nothing in them is run, and what is not a state
is refused in one line.
"""

import copy
import io
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
)

import eagle3fn as e3
from eagle3fn.base.tree import equal
from eagle3fn.train import pickle_records
from eagle3fn.train.pickle_records import Named, read_records
from tests.train.saved_checkpoint import (
    Saved,
    load,
    make_saved,
    read_meta,
    rewrite_file,
    rewrite_metadata,
    write_meta,
)

LEAF = "masters.fc.weight"


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return make_saved(tmp_path)


class Harm:
    """Creates a folder where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def refused(saved: Saved) -> str:
    """The one line with which the checkpoint is refused."""
    with pytest.raises(e3.UserError) as caught:
        load(saved)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert str(saved.path) in text
    remedies = ("delete", "train into another folder", "begin a new run")
    assert any(remedy in text for remedy in remedies)
    return text


def with_harm(place: str, harm: Harm) -> Callable[[Any], Any]:
    """Puts it somewhere into the metadata."""

    def change(metadata: Any) -> Any:
        if place == "alone":
            return harm
        if place == "beside":
            metadata.planner_data = harm
        elif place == "shape":
            metadata.state_dict_metadata[LEAF].size = harm
        return metadata

    return change


@pytest.mark.parametrize("place", ["alone", "shape"])
def test_nothing_in_the_metadata_is_run(saved, tmp_path, place):
    rewrite_metadata(saved.path, with_harm(place, Harm(tmp_path / "harm")))
    assert ".metadata: " in refused(saved)
    assert not (tmp_path / "harm").exists()


def test_what_is_not_read_of_the_metadata_is_not_run(saved, tmp_path):
    rewrite_metadata(saved.path, with_harm("beside", Harm(tmp_path / "harm")))
    assert equal(load(saved), saved.state)
    assert not (tmp_path / "harm").exists()


def test_an_entry_that_torch_would_unpickle_is_refused(saved, tmp_path):
    """torch reads what is no tensor without `weights_only`."""
    stored = io.BytesIO()
    torch.save(Harm(tmp_path / "harm"), stored)
    name = next(file.name for file in saved.path.glob("__0_*"))
    content = (saved.path / name).read_bytes()

    def change(metadata: Any) -> None:
        metadata.state_dict_metadata["step"] = BytesStorageMetadata()
        place = metadata.storage_data.pop(MetadataIndex("step", []))
        place = replace(place, offset=len(content), length=len(stored.getvalue()))
        metadata.storage_data[MetadataIndex("step")] = place

    rewrite_metadata(saved.path, change)
    rewrite_file(saved.path, name, content + stored.getvalue())
    assert "TensorStorageMetadata" in refused(saved)
    assert not (tmp_path / "harm").exists()


def test_tensors_of_another_pickle_are_not_run(saved, tmp_path):
    stored = io.BytesIO()
    torch.save(Harm(tmp_path / "harm"), stored)
    name = next(file.name for file in saved.path.glob("__0_*"))
    content = (saved.path / name).read_bytes()

    def change(metadata: Any) -> None:
        index = MetadataIndex("step", [])
        length = len(stored.getvalue())
        metadata.storage_data[index] = replace(
            metadata.storage_data[index], offset=len(content), length=length
        )

    rewrite_metadata(saved.path, change)
    rewrite_file(saved.path, name, content + stored.getvalue())
    assert "not readable" in refused(saved)
    assert not (tmp_path / "harm").exists()


def moved(path: str) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        for index, place in metadata.storage_data.items():
            metadata.storage_data[index] = replace(place, relative_path=path)

    return change


def entry_with(**values: Any) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        for name, value in values.items():
            setattr(metadata.state_dict_metadata[LEAF], name, value)

    return change


def chunk_with(**values: Any) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        for name, value in values.items():
            setattr(metadata.state_dict_metadata[LEAF].chunks[0], name, value)

    return change


def without(name: str) -> Callable[[Any], None]:
    return lambda metadata: metadata.state_dict_metadata.pop(name) and None


def twice(metadata: Any) -> None:
    chunks = metadata.state_dict_metadata[LEAF].chunks
    chunks.append(copy.deepcopy(chunks[0]))


def overlapping(metadata: Any) -> None:
    """As many rows as the leaf has, but some of them twice."""
    entry = metadata.state_dict_metadata[LEAF]
    half = torch.Size([entry.size[0] // 2, entry.size[1]])
    places = metadata.storage_data
    for row in (0, 1):
        places[MetadataIndex(LEAF, [row, 0])] = places[MetadataIndex(LEAF, [0, 0])]
    chunks = [ChunkStorageMetadata(torch.Size([row, 0]), half) for row in (0, 1)]
    metadata.state_dict_metadata[LEAF].chunks = chunks


def another_class(metadata: Any) -> None:
    entry = BytesStorageMetadata()
    vars(entry).update(vars(metadata.state_dict_metadata[LEAF]))
    metadata.state_dict_metadata[LEAF] = entry


def other_dtype(metadata: Any) -> None:
    metadata.state_dict_metadata[LEAF].properties.dtype = torch.float64


CHANGES = {
    "elsewhere": (moved("../x"), "'../x' is no file of the checkpoint"),
    "absolute": (moved("/etc/passwd"), "'/etc/passwd' is no file of the checkpoint"),
    "no leaf": (without("step"), "step is missing"),
    "another shape": (entry_with(size=torch.Size([3, 4])), f"{LEAF} has a chunk that is not made"),
    "huge": (entry_with(size=[2**80]), "a shape is missing"),
    "no chunks": (entry_with(chunks=[]), f"{LEAF} has not every row once"),
    "chunks of another type": (entry_with(chunks=None), f"{LEAF} has no chunks"),
    "twice": (twice, f"{LEAF} has not every row once"),
    "overlapping": (overlapping, f"{LEAF} has not every row once"),
    "another class": (another_class, "a TensorStorageMetadata is missing"),
    "a part": (chunk_with(sizes=torch.Size([1, 48])), f"{LEAF} has not every row once"),
    "columns": (chunk_with(sizes=torch.Size([16, 1])), f"{LEAF} has a chunk that is not made of"),
    "dtype": (other_dtype, f"{LEAF} is torch.float64"),
    "a list": (lambda metadata: [1, 2], "a Metadata is missing"),
    "a number": (lambda metadata: 5, "a Metadata is missing"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_metadata_of_something_else_is_refused(saved, name):
    change, message = CHANGES[name]
    rewrite_metadata(saved.path, change)
    assert message in refused(saved)


def test_damaged_metadata_is_refused_or_read_the_same(saved):
    """Bytes changed, cut and put in by a seed, under a matching hash."""
    content = (saved.path / ".metadata").read_bytes()
    chosen = random.Random(3)
    for _ in range(80):
        place = chosen.randrange(len(content))
        byte = bytes([chosen.randrange(256)])
        damaged = chosen.choice(
            [
                content[:place],
                content[:place] + byte + content[place + 1 :],
                content[:place] + byte * chosen.randrange(9) + content[place:],
                content[:place] + content[place + chosen.randrange(40) :],
            ]
        )
        rewrite_file(saved.path, ".metadata", damaged)
        try:
            state = load(saved)
        except e3.UserError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert equal(state, saved.state)


def test_records_are_what_pickle_wrote():
    value = {"a": [1, None, True, (2, "b")], "c": Path("x"), "d": -5, "e": 2**40}
    found = read_records(pickle.dumps(value, 4))
    keys, values = found[::2], found[1::2]
    assert keys == ["a", "c", "d", "e"]
    assert values[0] == [1, None, True, (2, "b")]
    assert values[1].kind == Named("pathlib", "PosixPath")
    assert values[1].arguments == ("x",)
    assert values[2:] == [-5, 2**40]


def test_a_value_that_refers_to_itself_many_times_is_no_hang(saved):
    """Hashed as a key, it would take `2**64` steps."""
    value: Any = ()
    for _ in range(64):
        value = (value, value)
    raw = pickle.dumps(value, 4)
    rewrite_file(saved.path, ".metadata", b"\x80\x04}" + raw[2:-1] + b"Ns.")
    assert "a Metadata is missing" in refused(saved)


class Shared:
    """A key that is no text. Shown whole, it has `2**64` parts."""

    def __reduce__(self) -> Any:
        value: Any = ()
        for _ in range(64):
            value = (value, value)
        return tuple, (value,)


def put_shared(metadata: Any, place: str) -> None:
    """As a name somewhere in the metadata."""
    index, stored = next(iter(metadata.storage_data.items()))
    if place == "field":
        vars(metadata)[Shared()] = 1
    elif place == "leaf":
        metadata.state_dict_metadata[Shared()] = metadata.state_dict_metadata[LEAF]
    elif place == "leaf of a file":
        metadata.storage_data[replace(index, fqn=Shared())] = stored
    else:
        metadata.storage_data[index] = replace(stored, relative_path=Shared())


@pytest.mark.parametrize("place", ["field", "leaf", "file", "leaf of a file"])
def test_a_name_that_is_no_text_is_refused_and_not_shown(saved, place):
    rewrite_metadata(saved.path, lambda metadata: put_shared(metadata, place))
    assert "is no text" in refused(saved)


def test_a_name_that_is_nested_deeply_is_refused_and_not_shown(saved):
    module = b"torch.distributed.checkpoint.metadata"
    made = b"\x8c%c%b\x8c\x08Metadata\x93)\x81" % (len(module), module)
    deep = b")" + b"\x85" * 50_000
    rewrite_file(saved.path, ".metadata", b"\x80\x04" + made + b"}" + deep + b"Nsb.")
    assert "a field's name of a Metadata is no text" in refused(saved)


def test_metadata_of_more_than_any_checkpoint_is_refused_before_it_is_made(saved, monkeypatch):
    monkeypatch.setattr(pickle_records, "_MOST_OPCODES", 2**10)
    rewrite_file(saved.path, ".metadata", b"\x80\x04" + b"}" * 2**10 + b".")
    assert "a pickle of more than 1,024 opcodes" in refused(saved)
    rewrite_file(saved.path, ".metadata", b"\x80\x04" + b" " * 2**25)
    assert "more than 33,554,432 bytes" in refused(saved)


# The tensors of its files


def rewrite_leaf(saved: Saved, content: bytes) -> None:
    """Put other bytes in place of a leaf's, under matching hashes."""
    name = next(file.name for file in saved.path.glob("__0_*"))
    before = (saved.path / name).read_bytes()

    def change(metadata: Any) -> None:
        index = MetadataIndex(LEAF, [0, 0])
        metadata.storage_data[index] = replace(
            metadata.storage_data[index], offset=len(before), length=len(content)
        )

    rewrite_metadata(saved.path, change)
    rewrite_file(saved.path, name, before + content)


def stored(value: Any) -> bytes:
    """What `torch.save` writes of it."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def deflated(content: bytes) -> bytes:
    """The same archive, its entries compressed."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return file.getvalue()


def overlapping_entries(content: bytes) -> bytes:
    """The same archive, whose directory has each entry many times."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        directory = content[archive.start_dir : content.rindex(b"PK\x06\x06")]
        entries = len(archive.infolist())
    end = struct.pack(
        "<4s4H2LH", b"PK\5\6", 0, 0, 9 * entries, 9 * entries, 9 * len(directory), 0, 0
    )
    start = content.index(directory)
    end = end[:16] + struct.pack("<L", start) + end[20:]
    return content[:start] + directory * 9 + end


SHAPE = (16, 48)
TENSORS = {
    "compressed": (lambda: deflated(stored(torch.zeros(SHAPE))), "is compressed"),
    "overlapping": (lambda: overlapping_entries(stored(torch.zeros(SHAPE))), "larger than the"),
    "complex": (lambda: stored(torch.zeros(SHAPE, dtype=torch.complex64)), "more than tensors"),
    "another dtype": (lambda: stored(torch.zeros(SHAPE).half()), "is torch.float16 of [16, 48]"),
    "another shape": (lambda: stored(torch.zeros(48, 16)), "is torch.float32 of [48, 16]"),
    "expanded": (lambda: stored(torch.zeros(1).expand(SHAPE)), "more than the file holds"),
    "too large": (lambda: stored(torch.zeros(SHAPE)) + bytes(2**17), "bytes, too many for"),
    "a dict": (lambda: stored({"a": torch.zeros(SHAPE)}), "is a dict, not a tensor"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_is_not_what_the_metadata_says_is_refused(saved, name):
    make, message = TENSORS[name]
    assert saved.state.masters["fc.weight"].shape == SHAPE
    rewrite_leaf(saved, make())
    assert message in refused(saved)


# meta.json

MISSING = object()
DEEP: Any = []
for _ in range(300):
    DEEP = [DEEP]
WRONG = [None, "", "x", [], {}, [DEEP], {"a": {"b": 1}}, -1, 10**30, True, 1.5, MISSING]
FEW_WRONG = [None, [DEEP], 10**30, True, MISSING]
READ = ("schema", "cursor", "config", "data", "extra", "files", "rng", "threads", "world")


def places(meta: dict[str, Any]) -> list[tuple[str, ...]]:
    """Where values can be put: at every key, at every key of every section, and in a setting."""
    found: list[tuple[str, ...]] = [(name,) for name in meta if name not in ("digest", "schema")]
    for name, part in meta.items():
        if isinstance(part, dict):
            found += [(name, key) for key in part]
    return [*found, ("config", "train", "seed"), ("config", "draft", "rope_scaling")]


def put(meta: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy with another value there."""
    changed = copy.deepcopy(meta)
    part = changed
    for key in place[:-1]:
        part = part[key]
    part.pop(place[-1], None)
    if value is not MISSING:
        part[place[-1]] = value
    return changed


def test_values_of_wrong_types_in_meta_are_refused_or_change_nothing(saved):
    meta = read_meta(saved.path)
    accepted = set()
    for place in places(meta):
        for value in WRONG if len(place) == 1 else FEW_WRONG:
            write_meta(saved.path, put(meta, place, value))
            try:
                state = load(saved)
            except e3.UserError as error:
                assert len(str(error).splitlines()) == 1
                continue
            assert equal(state, saved.state)
            accepted.add(place[0])

    # What a resume does not read or has a default for, and the loop's own values.
    assert accepted <= {"torch", "extra", "earlier", "cursor", "config", "world", "files"}


def name_of(value: Any) -> str:
    """A test's name must be the same in every process: an object's text has its address."""
    return "missing" if value is MISSING else str(value)


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("value", WRONG[:3] + WRONG[7:], ids=name_of)
def test_a_value_of_another_type_is_named(saved, name, value):
    meta = read_meta(saved.path)
    write_meta(saved.path, put(meta, (name,), value))
    text = refused(saved)
    assert "meta.json" in text
    assert name in text


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "elsewhere"])
def test_files_that_are_none_are_refused_and_not_waited_for(saved, tmp_path, kind):
    name = "draft.safetensors"
    (saved.path / name).rename(tmp_path / "outside")
    if kind == "pipe":
        os.mkfifo(saved.path / name)
    elif kind == "device":
        (saved.path / name).symlink_to("/dev/zero")
    elif kind == "folder":
        (saved.path / name).mkdir()
    else:
        files = read_meta(saved.path)["files"]
        files["../outside"] = files.pop(name)
        write_meta(saved.path, read_meta(saved.path) | {"files": files})
    assert "no file" in (text := refused(saved)) or "no name in the folder" in text


def test_a_saved_state_that_is_not_finite_is_refused(tmp_path):
    made = make_saved(tmp_path / "good")
    leaf = made.state.masters["fc.weight"].clone()
    leaf[0, 0] = torch.inf
    broken = made.state._replace(masters=made.state.masters | {"fc.weight": leaf})
    again = make_saved(tmp_path / "broken", broken)
    assert f"{LEAF} holds NaN or infinity" in refused(again)
