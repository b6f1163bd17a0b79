"""Places of outputs: checked before work, links and devices kept, kills cleared away."""

import errno
import os
import socket
import stat
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from eagle3fn.base import files, places
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import (
    append_line,
    locked,
    publish_folder,
    whole_file,
    whole_folder,
    write_text,
)
from eagle3fn.base.places import check_out_file, check_out_folder, other_than
from eagle3fn.base.temporary import side_folder

NO_FILES = ("folder", "pipe", "socket", "device", "link", "link to a folder", "link to a device")
NO_FOLDERS = ("file", "pipe", "socket", "device", "link", "link to a pipe", "link to a device")


def put(folder: Path, kind: str) -> Path:
    """Something of this kind at `folder/out`."""
    path = folder / "out"
    names = {"link": "letter", "link to a folder": "letters", "link to a pipe": "p"}
    (folder / "letter").write_text("dear")
    (folder / "letters").mkdir()
    os.mkfifo(folder / "p")

    if kind.startswith("link"):
        path.symlink_to(names.get(kind, "/dev/null"))
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif kind == "device":
        try:
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        except PermissionError:
            return Path("/dev/null")
    else:
        made = {"folder": "letters", "file": "letter", "pipe": "p"}
        (folder / made[kind]).rename(path)
    return path


def state(folder: Path) -> dict[str, int]:
    """What lies in a folder: names, kinds and inodes."""
    return {path.name: path.lstat().st_mode ^ path.lstat().st_ino for path in folder.iterdir()}


@pytest.mark.parametrize("kind", NO_FILES)
def test_a_file_replaces_only_files(tmp_path, kind):
    path = put(tmp_path, kind)
    before = state(tmp_path)
    with pytest.raises(UserError, match=r"out|null.*: is a .*; name a file"):
        check_out_file(path)
    with pytest.raises(UserError, match=r"is a .*; name a file"):
        write_text(path, "x")
    assert state(tmp_path) == before


@pytest.mark.parametrize("kind", NO_FOLDERS)
def test_a_folder_replaces_only_folders(tmp_path, kind):
    path = put(tmp_path, kind)
    before = state(tmp_path)
    with pytest.raises(UserError, match=r"is a .*; name a folder"):
        check_out_folder(path)
    with pytest.raises(UserError, match=r"is a .*; name a folder"), whole_folder(path):
        pass
    assert state(tmp_path) == before


def test_what_took_the_place_meanwhile_is_kept(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(UserError, match="is a pipe"), whole_file(path) as temporary:
        temporary.write_text("x")
        os.mkfifo(path)
    assert path.is_fifo()
    path.unlink()
    with pytest.raises(UserError, match="is a file; name a folder"), whole_folder(path):
        path.write_text("mine")
    assert path.read_text() == "mine"
    assert state(tmp_path).keys() == {"out"}


@pytest.mark.parametrize("check", [check_out_file, check_out_folder])
def test_places_without_a_folder_to_write_in_are_refused(tmp_path, check, monkeypatch):
    check(tmp_path / "new/deep/out")
    (tmp_path / "letter").touch()
    with pytest.raises(UserError, match=r"letter is no folder; name another place"):
        check(tmp_path / "letter/deep/out")
    with pytest.raises(UserError, match=r"longer than 235 bytes"):
        check(tmp_path / ("é" * 118))
    monkeypatch.setattr(places.os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"is not writable; make it so"):
        check(tmp_path / "new/out")


def put_all(folder: Path) -> None:
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_text("ours")


def test_a_folder_is_replaced_only_if_it_is_an_older_output(tmp_path):
    path = tmp_path / "out"
    put_all(path)
    refused = r"out: holds a, and only what eagle3fn wrote is replaced; name a new folder"
    with pytest.raises(UserError, match=refused), whole_folder(path):
        pass
    with pytest.raises(UserError, match=refused), whole_folder(path, lambda folder: "a"):
        pass
    with whole_folder(path, lambda folder: other_than(folder, ("a", "b"))) as temporary:
        (temporary / "a").write_text("new")
    assert state(path).keys() == {"a"}

    # What came into it meanwhile is not lost.
    foreign = partial(other_than, names=("a", "b"))
    with pytest.raises(UserError, match="holds thesis, and"), whole_folder(path, foreign):
        (path / "thesis").write_text("years")
    assert state(path).keys() == {"a", "thesis"}


@pytest.mark.parametrize("kind", ["link", "link to a folder", "folder", "pipe"])
def test_files_of_an_output_are_regular(tmp_path, kind):
    path = put(tmp_path, kind)
    (tmp_path / "draft").mkdir()
    assert other_than(tmp_path / "draft", ()) is None
    path.rename(tmp_path / "draft/config.json")
    assert other_than(tmp_path / "draft", ("config.json",)) == "config.json"


# Appending and locks: files of a run, whose links are not followed


@pytest.mark.parametrize("kind", [kind for kind in NO_FILES if kind != "device"])
def test_a_line_is_appended_to_files_alone(tmp_path, kind):
    path = put(tmp_path, kind)
    before = state(tmp_path)
    with pytest.raises(UserError, match=r"out: is a .*, not a file; remove it"):
        append_line(path, "x")
    assert state(tmp_path) == before
    assert kind != "link" or (tmp_path / "letter").read_text() == "dear"


def test_lines_are_appended(tmp_path):
    append_line(tmp_path / "a", "é")
    append_line(tmp_path / "a", "b")
    assert (tmp_path / "a").read_bytes() == "é\nb\n".encode()


def test_a_line_without_room_leaves_no_part(tmp_path, monkeypatch):
    path = tmp_path / "a"
    append_line(path, "whole")
    write = os.write

    def full(handle: int, data: bytes) -> int:
        if len(data) < 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data[:5])

    monkeypatch.setattr(files.os, "write", full)
    with pytest.raises(UserError, match=r"a: not written \(No space left .*\); make room"):
        append_line(path, "12345678")
    assert path.read_text() == "whole\n"


def test_a_folder_is_held_by_one(tmp_path):
    at_work = pytest.raises(UserError, match="another process is at work there")
    with locked(tmp_path / "run"), at_work, locked(tmp_path / "run"):
        pass
    with locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("kind", ["link", "link to a folder", "link to a device", "folder", "pipe"])
def test_a_lock_that_is_no_file_is_refused_and_not_followed(tmp_path, kind):
    put(tmp_path, kind).rename(tmp_path / ".lock")
    with (
        pytest.raises(UserError, match=r"\.lock: is a .*, not a file; remove it"),
        locked(tmp_path),
    ):
        pass
    assert kind != "link" or (tmp_path / "letter").read_text() == "dear"


# After a kill


def unfinished(path: Path) -> Path:
    """A temporary folder of `path`, as a killed call leaves it."""
    folder = path.parent / f".{path.name}.abcdefg1.tmp"
    folder.mkdir()
    (folder / path.name).write_text("half")
    return folder


@pytest.mark.parametrize("write", [whole_file, whole_folder])
def test_what_a_kill_left_is_removed_by_the_next_write_of_that_name(tmp_path, write):
    path = tmp_path / "shard-1"
    left = unfinished(path)
    others = unfinished(tmp_path / "shard-1.json")
    mine = tmp_path / ".shard-1.notes.tmp"
    mine.mkdir()
    with write(path):
        pass
    assert not left.exists()
    assert others.exists() and mine.exists()


def test_what_kills_left_in_a_folder_is_removed_when_it_is_held(tmp_path):
    """A kill after the rename leaves a side folder of a name that is not written again."""
    left = [unfinished(tmp_path / name) for name in ("shard-1", "shard-1.json", "index.json")]
    notes = tmp_path / ".shard-1.notes.tmp"
    notes.mkdir()
    with whole_file(tmp_path / "report.json") as living, locked(tmp_path):
        assert not any(path.exists() for path in left)
        assert living.exists() and notes.exists()


def test_folders_of_somebody_else_are_kept_though_their_names_look_ours(tmp_path):
    """Only what lies under its place's own name was made by a killed call."""
    for ending in ("tmp", "old"):
        folder = tmp_path / f".cache.download.{ending}"
        folder.mkdir()
        (folder / "mine").write_text("years")
        (folder / "cache").write_text("half")
    with locked(tmp_path):
        pass
    with whole_folder(tmp_path / "cache") as folder:
        (folder / "new").touch()
    for ending in ("tmp", "old"):
        assert state(tmp_path / f".cache.download.{ending}").keys() == {"mine", "cache"}


@pytest.mark.parametrize("write", [whole_file, whole_folder])
def test_what_is_being_written_is_not_removed_by_another(tmp_path, write):
    path = tmp_path / "a"
    with write(path) as first:
        with write(path) as second:
            assert first.exists() and second.exists() and first != second
        assert first.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_killed_processs_folder_is_removed_and_a_living_ones_is_kept(tmp_path):
    """By its lock, whatever number its process has."""
    path = tmp_path / "a"
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        with whole_file(path):
            os.write(done, b"x")
            os.kill(os.getpid(), 19)  # stopped, then killed by the parent
        os._exit(0)
    try:
        os.read(ready, 1)
        write_text(path, "x")
        assert len(list(tmp_path.glob(".a.*.tmp"))) == 1
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    write_text(path, "x")
    assert list(tmp_path.glob(".a.*")) == []


def test_a_folder_that_a_kill_moved_away_is_put_back(tmp_path):
    path = tmp_path / "draft"
    moved = tmp_path / ".draft.abcdefgh.old"
    (moved / "draft").mkdir(parents=True)
    (moved / "draft/weights").write_text("trained")
    check_out_folder(path)
    assert (path / "weights").read_text() == "trained"
    assert not moved.exists()


def test_a_folder_that_was_replaced_is_removed_after_a_kill(tmp_path):
    path = tmp_path / "draft"
    path.mkdir()
    (tmp_path / ".draft.abcdefgh.old/draft").mkdir(parents=True)
    check_out_folder(path)
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_old_folder_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    path = tmp_path / "draft"
    path.mkdir()
    (path / "weights").write_text("trained")
    replace = os.replace

    def fails(source: Path, target: Path) -> None:
        if str(source).endswith("new"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(source))
        replace(source, target)

    (tmp_path / "new").mkdir()
    monkeypatch.setattr(files.os, "replace", fails)
    with pytest.raises(OSError):
        publish_folder(tmp_path / "new", path)
    assert (path / "weights").read_text() == "trained"
    assert state(tmp_path).keys() == {"draft", "new"}


# Faults of the disk


def test_faults_of_the_disk_name_the_file_and_the_remedy(tmp_path):
    with pytest.raises(UserError) as caught, whole_file(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(caught.value) == (
        f"{tmp_path}/a: not written (No space left on device); make room, then call again"
    )


def write_by_hand(path: Path) -> None:
    with open("/dev/full", "w") as file:
        file.write("x")


WRITERS = {
    "torch": lambda path: torch.save({"a": torch.ones(10)}, "/dev/full"),
    "safetensors": lambda path: save_file({"a": torch.ones(10)}, path / "missing"),
    "by hand": write_by_hand,
}


def test_the_remedy_is_that_of_the_fault_whoever_writes(tmp_path):
    for said, remedy in (("full (os error 28)", "make room"), ("large (os error 27)", "ulimit -f")):
        message = rf"a: not written \(.*\); .*{remedy}"
        with pytest.raises(UserError, match=message), whole_file(tmp_path / "a"):
            raise SafetensorError(f"Error while serializing: I/O error: {said}")
    with pytest.raises(SafetensorError), whole_file(tmp_path / "a"):
        raise SafetensorError("Error while deserializing header: of another file")


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_named_whoever_writes(tmp_path, write):
    with pytest.raises(UserError, match=r"a: not written \("), whole_file(tmp_path / "a") as path:
        write(path)
    assert list(tmp_path.iterdir()) == []


def test_faults_of_other_files_and_of_no_disk_are_not_hidden(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "a"):
        (tmp_path / "features").read_text()
    with pytest.raises(ConnectionResetError), whole_folder(tmp_path / "a"):
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")


def test_a_folder_that_is_shared_by_a_group_stays_so(tmp_path):
    tmp_path.chmod(0o2775)
    with whole_folder(tmp_path / "a"):
        pass
    assert (tmp_path / "a").stat().st_mode & stat.S_ISGID


def test_temporary_names_end_with_their_block(tmp_path):
    with side_folder(tmp_path / "a", ".tmp") as folder:
        assert folder.name.startswith(".a.") and folder.name.endswith(".tmp")
    assert list(tmp_path.iterdir()) == []
