"""Packed rows: several conversations one after another in a row, kept apart by `Batch.starts`.

Loss, metrics and gradients are those of the same samples padded, and of each alone.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import eagle3fn as e3
from eagle3fn import specforge
from eagle3fn.base.errors import UserError
from eagle3fn.base.rows import plan_rows, trained_row_counts
from eagle3fn.base.types import Batch
from eagle3fn.data.collate import FeatureKind
from eagle3fn.model import block_attention
from eagle3fn.model.checks import check_packing
from eagle3fn.model.visibility import Visible
from eagle3fn.testing.builders import (
    Case,
    on,
    tiny_batch,
    tiny_frozen,
    tiny_packed,
    tiny_params,
    tiny_samples,
)
from eagle3fn.testing.results import Result, named
from eagle3fn.testing.strategies import cases
from eagle3fn.train.step import accumulate
from tests.factories import make_config
from tests.model.blocks import error

ROUNDING = 1e-11
FP32 = ("losses", "acceptance")  # metrics that the fast numerics compute in fp32

BOTH = pytest.mark.parametrize("numerics", ["plain", "fast"])
FEW = settings(max_examples=max(12, settings().max_examples // 3))  # each costs several passes


def config_of(case: Case, numerics: str = "plain", **objective: Any) -> e3.Config:
    config = case.config()
    objective = {"numerics": numerics, **objective}
    return replace(config, objective=replace(config.objective, **objective))


def packed_cases(**pins: Any) -> "st.SearchStrategy[Case]":
    """Cases of which no sample's last row is trained: it has no label."""
    pins = {"dtype": "float64", "normalization": "mask", **pins}
    mask = st.sampled_from(["drawn", "drawn", "one", "empty"])
    return cases(**{"mask": mask, **pins}).filter(
        lambda case: case.mask != "one" or max(case.lengths) > 1
    )


def evaluate(case: Case, batches: tuple[Batch, ...], config: e3.Config) -> Result:
    """Loss, metrics and gradients of micro-batches together, on their device."""
    device = str(batches[0].next_ids.device)
    frozen = on(device, tiny_frozen(case))
    loss, aux, gradients = accumulate(on(device, tiny_params(case)), batches, config, frozen)
    return named(loss, aux, gradients)


def assert_near(found: Result, wanted: Result) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        bound = 1e-5 if name in FP32 else ROUNDING
        assert error(found[name], value) < bound, (name, found[name], value)


def draw_survives(data: st.DataObject, case: Case) -> list[Tensor] | None:
    """At how many steps each row takes part; None: at all."""
    if not data.draw(st.booleans(), label="survival"):
        return None
    source = torch.Generator().manual_seed(case.seed)
    shapes = [(length,) for length in case.lengths]
    return [torch.randint(1, case.steps + 1, shape, generator=source) for shape in shapes]


def padded(batch: Batch, survives: list[Tensor] | None) -> Batch:
    """The batch with the rows' numbers of steps."""
    if survives is None:
        return batch
    found = torch.nn.utils.rnn.pad_sequence(survives, batch_first=True)
    return batch._replace(survives=found)


def alone(whole: Batch) -> list[Batch]:
    """Each sample of a padded batch as a batch of its own."""
    return [
        Batch(*(None if field is None else field[number, None] for field in whole))  # pyright: ignore
        for number in range(len(whole.attention_mask))
    ]


@BOTH
@FEW
@given(data=st.data())
def test_packed_rows_are_the_same_samples_padded_and_alone(
    numerics: str, data: st.DataObject
) -> None:
    """Every loss and switch, windows, layers, survival; blocks of any size."""
    case = data.draw(packed_cases())
    survives = draw_survives(data, case)
    config = config_of(case, numerics, survival=1.0 if survives is None else 0.7)
    whole = padded(tiny_batch(case), survives)
    counts = trained_row_counts([whole.row_mask])

    def evaluated(*batches: Batch) -> Result:
        counted = tuple(batch._replace(row_counts=counts) for batch in batches)
        return evaluate(case, counted, config)

    with pytest.MonkeyPatch.context() as patch:
        sizes = {"_BLOCK": [1, 3, 128], "_STRIDE": [1, 4, 64]}
        for name, values in sizes.items():
            patch.setattr(block_attention, name, data.draw(st.sampled_from(values), label=name))
        packed = evaluated(tiny_packed(case, survives=survives))
    assert_near(packed, evaluated(whole))
    assert_near(packed, evaluated(*alone(whole)))


@FEW
@given(data=st.data())
def test_fast_is_plain_on_packed_rows(data: st.DataObject) -> None:
    """Under one or two layers, with a window or without."""
    case = data.draw(packed_cases(steps=st.integers(1, 5)))
    layers = data.draw(st.sampled_from([1, 2]))
    window = data.draw(st.sampled_from([None, case.steps, case.steps + 2]))
    switches = (("num_hidden_layers", layers), ("draft_window", window))
    case = replace(case, switches=switches if window else switches[:1])
    batch = (tiny_packed(case),)
    found = evaluate(case, batch, config_of(case, "fast"))
    assert_near(found, evaluate(case, batch, config_of(case, "plain")))


CASE = Case(dtype="float64", normalization="mask", lengths=(9, 6, 7), steps=3, mask="drawn")


@BOTH
@pytest.mark.parametrize("window", [None, 3, 5])
def test_what_keeps_conversations_apart_is_seen_by_the_laws(
    numerics: str, window: int | None
) -> None:
    """Control: without `starts`, or with positions that go on, the loss is another."""
    case = CASE if window is None else replace(CASE, switches=(("draft_window", window),))
    config = config_of(case, numerics)
    batch = tiny_packed(case)
    wanted = evaluate(case, (batch,), config)["loss"]
    joined = batch._replace(starts=None, plan=None)
    later = batch.position_ids.flip(1)  # pyright: ignore[reportOptionalMemberAccess]
    for other in (joined, batch._replace(position_ids=later)):
        assert error(evaluate(case, (other,), config)["loss"], wanted) > 1e-5


@BOTH
@FEW
@given(data=st.data())
def test_no_conversation_reaches_anothers_loss(
    numerics: str, device: str, data: st.DataObject
) -> None:
    """Exactly: gradients by other conversations' features are zero, and other contents of them,
    tokens too, don't change a bit of loss and gradients.
    """
    case = data.draw(packed_cases(mask="drawn", dtype="float32"))
    assume(len(case.lengths) > 1)
    number = data.draw(st.integers(0, len(case.lengths) - 1))
    config = config_of(case, numerics)
    samples = tiny_samples(case)
    others = tiny_samples(case, 1)
    mixed = [each if place == number else others[place] for place, each in enumerate(samples)]

    def of_one(chosen: list[e3.Sample]) -> Batch:
        """The packed row of which one conversation is trained."""
        masked = [
            each if place == number else each._replace(token_mask=torch.zeros_like(each.token_mask))
            for place, each in enumerate(chosen)
        ]
        batch = e3.collate_packed(masked, config, align_mask=lambda mask: mask)
        return on(device, batch)

    batch = of_one(samples)
    params = on(device, tiny_params(case))
    frozen = on(device, tiny_frozen(case))

    def loss(aux_hidden: Tensor) -> Tensor:
        changed = batch._replace(aux_hidden=aux_hidden)
        return e3.forward_loss(params, changed, config=config, frozen=frozen)[0]

    _, slope = e3.value_and_grad(loss)(batch.aux_hidden)
    length = case.lengths[number]
    start = sum(case.lengths[:number])
    own = torch.zeros(slope.shape[1], dtype=torch.bool, device=device)
    own[start : start + length] = True
    assert slope[0, ~own].abs().sum() == 0
    assert slope.isfinite().all()

    found = evaluate(case, (of_one(mixed),), config)
    wanted = evaluate(case, (batch,), config)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def test_what_is_trained_does_reach_its_own_features() -> None:
    """The gradients that are zero elsewhere are not zero here."""
    case = replace(CASE, tokens="inside", draft_vocab=40)
    batch = tiny_packed(case)
    config = config_of(case)

    def loss(aux_hidden: Tensor) -> Tensor:
        changed = batch._replace(aux_hidden=aux_hidden)
        return e3.forward_loss(tiny_params(case), changed, config=config, frozen=tiny_frozen(case))[
            0
        ]

    _, slope = e3.value_and_grad(loss)(batch.aux_hidden)
    trained = batch.row_mask[0, 0] > 0
    assert trained.any() and (slope[0, trained].abs().sum(-1) > 0).all()


def test_a_longer_row_than_the_draft_has_positions() -> None:
    """Packed conversations each fit `max_position_embeddings`; their row need not."""
    case = replace(CASE, lengths=(30, 30, 30))
    config = config_of(case, "fast")
    batch = tiny_packed(case)
    assert batch.aux_hidden.shape[1] > config.draft.max_position_embeddings
    whole = tiny_batch(case)
    assert_near(evaluate(case, (batch,), config), evaluate(case, (whole,), config))

    short = replace(config, draft=replace(config.draft, max_position_embeddings=29))
    with pytest.raises(UserError, match=r"sequence length 30 is beyond .* = 29"):
        evaluate(case, (batch,), short)


# Blocks of attention.


def test_a_block_has_no_keys_of_conversations_before_its_rows() -> None:
    """A block is of one conversation."""
    lengths = [300, 40, 40, 40, 300, 20, 700]
    starts = torch.cat([torch.full((n,), sum(lengths[:i])) for i, n in enumerate(lengths)])
    rows = torch.arange(len(starts))
    seen = Visible(first=starts, last=rows)
    cut = block_attention.make_blocks(rows, len(rows), seen).cut
    for block in cut:
        own = starts[block.start : block.stop]
        assert own.unique().tolist() == [block.begin]
        assert block.end - int(rows[block.stop - 1]) <= block_attention._STRIDE
    assert len(cut) == sum(-(-n // block_attention._BLOCK) for n in lengths)


# The batch.


def samples_of(*lengths: int) -> list[e3.Sample]:
    source = torch.Generator().manual_seed(sum(lengths))
    samples = []
    for n in lengths:
        sample = e3.Sample(
            input_ids=torch.randint(1, 40, (n,), generator=source),
            token_mask=torch.randint(0, 2, (n,), generator=source),
            aux_hidden=torch.randn(n, 12, generator=source),
            last_hidden=torch.randn(n, 4, generator=source),
        )
        samples.append(sample)
    return samples


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), k=st.integers(1, 5))
def test_packed_samples_are_laid_one_after_another(lengths: list[int], k: int) -> None:
    """By loops over places and steps; samples are cut first."""
    most = 6
    config = replace(make_config(ttt_length=k), data=e3.DataConfig(max_length=most))
    samples = samples_of(*lengths)
    survives = [torch.arange(n) % k + 1 for n in lengths]
    batch = e3.collate_packed(samples, config, survives=survives)
    assert batch.starts is not None and batch.position_ids is not None
    assert batch.survives is not None

    ids = [token for sample in samples for token in sample.input_ids[:most].tolist()]
    ids += [0] * k
    place = 0
    for sample, steps in zip(samples, survives, strict=True):
        n = min(len(sample.input_ids), most)
        mask = e3.align_mask(sample.token_mask[:most]).tolist() + [0] * k
        start = place
        for t in range(n):
            assert batch.next_ids[0, place : place + k].tolist() == ids[place + 1 : place + 1 + k]
            assert batch.row_mask[0, :, place].tolist() == mask[t : t + k]
            assert torch.equal(batch.aux_hidden[0, place], sample.aux_hidden[t])
            label = batch.label_hidden[0, place]
            if t < n - 1:
                assert torch.equal(label, sample.last_hidden[t + 1])
            else:
                assert label.count_nonzero() == 0
            assert int(batch.position_ids[0, place]) == t
            assert int(batch.starts[0, place]) == start
            assert int(batch.survives[0, place]) == int(steps[t])
            place += 1
    assert batch.attention_mask.tolist() == [[1] * place]

    plan = batch.plan
    assert plan is not None and plan.bounds is not None and plan.lengths is not None
    wanted = [min(n, most) for n in lengths]
    assert plan.lengths.tolist() == wanted
    assert plan.bounds.tolist() == [sum(wanted[:i]) for i in range(len(wanted) + 1)]
    assert plan.bounds.dtype == torch.int32


@BOTH
def test_no_sample_is_a_batch_that_trains_nothing(numerics: str) -> None:
    """Added to another batch it changes nothing of loss, gradients and counts."""
    config = config_of(CASE, numerics)
    like = FeatureKind(3 * 16, 16, torch.float64)
    batch = tiny_packed(CASE)
    counts = trained_row_counts([batch.row_mask])
    empty = e3.collate_packed([], config, like=like)
    assert empty.attention_mask.sum() == empty.row_mask.sum() == 0
    both = tuple(each._replace(row_counts=counts) for each in (batch, empty))
    found = evaluate(CASE, both, config)
    wanted = evaluate(CASE, both[:1], config)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []

    tuple_form = e3.collate_packed([], config, like=(3 * 16, 16, torch.float64))
    assert torch.equal(tuple_form.aux_hidden, empty.aux_hidden)


# Refusals.


def forward(case: Case, batch: Batch, **objective: Any) -> Tensor:
    config = config_of(case, **objective)
    return e3.forward_loss(tiny_params(case), batch, config=config, frozen=tiny_frozen(case))[0]


def test_packed_rows_are_refused_where_they_have_no_meaning() -> None:
    batch = tiny_packed(CASE)
    assert forward(CASE, batch) > 0
    with pytest.raises(UserError, match=r"normalization = 'rows' with batch\.starts: .*'mask'"):
        forward(CASE, batch, normalization="rows")
    with pytest.raises(UserError, match=r"batch\.position_ids is missing: with batch\.starts"):
        forward(CASE, batch._replace(position_ids=None))
    unpacked = plan_rows(batch.row_mask)
    with pytest.raises(UserError, match=r"batch\.plan is not of batch\.starts"):
        forward(CASE, batch._replace(plan=unpacked))
    with pytest.raises(UserError, match=r"batch\.starts has shape"):
        forward(CASE, batch._replace(starts=torch.zeros(1, 3, dtype=torch.int64)))
    with pytest.raises(UserError, match=r"batch\.starts: SpecForge's arithmetic has no packed"):
        config = config_of(CASE)
        specforge.forward_loss(tiny_params(CASE), batch, config=config, frozen=tiny_frozen(CASE))


def test_packing_is_refused_before_a_run_begins() -> None:
    config = config_of(CASE, normalization="rows")
    packing = replace(config, data=e3.DataConfig(pack_tokens=2048))
    check_packing(config)
    with pytest.raises(UserError, match=r"'rows' with data\.pack_tokens = 2048"):
        e3.bind(packing, tiny_frozen(CASE))

    by_mask = replace(packing, objective=replace(packing.objective, normalization="mask"))
    e3.bind(by_mask, tiny_frozen(CASE))
    with pytest.raises(UserError, match=r"pack_tokens = 2048 under a recipe whose losses"):
        e3.bind(by_mask, tiny_frozen(CASE), recipe=specforge.RECIPE)
