"""What the fast step keeps alive, in bytes of storage; and the bits of what it does in place."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import eagle3fn as e3
from eagle3fn.model import head_loss, table
from eagle3fn.model.losses import LOSSES
from eagle3fn.model.named_loss import find_loss
from eagle3fn.testing.strategies import LOSS_SUMS
from eagle3fn.train import optimizer
from tests.model.blocks import H, batch_of, config_of, frozen_of, vjp
from tests.peak import Peak

# Two draft vocabularies, and a hidden size that makes the head outweigh all else: K·D is far
# below D·H.
V = 4096
DRAFT_VOCABULARIES = (1024, 4096)
WIDTH = 4 * H


def problem(d, dtype="float32"):
    """Functions, parameters and batch of the wide draft with a draft vocabulary of `d`."""
    kind = getattr(torch, dtype)
    config = config_of(dtype, "fast", V, d, ttt_length=2)
    draft = replace(config.draft, hidden_size=WIDTH, target_hidden_size=WIDTH)

    def widen(x):
        return x.repeat(*[1] * (x.ndim - 1), WIDTH // H)

    frozen = frozen_of(V, d)
    assert frozen.embed_tokens is not None
    frozen = frozen._replace(
        embed_tokens=widen(frozen.embed_tokens), target_head=widen(frozen.target_head)
    )
    fns = e3.bind(replace(config, draft=draft), frozen)
    batch = batch_of(5, [12, 9], V)
    batch = batch._replace(
        aux_hidden=widen(batch.aux_hidden).to(kind),
        last_hidden=widen(batch.last_hidden).to(kind),
    )
    return fns, fns.init(0), batch.aligned(2)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(head_loss, "_CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(head_loss, "_GROUP_BYTES", 1 << 14)
    monkeypatch.setattr(optimizer, "_BLOCK_BYTES", 1 << 13)


@pytest.mark.parametrize("part", ["gradient", "step"])
def test_memory_beyond_the_gradients_is_flat_in_the_draft_vocabulary(part, small_parts):
    """One more tensor of the head's size would be seen: it grows by twice the bound."""
    beyond = []
    for d in DRAFT_VOCABULARIES:
        fns, params, batch = problem(d)
        state = fns.init_state(params)
        evaluate = e3.value_and_grad(lambda x, f=fns, b=batch: f.forward_loss(x, b)[0])
        with Peak() as peak:
            if part == "gradient":
                evaluate(params)
            else:
                fns.step(state, batch, donate=True)
        gradients = 4 * sum(leaf.numel() for leaf in params.values())
        beyond.append(peak.most - gradients)

    small, large = DRAFT_VOCABULARIES
    assert beyond[1] - beyond[0] < (large - small) * WIDTH * 4 / 2


@pytest.mark.parametrize("loss_name", [*LOSSES, *LOSS_SUMS], ids=str)
def test_a_group_of_labels_leaves_nothing_to_the_next(loss_name, monkeypatch):
    """The scores of three groups take the memory of one, and their own metrics."""
    pairs, p, v, d = 2, 8, 600, 512  # pairs of a label, labels of a group
    group = 4 * pairs * p * d
    monkeypatch.setattr(head_loss, "_GROUP_BYTES", group)
    loss = find_loss(e3.ObjectiveConfig(loss=loss_name))
    t2d = torch.arange(v) < d

    most = []
    for groups in (1, 3):
        count = groups * p
        logits = torch.zeros(count * pairs, d, dtype=torch.bfloat16)
        z = torch.zeros(count, v, dtype=torch.bfloat16)
        label = torch.arange(count).repeat_interleave(pairs)
        first = np.arange(count + 1) * pairs
        with Peak() as peak:
            head_loss.score(logits, z, label, first, t2d, torch.arange(d), loss)
        most.append(peak.most)
    assert group < most[0]
    assert most[1] - most[0] < group / 2


def test_a_pull_back_scales_and_repeats_bit_for_bit():
    fns, params, batch = problem(1024)

    def loss(x):
        return fns.forward_loss(x, batch)[0]

    value, pull_back = vjp(loss, params)
    (first,) = pull_back(torch.ones_like(value))
    (second,) = pull_back(torch.ones_like(value))
    (twice,) = pull_back(torch.full_like(value, 2.0))
    _, alone = e3.value_and_grad(loss)(params)
    for name, gradient in first.items():
        assert gradient.abs().sum() > 0
        assert torch.equal(gradient, second[name])
        assert torch.equal(gradient, alone[name])
        assert torch.equal(2 * gradient, twice[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_of_leaves_change_no_bit_of_a_step(dtype, monkeypatch):
    fns, params, batch = problem(1024, dtype)
    whole, _ = fns.step(fns.init_state(params), batch, donate=True)

    monkeypatch.setattr(optimizer, "_BLOCK_BYTES", 1 << 9)
    monkeypatch.setattr(head_loss, "_CHUNK_BYTES", 1 << 30)
    kept, _ = fns.step(fns.init_state(params), batch)
    donated, _ = fns.step(fns.init_state(params), batch, donate=True)
    for name, leaf in kept.masters.items():
        assert torch.equal(leaf, donated.masters[name])
        assert torch.equal(leaf, whole.masters[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_heads_gradient_is_added_in_parts(dtype, monkeypatch):
    """Parts of seven rows sum to the product; every call is for the whole head."""
    fns, params, batch = problem(1024, dtype)
    add_product = head_loss._add_product
    heights = []

    def in_parts(out, a, b, max_bytes):
        before = out.clone()
        add_product(out, a, b, 7 * b.shape[1] * b.itemsize)
        heights.append(len(out))
        product = (a.double().T @ b.double()).float()
        assert torch.allclose(out - before, product, rtol=2**-7, atol=1e-4)

    monkeypatch.setattr(head_loss, "_CHUNK_BYTES", 1 << 30)
    monkeypatch.setattr(head_loss, "_add_product", in_parts)
    fns.step(fns.init_state(params), batch)
    assert set(heights) == {len(params[table.HEAD])}
