"""Smoke, a part of the CUDA gate: everything that a run uses, once tiny and once at real widths.

`python -m tests.gate.smoke --device cuda --seconds 75 --out FILE`. An exception in a check is
recorded with its traceback, and the next check runs. Results are compared with the plain numerics
in fp64: on the CPU at the tiny size, on the device itself at real widths. With `--device cpu` the
kernels are interpreted and real widths are SmolLM2's.
"""

import argparse
import contextlib
import copy
import gc
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import eagle3fn as e3
from bench.problem import Problem, draft_of, draw_params, make_problem
from bench.sides import one_rank_mesh
from eagle3fn import specforge
from eagle3fn.base.draft_config import aux_layers
from eagle3fn.base.read import read_json
from eagle3fn.base.rows import plan_rows
from eagle3fn.base.tree import equal, named_leaves, tree_map
from eagle3fn.base.types import Aux, Params, VocabMap
from eagle3fn.data import stages
from eagle3fn.data.online import features_of, roll_out
from eagle3fn.data.samples import Encoded
from eagle3fn.data.sources import model_source
from eagle3fn.model import head_loss
from eagle3fn.model.block_attention import block_attention, make_blocks
from eagle3fn.model.flash_attention import flash_attention, packing_of
from eagle3fn.model.losses import LOSSES
from eagle3fn.model.named_loss import find_loss
from eagle3fn.model.rope import rope_table, rotate
from eagle3fn.model.visibility import visible
from eagle3fn.specforge.arithmetic import KL, kl_loss
from eagle3fn.specforge.kl_kernel import mean_kl
from eagle3fn.testing.gate_part import (
    BEGAN,
    Report,
    context_lost,
    parse_part,
    part_options,
    run_part,
)
from eagle3fn.testing.triton_interpreter import mend_interpreter
from eagle3fn.train.checkpoint import load_checkpoint, save_checkpoint
from eagle3fn.train.finite import watched
from eagle3fn.train.optimizer import OPTIMIZERS, Optimizer, muon
from eagle3fn.train.orthogonal import newton_schulz, rational
from eagle3fn.train.shard import empty_state
from eagle3fn.use.decode import speculate
from eagle3fn.use.engine_variants import SWITCHES
from eagle3fn.use.export import Draft
from tests import packed_flash

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
NUMERICS = ("fast", "plain")

# Bounds of relative errors, by the dtype of the computation.
LOSS_BOUND = {torch.bfloat16: 0.01, torch.float32: 1e-5, torch.float64: 1e-11}
# All gradients together; and their norm, which is summed in fp32.
GRADIENT_BOUND = {torch.bfloat16: 0.15, torch.float32: 1e-4, torch.float64: 1e-9}
NORM_BOUND = {torch.bfloat16: 0.05, torch.float32: 1e-3, torch.float64: 1e-9}
# What a kernel returns; in bf16 what it stores.
KERNEL_BOUND = {torch.bfloat16: 0.02, torch.float32: 1e-5}
FLASH_BOUND = 0.03
FEATURE_BOUND = 1e-3  # of the target's hidden states in fp32
UPDATE_BOUND = 0.1  # of an optimizer's updates, which it may compute in bf16

REAL_MEMORY = 48 << 30  # free bytes of a card from which on real widths are Qwen2.5-7B's
RESTARTS = 4  # of this process, after a check that left it without a usable card
DEPTH = 7  # layers of the random target, from which on it has default taps
RATE = 1e-4
SHAPES: dict[str, dict[str, Any]] = {
    "2 taps": {"aux_layers": (0, 1)},
    "another width": {"hidden_size": 96},
    "all with a window": {**SWITCHES["all"], "draft_window": 16},
}
STEPPED = ("EAGLE-3.1", "own embedding", "attention_bias", "all with a window")
"""Of the switches, those of which an update is made too: each adds another kind of weight."""
SURVIVAL = 0.6  # where rows survive to the next unroll step by chance

LossAndGradients = tuple[tuple[Tensor, Aux], Params]

Check = Callable[[], dict[str, float]]
"""Runs something; returns errors by name, each as a share of its bound."""


class Size:
    """The problem that every check uses."""

    def __init__(
        self,
        name: str,
        shape: str,
        device: str,
        seq: int,
        batch: int,
        k: int,
        vocab: int | None,
        survival: float = 1.0,
        packs: bool = False,
    ) -> None:
        self.name = name
        self.shape = shape
        self.device = device
        self.seq = seq
        self.batch = batch
        self.k = k
        self.vocab = vocab
        self.survival = survival
        self.packs = packs
        self.draft = draft_of(shape, vocab, seq)

    def switched(self, **switches: Any) -> "Size":
        """The same size of a draft with other switches, or another shape."""
        sizes = self.seq, self.batch, self.k, self.vocab
        size = Size(self.name, self.shape, self.device, *sizes)
        size.draft = replace(self.draft, **switches)
        return size

    def surviving(self) -> "Size":
        """The same size with rows that survive to the next unroll step by chance."""
        sizes = self.seq, self.batch, self.k, self.vocab
        return Size(self.name, self.shape, self.device, *sizes, SURVIVAL)

    def packed(self) -> "Size":
        """The same size with several conversations in a row."""
        sizes = self.seq, self.batch, self.k, self.vocab
        return Size(self.name, self.shape, self.device, *sizes, packs=True)

    @cached_property
    def truth_device(self) -> str:
        """Where the results in fp64 are computed."""
        return "cpu" if self.name == "tiny" else self.device

    @cached_property
    def drawn(self) -> tuple[Problem, Params]:
        """Batch, frozen tensors and parameters, in bf16: every dtype then has the same problem."""
        kind = {"dtype": torch.bfloat16, "device": self.truth_device}
        made = make_problem(
            self.draft,
            batch=self.batch,
            seq=self.seq,
            masked=0.5,
            k=self.k,
            seed=0,
            survival=self.survival,
            **kind,
        )
        if self.packs:
            made = made._replace(batch=packed_rows(made.batch))
        return made, draw_params(self.draft, 0, **kind)

    @cached_property
    def truth(self) -> tuple[float, Params]:
        """Loss and gradients of the plain numerics in fp64."""
        (loss, _), gradients = gradient(self, "plain", torch.float64, self.truth_device)
        return float(loss), gradients

    @cached_property
    def specforge_truth(self) -> float:
        """The loss of the plain numerics in fp64 under SpecForge's settings."""
        problem = problem_in(self, "plain", torch.float64, self.truth_device)
        config = under_specforge(problem)
        fns = e3.bind(config, problem.frozen)
        return float(fns.forward_loss(problem.params, problem.batch)[0])


def sizes(device: str) -> list[Size]:
    """The tiny size, and real widths as the memory allows."""
    tiny = Size("tiny", "tiny", device, seq=96, batch=2, k=3, vocab=None)
    if device == "cpu":
        return [tiny, Size("real", "smollm2", device, seq=64, batch=1, k=2, vocab=4096)]
    roomy = torch.cuda.mem_get_info()[0] >= REAL_MEMORY
    shape = "qwen2.5-7b" if roomy else "smollm2"
    return [tiny, Size("real", shape, device, seq=512, batch=1, k=7, vocab=None)]


class Named(NamedTuple):
    """A check by its name."""

    name: str
    check: Check


def checks(device: str) -> Iterator[Named]:
    """All checks, the cheapest and most telling first."""
    tiny, real = sizes(device)
    for size in (tiny, real):
        for dtype in (torch.float32, torch.bfloat16):
            about = f"kernel {short(dtype)}"
            for name, loss in LOSSES.items():
                if loss.kernel:
                    score = partial(check_score, size, name, dtype)
                    yield Named(f"{size.name} {loss.kernel} {about} of {name}", score)
            yield Named(f"{size.name} KL {about}", partial(check_kl, size, dtype))
            rotation = partial(check_rotate, size, dtype)
            yield Named(f"{size.name} rotation {short(dtype)}", rotation)
        yield Named(f"{size.name} flash attention bf16", partial(check_flash, size))
        packed = size.packed()
        yield Named(f"{size.name} packed flash attention bf16", partial(check_flash, packed))
        yield from check_tables(size)

        fewer = size.surviving()
        for dtype in DTYPES:
            for numerics in NUMERICS:
                about = f"{size.name} {numerics} {short(dtype)}"
                yield Named(f"{about} forward", partial(check_forward, size, numerics, dtype))
                yield Named(f"{about} backward", partial(check_backward, size, numerics, dtype))
                for way in WAYS:
                    step = partial(check_step, size, numerics, dtype, way)
                    yield Named(f"{about} step {way.name}", step)
                yield from check_survival(fewer, numerics, dtype)
                yield from check_packed(packed, numerics, dtype)
            about = f"{size.name} SpecForge {short(dtype)}"
            yield Named(f"{about} step", partial(check_specforge, size, dtype))

            if dtype == torch.bfloat16:
                yield Named(f"{size.name} extract", partial(check_extract, size))
                yield Named(f"{size.name} online", partial(check_online, size))
                yield Named(f"{size.name} decode", partial(check_decode, size))
                if size.name == "tiny":
                    yield from check_surroundings(size)
    yield from check_switches(tiny)


def check_tables(size: Size) -> Iterator[Named]:
    """Every loss and every optimizer of the tables; at the tiny size what torch.func makes of a
    loss too.
    """
    tiny = size.name == "tiny"
    for name in LOSSES:
        for dtype in (torch.float32, torch.bfloat16) if tiny else (torch.bfloat16,):
            loss = partial(check_loss, size, name, dtype)
            yield Named(f"{size.name} loss {name} {short(dtype)}", loss)
    if not tiny:
        return

    for way in WAYS:
        for skips in (False, True):
            overflow = partial(check_overflow, size, way, skips)
            about = "dropped" if skips else "reported"
            yield Named(f"{size.name} overflow {about} {way.name}", overflow)
    for name in OPTIMIZERS:
        for mesh in (False, True):
            where = " mesh" if mesh else ""
            optimizer = partial(check_optimizer, size, name, mesh)
            yield Named(f"{size.name} optimizer {name}{where}", optimizer)
    yield Named(f"{size.name} gradients by sample", partial(check_by_sample, size))


def check_switches(size: Size) -> Iterator[Named]:
    """Every switch of the draft, and other shapes: gradients, and an update of some."""
    for dtype in (torch.float32, torch.bfloat16):
        for name, switches in {**SWITCHES, **SHAPES}.items():
            other = size.switched(**switches)
            about = f"{size.name} switch {name} {short(dtype)}"
            yield Named(f"{about} backward", partial(check_backward, other, "fast", dtype))
            if name in STEPPED:
                step = partial(check_step, other, "fast", dtype, WAYS[-1])
                yield Named(f"{about} step", step)


class Way(NamedTuple):
    """How a step is called."""

    name: str
    mesh: bool  # the state is sharded over a mesh of this rank alone
    donate: bool  # the state's buffers are given to the next one


WAYS = (
    Way("plain", mesh=False, donate=False),
    Way("donated", mesh=False, donate=True),
    Way("mesh", mesh=True, donate=False),
    Way("mesh donated", mesh=True, donate=True),
)


def check_overflow(size: Size, way: Way, skips: bool) -> dict[str, float]:
    """An update that makes one leaf infinite, by a finite gradient: reported, or dropped."""
    name = "norm.weight"

    def update(grads: Params, state: Any, params: Params, info: Any) -> Any:
        params = {leaf: value + 1 for leaf, value in params.items()}
        params[name][-1] = torch.inf
        return params, state

    problem = problem_in(size, "fast", torch.bfloat16, size.device)
    train = replace(problem.config.train, on_nonfinite="skip" if skips else "stop")
    config = replace(problem.config, train=train)
    mesh = one_rank_mesh(size.device) if way.mesh else None
    optimizer = Optimizer(lambda params, roles: {}, update)
    fns = e3.bind(config, problem.frozen, mesh, optimizer=optimizer)
    state = fns.init_state(problem.params)
    before = tree_map(torch.clone, e3.gather(state))
    after, metrics = fns.step(state, problem.batch, donate=way.donate)

    assert bool(torch.isfinite(metrics["loss"]) & torch.isfinite(metrics["grad_norm"]))
    flags = zip(watched(before), metrics["finite"].tolist(), strict=True)
    bad = [leaf for leaf, good in flags if not good]
    assert bad == [f"params.{name}"], bad
    assert metrics["skipped"] == int(skips)
    if skips:
        expected = before._replace(step=before.step + 1)
        assert equal(e3.gather(after), expected), "a dropped update changed the state"
    return {}


def check_survival(fewer: Size, numerics: str, dtype: torch.dtype) -> Iterator[Named]:
    """Gradients and an update where rows survive by chance."""
    about = f"{fewer.name} {numerics} {short(dtype)} survival"
    yield Named(f"{about} backward", partial(check_backward, fewer, numerics, dtype))
    yield Named(f"{about} step", partial(check_step, fewer, numerics, dtype, WAYS[0]))


def check_packed(size: Size, numerics: str, dtype: torch.dtype) -> Iterator[Named]:
    """Loss, gradients and an update of packed rows; at real widths by the fast numerics alone."""
    if size.name != "tiny" and numerics != "fast":
        return
    about = f"{size.name} {numerics} {short(dtype)} packed"
    yield Named(f"{about} forward", partial(check_forward, size, numerics, dtype))
    yield Named(f"{about} backward", partial(check_backward, size, numerics, dtype))
    yield Named(f"{about} step", partial(check_step, size, numerics, dtype, WAYS[1]))


def check_surroundings(size: Size) -> Iterator[Named]:
    """The start of a run, its resume, and the caller's settings of torch."""
    yield Named(f"{size.name} start from the target", partial(check_init, size))
    for mesh in (False, True):
        where = " mesh" if mesh else ""
        yield Named(f"{size.name} resume{where}", partial(check_resume, size, mesh))
    for name in (*NUMERICS, "SpecForge"):
        about = f"{size.name} {name}"
        yield Named(f"{about} refuses autocast", partial(check_autocast, size, name))
        default = partial(check_default_dtype, size, name)
        yield Named(f"{about} under another default dtype", default)


def short(dtype: torch.dtype) -> str:
    """bf16, fp32, fp64."""
    return {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}[dtype]


# The kernels, each against its expression in fp64 on the CPU.


def check_score(size: Size, name: str, dtype: torch.dtype) -> dict[str, float]:
    """A loss, acceptance, the counts, and the gradient that is written over the logits."""
    loss = find_loss(e3.ObjectiveConfig(loss=name))
    kernel = importlib.import_module(f"eagle3fn.model.kernels.{loss.kernel}").score
    source = torch.Generator().manual_seed(1)
    d = size.draft.draft_vocab_size
    v = size.draft.vocab_size

    # Pairs by label: of one label three, of another none.
    label = torch.tensor([0, 1, 1, 1, 3, 4, 4])
    first = np.searchsorted(label.numpy(), np.arange(6))
    kept = torch.randperm(v, generator=source)[:d].sort().values
    t2d = torch.zeros(v, dtype=torch.bool).index_fill(0, kept, True)
    logits = (torch.randn(len(label), d, generator=source) * 2).to(dtype)
    z = (torch.randn(5, v, generator=source) * 2).to(dtype)

    # The kernel on the device, the expression in fp64. Both overwrite the logits.
    mine = logits.to(size.device, copy=True)
    there = (x.to(size.device) for x in (z, label, t2d, kept))
    z_there, label_there, *vocabulary = there
    found = kernel(mine, z_there, label_there, first, *vocabulary)
    wide = logits.double()
    expected = head_loss.score(wide, z.double(), label, first, t2d, kept, loss)

    same_rows = torch.equal(found.correct.cpu(), expected.correct)
    same_labels = torch.equal(found.known.cpu(), expected.known)
    assert same_rows and same_labels, "another largest logit than the expression's"
    return {
        "loss": error(found.row_loss, expected.row_loss) / KERNEL_BOUND[torch.float32],
        "acceptance": error(found.accept, expected.accept) / KERNEL_BOUND[torch.float32],
        "gradient": error(mine, wide) / KERNEL_BOUND[dtype],
    }


def check_kl(size: Size, dtype: torch.dtype) -> dict[str, float]:
    """SpecForge's KL: the mean over rows, some of them masked, and the gradient by the logits."""
    source = torch.Generator().manual_seed(2)
    shape = (1, 6, size.draft.draft_vocab_size)
    logits = (torch.randn(shape, generator=source) * 2).to(dtype)
    p = torch.randn(shape, generator=source).softmax(-1)
    mask = torch.tensor([1, 1, 0, 1, 0, 1]).view(1, 6, 1)

    def run(kl: KL, device: str, z: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        z, p, mask_there = z.to(device), p.to(device), mask.to(device)
        return e3.value_and_grad(lambda x: kl(x, p, mask_there, None))(z)

    loss, gradient = run(mean_kl, size.device, logits, p)
    expected_loss, expected_gradient = run(kl_loss, "cpu", logits.double(), p.double())
    return {
        "loss": error(loss, expected_loss) / KERNEL_BOUND[torch.float32],
        "gradient": error(gradient, expected_gradient) / KERNEL_BOUND[dtype],
    }


def check_flash(size: Size) -> dict[str, float]:
    """Attention of some rows, in any order, with two later keys each; gradients of all inputs.

    Of packed rows by the kernel for sequences of several lengths, which a CPU has not: there it is
    one call a conversation.
    """
    source = torch.Generator().manual_seed(3)
    n = size.draft.num_attention_heads
    j = size.draft.num_key_value_heads
    e = size.draft.head_dim
    rows = torch.arange(3, size.seq, 2)
    rows = rows[torch.randperm(len(rows), generator=source)]
    query, cached, later = (len(rows), n, e), (1, size.seq, j, e), (len(rows), j, e)
    shapes = {"q": query, "key": cached, "value": cached}
    shapes |= dict.fromkeys(("later key", "later key 2", "later value", "later value 2"), later)
    inputs = [torch.randn(shape, generator=source).bfloat16() for shape in shapes.values()]
    grad = torch.randn(query, generator=source).bfloat16()

    def run(attend: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
        def split(q: Tensor, key: Tensor, value: Tensor, *later: Tensor) -> Tensor:
            return attend(q, key, value, later[:2], later[2:])

        out, pullback = torch.func.vjp(split, *inputs)  # pyright: ignore
        return [out, *pullback(grad)]

    start = None
    packing = None
    if size.packs:
        starts = starts_of(1, size.seq)
        start = starts[0, rows]
        plan = plan_rows(torch.ones(1, 1, size.seq, dtype=torch.int64), None, starts)
        packing = packing_of(plan)
        packing = packing._replace(bounds=packing.bounds.to(size.device))

    flash = partial(flash_attention, rows=rows.to(size.device), packing=packing)
    with packed_flash.on_cpu() if size.device == "cpu" else contextlib.nullcontext():
        found = run(flash, [x.to(size.device) for x in inputs], grad.to(size.device))
    seen = visible(size.draft, rows % size.seq, 0, start)
    plain = partial(block_attention, blocks=make_blocks(rows, size.seq, seen))
    expected = run(plain, [x.double() for x in inputs], grad.double())

    errors = {}
    for name, a, b in zip(("out", *shapes), found, expected, strict=True):
        errors[name] = error(a, b) / FLASH_BOUND
    return errors


def check_rotate(size: Size, dtype: torch.dtype) -> dict[str, float]:
    """The rotation of some rows' heads, and its gradient."""
    source = torch.Generator().manual_seed(6)
    cpu = torch.device("cpu")
    tables = rope_table(size.draft, 8, dtype, cpu)
    cos, sin = (each[:, None] for each in tables)  # (T, 1, E)
    shape = (8, size.draft.num_attention_heads, size.draft.head_dim)
    x = torch.randn(shape, generator=source).to(dtype)
    grad = torch.randn(shape, generator=source).to(dtype)

    def run(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, Tensor]:
        x, grad, cos, sin = inputs
        out, pullback = torch.func.vjp(lambda x: function(x, cos, sin), x)  # pyright: ignore
        return out, pullback(grad)[0]

    inputs = (x, grad, cos, sin)
    out, gradient = run(rotate, *(each.to(size.device) for each in inputs))
    expected_out, expected_gradient = run(rotate, *(each.double() for each in inputs))
    return {
        "out": error(out, expected_out) / KERNEL_BOUND[dtype],
        "gradient": error(gradient, expected_gradient) / KERNEL_BOUND[dtype],
    }


# The objective and the step.


class InDtype(NamedTuple):
    """A size's problem in a dtype, on a device, and our settings for it."""

    config: e3.Config
    frozen: e3.Frozen
    batch: e3.Batch
    params: Params


def problem_in(size: Size, numerics: str, dtype: torch.dtype, device: str) -> InDtype:
    """The size's problem in a dtype, on a device, under these numerics."""
    drawn, params = size.drawn

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x  # the plan's arrays
        return x.to(device, dtype if x.is_floating_point() else None)

    objective = e3.ObjectiveConfig(
        ttt_length=size.k,
        numerics=numerics,  # pyright: ignore
        survival=size.survival,
    )
    config = e3.Config(
        size.draft,
        objective,
        e3.OptimizerConfig(learning_rate=RATE),
        train=e3.TrainConfig(steps=100, dtype=name_of(dtype), device=device),  # pyright: ignore
    )
    frozen = tree_map(move, drawn.frozen)
    batch = tree_map(move, drawn.batch)
    return InDtype(config, frozen, batch, tree_map(move, params))


PIECES = (1, 5, 2, 13)  # lengths of packed conversations, in these shares of a row


def starts_of(b: int, s: int) -> Tensor:
    """As `Batch.starts`, `(b, s)`, of rows in which each of `PIECES` comes twice."""
    shares = torch.tensor(PIECES * 2)
    ends = shares.cumsum(0) * s // int(shares.sum())  # the last one is s
    lengths = ends.diff(prepend=ends.new_zeros(1))
    starts = (ends - lengths).repeat_interleave(lengths)
    return starts.expand(b, s).contiguous()


def packed_rows(batch: e3.Batch) -> e3.Batch:
    """The batch with several conversations in each row, where its sample was one.

    The labels that are of the next conversation are not trained.
    """
    mask = batch.row_mask
    b, k, s = mask.shape
    starts = starts_of(b, s).to(mask.device)
    place = torch.arange(s, device=mask.device)

    # The label of row t at step i is of token t + i + 1, which must be of the row's conversation.
    step = torch.arange(k, device=mask.device)[:, None]
    of_label = place + step + 1  # (K, S)
    inside = starts[:, of_label.clamp(max=s - 1)] == starts[:, None]
    row_mask = mask * (inside & (of_label < s))
    plan = plan_rows(row_mask, batch.survives, starts)
    return batch._replace(row_mask=row_mask, position_ids=place - starts, starts=starts, plan=plan)


def name_of(dtype: torch.dtype) -> str:
    """The dtype's name in torch: torch.bfloat16 → bfloat16."""
    return str(dtype).removeprefix("torch.")


def gradient(size: Size, numerics: str, dtype: torch.dtype, device: str) -> LossAndGradients:
    """Loss, metrics and gradients."""
    problem = problem_in(size, numerics, dtype, device)
    fns = e3.bind(problem.config, problem.frozen)
    return e3.value_and_grad(fns.forward_loss, has_aux=True)(problem.params, problem.batch)


def check_forward(size: Size, numerics: str, dtype: torch.dtype) -> dict[str, float]:
    """The loss; the metrics are finite."""
    problem = problem_in(size, numerics, dtype, size.device)
    fns = e3.bind(problem.config, problem.frozen)
    loss, aux = fns.forward_loss(problem.params, problem.batch)
    assert all(bool(torch.isfinite(x).all()) for x in aux), f"not finite: {aux}"
    return {"loss": apart(loss, size.truth[0]) / LOSS_BOUND[dtype]}


def check_backward(size: Size, numerics: str, dtype: torch.dtype) -> dict[str, float]:
    """The loss, and all gradients together."""
    (loss, _), gradients = gradient(size, numerics, dtype, size.device)
    expected_loss, expected = size.truth
    return {
        "loss": apart(loss, expected_loss) / LOSS_BOUND[dtype],
        "gradients": error_of_all(gradients, expected) / GRADIENT_BOUND[dtype],
    }


def check_step(size: Size, numerics: str, dtype: torch.dtype, way: Way) -> dict[str, float]:
    """An update: loss, norm, weights that moved by the rate at most, the given state unchanged."""
    problem = problem_in(size, numerics, dtype, size.device)
    params = problem.params
    mesh = one_rank_mesh(size.device) if way.mesh else None
    fns = e3.bind(problem.config, problem.frozen, mesh)
    state = fns.init_state(params)
    after, metrics = fns.step(state, problem.batch, donate=way.donate)

    if not way.donate:
        unchanged = equal(e3.gather(state).params, params)
        assert unchanged, "step changed the state that it was given"
    check_moved(e3.gather(after), params, metrics["learning_rate"])

    expected_loss, gradients = size.truth
    squares = [float(leaf.double().square().sum()) for leaf in gradients.values()]
    return {
        "loss": apart(metrics["loss"], expected_loss) / LOSS_BOUND[dtype],
        "gradient norm": apart(metrics["grad_norm"], sum(squares) ** 0.5) / NORM_BOUND[dtype],
    }


def check_moved(state: e3.TrainState, params: Params, rate: float) -> None:
    """The first update counts as one, and no weight moves by more than the rate."""
    assert int(state.step) == 1
    moved = 0.0
    for name, leaf in params.items():
        master = state.masters[name]
        change = master.double() - leaf.to(master.device).double()
        moved = max(moved, float(change.abs().max()))
    assert 0 < moved <= 1.01 * rate, f"weights moved by {moved}"


# Losses, optimizers and what else is a value: the fast numerics as the plain ones.


def of_loss(
    size: Size, numerics: str, dtype: torch.dtype, name: str = "kl"
) -> tuple[Tensor, Params]:
    """The value of a named loss and its gradients, on the device."""
    problem = problem_in(size, numerics, dtype, size.device)
    objective = replace(problem.config.objective, loss=name)
    fns = e3.bind(replace(problem.config, objective=objective), problem.frozen)
    compute = e3.value_and_grad(fns.forward_loss, has_aux=True)
    (loss, _), gradients = compute(problem.params, problem.batch)
    return loss, gradients


def check_loss(size: Size, name: str, dtype: torch.dtype) -> dict[str, float]:
    """A loss by row under the fast numerics, against the plain ones in fp32."""
    loss, gradients = of_loss(size, "fast", dtype, name)
    expected_loss, expected = of_loss(size, "plain", torch.float32, name)
    return {
        "loss": apart(loss, float(expected_loss)) / LOSS_BOUND[dtype],
        "gradients": error_of_all(gradients, expected) / GRADIENT_BOUND[dtype],
    }


def check_by_sample(size: Size) -> dict[str, float]:
    """`vmap` of `grad` over the samples of a batch gives the gradients of each alone."""
    problem = problem_in(size, "fast", torch.float32, size.device)
    fns = e3.bind(problem.config, problem.frozen)
    batch = problem.batch._replace(plan=None)
    fields = {name: x for name, x in batch._asdict().items() if x is not None}
    samples = tree_map(lambda x: x[:, None], fields)  # (B, 1, …)

    def loss_of(params: Params, sample: dict[str, Any]) -> Tensor:
        return fns.forward_loss(params, e3.Batch(**sample))[0]

    mapped = torch.func.vmap(torch.func.grad(loss_of), in_dims=(None, 0))
    found = mapped(problem.params, samples)
    errors = {}
    for i in range(size.batch):
        sample = tree_map(partial(torch.select, dim=0, index=i), samples)
        _, alone = e3.value_and_grad(loss_of)(problem.params, sample)
        one = {name: leaf[i] for name, leaf in found.items()}
        errors[f"sample {i}"] = error_of_all(one, alone) / GRADIENT_BOUND[torch.float32]
    return errors


def check_optimizer(size: Size, name: str, mesh: bool) -> dict[str, float]:
    """Two updates, the second donated, against the CPU's of the plain numerics.

    Gradients are fp64, so that only the optimizer's own rounding differs. Muon makes matrices
    orthogonal by what the device is fast at: the CPU's updates do so by the same, in fp64.
    """
    orthogonal = partial(newton_schulz, dtype=torch.float64) if size.device != "cpu" else rational

    def masters(numerics: str, device: str, mesh: Any) -> Params:
        problem = problem_in(size, numerics, torch.float64, device)
        settings = replace(problem.config.optimizer, name=name)
        config = replace(problem.config, optimizer=settings)
        own = None
        if name == "muon" and device != size.device:
            own = muon(settings, orthogonal)
        fns = e3.bind(config, problem.frozen, mesh, optimizer=own)
        state = fns.init_state(problem.params)
        state, _ = fns.step(state, problem.batch)
        state, _ = fns.step(state, problem.batch, donate=True)
        return e3.gather(state).masters

    before = {leaf: x.double() for leaf, x in size.drawn[1].items()}
    found = masters("fast", size.device, one_rank_mesh(size.device) if mesh else None)
    expected = masters("plain", size.truth_device, None)
    moved = {leaf: expected[leaf] - x for leaf, x in before.items()}
    assert all(bool(x.any()) for x in moved.values()), "a leaf that did not move"
    mine = {leaf: found[leaf].to(x.device) - x for leaf, x in before.items()}
    return {"updates": error_of_all(mine, moved) / UPDATE_BOUND}


def under_specforge(problem: InDtype) -> e3.Config:
    """SpecForge's settings for a problem."""
    config = problem.config
    train = {"steps": 100, "dtype": config.train.dtype, "device": config.train.device}
    made = specforge.recipe(
        config.draft,
        objective={"ttt_length": config.objective.ttt_length},
        optimizer={"learning_rate": RATE},
        train=train,
    )
    return made.config


def check_specforge(size: Size, dtype: torch.dtype) -> dict[str, float]:
    """An update by SpecForge's recipe; its loss is that of the plain numerics in fp64."""
    problem = problem_in(size, "plain", dtype, size.device)
    fns = e3.bind(under_specforge(problem), problem.frozen, recipe=specforge.RECIPE)
    after, metrics = fns.step(fns.init_state(problem.params), problem.batch)
    check_moved(after, problem.params, metrics["learning_rate"])
    return {"loss": apart(metrics["loss"], size.specforge_truth) / LOSS_BOUND[dtype]}


# The start of a run, its resume, and the caller's settings of torch.


def functions(size: Size, name: str) -> tuple[e3.Functions, InDtype]:
    """The bound functions of these numerics, or of SpecForge's recipe, in bf16 on the device."""
    if name != "SpecForge":
        problem = problem_in(size, name, torch.bfloat16, size.device)
        return e3.bind(problem.config, problem.frozen), problem
    problem = problem_in(size, "plain", torch.bfloat16, size.device)
    problem = problem._replace(config=under_specforge(problem))
    return e3.bind(problem.config, problem.frozen, recipe=specforge.RECIPE), problem


def check_init(size: Size) -> dict[str, float]:
    """`init` with a start from the target: the CPU's bits, on the device; and a finite loss."""
    problem = problem_in(size, "fast", torch.bfloat16, size.device)
    norm = torch.linspace(0.5, 1.5, size.draft.target_hidden_size, device=size.device).bfloat16()
    frozen = problem.frozen._replace(target_norm=norm)
    assert problem.config.train.init == "target"
    fns = e3.bind(problem.config, frozen)
    params = fns.init(0)
    devices = {leaf.device.type for leaf in params.values()}
    assert devices == {size.device}, f"parameters on {devices}"

    # The same on the CPU.
    train = replace(problem.config.train, device="cpu")
    on_cpu = replace(problem.config, train=train)
    frozen_cpu = tree_map(lambda x: x.cpu(), frozen)
    expected = e3.bind(on_cpu, frozen_cpu).init(0)
    assert equal(tree_map(lambda x: x.cpu(), params), expected), "not the parameters of the CPU"

    loss, _ = fns.forward_loss(params, problem.batch)
    assert bool(torch.isfinite(loss)), f"loss {loss}"
    return {}


def check_resume(size: Size, sharded: bool) -> dict[str, float]:
    """A checkpoint read into empty leaves on the device: the same bits, and the next step runs."""
    problem = problem_in(size, "fast", torch.bfloat16, size.device)
    config = problem.config
    mesh = one_rank_mesh(size.device) if sharded else None
    fns = e3.bind(config, problem.frozen, mesh)
    state, first = fns.step(fns.init_state(problem.params), problem.batch)

    data = {"features": "of this check"}
    with tempfile.TemporaryDirectory() as folder:
        path = save_checkpoint(folder, state, config, data, {}, 1)
        empty = empty_state(config, size.device, mesh)
        found = load_checkpoint(path, empty, config, data).state

    for name, leaf in named_leaves(state).items():
        read = named_leaves(found)[name]
        same = read.device == leaf.device and read.dtype == leaf.dtype
        assert same, f"{name}: {read.dtype} on {read.device}, was {leaf.dtype} on {leaf.device}"
    assert equal(e3.gather(found), e3.gather(state)), "not the bits that were saved"

    after, metrics = fns.step(found, problem.batch)
    assert int(after.step) == 2
    assert float(metrics["loss"]) != float(first["loss"]), "the second step has the first's loss"
    return {}


def check_autocast(size: Size, name: str) -> dict[str, float]:
    """Inside the caller's autocast the loss is refused; inside a disabled one it is computed."""
    fns, problem = functions(size, name)
    with torch.autocast(size.device, torch.bfloat16):
        try:
            fns.forward_loss(problem.params, problem.batch)
        except e3.UserError as error:
            assert "torch.autocast is on" in str(error), error
        else:
            raise AssertionError("torch.autocast was not refused")

    with torch.autocast(size.device, enabled=False):
        fns.forward_loss(problem.params, problem.batch)
    return {}


def check_default_dtype(size: Size, name: str) -> dict[str, float]:
    """Under another default dtype: the same start, dtypes and loss."""
    fns, problem = functions(size, name)

    def run() -> tuple[Tensor, Aux, Params]:
        compute = e3.value_and_grad(fns.forward_loss, has_aux=True)
        (loss, aux), gradients = compute(problem.params, problem.batch)
        return loss, aux, gradients

    expected = run()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = run()
    finally:
        torch.set_default_dtype(before)

    for path, leaf in named_leaves(expected).items():
        dtype = named_leaves(found)[path].dtype
        assert dtype == leaf.dtype, f"{path}: {dtype}, without it {leaf.dtype}"
    loss, *_ = found
    return {"loss": apart(loss, float(expected[0])) / LOSS_BOUND[torch.float32]}


# A random target: extraction and decoding.


@cache
def target(shape: str, device: str, vocab: int | None, dtype: torch.dtype = torch.float32) -> Any:
    """A Llama of this shape with `DEPTH` layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    draft = draft_of(shape, vocab, 2048)
    config = LlamaConfig(
        hidden_size=draft.hidden_size,
        intermediate_size=draft.intermediate_size,
        num_hidden_layers=DEPTH,
        num_attention_heads=draft.num_attention_heads,
        num_key_value_heads=draft.num_key_value_heads,
        head_dim=draft.head_dim,
        vocab_size=draft.vocab_size,
        max_position_embeddings=2048,
        initializer_range=2 * draft.hidden_size**-0.5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval().requires_grad_(False)


def target_of(size: Size) -> Any:
    """The size's target in fp32."""
    return target(size.shape, size.device, size.draft.draft_vocab_size)


def check_extract(size: Size) -> dict[str, float]:
    """Features of two samples in a batch are those of each alone; tiny: also the CPU's in fp64."""
    model = target_of(size)
    source = torch.Generator().manual_seed(4)
    samples = []
    for length in (21, 33):
        ids = torch.randint(0, size.draft.vocab_size, (length,), generator=source)
        samples.append(Encoded(str(length), ids, torch.ones_like(ids)))
    layers = aux_layers(size.draft, DEPTH)
    together = list(roll_out(model, samples, layers, 66))
    alone = list(roll_out(model, samples, layers, 1))

    errors = {}
    for a, b in zip(together, alone, strict=True):
        length = len(a.input_ids)
        errors[f"aux_hidden of {length}"] = error(a.aux_hidden, b.aux_hidden) / FEATURE_BOUND
        errors[f"last_hidden of {length}"] = error(a.last_hidden, b.last_hidden) / FEATURE_BOUND
    if size.name == "tiny":
        wide = list(roll_out(copy.deepcopy(model).cpu().double(), samples, layers, 1))
        errors["against fp64"] = error(alone[1].last_hidden, wide[1].last_hidden) / FEATURE_BOUND
    return errors


def check_online(size: Size) -> dict[str, float]:
    """Features that a thread computes ahead on the device are those of a plain call, bit by bit."""
    model = target_of(size)
    source = torch.Generator().manual_seed(6)
    rows = []
    for number, length in enumerate((21, 33, 12, 40, 27, 18)):
        ids = torch.randint(0, size.draft.vocab_size, (length,), generator=source)
        rows.append(Encoded(str(number), ids, torch.ones_like(ids)))
    layers = aux_layers(size.draft, DEPTH)
    alone = list(roll_out(model, rows, layers, 1))

    # Three updates of two samples, in another order than the rows'.
    order = (3, 0, 5, 1, 2, 4)
    shares = [
        stages.Item(stages.Share([list(order[place : place + 2])], []), place + 2)
        for place in (0, 2, 4)
    ]
    with features_of(model_source(model, layers, batch_tokens=1), rows) as features:
        loaded = [item.value.bins[0] for item in stages.read(iter(shares), features)]
    found = [sample for samples in loaded for sample in samples]
    for number, sample in zip(order, found, strict=True):
        assert equal(sample, alone[number]), f"sample {number} has other bits"
    return {}


def check_decode(size: Size) -> dict[str, float]:
    """Speculative decoding with a random draft gives plain decoding's tokens."""
    model = target_of(size)
    drawn, params = size.drawn
    vocab = VocabMap(drawn.frozen.t2d.to(size.device), drawn.frozen.d2t.to(size.device))
    there = {name: leaf.to(size.device, torch.float32) for name, leaf in params.items()}
    draft = Draft(size.draft, there, vocab, None)
    source = torch.Generator().manual_seed(5)
    prompt = torch.randint(0, size.draft.vocab_size, (1, 9), generator=source).to(size.device)

    plain = speculate(model, None, prompt, 0, 16, ()).tokens
    assert len(plain) == 16
    for length in (1, 4):
        found = speculate(model, draft, prompt, length, 16, ())
        assert found.tokens == plain, f"draft length {length}: {found.tokens}, plainly {plain}"
        assert sum(found.drafted_by_position) > 0
    return {}


def apart(found: Any, expected: float) -> float:
    """The relative error of a number."""
    return abs(float(found) / expected - 1)


def error(found: Tensor, expected: Tensor) -> float:
    """The relative error of a tensor: `‖found - expected‖ / ‖expected‖`."""
    found = found.detach().double().cpu()
    expected = expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


def error_of_all(found: Params, expected: Params) -> float:
    """The relative error of all leaves as one vector, computed where `expected` is."""
    off, total = 0.0, 0.0
    for name, leaf in expected.items():
        difference = found[name].to(leaf.device).double() - leaf
        off += float(difference.square().sum())
        total += float(leaf.square().sum())
    return (off / total) ** 0.5


# The part.


def run(
    report: Report, found: list[Named], first: int, device: str, again: Callable[[int], None]
) -> None:
    """Run the checks from the place `first` on.

    `again` is called with the next check's place if a check leaves no usable card.
    """
    report.result["all"] = len(found)
    for place, named in enumerate(found):
        if place < first:
            continue
        if report.left() <= 0:
            report.leave_out(named.name)
            continue

        row = run_check(report, named, device)
        lost = not row["passed"] and context_lost(device)
        if not lost:
            tidy(device)
        report.change(lambda result, row=row: result["checks"].append(row))
        if lost:
            report.write()
            again(place + 1)


def run_check(report: Report, named: Named, device: str) -> dict[str, Any]:
    """One check's row: its errors as shares of their bounds, whether it passed, seconds, memory."""
    row: dict[str, Any] = {"check": named.name, "passed": False}
    begin = time.monotonic()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()

    with report.guarded(named.name):
        row["of_bound"] = {what: float(f"{share:.3g}") for what, share in named.check().items()}
        beyond = {what: share for what, share in row["of_bound"].items() if not share <= 1}
        assert not beyond, f"beyond the bound, as shares of it: {beyond}"
        if device != "cpu":
            torch.cuda.synchronize()
            row["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
        row["passed"] = True

    row["seconds"] = round(time.monotonic() - begin, 2)
    return row


def tidy(device: str) -> None:
    """Free what a check has left."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def parse(arguments: list[str] | None = None) -> Any:
    """The options of the part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    part_options(parser)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    return parse_part(parser, arguments)


def go_on(report: Report, device: str, first: int) -> None:
    """Replace this process by a new one, which begins at a later check and has a usable card.

    The results so far are in the file.
    """
    if report.result["restarts"] >= RESTARTS:
        raise RuntimeError(f"the card was unusable more than {RESTARTS} times")
    report.result["restarts"] += 1
    report.write()

    seconds = max(report.left(), 0.001)
    words = [f"--device={device}", f"--seconds={seconds}", f"--out={report.out}"]
    os.environ[BEGAN] = str(time.monotonic())
    command = [sys.executable, "-m", "tests.gate.smoke", *words, f"--first={first}"]
    os.execv(sys.executable, command)


def main() -> int:
    """Run the part."""
    options = parse()
    if options.device == "cpu":
        mend_interpreter()
        # Read when Triton is loaded, at the first kernel.
        os.environ.setdefault("TRITON_INTERPRET", "1")

    if options.first:
        before = read_json(options.out)
    else:
        before = {"device": options.device, "checks": [], "restarts": 0}
    report = Report(options.out, options.seconds, before)
    report.write()

    found: list[Named] = []
    with report.guarded("smoke"):
        found = list(checks(options.device))
        again = partial(go_on, report, options.device)
        run(report, found, options.first, options.device, again)

    # What ran, whichever process it was in.
    ran = {row["check"] for row in report.result["checks"]}
    if not ran:
        report.fault("smoke", "no check ran")
    report.result["left_out"] = [name for name, _ in found if name not in ran]
    code = report.finish()
    if dist.is_initialized():  # by the steps on a mesh
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    run_part(main)
