"""One step of the Qwen2.5-7B recipe at its full draft shapes, on random tensors.

    python -m bench.recipe_step [--length 32] [--json RESULT]

No weights are needed. The configuration is the one that `scripts/train_eagle3_fn.py` makes of the
recipe's arguments. On the CPU it takes about 14 GiB. Checked: loss and norm are finite, every
trained leaf has moved, the state before the step has not. Printed: shapes, loss, norm, seconds and
the process's peak memory, as JSON.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import common
from eagle3fn.base.config import Config
from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.draft_json import draft_config_from_json
from eagle3fn.base.files import write_json
from eagle3fn.base.provenance import provenance
from eagle3fn.base.types import Batch, Frozen, TrainState
from eagle3fn.data.collate import align
from eagle3fn.specforge import RECIPE, script
from eagle3fn.train.bind import bind

DRAFT = Path(__file__).resolve().parent.parent / "scripts/recipes/qwen2.5-7b-draft.json"
ARGUMENTS = (
    "--learning-rate 1e-4 --warmup-ratio 0.015 --max-grad-norm 0.5 --ttt-length 7 --max-length 2048"
)
SAMPLES = 1000  # of the imagined data set: they set the schedule's length


def recipe_config(draft: DraftConfig) -> Config:
    """The recipe's configuration, with `SAMPLES` samples."""
    places = ("--target-model-path", "", "--train-data-path", "", "--output-dir", "")
    options = script.parser().parse_args([*places, *ARGUMENTS.split()])
    return script.config_of(options, draft, SAMPLES)


def random_frozen(draft: DraftConfig, generator: torch.Generator) -> Frozen:
    """Embedding and head from normal(0, 0.02) in bf16; the first `D` tokens are the draft's."""

    def draw() -> torch.Tensor:
        values = torch.empty(draft.vocab_size, draft.hidden_size, dtype=torch.bfloat16)
        return values.normal_(0, 0.02, generator=generator)

    return Frozen(
        embed_tokens=draw(),
        target_head=draw(),
        t2d=torch.arange(draft.vocab_size) < draft.draft_vocab_size,
        d2t=torch.zeros(draft.draft_vocab_size, dtype=torch.int64),
    )


def random_batch(draft: DraftConfig, length: int, k: int, generator: torch.Generator) -> Batch:
    """One sequence; the second half of its rows is trained, but for the last one."""
    ids = torch.randint(draft.draft_vocab_size, (1, length), generator=generator)
    places = torch.arange(length)
    trained = (places >= length // 2) & (places < length - 1)
    hidden = torch.randn(1, length, 4 * draft.hidden_size, generator=generator).bfloat16()
    aux, last = hidden.split([3 * draft.hidden_size, draft.hidden_size], dim=-1)
    return align(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        row_mask=trained.long()[None],
        aux_hidden=aux.contiguous(),
        last_hidden=last.contiguous(),
        k=k,
    )


def one_step(length: int) -> dict[str, Any]:
    """Make the step; returns what is reported."""
    draft = draft_config_from_json(DRAFT)
    config = recipe_config(draft)
    generator = torch.Generator().manual_seed(0)
    frozen = random_frozen(draft, generator)
    fns = bind(config, frozen, recipe=RECIPE)
    state = fns.init_state(fns.init(config.train.seed))
    batch = random_batch(draft, length, config.objective.ttt_length, generator)

    begin = time.perf_counter()
    before = _sums(state)
    after, metrics = fns.step(state, batch)
    moved = []
    for name, value in after.masters.items():
        if not torch.equal(value, state.masters[name]):
            moved.append(name)

    assert torch.isfinite(metrics["loss"]) and torch.isfinite(metrics["grad_norm"])
    assert sorted(moved) == sorted(before)
    assert _sums(state) == before
    return {
        "shapes": {
            "S": length,
            "H": draft.hidden_size,
            "I": draft.intermediate_size,
            "D": draft.draft_vocab_size,
            "V": draft.vocab_size,
            "K": config.objective.ttt_length,
        },
        "parameters": sum(value.numel() for value in state.params.values()),
        "loss": float(metrics["loss"]),
        "grad_norm": float(metrics["grad_norm"]),
        "leaves_moved": len(moved),
        "step_seconds": round(time.perf_counter() - begin, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def _sums(state: TrainState) -> dict[str, float]:
    """A sum of every master, which a change would change."""
    return {name: float(value.double().sum()) for name, value in state.masters.items()}


def main() -> None:
    parser = common.parser_of(__doc__)
    about = "S, the sequence's length (default 32)"
    parser.add_argument("--length", type=int, default=32, help=about)
    parser.add_argument("--json", type=Path, help="write the result")
    options = parser.parse_args()
    if options.length < 3:
        parser.error(f"--length {options.length}: must be at least 3, or no row is trained")

    result = one_step(options.length)
    print(json.dumps(result, indent=2))
    if options.json:
        command = f"python -m bench.recipe_step --length {options.length}"
        write_json(options.json, provenance(command) | result)


if __name__ == "__main__":
    sys.exit(common.program("bench.recipe_step", main))
