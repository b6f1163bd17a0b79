"""A folder that is written over time: held by one process, left as it was without work in it."""

import os
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import locked, locked_too
from eagle3fn.data.held import held


def at_work(folder: Path, mark: Path) -> int:
    """Hold a folder again and again; how often another process was in it at the same time."""
    found = 0
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        try:
            with held(folder):
                try:
                    os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    found += 1
                    continue
                mark.unlink()
        except UserError as error:
            assert "another process is at work there" in str(error)
    return found


def test_of_processes_that_hold_and_remove_a_folder_one_is_in_it_at_a_time(tmp_path):
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            code = 99
            try:
                code = min(at_work(tmp_path / "f", tmp_path / "mark"), 98)
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0, 0, 0]


def test_a_shared_folder_is_held_until_the_last_one_leaves_it(tmp_path):
    with ExitStack() as last:
        with locked(tmp_path / "f", shared=True):
            last.enter_context(locked_too(tmp_path / "f"))
        with (
            pytest.raises(UserError, match="another process is at work there"),
            held(tmp_path / "f"),
        ):
            pass
    alone = held(tmp_path / "f")  # who holds it alone shares it with nobody
    with alone, pytest.raises(UserError, match="at work there"), locked_too(tmp_path / "f"):
        pass
    with pytest.raises(UserError, match="not seen here; name one that all machines share"):
        locked_too(tmp_path / "none").__enter__()


def test_a_folder_made_here_without_work_is_removed(tmp_path):
    with held(tmp_path / "f"):
        assert (tmp_path / "f/.lock").exists()
    assert not (tmp_path / "f").exists()
    with held(tmp_path / "f"):
        (tmp_path / "f/work").touch()
    assert {path.name for path in (tmp_path / "f").iterdir()} == {"work", ".lock"}


def test_a_folder_that_was_there_stays_as_it_was(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    folder.chmod(0o2770)
    before = folder.stat()
    with held(folder):
        pass
    assert (folder.stat().st_ino, folder.stat().st_mode) == (before.st_ino, before.st_mode)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_folder_is_followed(tmp_path, there):
    if there:
        (tmp_path / "f").mkdir()
    (tmp_path / "link").symlink_to("f")
    with held(tmp_path / "link"):
        assert (tmp_path / "f/.lock").exists()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "f").exists() == there


def test_the_folder_that_a_process_is_in_can_be_held(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with held("."):
        pass
    assert tmp_path.is_dir()
