"""Tokens a second of extraction: Hugging Face in this process against vLLM in one of its own.

    python -m bench.extraction --target FOLDER --conversations FILE --engine-python PYTHON

Both compute the same samples in the same dtype with the same number of threads. In each round a
group of samples goes through one side, then through the other; which is first changes by turns.
What is timed is a group's samples as extraction has them before a shard is written, checks and
files of the engine included. Loading and the comparison of the first row are timed apart.

The last line is JSON. For each side: the seconds until it was ready and, over rounds, tokens a
second. `ratio` has vLLM's over Hugging Face's of each round, and their median.
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
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch

from bench import common
from bench.launch import add_arguments
from eagle3fn.base.draft_config import aux_layers
from eagle3fn.base.draft_keys import draft_config_from_target
from eagle3fn.base.errors import UserError
from eagle3fn.base.provenance import provenance
from eagle3fn.data.encode import encode_all
from eagle3fn.data.engine_source import engine_source
from eagle3fn.data.samples import Encoded, SampleMaker
from eagle3fn.data.sources import FeatureSource, model_source
from eagle3fn.data.target import load_target, stop_ids
from eagle3fn.data.target_loading import load_tokenizer
from eagle3fn.data.target_source import target_config
from eagle3fn.data.template import ChatTemplate
from eagle3fn.engines.vllm_process import VllmProcess, taps_of

ROUNDS = 3
SIDES = ("huggingface", "vllm")
OURS_ALONE = ("TRITON_INTERPRET", "TORCHDYNAMO_DISABLE")  # variables of this process, not of vLLM


def parse() -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    add("--target", required=True)
    add("--conversations", required=True)
    add("--engine-python", required=True, help="the Python of vLLM's environment")
    add("--max-length", type=int, default=1024)
    add("--samples", type=int, default=64, help="in a group (default 64, a shard's)")
    help_text = "tokens in one run of Hugging Face (default 2048)"
    add("--batch-tokens", type=int, default=2048, help=help_text)
    common.add_dtype(parser)
    add_arguments(parser)
    return parser.parse_args()


def groups_of(options: argparse.Namespace, count: int) -> list[list[Encoded]]:
    """The first samples of the conversations, by groups."""
    tokenizer = load_tokenizer(options.target)
    template = ChatTemplate(tokenizer, stop_ids(options.target, tokenizer))
    maker = SampleMaker(template, options.max_length)
    size = options.samples
    vocab_size = target_config(options.target)["vocab_size"]
    rows = list(encode_all(maker, options.conversations, vocab_size, limit=size * count))
    if len(rows) < size * count:
        raise UserError(
            f"{options.conversations}: {len(rows)} samples, {size * count} are needed; give more "
            "conversations, fewer --rounds or fewer --samples"
        )
    return [rows[start : start + size] for start in range(0, size * count, size)]


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    """What an action returns, and its seconds."""
    begin = time.perf_counter()
    found = action()
    return found, time.perf_counter() - begin


def tokens_of(group: Sequence[Encoded]) -> int:
    return sum(len(row.input_ids) for row in group)


def open_sides(
    options: argparse.Namespace, first: list[Encoded], stack: ExitStack
) -> tuple[dict[str, FeatureSource], dict[str, float]]:
    """Both sides, ready, and the seconds that it took each."""
    dtype = getattr(torch, options.dtype)
    tree = target_config(options.target)
    layers = aux_layers(
        draft_config_from_target(tree, options.target, None), tree["num_hidden_layers"]
    )

    def huggingface() -> FeatureSource:
        model, _ = load_target(options.target, dtype, options.device)
        return model_source(model, layers, batch_tokens=options.batch_tokens)

    def vllm() -> FeatureSource:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "log"
        engine = VllmProcess(
            options.engine_python,
            options.target,
            taps_of(layers, tree["num_hidden_layers"]),
            log,
            max_length=options.max_length,
            dtype=dtype,
            threads=options.threads,
        )
        stack.enter_context(engine)
        source = engine_source(engine, options.target, layers, check="logits")
        source.features(first[:1], dtype)  # loads, and compares the row
        return source

    ours, our_seconds = timed(huggingface)
    for name in OURS_ALONE:
        os.environ.pop(name, None)
    engines, engine_seconds = timed(vllm)
    sides = {"huggingface": ours, "vllm": engines}
    return sides, {"huggingface": our_seconds, "vllm": engine_seconds}


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    rounds = options.rounds or ROUNDS
    groups = groups_of(options, rounds)
    rates: dict[str, list[float]] = {side: [] for side in SIDES}

    with ExitStack() as stack:
        sides, ready = open_sides(options, groups[0], stack)
        dtype = getattr(torch, options.dtype)
        for side in SIDES:  # once untimed: buffers, threads
            sides[side].features(groups[0][:4], dtype)
        for number, group in enumerate(groups):
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                _, seconds = timed(
                    lambda side=side, group=group: sides[side].features(group, dtype)
                )
                rates[side].append(tokens_of(group) / seconds)
                line = f"round {number}: {side} {rates[side][-1]:.0f} tokens/s"
                print(line, file=sys.stderr, flush=True)
        engine = sides["vllm"].index["engine"]

    ratios = [b / a for a, b in zip(*rates.values(), strict=True)]
    names = ("dtype", "threads", "max_length", "samples", "batch_tokens")
    result = {
        "settings": {name: getattr(options, name) for name in names} | {"rounds": rounds},
        "target": Path(options.target).name,
        "engine": engine,
        "tokens": [tokens_of(group) for group in groups],
        "seconds_until_ready": ready,
        "tokens_per_second": rates,
        "median": {side: median(found) for side, found in rates.items()},
        "ratio": {"by_round": ratios, "median": median(ratios)},
        **provenance(),
    }
    common.finish(result, options.out, f"extraction-t{options.threads}")
    return 0


if __name__ == "__main__":
    sys.exit(common.program("bench.extraction", main))
