"""Smoke on a card, a part of the CUDA gate: everything that a run uses, once tiny and once at real widths.

`python -m tests.gate.smoke --device cuda --seconds 75 --out FILE`. Each check is alone: what it raises is kept with its
traceback, and the next one runs. Results are held against fp64: at the tiny size on the CPU, at real widths by the
legacy numerics on the device itself. On the CPU the kernels are interpreted and real widths are SmolLM2's.
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import eagle3fn as e3
from bench.problem import Problem, draft_of, draw_params, make_problem
from bench.sides import one_rank_mesh
from eagle3fn.base.draft_config import aux_layers
from eagle3fn.base.files import read_json
from eagle3fn.base.tree import tree_map
from eagle3fn.base.types import Params, VocabMap
from eagle3fn.data.extract import Encoded
from eagle3fn.data.online import roll_out
from eagle3fn.model import head_loss as fused
from eagle3fn.model import losses
from eagle3fn.model.block_attention import block_attention, make_blocks
from eagle3fn.model.flash_attention import flash_attention
from eagle3fn.model.kernels import score as score_kernel
from eagle3fn.specforge import kl_kernel as legacy_kl
from eagle3fn.testing.gate_part import (
    BEGAN,
    Report,
    context_lost,
    parse_part,
    part_options,
    run_part,
)
from eagle3fn.testing.triton_interpreter import mend_interpreter
from eagle3fn.use.decode import speculate
from eagle3fn.use.export import Draft

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
NUMERICS = ("fast", "plain")
BOUND = {
    torch.bfloat16: 0.15,
    torch.float32: 1e-4,
    torch.float64: 1e-9,
}  # relative error of all gradients together
LOSS_BOUND = {torch.bfloat16: 0.01, torch.float32: 1e-5, torch.float64: 1e-11}  # of the loss
NORM_BOUND = {
    torch.bfloat16: 0.05,
    torch.float32: 1e-3,
    torch.float64: 1e-9,
}  # of the gradients' norm, summed in fp32
KERNEL_BOUND = {
    torch.bfloat16: 0.02,
    torch.float32: 1e-5,
}  # of what a kernel gives; bf16: of what it stores
REAL_MEMORY = 48 << 30  # bytes that are free on a card where Qwen2.5-7B's widths are taken
RESTARTS = 4  # of this process, where a check has lost it the card
DEPTH = 6  # layers of the random target
RATE = 1e-4

Check = Callable[[], dict[str, float]]
"""Runs something; gives the errors that are held against bounds by name, each as a share of its bound."""


class Size:
    """The problem that everything is run on."""

    def __init__(
        self, name: str, shape: str, device: str, seq: int, batch: int, k: int, vocab: int | None
    ) -> None:
        self.name = name
        self.shape = shape
        self.device = device
        self.seq = seq
        self.batch = batch
        self.k = k
        self.draft = draft_of(shape, vocab, seq)

    @cached_property
    def home(self) -> str:
        """Where the truth is computed."""
        return "cpu" if self.name == "tiny" else self.device

    @cached_property
    def drawn(self) -> tuple[Problem, Params]:
        """Batch, frozen tensors and parameters in bf16, so that each dtype has the same problem."""
        kind = {"dtype": torch.bfloat16, "device": self.home}
        made = make_problem(
            self.draft, batch=self.batch, seq=self.seq, masked=0.5, k=self.k, seed=0, **kind
        )
        return made, draw_params(self.draft, 0, **kind)

    @cached_property
    def truth(self) -> tuple[float, Params]:
        """Loss and gradients of the legacy numerics in fp64."""
        (loss, _), gradients = gradient(self, "plain", torch.float64, self.home)
        return float(loss), {name: leaf.to(self.home) for name, leaf in gradients.items()}


def sizes(device: str) -> list[Size]:
    """The tiny size, and real widths that the memory allows."""
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
    """All of them, the cheapest and most telling first."""
    for size in sizes(device):
        for dtype in (torch.float32, torch.bfloat16):
            for kernel in (check_score, check_legacy_kl):
                yield Named(
                    f"{size.name} {kernel.__name__[6:]} kernel {short(dtype)}",
                    partial(kernel, size, dtype),
                )
        yield Named(f"{size.name} flash attention bf16", partial(check_flash, size))
        for dtype in DTYPES:
            for numerics in NUMERICS:
                about = f"{size.name} {numerics} {short(dtype)}"
                yield Named(f"{about} forward", partial(check_forward, size, numerics, dtype))
                yield Named(f"{about} backward", partial(check_backward, size, numerics, dtype))
                for way in ("plain", "donated", "mesh", "mesh donated"):
                    yield Named(
                        f"{about} step {way}", partial(check_step, size, numerics, dtype, way)
                    )
            if dtype == torch.bfloat16:
                yield Named(f"{size.name} extract", partial(check_extract, size))
                yield Named(f"{size.name} decode", partial(check_decode, size))


def short(dtype: torch.dtype) -> str:
    """bf16, fp32, fp64."""
    return {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}[dtype]


# The kernels, each alone against its expression in fp64 on the CPU.


def check_score(size: Size, dtype: torch.dtype) -> dict[str, float]:
    """KL, acceptance, what is correct, and the gradient that is written over the logits."""
    source = torch.Generator().manual_seed(1)
    d, v, steps, labels = size.draft.draft_vocab_size, size.draft.vocab_size, 2, 5
    kept = torch.randperm(v, generator=source)[:d].sort().values
    t2d = torch.zeros(v, dtype=torch.bool).index_fill(0, kept, True)
    logits = (torch.randn(steps, labels, d, generator=source) * 2).to(dtype)
    z = (torch.randn(labels, v, generator=source) * 2).to(dtype)

    mine = logits.to(size.device, copy=True)
    found = score_kernel.score(mine, z.to(size.device), t2d.to(size.device), kept.to(size.device))
    wide = logits.double()
    kl, correct, accept, known = fused.score(wide, z.double(), t2d, kept)

    same = torch.equal(found[1].cpu(), correct) and torch.equal(found[3].cpu(), known)
    assert same, "another largest logit than the expression's"
    return {
        "kl": error(found[0], kl) / KERNEL_BOUND[torch.float32],
        "acceptance": error(found[2], accept) / KERNEL_BOUND[torch.float32],
        "gradient": error(mine, wide) / KERNEL_BOUND[dtype],
    }


def check_legacy_kl(size: Size, dtype: torch.dtype) -> dict[str, float]:
    """The mean over rows, some of them masked, and the gradient by the logits."""
    source = torch.Generator().manual_seed(2)
    shape = (1, 6, size.draft.draft_vocab_size)
    logits = (torch.randn(shape, generator=source) * 2).to(dtype)
    p = torch.randn(shape, generator=source).softmax(-1)
    mask = torch.tensor([1, 1, 0, 1, 0, 1]).view(1, 6, 1)

    def run(kl: losses.KL, device: str, z: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        z, p, on = z.to(device), p.to(device), mask.to(device)
        return e3.value_and_grad(lambda x: kl(x, p, on, None))(z)

    found = run(legacy_kl.mean_kl, size.device, logits, p)
    want = run(losses.kl_loss, "cpu", logits.double(), p.double())
    return {
        "loss": error(found[0], want[0]) / KERNEL_BOUND[torch.float32],
        "gradient": error(found[1], want[1]) / KERNEL_BOUND[dtype],
    }


def check_flash(size: Size) -> dict[str, float]:
    """Attention of some rows with two later keys each, and its five kinds of gradients."""
    draft = size.draft
    source = torch.Generator().manual_seed(3)
    n, j, e = draft.num_attention_heads, draft.num_key_value_heads, draft.head_dim
    rows = torch.arange(3, size.seq, 2)
    shapes = [(len(rows), n, e), *[(1, size.seq, j, e)] * 2, *[(len(rows), j, e)] * 4]
    inputs = [torch.randn(shape, generator=source).bfloat16() for shape in shapes]
    grad = torch.randn(shapes[0], generator=source).bfloat16()

    def run(attend: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
        split = lambda q, key, value, *own: attend(q, key, value, own[:2], own[2:])  # noqa: E731
        out, pullback = torch.func.vjp(split, *inputs)  # pyright: ignore
        return [out, *pullback(grad)]

    flash = partial(flash_attention, rows=rows.to(size.device))
    found = run(flash, [x.to(size.device) for x in inputs], grad.to(size.device))
    plain = partial(block_attention, rows=rows, blocks=make_blocks(rows, size.seq))
    want = run(plain, [x.double() for x in inputs], grad.double())
    names = ("out", "q", "key", "value", "later key", "later key 2", "later value", "later value 2")
    return {name: error(a, b) / 0.03 for name, a, b in zip(names, found, want, strict=True)}


# The objective and the step.


def problem_in(
    size: Size, numerics: str, dtype: torch.dtype, device: str
) -> tuple[e3.Config, Problem, Params]:
    """The size's problem in a dtype, on a device, under these numerics."""
    drawn, params = size.drawn

    def move(x: Tensor) -> Tensor:
        return x.to(device, dtype if x.is_floating_point() else None)

    config = e3.Config(
        size.draft,
        e3.ObjectiveConfig(ttt_length=size.k, numerics=numerics),  # pyright: ignore
        e3.OptimizerConfig(learning_rate=RATE),
        train=e3.TrainConfig(steps=100, dtype=str(dtype).split(".")[1], device=device),  # pyright: ignore
    )
    moved = Problem(drawn.draft, tree_map(move, drawn.frozen), tree_map(move, drawn.batch))
    return config, moved, tree_map(move, params)


def gradient(size: Size, numerics: str, dtype: torch.dtype, device: str) -> Any:
    """`((loss, aux), gradients)`."""
    config, problem, params = problem_in(size, numerics, dtype, device)
    fns = e3.bind(config, problem.frozen)
    return e3.value_and_grad(fns.forward_loss, has_aux=True)(params, problem.batch)


def check_forward(size: Size, numerics: str, dtype: torch.dtype) -> dict[str, float]:
    """The loss; the metrics are finite."""
    config, problem, params = problem_in(size, numerics, dtype, size.device)
    loss, aux = e3.bind(config, problem.frozen).forward_loss(params, problem.batch)
    assert all(bool(torch.isfinite(x).all()) for x in aux), f"not finite: {aux}"
    return {"loss": abs(float(loss) / size.truth[0] - 1) / LOSS_BOUND[dtype]}


def check_backward(size: Size, numerics: str, dtype: torch.dtype) -> dict[str, float]:
    """The loss, and all gradients together."""
    (loss, _), gradients = gradient(size, numerics, dtype, size.device)
    return {
        "loss": abs(float(loss) / size.truth[0] - 1) / LOSS_BOUND[dtype],
        "gradients": error_of_all(gradients, size.truth[1]) / BOUND[dtype],
    }


def check_step(size: Size, numerics: str, dtype: torch.dtype, way: str) -> dict[str, float]:
    """An update: its loss and norm, weights that moved by the rate at most, and a state left as it was, or given up."""
    config, problem, params = problem_in(size, numerics, dtype, size.device)
    mesh = one_rank_mesh(size.device) if way.startswith("mesh") else None
    fns = e3.bind(config, problem.frozen, mesh)
    state = fns.init_state(params)
    donated = way.endswith("donated")
    after, metrics = fns.step(state, problem.batch, donate=donated)

    if not donated:
        kept = e3.gather(state).params if mesh else state.params
        assert all(torch.equal(kept[name], params[name]) for name in params), (
            "the given state was written to"
        )
    whole = e3.gather(after) if mesh else after
    assert int(whole.step) == 1
    moved = max(
        float(
            (whole.masters[name].double() - leaf.to(whole.masters[name].device).double())
            .abs()
            .max()
        )
        for name, leaf in params.items()
    )
    assert 0 < moved <= 1.01 * metrics["learning_rate"], f"weights moved by {moved}"
    norm = sum(float(leaf.double().square().sum()) for leaf in size.truth[1].values()) ** 0.5
    return {
        "loss": abs(float(metrics["loss"]) / size.truth[0] - 1) / LOSS_BOUND[dtype],
        "gradient norm": abs(float(metrics["grad_norm"]) / norm - 1) / NORM_BOUND[dtype],
    }


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
    """Features of two rows together are those of each alone, and at the tiny size the CPU's in fp64."""
    model = target_of(size)
    source = torch.Generator().manual_seed(4)
    rows = []
    for length in (21, 33):
        ids = torch.randint(0, size.draft.vocab_size, (length,), generator=source)
        rows.append(Encoded(str(length), ids, torch.ones_like(ids)))
    layers = aux_layers(size.draft, DEPTH)
    together, alone = (list(roll_out(model, rows, layers, batch)) for batch in (2, 1))
    told = {}
    for pair in zip(together, alone, strict=True):
        for name in ("aux_hidden", "last_hidden"):
            told[f"{name} of {len(pair[0].input_ids)}"] = (
                error(*(getattr(x, name) for x in pair)) / 1e-3
            )
    if size.name == "tiny":
        import copy

        wide = list(roll_out(copy.deepcopy(model).cpu().double(), rows, layers, 1))
        told["against fp64"] = error(alone[1].last_hidden, wide[1].last_hidden) / 1e-3
    return told


def check_decode(size: Size) -> dict[str, float]:
    """With a random draft the tokens are those of plain decoding, each way of two draft lengths."""
    model = target_of(size)
    drawn = size.drawn[0].frozen
    vocab = VocabMap(drawn.t2d.to(size.device), drawn.d2t.to(size.device))
    params = {name: leaf.to(size.device, torch.float32) for name, leaf in size.drawn[1].items()}
    draft = Draft(size.draft, params, vocab, None)
    source = torch.Generator().manual_seed(5)
    prompt = torch.randint(0, size.draft.vocab_size, (1, 9), generator=source).to(size.device)
    plain = speculate(model, None, prompt, 0, 16, ()).tokens
    assert len(plain) == 16
    for length in (1, 4):
        found = speculate(model, draft, prompt, length, 16, ())
        assert found.tokens == plain, f"draft length {length}: {found.tokens}, plainly {plain}"
        assert sum(found.drafted_by_position) > 0
    return {}


def error(found: Tensor, want: Tensor) -> float:
    """The error's norm over that of what is wanted."""
    found, want = found.detach().double().cpu(), want.detach().double().cpu()
    return float((found - want).norm() / want.norm())


def error_of_all(found: Params, want: Params) -> float:
    """The same over all leaves as one, where they are."""
    apart = sum(
        float((found[name].to(want[name].device).double() - want[name]).square().sum())
        for name in want
    )
    return (apart / sum(float(leaf.square().sum()) for leaf in want.values())) ** 0.5


def run(
    report: Report, found: list[Named], first: int, device: str, again: Callable[[int], None]
) -> None:
    """Run the checks from the first one on; `again` is called with the next one's place where the card is lost."""
    report.result["all"] = len(found)
    for place, (name, check) in enumerate(found):
        if place < first:
            continue
        if report.left() <= 0:
            report.leave_out(name)
            continue
        faults = len(report.result["faults"]) + report.result["more_faults"]
        row: dict[str, Any] = {"check": name}
        begin = time.monotonic()
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        with report.guarded(name):
            row["of_bound"] = {what: float(f"{share:.3g}") for what, share in check().items()}
            beyond = {what: share for what, share in row["of_bound"].items() if not share <= 1}
            assert not beyond, f"beyond the bound, as shares of it: {beyond}"
        row["passed"] = len(report.result["faults"]) + report.result["more_faults"] == faults
        lost = not row["passed"] and context_lost(device)
        if not lost:
            tidy(device)
            if device != "cpu":
                row["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
        row["seconds"] = round(time.monotonic() - begin, 2)
        report.change(lambda result, row=row: result["checks"].append(row))
        if lost:
            report.write()
            again(place + 1)


def tidy(device: str) -> None:
    """Give back what a check has left."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def main() -> int:
    """The part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    part_options(parser)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    options = parse_part(parser)
    if options.device == "cpu":
        mend_interpreter()
    before = (
        read_json(options.out)
        if options.first
        else {"device": options.device, "checks": [], "restarts": 0}
    )
    report = Report(options.out, options.seconds, before)
    report.write()

    def again(first: int) -> None:
        """Go on in this process's place with a card that works; what was found stands in the file."""
        if report.result["restarts"] >= RESTARTS:
            raise RuntimeError("the card was lost too often")
        report.result["restarts"] += 1
        report.write()
        words = [
            f"--device={options.device}",
            f"--seconds={max(report.left(), 0.001)}",
            f"--out={options.out}",
        ]
        os.environ[BEGAN] = str(time.monotonic())
        os.execv(
            sys.executable, [sys.executable, "-m", "tests.gate.smoke", *words, f"--first={first}"]
        )

    found: list[Named] = []
    with report.guarded("smoke"):
        if options.device == "cpu":
            os.environ.setdefault(
                "TRITON_INTERPRET", "1"
            )  # read when Triton is loaded, at the first kernel
        found = list(checks(options.device))
        run(report, found, options.first, options.device, again)
    ran = {row["check"] for row in report.result["checks"]}
    if not ran:
        report.fault("smoke", "no check ran")
    report.result["left_out"] = [name for name, _ in found if name not in ran]
    code = report.finish()
    if dist.is_initialized():  # the steps on a mesh of one
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    run_part(main)
