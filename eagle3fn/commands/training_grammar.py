"""The grammar of the commands that train."""

from eagle3fn.commands import training
from eagle3fn.commands.options import (
    Command,
    above_zero,
    add_online,
    add_settings,
    add_target,
    add_threads,
    count,
    positive,
    trackers,
)
from eagle3fn.use.trackers import TRACKERS


def add_training_commands(command: Command) -> None:
    """The commands that train, and that count what training needs."""
    _add_train(command)
    _add_plan(command)


def _add_train(command: Command) -> None:
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


def _add_plan(command: Command) -> None:
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
