"""The table of the commands that check, gather and write drafts."""

from eagle3fn.commands import checking, drafts
from eagle3fn.commands.grammar import Command, OneOf, option
from eagle3fn.commands.options import (
    DEVICE,
    DTYPE,
    ENGINE_ARG,
    ENGINE_PYTHON,
    MAX_NEW,
    SEED,
    TARGET,
    TEMPERATURE,
    TEMPLATE_ARG,
    THREADS,
    TOP_P,
)
from eagle3fn.commands.values import positive

_EVALUATE = Command(
    name="evaluate",
    stage="checking",
    run=checking.evaluate,
    about="speculative decoding with an exported draft: losslessness, length, speed",
    example="--target Qwen/Qwen3-0.6B --draft run/draft --prompts prompts.jsonl "
    "--out evaluation.json",
    options=(
        TARGET,
        DEVICE,
        option(
            "--draft",
            "input",
            "FOLDER",
            "exported draft; with --engine llamacpp also a GGUF file",
            required=True,
        ),
        option(
            "--prompts",
            "input",
            "FILE",
            "rows with a prompt, and perhaps a category; of several files each is a category",
            required=True,
            nargs="+",
            action="extend",
        ),
        option("--out", "output", "FILE", "JSON report", required=True),
        option(
            "--tasks",
            "input",
            "N",
            "prompts of each file, in order from the first",
            type=positive,
            default=10,
        ),
        MAX_NEW.changed(default=128),
        option(
            "--draft-length",
            "draft",
            "N",
            "tokens drafted in a round; more cost more, and pay where most are accepted",
            type=positive,
            default_text="the unroll that the draft was trained with, as its card says; else 7",
        ),
        option(
            "--plain",
            "output",
            "FILE",
            "JSON that keeps the target's own answers for the next draft",
        ),
        TEMPERATURE.changed("tokens are drawn at it", default_text="0: greedy"),
        TOP_P.changed("with --temperature", default_text="1"),
        SEED.changed("with --temperature", default=None, default_text="0"),
        TEMPLATE_ARG,
        option("--untrained", "input", "FOLDER", "an exported untrained draft, to compare with"),
        THREADS,
        DTYPE.changed(
            "that speed is measured in; with --engine: that all is decoded in",
            default_text=f"{DTYPE.default_text}; with --engine float32",
        ),
        option(
            "--engine",
            "serving engine",
            None,
            "decode in a serving engine, both ways",
            choices=("vllm", "llamacpp"),
            default_text="in this process",
        ),
        ENGINE_PYTHON,
        ENGINE_ARG.changed(
            "argument of the engine's own: gpu_memory_utilization=0.8, cpuparams.n_threads=4; once "
            "for each"
        ),
        option(
            "--converter",
            "serving engine",
            "PATH",
            "llama.cpp's convert_hf_to_gguf.py or its checkout, for folders",
        ),
    ),
)

_REPORT = Command(
    name="report",
    stage="checking",
    run=checking.report,
    about="gather a run's results in a table, a JSON file and an HTML page",
    example="--run run",
    options=(
        option(
            "--run",
            "input",
            "FOLDER",
            "that of train --out, or one with that as train/; evaluation.json there is read too",
            dest="folder",
            required=True,
        ),
    ),
)

_PARITY = Command(
    name="parity",
    stage="checking",
    run=checking.parity,
    about="SpecForge's recipe against SpecForge, bit for bit, on drawn tiny problems",
    example="--cases 25 --seed 4",
    options=(
        option("--cases", "input", "N", "how many are drawn", type=positive, default=100),
        option("--seed", "input", "N", "the same cases for the same seed", type=int, default=0),
        option(
            "--bisect",
            "output",
            None,
            "name the unroll step and operation a difference begins at",
            action="store_true",
        ),
    ),
)

_EXPORT = Command(
    name="export",
    stage="drafts",
    run=drafts.export,
    about="write a trained draft as a serving engine reads it",
    example="--draft run/draft --target Qwen/Qwen3-0.6B --for vllm --out vllm-draft",
    options=(
        option("--draft", "input", "FOLDER", "exported draft, such as RUN/draft", required=True),
        option("--out", "output", "FOLDER", "new, or an older export", required=True),
        option(
            "--for",
            "output",
            None,
            "whose layout is written",
            dest="engine",
            required=True,
            choices=("vllm", "sglang", "llamacpp", "speculators", "eagle"),
        ),
        TARGET.changed("the draft's target, folder or hub id; vllm needs it", required=False),
        option(
            "--target-name",
            "target",
            "NAME",
            "the name that the target is served by, where it is not --target",
        ),
    ),
)

_CONVERT = Command(
    name="convert",
    stage="drafts",
    run=drafts.convert,
    about="other trainers' drafts, vocabulary maps and features to ours, and maps and features "
    "back",
    example="--draft specforge-draft --target Qwen/Qwen3-0.6B --out draft",
    options=(
        OneOf(
            (
                option(
                    "--draft",
                    "input",
                    "FOLDER",
                    "draft folder of SpecForge, EAGLE, speculators or the hub",
                ),
                option(
                    "--vocab",
                    "input",
                    "PATH",
                    "map file, folder of .npy files, or a draft's folder",
                ),
                option(
                    "--features",
                    "input",
                    "FOLDER",
                    "features of ours, or of SpecForge's .ckpt files",
                ),
            )
        ),
        option("--out", "output", "PATH", "what is written, whole or not at all", required=True),
        option(
            "--from",
            "input",
            None,
            "whose draft it is",
            dest="origin",
            choices=("specforge", "eagle", "speculators", "hf"),
            default_text="known by its keys",
        ),
        option(
            "--for",
            "output",
            None,
            "whose maps or features are written",
            dest="kind",
            choices=("eagle3fn", "specforge", "speculators"),
            default="eagle3fn",
        ),
        TARGET.changed("the target, folder or hub id, for what a file leaves out", required=False),
    ),
)

CHECKING_COMMANDS = (_EVALUATE, _REPORT, _PARITY)
DRAFT_COMMANDS = (_EXPORT, _CONVERT)
