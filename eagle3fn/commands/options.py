"""Options that several commands of the command line have, and what their values may be."""

import argparse
from collections.abc import Callable
from typing import Any

from eagle3fn.use.trackers import TRACKERS

Command = Callable[..., argparse.ArgumentParser]
"""`(name, function, what it does)` → the parser of a new sub-command."""

STORES = ("bf16", "fp8", "int8")
DTYPES = ("float32", "bfloat16", "float16")
FASTEST = "default: bfloat16 where the device multiplies it, else float32"


def add_target(sub: argparse.ArgumentParser, runs: bool, spread: bool = False) -> None:
    """The option that names the target; with `runs`, where it is computed.

    `spread`: the command can spread it over several devices.
    """
    sub.add_argument(
        "--target", required=True, help="folder or hub id of a Hugging Face causal language model"
    )
    if runs:
        about = "torch device of the target (default cpu)"
        if spread:
            about += "; auto: spread over all cards by accelerate"
        sub.add_argument("--device", default="cpu", help=about)


def add_threads(sub: argparse.ArgumentParser) -> None:
    """The option `--threads`."""
    about = "CPU threads (default: OMP_NUM_THREADS, or the fastest by a short measurement)"
    sub.add_argument("--threads", type=positive, help=about)


def add_feature_engine(sub: argparse.ArgumentParser) -> None:
    """The options of a serving engine that computes the features."""
    sub.add_argument(
        "--engine",
        choices=("vllm", "sglang", "transformers"),
        help="an engine computes the features (docs/engines.md); sglang was never run",
    )
    sub.add_argument(
        "--engine-python",
        metavar="PYTHON",
        help="of the environment that has the engine (transformers: default this one)",
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


def add_template(sub: argparse.ArgumentParser) -> None:
    """The option for arguments of the chat template."""
    sub.add_argument(
        "--template-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of the chat template, as the engine gives it: enable_thinking=false",
    )


def add_conversations(sub: argparse.ArgumentParser, cut: bool = True) -> None:
    """The options that name conversations and say how they are read; with `cut`, how long."""
    sub.add_argument(
        "--conversations",
        required=True,
        help="JSONL, a JSON array (also .gz, .xz, .zst), parquet, or a data set's folder",
    )
    add_reading(sub, cut)


def add_reading(sub: argparse.ArgumentParser, cut: bool = True) -> None:
    """The options that say how conversations are read; with `cut`, how long."""
    if cut:
        sub.add_argument(
            "--max-length",
            type=positive,
            default=2048,
            help="tokens kept of a sample (default 2048)",
        )
    sub.add_argument("--limit", type=positive, help="use only the first conversations")
    sub.add_argument(
        "--skip-bad",
        type=share,
        nargs="?",
        const=0.05,
        metavar="SHARE",
        help="leave bad rows out, at most this share of all, 0 to 1 (default 0.05)",
    )
    add_template(sub)


def add_online(sub: argparse.ArgumentParser) -> None:
    """The options of a training whose features are computed as it goes."""
    sub.add_argument(
        "--target-device",
        default="cpu",
        help="torch device of the target with --online (default cpu); on ranks cuda is each one's",
    )
    sub.add_argument("--dtype", choices=DTYPES, help=f"the target's with --online ({FASTEST})")
    sub.add_argument(
        "--batch-tokens",
        type=positive,
        help="tokens in one run of the target (default 16384, on a CPU 2048; an engine's 32768)",
    )
    add_reading(sub)
    add_feature_engine(sub)
    sub.add_argument(
        "--sources",
        type=positive,
        metavar="N",
        help="processes of the engine, of each rank (default 1)",
    )
    sub.add_argument(
        "--buffer",
        type=above_zero,
        metavar="GIB",
        help="features that may lie ready, of each rank (default 1, or two updates' if that is "
        "more)",
    )
    sub.add_argument(
        "--keep", metavar="DIR", help="write the features of the first pass, as extract does"
    )
    sub.add_argument(
        "--generate",
        action="store_true",
        help="the target answers the prompts of --online as training goes",
    )
    sub.add_argument(
        "--max-new", type=positive, help="tokens of such an answer at most (default 512)"
    )
    sub.add_argument(
        "--temperature", type=at_least_zero, help="of such answers (default 0.5; 0: greedy)"
    )


def add_engine(sub: argparse.ArgumentParser) -> None:
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


def add_settings(sub: argparse.ArgumentParser) -> None:
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


# Values


def trackers(text: str) -> list[str]:
    """A type for argparse: names of trackers with commas between them."""
    names = text.split(",")
    for name in names:
        if name not in TRACKERS:
            raise argparse.ArgumentTypeError(f"{name!r}: must be of {', '.join(TRACKERS)}")
    return names


def layers(text: str) -> tuple[int, ...]:
    """A type for argparse: numbers of layers with commas between them."""
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: must be numbers of layers, such as 1,14,26")
    return tuple(map(int, numbers))


def number_in(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """A type for argparse: a number in a range."""

    def parsed(text: str) -> Any:
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be between {low} and {high:g}")
        return kind(text)

    return parsed


positive = number_in(int, 1, 2**40)
count = number_in(int, 0, 2**40)
above_zero = number_in(float, 0.01, 1e6)
share = number_in(float, 0, 1)
at_least_zero = number_in(float, 0, 100)
