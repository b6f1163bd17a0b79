"""What the fast step keeps alive, in bytes counted storage by storage; and the bits of what it does in place."""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import eagle3fn as e3
from eagle3fn.model import head_loss as fused
from eagle3fn.model import table
from eagle3fn.train import optimizer
from tests.model.test_fast_blocks import H, batch_of, config_of, frozen_of

V, DS, WIDTH = 4096, (1024, 4096), 4 * H


class Peak(TorchDispatchMode):
    """The most bytes that tensors made in here held at once."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.most = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {
            x.untyped_storage()._cdata
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        out = function(*args, **(kwargs or {}))
        for storage in (
            x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)
        ):
            if storage._cdata not in self.live | given:
                self.live.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _gone(self, key, size):
        self.live.discard(key)
        self.now -= size


def problem(d, dtype="float32"):
    """Functions, parameters and batch of a draft whose head outweighs all else: K·D is far below D·H."""
    config, kind = config_of(dtype, "fast", V, d, ttt_length=2), getattr(torch, dtype)
    draft = replace(config.draft, hidden_size=WIDTH, target_hidden_size=WIDTH)
    frozen, batch = frozen_of(V, d), batch_of(5, [12, 9], V)
    frozen = e3.Frozen(
        **{k: x.repeat(1, 4) if x.ndim == 2 else x for k, x in frozen._asdict().items()}
    )
    fns = e3.bind(replace(config, draft=draft), frozen)
    wide = {
        name: getattr(batch, name).repeat(1, 1, 4).to(kind)
        for name in ("aux_hidden", "last_hidden")
    }
    return fns, fns.init(0), batch._replace(**wide)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(fused, "_CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(fused, "_GROUP_BYTES", 1 << 14)
    monkeypatch.setattr(optimizer, "_BLOCK_BYTES", 1 << 13)


@pytest.mark.parametrize("part", ["gradient", "step"])
def test_beyond_the_gradients_memory_is_flat_in_the_draft_vocabulary(part, small_parts):
    """A head's worth more would be seen: it is the growth that is left out, once."""
    beyond = []
    for d in DS:
        fns, params, batch = problem(d)
        state = fns.init_state(params)
        with Peak() as peak:
            if part == "gradient":
                e3.value_and_grad(lambda x, f=fns, b=batch: f.forward_loss(x, b)[0])(params)
            else:
                fns.step(state, batch, donate=True)
        beyond.append(peak.most - 4 * sum(leaf.numel() for leaf in params.values()))
    assert beyond[1] - beyond[0] < (DS[1] - DS[0]) * WIDTH * 4 / 2


def test_a_scaled_loss_has_the_scaled_gradient_and_a_pullback_can_be_called_again():
    fns, params, batch = problem(1024)
    loss = lambda x: fns.forward_loss(x, batch)[0]  # noqa: E731
    pair: Any = torch.func.vjp(loss, params)
    once, pullback = pair
    (first,), (second,) = pullback(torch.ones_like(once)), pullback(torch.ones_like(once))
    (twice,) = pullback(torch.full_like(once, 2.0))
    _, plain = e3.value_and_grad(loss)(params)
    for name, value in first.items():
        assert value.abs().sum() > 0
        assert torch.equal(value, second[name])
        assert torch.equal(value, plain[name])
        assert torch.equal(2 * value, twice[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_of_the_head_and_of_leaves_change_nothing(dtype, monkeypatch):
    fns, params, batch = problem(1024, dtype)
    whole, _ = fns.step(fns.init_state(params), batch, donate=True)
    monkeypatch.setattr(optimizer, "_BLOCK_BYTES", 1 << 9)
    monkeypatch.setattr(fused, "_CHUNK_BYTES", 1 << 30)
    add, heights = fused._add_product, []

    def in_parts(out, a, b, room):
        before = out.clone()
        add(out, a, b, 7 * b.shape[1] * b.itemsize)
        heights.append(len(out))
        assert torch.allclose(
            out - before, (a.double().T @ b.double()).float(), rtol=2**-7, atol=1e-4
        )

    kept, _ = fns.step(fns.init_state(params), batch)
    given, _ = fns.step(fns.init_state(params), batch, donate=True)
    for name, leaf in kept.masters.items():
        assert torch.equal(leaf, given.masters[name])
        assert torch.equal(leaf, whole.masters[name])
    monkeypatch.setattr(fused, "_add_product", in_parts)
    fns.step(fns.init_state(params), batch)
    assert set(heights) == {len(params[table.HEAD])}
