"""What Muon's update costs: its matrices by `rational` and by Newton-Schulz, AdamW, a fast step.

    python -m bench.orthogonal --draft-vocab 8192

Sides are updates of all parameters, and a fast step with AdamW's update in it. The Newton-Schulz
side computes in fp32 where the device does not multiply bf16. The last line is JSON: `ratio` is
each side's time over AdamW's update, `of_step` over the step's; `flops` of one update's
orthogonal matrices, and `share` of them for the busiest of 1, 2, 4, 8 ranks.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from bench.launch import settle

    settle()

import argparse
import math
from functools import partial
from typing import Any, NamedTuple

import torch

import eagle3fn as e3
from bench import common
from bench.launch import add_arguments
from bench.problem import Drawer, draft_of, draw_params, make_problem
from eagle3fn.base.config import Config
from eagle3fn.base.device import multiplies_bf16
from eagle3fn.base.launch import World
from eagle3fn.base.provenance import provenance
from eagle3fn.base.types import Params
from eagle3fn.model.table import roles
from eagle3fn.train.optimizer import Optimizer, UpdateInfo, adamw, muon
from eagle3fn.train.orthogonal import newton_schulz
from eagle3fn.train.shard import leaves_of, on_whole, owners_of

ROUNDS = 5
SETTINGS = ("shape", "seq", "masked", "k", "matrices", "dtype", "device", "seed", "allocator")
WORLDS = (1, 2, 4, 8)


class Zolotarev(NamedTuple):
    """`scale · x · (1 + Σ weight / (x² + shift))`, and how far it is from the sign of x at most."""

    scale: float
    poles: tuple[tuple[float, float], ...]  # weight, shift
    error: float

    def __call__(self, x: float) -> float:
        """The value at `x`."""
        return self.scale * x * (1 + sum(weight / (x * x + shift) for weight, shift in self.poles))


def zolotarev(floor: float, poles: int) -> Zolotarev:
    """The rational function of this form that is nearest to the sign of x on `floor` ≤ |x| ≤ 1.

    By Zolotarev (1877), with `k = √(1 - floor²)`, `n = 2 · poles + 1` and Jacobi's functions,

        c_i = floor² · sn²(i K / n; k) / cn²(i K / n; k),  f(x) ∝ x Π (x² + c_2j) / (x² + c_2j-1)
    """
    k = math.sqrt(1 - floor * floor)
    n = 2 * poles + 1
    quarter = math.pi / 2 / _means(k)[-1][0]  # K
    c = [(floor * _tangent(i * quarter / n, k)) ** 2 for i in range(1, n)]
    zeros, shifts = c[1::2], c[0::2]

    # Partial fractions.
    weights = []
    for i, shift in enumerate(shifts):
        others = [other - shift for j, other in enumerate(shifts) if j != i]
        weights.append(math.prod(zero - shift for zero in zeros) / math.prod(others))
    unscaled = Zolotarev(1.0, tuple(zip(weights, shifts, strict=True)), 0.0)

    # On a grid of logarithms, its extremes: scaled, they lie as far above 1 as below.
    values = [unscaled(floor ** (i / 20_000)) for i in range(20_001)]
    low, high = min(values), max(values)
    return unscaled._replace(scale=2 / (high + low), error=(high - low) / (high + low))


def _means(k: float) -> list[tuple[float, float]]:
    """Arithmetic means of 1 and `√(1 - k²)`, on to their geometric ones; half the differences."""
    rows = [(1.0, k)]
    geometric = math.sqrt(1 - k * k)
    while rows[-1][1] > 1e-16:
        mean = rows[-1][0]
        rows.append(((mean + geometric) / 2, (mean - geometric) / 2))
        geometric = math.sqrt(mean * geometric)
    return rows


def _tangent(u: float, k: float) -> float:
    """`sn(u; k) / cn(u; k)`, by Landen's transformation down from the last mean."""
    rows = _means(k)
    angle = 2 ** (len(rows) - 1) * rows[-1][0] * u
    for mean, half in reversed(rows[1:]):
        angle = (angle + math.asin(half / mean * math.sin(angle))) / 2
    return math.tan(angle)


def matrix_flops(shape: tuple[int, ...], method: str) -> int:
    """FLOPs of one matrix `(A, B)`, as `train.orthogonal` has them."""
    m, n = sorted(shape)
    return 3 * m * m * n + 2 * m**3 if method == "rational" else 20 * m * m * n + 10 * m**3


def parse() -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    common.add_problem_arguments(parser)
    add = parser.add_argument
    add("--seq", type=int, default=512, help="tokens of a sample (default 512)")
    add("--draft-vocab", type=int, help="draft vocabulary (default: the shape's)")
    about = "whose update is Muon's (default attention)"
    add("--matrices", choices=("attention", "all"), default="attention", help=about)
    add_arguments(parser)
    parser.set_defaults(dtype="float32")
    return parser.parse_args()


class Updater:
    """An optimizer's updates by the same gradients, donated."""

    def __init__(self, optimizer: Optimizer, config: Config, params: Params, grads: Params) -> None:
        leaves = leaves_of(config)
        whole = partial(on_whole, leaves=leaves, mesh=None)
        self.info = UpdateInfo(0, 1e-3, leaves, whole, donate=True)
        self.optimizer = optimizer
        self.params = {name: leaf.float() for name, leaf in params.items()}
        self.grads = {name: leaf.float() for name, leaf in grads.items()}
        self.state = optimizer.init(self.params, roles(config.draft))

    def __call__(self) -> None:
        """One update."""
        self.params, self.state = self.optimizer.update(
            self.grads, self.state, self.params, self.info
        )


class Step:
    """Fast steps on one batch, with AdamW's update."""

    def __init__(self, options: argparse.Namespace, config: Config, params: Params) -> None:
        self.problem = make_problem(
            config.draft,
            batch=1,
            seq=options.seq,
            masked=options.masked,
            k=options.k,
            seed=options.seed,
            dtype=getattr(torch, options.dtype),
            device=options.device,
        )
        self.fns = e3.bind(config, self.problem.frozen)
        self.state = self.fns.init_state(params)

    def __call__(self) -> None:
        """One step."""
        self.state, _ = self.fns.step(self.state, self.problem.batch, donate=True)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All sides in turns, and what is counted."""
    dtype = getattr(torch, options.dtype)
    config = Config(
        draft_of(options.shape, options.draft_vocab, options.seq),
        e3.ObjectiveConfig(ttt_length=options.k),
        train=e3.TrainConfig(steps=1000, dtype=options.dtype, device=options.device),
    )
    params = draw_params(config.draft, options.seed, dtype, options.device)
    draw = Drawer(options.seed + 3, dtype, options.device)
    grads = {name: draw(tuple(leaf.shape), 1e-3) for name, leaf in params.items()}

    fast = torch.bfloat16 if multiplies_bf16(options.device) else torch.float32
    settings = e3.OptimizerConfig(name="muon", matrices=options.matrices)
    optimizers = {
        "adamw": adamw(settings),
        "muon": muon(settings),
        "muon_newton_schulz": muon(settings, partial(newton_schulz, dtype=fast)),
    }
    calls: dict[str, Any] = {
        name: Updater(optimizer, config, params, grads) for name, optimizer in optimizers.items()
    }
    calls["step"] = Step(options, config, params)
    timing = common.in_turns(
        calls, options.rounds or ROUNDS, dtype, options.device, World(), warm=1
    )

    # What is made orthogonal is what has a momentum.
    momentum = calls["muon"].state.momentum
    shapes = {name: leaf.shape for name, leaf in leaves_of(config).items() if name in momentum}
    counts = {}
    for method in ("rational", "newton_schulz"):
        counts[method] = sum(matrix_flops(shape, method) for shape in shapes.values())
    return {
        "ratio": {name: timing.ratio(name, "adamw") for name in calls},
        "of_step": {name: timing.ratio(name, "step") for name in calls},
        "flops": counts,
        "share": {str(world): busiest(shapes, world) for world in WORLDS},
        "settings": common.settings_of(options, SETTINGS, ROUNDS, World()),
        **timing.summary(),
        **provenance(),
    }


def busiest(shapes: dict[str, tuple[int, ...]], world: int) -> float:
    """The part of all matrices' FLOPs that the busiest rank has."""
    loads = [0] * world
    for name, owner in owners_of(shapes, world).items():
        loads[owner] += matrix_flops(shapes[name], "rational")
    return max(loads) / sum(loads)


def main() -> None:
    options = parse()
    result = run(options)
    for name, took in result["seconds"].items():
        text = f"{name:<20}{took * 1000:8.1f} ms, {result['of_step'][name]:.2f} of a step"
        common.show(options, text)
    common.finish(result, options.out, f"orthogonal-{options.shape}-{options.device}")


if __name__ == "__main__":
    sys.exit(common.program("bench.orthogonal", main))
