"""The commands that are tried, each by a name, on the files of `tests.fuzz.world`.

Paths are relative to a folder that holds what the command reads.
"""

from typing import NamedTuple


class Task(NamedTuple):
    """A command, what it reads, and what it writes.

    `{}` in an argument stands for the file that the case names, where there is a choice.
    """

    command: str
    reads: tuple[str, ...]  # names in the world's folder
    writes: tuple[str, ...]  # paths whose content is the result; without: what is printed
    choices: tuple[str, ...] = ("",)  # the files for `{}`

    @property
    def name(self) -> str:
        """The sub-command."""
        return self.command.partition(" ")[0]

    def call(self, choice: str) -> list[str]:
        """The command's arguments."""
        return [argument.format(choice) for argument in self.command.split()]

    def folders(self, choice: str) -> list[str]:
        """All that the command reads, of the world's folder."""
        return [*self.reads, choice] if choice else list(self.reads)


TALKS = ("talks.jsonl", "talks.jsonl.gz", "talks.jsonl.xz", "talks.json", "talks.parquet")
TARGETS = ("target", "sharded")
FOREIGN = ("foreign-hf", "foreign-eagle", "foreign-shards", "foreign-speculators")
CKPTS = ("ckpts", "ckpts-gz")

_TARGET = "--target target"
_COMPUTED = "--max-length 128 --threads 1 --dtype float32 --batch-tokens 2048"
_EPOCH = "--set train.epochs=1"  # where a mutated file names no number of steps
_TRAIN = f"--features features --vocab vocab.safetensors --threads 1 {_EPOCH} --config"
_DECODED = "--tasks 2 --max-new 6 --draft-length 2 --threads 1 --dtype float32"

TASKS = {
    # Data.
    "inspect": Task(
        f"inspect {_TARGET} --conversations {{}} --json --max-length 128", ("target",), (), TALKS
    ),
    "inspect-vocab": Task(
        f"inspect {_TARGET} --conversations talks.jsonl --json --vocab {{}} --max-length 128",
        ("target", "talks.jsonl"),
        (),
        ("vocab.safetensors",),
    ),
    "extract": Task(
        f"extract {_TARGET} --conversations {{}} --out made {_COMPUTED} --limit 10",
        ("target",),
        ("made",),
        TALKS,
    ),
    "extract-target": Task(
        f"extract --target {{}} --conversations talks.jsonl --out made {_COMPUTED} --limit 4",
        ("talks.jsonl",),
        ("made",),
        TARGETS,
    ),
    "extract-draft": Task(
        f"extract {_TARGET} --conversations talks.jsonl --out made {_COMPUTED} --limit 4 "
        "--draft-config draft.json",
        ("target", "talks.jsonl", "draft.json"),
        ("made",),
    ),
    "extract-on": Task(
        f"extract {_TARGET} --conversations talks.jsonl --out features {_COMPUTED}",
        ("target", "talks.jsonl", "features"),
        ("features",),
    ),
    "vocab": Task(
        f"vocab {_TARGET} --features {{}} --out made.safetensors --size 200",
        ("target",),
        ("made.safetensors",),
        ("features", *CKPTS),
    ),
    "synthesize": Task(
        f"synthesize {_TARGET} --prompts prompts.jsonl --out made.jsonl --threads 1 --count 2 "
        "--max-new 6 --temperature 0",
        ("target", "prompts.jsonl"),
        ("made.jsonl",),
    ),
    # Training.
    "train": Task(
        f"train --target {{}} {_TRAIN} config.toml --out made",
        ("features", "vocab.safetensors", "config.toml"),
        ("made",),
        TARGETS,
    ),
    "train-draft": Task(
        f"train {_TARGET} {_TRAIN} config.toml --out made --draft-config draft.json",
        ("target", "features", "vocab.safetensors", "config.toml", "draft.json"),
        ("made",),
    ),
    "train-from": Task(
        f"train {_TARGET} {_TRAIN} config.toml --out made --set train.init=draft",
        ("target", "features", "vocab.safetensors", "config.toml", "draft"),
        ("made",),
    ),
    "train-specforge": Task(
        f"train {_TARGET} --features {{}} --vocab map.pt --recipe specforge --out made "
        "--set train.steps=2 --threads 1",
        ("target", "map.pt"),
        ("made",),
        CKPTS,
    ),
    "resume": Task(
        f"train {_TARGET} {_TRAIN} run.toml --out run/train",
        ("target", "features", "vocab.safetensors", "run.toml", "run"),
        ("run/train",),
    ),
    "plan": Task(
        f"plan {_TARGET} --config config.toml --draft-config draft.json",
        ("target", "config.toml", "draft.json"),
        (),
    ),
    # Checks of a draft.
    "evaluate": Task(
        f"evaluate {_TARGET} --draft draft --prompts prompts.jsonl --out made.json {_DECODED}",
        ("target", "draft", "prompts.jsonl"),
        ("made.json",),
    ),
    "evaluate-plain": Task(
        f"evaluate {_TARGET} --draft draft --prompts prompts.jsonl --out made.json {_DECODED} "
        "--plain plain.json --untrained untrained",
        ("target", "draft", "untrained", "prompts.jsonl", "plain.json"),
        ("made.json",),
    ),
    "report": Task("report --run run", ("run", "features"), ("run/report.json",)),
    # Drafts, maps and features of other programs.
    "export-vllm": Task(
        f"export --draft draft --out made --for vllm {_TARGET}", ("draft", "target"), ("made",)
    ),
    "export-speculators": Task(
        f"export --draft draft --out made --for speculators {_TARGET}",
        ("draft", "target"),
        ("made",),
    ),
    "convert-draft": Task(
        f"convert --draft {{}} --out made {_TARGET}", ("target",), ("made",), FOREIGN
    ),
    "convert-map": Task(
        f"convert --vocab {{}} --out made.pt --for specforge {_TARGET}",
        ("target",),
        ("made.pt",),
        ("vocab.safetensors", "map.pt", "draft"),
    ),
    "convert-to-specforge": Task(
        "convert --features features --out made --for specforge", ("features",), ("made",)
    ),
    "convert-to-ours": Task(
        f"convert --features {{}} --out made {_TARGET}", ("target",), ("made",), CKPTS
    ),
}
