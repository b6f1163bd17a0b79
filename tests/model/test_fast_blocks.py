"""The fast numerics where its work is cut: blocks of attention, chunks and groups of labels.

Also each part alone against its plain expression, and rows, labels and padding.
"""

from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import eagle3fn as e3
from eagle3fn import specforge
from eagle3fn.base.rows import over_steps, plan_rows
from eagle3fn.base.tree import named_leaves
from eagle3fn.base.types import Sample
from eagle3fn.data.collate import align_mask, collate
from eagle3fn.model import block_attention as attention
from eagle3fn.model import fast, fused_layers, head_loss, table
from eagle3fn.model.losses import LOSSES
from eagle3fn.model.named_loss import find_loss
from eagle3fn.model.unroll import Rows, unroll
from eagle3fn.model.visibility import Visible
from eagle3fn.testing.strategies import LOSS_SUMS
from tests.model.blocks import (
    HEAD_SIZE,
    HEADS,
    KV_HEADS,
    H,
    assert_fast_is_plain,
    batch_of,
    case_of,
    config_of,
    error,
    frozen_of,
    plain_attention,
    run,
    vjp,
)

# V, D: multiples of 64 and not, D = V.
PAIRS = [(130, 64), (192, 128), (128, 128), (100, 100), (150, 70)]

NAMES = [*LOSSES, *LOSS_SUMS]

# Relative error of the logits against fp64 on rounded inputs, in the norm over all rows: a single
# wrong row would be seen, and a row that cancels has no large part.
LOGIT = {"float32": 5e-7, "bfloat16": 0.015}


# Where the work is cut.


def blocks_of(rows, s):
    """Blocks of rows `b·S + t` that see every key up to their own place."""
    return attention.make_blocks(rows, s, Visible(first=None, last=rows % s))


def two_runs(rows_of_second):
    """Two runs of trained rows in 300 tokens, and a second sample of 210 with these rows."""
    mask = torch.zeros(2, 300, dtype=torch.int64)
    mask[0, 20:150] = 1
    mask[0, 180:280] = 1
    mask[1, rows_of_second] = 1
    return mask


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("second", [[], [100], [209]])
def test_rows_of_several_blocks(k, second):
    batch = batch_of(1, (300, 210), 130, two_runs(second))
    rows = plan_rows(over_steps(batch.row_mask, k)).rows
    assert len(blocks_of(rows, 300).cut) == 2 + bool(second)
    assert_fast_is_plain(batch, (130, 64), ttt_length=k)


@given(st.data())
def test_any_size_of_blocks_chunks_and_groups(data):
    pair = data.draw(st.sampled_from(PAIRS))
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    batch = batch_of(data.draw(st.integers(0, 10**6)), lengths, pair[0])
    blocks = {
        "_BLOCK": data.draw(st.sampled_from([1, 3, 8])),
        "_STRIDE": data.draw(st.sampled_from([1, 4, 64])),
    }
    chunks = {
        "_CHUNK_BYTES": data.draw(st.sampled_from([1, 1 << 13, 1 << 15])),
        "_GROUP_BYTES": data.draw(st.sampled_from([1, 1 << 12, 1 << 14])),
    }
    k = data.draw(st.integers(1, 7))
    with mock.patch.multiple(attention, **blocks), mock.patch.multiple(head_loss, **chunks):
        assert_fast_is_plain(batch, pair, ttt_length=k, loss=data.draw(st.sampled_from(NAMES)))


@pytest.mark.parametrize("pair", PAIRS)
def test_chunks_hold_as_many_logits_and_groups_as_many_pairs(pair):
    v, d = pair
    k = 3
    batch = batch_of(2, (30, 17), v)
    plan = plan_rows(over_steps(batch.row_mask, k))
    every = 8 * (len(plan.label) * d + len(plan.labels) * v)  # bytes of all logits
    sizes = {"_CHUNK_BYTES": every // 5, "_GROUP_BYTES": 8 * d * 7}
    with (
        mock.patch.multiple(head_loss, **sizes),
        mock.patch.object(head_loss, "score", wraps=head_loss.score) as score,
        mock.patch.object(head_loss, "first_max", wraps=head_loss.first_max) as maximum,
    ):
        run(batch, pair, "fast", ttt_length=k)
        assert 5 <= score.call_count <= 7
        for call in score.call_args_list:
            logits, z = call.args[:2]
            assert 8 * (logits.numel() + z.numel()) <= 2 * every // 5
        # Of each group the teacher's argmax and the draft's.
        assert maximum.call_count >= 2 * len(plan.label) / 7
        assert all(len(call.args[0]) <= 7 for call in maximum.call_args_list)
        assert_fast_is_plain(batch, pair, ttt_length=k)


@given(st.data())
def test_chunks_are_all_labels_once_and_about_equal(data):
    pairs = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=30))
    first = np.cumsum([0, *pairs])
    head = torch.empty(data.draw(st.integers(1, 40)), 1)
    target_head = torch.empty(data.draw(st.integers(1, 90)), 1)
    most = data.draw(st.integers(1, 20_000))
    chunks = head_loss._chunks(first, head, target_head, most)
    assert [label for begin, end in chunks for label in range(begin, end)] == [*range(len(pairs))]
    label_bytes = 4 * (7 * len(head) + len(target_head))  # at most
    for begin, end in chunks:
        held = 4 * ((first[end] - first[begin]) * len(head) + (end - begin) * len(target_head))
        assert begin < end
        assert held <= most + label_bytes


@given(st.integers(0, 10**6), st.sampled_from([64, 128, 192, 60, 1]))
def test_first_max_picks_the_lowest_index_of_ties(seed, d):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 4, (5, 3, d), generator=generator).double()
    top, place = head_loss.first_max(x)
    columns = torch.arange(d).expand_as(x)
    assert torch.equal(top, x.amax(-1))
    assert torch.equal(place, torch.where(x == top[..., None], columns, d).amin(-1))


# Rows and labels.


def test_the_plan_of_the_documented_example():
    """The table in `RowPlan`'s docstring."""
    mask = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 0]])
    plan = plan_rows(over_steps(mask, 3))
    assert plan.rows.tolist() == [0, 1, 4, 2, 5, 3, 6]
    assert plan.sizes.tolist() == [7, 5, 3]
    assert plan.labels.tolist() == [2, 3, 6]

    rows = plan.rows[plan.row].tolist()
    labels = plan.labels[plan.label].tolist()
    pairs = {*zip(plan.step.tolist(), rows, labels, strict=True)}
    assert pairs == {
        *((0, 2, 2), (0, 3, 3), (0, 6, 6)),
        *((1, 1, 2), (1, 2, 3), (1, 5, 6)),
        *((2, 0, 2), (2, 1, 3), (2, 4, 6)),
    }


# Each part alone.


def plain_norm(x, weight, eps=1e-5):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def plain_swiglu(x):
    gate, up = x.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def plain_mlp(x, weight, gate_up, down):
    return x + plain_swiglu(plain_norm(x, weight) @ gate_up.T) @ down.T


def plain_loss(draft, head, pairs, target_head, t2d, loss):
    z = (pairs.target @ target_head.T)[pairs.label]
    logits = (draft @ head.T)[pairs.row]
    p_draft = torch.softmax(z[:, t2d], -1)
    p_full = torch.softmax(z, -1)[:, t2d]
    return (pairs.weight * loss.value(logits, p_draft, p_full) * t2d[z.argmax(-1)]).sum()


def part_of(name, generator):
    """A fast part, its plain expression, and the fp64 inputs of both."""

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if name.startswith("attention"):
        later = int(name[-1])
        s = 40
        mask = (torch.rand(2, s, generator=generator) < 0.6).long()
        rows = mask.flatten().nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        blocks = blocks_of(rows, s)
        assert len(blocks.cut) >= 6
        step_keys = draw(later, len(rows), KV_HEADS, HEAD_SIZE)
        step_values = draw(later, len(rows), KV_HEADS, HEAD_SIZE)
        q = draw(len(rows), HEADS, HEAD_SIZE)
        key = draw(2, s, KV_HEADS, HEAD_SIZE)
        value = draw(2, s, KV_HEADS, HEAD_SIZE)
        return (
            lambda *x: attention.block_attention(*x, blocks=blocks),
            lambda *x: plain_attention(*x, rows=rows),
            (q, key, value, step_keys, step_values),
        )
    if name == "norm":
        return (
            lambda x, w: fused_layers.fused_rms_norm(x, w, 1e-5),
            plain_norm,
            (draw(3, 5, H), draw(H)),
        )
    if name == "norm and linear":
        place = torch.tensor([8, 0, 3, 3, 5, 6, 1])
        return (
            lambda x, w, m, y: fused_layers.norm_linear(x, w, m, y, place, 1e-5),
            lambda x, w, m, y: y[place] + plain_norm(x, w) @ m.T,
            (draw(7, H), draw(H), draw(5, H), draw(9, 5)),
        )
    if name == "mlp":
        return (
            lambda x, w, g, d: fused_layers.mlp(x, w, g, d, 1e-5),
            plain_mlp,
            (draw(7, H), draw(H), draw(2 * 9, H), draw(H, 9)),
        )

    v, d, p = 130, 64, 17
    frozen = frozen_of(v, d)
    t2d = frozen.t2d
    target_head = frozen.target_head.double()
    count = torch.randint(1, 4, (p,), generator=generator)  # pairs of each label
    x = int(count.sum())
    label = torch.arange(p).repeat_interleave(count)
    row = torch.randperm(x + 3, generator=generator)[:x]  # three rows are not scored
    weight = draw(x).abs() * (torch.rand(x, generator=generator) < 0.7)
    first = np.cumsum([0, *count.tolist()])
    pairs = head_loss.Pairs(draw(p, H), label, row, weight, first)
    loss = find_loss(e3.ObjectiveConfig(loss=name))

    def head_and_loss(x, head):
        return head_loss.head_and_loss(x, head, pairs, target_head, t2d, frozen.d2t, loss).loss

    return (
        head_and_loss,
        lambda x, head: plain_loss(x, head, pairs, target_head, t2d, loss),
        (draw(x + 3, H), draw(d, H)),
    )


PARTS = ["attention 0", "attention 1", "attention 3", "norm", "norm and linear", "mlp", *LOSSES]


@pytest.mark.parametrize("name", PARTS)
def test_a_part_equals_its_plain_expression(name, monkeypatch):
    """Value and gradients, also under `vmap`; a second derivative by any input raises."""
    monkeypatch.setattr(attention, "_BLOCK", 8)
    monkeypatch.setattr(head_loss, "_CHUNK_BYTES", 8 * (3 * 64 + 130) * 5)
    monkeypatch.setattr(head_loss, "_GROUP_BYTES", 8 * 3 * 64 * 2)
    generator = torch.Generator().manual_seed(3)
    part, plain, inputs = part_of(name, generator)

    out, pull_back = vjp(part, *inputs)
    want, want_pull_back = vjp(plain, *inputs)
    assert torch.allclose(out, want, rtol=1e-11, atol=1e-13)
    grad = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(pull_back(grad), want_pull_back(grad), strict=True):
        assert error(a, b) < 1e-12

    def gradient(f, *x):
        return vjp(f, *x)[1](grad)

    stacked = [torch.stack([x, x.flip(0) / 2]) for x in inputs]
    mapped = torch.func.vmap(lambda *x: gradient(part, *x))(*stacked)
    for i in range(2):
        for a, b in zip(mapped, gradient(plain, *(x[i] for x in stacked)), strict=True):
            assert error(a[i], b) < 1e-12

    for at, x in enumerate(inputs):
        if not x.numel():
            continue

        def slope(y, at=at):
            return gradient(part, *inputs[:at], y, *inputs[at + 1 :])[at].sum()

        with pytest.raises(RuntimeError, match=r"once.*objective\.numerics = 'plain'"):
            torch.func.grad(slope)(x)


# Low precision.


def logits_of(batch, pair, dtype, rounding, k):
    """Draft logits of every row `(K, B·S, D)` and target logits of the labels `(P, V)`."""
    config, frozen, params, batch = case_of(batch, pair, dtype, "fast", rounding, ttt_length=k)
    eps = config.draft.rms_norm_eps
    hidden = states_of(config, frozen, params, batch)
    draft = fused_layers.fused_rms_norm(hidden, params[table.NORM], eps)
    labels = batch.row_mask[:, 0].flatten().nonzero()[:, 0]
    z = F.linear(batch.label_hidden.flatten(0, 1)[labels], frozen.target_head)
    return F.linear(draft, params[table.HEAD]), z


def states_of(config, frozen, params, batch):
    """The fast hidden states of every row, `(K, B·S, H)`."""
    _, k, _ = batch.row_mask.shape
    every = torch.arange(batch.attention_mask.numel())
    rows = Rows(every, [len(every)] * k)
    return torch.stack([*unroll(params, batch, rows, config, frozen, fast.FAST)])


def near_ties(batch, exact, low, unit, k):
    """Rows at each step `(K,)` whose draft or target has two largest logits within the row's error.

    The error in `low` may swap them.
    """
    s = batch.row_mask.shape[1]
    labels = batch.row_mask.flatten().nonzero()[:, 0]

    def near(x, y):
        top = x.topk(2, dim=-1).values
        bound = (x - y).abs().amax(-1)
        bound = bound + unit * x.abs().amax(-1)  # another order of sums rounds the last bit anew
        return top[..., 0] - top[..., 1] <= 2 * bound

    draft_near, target_near = (near(x, y) for x, y in zip(exact, low, strict=True))
    counts = []
    for i in range(k):
        scored = labels % s >= i
        counts.append((draft_near[i, (labels - i)[scored]] | target_near[scored]).sum())
    return torch.stack(counts)


def agreeing(batch, pair, dtype, k):
    """The batch with a teacher that mostly agrees with the draft's first step."""
    config, frozen, params, wide = case_of(batch, pair, "float64", "fast", dtype, ttt_length=k)
    hidden = states_of(config, frozen, params, wide)[0]
    draft = plain_norm(hidden, params[table.NORM], config.draft.rms_norm_eps)
    noise = batch.last_hidden.to(getattr(torch, dtype)).double()
    near = draft.view_as(noise).roll(1, 1) + 0.2 * noise
    return batch._replace(last_hidden=near.float() * batch.attention_mask[..., None])


@pytest.mark.parametrize("pair", [(128, 128), (150, 70)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss_name", NAMES, ids=str)
def test_low_precision_is_as_near_to_fp64_as_plain(loss_name, dtype, pair):
    """At most twice plain's error in each leaf; an argmax changes only where logits are near.

    Three times with total variation, whose slope jumps where draft and teacher are equal.
    """
    most = 3 if "tv" in str(loss_name) else 2
    k = 3
    batch = agreeing(batch_of(4, (200, 170), pair[0]), pair, dtype, k)
    options = {"ttt_length": k, "loss": loss_name}
    (exact, exact_aux), truth = run(batch, pair, "plain", rounding=dtype, **options)
    (loss, aux), grads = run(batch, pair, "fast", dtype, dtype, **options)
    (want, _), plain = run(batch, pair, "plain", dtype, dtype, **options)

    # Loss and gradients.
    unit = torch.finfo(getattr(torch, dtype)).eps
    assert error(loss, exact) <= max(2 * error(want, exact), unit)
    for name in truth:
        assert error(grads[name], truth[name]) <= most * error(plain[name], truth[name]), name

    # Logits.
    logits = logits_of(batch, pair, "float64", dtype, k)
    low = logits_of(batch, pair, dtype, dtype, k)
    for x, y in zip(logits, low, strict=True):
        assert error(y, x) <= LOGIT[dtype]

    # Argmaxes: the case has correct rows, and few near ties.
    near = near_ties(batch, logits, low, unit, k)
    assert (near < (0.5 if dtype == "bfloat16" else 0.02) * exact_aux.rows).all()
    assert exact_aux.correct[0] > 0.3 * exact_aux.rows[0]
    assert ((aux.correct - exact_aux.correct).abs() <= near).all()


# Padding.


@pytest.mark.parametrize("align", [align_mask, specforge.align_mask])
def test_padding_is_not_trained_and_does_not_matter(align):
    """Collated masks leave padding out; then its values reach no loss and no gradient."""
    generator = torch.Generator().manual_seed(5)
    samples = [
        Sample(
            torch.randint(0, 130, (n,), generator=generator),
            torch.ones(n, dtype=torch.int64),
            torch.randn(n, 3 * H, generator=generator),
            torch.randn(n, H, generator=generator),
        )
        for n in (40, 23, 3)
    ]
    config = config_of("float64", "fast", 130, 64, ttt_length=3)
    batch = collate(samples, config, align)
    padding = batch.attention_mask == 0
    assert padding.any()
    assert not batch.row_mask.transpose(1, 2)[padding].any()

    # Entry t of ids and label states is of token t + 1.
    absent = F.pad(padding, (0, 3), value=True)[:, 1:]
    s = padding.shape[1]
    other = batch._replace(
        next_ids=torch.where(absent, 7, batch.next_ids),
        aux_hidden=torch.where(padding[..., None], 7.0, batch.aux_hidden),
        label_hidden=torch.where(absent[:, :s, None], 7.0, batch.label_hidden),
    )
    (loss, aux), grads = run(batch, (130, 64), "fast", ttt_length=3)
    (other_loss, other_aux), other_grads = run(other, (130, 64), "fast", ttt_length=3)
    assert torch.equal(loss, other_loss)
    for name, value in named_leaves(aux).items():
        assert torch.equal(value, getattr(other_aux, name)), name
    for name, grad in grads.items():
        assert torch.equal(grad, other_grads[name]), name
