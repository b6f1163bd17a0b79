"""`--from`: a run that goes on from another run's checkpoint, in a folder of its own.

`from.json` is written first and the run's first checkpoint last. So a call that was killed between
them leaves a folder that the same command begins again, and that no other call takes for a run.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from eagle3fn.base.config import from_dict
from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import whole_file, write_json
from eagle3fn.base.read import CONFIG_LIMIT, read_object
from eagle3fn.train.changes import written_settings
from eagle3fn.train.checkpoint import checkpoints
from eagle3fn.train.checkpoint_meta import META, read_meta

FILE = "from.json"
_ROWS = ("metrics.jsonl", "eval.jsonl")


class Branch(NamedTuple):
    """What `from.json` holds: where a run went on from."""

    named: str  # the path that `--from` named, without links
    run: str  # the last name of that run's folder
    step: int  # updates that were made there
    changes: list[str]  # what has changed since, a line each


class Rows(NamedTuple):
    """Of `metrics.jsonl` and of `eval.jsonl`."""

    steps: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


def own_rows(rows: Rows, branch: Branch | None) -> Rows:
    """A run's rows without those that were copied from the run that it went on from.

    The checkpoint itself was evaluated anew, under the settings and held-out samples of this run.
    """
    if branch is None:
        return rows
    return Rows(
        [row for row in rows.steps if row["step"] > branch.step],
        [row for row in rows.held_out if row["step"] >= branch.step],
    )


def source_checkpoint(source: str | Path) -> Path:
    """The checkpoint that `--from` names: its folder, or the newest one of a run's folder.

    Raises:
        UserError: there is none.
    """
    source = Path(source)
    if (source / META).is_file():
        return source
    newest = max(checkpoints(source / "checkpoints"), default=None)
    if newest is None:
        raise UserError(
            f"--from {source}: no checkpoint is there; name a run's folder, or one of its "
            "checkpoints/step-NNNNNNNN"
        )
    return newest


@contextmanager
def unless_gone(path: Path | None) -> Iterator[None]:
    """What is found of a checkpoint in this block is not its fault if its own run removed it.

    Raises:
        UserError: it is gone, in place of what the block raises.
    """
    try:
        yield
    except UserError:
        if path is None or (path / META).is_file():
            raise
        raise UserError(
            f"{path}: gone since this command began, as its run keeps the newest train.keep_last "
            "alone; call again with --from and the run's folder, or copy the checkpoint first"
        ) from None


def branch_settings(source: str | Path) -> dict[str, dict[str, Any]]:
    """The settings that a checkpoint was written with, as defaults of `load_config`.

    The draft's are left out: see `branch_draft`.

    Raises:
        UserError: no checkpoint, or a damaged one.
    """
    path = source_checkpoint(source)
    with unless_gone(path):
        meta = read_meta(path)
    tree: dict[str, dict[str, Any]] = {}
    for name, value in written_settings(meta).items():
        section, key = name.split(".")
        if section != "draft":
            tree.setdefault(section, {})[key] = value
    return tree


def branch_draft(source: str | Path) -> DraftConfig:
    """The draft that a checkpoint is of.

    Raises:
        UserError: no checkpoint, or a damaged one.
    """
    path = source_checkpoint(source)
    return from_dict(DraftConfig, read_meta(path)["config"]["draft"], str(path), "draft.")


def check_branch(out: Path, source: str | Path | None, has_checkpoint: bool) -> None:
    """Refuse a folder in which the run that is asked for cannot begin or go on.

    Args:
        out: the run's folder.
        source: what `--from` names, if anything.
        has_checkpoint: whether the folder holds one.

    Raises:
        UserError: with `--from`, a run that did not go on from there, or rows of one; with it and
            without, one that was to go on from another and has not begun.
    """
    begun = read_branch(out)
    if begun is not None and source is not None and begun.named == os.path.realpath(source):
        return
    if begun is not None and not has_checkpoint:
        raise UserError(
            f"{out}: was to go on from {begun.named}, and was ended before it began; call it "
            f"with --from {begun.named} again, or name another --out"
        )
    if source is None:
        return

    if begun is not None:
        raise UserError(
            f"{out}: goes on from {begun.named}, not from --from {source}; leave --from out to go "
            "on with it, or name another --out"
        )
    if has_checkpoint or os.path.lexists(out / "horizon.json"):
        raise UserError(
            f"{out}: holds a run of its own, which --from {source} would not go on with; name a "
            "new --out, or leave --from out"
        )
    for name in _ROWS:
        if os.path.lexists(out / name):
            raise UserError(
                f"{out}: holds a {name} of something else, which --from {source} would replace; "
                "name a new --out, or remove it"
            )


def write_branch(out: Path, source: str | Path, path: Path, step: int, changes: list[str]) -> None:
    """Write `from.json`, then the rows of the run that this one goes on from, uncut.

    Args:
        out: the new run's folder.
        source: what `--from` names.
        path: the checkpoint that it is.
        step: its updates.
        changes: what has changed since, a line each.
    """
    old = Path(os.path.realpath(path)).parent.parent
    branch = Branch(os.path.realpath(source), old.name, step, changes)
    write_json(out / FILE, branch._asdict())
    for name in _ROWS:
        with whole_file(out / name) as temporary:
            if (old / name).is_file():
                shutil.copyfile(old / name, temporary)


def read_branch(out: str | Path) -> Branch | None:
    """What `from.json` holds; None where a run began at its start.

    Raises:
        UserError: it is damaged.
    """
    path = Path(out) / FILE
    if not os.path.lexists(path):
        return None
    found = read_object(path, CONFIG_LIMIT)
    kinds = {"named": str, "run": str, "step": int, "changes": list}
    for name, kind in kinds.items():
        if type(found.get(name)) is not kind:
            raise UserError(f"{path}: damaged ({name} is no {kind.__name__}); delete it")
    if not all(isinstance(line, str) for line in found["changes"]):
        raise UserError(f"{path}: damaged (changes are no lines); delete it")
    return Branch(*(found[name] for name in kinds))
