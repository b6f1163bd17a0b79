"""Readers of JSON name the file and the line that they cannot read, on one line."""

import gzip
import os

import pytest

from eagle3fn.base.errors import UserError, printable
from eagle3fn.base.files import sha256
from eagle3fn.base.read import (
    DEEPEST,
    check_regular,
    open_regular,
    parse_json,
    read_json,
    read_jsonl,
    read_object,
    read_rows,
    read_text,
)
from eagle3fn.data.vocab import load_map
from eagle3fn.data.weights import weight_files

DAMAGED = {
    "cut": (b'{"a": 1', "Expecting"),
    "deep": (b"[" * 1000 + b"]" * 1000, "nested more than 64 deep"),
    "deeper": (b'{"a":' * 100_000, "nested more than 64 deep"),
    "one too deep": (b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1), "nested more than 64 deep"),
    "long": (b"9" * 5000, "a whole number of 5000 digits"),
    "beyond a float": (b"9" * 310, "a whole number of 310 digits"),
    "infinite": (b"[1e999]", "1e999: too large for a number"),
    "NaN": (b'{"a": NaN}', "NaN is no number of JSON"),
    "Infinity": (b"-Infinity", "-Infinity is no number of JSON"),
    "bytes": (b'"a\xff"', "not UTF-8, byte 3"),
    "half a pair": (rb'{"a\ud800": 1}', "half of a surrogate pair"),
    "twice": (b'{"a": 1, "b": 2, "a": 2}', "the key 'a' is there twice"),
    "letters": (b"ja", "Expecting value, column 1"),
    "nothing": (b"", "Expecting value, column 1"),
}


@pytest.mark.parametrize(("data", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_json_is_named_in_one_line(tmp_path, data, reason):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_json(path)
    assert str(caught.value) == (
        f"{path}: not readable as JSON ({str(caught.value).split(' (', 1)[1]}"
    )
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(data, reason) for data, reason in DAMAGED.values() if data],
    ids=[name for name, (data, _) in DAMAGED.items() if data],
)
def test_damaged_line_is_named_and_the_good_ones_are_kept(tmp_path, data, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1\n\n" + data + b'\n{"a": 2}\n')
    rows = read_rows(path)
    assert rows.good == [1, {"a": 2}]
    assert [number for number, _ in rows.bad] == [3]
    assert reason in rows.bad[0][1]
    with pytest.raises(UserError, match=r"a\.jsonl:3: not JSON \(.*\); mend or delete the line"):
        read_jsonl(path)


def test_rows_that_a_check_refuses_are_bad(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n3\n{"step": 2}')
    found = read_rows(path, lambda row: None if isinstance(row, dict) else "no object")
    assert found == ([{"step": 1}, {"step": 2}], [(2, "no object")])


def test_values_at_the_limits_are_read():
    assert parse_json("[" * DEEPEST + "]" * DEEPEST)
    assert float(parse_json("9" * 300)) == 1e300
    assert parse_json('{"a": 1, "a": 1}') == {"a": 1}
    assert parse_json(r'"\ud83d\ude00"') == "\U0001f600"
    assert parse_json("[NaN, -Infinity, 1e999]", nan=True)[1:] == [float("-inf"), float("inf")]


@pytest.mark.parametrize("data", [b"junk", gzip.compress(b"1\n" * 99, mtime=0)[:-9]])
def test_damaged_compressed_jsonl_is_refused(tmp_path, data):
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    with pytest.raises(UserError, match=r"a.jsonl.gz: damaged after line \d+ \("):
        read_jsonl(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("reader", [read_json, read_jsonl, read_text, sha256])
@pytest.mark.parametrize("kind", ["none", "folder", "pipe", "device", "link to a pipe"])
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path, reader, kind):
    path = tmp_path / "a.json"
    if kind == "folder":
        path.mkdir()
    elif "pipe" in kind:
        os.mkfifo(tmp_path / "p")
        path = tmp_path / "p"
        if kind.startswith("link"):
            path = tmp_path / "a.json"
            path.symlink_to("p")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"no such file|is a (folder|pipe|device); name a regular"):
        reader(path)


def test_large_files_are_refused(tmp_path):
    (tmp_path / "a.json").write_text('"' + "a" * 98 + '"')
    assert read_json(tmp_path / "a.json", limit=100)
    with pytest.raises(UserError, match="larger than 99 bytes"):
        read_json(tmp_path / "a.json", limit=99)


def test_object_is_asked_for(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(UserError, match=r"a.json: holds a list, it must be a JSON object"):
        read_object(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("row 3 é", "row 3 é"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31mred\x7f\x9b", r"\x1b[31mred\x7f\x9b"),
        ("\u202eevil\u2028\ud800", r"\u202eevil\u2028\ud800"),
        ("x" * 101, "x" * 100 + "…"),
        (3, "3"),
    ],
)
def test_texts_of_files_are_shown_on_one_line_without_codes(text, shown):
    assert printable(text) == shown


def test_row_without_an_end_is_refused_before_all_of_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("eagle3fn.base.read.LIMIT", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + bytes(1000))
    with pytest.raises(UserError, match=r"a.jsonl:2: longer than 100 bytes"):
        read_rows(path)


READERS = {
    "a map": lambda path: load_map(path, 5, 3),
    "a target's weights": lambda path: weight_files(path.parent),
    "a file": check_regular,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("kind", ["pipe", "link to a device", "link to nothing"])
def test_what_is_no_file_is_refused_before_a_library_opens_it(tmp_path, read, kind):
    path = tmp_path / "model.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if "device" in kind else "nowhere")
    with pytest.raises(UserError, match=r"model\.safetensors: (is a|no such file)"):
        read(path)


@pytest.mark.parametrize("name", ["a\0b", "n" * 5000])
def test_impossible_name_is_one_line(name):
    with pytest.raises(UserError, match="not readable"):
        open_regular(name)
