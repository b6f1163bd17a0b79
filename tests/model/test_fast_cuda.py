"""What the fast profile runs on CUDA: its kernels and its flash attention, on a card, and as far as a CPU can tell.

There the kernels are interpreted, and compiled for a card; attention is the CPU's flash kernel; a whole step runs on
tensors without values, and on the stand-in for a card.
"""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import eagle3fn as e3
from eagle3fn.base.rows import both_rows, contributing_rows
from eagle3fn.base.tree import named_leaves, tree_map
from eagle3fn.model import fast, flash_attention
from eagle3fn.model import head_loss as fused
from eagle3fn.specforge.oracle import ENVIRONMENT
from tests.model.test_fast_blocks import (
    HEADS,
    KV_HEADS,
    SIZE,
    batch_of,
    check_plain,
    error,
    frozen_of,
    run,
)
from tests.model.test_fast_blocks import plain_attention as plain

kernel = pytest.importorskip("eagle3fn.model.kernels.score")
needs_triton = pytest.mark.skipif(
    not fused.importlib.util.find_spec("triton"),
    reason="the kernels are written in Triton, which is not installed",
)
by_kernel = mock.patch.object(fused, "score_on", lambda device, dtype: kernel.score)
FLOOR = {
    "float32": 2e-5,
    "bfloat16": 0.15,
}  # relative gradient error against fp64, as in tests/model/test_fast.py
by_flash = mock.patch.object(fast, "fits", lambda device, dtype, size: True)


def scores_of(score, dtype, v, d, device, k=2, p=2, width=8):
    """Scores and the overwritten logits; values are multiples of 1/4, so that there are ties."""
    source = torch.Generator().manual_seed(v * d + width)
    _, _, t2d, d2t = frozen_of(v, d)
    kept = torch.arange(d) + d2t
    logits = (torch.randint(-width, width, (k, p, d), generator=source) / 4).to(device, dtype)
    z = (torch.randint(-width, width, (p, v), generator=source) / 4).to(device, dtype)
    return *score(logits, z, t2d.to(device), kept.to(device)), logits


@needs_triton
@pytest.mark.parametrize("pair", [(130, 64), (128, 128), (5000, 4097), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_its_torch_twin(dtype, pair, device):
    v, d = pair
    kl, correct, accept, known, by_logits = scores_of(kernel.score, dtype, v, d, device)
    want_kl, want_correct, want_accept, want_known, want = scores_of(
        fused.score, dtype, v, d, device
    )
    torch.testing.assert_close(kl, want_kl, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(accept, want_accept, rtol=2e-6, atol=2e-6)
    assert torch.equal(correct, want_correct) and torch.equal(known, want_known)
    unit = torch.finfo(dtype).eps  # the interpreter cuts what bf16 rounds
    torch.testing.assert_close(by_logits, want, rtol=2 * unit, atol=1e-6)


@needs_triton
def test_of_equal_logits_the_first_is_said(device):
    """The teacher is the first step's student on the draft vocabulary, and low elsewhere: that student is right."""
    _, _, t2d, d2t = frozen_of(150, 70)
    kept = torch.arange(70) + d2t
    for score in (kernel.score, fused.score):
        logits = torch.randint(
            -2, 2, (2, 6, 70), generator=torch.Generator().manual_seed(3)
        ).float()
        z = torch.full((6, 150), -3.0).index_copy_(1, kept, logits[0])
        assert (logits[0] == 1).sum(-1).min() > 3
        _, correct, _, _ = score(*(x.to(device) for x in (logits, z, t2d, kept)))
        assert correct[0].all() and not correct[1].all()


@needs_triton
@pytest.mark.parametrize("gap", [20.0, 200.0])
def test_a_draft_vocabulary_far_below_the_teachers_best(gap, device):
    _, _, t2d, d2t = frozen_of(150, 70)
    found = []
    for score in (kernel.score, fused.score):
        source = torch.Generator().manual_seed(0)
        logits, z = torch.randn(2, 2, 70, generator=source), torch.randn(2, 150, generator=source)
        z[0, int((~t2d).nonzero()[0])] = gap
        logits, z, *rest = (x.to(device) for x in (logits, z, t2d, torch.arange(70) + d2t))
        found.append((*score(logits, z, *rest), logits))
    for mine, twin in zip(*found, strict=True):
        torch.testing.assert_close(mine, twin, rtol=2e-6, atol=2e-6)


@needs_triton
@pytest.mark.parametrize("block", [16, 64])
def test_the_kernel_in_blocks_of_any_size(block, device, monkeypatch):
    monkeypatch.setattr(kernel, "_BLOCK", block)
    sides = (
        scores_of(score, torch.float32, 150, 70, device) for score in (kernel.score, fused.score)
    )
    for a, b in zip(*sides, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@needs_triton
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pair", [(130, 64), (100, 100)])
def test_the_objective_by_the_kernel_is_as_near_to_fp64_as_plain(dtype, pair):
    batch, k = batch_of(sum(pair), [4, 2], pair[0]), 2
    _, truth = run(batch, pair, "plain", rounding=dtype, ttt_length=k)
    _, plain = run(batch, pair, "plain", dtype, dtype, ttt_length=k)
    (twin, twin_aux), _ = run(batch, pair, "fast", dtype, dtype, ttt_length=k)
    with by_kernel:
        (loss, aux), grads = run(batch, pair, "fast", dtype, dtype, ttt_length=k)
    assert torch.allclose(loss, twin, rtol=1e-5, atol=1e-6)
    for name, value in named_leaves(aux).items():
        torch.testing.assert_close(value, getattr(twin_aux, name), rtol=1e-5, atol=1e-5)
    for name in truth:
        assert error(grads[name], truth[name]) < max(
            FLOOR[dtype], 2 * error(plain[name], truth[name])
        ), name


@needs_triton
def test_the_kernel_is_chosen_on_cuda_alone():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert fused.score_on(cuda, torch.bfloat16) is kernel.score
    assert (
        fused.score_on(cuda, torch.float64) is fused.score
        and fused.score_on(cpu, torch.float32) is fused.score
    )
    with mock.patch.object(fused.importlib.util, "find_spec", lambda name: None):
        assert fused.score_on(cuda, torch.bfloat16) is fused.score


@needs_triton
def test_the_kernels_compile_for_a_card():
    """For a GPU of compute capability 9.0, which need not be here."""
    kept = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "tests/model/compile_score.py"], cwd=root, env=kept | {"PYTHONPATH": root}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        f"{name} {dtype} built" for dtype in ("fp32", "bf16") for name in ("teach", "grade")
    ], done.stdout + done.stderr


@pytest.mark.parametrize("later", [0, 1, 3])
def test_attention_by_flash_is_the_plain_expression(later):
    source, s = torch.Generator().manual_seed(later), 40
    draw = lambda *size: torch.randn(size, generator=source, dtype=torch.float64)  # noqa: E731
    rows = contributing_rows((torch.rand(2, s, generator=source) < 0.6).long(), 1, bucket=1)
    blocks, own = (
        (draw(2, s, KV_HEADS, SIZE) for _ in "kv"),
        (draw(later, len(rows), KV_HEADS, SIZE) for _ in "kv"),
    )
    inputs = draw(len(rows), HEADS, SIZE), *blocks, *own
    out, back = torch.func.vjp(lambda *x: flash_attention.flash_attention(*x, rows=rows), *inputs)  # pyright: ignore
    want, want_back = torch.func.vjp(lambda *x: plain(*x, rows=rows), *inputs)  # pyright: ignore
    assert torch.allclose(out, want, rtol=1e-11, atol=1e-13)
    grad = draw(*want.shape)
    assert all(error(a, b) < 1e-12 for a, b in zip(back(grad), want_back(grad), strict=True))

    def gradient(*x):
        return torch.func.vjp(lambda *y: flash_attention.flash_attention(*y, rows=rows), *x)[1](
            grad
        )  # pyright: ignore

    mapped = torch.func.vmap(gradient)(*(torch.stack([x, x.flip(0) / 2]) for x in inputs))
    assert all(
        error(a[1], b) < 1e-12
        for a, b in zip(mapped, gradient(*(x.flip(0) / 2 for x in inputs)), strict=True)
    )
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.func.grad(lambda q: gradient(q, *inputs[1:])[0].sum())(inputs[0])


@pytest.mark.parametrize("later", [0, 1, 3])
def test_attention_by_flash_in_bf16_is_near_the_plain_expression(later, device):
    """On a card the flash kernel has bf16 alone: result and gradients against fp64 on the same numbers."""
    source, s = torch.Generator().manual_seed(later), 40
    size = 8  # of a head: a card's kernel takes multiples of 8
    draw = lambda *size: torch.randn(*size, generator=source).bfloat16()  # noqa: E731
    rows = contributing_rows((torch.rand(2, s, generator=source) < 0.6).long(), 1, bucket=1)
    blocks, own = (
        (draw(2, s, KV_HEADS, size) for _ in "kv"),
        (draw(later, len(rows), KV_HEADS, size) for _ in "kv"),
    )
    inputs = draw(len(rows), HEADS, size), *blocks, *own
    grad = draw(len(rows), HEADS, size)
    placed, there = (x.to(device) for x in inputs), rows.to(device)
    out, back = torch.func.vjp(lambda *x: flash_attention.flash_attention(*x, rows=there), *placed)  # pyright: ignore
    want, want_back = torch.func.vjp(lambda *x: plain(*x, rows=rows), *(x.double() for x in inputs))  # pyright: ignore
    assert error(out.cpu(), want) < 1e-2
    for a, b in zip(back(grad.to(device)), want_back(grad.double()), strict=True):
        assert error(a.cpu(), b) < 2e-2


@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_objective_by_flash_is_plain(k):
    mask = torch.zeros(2, 90, dtype=torch.int64)
    mask[0, 20:45] = mask[0, 70:] = mask[1, 30:33] = (
        1  # row lists are filled up by repeating a sample's last row
    )
    batch = batch_of(1, (90, 50), 130, mask)
    assert len(contributing_rows(batch.row_mask, k).unique()) < len(
        contributing_rows(batch.row_mask, k)
    )
    with by_flash:
        check_plain(batch, (130, 64), ttt_length=k)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flash_is_as_near_to_fp64_as_plain(dtype):
    batch, pair, k = batch_of(2, (60, 41), 130), (130, 64), 3
    _, truth = run(batch, pair, "plain", rounding=dtype, ttt_length=k)
    _, plain = run(batch, pair, "plain", dtype, dtype, ttt_length=k)
    with by_flash:
        _, grads = run(batch, pair, "fast", dtype, dtype, ttt_length=k)
    for name in truth:
        assert error(grads[name], truth[name]) < max(
            FLOOR[dtype], 2 * error(plain[name], truth[name])
        ), name


def test_flash_is_for_cuda_and_the_heads_it_takes(monkeypatch):
    cuda = torch.device("cuda")
    with mock.patch.object(flash_attention, "_has_flash", lambda device: False):
        assert not flash_attention.fits(cuda, torch.bfloat16, 128)
    monkeypatch.setattr(flash_attention, "_has_flash", lambda device: True)
    assert flash_attention.fits(cuda, torch.bfloat16, 128)
    assert not flash_attention.fits(torch.device("cpu"), torch.bfloat16, 128)
    assert not flash_attention.fits(cuda, torch.float32, 128)
    assert not flash_attention.fits(cuda, torch.bfloat16, 6) and not flash_attention.fits(
        cuda, torch.bfloat16, 264
    )


def without_values(tree):
    """The same tensors on PyTorch's device of shapes alone."""
    return tree_map(lambda value: value.to("meta"), tree)


def step_without_values(batch):
    draft = e3.DraftConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=96,
        draft_vocab_size=64, target_hidden_size=32, max_position_embeddings=64,
    )  # fmt: skip
    config = e3.Config(draft, train=e3.TrainConfig(steps=3))
    embed, head = (torch.zeros(96, 32, dtype=torch.bfloat16) for _ in range(2))
    frozen = e3.Frozen(embed, head, torch.arange(96) < 64, torch.zeros(64, dtype=torch.int64))
    params = e3.bind(config, frozen).init(0)
    fns = e3.bind(config, without_values(frozen))
    state = fns.init_state(without_values(params))
    with by_flash:
        after, metrics = fns.step(state, without_values(batch))
    assert metrics["loss"].device.type == "meta" and after.step == 1
    shapes = [
        {name: (x.shape, x.dtype) for name, x in leaves.items()}
        for leaves in (after.params, state.params)
    ]
    assert shapes[0] == shapes[1]


def test_a_step_reads_nothing_on_the_host():
    """Reading a value raises here; PyTorch's own rules for shapes and dtypes check the calls, CUDA's flash too."""
    ids = torch.ones(1, 24, dtype=torch.int64)
    features = torch.zeros(1, 24, 96, dtype=torch.bfloat16)
    batch = e3.Batch(ids, ids, ids, features, features[..., :32])
    k = e3.ObjectiveConfig().ttt_length
    step_without_values(batch._replace(**both_rows(ids, k)))
    with pytest.raises((NotImplementedError, RuntimeError), match=r"[Mm]eta"):
        step_without_values(batch)
