"""speculators' training data, read: rows as Arrow files, hidden states one file a sample.

    FOLDER/data-*.arrow                      rows with `input_ids` and `loss_mask`
    FOLDER/hidden_states/hs_N.safetensors    row N: `token_ids` (S,), `hidden_states` (S, 4, Ht)

The states are three taps in ascending order, and the last layer's output before the target's final
norm.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.base.read import check_regular
from eagle3fn.base.types import Sample
from eagle3fn.data.arrow_rows import arrow_rows
from eagle3fn.data.features import READER_REMEDY, Reader

STATES = "hidden_states"
_FILES = "hs_*.safetensors"
_COUNT = 4  # states a token: three taps and the last one


class _Tokens(NamedTuple):
    """A row of the Arrow files."""

    ids: Tensor  # (S,) int64
    mask: Tensor  # (S,) int64


def has_states(folder: str | Path) -> bool:
    """Whether a folder is one of speculators' data with hidden states."""
    return any((Path(folder) / STATES).glob(_FILES))


def speculators_reader(folder: str | Path, norm: Callable[[Tensor], Tensor]) -> Reader:
    """A reader of such a folder; rows without a file of states are left out.

    `norm` is the target's final norm, `(S, Ht)` to `(S, Ht)`.

    Raises:
        UserError: the Arrow files are missing or damaged, or pyarrow is.
    """
    rows = _read_rows(Path(folder))
    return Reader(
        files=f"{STATES}/{_FILES}",
        find=_find,
        sample=partial(_sample, rows=rows, norm=norm),
        tokens=partial(_tokens, rows=rows),
    )


def _find(folder: Path) -> list[Path]:
    """Files of states, in the rows' order."""
    return sorted((folder / STATES).glob(_FILES), key=_number)


def _number(path: Path) -> int:
    text = path.stem.removeprefix("hs_")
    if not text.isdecimal() or not text.isascii():
        raise UserError(f"{path}: must be named after its row, hs_0.safetensors; {READER_REMEDY}")
    return int(text)


def _read_rows(folder: Path) -> list[_Tokens]:
    files = sorted(folder.glob("*.arrow"))
    if not files:
        raise UserError(f"{folder}: no .arrow file there; name the folder of prepare-data's output")
    rows = []
    for file in files:
        for row, reason in arrow_rows(file, stream=True):
            if row is None or not row.keys() >= {"input_ids", "loss_mask"}:
                why = reason or "must have input_ids and loss_mask"
                raise UserError(f"{file}: row {len(rows)}: {why}; prepare the data again")
            try:
                rows.append(_Tokens(torch.tensor(row["input_ids"]), torch.tensor(row["loss_mask"])))
            except (TypeError, ValueError, RuntimeError):
                raise UserError(
                    f"{file}: row {len(rows)}: input_ids and loss_mask must be lists of numbers; "
                    "prepare the data again"
                ) from None
    return rows


def _row(path: Path, rows: list[_Tokens]) -> _Tokens:
    number = _number(path)
    if number >= len(rows):
        raise UserError(f"{path}: there are {len(rows)} rows; {READER_REMEDY}")
    return rows[number]


def _tokens(path: Path, rows: list[_Tokens]) -> tuple[Tensor, Tensor]:
    row = _row(path, rows)
    return row.ids, row.mask


@torch.no_grad()
def _sample(path: Path, rows: list[_Tokens], norm: Callable[[Tensor], Tensor]) -> Sample:
    row = _row(path, rows)
    check_regular(path)
    try:
        tree = load_file(path)
        ids = tree["token_ids"]
        states = tree["hidden_states"]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; restore it") from None
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path}: damaged, or not of states ({error}); {READER_REMEDY}") from None

    if not torch.equal(ids.long(), row.ids):
        raise UserError(f"{path}: its token_ids are not those of its row; {READER_REMEDY}")
    if states.ndim != 3 or states.shape[1] != _COUNT:
        raise UserError(
            f"{path}: hidden_states has shape {tuple(states.shape)}: must be (S, {_COUNT}, Ht), "
            "three taps and the last layer's output; generate it with three target layers and the "
            "last one"
        )
    zero = (states == 0).all(-1).any(-1)  # (S,)
    if zero.any():
        raise UserError(
            f"{path}: hidden_states are all zero at {int(zero.sum())} of {len(zero)} tokens; "
            f"{READER_REMEDY}"
        )
    try:
        last = norm(states[:, -1])
    except RuntimeError:
        raise UserError(
            f"{path}: hidden_states has shape {tuple(states.shape)}, of another width than the "
            "target's; name the target that they were made with"
        ) from None
    return Sample(
        input_ids=row.ids,
        token_mask=row.mask.long(),
        aux_hidden=states[:, :-1].flatten(1).contiguous(),
        last_hidden=last.to(states.dtype).contiguous(),
    )
