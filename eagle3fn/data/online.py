"""Online roll-out: samples straight from the target, made when they are asked for; no feature touches a disk.

The target is run by extraction's own `run_target`, the batches are made by the pipeline's own `micro_batches`. So a
sample has the bits that extraction stores if it went through the target in the same company: `batch` and the rows
around it. With `batch=1` its bits depend on itself alone; otherwise padding and neighbours may move the last ones.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.base.types import Batch, Sample
from eagle3fn.data.collate import AlignMask, align_mask
from eagle3fn.data.extract import Encoded, check_extraction, run_target
from eagle3fn.data.pipeline import Order, micro_batches, shuffled
from eagle3fn.data.validate import hidden_fault, token_fault


def roll_out(
    model: Any, rows: Iterable[Encoded], layers: Sequence[int], batch: int = 8, group: int = 64
) -> Iterator[Sample]:
    """A sample for each row, in the order of `rows`, on the CPU and in the target's dtype.

    Args:
        model: the target (`data.target.load_target`), on any device.
        rows: tokens and masks: `data.extract.encode_all` makes them from conversations, `Encoded(id, ids, mask)` from
            a pair. They are read `group` at a time, when the first sample of the group is asked for.
        layers: the three tapped decoder layers.
        batch: rows in one run of the target, of like length within a group, padded on the right.
        group: extraction's `samples_per_shard`, where its bits are wanted.

    Raises:
        UserError: a layer outside the target; a row that is malformed, longer than the target's positions or with an
            id outside its vocabulary; features that are not finite. It names the row.
    """
    source = iter(rows)
    check_extraction(model.config, layers, 0)
    while chosen := list(islice(source, group)):
        for row in chosen:
            _check_row(model.config, row)
        for row, sample in zip(chosen, run_target(model, chosen, layers, batch), strict=True):
            what = hidden_fault(
                sample.aux_hidden, sample.last_hidden, len(row.input_ids), None, None
            )
            if what:
                raise UserError(f"row {row.id!r}: {what}; look at the target's weights and dtype")
            yield sample


def _check_row(config: Any, row: Encoded) -> None:
    what = token_fault(row.input_ids, row.token_mask, vocab_size=config.vocab_size)
    limit = getattr(config, "max_position_embeddings", None)
    if what is None and limit is not None and len(row.input_ids) > limit:
        what = f"{len(row.input_ids)} tokens, beyond the target's max_position_embeddings = {limit}"
    if what:
        raise UserError(f"row {row.id!r}: {what}; mend, cut or drop the row")


def online_batches(
    model: Any,
    rows: Sequence[Encoded],
    layers: Sequence[int],
    config: Config,
    start: int,
    stop: int,
    batch: int = 1,
    align_mask: AlignMask = align_mask,
    order: Order = shuffled,
) -> Iterator[tuple[Batch, ...]]:
    """`data.pipeline.batches` without stored features: the same steps of the same samples in the same order.

    `rows` are those trained on, `batch` as in `roll_out`. With features extracted at `batch=1` and `batch=1` here,
    the two give the same bits.

    Raises:
        UserError: `rows` is empty, or as `roll_out`.
    """
    if not rows:
        raise UserError(
            "online_batches: no rows to train on; give conversations with a supervised token"
        )
    for step in range(start, stop):
        chosen = order(len(rows), config, step)
        samples = roll_out(
            model, [rows[place] for place in chosen], layers, batch, group=len(chosen)
        )
        yield micro_batches(list(samples), config, align_mask=align_mask)
