"""The table of the commands that make data, from conversations to features and map."""

from eagle3fn.commands import data, extraction, vocabulary
from eagle3fn.commands.grammar import Command, OneOf, option
from eagle3fn.commands.options import (
    BATCH,
    BATCH_TOKENS,
    CONVERSATIONS,
    DEVICE,
    DRAFT_CONFIG,
    DTYPE,
    EXCLUDE,
    FEATURE_ENGINE,
    LIMIT,
    MAX_NEW,
    MINUTES,
    READING,
    SEED,
    SKIP_BAD,
    STORES,
    TARGET,
    TEMPERATURE,
    TEMPLATE_ARG,
    THREADS,
    TOP_P,
)
from eagle3fn.commands.values import count, layers, positive, share

_SYNTHESIZE = Command(
    name="synthesize",
    stage="data",
    run=data.synthesize,
    about="let the target write conversations, user turns too",
    example="--target Qwen/Qwen3-0.6B --count 200 --out talks.jsonl",
    goes_on=True,
    options=(
        TARGET,
        DEVICE,
        TEMPLATE_ARG,
        option("--out", "output", "FILE", "JSONL; .xz and .gz compress", required=True),
        option(
            "--count",
            "answers",
            "N",
            "conversations to write at least",
            type=positive,
            default=1000,
        ),
        option("--turns", "answers", "N", "user turns of one, at most", type=positive, default=1),
        option(
            "--system",
            "input",
            "FILE",
            "system texts, a JSON text a line; one is drawn for each conversation",
        ),
        option(
            "--languages",
            "answers",
            "A,B,…",
            "of the user turns: en, de, fr, es, it, pt, ru, zh, ja",
            default="en",
        ),
        option(
            "--max-repeated",
            "answers",
            "SHARE",
            "drop a conversation if more of a turn's 8-grams are repetitions",
            type=share,
            default=0.5,
        ),
        TEMPERATURE,
        MAX_NEW.changed(default_text="224"),
        SEED,
        BATCH.changed("conversations sampled together"),
        EXCLUDE,
        THREADS,
    ),
)

_REGENERATE = Command(
    name="regenerate",
    stage="data",
    run=data.regenerate,
    about="replace the answers of conversations by the target's own, or answer prompts; resumable",
    example="--target Qwen/Qwen3-0.6B --conversations talks.jsonl --out own.jsonl",
    goes_on=True,
    options=(
        TARGET,
        DEVICE,
        CONVERSATIONS,
        LIMIT,
        SKIP_BAD,
        TEMPLATE_ARG,
        option("--out", "output", "FILE", "JSONL; bad rows: OUT.rejects.jsonl", required=True),
        TEMPERATURE,
        MAX_NEW.changed(default_text="512"),
        SEED,
        TOP_P,
        BATCH,
        EXCLUDE,
        THREADS,
        option(
            "--url", "running server", "URL", "ask a running server, as http://localhost:8000/v1"
        ),
        option(
            "--model",
            "running server",
            "NAME",
            "the target's name there",
            default_text="the only one",
        ),
        option(
            "--api-key-env", "running server", "NAME", "environment variable with the server's key"
        ),
        option(
            "--concurrent", "running server", "N", "requests at once", type=positive, default=16
        ),
    ),
)

_INSPECT = Command(
    name="inspect",
    stage="data",
    run=data.inspect,
    about="show what is trained on of conversations, and what is left out; the tokenizer is enough",
    example="--target Qwen/Qwen3-0.6B --conversations talks.jsonl --show 1",
    options=(
        TARGET,
        CONVERSATIONS,
        *READING,
        option("--show", "output", "N", "samples to print", type=count, default=2),
        option("--id", "output", "ID", "print the samples of the row with this id, or this line"),
        option("--vocab", "input", "FILE", "vocabulary map whose coverage is counted"),
    ),
)

_EXTRACT = Command(
    name="extract",
    stage="data",
    run=extraction.extract,
    about="run the target over conversations and write its features; resumable",
    example="--target Qwen/Qwen3-0.6B --conversations own.jsonl --out features",
    goes_on=True,
    options=(
        TARGET,
        DEVICE.changed(f"{DEVICE.about}; auto: spread over all cards by accelerate"),
        DTYPE,
        CONVERSATIONS,
        *READING,
        option(
            "--out",
            "output",
            "FOLDER",
            "features; bad rows: OUT/rejects.jsonl",
            required=True,
        ),
        MINUTES.changed("end with the last whole shard within this time; a later call goes on"),
        option(
            "--store",
            "output",
            None,
            "how features lie on disk: bf16, or half the bytes by fp8 or int8",
            choices=STORES,
            default="bf16",
        ),
        BATCH_TOKENS,
        OneOf(
            (
                option(
                    "--aux-layers",
                    "draft",
                    "A,B,C",
                    "tapped layers, ascending, counted from 0",
                    type=layers,
                    default_text="1, L//2 - 1, L - 4 of L",
                ),
                DRAFT_CONFIG.changed("draft JSON, whose tapped layers are taken", default_text=""),
            ),
            required=False,
        ),
        THREADS,
        *FEATURE_ENGINE,
    ),
)

_VOCAB = Command(
    name="vocab",
    stage="data",
    run=vocabulary.vocab,
    about="count the supervised tokens and write the draft vocabulary map",
    example="--target Qwen/Qwen3-0.6B --features features --out vocab.safetensors",
    options=(
        TARGET,
        OneOf(
            (
                option("--features", "input", "FOLDER", "features whose samples are counted"),
                CONVERSATIONS.changed(
                    "rows whose samples are counted, as extract reads", required=False
                ),
            )
        ),
        *READING,
        option(
            "--out", "output", "FILE", "safetensors; bad rows: OUT.rejects.jsonl", required=True
        ),
        option(
            "--size",
            "draft",
            "N",
            "draft vocabulary",
            type=positive,
            default_text="99.9% of the supervised tokens, 4096 to 32000",
        ),
        option(
            "--held-out",
            "draft",
            "N",
            "samples at the end that are not counted",
            type=count,
            default_text="a tenth, at most 24",
        ),
    ),
)

DATA_COMMANDS = (_SYNTHESIZE, _REGENERATE, _INSPECT, _EXTRACT, _VOCAB)
