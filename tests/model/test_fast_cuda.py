"""The fast numerics as CUDA runs them, on a card, and as far as a CPU can check.

On the CPU the Triton kernels are interpreted, and compiled for a card; attention is the CPU's flash
kernel; a whole step runs on tensors without values.
"""

import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import eagle3fn as e3
from eagle3fn.base.rows import plan_rows
from eagle3fn.base.tree import named_leaves, tree_map
from eagle3fn.data.collate import align
from eagle3fn.model import fast, flash_attention, head_loss
from eagle3fn.model.named_loss import find_loss
from eagle3fn.specforge.oracle import ENVIRONMENT
from eagle3fn.testing.builders import Case, tiny_frozen, tiny_packed, tiny_params
from eagle3fn.train.step import init_state, step
from tests import packed_flash
from tests.factories import make_draft
from tests.model.blocks import (
    HEAD_SIZE,
    HEADS,
    KV_HEADS,
    assert_fast_is_plain,
    batch_of,
    error,
    frozen_of,
    plain_attention,
    run,
    vjp,
)

kernel = pytest.importorskip("eagle3fn.model.kernels.score")
needs_triton = pytest.mark.skipif(
    not head_loss.importlib.util.find_spec("triton"),
    reason="the kernels are written in Triton, which is not installed",
)
KL = find_loss(e3.ObjectiveConfig())
torch_score = partial(head_loss.score, loss=KL)
by_kernel = mock.patch.object(head_loss, "score_on", lambda device, dtype, loss: kernel.score)
by_flash = mock.patch.object(fast, "has_flash_kernel", lambda device, dtype, head_size: True)

# Relative gradient error against fp64, as in tests/model/test_fast.py.
BOUND = {"float32": 2e-5, "bfloat16": 0.15}


def assert_as_near_to_fp64_as_plain(batch, pair, dtype, k, grads):
    """Gradients in low precision: twice plain's error at most, or the bound."""
    _, truth = run(batch, pair, "plain", rounding=dtype, ttt_length=k)
    _, plain = run(batch, pair, "plain", dtype, dtype, ttt_length=k)
    for name in truth:
        limit = max(BOUND[dtype], 2 * error(plain[name], truth[name]))
        assert error(grads[name], truth[name]) < limit, name


# The kernels of head and loss.


def vocabulary_of(v, d):
    """`t2d` `(V,)` and the kept target ids `(D,)`."""
    frozen = frozen_of(v, d)
    return frozen.t2d, torch.arange(d) + frozen.d2t


def labels_of(*counts):
    """Of labels with so many pairs each: every pair's label `(X,)`, and `first` `(P + 1,)`."""
    label = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return label, np.cumsum([0, *counts])


def scores_of(score, dtype, pair, device, counts=(2, 0, 1), width=8):
    """Scores and the overwritten logits; values are multiples of 1/4, so that there are ties."""
    v, d = pair
    generator = torch.Generator().manual_seed(v * d + width)
    vocabulary = [x.to(device) for x in vocabulary_of(v, d)]
    label, first = labels_of(*counts)
    logits = torch.randint(-width, width, (len(label), d), generator=generator) / 4
    z = torch.randint(-width, width, (len(counts), v), generator=generator) / 4
    logits = logits.to(device, dtype)
    scores = score(logits, z.to(device, dtype), label.to(device), first, *vocabulary)
    return scores, logits


@needs_triton
@pytest.mark.parametrize("pair", [(130, 64), (128, 128), (5000, 4097), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_equals_its_torch_expression(dtype, pair, device):
    scores, gradient = scores_of(kernel.score, dtype, pair, device)
    wanted, wanted_gradient = scores_of(torch_score, dtype, pair, device)
    torch.testing.assert_close(scores.row_loss, wanted.row_loss, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(scores.accept, wanted.accept, rtol=2e-6, atol=2e-6)
    assert torch.equal(scores.correct, wanted.correct)
    assert torch.equal(scores.known, wanted.known)
    unit = torch.finfo(dtype).eps  # the interpreter cuts what bf16 rounds
    torch.testing.assert_close(gradient, wanted_gradient, rtol=2 * unit, atol=1e-6)


@needs_triton
def test_argmax_ties_pick_lowest_index(device):
    """The teacher is a label's first row, and low outside its vocabulary: that row is right."""
    t2d, kept = vocabulary_of(150, 70)
    label, first = labels_of(*[2] * 6)
    scores_of: list[Any] = [kernel.score, torch_score]
    for score in scores_of:
        generator = torch.Generator().manual_seed(3)
        logits = torch.randint(-2, 2, (12, 70), generator=generator).float()
        z = torch.full((6, 150), -3.0).index_copy_(1, kept.cpu(), logits[::2])
        assert (logits[::2] == 1).sum(-1).min() > 3
        logits, z, label, t2d, kept = (x.to(device) for x in (logits, z, label, t2d, kept))
        scores = score(logits, z, label, first, t2d, kept)
        assert scores.correct[::2].all()
        assert not scores.correct[1::2].all()


@needs_triton
@pytest.mark.parametrize("gap", [20.0, 200.0])
def test_draft_vocabulary_far_below_the_targets_largest_logit(gap, device):
    t2d, kept = vocabulary_of(150, 70)
    label, first = labels_of(2, 2)
    found = []
    scores_of: list[Any] = [kernel.score, torch_score]
    for score in scores_of:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(4, 70, generator=generator).to(device)
        z = torch.randn(2, 150, generator=generator)
        z[0, int((~t2d.cpu()).nonzero()[0])] = gap
        z, label, t2d, kept = (x.to(device) for x in (z, label, t2d, kept))
        scores = score(logits, z, label, first, t2d, kept)
        found.append((*scores, logits))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=2e-6, atol=2e-6)


@needs_triton
@pytest.mark.parametrize("block", [16, 64])
def test_kernel_in_blocks_of_any_size(block, device, monkeypatch):
    monkeypatch.setattr(kernel, "_BLOCK", block)
    scores, gradient = scores_of(kernel.score, torch.float32, (150, 70), device)
    wanted, wanted_gradient = scores_of(torch_score, torch.float32, (150, 70), device)
    for a, b in zip((*scores, gradient), (*wanted, wanted_gradient), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@needs_triton
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pair", [(130, 64), (100, 100)])
def test_objective_by_the_kernel_is_as_near_to_fp64_as_plain(dtype, pair):
    k = 2
    batch = batch_of(sum(pair), [4, 2], pair[0])
    (want, want_aux), _ = run(batch, pair, "fast", dtype, dtype, ttt_length=k)
    with by_kernel:
        (loss, aux), grads = run(batch, pair, "fast", dtype, dtype, ttt_length=k)

    assert torch.allclose(loss, want, rtol=1e-5, atol=1e-6)
    for name, value in named_leaves(aux).items():
        torch.testing.assert_close(value, getattr(want_aux, name), rtol=1e-5, atol=1e-5)
    assert_as_near_to_fp64_as_plain(batch, pair, dtype, k, grads)


@needs_triton
def test_kernel_is_chosen_on_cuda_for_kl_alone():
    score_on: Any = head_loss.score_on
    reverse_kl = find_loss(e3.ObjectiveConfig(loss="rkl"))
    cuda = torch.device("cuda")
    cpu = torch.device("cpu")
    assert score_on(cuda, torch.bfloat16, KL) is kernel.score
    assert score_on(cuda, torch.float64, KL).func is head_loss.score
    assert score_on(cpu, torch.float32, KL).func is head_loss.score
    assert score_on(cuda, torch.bfloat16, reverse_kl).func is head_loss.score
    with mock.patch.object(head_loss.importlib.util, "find_spec", lambda name: None):
        assert score_on(cuda, torch.bfloat16, KL).func is head_loss.score


@needs_triton
def test_kernels_compile_for_a_card():
    """For a GPU of compute capability 9.0, which need not be here."""
    root = str(Path(__file__).resolve().parents[2])
    kept = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "tests/model/compile_score.py"],
        cwd=root,
        env=kept | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    kernels = ("score_teacher", "score_draft")
    wanted = [f"{name} {dtype} built" for dtype in ("fp32", "bf16") for name in kernels]
    assert done.stdout.splitlines() == wanted, done.stdout + done.stderr


# Flash attention.


def attention_inputs(later, head_size, dtype):
    """Rows in any order, the inputs of attention with `later` later steps, and a gradient."""
    generator = torch.Generator().manual_seed(later)
    s = 40

    def draw(*shape):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.randn(shape, generator=generator, dtype=wide).to(dtype)

    mask = (torch.rand(2, s, generator=generator) < 0.6).long()
    rows = mask.flatten().nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows), generator=generator)]
    key = draw(2, s, KV_HEADS, head_size)
    value = draw(2, s, KV_HEADS, head_size)
    step_keys = draw(later, len(rows), KV_HEADS, head_size)
    step_values = draw(later, len(rows), KV_HEADS, head_size)
    q = draw(len(rows), HEADS, head_size)
    grad = draw(len(rows), HEADS, head_size)
    return rows, (q, key, value, step_keys, step_values), grad


def pull_back_of(attend, inputs, rows):
    """The result and its pull-back to the inputs."""
    return vjp(lambda *x: attend(*x, rows=rows), *inputs)


@pytest.mark.parametrize("later", [0, 1, 3])
def test_flash_attention_equals_the_plain_expression(later):
    """Value and gradients, also under `vmap`; a second derivative raises."""
    rows, inputs, grad = attention_inputs(later, HEAD_SIZE, torch.float64)
    flash = flash_attention.flash_attention
    out, pull_back = pull_back_of(flash, inputs, rows)
    want, want_pull_back = pull_back_of(plain_attention, inputs, rows)
    assert torch.allclose(out, want, rtol=1e-11, atol=1e-13)
    for a, b in zip(pull_back(grad), want_pull_back(grad), strict=True):
        assert error(a, b) < 1e-12

    def gradient(*x):
        return pull_back_of(flash, x, rows)[1](grad)

    second = [x.flip(0) / 2 for x in inputs]
    stacked = [torch.stack(pair) for pair in zip(inputs, second, strict=True)]
    mapped = torch.func.vmap(gradient)(*stacked)
    for a, b in zip(mapped, gradient(*second), strict=True):
        assert error(a[1], b) < 1e-12

    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.func.grad(lambda q: gradient(q, *inputs[1:])[0].sum())(inputs[0])


@pytest.mark.parametrize("later", [0, 1, 3])
def test_flash_attention_in_bf16_is_near_the_plain_expression(later, device):
    """On a card the flash kernel has no fp64: it is compared to fp64 on the same numbers."""
    rows, inputs, grad = attention_inputs(later, 8, torch.bfloat16)
    placed = [x.to(device) for x in inputs]
    out, pull_back = pull_back_of(flash_attention.flash_attention, placed, rows.to(device))
    want, want_pull_back = pull_back_of(plain_attention, [x.double() for x in inputs], rows)
    assert error(out.cpu(), want) < 1e-2
    for a, b in zip(pull_back(grad.to(device)), want_pull_back(grad.double()), strict=True):
        assert error(a.cpu(), b) < 2e-2


@pytest.mark.parametrize("survival", [1.0, 0.5])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_objective_by_flash_is_plain(k, survival):
    mask = torch.zeros(2, 90, dtype=torch.int64)
    mask[0, 20:45] = 1
    mask[0, 70:] = 1
    mask[1, 30:33] = 1
    batch = batch_of(1, (90, 50), 130, mask).aligned(k)
    if survival < 1:
        source = torch.Generator().manual_seed(k)
        batch = batch._replace(survives=torch.randint(1, k + 1, (2, 90), generator=source))

    # From the second step on rows are not in the order of their places.
    rows = plan_rows(batch.row_mask, batch.survives).rows
    assert k == 1 or not torch.equal(rows, rows.sort().values)
    with by_flash:
        assert_fast_is_plain(batch, (130, 64), ttt_length=k, survival=survival)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_objective_by_flash_is_as_near_to_fp64_as_plain(dtype):
    pair = (130, 64)
    k = 3
    batch = batch_of(2, (60, 41), 130)
    with by_flash:
        _, grads = run(batch, pair, "fast", dtype, dtype, ttt_length=k)
    assert_as_near_to_fp64_as_plain(batch, pair, dtype, k, grads)


# Packed rows, by the kernel for sequences of several lengths.


def packed_inputs(later, head_size, dtype):
    """As `attention_inputs`, with where the conversations of the rows begin, `(B, S)`."""
    rows, inputs, grad = attention_inputs(later, head_size, dtype)
    starts = torch.tensor([0] * 17 + [17] + [18] * 22 + [0] * 40).view(2, 40)
    plan = plan_rows(torch.ones(2, 1, 40, dtype=torch.int64), None, starts)
    assert plan.lengths is not None and plan.lengths.tolist() == [17, 1, 22, 40]
    return rows, inputs, grad, starts, flash_attention.packing_of(plan)


@pytest.mark.parametrize("later", [0, 1, 3])
def test_packed_flash_attention_equals_the_plain_expression(later):
    rows, inputs, grad, starts, packing = packed_inputs(later, HEAD_SIZE, torch.float64)
    with packed_flash.on_cpu() as kernel:
        flash = partial(flash_attention.flash_attention, packing=packing)
        out, pull_back = pull_back_of(flash, inputs, rows)
        found = pull_back(grad)
    assert kernel.call_count == 1
    plain = partial(plain_attention, starts=starts)
    want, want_pull_back = pull_back_of(plain, inputs, rows)
    assert torch.allclose(out, want, rtol=1e-11, atol=1e-13)
    for a, b in zip(found, want_pull_back(grad), strict=True):
        assert error(a, b) < 1e-12

    # What keeps them apart is seen.
    joined, _ = pull_back_of(plain_attention, inputs, rows)
    assert error(joined, want) > 0.1


@pytest.mark.parametrize("later", [0, 1, 3])
def test_packed_flash_attention_in_bf16_is_near_the_plain_expression(later, device):
    rows, inputs, grad, starts, packing = packed_inputs(later, 8, torch.bfloat16)
    placed = [x.to(device) for x in inputs]
    packing = packing._replace(bounds=packing.bounds.to(device))
    with packed_flash.on_cpu() if device == "cpu" else contextlib.nullcontext():
        flash = partial(flash_attention.flash_attention, packing=packing)
        out, pull_back = pull_back_of(flash, placed, rows.to(device))
        found = pull_back(grad.to(device))
    plain = partial(plain_attention, starts=starts)
    want, want_pull_back = pull_back_of(plain, [x.double() for x in inputs], rows)
    assert error(out.cpu(), want) < 1e-2
    for a, b in zip(found, want_pull_back(grad.double()), strict=True):
        assert error(a.cpu(), b) < 2e-2


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("survival", [1.0, 0.5])
def test_objective_by_flash_is_plain_on_packed_rows(survival, layers):
    case = Case(
        dtype="float64",
        normalization="mask",
        lengths=(9, 1, 14, 6),
        steps=4,
        switches=(("num_hidden_layers", layers),),
    )
    survives = None
    if survival < 1:
        source = torch.Generator().manual_seed(2)
        survives = [torch.randint(1, 5, (n,), generator=source) for n in case.lengths]
    batch = tiny_packed(case, survives=survives)

    def gradients_by(numerics):
        config = case.config()
        objective = replace(config.objective, numerics=numerics, survival=survival)
        fns = e3.bind(replace(config, objective=objective), tiny_frozen(case))
        return e3.value_and_grad(fns.forward_loss, has_aux=True)(tiny_params(case), batch)

    with by_flash, packed_flash.on_cpu() as kernel:
        (loss, _), grads = gradients_by("fast")
    assert batch.plan is not None
    steps = len(batch.plan.sizes)
    assert kernel.call_count == steps + (steps if layers == 2 else 0)
    (want, _), want_grads = gradients_by("plain")
    assert torch.allclose(loss, want, rtol=1e-11)
    for name in want_grads:
        assert error(grads[name], want_grads[name]) < 1e-10, name


def test_packed_rows_with_a_window_have_blocks():
    """The kernel sees whole conversations."""
    switches = (("draft_window", 4),)
    case = Case(dtype="float64", normalization="mask", lengths=(9, 14), switches=switches)
    config = case.config()
    objective = replace(config.objective, numerics="fast")
    fns = e3.bind(replace(config, objective=objective), tiny_frozen(case))
    with by_flash, packed_flash.on_cpu() as kernel:
        assert fns.forward_loss(tiny_params(case), tiny_packed(case))[0] > 0
    assert kernel.call_count == 0


def test_flash_is_for_cuda_and_the_heads_it_takes(monkeypatch):
    has_flash_kernel = flash_attention.has_flash_kernel
    cuda = torch.device("cuda")
    cpu = torch.device("cpu")
    with mock.patch.object(flash_attention, "_card_has_flash", lambda device: False):
        assert not has_flash_kernel(cuda, torch.bfloat16, 128)

    monkeypatch.setattr(flash_attention, "_card_has_flash", lambda device: True)
    assert has_flash_kernel(cuda, torch.bfloat16, 128)
    assert not has_flash_kernel(cpu, torch.bfloat16, 128)
    assert not has_flash_kernel(cuda, torch.float32, 128)
    assert not has_flash_kernel(cuda, torch.bfloat16, 6)
    assert not has_flash_kernel(cuda, torch.bfloat16, 264)


# A whole step without values.


def without_values(tree):
    """The same tensors on PyTorch's device of shapes alone; arrays stay on the host."""
    return tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, tree)


def step_without_values(batch, survival=1.0):
    """One step by the flash path: shapes and dtypes of the parameters stay."""
    draft = make_draft(32, 96, 64, intermediate_size=48, head_dim=8)
    objective = e3.ObjectiveConfig(survival=survival)
    config = e3.Config(draft, objective, train=e3.TrainConfig(steps=3, init="random"))
    embed = torch.zeros(96, 32, dtype=torch.bfloat16)
    head = torch.zeros(96, 32, dtype=torch.bfloat16)
    t2d = torch.arange(96) < 64
    frozen = e3.Frozen(embed, head, t2d, torch.zeros(64, dtype=torch.int64))
    params = e3.bind(config, frozen).init(0)

    # Not by `bind`, which reads the vocabulary map.
    state = init_state(without_values(params), config=config)
    with by_flash:
        after, metrics = step(
            state, without_values(batch), config=config, frozen=without_values(frozen)
        )
    assert metrics["loss"].device.type == "meta"
    assert after.step == 1

    def shapes(leaves):
        return {name: (x.shape, x.dtype) for name, x in leaves.items()}

    assert shapes(after.params) == shapes(state.params)


def test_a_step_reads_nothing_on_the_host():
    """Reading a value raises here; PyTorch's shape and dtype rules check the calls, flash too."""
    ids = torch.ones(1, 24, dtype=torch.int64)
    features = torch.zeros(1, 24, 96, dtype=torch.bfloat16)
    k = e3.ObjectiveConfig().ttt_length
    batch = align(ids, ids, ids, features, features[..., :32], k)
    step_without_values(batch._replace(plan=plan_rows(batch.row_mask)))

    # Also where rows survive by chance.
    survives = torch.arange(24)[None] % k + 1
    plan = plan_rows(batch.row_mask, survives)
    assert plan.sizes[-1] < plan.sizes[0]
    step_without_values(batch._replace(survives=survives, plan=plan), survival=0.9)

    # And of packed rows: the kernel gets its sizes from the plan.
    apart = torch.tensor([[0] * 10 + [10] * 14])
    packed = batch._replace(
        position_ids=torch.arange(24)[None] - apart,
        starts=apart,
        plan=plan_rows(batch.row_mask, None, apart),
    )
    step_without_values(packed)

    # Without its plan the batch's mask must be read.
    with pytest.raises((NotImplementedError, RuntimeError), match=r"[Mm]eta"):
        step_without_values(batch)
