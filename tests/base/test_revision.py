"""The revision that results name."""

import os
import subprocess
from pathlib import Path

from eagle3fn.base.provenance import git_revision


def git(folder: Path, *words: str) -> str:
    own = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder)]
    return subprocess.run([*own, *words], check=True, capture_output=True, text=True).stdout.strip()


def test_a_revision_is_read_without_writing_the_index(tmp_path):
    """A git that is killed while it writes leaves a lock in the user's checkout."""
    (tmp_path / "file").write_text("a")
    assert git_revision(tmp_path) == "unknown"
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "first")
    os.utime(tmp_path / "file", (1, 1))  # the index would be refreshed
    before = (tmp_path / ".git/index").read_bytes()

    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_revision(tmp_path) == commit
    (tmp_path / "file").write_text("b")
    assert git_revision(tmp_path) == f"{commit}-dirty"
    assert (tmp_path / ".git/index").read_bytes() == before
