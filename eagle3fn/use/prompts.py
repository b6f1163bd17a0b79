"""Prompts of an evaluation, with their categories."""

import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

from eagle3fn.base.errors import UserError
from eagle3fn.data.rejects import rejecting, usable
from eagle3fn.data.row_files import FileRow, read_rows

_ENDINGS = (".gz", ".xz", ".zst", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow")


class Prompts(NamedTuple):
    """User turns in order.

    Attributes:
        texts: the turns.
        categories: as many names; "" of a prompt that has none.
        name: of the file, or of all files.
    """

    texts: list[str]
    categories: list[str]
    name: str


class _Prompt(NamedTuple):
    text: str
    category: str


def read_prompts(*paths: str | Path, first: int | None = None) -> Prompts:
    """The `prompt` of each row of files or folders (`data.row_files`), and its `category`.

    Of several files, a row without a category has its file's name for one.

    Args:
        paths: at least one.
        first: so many prompts of each file at most; all rows are checked.

    Raises:
        UserError: unreadable, no rows, or rows without a prompt; the message counts them and names
            the first. A file that is given twice.
    """
    names = _names(paths)
    found: list[_Prompt] = []
    for path, name in zip(paths, names, strict=True):
        prompt_of = partial(_prompt_of, otherwise=name if len(paths) > 1 else "")
        with rejecting(path) as rejects:
            prompts = list(usable(read_rows(path), prompt_of, rejects))
        if not prompts:
            raise UserError(f'{path}: no rows; write one JSON object with a "prompt" a line')
        found += prompts[:first]

    return Prompts(
        texts=[prompt.text for prompt in found],
        categories=[prompt.category for prompt in found],
        name=Path(paths[0]).name if len(paths) == 1 else ", ".join(names),
    )


def _names(paths: tuple[str | Path, ...]) -> list[str]:
    """The files' names without endings; where two are the same, the paths as they are given."""
    places = [os.path.realpath(path) for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"--prompts {path}: is given twice; name it once")

    names = [_without_endings(Path(path).name) for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _without_endings(name: str) -> str:
    for ending in _ENDINGS:
        name = name.removesuffix(ending)
    return name


def _prompt_of(row: FileRow, otherwise: str) -> _Prompt:
    value = row.value
    if not isinstance(value, dict):
        raise UserError('not a JSON object, such as {"prompt": "hello"}; mend or delete the row')
    prompt = value.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError('no text under "prompt"; mend or delete the row')
    category = value.get("category")
    if category is None:
        category = otherwise
    elif not isinstance(category, str) or not category.strip():
        raise UserError('no text under "category"; name one, or delete the key')
    return _Prompt(prompt, category)
