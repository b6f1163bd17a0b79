"""Laws of cutting, alignment, padding and counting."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3fn import specforge
from eagle3fn.base.config import Config
from eagle3fn.base.rows import plan_rows, shift, trained_row_counts
from eagle3fn.base.sections import DataConfig, ObjectiveConfig
from eagle3fn.base.tree import equal
from eagle3fn.base.types import Sample
from eagle3fn.data.collate import align, align_mask, collate, cut, global_row_counts
from eagle3fn.data.samples import needed_tokens
from eagle3fn.model.forward import forward_loss
from eagle3fn.model.table import init_params
from tests.factories import make_config, make_draft, make_frozen, random_sample

MASKS = st.lists(st.integers(0, 1), min_size=1, max_size=12)


@given(MASKS)
@settings(max_examples=60, deadline=None)
def test_serving_trains_rows_whose_next_two_tokens_are_the_assistants(mask):
    rows = align_mask(torch.tensor(mask)).tolist()
    n = len(mask)
    assert rows == [int(t + 2 < n and mask[t + 1] == 1 and mask[t + 2] == 1) for t in range(n)]


@given(MASKS)
@settings(max_examples=60, deadline=None)
def test_specforges_mask_zeroes_the_last_entry_of_a_copy(mask):
    given_mask = torch.tensor(mask)
    assert specforge.align_mask(given_mask).tolist() == [*mask[:-1], 0]
    assert given_mask.tolist() == mask


def test_shift_moves_left():
    assert shift(torch.tensor([[1, 2, 3]])).tolist() == [[2, 3, 0]]


def make_settings(k: int, max_length: int = 64) -> Config:
    """A configuration of `k` unroll steps that keeps `max_length` tokens of a sample."""
    objective = ObjectiveConfig(ttt_length=k)
    return Config(make_draft(4, 50, 20), objective, data=DataConfig(max_length=max_length))


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(3, 8),
    st.integers(1, 5),
    st.sampled_from([align_mask, specforge.align_mask]),
)
@settings(max_examples=40, deadline=None)
def test_collate_by_plain_loops(lengths, max_length, k, align):
    samples = [random_sample(length, seed) for seed, length in enumerate(lengths)]
    batch = collate(samples, make_settings(k, max_length), align)

    width = max(min(length, max_length) for length in lengths)
    zeros = {"aux_hidden": torch.zeros(12), "last_hidden": torch.zeros(4)}
    trained = set()
    labels = set()
    for row, sample in enumerate(samples):
        kept = cut(sample, max_length)
        n = len(kept.input_ids)
        assert n == min(len(sample.input_ids), max_length)
        assert batch.attention_mask[row].tolist() == [1] * n + [0] * (width - n)

        def at(name: str, t: int, kept: Sample = kept, n: int = n) -> Any:
            """A field's value at token `t`; zeros past the end."""
            return getattr(kept, name)[t] if t < n else zeros.get(name, 0)

        # Row t reads entry t + i at step i: token t + i + 1.
        next_ids = [int(at("input_ids", place + 1)) for place in range(width + k - 1)]
        assert batch.next_ids[row].tolist() == next_ids

        # Features are a token's own; a label's state is the next token's.
        for t in range(width):
            assert torch.equal(batch.aux_hidden[row, t].float(), at("aux_hidden", t).float())
            assert torch.equal(batch.label_hidden[row, t].float(), at("last_hidden", t + 1).float())

        # A row is trained at a step if the label that it is scored against is a label.
        first_step = align(kept.token_mask).tolist()
        for i in range(k):
            mask = [first_step[t + i] if t + i < n else 0 for t in range(width)]
            assert batch.row_mask[row, i].tolist() == mask
            for t in range(width):
                if mask[t]:
                    trained.add(row * width + t)
                    labels.add(row * width + t + i)

    assert batch.plan is not None
    assert set(batch.plan.rows.tolist()) == (trained or {0})
    assert set(batch.plan.labels.tolist()) == (labels or {0})
    assert batch.row_counts is None
    assert batch.next_ids.dtype == batch.plan.rows.dtype == torch.int64
    assert batch.aux_hidden.dtype == batch.label_hidden.dtype == torch.bfloat16


def test_align_of_padded_tensors_is_what_collate_makes_but_for_its_plan():
    samples = [random_sample(length, length) for length in (5, 5)]
    fields = [torch.stack(field) for field in zip(*samples, strict=True)]
    input_ids, token_mask, aux_hidden, last_hidden = fields
    row_mask = torch.stack([align_mask(mask) for mask in token_mask])
    ones = torch.ones_like(input_ids)
    aligned = align(input_ids, ones, row_mask, aux_hidden, last_hidden, k=3)
    assert aligned.plan is None
    collated = collate(samples, make_settings(3))
    assert equal(aligned, collated._replace(plan=None))
    assert collated.plan is not None
    assert equal(collated.plan, plan_rows(aligned.row_mask))


@given(st.lists(MASKS, min_size=1, max_size=4), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_counts_are_the_same_for_every_split(masks, k):
    samples = [
        random_sample(len(mask), 0)._replace(token_mask=torch.tensor(mask)) for mask in masks
    ]
    config = make_settings(k)
    whole = collate(samples, config, specforge.align_mask)
    parts = [collate([sample], config, specforge.align_mask) for sample in samples]
    plain = [max(1, sum(sum(mask[:-1][step:]) for mask in masks)) for step in range(k)]
    assert trained_row_counts([whole.row_mask]).tolist() == plain
    assert global_row_counts(parts).tolist() == plain == global_row_counts([whole]).tolist()
    assert global_row_counts(parts).dtype == torch.float32


# What extraction leaves out at the end of a sample


@given(
    st.lists(st.integers(0, 1), min_size=1, max_size=8),
    st.integers(0, 6),
    st.integers(1, 4),
    st.sampled_from([align_mask, specforge.align_mask]),
    st.sampled_from(["plain", "fast"]),
)
@settings(max_examples=30, deadline=None)
def test_tokens_left_out_by_extraction_move_no_bit_of_the_loss(mask, tail, k, align, numerics):
    whole_mask = [*mask, 1, *[0] * tail]
    whole = random_sample(len(whole_mask), tail, vocab=40, hidden=16)
    whole = whole._replace(token_mask=torch.tensor(whole_mask))
    kept = cut(whole, needed_tokens(whole_mask))
    assert len(kept.input_ids) == len(mask) + min(tail + 1, 2)

    # Next to a longer sample, so that the products have the same shapes and round alike.
    config = make_config(ttt_length=k, numerics=numerics)
    params = init_params(config.draft, 3)
    frozen = make_frozen(config)
    longer = random_sample(len(whole_mask) + 1, 9, vocab=40, hidden=16)
    losses = []
    for sample in (whole, kept):
        pair = [each._replace(**_widened(each)) for each in (sample, longer)]
        batch = collate(pair, config, align)
        loss, aux = forward_loss(params, batch, config=config, frozen=frozen)
        losses.append((loss, *aux))
    assert equal(*losses)


def _widened(sample: Sample) -> dict[str, Any]:
    return {name: getattr(sample, name).float() for name in ("aux_hidden", "last_hidden")}


def test_sample_without_a_supervised_token_is_not_cut():
    assert needed_tokens([0, 0, 0]) == 3
