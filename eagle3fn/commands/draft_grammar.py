"""The grammar of the commands that check, gather and write drafts."""

from eagle3fn.commands import checking, drafts
from eagle3fn.commands.options import (
    DTYPES,
    FASTEST,
    Command,
    add_engine,
    add_target,
    add_template,
    add_threads,
    at_least_zero,
    count,
    positive,
    share,
)


def add_checking_commands(command: Command) -> None:
    """The commands that check a draft and gather what a run has given."""
    _add_evaluate(command)
    _add_report(command)
    _add_parity(command)


def _add_evaluate(command: Command) -> None:
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


def _add_report(command: Command) -> None:
    sub = command(
        "report", checking.report, "gather a run's results in a table, a JSON file and an HTML page"
    )
    sub.add_argument(
        "--run",
        dest="folder",
        required=True,
        help="folder of train --out, or one with that as train/; evaluation.json there is read too",
    )


def _add_parity(command: Command) -> None:
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


def add_draft_commands(command: Command) -> None:
    """The commands that write drafts and files for other programs."""
    _add_export(command)
    _add_convert(command)


def _add_export(command: Command) -> None:
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


def _add_convert(command: Command) -> None:
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
