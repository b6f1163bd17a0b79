"""The table of the commands that train, and that count what training needs."""

from eagle3fn.commands import training
from eagle3fn.commands.grammar import Command, OneOf, option
from eagle3fn.commands.options import (
    BATCH_TOKENS,
    DEVICE,
    DTYPE,
    FEATURE_ENGINE,
    MAX_NEW,
    MINUTES,
    READING,
    SETTINGS,
    TARGET,
    TEMPERATURE,
    THREADS,
)
from eagle3fn.commands.values import above_zero, count, positive, trackers
from eagle3fn.use.trackers import TRACKERS

_ONLINE = (
    DEVICE._replace(flag="--target-device").changed(
        "torch device of the target with --online; on ranks cuda is each one's"
    ),
    DTYPE.changed("what the target computes in with --online"),
    BATCH_TOKENS,
    *READING,
    *FEATURE_ENGINE,
    option(
        "--sources",
        "speed",
        "N",
        "processes of the engine, of each rank",
        type=positive,
        default_text="1",
    ),
    option(
        "--buffer",
        "speed",
        "GIB",
        "features that may lie ready, of each rank",
        type=above_zero,
        default_text="1, or two updates' if that is more",
    ),
    option("--keep", "output", "FOLDER", "write the features of the first pass, as extract does"),
    option(
        "--generate",
        "answers",
        None,
        "the target answers the prompts of --online as training goes",
        action="store_true",
    ),
    MAX_NEW.changed("tokens of such an answer at most", default_text="512"),
    TEMPERATURE.changed("of such answers; 0: greedy"),
)
"""Options of a training whose features are computed as it goes."""

_TRAIN = Command(
    name="train",
    stage="training",
    run=training.train,
    about="train the draft; goes on from the newest checkpoint",
    example="--target Qwen/Qwen3-0.6B --features features --vocab vocab.safetensors --out run",
    goes_on=True,
    options=(
        TARGET,
        OneOf(
            (
                option("--features", "input", "FOLDER", "features, as extract writes them"),
                option(
                    "--online",
                    "input",
                    "FILE",
                    "conversations, whose features are computed as training goes",
                ),
            )
        ),
        option("--vocab", "input", "FILE", "vocabulary map", required=True),
        option(
            "--out",
            "output",
            "FOLDER",
            "the run; OUT/draft is the best draft on the held-out samples, or without these the "
            "newest",
            required=True,
        ),
        option(
            "--from",
            "input",
            "CHECKPOINT",
            "go on in a new folder from another run: one of its checkpoints, or its folder",
            dest="source",
        ),
        *SETTINGS,
        option(
            "--recipe",
            "training",
            None,
            "train as SpecForge does, in the order of its script or of its dataflow launcher",
            choices=("specforge", "specforge-dataflow"),
        ),
        option(
            "--on-nonfinite",
            "training",
            None,
            "sets train.on_nonfinite",
            choices=("stop", "skip"),
        ),
        MINUTES._replace(group="training").changed("choose the number of steps to fill this time"),
        option(
            "--max-steps",
            "training",
            "N",
            "updates that this call makes at most; it saves a checkpoint, a later call goes on",
            type=positive,
        ),
        option(
            "--dry-run",
            "training",
            None,
            "print the plan, the first batch, one update and the time of all; write nothing",
            action="store_true",
        ),
        option(
            "--track",
            "output",
            "NAME",
            f"log to {', '.join(TRACKERS)}: several with commas, or once more",
            type=trackers,
            action="extend",
            default=[],
        ),
        THREADS,
        *_ONLINE,
    ),
)

_PLAN = Command(
    name="plan",
    stage="training",
    run=training.plan,
    about="bytes that a run holds, moves and writes; exit code 2 if it cannot fit",
    example="--target Qwen/Qwen3-0.6B --ranks 4 --memory 24",
    options=(
        TARGET.changed("folder or hub id; its config.json is enough", required=False),
        *SETTINGS,
        option("--ranks", "training", "N", "processes that train", type=positive, default=1),
        option(
            "--tokens",
            "training",
            "N",
            "of all conversations, for the features' size",
            type=count,
            default=0,
        ),
        option(
            "--memory",
            "training",
            "GIB",
            "that a rank may hold: refuse a plan beyond it",
            type=above_zero,
        ),
    ),
)

TRAINING_COMMANDS = (_TRAIN, _PLAN)
