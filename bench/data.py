"""The data pipeline: first batch of a million samples, tokens a second, memory over a long run.

    python -m bench.data

- `first_batch`: seconds from opening a folder to its first batch. The folder's index and table are
  of `--samples` samples; its shards are hard links of one.
- `delivery`: tokens a second of the pipeline alone, one process without prefetch, on stored random
  features in bfloat16, checks included, at the width of two targets; `step` is what one training
  step takes of them: of SmolLM2's draft the fast side of `bench.step` on this machine, in float32;
  of Qwen2.5-7B's `--step-7b` tokens a second, measured on a card (the default is that of an H100 in
  bench/results/2026-11-27-cuda-gate-3.json). `ratio` is delivery over step.
- `memory`: MiB of this process that are resident after a tenth of `--steps` steps of the pipeline
  with prefetch, and after all; `growth` is their difference.

The last line is JSON.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from bench.launch import settle

    settle()

import argparse
import os
import tempfile
import time
from statistics import median
from typing import Any, NamedTuple

import torch

from bench import common, sides
from bench.launch import add_arguments
from bench.memory import used_now
from bench.problem import SHAPES, draft_of, draw_params, make_problem, turns
from eagle3fn import stages
from eagle3fn.base.config import Config
from eagle3fn.base.provenance import provenance
from eagle3fn.base.sections import DataConfig, ObjectiveConfig
from eagle3fn.base.types import Batch, Sample
from eagle3fn.data.feature_writing import shard_name, write_index, write_shard
from eagle3fn.data.features import FeatureSet, open_features
from eagle3fn.data.pipeline import batches

ROUNDS = 3
PER_SHARD = 64  # samples, as `eagle3fn extract` has them
UNROLL = 7
MASKED = 0.5  # share of the tokens that are not supervised
STEP_7B = 18213.0  # tokens a second
MIB = 2**20


class Folder(NamedTuple):
    """The size of a folder of random features."""

    shape: str  # of bench.problem.SHAPES
    length: int  # tokens of a sample
    samples: int  # in one shard


DELIVERED = {"smollm2": Folder("smollm2", 1024, 24), "qwen2.5-7b": Folder("qwen2.5-7b", 2048, 5)}
LINKED = Folder("tiny", 64, PER_SHARD)
LONG = Folder("smollm2", 64, PER_SHARD)


def parse() -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    add("--samples", type=int, default=10**6, help="of the large folder (default 1000000)")
    add("--steps", type=int, default=2000, help="of the long run (default 2000)")
    add("--step-7b", type=float, default=STEP_7B, metavar="RATE", help=f"default {STEP_7B:g}")
    add("--work", type=Path, help="where folders are made and removed (default: the system's)")
    add_arguments(parser)
    return parser.parse_args()


# Folders of random features


def random_samples(folder: Folder, seed: int) -> dict[str, Sample]:
    """Samples by their keys, half of whose tokens are supervised."""
    shape = SHAPES[folder.shape]
    draw = torch.Generator().manual_seed(seed)
    size = (folder.length, shape.hidden_size)
    made = {}
    for number in range(folder.samples):
        taps = [torch.rand(size, generator=draw).bfloat16() for _ in range(3)]
        made[str(number)] = Sample(
            input_ids=torch.randint(0, shape.vocab_size, (folder.length,), generator=draw),
            token_mask=turns(folder.length, MASKED, draw),
            aux_hidden=torch.cat(taps, -1),
            last_hidden=torch.rand(size, generator=draw).bfloat16(),
        )
    return made


def write_folder(path: Path, folder: Folder, seed: int, count: int | None = None) -> FeatureSet:
    """A feature folder; with `count`, of so many samples, whose shards are links of one."""
    path.mkdir(parents=True)
    samples = random_samples(folder, seed)
    entries = []
    for key, sample in samples.items():
        supervised = int(sample.token_mask.sum())
        entry = {"id": key, "key": key, "length": folder.length, "supervised": supervised}
        entries.append(entry)
    first = write_shard(path, 0, samples, {"samples": entries})

    sidecars = [first]
    for number in range(1, (count or 1) // folder.samples):
        file = shard_name(number)
        os.link(path / shard_name(0), path / file)
        named = [entry | {"id": f"{number}-{entry['key']}"} for entry in entries]
        sidecars.append(first | {"file": file, "samples": named})
    shape = SHAPES[folder.shape]
    target = {
        "name": folder.shape,
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
    }
    head = {"target": target, "dtype": "bfloat16", "max_length": folder.length}
    write_index(path, head, sidecars)
    return open_features(path)


def config_of(folder: Folder, **data: int) -> Config:
    return Config(
        draft_of(folder.shape, None, folder.length),
        ObjectiveConfig(ttt_length=UNROLL),
        data=DataConfig(max_length=folder.length, **data),
    )


def tokens_of(micro: tuple[Batch, ...]) -> int:
    return sum(int(batch.attention_mask.sum()) for batch in micro)


# What is measured


def first_batch(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Seconds from opening to the first batch, over rounds."""
    path = work / "large"
    write_folder(path, LINKED, options.seed, options.samples)
    seconds = []
    opened = []
    count = 0
    for epoch in range(options.rounds or ROUNDS):
        config = config_of(LINKED)
        begin = time.perf_counter()
        features = open_features(path)
        opened.append(time.perf_counter() - begin)
        count = len(features.samples)
        # Another epoch's each time: its order was not drawn before.
        next(batches(features, range(count), config, epoch * count, epoch * count + 1))
        seconds.append(time.perf_counter() - begin)
    return {
        "samples": count,
        "shards": len(open_features(path).index["shards"]),
        "seconds": seconds,
        "opening": opened,
        "median": median(seconds),
    }


def delivery(folder: Folder, options: argparse.Namespace, path: Path) -> list[float]:
    """Tokens a second of each round, every sample once in each; the first one warms up."""
    features = write_folder(path, folder, options.seed)
    numbers = range(folder.samples)
    rates = []
    for number in range(1 + (options.rounds or ROUNDS)):
        start = number * folder.samples
        tokens = 0
        begin = time.perf_counter()
        for micro in batches(features, numbers, config_of(folder), start, start + folder.samples):
            tokens += tokens_of(micro)
        rates.append(tokens / (time.perf_counter() - begin))
    return rates[1:]


def step_rate(folder: Folder, options: argparse.Namespace) -> float:
    """Tokens a second of the fast side's training step, of one sample."""
    dtype = torch.float32
    problem = make_problem(
        draft_of(folder.shape, None, folder.length),
        batch=1,
        seq=folder.length,
        masked=MASKED,
        k=UNROLL,
        seed=options.seed,
        dtype=dtype,
        device="cpu",
    )
    params = draw_params(problem.draft, options.seed, dtype, "cpu")
    update = sides.make_side("fast", problem, params, None, UNROLL)
    update()
    seconds = [common.seconds(update, "cpu") for _ in range(options.rounds or ROUNDS)]
    return folder.length / median(seconds)


def memory(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Resident MiB after a tenth of the steps, and after all."""
    features = write_folder(work / "long", LONG, options.seed)
    config = config_of(LONG, global_batch=4, micro_batch=2)
    source = batches(features, range(LONG.samples), config, 0, options.steps)
    after: dict[int, float] = {}
    for number, _ in enumerate(stages.prefetch(source, 2), 1):
        if number in (options.steps // 10, options.steps):
            after[number] = used_now("cpu") / MIB
    early, late = after.values()
    return {"steps": options.steps, "early": early, "late": late, "growth": late - early}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"bench": "data", **provenance(), "threads": options.threads}
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        work = Path(name)
        result["first_batch"] = first = first_batch(options, work)
        common.show(
            options, f"{first['samples']:,} samples: first batch after {first['median']:.2f} s"
        )

        result["memory"] = used = memory(options, work)
        common.show(
            options,
            f"{used['steps']} steps: {used['early']:.1f} MiB, then {used['late']:.1f} MiB",
        )

        result["delivery"] = {}
        for title, folder in DELIVERED.items():
            rates = delivery(folder, options, work / title)
            step = options.step_7b
            if title == "smollm2":
                step = step_rate(folder, options)
            found = {**folder._asdict(), "tokens_per_s": rates, "median": median(rates)}
            result["delivery"][title] = found | {"step": step, "ratio": median(rates) / step}
            common.show(
                options,
                f"{title}: {median(rates):,.0f} tokens/s, a step takes {step:,.0f}, "
                f"{median(rates) / step:.1f} times",
            )
    common.finish(result, options.out, "data-cpu")


if __name__ == "__main__":
    sys.exit(common.program("bench.data", main))
