"""Options that several commands have, each defined once, and groups of them."""

from eagle3fn.commands.grammar import Option, option
from eagle3fn.commands.shared import MAX_LENGTH as MAX_LENGTH_DEFAULT
from eagle3fn.commands.values import above_zero, at_least_zero, count, positive, share

STORES = ("bf16", "fp8", "int8")
DTYPES = ("float32", "bfloat16", "float16")

_FASTEST = "bfloat16 where the device multiplies it, else float32"


# The target

TARGET = option(
    "--target",
    "target",
    "TARGET",
    "folder or hub id of a Hugging Face causal language model",
    required=True,
)
DEVICE = option("--device", "target", "DEVICE", "torch device of the target", default="cpu")
DTYPE = option(
    "--dtype", "target", None, "what the target computes in", choices=DTYPES, default_text=_FASTEST
)
TEMPLATE_ARG = option(
    "--template-arg",
    "target",
    "NAME=VALUE",
    "argument of the chat template, as the engine gives it: enable_thinking=false; once for each",
    action="append",
    default=[],
)


# What is read

CONVERSATIONS = option(
    "--conversations",
    "input",
    "FILE",
    "JSONL, a JSON array (also .gz, .xz, .zst), parquet, or a data set's folder",
    required=True,
)
EXCLUDE = option(
    "--exclude",
    "input",
    "FILE",
    "JSONL whose texts must not come back: 13 words in a row are too many",
)
MAX_LENGTH = option(
    "--max-length",
    "reading conversations",
    "N",
    "tokens kept of a sample",
    type=positive,
    default_text=f"{MAX_LENGTH_DEFAULT}, or the target's limit where that is less",
)
LIMIT = option(
    "--limit",
    "reading conversations",
    "N",
    "use only the first conversations",
    type=positive,
    default_text="all",
)
SKIP_BAD = option(
    "--skip-bad",
    "reading conversations",
    "SHARE",
    "leave bad rows out, at most this share of all, 0 to 1; without a value 0.05",
    type=share,
    nargs="?",
    const=0.05,
    default_text="a bad row ends the command",
)
READING = (MAX_LENGTH, LIMIT, SKIP_BAD, TEMPLATE_ARG)
"""How samples are made of conversations."""


# Answers that are drawn

TEMPERATURE = option(
    "--temperature",
    "answers",
    "T",
    "of the answers; 0: greedy",
    type=at_least_zero,
    default_text="0.5",
)
TOP_P = option(
    "--top-p", "answers", "SHARE", "nucleus of the answers", type=share, default_text="0.95"
)
MAX_NEW = option("--max-new", "answers", "N", "tokens of an answer at most", type=positive)
SEED = option("--seed", "answers", "N", "of what is drawn", type=count, default=0)


# Speed

THREADS = option(
    "--threads",
    "speed",
    "N",
    "CPU threads",
    type=positive,
    default_text="OMP_NUM_THREADS, or the fastest by a short measurement",
)
BATCH = option(
    "--batch", "speed", "N", "conversations answered together", type=positive, default=64
)
BATCH_TOKENS = option(
    "--batch-tokens",
    "speed",
    "N",
    "tokens, with padding, in one run of the target; a longer row runs alone",
    type=positive,
    default_text="2048 on CPUs, else 16384; of an engine 32768",
)
MINUTES = option("--minutes", "speed", "MINUTES", "", type=above_zero)


# A draft and its training

DRAFT_CONFIG = option(
    "--draft-config", "draft", "FILE", "draft JSON", default_text="derived from the target"
)
SETTINGS = (
    option("--config", "training", "FILE", "TOML file of settings"),
    option(
        "--set",
        "training",
        "SECTION.KEY=VALUE",
        "override a setting (docs/settings.md); once for each",
        action="append",
        default=[],
    ),
    DRAFT_CONFIG,
)
"""What makes a configuration."""


# Serving engines

ENGINE_PYTHON = option(
    "--engine-python",
    "serving engine",
    "PYTHON",
    "the Python of an environment that has the engine",
)
ENGINE_ARG = option(
    "--engine-arg",
    "serving engine",
    "NAME=VALUE",
    "argument of the engine's own: quantization=fp8, tensor_parallel_size=2; once for each",
    action="append",
)
FEATURE_ENGINE: tuple[Option, ...] = (
    option(
        "--engine",
        "serving engine",
        None,
        "an engine computes the features (docs/engines.md); sglang was never run",
        choices=("vllm", "sglang", "transformers"),
        default_text="this process does",
    ),
    ENGINE_PYTHON.changed(default_text="for transformers this one"),
    option(
        "--engine-url",
        "serving engine",
        "URL",
        "a running server, http://HOST:PORT; of sglang twice: the taps', the last state's",
        action="append",
    ),
    ENGINE_ARG,
    option(
        "--check",
        "serving engine",
        None,
        "what the engine's first row is compared with",
        choices=("hf", "logits"),
        default_text="hf, the target loaded here, if it has at most 4 GiB and is not quantised",
    ),
)
"""A serving engine that computes the features."""
