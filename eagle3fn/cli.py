"""`eagle3fn COMMAND`: the grammar of the command line; `commands` has a function for each."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from eagle3fn.base.program import called_as, exit_code
from eagle3fn.commands import checking, data, drafts, extraction, training, vocabulary
from eagle3fn.commands.options import (
    DTYPES,
    FASTEST,
    STORES,
    above_zero,
    add_conversations,
    add_engine,
    add_feature_engine,
    add_online,
    add_reading,
    add_settings,
    add_target,
    add_template,
    add_threads,
    at_least_zero,
    count,
    layers,
    positive,
    share,
    trackers,
)
from eagle3fn.commands.shared import check_places
from eagle3fn.use.trackers import TRACKERS

Command = Callable[..., argparse.ArgumentParser]
"""`(name, function, what it does)` → the parser of a new sub-command."""


def main(arguments: list[str] | None = None) -> int:
    """Run a sub-command; returns its exit code, or 2 for bad input, with one line on stderr."""
    if arguments is None:
        arguments = sys.argv[1:]
    options = parser().parse_args(arguments)
    options.arguments = arguments
    again = "nothing is half written; begin again with"
    if options.command in GO_ON:
        again = "what is finished is kept; go on with"
    again += f" {called_as(arguments)}"
    return exit_code(f"eagle3fn {options.command}", lambda: _run(options), again)


def _run(options: Any) -> int | None:
    """Do what a sub-command does; no output of it is one of its inputs."""
    check_places(options)
    return options.run(options)


GO_ON = ("synthesize", "regenerate", "extract", "train")
"""Commands that go on where they were stopped."""


# The grammar

_ABOUT = (
    "Trains EAGLE-3 drafts: from conversations and a target to a draft that serving engines load. "
    "README.md and docs/data.md show the commands in order."
)


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    root = argparse.ArgumentParser(prog="eagle3fn", description=_ABOUT, allow_abbrev=False)
    subcommands = root.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[Any], int | None], about: str) -> argparse.ArgumentParser:
        sub = subcommands.add_parser(name, help=about, description=about, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    _add_data_commands(command)
    _add_training_commands(command)
    _add_checking_commands(command)
    _add_draft_commands(command)
    return root


def _add_data_commands(command: Command) -> None:
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


def _add_training_commands(command: Command) -> None:
    sub = command("train", training.train, "train the draft; goes on from the newest checkpoint")
    add_target(sub, runs=False)
    data = sub.add_mutually_exclusive_group(required=True)
    data.add_argument("--features", help="folder of features, as extract writes it")
    data.add_argument(
        "--online",
        metavar="FILE",
        help="conversations, whose features are computed as training goes",
    )
    sub.add_argument("--vocab", required=True, help="vocabulary map")
    sub.add_argument(
        "--out",
        required=True,
        help="run folder; OUT/draft is the best draft on the held-out samples, or without these "
        "the newest",
    )
    sub.add_argument(
        "--from",
        dest="source",
        metavar="CHECKPOINT",
        help="go on in a new folder from another run: one of its checkpoints, or its folder",
    )
    add_settings(sub)
    sub.add_argument(
        "--recipe",
        choices=("specforge", "specforge-dataflow"),
        help="train as SpecForge does, in the order of its script or of its dataflow launcher",
    )
    sub.add_argument("--on-nonfinite", choices=("stop", "skip"), help="sets train.on_nonfinite")
    sub.add_argument(
        "--minutes", type=above_zero, help="choose the number of steps to fill this time"
    )
    sub.add_argument(
        "--max-steps",
        type=positive,
        metavar="N",
        help="updates that this call makes at most; it saves a checkpoint, a later call goes on",
    )
    sub.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan, the first batch, one update and the time of all; write nothing",
    )
    sub.add_argument(
        "--track",
        type=trackers,
        action="extend",
        default=[],
        metavar="NAME",
        help=f"log to {', '.join(TRACKERS)}: several with commas, or once more",
    )
    add_threads(sub)
    add_online(sub)

    sub = command(
        "plan",
        training.plan,
        "bytes that a run holds, moves and writes; exit code 2 if it cannot fit",
    )
    sub.add_argument("--target", help="folder or hub id; its config.json is enough")
    add_settings(sub)
    sub.add_argument("--ranks", type=positive, default=1)
    sub.add_argument(
        "--tokens", type=count, default=0, help="of all conversations, for the features' size"
    )
    sub.add_argument(
        "--memory", type=above_zero, help="GiB that a rank may hold: refuse a plan beyond it"
    )


def _add_checking_commands(command: Command) -> None:
    sub = command(
        "evaluate",
        checking.evaluate,
        "speculative decoding with an exported draft: losslessness, length, speed",
    )
    add_target(sub, runs=True)
    sub.add_argument(
        "--draft",
        required=True,
        help="exported draft folder; with --engine llamacpp also a GGUF file",
    )
    sub.add_argument(
        "--prompts",
        required=True,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="rows with a prompt, and perhaps a category; of several files each is a category",
    )
    sub.add_argument("--out", required=True, help="JSON report")
    sub.add_argument(
        "--tasks",
        type=positive,
        default=10,
        help="prompts of each file, in order from the first (default 10)",
    )
    sub.add_argument("--max-new", type=positive, default=128)
    sub.add_argument(
        "--draft-length", type=positive, default=7, help="tokens drafted in a round (default 7)"
    )
    sub.add_argument(
        "--plain", help="JSON file that keeps the target's own answers for the next draft"
    )
    sub.add_argument(
        "--temperature", type=at_least_zero, help="tokens are drawn at it (default 0: greedy)"
    )
    sub.add_argument("--top-p", type=share, help="with --temperature (default 1)")
    sub.add_argument("--seed", type=count, help="with --temperature (default 0)")
    add_template(sub)
    sub.add_argument("--untrained", help="an exported untrained draft, to compare with")
    add_threads(sub)
    sub.add_argument(
        "--dtype",
        choices=DTYPES,
        help=f"that speed is measured in ({FASTEST}); with --engine: that all is decoded in "
        "(default float32)",
    )
    add_engine(sub)

    sub = command(
        "report", checking.report, "gather a run's results in one table, a JSON file and a picture"
    )
    sub.add_argument(
        "--run",
        dest="folder",
        required=True,
        help="folder of train --out, or one with that as train/; evaluation.json there is read too",
    )

    sub = command(
        "parity",
        checking.parity,
        "SpecForge's recipe against SpecForge, bit for bit, on drawn tiny problems",
    )
    sub.add_argument("--cases", type=positive, default=100, help="how many are drawn (default 100)")
    sub.add_argument(
        "--seed", type=int, default=0, help="the same cases for the same seed (default 0)"
    )
    sub.add_argument("--json", action="store_true", help="end with one line of JSON")
    sub.add_argument(
        "--bisect",
        action="store_true",
        help="name the unroll step and operation a difference begins at",
    )


def _add_draft_commands(command: Command) -> None:
    sub = command("export", drafts.export, "write a trained draft as a serving engine reads it")
    sub.add_argument("--draft", required=True, help="exported draft folder, such as RUN/draft")
    sub.add_argument("--out", required=True, help="new folder, or an older export")
    sub.add_argument(
        "--for",
        dest="engine",
        required=True,
        choices=("vllm", "sglang", "llamacpp", "speculators", "eagle"),
    )
    sub.add_argument("--target", help="the draft's target, folder or hub id; vllm needs it")
    sub.add_argument(
        "--target-name", help="the name that the target is served by, where it is not --target"
    )

    sub = command(
        "convert",
        drafts.convert,
        "other trainers' drafts, vocabulary maps and features to ours, and maps and features back",
    )
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--draft", help="draft folder of SpecForge, EAGLE, speculators or the hub")
    what.add_argument("--vocab", help="map file, folder of .npy files, or a draft's folder")
    what.add_argument("--features", help="feature folder of ours, or of SpecForge's .ckpt files")
    sub.add_argument("--out", required=True, help="what is written, whole or not at all")
    sub.add_argument(
        "--from",
        dest="origin",
        choices=("specforge", "eagle", "speculators", "hf"),
        help="whose draft it is (default: known by its keys)",
    )
    sub.add_argument(
        "--for",
        dest="kind",
        choices=("eagle3fn", "specforge", "speculators"),
        default="eagle3fn",
        help="whose maps or features are written (default eagle3fn)",
    )
    sub.add_argument("--target", help="the target, folder or hub id, for what a file leaves out")


if __name__ == "__main__":
    sys.exit(main())
