"""The online roll-out equals the old script's online `run_forward` with its Hugging Face target and logits.

Both sides run the same small Llama themselves. The old mask keeps its last entry online, ours never does (objective,
section 1): the rows' own masks end in 0 where the two must be equal, and in 1 where the difference is shown.
"""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import eagle3fn as e3
from eagle3fn.base.types import Batch, Frozen
from eagle3fn.data.collate import collate
from eagle3fn.data.extract import Encoded
from eagle3fn.data.online import roll_out
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
    old_file,
    old_module,
    old_target,
    old_trainer,
    run_online,
    tame_target,
    target_frozen,
)

LAYERS = (1, 2, 4)


@pytest.fixture(scope="module")
def online(commit: Oracle) -> Oracle:
    """The old tool with the files of its online side."""
    try:
        for name in FILES:
            old_file(commit, name)
    except OracleMissingError as error:
        pytest.skip(str(error))
    return commit


@pytest.fixture(scope="module")
def collated(online: Oracle) -> Oracle:
    """The same with its collator, which imports `datasets`; the checkout's folder of that name is not the package."""
    try:
        old_module(online, COLLATOR)
    except OracleMissingError as error:
        pytest.skip(str(error))
    return online


def rows_of(case: Case, last: int) -> list[Encoded]:
    """Tokens and masks that end in `last`, the short ones first, as the roll-out runs them."""
    source, rows = generator(case, 4), []
    for number, length in enumerate(sorted(case.lengths)):
        ids = torch.randint(case.vocab, (length,), generator=source)
        mask = (torch.rand(length, generator=source) < (1.0 if case.mask == "full" else 0.7)).long()
        rows.append(Encoded(str(number), ids, torch.cat([mask[:-1], torch.tensor([last])])))
    return rows


def online_case(case: Case) -> Case:
    """A case that the old online side knows: logits as the teacher, no positions of its own."""
    return for_specforge(replace(case, teacher="full", own_positions=False))


def our_batch(case: Case, model, rows: list[Encoded]) -> Batch:
    samples = list(roll_out(model, rows, LAYERS, batch=len(rows), group=len(rows)))
    return collate(samples, "legacy", max(case.lengths))


def ours(case: Case, frozen: Frozen, batch: Batch) -> Result:
    compute = e3.value_and_grad(
        lambda p: e3.forward_loss(p, batch, config=case.config(), frozen=frozen), has_aux=True
    )
    (loss, aux), gradients = compute(tiny_params(case))
    return named(loss, aux, gradients)


def test_the_online_roll_out_equals_the_old_online_run_forward(collated: Oracle) -> None:
    """Thirty drawn cases: loss, each step's, acceptance, accuracy counts, every gradient leaf."""
    count = Counter()
    for drawn_case in [GATE, *drawn(30, 5)]:
        case = online_case(drawn_case)
        model, rows = tame_target(case), rows_of(case, last=0)
        old = run_online(collated, case, model, rows, LAYERS)
        assert (
            differences(old, ours(case, target_frozen(case, model), our_batch(case, model, rows)))
            == []
        ), case
        count += Counter(["cases", case.dtype, case.loss, f"K{case.steps}"])
        count["nontrivial"] += nontrivial(old)
    print(dict(count))
    assert count["nontrivial"] >= 0.8 * count["cases"]


def test_the_old_online_mask_trains_the_last_row(collated: Oracle) -> None:
    """Left as it is, the mask's last entry makes other losses; it is the only difference where nothing is padded.

    In a padded batch the old last row learns what the target says behind padding.
    """
    seen = Counter()
    for drawn_case in drawn(12, 6):
        case = online_case(drawn_case)
        model, rows = tame_target(case), rows_of(case, last=1)
        old, frozen = run_online(collated, case, model, rows, LAYERS), target_frozen(case, model)
        batch = our_batch(case, model, rows)
        zeroed = ours(case, frozen, batch)
        assert old["rows"][0] == zeroed["rows"][0].round() + len(rows)  # none counts as 1e-6
        seen["other losses"] += not torch.equal(old["losses"], zeroed["losses"])
        kept = batch._replace(
            row_mask=torch.nn.utils.rnn.pad_sequence([row.token_mask for row in rows], True)
        )
        padded = len(set(case.lengths)) > 1
        assert (differences(old, ours(case, frozen, kept)) == []) != padded
        seen["padded" if padded else "not padded"] += 1
    print(dict(seen))
    assert min(seen.values()) >= 3, seen


@pytest.mark.parametrize("draft_vocab", [24, 40])
def test_the_old_pruned_logits_fail_below_the_whole_vocabulary(
    online: Oracle, draft_vocab: int
) -> None:
    """Its adapter cuts the logits to D, its model then indexes them with `t2d` `(V,)`."""
    case = Case(draft_vocab=draft_vocab, lengths=(7,))
    model, rows = tame_target(case), rows_of(case, last=0)
    trainer, _ = old_trainer(online, case, model)
    adapter = old_module(online, ADAPTER).SGLangAdapter(
        old_target(online, model, LAYERS), device="cpu", t2d=target_frozen(case, model).t2d
    )
    task = SimpleNamespace(
        payload={"input_ids": rows[0].input_ids, "loss_mask": rows[0].token_mask}
    )
    (tensors,) = adapter.generate_features(
        [task], capture=SimpleNamespace(target_repr="pruned_logits")
    )
    assert tensors["target"].shape == (1, 7, draft_vocab)
    strategy = old_module(online, STRATEGY).Eagle3TrainStrategy(trainer)
    batch = SimpleNamespace(tensors=tensors, metadata={"target_repr": "pruned_logits"})
    if draft_vocab == case.vocab:
        assert torch.isfinite(strategy.forward_loss(batch).loss)
    else:
        with pytest.raises(
            IndexError, match=r"shape of the mask \[40\] .* does not match .* \[1, 7, 24\]"
        ):
            strategy.forward_loss(batch)
