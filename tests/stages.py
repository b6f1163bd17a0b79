"""Every stage of the command line on a tiny target, in forks of one warm process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from eagle3fn import cli
from tests.factories import write_talks
from tests.small_run import write_run
from tests.train.forked import Ranks

PATIENCE_S = 240.0
STEPS = 6
TRAINING = [
    f"train.steps={STEPS}",
    "train.eval_every=3",
    "train.checkpoint_every=2",
    "data.held_out=2",
    "data.global_batch=2",
    "objective.ttt_length=2",
]


def commands(world: Path, out: Path) -> dict[str, list[str]]:
    """The arguments of each stage, which reads from `world` and writes into `out`."""
    target = ["--target", world / "target"]
    draft = world / "train/draft"
    settings: list[object] = []
    for setting in TRAINING:
        settings += ["--set", setting]
    made: dict[str, list[object]] = {
        "synthesize": [*target, "--out", out / "talks.jsonl", "--count", 6, "--batch", 4],
        "inspect": [*target, "--conversations", world / "talks.jsonl"],
        "extract": [
            *target,
            *("--conversations", world / "many.jsonl", "--out", out / "features"),
            *("--max-length", 128, "--dtype", "float32"),
        ],
        "vocab": [
            *target,
            *("--features", world / "features", "--out", out / "map.safetensors", "--size", 64),
        ],
        "train": [
            *target,
            *("--features", world / "features", "--vocab", world / "vocab.safetensors"),
            *("--out", out / "train", *settings),
        ],
        "evaluate": [
            *target,
            *("--draft", draft, "--prompts", world / "prompts.jsonl"),
            *("--out", out / "evaluation.json", "--plain", out / "plain.json"),
            *("--max-new", 12, "--draft-length", 3),
        ],
        "report": ["--run", out],
        "export": [*target, "--draft", draft, "--out", out / "export", "--for", "vllm"],
        "convert": ["--features", world / "features", "--out", out / "ckpt", "--for", "specforge"],
    }
    threads = {"synthesize", "extract", "train", "evaluate"}
    return {
        name: [name, *map(str, values), *(["--threads", "1"] if name in threads else [])]
        for name, values in made.items()
    }


def write_world(world: Path) -> None:
    """A target, conversations, features, a map, prompts, a finished run and its evaluation."""
    write_run(world)
    write_talks(world / "many.jsonl", 150)
    prompts = [json.dumps({"prompt": text}) for text in ("hello", "how many", "list", "why")]
    (world / "prompts.jsonl").write_text("\n".join(prompts))
    for stage in ("train", "evaluate"):
        assert cli.main(commands(world, world)[stage]) == 0


class Ended(NamedTuple):
    """How a stage ended."""

    code: int | None  # negative for a signal; None: killed for being late
    text: str  # what it printed, on both outputs


def start(arguments: list[str], log: Path, before: Callable[[], Any] = lambda: None) -> Ranks:
    """A fork that calls `before`, then the command."""

    def work(rank: int) -> int:
        before()
        return cli.main(arguments)

    return Ranks(work, 1, log)


def run(arguments: list[str], log: Path, before: Callable[[], Any] = lambda: None) -> Ended:
    """Run a stage in a fork to its end."""
    (code,) = start(arguments, log, before).wait(PATIENCE_S)
    return Ended(code, log.with_name(f"{log.name}0").read_text(errors="replace"))


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders that a stage left."""
    found = [path for path in folder.rglob("*") if path.suffix in (".tmp", ".old", ".tmp~")]
    return sorted(str(path.relative_to(folder)) for path in found)
