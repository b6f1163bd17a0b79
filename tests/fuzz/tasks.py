"""The commands that are tried, each by a name, on the files of `tests.fuzz.world`.

Paths are relative to a folder that holds what the command reads.
"""

from typing import NamedTuple

LENGTH = ("--max-length", "128")
TARGET = ("--target", "target")
ONE = ("--threads", "1")


class Task(NamedTuple):
    """A command, what it reads, and what it writes.

    `{}` in an argument stands for the file that the case names, where there is a choice.
    """

    arguments: tuple[str, ...]
    reads: tuple[str, ...]  # names in the world's folder
    writes: tuple[str, ...]  # paths whose content is the result, besides what is printed
    choices: tuple[str, ...] = ("",)  # the files for `{}`
    printed: bool = False  # whether what is printed belongs to the result

    def call(self, choice: str) -> list[str]:
        """The command's arguments."""
        return [argument.format(choice) for argument in self.arguments]

    def folders(self, choice: str) -> list[str]:
        """All that the command reads, of the world's folder."""
        return [*self.reads, choice] if choice else list(self.reads)


TALKS = ("talks.jsonl", "talks.jsonl.gz", "talks.jsonl.xz", "talks.json", "talks.parquet")
TARGETS = ("target", "sharded")
FOREIGN = ("foreign-hf", "foreign-eagle", "foreign-shards", "foreign-speculators")

TASKS = {
    "inspect": Task(
        ("inspect", *TARGET, "--conversations", "{}", "--json", *LENGTH),
        ("target",),
        (),
        TALKS,
        printed=True,
    ),
    "inspect-vocab": Task(
        ("inspect", *TARGET, "--conversations", "talks.jsonl", "--json", "--vocab", "{}", *LENGTH),
        ("target", "talks.jsonl"),
        (),
        ("vocab.safetensors",),
        printed=True,
    ),
    "extract": Task(
        ("extract", *TARGET, "--conversations", "{}", "--out", "made", *LENGTH, *ONE)
        + ("--dtype", "float32", "--batch", "16", "--limit", "10"),
        ("target",),
        ("made",),
        TALKS,
    ),
    "extract-target": Task(
        ("extract", "--target", "{}", "--conversations", "talks.jsonl", "--out", "made", *LENGTH)
        + (*ONE, "--dtype", "float32", "--batch", "16", "--limit", "4"),
        ("talks.jsonl",),
        ("made",),
        TARGETS,
    ),
    "extract-draft": Task(
        ("extract", *TARGET, "--conversations", "talks.jsonl", "--out", "made", *LENGTH, *ONE)
        + ("--dtype", "float32", "--draft-config", "draft.json", "--limit", "4"),
        ("target", "talks.jsonl", "draft.json"),
        ("made",),
    ),
    "extract-on": Task(
        ("extract", *TARGET, "--conversations", "talks.jsonl", "--out", "features", *LENGTH, *ONE)
        + ("--dtype", "float32", "--batch", "16"),
        ("target", "talks.jsonl", "features"),
        ("features",),
    ),
    "vocab": Task(
        ("vocab", *TARGET, "--features", "{}", "--out", "made.safetensors", "--size", "200"),
        ("target",),
        ("made.safetensors",),
        ("features", "ckpts", "ckpts-gz"),
    ),
    "train": Task(
        ("train", "--target", "{}", "--features", "features", "--vocab", "vocab.safetensors")
        + ("--out", "made", "--config", "config.toml", *ONE),
        ("features", "vocab.safetensors", "config.toml"),
        ("made",),
        TARGETS,
    ),
    "train-draft": Task(
        ("train", *TARGET, "--features", "features", "--vocab", "vocab.safetensors")
        + ("--out", "made", "--config", "config.toml", "--draft-config", "draft.json", *ONE),
        ("target", "features", "vocab.safetensors", "config.toml", "draft.json"),
        ("made",),
    ),
    "train-from": Task(
        ("train", *TARGET, "--features", "features", "--vocab", "vocab.safetensors")
        + ("--out", "made", "--config", "config.toml", "--set", "train.init=draft", *ONE),
        ("target", "features", "vocab.safetensors", "config.toml", "draft"),
        ("made",),
    ),
    "train-specforge": Task(
        ("train", *TARGET, "--features", "{}", "--vocab", "map.pt", "--recipe", "specforge")
        + ("--out", "made", "--set", "train.steps=2", *ONE),
        ("target", "map.pt"),
        ("made",),
        ("ckpts", "ckpts-gz"),
    ),
    "resume": Task(
        ("train", *TARGET, "--features", "features", "--vocab", "vocab.safetensors")
        + ("--out", "run/train", "--config", "run.toml", *ONE),
        ("target", "features", "vocab.safetensors", "run.toml", "run"),
        ("run/train",),
    ),
    "evaluate": Task(
        ("evaluate", *TARGET, "--draft", "draft", "--prompts", "prompts.jsonl", "--out")
        + ("made.json", "--tasks", "2", "--max-new", "6", "--draft-length", "2", *ONE)
        + ("--dtype", "float32"),
        ("target", "draft", "prompts.jsonl"),
        ("made.json",),
    ),
    "evaluate-plain": Task(
        ("evaluate", *TARGET, "--draft", "draft", "--prompts", "prompts.jsonl", "--out")
        + ("made.json", "--tasks", "2", "--max-new", "6", "--draft-length", "2", *ONE)
        + ("--dtype", "float32", "--plain", "plain.json", "--untrained", "untrained"),
        ("target", "draft", "untrained", "prompts.jsonl", "plain.json"),
        ("made.json",),
    ),
    "report": Task(
        ("report", "--run", "run"),
        ("run", "features"),
        ("run/report.json",),
        printed=True,
    ),
    "export-vllm": Task(
        ("export", "--draft", "draft", "--out", "made", "--for", "vllm", *TARGET),
        ("draft", "target"),
        ("made",),
    ),
    "export-speculators": Task(
        ("export", "--draft", "draft", "--out", "made", "--for", "speculators", *TARGET),
        ("draft", "target"),
        ("made",),
    ),
    "convert-draft": Task(
        ("convert", "--draft", "{}", "--out", "made", *TARGET),
        ("target",),
        ("made",),
        FOREIGN,
    ),
    "convert-map": Task(
        ("convert", "--vocab", "{}", "--out", "made.pt", "--for", "specforge", *TARGET),
        ("target",),
        ("made.pt",),
        ("vocab.safetensors", "map.pt", "draft"),
    ),
    "convert-to-specforge": Task(
        ("convert", "--features", "features", "--out", "made", "--for", "specforge"),
        ("features",),
        ("made",),
    ),
    "convert-to-ours": Task(
        ("convert", "--features", "{}", "--out", "made", *TARGET),
        ("target",),
        ("made",),
        ("ckpts", "ckpts-gz"),
    ),
    "plan": Task(
        ("plan", *TARGET, "--config", "config.toml", "--draft-config", "draft.json"),
        ("target", "config.toml", "draft.json"),
        (),
        printed=True,
    ),
    "synthesize": Task(
        ("synthesize", *TARGET, "--prompts", "prompts.jsonl", "--out", "made.jsonl", *ONE)
        + ("--count", "2", "--max-new", "6", "--temperature", "0"),
        ("target", "prompts.jsonl"),
        ("made.jsonl",),
    ),
}
