"""The online roll-out equals SpecForge's online `run_forward` with its target and its logits.

Both sides run the same small Llama themselves. SpecForge's mask keeps its last entry online, ours
never does (objective, section 1): the samples' own masks end in 0 where the two must be equal, and
in 1 where the difference is shown.
"""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import eagle3fn as e3
from eagle3fn import specforge
from eagle3fn.base.rows import over_steps
from eagle3fn.base.types import Batch, Frozen
from eagle3fn.data.collate import collate
from eagle3fn.data.online import roll_out
from eagle3fn.data.samples import Encoded
from eagle3fn.specforge.cases import for_specforge
from eagle3fn.specforge.oracle import Oracle, OracleMissingError
from eagle3fn.testing.builders import Case, generator, tiny_params
from eagle3fn.testing.results import Result, differences, named, nontrivial
from eagle3fn.testing.strategies import drawn
from tests.factories import GATE
from tests.specforge.oracle_online import (
    ADAPTER,
    COLLATOR,
    FILES,
    STRATEGY,
    run_online,
    specforge_file,
    specforge_module,
    specforge_target,
    specforge_trainer,
    target_frozen,
    tiny_target,
)

LAYERS = (1, 2, 4)


@pytest.fixture(scope="module")
def online(commit: Oracle) -> Oracle:
    """SpecForge with the files of its online side."""
    try:
        for name in FILES:
            specforge_file(commit, name)
    except OracleMissingError as error:
        pytest.skip(str(error))
    return commit


@pytest.fixture(scope="module")
def collated(online: Oracle) -> Oracle:
    """The same with its collator, which imports `datasets`: not the checkout's own folder."""
    try:
        specforge_module(online, COLLATOR)
    except OracleMissingError as error:
        pytest.skip(str(error))
    return online


def rows_of(case: Case, last: int) -> list[Encoded]:
    """Tokens and masks that end in `last`, shortest first, as the roll-out runs them."""
    source = generator(case, 4)
    share = 1.0 if case.mask == "full" else 0.7
    rows = []
    for number, length in enumerate(sorted(case.lengths)):
        ids = torch.randint(case.vocab, (length,), generator=source)
        mask = (torch.rand(length, generator=source) < share).long()
        mask[-1] = last
        rows.append(Encoded(str(number), ids, mask))
    return rows


def online_case(case: Case) -> Case:
    """A case that SpecForge's online side can run: logits as teacher, no positions of its own."""
    return for_specforge(replace(case, teacher="full", own_positions=False))


def our_batch(case: Case, model: Any, rows: list[Encoded]) -> Batch:
    samples = list(roll_out(model, rows, LAYERS, batch_tokens=2**20, group=len(rows)))
    return collate(samples, case.config(), specforge.align_mask)


def our_result(case: Case, frozen: Frozen, batch: Batch) -> Result:
    config = case.config()

    def loss(params: Any) -> tuple[torch.Tensor, Any]:
        return specforge.forward_loss(params, batch, config=config, frozen=frozen)

    (value, aux), gradients = e3.value_and_grad(loss, has_aux=True)(tiny_params(case))
    return named(value, aux, gradients)


def test_online_roll_out_equals_specforges_online_run_forward(collated: Oracle) -> None:
    """Thirty drawn cases: loss, each step's, acceptance, accuracy counts, every gradient leaf."""
    count = Counter()
    for drawn_case in [GATE, *drawn(30, 5)]:
        case = online_case(drawn_case)
        model = tiny_target(case)
        rows = rows_of(case, last=0)
        expected = run_online(collated, case, model, rows, LAYERS)
        ours = our_result(case, target_frozen(case, model), our_batch(case, model, rows))
        assert differences(expected, ours) == [], case
        count.update(["cases", case.dtype, case.loss, f"K{case.steps}"])
        count["nontrivial"] += nontrivial(expected)
    print(dict(count))
    assert count["nontrivial"] >= 0.8 * count["cases"]


def test_specforges_online_mask_trains_the_last_row(collated: Oracle) -> None:
    """The mask's last entry makes other losses; it is the only difference where nothing is padded.

    In a padded batch SpecForge's last row learns what the target predicts after padding.
    """
    count = Counter()
    for drawn_case in drawn(12, 6):
        case = online_case(drawn_case)
        model = tiny_target(case)
        rows = rows_of(case, last=1)
        frozen = target_frozen(case, model)
        batch = our_batch(case, model, rows)
        expected = run_online(collated, case, model, rows, LAYERS)

        # Ours zeroes that entry: one trained row less a sample. No row counts as 1e-6.
        zeroed = our_result(case, frozen, batch)
        assert expected["rows"][0] == zeroed["rows"][0].round() + len(rows)
        count["other losses"] += not torch.equal(expected["losses"], zeroed["losses"])

        # With the entry kept, ours is SpecForge's, but in a padded batch.
        masks = torch.nn.utils.rnn.pad_sequence([row.token_mask for row in rows], True)
        rows_kept = over_steps(masks, case.steps)
        kept = our_result(case, frozen, batch._replace(row_mask=rows_kept))
        padded = len(set(case.lengths)) > 1
        assert (differences(expected, kept) == []) != padded
        count["padded" if padded else "not padded"] += 1
    print(dict(count))
    assert min(count.values()) >= 3, count


@pytest.mark.parametrize("draft_vocab", [24, 40])
def test_specforges_pruned_logits_fail_below_the_whole_vocabulary(
    online: Oracle, draft_vocab: int
) -> None:
    """Its adapter cuts the logits to D; its model then indexes them with `t2d` `(V,)`."""
    case = Case(draft_vocab=draft_vocab, lengths=(7,))
    model = tiny_target(case)
    (row,) = rows_of(case, last=0)
    trainer, _ = specforge_trainer(online, case, model)

    adapter = specforge_module(online, ADAPTER).SGLangAdapter(
        specforge_target(online, model, LAYERS), device="cpu", t2d=target_frozen(case, model).t2d
    )
    task = SimpleNamespace(payload={"input_ids": row.input_ids, "loss_mask": row.token_mask})
    capture = SimpleNamespace(target_repr="pruned_logits")
    (tensors,) = adapter.generate_features([task], capture=capture)
    assert tensors["target"].shape == (1, 7, draft_vocab)

    strategy = specforge_module(online, STRATEGY).Eagle3TrainStrategy(trainer)
    batch = SimpleNamespace(tensors=tensors, metadata={"target_repr": "pruned_logits"})
    if draft_vocab == case.vocab:
        assert torch.isfinite(strategy.forward_loss(batch).loss)
    else:
        message = r"shape of the mask \[40\] .* does not match .* \[1, 7, 24\]"
        with pytest.raises(IndexError, match=message):
            strategy.forward_loss(batch)
