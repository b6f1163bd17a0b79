"""A draft's folder to start a training from: `train.init` names it.

Whoever wrote it (`foreign_drafts`): all its parameters are the first ones. The draft vocabulary may
be another: the head's rows follow their tokens.
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.draft_config import DraftConfig, aux_layers
from eagle3fn.base.errors import UserError
from eagle3fn.base.rope_settings import same_scaling
from eagle3fn.base.sections import STARTS
from eagle3fn.base.types import Frozen, Params, VocabMap
from eagle3fn.model.table import EMBED, HEAD, shapes
from eagle3fn.train.drafts import CONFIG, Draft
from eagle3fn.train.foreign_drafts import read_foreign

_NOT_COMPARED = ("max_position_embeddings", "initializer_range", "draft_vocab_size")


class Mapped(NamedTuple):
    """Where the head's rows come from, by draft tokens of the run."""

    rows: Tensor  # (D,) int64: the row of the old draft's head; -1: it has not the token
    size: int  # of the old draft's vocabulary

    def line(self, folder: str | Path, of_target: bool) -> str:
        """For a user: how many rows were taken, and what the others are."""
        total = len(self.rows)
        taken = int((self.rows >= 0).sum())
        line = f"train.init = {str(folder)!r}: its head has rows of {taken} of {total} draft tokens"
        if taken < total:
            others = "the target's rows" if of_target else "the mean of its rows"
            line += f", {total - taken} begin with {others}"
        left = self.size - taken
        return line + (f"; {left} of its own are left out" if left else "")


def check_start(
    config: Config, target_layers: int, vocab_map: VocabMap, embed_tokens: Tensor | None = None
) -> str:
    """Refuse a draft to start from, where `train.init` names one, before anything is written.

    Args:
        config: the run's.
        target_layers: the target's number of decoder layers, by which default taps are compared.
        vocab_map: the run's.
        embed_tokens: the target's `(V, Ht)`, with which a shipped one is compared; None: later.

    Returns:
        A line for a user on what is taken of its head; "" where no draft is started from.

    Raises:
        UserError: as `start_from_draft`; the taps are compared where they are the default ones too.
    """
    if config.train.init in STARTS:
        return ""
    folder = config.train.init
    draft, origin = _read(folder)
    found = replace(draft.config, aux_layers=aux_layers(draft.config, target_layers))
    wanted = replace(config.draft, aux_layers=aux_layers(config.draft, target_layers))
    _check_same(found, wanted, folder, origin)
    _check_embedding(draft, config, embed_tokens, folder)
    mapped = map_rows(draft.vocab, vocab_map)
    return mapped.line(folder, of_target=not config.draft.other_width)


def start_from_draft(config: Config, frozen: Frozen, folder: str | Path) -> Params:
    """A draft's parameters as the first ones of a training, in the run's dtype and on its device.

    Of its head the rows of tokens are taken that the run's draft vocabulary has. Rows of other
    tokens are the target's, or where the hidden sizes differ the mean of the draft's rows. An
    embedding that the run trains begins as the one that the draft ships, or as the target's.

    Raises:
        UserError: no such folder, not a draft that `read_foreign` reads, or its shape, switches,
            taps (where both name theirs), RoPE, embedding or target vocabulary are not the run's;
            names the difference and the remedy.
    """
    draft, origin = _read(folder)
    _check_same(draft.config, config.draft, folder, origin)
    _check_embedding(draft, config, frozen.embed_tokens, folder)
    kept = VocabMap(frozen.t2d.cpu(), frozen.d2t.cpu())
    mapped = map_rows(draft.vocab, kept)
    head = _mapped_head(draft.params[HEAD], mapped, frozen, kept)

    dtype = getattr(torch, config.train.dtype)
    params = draft.params | {HEAD: head}
    if config.draft.own_embedding and EMBED not in params:
        shipped = frozen.embed_tokens if draft.embed_tokens is None else draft.embed_tokens
        assert shipped is not None  # a draft of another width has its own
        params[EMBED] = shipped
    ordered = {name: params[name] for name in shapes(config.draft)}
    return {name: value.to(config.train.device, dtype) for name, value in ordered.items()}


def _check_embedding(
    draft: Draft, config: Config, embed_tokens: Tensor | None, folder: str | Path
) -> None:
    """Refuse a shipped embedding that is not the target's, unless the run trains its own."""
    shipped = draft.embed_tokens
    if shipped is None or embed_tokens is None or config.draft.own_embedding:
        return

    # In bf16, to which either may have been rounded.
    if not torch.equal(shipped.bfloat16(), embed_tokens.to(shipped.device).bfloat16()):
        raise UserError(
            f"train.init = {str(folder)!r}: its embed_tokens are not the target's, with which the "
            "run would go on as another draft; train them with --set draft.train_embedding=true"
        )


def map_rows(old: VocabMap, new: VocabMap) -> Mapped:
    """For each draft token of `new`, its row in a head of `old`, both of one target.

    With `ids(m) = d2t + arange(D)`, the draft's tokens: `rows[i] = j` where
    `ids(old)[j] = ids(new)[i]`, and -1 where there is no such `j`.
    """
    places = torch.full(old.t2d.shape, -1)  # (V,)
    places[old.t2d] = torch.arange(len(old.d2t))
    return Mapped(places[new.t2d], len(old.d2t))


def _mapped_head(head: Tensor, mapped: Mapped, frozen: Frozen, new: VocabMap) -> Tensor:
    """The head `(D, H)` of the run's draft vocabulary."""
    missing = mapped.rows < 0
    rows = head[mapped.rows.clamp(min=0)]
    if not missing.any():
        return rows

    tokens = new.t2d.nonzero().flatten()[missing]
    if frozen.target_head.shape[1] == head.shape[1]:
        others = frozen.target_head[tokens.to(frozen.target_head.device)]
    else:
        others = head.float().mean(0).expand(len(tokens), -1)
    rows[missing] = others.to(rows)
    return rows


def _read(folder: str | Path) -> tuple[Draft, str]:
    """The draft of a folder, whoever wrote it, and the origin by which it is known.

    Where its files don't show the origin, on which a switch depends, `convert --from` must say it
    first: the message does.
    """
    if not (Path(folder) / CONFIG).is_file():
        raise UserError(
            f"train.init = {str(folder)!r}: must be {' or '.join(map(repr, STARTS))}, or the "
            f"folder of a draft; there is no {Path(folder) / CONFIG}"
        )
    found = read_foreign(folder)
    return found.draft, found.origin


def _check_same(found: DraftConfig, wanted: DraftConfig, folder: str | Path, origin: str) -> None:
    """Refuse a draft that computes something else than the run's."""
    shape = f"--draft-config {Path(folder) / CONFIG}"
    if origin != "hf":
        shape = f"eagle3fn convert --draft {folder} --out DRAFT and --draft-config DRAFT/{CONFIG}"
    for field in fields(DraftConfig):
        before = getattr(found, field.name)
        now = getattr(wanted, field.name)
        same = before == now or field.name in _NOT_COMPARED
        if field.name == "train_embedding":
            same = same or now  # it begins as what the draft ships
        if field.name == "aux_layers":
            same = same or None in (before, now)  # the default ones of a target
        if field.name == "rope_scaling":
            same = same_scaling(before, now, wanted.max_position_embeddings)
        if not same:
            raise UserError(
                f"train.init = {str(folder)!r}: its {field.name} is {before!r}, the run's is "
                f"{now!r}; take the draft's shape with {shape}, and features and target that it "
                "fits"
            )
