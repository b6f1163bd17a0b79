"""The kinds of files that are mutated: where they lie, how they are mutated, who reads them.

What a change of each may do is here too, in one table.
"""

from enum import Enum
from pathlib import Path
from random import Random
from typing import NamedTuple

from tests.fuzz.pickles import mutate_metadata, mutate_saved
from tests.fuzz.tensors import mutate_tensors
from tests.fuzz.texts import (
    Mutator,
    mutate_bytes,
    mutate_entry,
    mutate_parquet,
    mutate_rows,
    mutate_template,
    mutate_toml,
)
from tests.fuzz.trees import mutate_json, mutate_remote_code


class Rule(Enum):
    """What a call may do that ends well with a mutated file; the loosest first."""

    MAY = "another result is right: the file says what is asked for"
    SAID = "rows may be lost if what is printed names the file"
    FRESH = "the result must be that of a call that begins anew, with the same mutated file"
    NEVER = "another result is wrong, unless the hashes were made to match"
    KEPT = "another result is wrong, but files of somebody's may stay next to it"


class Kind(NamedTuple):
    """Files of one kind."""

    pattern: str  # of paths in a case's folder
    mutators: tuple[Mutator, ...]  # of the file's structure
    tasks: dict[str, Rule]  # who reads it, and what a change may do
    hashed: bool = False  # whether `tests.fuzz.hashes` can make the hashes match


MAY, NEVER, SAID, FRESH = Rule.MAY, Rule.NEVER, Rule.SAID, Rule.FRESH
JSON = (mutate_json,)
ROWS = (mutate_rows,)
TOML = (mutate_toml,)
TENSORS = (mutate_tensors,)
SAVED = (mutate_saved,)

_TOKENIZER = {
    "inspect": MAY,
    "extract": MAY,
    "extract-on": FRESH,
    "evaluate": MAY,
    "evaluate-plain": FRESH,
    "synthesize": MAY,
}
_TARGET_JSON = {**_TOKENIZER, "train": MAY, "vocab": MAY, "export-vllm": MAY, "plan": MAY}
_TARGET_JSON |= {"resume": NEVER, "convert-to-ours": MAY, "convert-draft": MAY}
_WEIGHTS = {"extract": MAY, "extract-target": MAY, "extract-on": FRESH, "train": MAY}
_WEIGHTS |= {"resume": NEVER, "evaluate": MAY, "evaluate-plain": FRESH}
_FEATURES = {"vocab": NEVER, "train": NEVER, "resume": NEVER, "convert-to-specforge": NEVER}
_DRAFT = {"evaluate": MAY, "export-vllm": MAY, "export-speculators": MAY, "train-from": MAY}
_DRAFT |= {"convert-map": MAY}
_CKPTS = {"vocab": MAY, "train-specforge": MAY, "convert-to-ours": MAY}
_RESUME = {"resume": NEVER}
_FOREIGN = {"convert-draft": MAY}
_STEP = "run/train/checkpoints/step-*"

KINDS = {
    # Texts.
    "conversations": Kind(
        "talks.jsonl", ROWS, {"inspect": MAY, "extract": MAY, "extract-on": FRESH}
    ),
    "conversations.gz": Kind("talks.jsonl.gz", ROWS, {"inspect": MAY, "extract": MAY}),
    "conversations.xz": Kind("talks.jsonl.xz", ROWS, {"inspect": MAY}),
    "conversations, JSON": Kind("talks.json", JSON, {"inspect": MAY, "extract": MAY}),
    "conversations, parquet": Kind("talks.parquet", (mutate_parquet,), {"inspect": MAY}),
    "prompts": Kind("prompts.jsonl", ROWS, {"evaluate": MAY, "synthesize": MAY}),
    # The target.
    "target's config.json": Kind(
        "target/config.json", (*JSON * 4, mutate_remote_code), _TARGET_JSON
    ),
    "generation_config.json": Kind("target/generation_config.json", JSON, _TOKENIZER),
    "tokenizer.json": Kind("target/tokenizer.json", JSON, _TOKENIZER),
    "tokenizer_config.json": Kind(
        "target/tokenizer_config.json", (*JSON * 4, mutate_remote_code), _TOKENIZER
    ),
    "special_tokens_map.json": Kind("target/special_tokens_map.json", JSON, _TOKENIZER),
    "chat template": Kind("target/chat_template.jinja", (mutate_template,), _TOKENIZER),
    "target's weights": Kind("target/model.safetensors", TENSORS, _WEIGHTS),
    "target's shards": Kind(
        "sharded/model-*.safetensors", TENSORS, {"extract-target": MAY, "train": MAY}
    ),
    "target's index": Kind(
        "sharded/model.safetensors.index.json", JSON, {"extract-target": MAY, "train": MAY}
    ),
    # Features and maps.
    "index": Kind(
        "features/index.json",
        JSON,
        {**_FEATURES, "extract-on": FRESH, "report": NEVER},
        hashed=True,
    ),
    "shard": Kind(
        "features/shard-*.safetensors", TENSORS, {**_FEATURES, "extract-on": NEVER}, True
    ),
    "samples' table": Kind(
        "features/samples.safetensors", TENSORS, {**_FEATURES, "extract-on": FRESH}, True
    ),
    "sidecar": Kind("features/shard-*.json", JSON, {"extract-on": NEVER}),
    "target's kept hashes": Kind(
        "features/target-files.json", JSON, {"extract-on": NEVER, "train": NEVER, "resume": NEVER}
    ),
    "map": Kind(
        "vocab.safetensors",
        TENSORS,
        {"train": MAY, "resume": NEVER, "convert-map": MAY, "inspect-vocab": MAY},
    ),
    "SpecForge's map": Kind("map.pt", SAVED, {"train-specforge": MAY, "convert-map": MAY}),
    "ckpt": Kind("ckpts/*.ckpt", SAVED, _CKPTS),
    "ckpt.gz": Kind("ckpts-gz/*.ckpt.gz", SAVED, _CKPTS),
    # Settings.
    "config.toml": Kind("config.toml", TOML, {"train": MAY, "plan": MAY, "train-draft": MAY}),
    "draft.json": Kind("draft.json", JSON, {"train-draft": MAY, "plan": MAY, "extract-draft": MAY}),
    # A run.
    "metadata": Kind(f"{_STEP}/.metadata", (mutate_metadata,), _RESUME, hashed=True),
    "distcp": Kind(f"{_STEP}/*.distcp", (mutate_bytes,), _RESUME, hashed=True),
    "checkpoint's draft": Kind(f"{_STEP}/draft.safetensors", TENSORS, _RESUME, hashed=True),
    "meta.json": Kind(f"{_STEP}/meta.json", JSON, _RESUME, hashed=True),
    "horizon.json": Kind("run/train/horizon.json", JSON, _RESUME),
    "run's config.toml": Kind("run/train/config.toml", TOML, {**_RESUME, "report": MAY}),
    "metrics.jsonl": Kind("run/train/metrics.jsonl", ROWS, {"resume": SAID, "report": MAY}),
    "eval.jsonl": Kind("run/train/eval.jsonl", ROWS, {"resume": SAID, "report": MAY}),
    "evaluation.json": Kind("run/evaluation.json", JSON, {"report": MAY}),
    "stages.json": Kind("run/stages.json", JSON, {"report": MAY}),
    "settings.json": Kind("run/settings.json", JSON, {"report": MAY}),
    "kept plain answers": Kind("plain.json", JSON, {"evaluate-plain": NEVER}),
    # Drafts.
    "draft's config.json": Kind("draft/config.json", JSON, _DRAFT),
    "draft's weights": Kind("draft/model.safetensors", TENSORS, _DRAFT),
    "draft's card": Kind("draft/README.md", (mutate_bytes,), {"export-vllm": MAY}),
    "untrained draft": Kind("untrained/config.json", JSON, {"evaluate-plain": MAY}),
    "foreign config.json": Kind("foreign-*/config.json", JSON, _FOREIGN),
    "foreign weights": Kind("foreign-*/*.safetensors", TENSORS, _FOREIGN),
    "foreign index": Kind("foreign-*/model.safetensors.index.json", JSON, _FOREIGN),
    "foreign pickle": Kind("foreign-*/pytorch_model.bin", SAVED, _FOREIGN),
}


def draw_mutator(kind: Kind, random: Random) -> Mutator:
    """How a file is mutated: mostly by its structure, also by its bytes, seldom as an entry."""
    way = random.random()
    if way < 0.08:
        return mutate_entry
    if way < 0.3:
        return mutate_bytes
    return random.choice(kind.mutators)


def find(folder: Path, pattern: str) -> list[str]:
    """Paths in a folder that a pattern names, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.glob(pattern))
