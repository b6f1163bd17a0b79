"""One step of the Qwen2.5-7B recipe at its full draft shapes, short sequences, random tensors: no weights are at hand.

    python -m bench.recipe_step [--length 32] [--json RESULT]

The configuration is the one that `scripts/train_eagle3_fn.py` makes of the recipe's arguments. On the CPU it takes
about 14 GiB. Checked: loss and norm are finite, every trained leaf has moved, the old state has not.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch

from eagle3fn.base.config import Config
from eagle3fn.base.draft_config import DraftConfig, draft_config_from_json
from eagle3fn.base.files import write_json
from eagle3fn.base.types import Batch, Frozen
from eagle3fn.specforge import script
from eagle3fn.testing.provenance import provenance
from eagle3fn.train.bind import bind

DRAFT = Path(__file__).resolve().parent.parent / "scripts/recipes/qwen2.5-7b-draft.json"
RECIPE = (
    "--learning-rate 1e-4 --warmup-ratio 0.015 --max-grad-norm 0.5 --ttt-length 7 --max-length 2048"
)
SAMPLES = 1000  # of the imagined data set: they set the schedule's length


def recipe_config(draft: DraftConfig) -> Config:
    """The recipe's configuration, with `SAMPLES` samples."""
    places = ("--target-model-path", "", "--train-data-path", "", "--output-dir", "")
    options = script.parser().parse_args([*places, *RECIPE.split()])
    options.target_batch_size = options.tp_size * options.batch_size
    return script.config_of(options, draft, SAMPLES)


def random_frozen(draft: DraftConfig, generator: torch.Generator) -> Frozen:
    """Embedding and head from normal(0, 0.02) in bf16; the draft says the first `D` tokens."""
    shape = (draft.vocab_size, draft.hidden_size)
    embed, head = (
        torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        for _ in range(2)
    )
    t2d = torch.arange(draft.vocab_size) < draft.draft_vocab_size
    return Frozen(embed, head, t2d, torch.zeros(draft.draft_vocab_size, dtype=torch.int64))


def random_batch(draft: DraftConfig, length: int, generator: torch.Generator) -> Batch:
    """One sequence; the second half of its rows is trained."""
    ids = torch.randint(draft.draft_vocab_size, (1, length), generator=generator)
    mask = (torch.arange(length) >= length // 2).long()[None] * (
        torch.arange(length) < length - 1
    ).long()
    wide = torch.randn(1, length, 4 * draft.hidden_size, generator=generator).bfloat16()
    aux, last = wide.split([3 * draft.hidden_size, draft.hidden_size], dim=-1)
    return Batch(ids, torch.ones_like(ids), mask, aux.contiguous(), last.contiguous())


def one_step(length: int) -> dict[str, Any]:
    """Make the step; returns what is reported."""
    draft = draft_config_from_json(DRAFT)
    config, generator = recipe_config(draft), torch.Generator().manual_seed(0)
    frozen = random_frozen(draft, generator)
    fns = bind(config, frozen)
    state = fns.init_state(fns.init(config.train.seed))
    batch, begin = random_batch(draft, length, generator), time.perf_counter()
    sums = {name: float(value.double().sum()) for name, value in state.masters.items()}
    after, metrics = fns.step(state, batch)
    moved = [
        name for name, value in after.masters.items() if not torch.equal(value, state.masters[name])
    ]
    untouched = all(
        float(value.double().sum()) == sums[name] for name, value in state.masters.items()
    )
    assert torch.isfinite(metrics["loss"]) and torch.isfinite(metrics["grad_norm"])
    assert sorted(moved) == sorted(sums) and untouched
    return {
        "shapes": {"S": length, "H": draft.hidden_size, "I": draft.intermediate_size, "D": draft.draft_vocab_size,
                   "V": draft.vocab_size, "K": config.objective.ttt_length},
        "parameters": sum(value.numel() for value in state.params.values()),
        "loss": float(metrics["loss"]),
        "grad_norm": float(metrics["grad_norm"]),
        "leaves_moved": len(moved),
        "step_seconds": round(time.perf_counter() - begin, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }  # fmt: skip


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument(
        "--length", type=int, default=32, help="S, the sequence's length (default 32)"
    )
    parser.add_argument("--json", type=Path, help="write the result")
    options = parser.parse_args()
    if options.length < 3:
        parser.error(f"--length {options.length}: must be at least 3, or no row is trained")
    result = one_step(options.length)
    print(json.dumps(result, indent=2))
    if options.json:
        write_json(
            options.json,
            provenance(f"python -m bench.recipe_step --length {options.length}") | result,
        )


if __name__ == "__main__":
    main()
