"""Laws of the sample order and the batch generator."""

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.base.sections import DataConfig, ObjectiveConfig, TrainConfig
from eagle3fn.data.collate import align_mask
from eagle3fn.data.features import open_features, read_sample
from eagle3fn.data.order import shuffled_number
from eagle3fn.data.pipeline import batches, split
from tests.factories import make_draft, random_sample, write_folder

DRAFT = make_draft(
    4, 50, 20, intermediate_size=8, num_attention_heads=1, num_key_value_heads=1, head_dim=4
)


def config(global_batch=4, micro_batch=2, seed=3, survival=1.0):
    data = DataConfig(max_length=6, global_batch=global_batch, micro_batch=micro_batch)
    objective = ObjectiveConfig(ttt_length=3, survival=survival)
    return Config(DRAFT, objective, data=data, train=TrainConfig(seed=seed))


def order(n, seed, epoch):
    """An epoch's order, as when the first runs were trained: a resumed run needs it again."""
    return torch.randperm(
        n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    ).tolist()


def sample_indices(n, size, seed, step):
    """The numbers of a step's places."""
    return [shuffled_number(n, seed, place) for place in range(step * size, (step + 1) * size)]


@given(st.integers(1, 40), st.integers(0, 99), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_an_epoch_holds_every_sample_once(n, seed, epoch):
    chosen = sample_indices(n, n, seed, epoch)
    assert sorted(chosen) == list(range(n))
    assert chosen == sample_indices(n, n, seed, epoch)


def test_seed_and_epoch_change_the_order():
    orders = {tuple(sample_indices(30, 30, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


@given(st.integers(1, 12), st.integers(1, 7), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_steps_cut_the_epochs_laid_end_to_end(n, size, seed):
    stream = [place for step in range(2 * n) for place in sample_indices(n, size, seed, step)]
    epochs = [place for epoch in range(2 * size) for place in order(n, seed, epoch)]
    assert stream == epochs


def in_stored_order(n, config, place):
    """An order as a caller may give it: the samples one after the other, again and again."""
    return place % n


def test_batches_follow_the_order(folder):
    made = batches(folder, [1, 3, 4], config(2, 1), 0, 3, order=in_stored_order)
    found = [batch.aux_hidden[0] for micro in made for batch in micro]
    for place, aux_hidden in zip([1, 3, 4, 1, 3, 4], found, strict=True):
        assert torch.equal(aux_hidden, read_sample(folder, place).aux_hidden[:6])


@pytest.fixture
def folder(tmp_path):
    return open_features(write_folder(tmp_path / "f", [random_sample(5 + i, i) for i in range(7)]))


def assert_same(left, right):
    """Two batches, their plans and what was drawn for them."""
    names = [".".join(map(str, path)) for path in optree.tree_paths(left)]
    pairs = zip(optree.tree_leaves(left), optree.tree_leaves(right), strict=True)
    for name, (a, b) in zip(names, pairs, strict=True):
        assert a.tolist() == b.tolist(), name


@pytest.mark.parametrize("survival", [1.0, 0.5])
def test_a_resumed_generator_gives_the_same_suffix(folder, survival):
    train, _ = split(7, 2)
    chosen = config(survival=survival)
    whole = list(batches(folder, train, chosen, 0, 5))
    resumed = list(batches(folder, train, chosen, 2, 5))
    assert len(whole) == 5 and len(resumed) == 3
    for left, right in zip(whole[2:], resumed, strict=True):
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("survival", [1.0, 0.5])
def test_ranks_share_the_micro_batches_of_one_rank(folder, survival):
    """What a row survives to does not depend on the rank that its sample is on."""
    train, _ = split(7, 2)
    chosen = config(survival=survival)
    for step in range(4):
        (alone,) = batches(folder, train, chosen, step, step + 1)
        shared = [*batches(folder, train, chosen, step, step + 1, rank=0, world=2)]
        shared += batches(folder, train, chosen, step, step + 1, rank=1, world=2)
        for one, (same,) in zip(alone, shared, strict=True):
            assert (one.survives is None) == (survival == 1.0)
            assert_same(one, same)


def test_micro_batches_hold_the_steps_samples_and_its_global_counts(folder):
    chosen = [[0, 2, 4, 5, 6][place] for place in sample_indices(5, 4, 3, 1)]
    (first, second), *_ = batches(folder, [0, 2, 4, 5, 6], config(), 1, 2)
    samples = [read_sample(folder, number) for number in chosen]
    rows = []
    for batch in (first, second):
        rows += zip(batch.aux_hidden, batch.attention_mask, strict=True)
    for sample, (aux_hidden, real) in zip(samples, rows, strict=True):
        assert torch.equal(aux_hidden[real == 1], sample.aux_hidden[:6])

    masks = [align_mask(s.token_mask[:6]) for s in samples]
    wanted = [max(1, sum(int(mask[step:].sum()) for mask in masks)) for step in range(3)]
    assert first.row_counts is not None and second.row_counts is not None
    assert first.row_counts.tolist() == second.row_counts.tolist() == wanted


def test_nothing_to_train_on_is_refused(folder):
    with pytest.raises(UserError, match=r"no samples to train on.*held_out"):
        next(batches(folder, [], config(), 0, 1))
    with pytest.raises(UserError, match=r"held_out = 7.*below"):
        split(7, 7)
    with pytest.raises(UserError, match=r"held_out = -1: must be 0 or more"):
        split(7, -1)


def test_split_holds_out_the_last():
    assert split(5, 2) == ([0, 1, 2], [3, 4])
    assert split(2, 0) == ([0, 1], [])
