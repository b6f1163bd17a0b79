"""Features without files: conversations, or prompts, as a set whose features come on demand.

The target is run by extraction's own sources, and batches are made by the pipeline's own stages. So
a sample has the bits that extraction stores if it went through the target with the same rows around
it and the same `batch_tokens`. With 1 its bits depend on itself alone; otherwise padding and the
other rows may move the last ones.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import json_sha256
from eagle3fn.base.types import Sample
from eagle3fn.data.decoder import check_present
from eagle3fn.data.feature_index import SCHEMA
from eagle3fn.data.features import FeatureSet, OnDemand
from eagle3fn.data.on_demand import OnlineSamples, Widths
from eagle3fn.data.sample_table import SampleTable, columns_of, table_record
from eagle3fn.data.samples import Encoded
from eagle3fn.data.shards import dtype_name, entry_of
from eagle3fn.data.source_pool import Pool, Source
from eagle3fn.data.sources import BATCH_TOKENS, FeatureSource, check_extraction, run_target
from eagle3fn.data.validate import hidden_fault, token_fault

STORED = torch.bfloat16
"""The dtype of features as training reads them, as the `extract` command stores them."""


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
            check_row(model.config, row)
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


def check_row(config: Any, row: Encoded) -> None:
    """Refuse a row that the target of this configuration cannot read.

    Raises:
        UserError: malformed, longer than its positions, or with an id outside its vocabulary; names
            the row.
    """
    what = token_fault(row.input_ids, row.token_mask, vocab_size=config.vocab_size)
    length = len(row.input_ids)
    limit = getattr(config, "max_position_embeddings", None)
    if what is None and limit is not None and length > limit:
        what = f"{length} tokens, beyond the target's max_position_embeddings = {limit}"
    if what:
        raise UserError(f"row {row.id!r}: {what}; mend, cut or drop the row")


# A set of samples


class MadeFrom(NamedTuple):
    """What a set of samples was made from, as its index says it."""

    conversations: str | Path
    fingerprint: str  # of all that the samples and their features depend on
    facts: dict[str, Any] = {}  # noqa: RUF012  further entries of the index
    settings: dict[str, str] = {}  # noqa: RUF012  what it depends on, by option, for messages


def sample_set(
    rows: Sequence[Encoded],
    target: dict[str, Any],
    on_demand: OnDemand,
    made_from: MadeFrom,
    stored: torch.dtype = STORED,
    computed: torch.dtype = STORED,
) -> FeatureSet:
    """Samples with features on demand, as an opened folder that training reads.

    Their table is the one that extraction writes of the same samples, so a vocabulary map counted
    on either is known as the other's.

    Args:
        rows: tokens and masks, at least one.
        target: what the index says of the target: `FeatureSource.target`, or its sizes alone.
        on_demand: where features come from.
        made_from: where the rows come from.
        stored: the dtype of the features as they come.
        computed: the dtype that they are computed in.
    """
    entries = [entry_of(number, row) for number, row in enumerate(rows)]
    columns = columns_of(entries)
    totals = {
        "samples": len(entries),
        "tokens": sum(entry["length"] for entry in entries),
        "supervised": sum(entry["supervised"] for entry in entries),
        "bytes": 0,
    }
    index = {
        "schema": SCHEMA,
        "fingerprint": made_from.fingerprint,
        "target": target,
        "dtype": dtype_name(stored),
        "computed_in": dtype_name(computed),
        **made_from.facts,
        "totals": totals,
        "table": table_record(columns),
        "shards": [],
    }
    folder = Path(made_from.conversations)
    return FeatureSet(
        folder=folder,
        samples=SampleTable(folder, columns, [""], [len(entries)]),
        index=index,
        vocab_size=target["vocab_size"],
        hidden_size=target["hidden_size"],
        verified={},
        on_demand=on_demand,
        made_with=made_from.settings,
    )


def online_set(
    rows: Sequence[Encoded],
    source: FeatureSource,
    on_demand: OnDemand,
    made_from: MadeFrom,
    stored: torch.dtype = STORED,
) -> FeatureSet:
    """`sample_set` of a source's target, whose rows the target can read.

    Raises:
        UserError: a tapped layer outside the target, or as `check_row`.
    """
    check_extraction(source.config, source.layers, 0)
    for row in rows:
        check_row(source.config, row)
    settings = {
        **source.identity,
        "layers": list(source.layers),
        "dtype": dtype_name(source.dtype),
        "made from": made_from.fingerprint,
    }
    made_from = made_from._replace(
        fingerprint=json_sha256(settings),
        facts={**source.index, **made_from.facts},
        settings={**made_from.settings, **source_settings(source)},
    )
    return sample_set(
        rows, source.target, on_demand, made_from, stored=stored, computed=source.dtype
    )


def source_settings(source: FeatureSource) -> dict[str, str]:
    """What of a source its features depend on, by option, for messages."""
    engine = source.identity.get("engine", {"name": "none"})
    found = {"--dtype": dtype_name(source.dtype), "--engine": str(engine["name"])}
    for name, value in engine.items():
        if name != "name":
            found[f"the engine's {name}"] = value if isinstance(value, str) else json.dumps(value)
    for name, value in source.identity.items():
        if name != "engine":
            found[f"the target's {name}"] = str(value)[:16]
    found["the tapped layers"] = ",".join(map(str, source.layers))
    return found


@contextmanager
def features_of(
    source: FeatureSource, rows: Sequence[Encoded], stored: torch.dtype | None = None
) -> Iterator[FeatureSet]:
    """Rows as a set whose features one source computes ahead, for `data.pipeline.batches`.

    ```python
    with features_of(model_source(model, layers), rows) as features:
        for micro in batches(features, range(len(rows)), config, 0, steps):
            state, metrics = fns.step(state, micro)
    ```

    With features that were extracted at `batch_tokens=1`, and that here, batches have their bits.

    Args:
        source: a model in this process (`data.sources.model_source`), or an engine.
        rows: tokens and masks, such as `data.encode.encode_all` makes of conversations.
        stored: the dtype of the features as they come; None, what the source computes in.

    Raises:
        UserError: no rows, or as `online_set`.
    """
    if not rows:
        raise UserError("no rows to train on; give conversations with a supervised token")
    dtype = stored or source.dtype
    widths = Widths(len(source.layers), source.config.hidden_size, dtype)
    with Pool([Source("the target", lambda abandoned: nullcontext(source))]) as pool:
        samples = OnlineSamples(rows, pool, widths)
        yield online_set(rows, source, samples, MadeFrom("rows", ""), dtype)
