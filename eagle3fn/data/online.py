"""Online roll-out: samples from the target when they are needed, without files.

The target is run by extraction's own `run_target`, and batches are made by the pipeline's own
stages. So a sample has the bits that extraction stores if it went through the target with
the same rows around it and the same `batch_tokens`. With 1 its bits depend on itself alone;
otherwise padding and the other rows may move the last ones.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.base.types import Batch, Sample
from eagle3fn.data.collate import AlignMask, align_mask
from eagle3fn.data.decoder import check_present
from eagle3fn.data.order import Order, shuffled
from eagle3fn.data.pipeline import binned, micro_batches, ordered
from eagle3fn.data.samples import Encoded
from eagle3fn.data.sources import BATCH_TOKENS, check_extraction, run_target
from eagle3fn.data.stages import Item, Loaded, stage
from eagle3fn.data.validate import hidden_fault, token_fault


def roll_out(
    model: Any,
    rows: Iterable[Encoded],
    layers: Sequence[int],
    batch_tokens: int = BATCH_TOKENS,
    group: int = 64,
) -> Iterator[Sample]:
    """A sample for each row, in the order of `rows`, on the CPU and in the target's dtype.

    Args:
        model: the target (`data.target.load_target`), on any device or spread over several.
        rows: tokens and masks. `data.encode.encode_all` makes them from conversations,
            `Encoded(id, ids, mask)` from a pair. They are read `group` at a time, when the first
            sample of the group is asked for.
        layers: the tapped decoder layers, ascending and counted from 0.
        batch_tokens: tokens in one run of the target, as `data.sources.token_batches` counts them;
            of like length within a group, padded on the right.
        group: rows sorted by length together: extraction's `samples_per_shard`, where its bits are
            wanted.

    Raises:
        UserError: weights that are offloaded; a layer outside the target; a row that is malformed,
            longer than the target's positions or with an id outside its vocabulary; features that
            are not finite. It names the row.
    """
    source = iter(rows)
    check_present(model)
    check_extraction(model.config, layers, 0)
    while True:
        chosen = list(islice(source, group))
        if not chosen:
            return

        for row in chosen:
            _check_row(model.config, row)
        samples = run_target(model, chosen, layers, batch_tokens)
        for row, sample in zip(chosen, samples, strict=True):
            what = hidden_fault(
                sample.aux_hidden,
                sample.last_hidden,
                length=len(row.input_ids),
                taps=len(layers),
                size=None,
                dtype=None,
            )
            if what:
                raise UserError(f"row {row.id!r}: {what}; look at the target's weights and dtype")
            yield sample


def _check_row(config: Any, row: Encoded) -> None:
    what = token_fault(row.input_ids, row.token_mask, vocab_size=config.vocab_size)
    length = len(row.input_ids)
    limit = getattr(config, "max_position_embeddings", None)
    if what is None and limit is not None and length > limit:
        what = f"{length} tokens, beyond the target's max_position_embeddings = {limit}"
    if what:
        raise UserError(f"row {row.id!r}: {what}; mend, cut or drop the row")


def online_batches(
    model: Any,
    rows: Sequence[Encoded],
    layers: Sequence[int],
    config: Config,
    start: int,
    stop: int,
    batch_tokens: int = 1,
    align_mask: AlignMask = align_mask,
    order: Order = shuffled,
) -> Iterator[tuple[Batch, ...]]:
    """`data.pipeline.batches` without stored features: the same steps, samples and order.

    With features extracted at `batch_tokens=1`, and that here, the two give the same bits.

    Args:
        model: the target, as in `roll_out`.
        rows: the rows trained on.
        layers: the tapped decoder layers, ascending and counted from 0.
        config: `data`, `train.seed` and the unroll length are read.
        start: the first step.
        stop: one past the last.
        batch_tokens: tokens in one run of the target, as in `roll_out`.
        align_mask: token mask to row mask.
        order: which row comes at which place.

    Raises:
        UserError: `rows` is empty, or as `roll_out`.
    """
    if not rows:
        raise UserError(
            "online_batches: no rows to train on; give conversations with a supervised token"
        )
    numbers = ordered(range(len(rows)), config, start, stop, order)
    bins = binned(numbers, lambda number: len(rows[number].input_ids), config)
    return micro_batches(_rolled_out(bins, model, rows, layers, batch_tokens), config, align_mask)


@stage
def _rolled_out(
    items: Iterable[Item[list[list[int]]]],
    model: Any,
    rows: Sequence[Encoded],
    layers: Sequence[int],
    batch_tokens: int,
) -> Iterator[Item[Loaded]]:
    """`data.stages.read` of one rank, by the target in place of a folder."""
    for bins, place in items:
        # One group a step: the target runs on this step's rows alone.
        chosen = [rows[number] for each in bins for number in each]
        samples = iter(list(roll_out(model, chosen, layers, batch_tokens, group=len(chosen))))
        yield Item(Loaded(bins, [[next(samples) for _ in each] for each in bins], []), place)
