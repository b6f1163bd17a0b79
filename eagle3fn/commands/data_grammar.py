"""The grammar of the commands that make data."""

import argparse

from eagle3fn.commands import data, extraction, vocabulary
from eagle3fn.commands.options import (
    DTYPES,
    FASTEST,
    STORES,
    Command,
    above_zero,
    add_conversations,
    add_feature_engine,
    add_reading,
    add_target,
    add_template,
    add_threads,
    at_least_zero,
    count,
    layers,
    positive,
    share,
)


def add_data_commands(command: Command) -> None:
    """The commands that make data, from conversations to features and map."""
    _add_synthesize(command)
    _add_regenerate(command)
    _add_inspect(command)
    _add_extract(command)
    _add_vocab(command)


def _add_synthesize(command: Command) -> None:
    sub = command(
        "synthesize", data.synthesize, "let the target write conversations, user turns too"
    )
    add_target(sub, runs=True)
    add_template(sub)
    sub.add_argument("--out", required=True, help="JSONL file; .xz and .gz compress")
    sub.add_argument(
        "--count",
        type=positive,
        default=1000,
        help="conversations to write at least (default 1000)",
    )
    sub.add_argument(
        "--turns", type=positive, default=1, help="user turns of one, at most (default 1)"
    )
    sub.add_argument(
        "--system",
        metavar="FILE",
        help="system texts, a JSON text a line; one is drawn for each conversation",
    )
    sub.add_argument(
        "--languages",
        default="en",
        metavar="A,B,…",
        help="of the user turns: en, de, fr, es, it, pt, ru, zh, ja (default en)",
    )
    sub.add_argument(
        "--max-repeated",
        type=share,
        default=0.5,
        metavar="SHARE",
        help="drop a conversation if more of a turn's 8-grams are repetitions (default 0.5)",
    )
    _add_drawing(sub, max_new=224)
    sub.add_argument(
        "--batch", type=positive, default=64, help="conversations sampled together (default 64)"
    )
    _add_exclude(sub)
    add_threads(sub)


def _add_regenerate(command: Command) -> None:
    sub = command(
        "regenerate",
        data.regenerate,
        "replace the answers of conversations by the target's own, or answer prompts; resumable",
    )
    add_target(sub, runs=True)
    add_conversations(sub, cut=False)
    sub.add_argument("--out", required=True, help="JSONL file; bad rows: OUT.rejects.jsonl")
    _add_drawing(sub, max_new=512)
    sub.add_argument("--top-p", type=share, help="nucleus of the answers (default 0.95)")
    sub.add_argument(
        "--batch", type=positive, default=64, help="conversations answered together (default 64)"
    )
    _add_exclude(sub)
    add_threads(sub)
    sub.add_argument("--url", help="ask a running server, as http://localhost:8000/v1")
    sub.add_argument("--model", help="the target's name there (default: the only one)")
    sub.add_argument(
        "--api-key-env", metavar="NAME", help="environment variable with the server's key"
    )
    sub.add_argument(
        "--concurrent", type=positive, default=16, help="requests at once (default 16)"
    )


def _add_drawing(sub: argparse.ArgumentParser, max_new: int) -> None:
    sub.add_argument(
        "--temperature", type=at_least_zero, help="of the answers (default 0.5; 0: greedy)"
    )
    sub.add_argument(
        "--max-new", type=positive, help=f"tokens of an answer at most (default {max_new})"
    )
    sub.add_argument("--seed", type=count, default=0)


def _add_exclude(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--exclude", help="JSONL whose texts must not come back: 13 words in a row are too many"
    )


def _add_inspect(command: Command) -> None:
    sub = command(
        "inspect",
        data.inspect,
        "show what is trained on of conversations, and what is left out; the tokenizer is enough",
    )
    add_target(sub, runs=False)
    add_conversations(sub)
    sub.add_argument("--show", type=count, default=2, help="samples to print (default 2)")
    sub.add_argument("--id", help="print the samples of the row with this id, or on this line")
    sub.add_argument("--vocab", help="vocabulary map whose coverage is counted")
    sub.add_argument("--json", action="store_true", help="print the numbers as one line of JSON")


def _add_extract(command: Command) -> None:
    sub = command(
        "extract",
        extraction.extract,
        "run the target over conversations and write its features; resumable",
    )
    add_target(sub, runs=True, spread=True)
    add_conversations(sub)
    sub.add_argument("--out", required=True, help="feature folder; bad rows: OUT/rejects.jsonl")
    sub.add_argument(
        "--minutes",
        type=above_zero,
        help="end with the last whole shard within this time; a later call goes on",
    )
    sub.add_argument("--dtype", choices=DTYPES, help=f"what the target computes in ({FASTEST})")
    sub.add_argument(
        "--store",
        choices=STORES,
        default="bf16",
        help="how features lie on disk: bf16, or half the bytes by fp8 or int8 (default bf16)",
    )
    sub.add_argument(
        "--batch-tokens",
        type=positive,
        metavar="N",
        help="tokens, with padding, in one run of the target; a longer row runs alone "
        "(default 2048 on CPUs, else 16384; of an engine 32768)",
    )
    taps = sub.add_mutually_exclusive_group()
    taps.add_argument(
        "--aux-layers",
        type=layers,
        metavar="A,B,C",
        help="tapped layers, ascending, counted from 0 (default: 1, L//2 - 1, L - 4 of L)",
    )
    taps.add_argument("--draft-config", help="draft JSON, whose tapped layers are taken")
    add_threads(sub)
    add_feature_engine(sub)


def _add_vocab(command: Command) -> None:
    sub = command(
        "vocab",
        vocabulary.vocab,
        "count the supervised tokens and write the draft vocabulary map",
    )
    add_target(sub, runs=False)
    counted = sub.add_mutually_exclusive_group(required=True)
    counted.add_argument("--features", help="feature folder whose samples are counted")
    counted.add_argument("--conversations", help="rows whose samples are counted, as extract reads")
    add_reading(sub)
    sub.add_argument("--out", required=True, help="safetensors file; bad rows: OUT.rejects.jsonl")
    sub.add_argument(
        "--size",
        type=positive,
        help="draft vocabulary (default: 99.9%% of the supervised tokens, 4096 to 32000)",
    )
    sub.add_argument(
        "--held-out",
        type=count,
        help="samples at the end that are not counted (default: a tenth, at most 24)",
    )
