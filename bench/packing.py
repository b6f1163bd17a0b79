"""One update of the same samples as packed rows, padded, and one after another: time and memory.

    python -m bench.packing --shape smollm2 --samples 8 --seq 1024

Random samples at a draft's shape, their lengths drawn evenly on a log scale from 32 to `--seq`
tokens, half of the tokens supervised. Sides, each with its own state, in turns:

- `single`: micro-batches of one sample, which is what `data.micro_batch = 1` does;
- `padded`: one micro-batch of all samples, padded to the longest;
- `packed`: rows of at most `--pack-tokens` tokens (`data.pack_tokens`).

`ratio` is a side's time over that of `single`, the median over `--rounds`, 7 if not given; on CPUs
processor time. `loss_apart` is the largest relative difference of the first losses. The last line
is JSON.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from bench.launch import settle

    settle()

import argparse
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

import eagle3fn as e3
from bench import common
from bench.launch import add_arguments
from bench.problem import draft_of, draw_params, make_frozen, turns
from eagle3fn.base.device import to_device
from eagle3fn.base.provenance import provenance
from eagle3fn.base.rows import trained_row_counts
from eagle3fn.base.types import Batch, Sample
from eagle3fn.data.bins import fill
from eagle3fn.data.collate import collate, collate_packed

SHORTEST = 32  # tokens of a sample


def parse() -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    common.add_shape(parser)
    common.add_dtype(parser)
    add = parser.add_argument
    add("--samples", type=int, default=8, help="of an update (default 8)")
    add("--seq", type=int, default=1024, help="tokens of the longest sample (default 1024)")
    add("--pack-tokens", type=int, default=4096, help="of a packed row (default 4096)")
    add("--k", type=int, default=7, help="unroll steps (default 7)")
    add_arguments(parser)
    options = parser.parse_args()
    options.rounds = options.rounds or 7
    return options


def draw_samples(options: argparse.Namespace, hidden: int, vocab: int) -> list[Sample]:
    """Samples of random features and of unlike lengths."""
    source = torch.Generator().manual_seed(0)
    dtype = getattr(torch, options.dtype)
    low, high = torch.tensor([SHORTEST, options.seq], dtype=torch.float64).log()
    share = torch.rand(options.samples, generator=source, dtype=torch.float64)
    lengths = (low + share * (high - low)).exp().long().tolist()

    samples = []
    for length in lengths:
        aux = torch.randn(length, 3 * hidden, generator=source)
        last = 2 * torch.randn(length, hidden, generator=source)
        sample = Sample(
            input_ids=torch.randint(0, vocab, (length,), generator=source),
            token_mask=turns(length, 0.5, source),
            aux_hidden=aux.to(dtype),
            last_hidden=last.to(dtype),
        )
        samples.append(sample)
    return samples


def with_counts(micro: Sequence[Batch]) -> tuple[Batch, ...]:
    """Micro-batches that carry the rows of all of them."""
    counts = trained_row_counts([batch.row_mask for batch in micro])
    return tuple(batch._replace(row_counts=counts) for batch in micro)


class Side:
    """Updates of one way to make micro-batches."""

    def __init__(self, fns: Any, params: dict[str, Tensor], micro: tuple[Batch, ...]) -> None:
        self.fns = fns
        self.micro = micro
        self.state = fns.init_state(params)

    def update(self) -> Tensor:
        """Make the next update; its loss."""
        self.state, metrics = self.fns.step(self.state, self.micro, donate=True)
        return metrics["loss"]


def peak_gib(side: Side, device: str) -> float | None:
    """The card's largest memory during one update."""
    if device == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    side.update()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def main() -> int:
    options = parse()
    device = options.device
    draft = draft_of(options.shape, None, options.seq)
    dtype = getattr(torch, options.dtype)
    samples = draw_samples(options, draft.hidden_size, draft.vocab_size)
    torch.set_num_threads(options.threads)
    config = e3.Config(
        draft,
        e3.ObjectiveConfig(numerics="fast", ttt_length=options.k),
        data=e3.DataConfig(max_length=options.seq, global_batch=options.samples),
        train=e3.TrainConfig(steps=1000, dtype=options.dtype, device=device),
    )
    fns = e3.bind(config, make_frozen(draft, 0, dtype, device))

    # The same samples in three ways.
    lengths = [len(sample.input_ids) for sample in samples]
    bins = fill(lengths, options.pack_tokens, 1, False)
    made = {
        "single": [collate([sample], config) for sample in samples],
        "padded": [collate(samples, config)],
        "packed": [collate_packed([samples[i] for i in each], config) for each in bins],
    }
    given = {}
    for name, micro in made.items():
        params = draw_params(draft, 0, torch.float32, device)
        given[name] = Side(fns, params, to_device(with_counts(micro), device))

    # Updates in turns, the first ones to warm up.
    losses = {name: float(side.update()) for name, side in given.items()}
    spent: dict[str, list[float]] = {name: [] for name in given}
    for number in range(options.rounds + 1):
        names = list(given)[:: 1 if number % 2 else -1]
        for name in names:
            found = common.spent(given[name].update, device)
            if number:
                spent[name].append(found.processor if device == "cpu" else found.wall)

    ratios = {
        name: median(a / b for a, b in zip(times, spent["single"], strict=True))
        for name, times in spent.items()
    }
    tokens = sum(lengths)
    result = {
        "settings": {
            key: getattr(options, key)
            for key in ("shape", "dtype", "samples", "seq", "pack_tokens", "k", "rounds", "device")
        },
        "lengths": lengths,
        "tokens": tokens,
        "padded_tokens": max(lengths) * len(lengths),
        "packed_rows": len(bins),
        "seconds": {name: median(times) for name, times in spent.items()},
        "all_seconds": spent,
        "tokens_per_s": {name: tokens / median(times) for name, times in spent.items()},
        "ratio": ratios,
        "peak_gib": {name: peak_gib(side, device) for name, side in given.items()},
        "first_loss": losses,
        "loss_apart": max(abs(x / losses["single"] - 1) for x in losses.values()),
        **provenance(),
    }
    common.finish(result, options.out, f"packing-{options.shape}")
    return 0


if __name__ == "__main__":
    sys.exit(common.program("bench.packing", main))
