"""Laws of cutting, alignment, padding and counting."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3fn import specforge
from eagle3fn.base.rows import shift, trained_row_counts
from eagle3fn.data.collate import align_mask, collate, cut, global_row_counts
from tests.factories import random_sample

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


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(3, 8),
    st.sampled_from([align_mask, specforge.align_mask]),
)
@settings(max_examples=40, deadline=None)
def test_collate_by_plain_loops(lengths, max_length, align):
    samples = [random_sample(length, seed) for seed, length in enumerate(lengths)]
    batch = collate(samples, max_length, align)
    width = max(min(length, max_length) for length in lengths)
    for row, sample in enumerate(samples):
        kept = cut(sample, max_length)
        n = len(kept.input_ids)
        assert n == min(len(sample.input_ids), max_length)
        assert batch.attention_mask[row].tolist() == [1] * n + [0] * (width - n)
        assert batch.row_mask[row].tolist() == align(kept.token_mask).tolist() + [0] * (width - n)
        for name in ("input_ids", "aux_hidden", "last_hidden"):
            field = getattr(batch, name)[row]
            assert torch.equal(field[:n], getattr(kept, name)) and not field[n:].any()
    assert (
        batch.row_counts is None
        and batch.input_ids.dtype == torch.int64
        and batch.aux_hidden.dtype == torch.bfloat16
    )


@given(st.lists(MASKS, min_size=1, max_size=4), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_counts_are_the_same_for_every_split(masks, steps):
    samples = [
        random_sample(len(mask), 0)._replace(token_mask=torch.tensor(mask)) for mask in masks
    ]
    whole = collate(samples, 64, specforge.align_mask)
    parts = [collate([sample], 64, specforge.align_mask) for sample in samples]
    plain = [max(1, sum(sum(mask[:-1][step:]) for mask in masks)) for step in range(steps)]
    assert trained_row_counts([whole.row_mask], steps).tolist() == plain
    assert (
        global_row_counts(parts, steps).tolist()
        == plain
        == global_row_counts([whole], steps).tolist()
    )
    assert global_row_counts(parts, steps).dtype == torch.float32
