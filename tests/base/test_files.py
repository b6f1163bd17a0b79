"""Files appear whole or not at all, and readers name the line they cannot read."""

import json
import os
import stat

import pytest

from eagle3fn.base.files import (
    json_sha256,
    whole_file,
    whole_folder,
    write_json,
    write_jsonl,
    write_text,
)
from eagle3fn.base.read import read_json, read_jsonl

ROWS = [{"a": 1, "text": "é\n"}, [2], None]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def any_folder(folder):
    return None


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
    with pytest.raises(KeyboardInterrupt), whole_folder(path, any_folder) as temporary:
        (temporary / "new").touch()
        raise KeyboardInterrupt
    assert names(tmp_path) == (["f"] if before else [])
    assert not before or names(path) == ["old"]


@pytest.fixture(params=[0o022, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_whole_folder_replaces_a_folder_and_keeps_the_umask(tmp_path, umask):
    path = tmp_path / "deep" / "f"
    path.mkdir(parents=True)
    (path / "old").touch()
    with whole_folder(path, any_folder) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "new").touch(mode=0o600)
    assert names(path.parent) == ["f"]
    assert names(path) == ["inner"]
    assert mode(path) == mode(path / "inner") == 0o777 & ~umask
    assert mode(path / "inner" / "new") == 0o666 & ~umask


def test_whole_file_has_the_mode_of_a_plain_one(tmp_path, umask):
    write_text(tmp_path / "a", "é")
    assert mode(tmp_path / "a") == 0o666 & ~umask
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


def test_digest_of_json_does_not_depend_on_the_order_of_keys():
    assert json_sha256({"a": 1, "b": [2]}) == json_sha256(json.loads('{"b": [2], "a": 1}'))
    assert json_sha256({"a": 1}) != json_sha256({"a": 2})
    assert json_sha256({"a": int}, default=str) == json_sha256({"a": str(int)})


def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").touch()
    (tmp_path / "link").symlink_to("real")
    with whole_folder(tmp_path / "link", any_folder) as temporary:
        (temporary / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["link", "real"]
    assert names(tmp_path / "real") == ["new"]
