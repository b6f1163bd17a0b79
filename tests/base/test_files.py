"""Files appear whole or not at all, and readers name the line they cannot read."""

import gzip
import json
import os
import stat

import pytest

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import (
    json_sha256,
    read_json,
    read_jsonl,
    whole_file,
    whole_folder,
    write_json,
    write_jsonl,
    write_text,
)

ROWS = [{"a": 1, "text": "é\n"}, [2], None]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("before", [None, "old"])
def test_interrupted_file_leaves_what_was_there(tmp_path, before):
    path = tmp_path / "a.txt"
    if before is not None:
        path.write_text(before)
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ([] if before is None else ["a.txt"])
    assert before is None or path.read_text() == before


@pytest.mark.parametrize("before", [False, True])
def test_interrupted_folder_leaves_what_was_there(tmp_path, before):
    path = tmp_path / "f"
    if before:
        path.mkdir()
        (path / "old").touch()
    with pytest.raises(KeyboardInterrupt), whole_folder(path) as temporary:
        (temporary / "new").touch()
        raise KeyboardInterrupt
    assert names(tmp_path) == (["f"] if before else [])
    assert not before or names(path) == ["old"]


def test_whole_folder_replaces_a_folder_and_sets_modes(tmp_path):
    path = tmp_path / "deep" / "f"
    path.mkdir(parents=True)
    (path / "old").touch()
    with whole_folder(path) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "new").touch(mode=0o600)
    assert names(path.parent) == ["f"]
    assert names(path) == ["inner"]
    assert mode(path) == mode(path / "inner") == 0o755
    assert mode(path / "inner" / "new") == 0o644


def test_whole_file_has_the_mode_of_a_plain_one(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "é")
    finally:
        os.umask(before)
    assert mode(tmp_path / "a") == 0o640
    assert (tmp_path / "a").read_bytes() == "é".encode()


@pytest.mark.parametrize("write", [write_json, write_jsonl])
def test_value_without_json_leaves_no_file(tmp_path, write):
    with pytest.raises(TypeError):
        write(tmp_path / "a.json", [1, object()])
    assert names(tmp_path) == []


def test_json_is_read_as_written(tmp_path):
    write_json(tmp_path / "new" / "a.json", ROWS)
    assert read_json(tmp_path / "new" / "a.json") == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz"])
def test_jsonl_is_read_as_written(tmp_path, name):
    write_jsonl(tmp_path / name, ROWS)
    assert read_jsonl(tmp_path / name) == ROWS
    assert names(tmp_path) == [name]


def test_empty_lines_are_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n1\n\n \n2\n")
    assert read_jsonl(tmp_path / "a.jsonl") == [1, 2]


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"1\n{\n", r"a.jsonl:2: not JSON .*mend or delete the line"),
        (b"1\n" + b"9" * 5000 + b"\n", r"a.jsonl:2: not usable JSON .*mend or delete the line"),
        (b"\xff\n", r"a.jsonl: damaged or not text .*write it anew"),
    ],
)
def test_damaged_jsonl_is_refused_with_its_line(tmp_path, data, named):
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=named):
        read_jsonl(tmp_path / "a.jsonl")


@pytest.mark.parametrize("data", [b"junk", gzip.compress(b"1\n" * 99)[:-9]])
def test_damaged_compressed_jsonl_is_refused(tmp_path, data):
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    with pytest.raises(UserError, match=r"a.jsonl.gz: damaged or not text"):
        read_jsonl(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("read", [read_json, read_jsonl])
def test_missing_file_is_refused(tmp_path, read):
    with pytest.raises(UserError, match=r"none.json: no such file"):
        read(tmp_path / "none.json")


def test_digest_of_json_does_not_depend_on_the_order_of_keys():
    assert json_sha256({"a": 1, "b": [2]}) == json_sha256(json.loads('{"b": [2], "a": 1}'))
    assert json_sha256({"a": 1}) != json_sha256({"a": 2})
    assert json_sha256({"a": int}, default=str) == json_sha256({"a": str(int)})


def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").touch()
    (tmp_path / "link").symlink_to("real")
    with whole_folder(tmp_path / "link") as temporary:
        (temporary / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["link", "real"]
    assert names(tmp_path / "real") == ["new"]


def test_json_nested_too_deeply_is_named(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"deep\.json: not readable as JSON"):
        read_json(path)
