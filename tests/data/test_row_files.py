"""Rows come back equal from every container, and what cannot be read is named with its remedy."""

import gzip
import io
import json
import lzma
import os
import sys
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import sha256
from eagle3fn.data import json_array
from eagle3fn.data.row_files import FileRow, read_rows, rows_digest

BOM = b"\xef\xbb\xbf"
TALK = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "é 😀\n"}]}
ROWS: list[Any] = [TALK, {"id": 7, "n": [1.5, None, True]}, {}]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def pretty(rows: list[Any]) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=2).encode()


def turns(*contents: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content} for content in contents]


def zst(data: bytes) -> bytes:
    """Two frames."""
    zstandard = pytest.importorskip("zstandard")
    half = len(data) // 2
    return b"".join(zstandard.compress(part) for part in (data[:half], data[half:]))


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gz": gzip.compress,
    "xz": lambda data: lzma.compress(data, preset=0),
    "zst": zst,
}


def put(folder: Path, data: bytes, name: str = "rows.dat") -> Path:
    """A file whose name says nothing of what it holds."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def values(path: str | Path) -> list[Any]:
    rows = list(read_rows(path))
    assert [row.fault for row in rows] == [None] * len(rows)
    return [row.value for row in rows]


def columns(rows: list[Any]) -> Any:
    """An Arrow table with a column for each key of any row; null where a row has it not."""
    pa = pytest.importorskip("pyarrow")
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def table(folder: Path, rows: Any, name: str = "rows.parquet", **options: Any) -> Path:
    pq = pytest.importorskip("pyarrow.parquet")
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(columns(rows) if isinstance(rows, list) else rows, path, **options)
    return path


def saved(folder: Path, parts: list[list[Any]]) -> Path:
    """A folder as `Dataset.save_to_disk` writes it."""
    pa = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    names = [f"data-{number:05}-of-{len(parts):05}.arrow" for number in range(len(parts))]
    for name, rows in zip(names, parts, strict=True):
        batch = columns(rows)
        with (
            pa.OSFile(str(folder / name), "wb") as file,
            pa.ipc.new_stream(file, batch.schema) as to,
        ):
            to.write_table(batch)
    state = {"_data_files": [{"filename": name} for name in names]}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


# JSON


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("mark", [b"", BOM], ids=["", "bom"])
@pytest.mark.parametrize("write", [lines, pretty])
def test_json_is_read_as_written_whatever_the_name(tmp_path, packing, mark, write):
    path = put(tmp_path, PACKINGS[packing](mark + write(ROWS)))
    assert values(path) == ROWS
    assert rows_digest(path) == sha256(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(
    rows=st.lists(JSON, max_size=6),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    piece=st.integers(1, 40),
)
def test_any_array_is_read_from_pieces_of_any_size(
    tmp_path_factory, rows, indent, ascii_only, piece
):
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    data = (" \n" + text + " ").encode("utf-8", "surrogatepass" if ascii_only else "replace")
    expected = json.loads(data.decode("utf-8", "surrogatepass"))
    patch = pytest.MonkeyPatch()
    with patch.context() as change:
        change.setattr(json_array, "_PIECE", piece)
        found = list(json_array.array_items(io.BytesIO(data)))
    assert [fault for _, fault in found] == [None] * len(expected)
    assert json.dumps([value for value, _ in found]) == json.dumps(expected)


@given(rows=st.lists(st.dictionaries(st.text(), JSON, max_size=3), min_size=1, max_size=5))
def test_any_objects_are_read_from_lines(tmp_path_factory, rows):
    path = put(tmp_path_factory.mktemp("lines"), b"\n".join(json.dumps(r).encode() for r in rows))
    assert json.dumps(values(path)) == json.dumps(rows)


def test_rows_say_where_they_stand(tmp_path):
    assert list(read_rows(put(tmp_path, b'\n{"a": 1}\r\n\n \n{"b": 2}', "a.jsonl"))) == [
        FileRow(f"{tmp_path}/a.jsonl:2", {"a": 1}),
        FileRow(f"{tmp_path}/a.jsonl:5", {"b": 2}),
    ]
    where = [row.where for row in read_rows(put(tmp_path, b"[1, 2]", "a.json"))]
    assert where == [f"{tmp_path}/a.json: item 1", f"{tmp_path}/a.json: item 2"]


@pytest.mark.parametrize(
    "data", [b"", b"\n \n", BOM, b"[]", b" [ ] \n", gzip.compress(b"", mtime=0)]
)
def test_a_file_without_rows_has_none(tmp_path, data):
    assert list(read_rows(put(tmp_path, data))) == []


@pytest.mark.parametrize("row", [b"1", b'"a"', b"null", b"-0.5", b"[1]"])
def test_rows_that_are_no_objects_are_read(tmp_path, row):
    """What a row must be is for its reader to say."""
    assert values(put(tmp_path, b"{}\n" + row)) == [{}, json.loads(row)]
    if not row.startswith(b"["):
        assert values(put(tmp_path, row)) == [json.loads(row)]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"{", "not JSON (Expecting property name enclosed in double quotes, column 2); mend or"),
        (b'{"a": 1} {"b": 2}', "not JSON (Extra data, column 10); mend or delete the line"),
        (b"garbage", "not JSON (Expecting value, column 1); mend or delete the line"),
        (b"9" * 5000, "not usable JSON (Exceeds the limit"),
        (b"[" * 10**6, "not usable JSON (maximum recursion depth"),
        (b'{"a": "\xff"}', "not UTF-8 (byte 8 of the line); mend or delete the line"),
        (b'{"a": "x\0"}', "not JSON (Invalid control character at, column 9)"),
    ],
)
def test_a_bad_line_is_a_fault_and_the_next_is_read(tmp_path, line, fault):
    if b"\0" in line:
        line = line.replace(b"\0", b"\1")
    path = put(tmp_path, b'{"a": 1}\n' + line + b'\n{"b": 2}\n')
    first, bad, last = read_rows(path)
    assert (first.value, last.value) == ({"a": 1}, {"b": 2})
    assert (bad.where, bad.value) == (f"{path}:2", line.decode("utf-8", "replace"))
    assert bad.fault is not None and bad.fault.startswith(fault)


def test_the_first_line_may_be_the_bad_one(tmp_path):
    assert [bool(row.fault) for row in read_rows(put(tmp_path, b'{"a": \n{"b": 2}\n'))] == [
        True,
        False,
    ]
    assert [bool(row.fault) for row in read_rows(put(tmp_path, b'oops\n{"b": 2}\n'))] == [
        True,
        False,
    ]


def test_an_item_that_is_not_utf8_is_a_fault_and_the_next_is_read(tmp_path):
    path = put(tmp_path, b'["a", {"b": "\xff"}, "\xc3\xa9"]')
    first, bad, last = read_rows(path)
    assert (first.value, bad.value, last.value) == ("a", None, "é")
    assert (bad.where, bad.fault) == (
        f"{path}: item 2",
        "holds bytes that are not UTF-8; mend or delete the item",
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"a": 1}, {"a" 2}, {}]', r"item 2: Expecting ':' delimiter, near '.*\"a\" 2"),
        (b"[1 2]", r"item 1: no comma or \] after it, near '1 2\]'"),
        (b"[1, 2", r"item 2: no \] after it"),
        (b"[1, ", r"item 2: the file ends inside it"),
        (b'[1, {"a": "x', r"item 2: the file ends inside it"),
        (b"[1, tru]", r"item 2: Expecting value"),
        (b"[1] {}", r"more text after the array's \]: '1\] {}'"),
        (b"[" + b"9" * 5000 + b"]", r"item 1: Exceeds the limit"),
        (b"[" * 10**6, r"item 1: maximum recursion depth"),
    ],
)
def test_a_broken_array_is_refused_as_what_follows_is_lost(tmp_path, data, message):
    with pytest.raises(UserError, match=rf"rows.dat: broken JSON array: {message}.*mend the file"):
        list(read_rows(put(tmp_path, data)))


def peak(path: Path) -> int:
    """The most bytes of Python objects that reading a file held."""
    count = 0
    tracemalloc.start()
    try:
        for _ in read_rows(path):
            count += 1
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        assert count >= 80


def on_one_line(rows: list[Any]) -> bytes:
    return json.dumps(rows).encode()


@pytest.mark.parametrize(
    ("packing", "write"),
    [
        ("plain", lines),
        ("plain", pretty),
        ("plain", on_one_line),
        ("gz", lines),
        ("xz", lines),
        ("zst", on_one_line),
    ],
)
def test_memory_does_not_grow_with_the_file(tmp_path, packing, write):
    rows = [{"messages": turns("é" + hex(3 ** (20_000 + number)))} for number in range(800)]
    small = put(tmp_path, PACKINGS[packing](write(rows[:80])), "small")
    large = put(tmp_path, PACKINGS[packing](write(rows)), "large")
    sizes = peak(large), peak(small)
    assert sizes[0] < 1.2 * sizes[1] < 12e6


def test_an_item_longer_than_a_piece_is_tried_a_few_times_only(tmp_path, monkeypatch):
    tries = []
    real = json_array._DECODER.raw_decode

    class Counted:
        def raw_decode(self, *given):
            tries.append(1)
            return real(*given)

    monkeypatch.setattr(json_array, "_DECODER", Counted())
    monkeypatch.setattr(json_array, "_PIECE", 64)
    assert values(put(tmp_path, json.dumps([["x"] * 100_000]).encode())) == [["x"] * 100_000]
    assert len(tries) <= 15  # log2 of 500,000 / 64 is 13


# Damaged and foreign files


@pytest.mark.parametrize("packing", ["gz", "xz", "zst"])
@pytest.mark.parametrize("write", [lines, pretty])
def test_a_compressed_file_that_is_cut_off_is_refused(tmp_path, packing, write):
    data = PACKINGS[packing](write([{"n": n, "text": str(n**9)} for n in range(20_000)]))
    path = put(tmp_path, data[: len(data) * 3 // 4])
    with pytest.raises(UserError, match=r"rows.dat: damaged.* copy or download it again"):
        list(read_rows(path))


@pytest.mark.parametrize("packing", ["gz", "xz", "zst"])
def test_a_compressed_file_with_wrong_bytes_is_refused(tmp_path, packing):
    data = bytearray(PACKINGS[packing](lines(ROWS * 2000)))
    data[10:30] = b"\x55" * 20
    with pytest.raises(UserError, match=r"rows.dat: damaged"):
        list(read_rows(put(tmp_path, bytes(data))))


def a_zip(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), "text")  # of 1980: the same bytes at any time
    return file.getvalue()


def a_tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("rows.jsonl"), io.BytesIO())
    return file.getvalue()


SAFETENSORS = (70).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        (a_zip("rows.jsonl"), "a.zip", "a zip archive; unpack it"),
        (a_zip("[Content_Types].xml"), "a.xlsx", "an Office document; save its rows as parquet"),
        (a_zip("archive/data.pkl"), "a.pt", "a file of torch.save; save its rows"),
        (a_tar(), "a.tar", "a tar archive; unpack it"),
        (gzip.compress(a_tar(), mtime=0), "a.tgz", "a tar archive; unpack it"),
        (SAFETENSORS, "a.safetensors", "safetensors, which hold tensors; name a file of conv"),
        (POINTER, "a.jsonl", "a Git LFS pointer, not the file itself; run git lfs pull"),
        (b"\x00\x01\x02" * 99, "a.bin", "a binary file of an unknown kind; unpack it, or save"),
        (lines(ROWS).decode().encode("utf-16"), "a", "UTF-16 text; write it in UTF-8: iconv"),
        (lines(ROWS).decode().encode("utf-16-be"), "a", "UTF-16 text; write it in UTF-8: iconv"),
        (b"<!doctype html>\n<html></html>", "a.jsonl", "a web page or XML; download the file"),
        (b"id,text\n1,hello\n", "a.csv", "a table of text .CSV.; write it as JSONL: pandas"),
        (b'"id","text"\n1,"hello"\n', "a.csv", "a table of text .CSV.; write it as JSONL"),
        (b"# Title\n\nsome words\n", "a.md", "plain text, not rows of JSON; write one JSON obj"),
        (
            b'{\n  "a": 1\n}\n',
            "a.json",
            "its first line is the beginning of a JSON object .* jq -c",
        ),
    ],
)
def test_a_file_of_another_kind_gets_its_remedy(tmp_path, data, name, message):
    with pytest.raises(UserError, match=rf"/{name}: {message}"):
        list(read_rows(put(tmp_path, data, name)))


@pytest.mark.parametrize("package", ["pyarrow", "zstandard"])
def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch, package):
    data = {"pyarrow": b"PAR1\0\0\0\0", "zstandard": b"\x28\xb5\x2f\xfd\0\0\0\0"}[package]
    monkeypatch.setitem(sys.modules, package, None)
    command = f"pip install {package}"
    with pytest.raises(UserError, match=rf"read by the package {package}, .*{command}$"):
        list(read_rows(put(tmp_path, data)))


def test_a_path_without_a_file_is_refused_at_once(tmp_path):
    for read in (read_rows, rows_digest):
        with pytest.raises(UserError, match=r"none.jsonl: no such file; name a file of rows"):
            read(tmp_path / "none.jsonl")


# Tables


CALL = {"function": {"name": "f", "arguments": {"city": "Oslo"}}}
OTHER = {"function": {"name": "g", "arguments": {"n": 3}}}
CALLS: list[Any] = [
    {"id": 1, "messages": [*turns("a"), {"role": "assistant", "tool_calls": [CALL, OTHER]}]},
    {"id": 2, "messages": turns("b", "c"), "weight": 0.5, "tools": ["{}"]},
    {"id": 3, "messages": []},
]


def test_structs_have_the_keys_that_were_written(tmp_path):
    assert values(table(tmp_path, CALLS)) == CALLS
    assert values(saved(tmp_path / "set", [CALLS[:1], CALLS[1:]])) == CALLS


NAMES = st.sampled_from(["content", "name", "weight"])
CELL = {"content": st.text(), "name": st.text(max_size=3), "weight": st.integers(0, 9)}
TURN = st.fixed_dictionaries({"role": st.sampled_from("ab")}, optional=CELL)
TABLE = st.lists(
    st.fixed_dictionaries(
        {"n": st.integers(-9, 9)}, optional={"turns": st.lists(TURN), "x": st.floats(0, 1)}
    ),
    min_size=1,
    max_size=6,
)


@given(rows=TABLE)
def test_any_table_is_read_as_written(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("table")
    assert values(table(folder, rows, row_group_size=2)) == rows
    assert values(saved(folder / "set", [rows, rows[:1]])) == rows + rows[:1]


def test_cells_become_what_json_would_hold(tmp_path):
    pa = pytest.importorskip("pyarrow")
    when = datetime(2026, 1, 2, 3, 4, 5)
    cells = {
        "when": pa.array([when]),
        "day": pa.array([when.date()]),
        "bytes": pa.array([b"text"]),
        "category": pa.array(["a"]).dictionary_encode(),
        "map": pa.array([[("k", None)]], pa.map_(pa.string(), pa.int64())),
        "inner": pa.array([[{"at": when, "none": None}, None]]),
        "text": pa.array(['{"a": 1}']),
        "json": pa.array(['{"a": null}']).cast(pa.json_()),
    }
    row = {
        "when": "2026-01-02T03:04:05",
        "day": "2026-01-02",
        "bytes": "text",
        "category": "a",
        "map": {"k": None},
        "inner": [{"at": "2026-01-02T03:04:05"}, None],
        "text": '{"a": 1}',
        "json": {"a": None},
    }
    (found,) = values(table(tmp_path, pa.table(cells)))
    assert found == row
    json.dumps(found)


def test_cells_without_a_text_are_faults_of_their_rows(tmp_path):
    pa = pytest.importorskip("pyarrow")
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    cells = {"image": pa.array([b"\xff\xd8", None]), "text": broken}
    path = table(tmp_path, pa.table(cells), "a.parquet")
    first, second = read_rows(path)
    assert first.where == f"{path}: row 1" and second.where == f"{path}: row 2"
    assert first.fault == "column image: 2 bytes that are no text; convert or remove the column"
    assert second.fault is not None and second.fault.startswith("column text: 'utf-8' codec")


def test_memory_of_a_table_does_not_grow_with_it(tmp_path):
    """Of Arrow's own memory, with one row group."""
    pa = pytest.importorskip("pyarrow")
    rows = [{"n": number, "text": f"{number} " * 1500} for number in range(6000)]
    held = []
    for count in (2000, 6000):
        path = table(tmp_path, rows[:count], compression="none", use_dictionary=False)
        before = pa.total_allocated_bytes()
        held.append(max(pa.total_allocated_bytes() - before for _ in read_rows(path)))
    assert path.stat().st_size > 40e6
    assert held[1] < 1.2 * held[0] < 20e6


def test_a_damaged_table_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    path = put(tmp_path, b"PAR1\x15\x04\x15\x10\x15\x14\x4c\x15\xff\xfePAR1", "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: damaged parquet file .*download or write"):
        list(read_rows(path))
    whole = table(tmp_path, CALLS, "b.parquet").read_bytes()
    path = put(tmp_path, whole[:-20], "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet: damaged parquet file"):
        list(read_rows(path))
    with pytest.raises(UserError, match=r"c.gz: a compressed parquet file; unpack it"):
        list(read_rows(put(tmp_path, gzip.compress(whole), "c.gz")))


@pytest.mark.parametrize("left", ["between batches", "inside one", "nothing"])
def test_an_arrow_stream_that_is_cut_off_is_refused(tmp_path, left):
    pa = pytest.importorskip("pyarrow")
    path = tmp_path / "a.arrow"
    batch = columns(CALLS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, batch.schema) as to:
        to.write_table(batch)
        to.write_table(batch)
        size = file.tell()
    assert values(path) == CALLS + CALLS
    cut = {"between batches": size, "inside one": size - 50, "nothing": 8}[left]
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"a.arrow: damaged Arrow file"):
        list(read_rows(path))


def test_an_arrow_file_is_read(tmp_path):
    pa = pytest.importorskip("pyarrow")
    batch = columns(CALLS)
    with pa.ipc.new_file(str(tmp_path / "a.feather"), batch.schema) as to:
        to.write_table(batch)
    assert values(tmp_path / "a.feather") == CALLS


# Folders


@pytest.mark.filterwarnings("ignore")  # those of the packages that datasets itself uses
def test_a_data_set_saved_by_datasets_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    mixed = [*turns("a"), {"role": "user", "content": [{"type": "text", "text": "b"}]}]
    one = datasets.Dataset(columns(CALLS))
    one.select([2, 0]).save_to_disk(tmp_path / "chosen")
    assert values(tmp_path / "chosen") == [CALLS[2], CALLS[0]]
    one.save_to_disk(tmp_path / "one", num_shards=3)
    assert values(tmp_path / "one") == CALLS

    # Content that is text here and a list there has the JSON type.
    json_type = datasets.Features(
        {"messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Json()})}
    )
    both = datasets.Dataset.from_list([{"messages": mixed}], features=json_type)
    both.save_to_disk(tmp_path / "both")
    both.to_parquet(tmp_path / "both.parquet")
    assert values(tmp_path / "both") == values(tmp_path / "both.parquet") == [{"messages": mixed}]

    datasets.DatasetDict(train=one).save_to_disk(tmp_path / "dict")
    assert values(tmp_path / "dict") == CALLS
    datasets.DatasetDict(train=one, test=one).save_to_disk(tmp_path / "dict")
    with pytest.raises(UserError, match=r"2 splits \(train, test\); name one: .*/dict/train$"):
        read_rows(tmp_path / "dict")
    assert values(tmp_path / "dict" / "test") == CALLS


def test_a_saved_data_set_that_lacks_a_file_is_refused(tmp_path):
    folder = saved(tmp_path / "set", [CALLS, CALLS])
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002.arrow: no such file, but state.json"):
        read_rows(folder)


def test_the_cache_of_datasets_is_refused(tmp_path):
    put(tmp_path, b"", "json-train.arrow")
    put(tmp_path, b"{}", "dataset_info.json")
    with pytest.raises(UserError, match=r"the cache of datasets.*save_to_disk"):
        read_rows(tmp_path)


def test_a_folder_of_files_is_read_in_their_order(tmp_path):
    put(tmp_path, b'{"n": 2}\n', "set/data/b.jsonl")
    put(tmp_path, gzip.compress(b'{"n": 1}\n'), "set/data/a.jsonl.gz")
    put(tmp_path, b"text", "set/README.md")
    put(tmp_path, b'{"n": 0}', "set/config.json")
    put(tmp_path, b'{"n": 3}', "set/.cache/c.jsonl")
    assert values(tmp_path / "set") == [{"n": 1}, {"n": 2}]
    assert [row.where for row in read_rows(tmp_path / "set")] == [
        f"{tmp_path}/set/data/a.jsonl.gz:1",
        f"{tmp_path}/set/data/b.jsonl:1",
    ]


def test_a_pattern_names_files(tmp_path):
    for name in ("train-1", "train-0", "test-0"):
        put(tmp_path, json.dumps({"in": name}).encode(), f"{name}.jsonl")
    pattern = tmp_path / "train-*.jsonl"
    assert values(pattern) == [{"in": "train-0"}, {"in": "train-1"}]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["README.md"], r"no file of rows in it \(.jsonl"),
        (["a.jsonl", "b.parquet"], r"several kinds \(1 .jsonl, 1 .parquet\).*/set/\*.jsonl'"),
        (
            ["x/a.jsonl", "y/a.jsonl"],
            r"files of rows in 2 folders \(.*/set/x, .*/set/y\).*name one",
        ),
        (
            ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-0.jsonl"],
            r"several splits \(train-00000-of-00002.jsonl, test-0.jsonl\).*/set/train-\*.jsonl'",
        ),
    ],
)
def test_a_folder_that_does_not_say_which_rows_are_meant_is_refused(tmp_path, names, message):
    for name in names:
        put(tmp_path / "set", b"{}", name)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / "set")


def test_the_digest_of_a_folder_is_of_names_bytes_and_order(tmp_path):
    def digest(files: dict[str, bytes]) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, data in files.items():
            put(folder, data, name)
        return rows_digest(folder)

    first = digest({"a.jsonl": b"{}", "b.jsonl": b"[]"})
    assert first == digest({"b.jsonl": b"[]", "a.jsonl": b"{}", "README.md": b"text"})
    others = [
        {"a.jsonl": b"{}[]"},
        {"a.jsonl": b"[]", "b.jsonl": b"{}"},
        {"a.jsonl": b"{}", "c.jsonl": b"[]"},
    ]
    assert len({first, *map(digest, others)}) == 4


def test_what_is_no_regular_file_is_refused(tmp_path):
    put(tmp_path, b"{}\n")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"b.jsonl: no file that can be read"):
        list(read_rows(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"pipe: no regular file"):
        list(read_rows(tmp_path / "pipe"))


def test_a_file_beside_its_packed_copy_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{}\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"{}\n"))
    with pytest.raises(UserError, match=r"a.jsonl, a.jsonl.gz may hold the same rows twice"):
        list(read_rows(tmp_path))
