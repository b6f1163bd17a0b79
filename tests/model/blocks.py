"""Problems for tests of the fast numerics's parts: any two vocabularies, and plain expressions."""

from typing import Any

import torch

import eagle3fn as e3
from eagle3fn.base.tree import named_leaves
from eagle3fn.model import table
from eagle3fn.testing.builders import Unaligned
from tests.factories import make_draft, make_map

H = 16
HEADS = 4
KV_HEADS = 2
HEAD_SIZE = 6


def config_of(dtype, numerics, v, d, **objective):
    draft = make_draft(
        H,
        v,
        d,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_SIZE,
        max_position_embeddings=512,
    )
    return e3.Config(
        draft=draft,
        objective=e3.ObjectiveConfig(numerics=numerics, **objective),
        optimizer=e3.OptimizerConfig(learning_rate=1e-2),
        train=e3.TrainConfig(steps=2, dtype=dtype, init="random"),
    )


def frozen_of(v, d):
    generator = torch.Generator().manual_seed(v + d)
    vocab_map = make_map(v, d, generator)
    embed = torch.randn(v, H, generator=generator)
    head = torch.randn(v, H, generator=generator)
    return e3.Frozen(embed, head, *vocab_map)


def batch_of(seed, lengths, v, mask=None):
    """Samples of these lengths, zeros after them; trained are about 0.7 of the rows, or `mask`.

    Not aligned: `run` does that.
    """
    generator = torch.Generator().manual_seed(seed)
    b = len(lengths)
    s = max(lengths)
    real = (torch.arange(s) < torch.tensor(lengths)[:, None]).long()
    drawn = (torch.rand(b, s, generator=generator) < 0.7).long()
    return Unaligned(
        input_ids=torch.randint(0, v, (b, s), generator=generator) * real,
        attention_mask=real,
        row_mask=(drawn if mask is None else mask) * real,
        aux_hidden=torch.randn(b, s, 3 * H, generator=generator) * real[..., None],
        last_hidden=torch.randn(b, s, H, generator=generator) * real[..., None],
    )


def rounded(tree, rounding, dtype) -> dict[str, Any]:
    """Floating leaves rounded to `rounding`, held in `dtype`."""
    return {
        name: x.to(rounding).to(dtype) if x is not None and x.is_floating_point() else x
        for name, x in tree.items()
    }


def case_of(batch, pair, dtype, numerics, rounding, **objective):
    """Configuration, frozen tensors, parameters and batch in `dtype`, of values in `rounding`.

    The batch is aligned for the objective, if it is not yet.
    """
    kind = getattr(torch, dtype)
    rounding = getattr(torch, rounding)
    start = config_of("float32", numerics, *pair, **objective)
    params = rounded(e3.bind(start, frozen_of(*pair)).init(0), rounding, kind)
    frozen = e3.Frozen(**rounded(frozen_of(*pair)._asdict(), rounding, kind))
    params[table.HEAD] = frozen.target_head[frozen.t2d]
    config = config_of(dtype, numerics, *pair, **objective)
    if isinstance(batch, Unaligned):
        batch = batch.aligned(config.objective.ttt_length)
    batch = batch._replace(
        aux_hidden=batch.aux_hidden.to(rounding).to(kind),
        label_hidden=batch.label_hidden.to(rounding).to(kind),
    )
    return config, frozen, params, batch


def run(batch, pair, numerics, dtype="float64", rounding="float32", **objective):
    """Loss with metrics, and gradients."""
    config, frozen, params, batch = case_of(batch, pair, dtype, numerics, rounding, **objective)
    fns = e3.bind(config, frozen)
    return e3.value_and_grad(fns.forward_loss, has_aux=True)(params, batch)


def vjp(function, *inputs) -> Any:
    """`torch.func.vjp`: the value and its pull-back."""
    return torch.func.vjp(function, *inputs)


def error(found, wanted):
    """The distance relative to `wanted`'s norm."""
    found = found.double()
    wanted = wanted.double()
    norm = wanted.norm()
    return float((found - wanted).norm() / norm) if norm > 0 else float(found.norm())


def assert_fast_is_plain(batch, pair, **objective):
    """Loss, metrics and gradients of the two numerics in fp64."""
    (loss, aux), grads = run(batch, pair, "fast", **objective)
    (want, want_aux), want_grads = run(batch, pair, "plain", **objective)

    assert torch.allclose(loss, want, rtol=1e-11)
    for name, value in named_leaves(aux).items():
        assert torch.allclose(value, getattr(want_aux, name), rtol=1e-6), name
    for name in want_grads:
        assert error(grads[name], want_grads[name]) < 1e-10, name


def plain_attention(q, key, value, step_keys, step_values, rows, starts=None):
    """`block_attention` as one masked softmax over all keys of the row's sample and its own.

    `starts` `(B, S)` are those of packed rows.
    """
    s = key.shape[1]
    groups = q.shape[1] // key.shape[2]
    key, value = (x[rows // s].repeat_interleave(groups, 2) for x in (key, value))
    step_keys, step_values = (x.repeat_interleave(groups, 2) for x in (step_keys, step_values))

    causal = torch.einsum("tne,tsne->tns", q, key)
    causal = causal.masked_fill(torch.arange(s) > (rows % s)[:, None, None], -torch.inf)
    if starts is not None:
        first = starts.flatten()[rows]
        causal = causal.masked_fill(torch.arange(s) < first[:, None, None], -torch.inf)
    own = torch.einsum("tne,itne->tni", q, step_keys)
    p = torch.softmax(torch.cat([causal, own], -1) / q.shape[-1] ** 0.5, -1)

    out = torch.einsum("tns,tsne->tne", p[..., :s], value)
    return out + torch.einsum("tni,itne->tne", p[..., s:], step_values)
