"""The fast profile where its work is cut: blocks of attention, chunks and groups of labels, columns of a maximum."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import eagle3fn as e3
from eagle3fn.base.rows import contributing_rows
from eagle3fn.base.tree import named_leaves
from eagle3fn.base.types import Sample
from eagle3fn.data.collate import collate
from eagle3fn.model import block_attention as attention
from eagle3fn.model import fast, fused_layers, table
from eagle3fn.model import head_loss as fused

H, HEADS, KV_HEADS, SIZE = 16, 4, 2, 6
PAIRS = [
    (130, 64),
    (192, 128),
    (128, 128),
    (100, 100),
    (150, 70),
]  # V, D: multiples of 64 and not, D = V
# Largest error of a logit against fp64 on rounded inputs, as a part of the largest logit.
LOGIT = {"float32": 1e-5, "bfloat16": 0.06}


def config_of(dtype, numerics, v, d, **objective):
    draft = e3.DraftConfig(
        hidden_size=H,
        intermediate_size=24,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=SIZE,
        vocab_size=v,
        draft_vocab_size=d,
        target_hidden_size=H,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    return e3.Config(
        draft=draft,
        objective=e3.ObjectiveConfig(numerics=numerics, **objective),
        optimizer=e3.OptimizerConfig(learning_rate=1e-2),
        train=e3.TrainConfig(steps=2, dtype=dtype),
    )


def frozen_of(v, d):
    generator = torch.Generator().manual_seed(v + d)
    kept = torch.randperm(v, generator=generator)[:d].sort().values
    t2d = torch.zeros(v, dtype=torch.bool).index_fill(0, kept, True)
    embed, head = (torch.randn(v, H, generator=generator) for _ in range(2))
    return e3.Frozen(embed, head, t2d, kept - torch.arange(d))


def batch_of(seed, lengths, v, mask=None):
    generator = torch.Generator().manual_seed(seed)
    b, s = len(lengths), max(lengths)
    real = (torch.arange(s) < torch.tensor(lengths)[:, None]).long()
    drawn = (torch.rand(b, s, generator=generator) < 0.7).long()
    return e3.Batch(
        input_ids=torch.randint(0, v, (b, s), generator=generator) * real,
        attention_mask=real,
        row_mask=(drawn if mask is None else mask) * real,
        aux_hidden=torch.randn(b, s, 3 * H, generator=generator) * real[..., None],
        last_hidden=torch.randn(b, s, H, generator=generator) * real[..., None],
    )


def rounded(tree, dtype, to):
    """Floating leaves rounded to `dtype`, held in `to`."""
    return {k: x.to(dtype).to(to) if x.is_floating_point() else x for k, x in tree.items()}


def case_of(batch, pair, dtype, numerics, rounding, **objective):
    """Configuration, frozen tensors, parameters and batch in `dtype`, of values rounded to `rounding`."""
    kind, rounding = getattr(torch, dtype), getattr(torch, rounding)
    start = config_of("float32", numerics, *pair, **objective)
    params = rounded(e3.bind(start, frozen_of(*pair)).init(0), rounding, kind)
    frozen = e3.Frozen(**rounded(frozen_of(*pair)._asdict(), rounding, kind))
    params[table.HEAD] = frozen.target_head[frozen.t2d]
    batch = batch._replace(
        aux_hidden=batch.aux_hidden.to(rounding).to(kind),
        last_hidden=batch.last_hidden.to(rounding).to(kind),
    )
    return config_of(dtype, numerics, *pair, **objective), frozen, params, batch


def run(batch, pair, numerics, dtype="float64", rounding="float32", **objective):
    config, frozen, params, batch = case_of(batch, pair, dtype, numerics, rounding, **objective)
    return e3.value_and_grad(e3.bind(config, frozen).forward_loss, has_aux=True)(params, batch)


def error(a, b):
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm()) if b.norm() > 0 else float(a.norm())


def check_plain(batch, pair, **objective):
    (loss, aux), grads = run(batch, pair, "fast", **objective)
    (want, want_aux), want_grads = run(batch, pair, "plain", **objective)
    assert torch.allclose(loss, want, rtol=1e-11)
    for name, value in named_leaves(aux).items():
        assert torch.allclose(value, getattr(want_aux, name), rtol=1e-6), name
    for name in want_grads:
        assert error(grads[name], want_grads[name]) < 1e-10, name


def turns(rows_of_second):
    """Two turns in a sample of 300 tokens; a second sample of 210 with the given rows."""
    mask = torch.zeros(2, 300, dtype=torch.int64)
    mask[0, 20:150] = mask[0, 180:280] = 1
    mask[1, rows_of_second] = 1
    return mask


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("second", [[], [100], [209]])
def test_several_blocks(k, second):
    batch = batch_of(1, (300, 210), 130, turns(second))
    rows = contributing_rows(batch.row_mask, k)
    assert len(attention.make_blocks(rows, 300)) == 2 + bool(second)
    check_plain(batch, (130, 64), ttt_length=k)


@given(st.data())
def test_any_cut_changes_nothing(data):
    pair = data.draw(st.sampled_from(PAIRS))
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    batch = batch_of(data.draw(st.integers(0, 10**6)), lengths, pair[0])
    sizes = {
        "_BLOCK": data.draw(st.sampled_from([1, 3, 8])),
        "_STRIDE": data.draw(st.sampled_from([1, 4, 64])),
    }
    with (
        mock.patch.multiple(attention, **sizes),
        mock.patch.multiple(
            fused,
            _CHUNK_BYTES=data.draw(st.sampled_from([1, 1 << 13, 1 << 15])),
            _GROUP_BYTES=data.draw(st.sampled_from([1, 1 << 12, 1 << 14])),
        ),
    ):
        check_plain(batch, pair, ttt_length=data.draw(st.integers(1, 7)))


@pytest.mark.parametrize("pair", PAIRS)
def test_several_chunks_and_groups(pair):
    batch, (v, d), k = batch_of(2, (30, 17), pair[0]), pair, 3
    count = len(contributing_rows(batch.row_mask, 1))
    chunks, groups = 8 * (k * d + v) * 5, 8 * k * d * 2
    with (
        mock.patch.multiple(fused, _CHUNK_BYTES=chunks, _GROUP_BYTES=groups),
        mock.patch.object(fused, "score", wraps=fused.score) as score,
        mock.patch.object(fused, "first_max", wraps=fused.first_max) as maximum,
    ):
        run(batch, pair, "fast", ttt_length=k)
        assert score.call_count == -(-count // 5)
        assert maximum.call_count >= 2 * 3 * (count // 5)
        check_plain(batch, pair, ttt_length=k)


@given(st.integers(0, 10**6), st.sampled_from([64, 128, 192, 60, 1]))
def test_first_max_is_the_first_of_ties(seed, d):
    x = torch.randint(0, 4, (5, 3, d), generator=torch.Generator().manual_seed(seed)).double()
    top, place = fused.first_max(x)
    columns = torch.arange(d).expand_as(x)
    assert torch.equal(top, x.amax(-1))
    assert torch.equal(place, torch.where(x == top[..., None], columns, d).amin(-1))


def plain_attention(q, key, value, step_keys, step_values, rows):
    s, groups = key.shape[1], q.shape[1] // key.shape[2]
    key, value = (x[rows // s].repeat_interleave(groups, 2) for x in (key, value))
    step_keys, step_values = (x.repeat_interleave(groups, 2) for x in (step_keys, step_values))
    scores = torch.einsum("tne,tsne->tns", q, key)
    scores = scores.masked_fill(torch.arange(s) > (rows % s)[:, None, None], -torch.inf)
    scores = (
        torch.cat([scores, torch.einsum("tne,itne->tni", q, step_keys)], -1) / q.shape[-1] ** 0.5
    )
    p = torch.softmax(scores, -1)
    out = torch.einsum("tns,tsne->tne", p[..., :s], value)
    return out + torch.einsum("tni,itne->tne", p[..., s:], step_values)


def plain_norm(x, weight, eps=1e-5):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def plain_swiglu(x):
    gate, up = x.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def plain_mlp(x, weight, gate_up, down):
    return x + plain_swiglu(plain_norm(x, weight) @ gate_up.T) @ down.T


def plain_kl(student, head, labels, target_head, t2d):
    z = labels.target @ target_head.T
    p = torch.softmax(z[:, t2d], -1)
    logits = (student @ head.T)[torch.arange(len(student))[:, None], labels.student]
    kl = -(p * F.log_softmax(logits, -1)).sum(-1)
    return (labels.weight * kl * t2d[z.argmax(-1)]).sum()


def piece_of(name, generator):
    """A fast piece, its plain expression, and the inputs by which both are differentiated, in fp64."""

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if name.startswith("attention"):
        later, s = int(name[-1]), 40
        mask = (torch.rand(2, s, generator=generator) < 0.6).long()
        rows = contributing_rows(mask, 1)
        blocks = attention.make_blocks(rows, s)
        assert len(blocks) >= 6
        own = [draw(later, len(rows), KV_HEADS, SIZE) for _ in range(2)]
        inputs = draw(len(rows), HEADS, SIZE), *(draw(2, s, KV_HEADS, SIZE) for _ in range(2)), *own
        return (
            lambda *x: attention.block_attention(*x, rows=rows, blocks=blocks),
            lambda *x: plain_attention(*x, rows=rows),
            inputs,
        )
    if name == "norm":
        return lambda x, w: fused_layers.rms_norm(x, w, 1e-5), plain_norm, (draw(3, 5, H), draw(H))
    if name == "norm and linear":
        inputs, place = (
            (draw(7, H), draw(H), draw(5, H), draw(9, 5)),
            torch.tensor([8, 0, 3, 3, 5, 6, 1]),
        )
        return (
            lambda x, w, m, y: fused_layers.norm_linear(x, w, m, y, place, 1e-5),
            lambda x, w, m, y: y[place] + plain_norm(x, w) @ m.T,
            inputs,
        )
    if name == "mlp":
        inputs = draw(7, H), draw(H), draw(2 * 9, H), draw(H, 9)
        return lambda x, w, g, d: fused_layers.mlp(x, w, g, d, 1e-5), plain_mlp, inputs
    v, d, k, t, p = 130, 64, 3, 11, 17
    _, target_head, t2d, d2t = frozen_of(v, d)
    index = torch.randint(0, t, (k, p), generator=generator)
    weight = draw(k, p).abs() * (torch.rand(k, p, generator=generator) < 0.7)
    labels, target_head = fused.Labels(draw(p, H), index, weight), target_head.double()
    return (
        lambda x, head: fused.head_and_kl(x, head, labels, target_head, t2d, d2t).loss,
        lambda x, head: plain_kl(x, head, labels, target_head, t2d),
        (draw(k, t, H), draw(d, H)),
    )


def vjp(f, *x) -> Any:
    return torch.func.vjp(f, *x)


@pytest.mark.parametrize(
    "name", ["attention 0", "attention 1", "attention 3", "norm", "norm and linear", "mlp", "kl"]
)
def test_pieces_are_the_plain_expression(name, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", 8)
    monkeypatch.setattr(fused, "_CHUNK_BYTES", 8 * (3 * 64 + 130) * 5)
    monkeypatch.setattr(fused, "_GROUP_BYTES", 8 * 3 * 64 * 2)
    generator = torch.Generator().manual_seed(3)
    piece, plain, inputs = piece_of(name, generator)
    out, back = vjp(piece, *inputs)
    want, want_back = vjp(plain, *inputs)
    assert torch.allclose(out, want, rtol=1e-11, atol=1e-13)
    grad = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(back(grad), want_back(grad), strict=True):
        assert error(a, b) < 1e-12

    def gradient(f, *x):
        return vjp(f, *x)[1](grad)

    stacked = [torch.stack([x, x.flip(0) / 2]) for x in inputs]
    mapped = torch.func.vmap(lambda *x: gradient(piece, *x))(*stacked)
    for i in range(2):
        for a, b in zip(mapped, gradient(plain, *(x[i] for x in stacked)), strict=True):
            assert error(a[i], b) < 1e-12

    for at, x in enumerate(inputs):
        if x.numel():
            with pytest.raises(RuntimeError, match="differentiated once"):
                torch.func.grad(
                    lambda y, at=at: gradient(piece, *inputs[:at], y, *inputs[at + 1 :])[at].sum()
                )(x)


def logits_of(batch, pair, dtype, rounding, k):
    """What every row says `(K, B·S, D)` and what the labels' teacher says `(P, V)`, under the fast profile."""
    config, frozen, params, batch = case_of(batch, pair, dtype, "fast", rounding, ttt_length=k)
    hidden = fast.unroll(params, batch, torch.arange(batch.row_mask.numel()), config, frozen)
    student = fused_layers.rms_norm(hidden, params[table.NORM], config.draft.rms_norm_eps)
    labels = batch.row_mask.flatten().nonzero()[:, 0]
    z = F.linear(fast.label_targets(batch, labels, frozen), frozen.target_head)
    return F.linear(student, params[table.HEAD]), z


def near_ties(batch, exact, low, unit, k):
    """Rows a step `(K,)` whose draft or teacher has a second logit so near that the row's own error may swap them."""
    s, labels = batch.row_mask.shape[1], batch.row_mask.flatten().nonzero()[:, 0]

    def near(x, y):
        top = x.topk(2, dim=-1).values
        bound = (x - y).abs().amax(-1) + unit * x.abs().amax(
            -1
        )  # another order of sums may round the last bit anew
        return top[..., 0] - top[..., 1] <= 2 * bound

    said, meant = (near(x, y) for x, y in zip(exact, low, strict=True))
    scored = [labels % s >= i for i in range(k)]
    return torch.stack(
        [(said[i, (labels - i)[rows]] | meant[rows]).sum() for i, rows in enumerate(scored)]
    )


def agreeing(batch, pair, dtype, k):
    """The batch with a teacher that mostly means what the draft says at the first step."""
    config, frozen, params, wide = case_of(batch, pair, "float64", "fast", dtype, ttt_length=k)
    hidden = fast.unroll(params, wide, torch.arange(batch.row_mask.numel()), config, frozen)[0]
    said = plain_norm(hidden, params[table.NORM], config.draft.rms_norm_eps).view_as(
        batch.last_hidden
    )
    near = said.roll(1, 1) + 0.2 * wide.last_hidden
    return batch._replace(last_hidden=near.float() * batch.attention_mask[..., None])


@pytest.mark.parametrize("pair", [(128, 128), (150, 70)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_low_precision_is_as_near_to_fp64_as_plain(dtype, pair):
    """Twice legacy's error at most, leaf by leaf; a row may change its argmax only where two logits are near."""
    k = 3
    batch = agreeing(batch_of(4, (200, 170), pair[0]), pair, dtype, k)
    (exact, exact_aux), truth = run(batch, pair, "plain", rounding=dtype, ttt_length=k)
    (loss, aux), grads = run(batch, pair, "fast", dtype, dtype, ttt_length=k)
    (want, _), plain = run(batch, pair, "plain", dtype, dtype, ttt_length=k)
    unit = torch.finfo(getattr(torch, dtype)).eps
    assert error(loss, exact) <= max(2 * error(want, exact), unit)
    for name in truth:
        assert error(grads[name], truth[name]) <= 2 * error(plain[name], truth[name]), name
    logits, low = (
        logits_of(batch, pair, "float64", dtype, k),
        logits_of(batch, pair, dtype, dtype, k),
    )
    for x, y in zip(logits, low, strict=True):
        assert (x - y).abs().max() <= LOGIT[dtype] * x.abs().max()
    near = near_ties(batch, logits, low, unit, k)
    assert (near < (0.5 if dtype == "bfloat16" else 0.02) * exact_aux.rows).all()
    assert exact_aux.correct[0] > 0.3 * exact_aux.rows[0]
    assert ((aux.correct - exact_aux.correct).abs() <= near).all()


@pytest.mark.parametrize("mode", ["legacy", "serving"])
def test_padding_is_not_trained_and_does_not_matter(mode):
    """Collated masks leave padding out; then what stands in the padding reaches no loss and no gradient."""
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
    batch = collate(samples, mode, 64)
    padding = batch.attention_mask == 0
    assert padding.any()
    assert not batch.row_mask[padding].any()
    other = batch._replace(
        input_ids=torch.where(padding, 7, batch.input_ids),
        aux_hidden=torch.where(padding[..., None], 7.0, batch.aux_hidden),
        last_hidden=torch.where(padding[..., None], 7.0, batch.last_hidden),
    )
    (a, aux), grads = run(batch, (130, 64), "fast", ttt_length=3)
    (b, again), other_grads = run(other, (130, 64), "fast", ttt_length=3)
    assert torch.equal(a, b)
    assert all(torch.equal(x, getattr(again, name)) for name, x in named_leaves(aux).items())
    assert all(torch.equal(grads[name], other_grads[name]) for name in grads)
