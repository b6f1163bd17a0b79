"""`eagle3fn COMMAND`: the grammar of the command line; `commands` has a function for each."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from eagle3fn.base.program import called_as, exit_code
from eagle3fn.commands import checking, data, drafts, training
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


GO_ON = ("synthesize", "extract", "train")
"""Commands that go on where they were stopped."""


# The grammar

_DTYPES = ("float32", "bfloat16", "float16")
_FASTEST = "default: bfloat16 where the device multiplies it, else float32"


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    root = argparse.ArgumentParser(prog="eagle3fn", description=__doc__, allow_abbrev=False)
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


def _add_target(sub: argparse.ArgumentParser, runs: bool) -> None:
    """The option that names the target; with `runs`, where it is computed."""
    sub.add_argument(
        "--target", required=True, help="folder or hub id of a Hugging Face causal language model"
    )
    if runs:
        sub.add_argument("--device", default="cpu", help="torch device of the target (default cpu)")


def _add_threads(sub: argparse.ArgumentParser) -> None:
    """The option `--threads`."""
    about = "CPU threads (default: OMP_NUM_THREADS, or the fastest by a short measurement)"
    sub.add_argument("--threads", type=_positive, help=about)


def _add_feature_engine(sub: argparse.ArgumentParser) -> None:
    """The options of a serving engine that computes the features."""
    sub.add_argument(
        "--engine",
        choices=("vllm", "sglang"),
        help="a serving engine computes them (docs/engines.md); sglang was never run",
    )
    sub.add_argument(
        "--engine-python", metavar="PYTHON", help="of the environment that has the engine"
    )
    sub.add_argument(
        "--engine-url",
        action="append",
        metavar="URL",
        help="a running server, http://HOST:PORT; of sglang twice: the taps', the last state's",
    )
    sub.add_argument(
        "--engine-arg",
        action="append",
        metavar="NAME=VALUE",
        help="argument of the engine's own: quantization=fp8, tensor_parallel_size=2",
    )
    sub.add_argument(
        "--check",
        choices=("hf", "logits"),
        help="what the engine's first row is compared with (default: hf, the target loaded here, "
        "if it has at most 4 GiB and is not quantised)",
    )


def _add_template(sub: argparse.ArgumentParser) -> None:
    """The option for arguments of the chat template."""
    sub.add_argument(
        "--template-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of the chat template, as the engine gives it: enable_thinking=false",
    )


def _add_conversations(sub: argparse.ArgumentParser) -> None:
    """The options that name conversations and say how they are read."""
    sub.add_argument(
        "--conversations",
        required=True,
        help="JSONL, a JSON array (also .gz, .xz, .zst), parquet, or a data set's folder",
    )
    sub.add_argument(
        "--max-length",
        type=_positive,
        default=2048,
        help="tokens kept of a sample (default 2048)",
    )
    sub.add_argument("--limit", type=_positive, help="use only the first conversations")
    sub.add_argument(
        "--skip-bad",
        type=_share,
        nargs="?",
        const=0.05,
        metavar="SHARE",
        help="leave bad rows out, at most this share of all, 0 to 1 (default 0.05)",
    )
    _add_template(sub)


def _add_engine(sub: argparse.ArgumentParser) -> None:
    """The options of an evaluation in a serving engine."""
    sub.add_argument(
        "--engine", choices=("vllm", "llamacpp"), help="decode in a serving engine, both ways"
    )
    sub.add_argument("--engine-python", help="the Python of an environment that has the engine")
    sub.add_argument(
        "--engine-arg",
        action="append",
        metavar="NAME=VALUE",
        help="argument of the engine's own: gpu_memory_utilization=0.8, cpuparams.n_threads=4",
    )
    sub.add_argument(
        "--converter", help="llama.cpp's convert_hf_to_gguf.py or its checkout, for folders"
    )


def _add_settings(sub: argparse.ArgumentParser) -> None:
    """The options that make a configuration."""
    sub.add_argument("--config", help="TOML file")
    sub.add_argument("--draft-config", help="draft JSON (default: derived from the target)")
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a setting",
    )


def _add_data_commands(command: Command) -> None:
    _add_synthesize(command)
    _add_inspect(command)
    _add_extract(command)
    _add_vocab(command)


def _add_synthesize(command: Command) -> None:
    sub = command(
        "synthesize",
        data.synthesize,
        "let the target answer given prompts, or write its own turns too",
    )
    _add_target(sub, runs=True)
    _add_template(sub)
    sub.add_argument("--out", required=True, help="JSONL file; .xz and .gz compress")
    sub.add_argument(
        "--prompts",
        help="JSONL of prompts or conversations, whose assistant turns it answers anew; "
        "without: it writes the user turns too",
    )
    sub.add_argument(
        "--count",
        type=_positive,
        help="conversations to write at least (default 1000); of --prompts, the first so many",
    )
    sub.add_argument(
        "--temperature", type=_at_least_zero, help="of the answers (default 0.5; 0: greedy)"
    )
    sub.add_argument(
        "--max-new",
        type=_positive,
        help="tokens of an answer at most (default 224; with --prompts 512)",
    )
    sub.add_argument("--seed", type=_count, default=0)
    sub.add_argument(
        "--batch", type=_positive, default=64, help="conversations sampled together (default 64)"
    )
    sub.add_argument(
        "--exclude", help="JSONL whose texts must not come back: 13 words in a row are too many"
    )
    _add_threads(sub)


def _add_inspect(command: Command) -> None:
    sub = command(
        "inspect",
        data.inspect,
        "show what is trained on of conversations, and what is left out; the tokenizer is enough",
    )
    _add_target(sub, runs=False)
    _add_conversations(sub)
    sub.add_argument("--show", type=_count, default=2, help="samples to print (default 2)")
    sub.add_argument("--id", help="print the samples of the row with this id, or on this line")
    sub.add_argument("--vocab", help="vocabulary map whose coverage is counted")
    sub.add_argument("--json", action="store_true", help="print the numbers as one line of JSON")


def _add_extract(command: Command) -> None:
    sub = command(
        "extract",
        data.extract,
        "run the target over conversations and write its features; resumable",
    )
    _add_target(sub, runs=True)
    _add_conversations(sub)
    sub.add_argument("--out", required=True, help="feature folder; bad rows: OUT/rejects.jsonl")
    sub.add_argument(
        "--minutes",
        type=_above_zero,
        help="end with the last whole shard within this time; a later call goes on",
    )
    sub.add_argument("--dtype", choices=_DTYPES, help=f"what the target computes in ({_FASTEST})")
    sub.add_argument(
        "--batch",
        type=_positive,
        help="conversations in one run of the target (default 4 on CPUs, else 8; of an engine 32)",
    )
    sub.add_argument("--draft-config", help="JSON whose eagle_config names the tapped layers")
    _add_threads(sub)
    _add_feature_engine(sub)


def _add_vocab(command: Command) -> None:
    sub = command(
        "vocab", data.vocab, "count the supervised tokens and write the draft vocabulary map"
    )
    _add_target(sub, runs=False)
    sub.add_argument("--features", required=True)
    sub.add_argument("--out", required=True, help="safetensors file")
    sub.add_argument(
        "--size",
        type=_positive,
        help="draft vocabulary (default: 99.9%% of the supervised tokens, 4096 to 32000)",
    )
    sub.add_argument(
        "--held-out",
        type=_count,
        help="samples at the end that are not counted (default: a tenth, at most 24)",
    )


def _add_training_commands(command: Command) -> None:
    sub = command("train", training.train, "train the draft; goes on from the newest checkpoint")
    _add_target(sub, runs=False)
    sub.add_argument("--features", required=True)
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
    _add_settings(sub)
    sub.add_argument(
        "--recipe",
        choices=("specforge", "specforge-dataflow"),
        help="train as SpecForge does, in the order of its script or of its dataflow launcher",
    )
    sub.add_argument("--on-nonfinite", choices=("stop", "skip"), help="sets train.on_nonfinite")
    sub.add_argument(
        "--minutes", type=_above_zero, help="choose the number of steps to fill this time"
    )
    sub.add_argument(
        "--max-steps",
        type=_positive,
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
        type=_trackers,
        action="extend",
        default=[],
        metavar="NAME",
        help=f"log to {', '.join(TRACKERS)}: several with commas, or once more",
    )
    _add_threads(sub)

    sub = command(
        "plan",
        training.plan,
        "bytes that a run holds, moves and writes; exit code 2 if it cannot fit",
    )
    sub.add_argument("--target", help="folder or hub id; its config.json is enough")
    _add_settings(sub)
    sub.add_argument("--ranks", type=_positive, default=1)
    sub.add_argument(
        "--tokens", type=_count, default=0, help="of all conversations, for the features' size"
    )
    sub.add_argument(
        "--memory", type=_above_zero, help="GiB that a rank may hold: refuse a plan beyond it"
    )


def _add_checking_commands(command: Command) -> None:
    sub = command(
        "evaluate",
        checking.evaluate,
        "speculative decoding with an exported draft: losslessness, length, speed",
    )
    _add_target(sub, runs=True)
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
        type=_positive,
        default=10,
        help="prompts of each file, in order from the first (default 10)",
    )
    sub.add_argument("--max-new", type=_positive, default=128)
    sub.add_argument(
        "--draft-length", type=_positive, default=7, help="tokens drafted in a round (default 7)"
    )
    sub.add_argument(
        "--plain", help="JSON file that keeps the target's own answers for the next draft"
    )
    sub.add_argument(
        "--temperature", type=_at_least_zero, help="tokens are drawn at it (default 0: greedy)"
    )
    sub.add_argument("--top-p", type=_share, help="with --temperature (default 1)")
    sub.add_argument("--seed", type=_count, help="with --temperature (default 0)")
    _add_template(sub)
    sub.add_argument("--untrained", help="an exported untrained draft, to compare with")
    _add_threads(sub)
    sub.add_argument(
        "--dtype",
        choices=_DTYPES,
        help=f"that speed is measured in ({_FASTEST}); with --engine: that all is decoded in "
        "(default float32)",
    )
    _add_engine(sub)

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
    sub.add_argument(
        "--cases", type=_positive, default=100, help="how many are drawn (default 100)"
    )
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


def _trackers(text: str) -> list[str]:
    """A type for argparse: names of trackers with commas between them."""
    names = text.split(",")
    for name in names:
        if name not in TRACKERS:
            raise argparse.ArgumentTypeError(f"{name!r}: must be of {', '.join(TRACKERS)}")
    return names


def _number(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """A type for argparse: a number in a range."""

    def number(text: str) -> Any:
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be between {low} and {high:g}")
        return kind(text)

    return number


_positive = _number(int, 1, 2**40)
_count = _number(int, 0, 2**40)
_above_zero = _number(float, 0.01, 1e6)
_share = _number(float, 0, 1)
_at_least_zero = _number(float, 0, 100)


if __name__ == "__main__":
    sys.exit(main())
