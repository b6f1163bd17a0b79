"""What SpecForge reads, made of what `eagle3fn extract` wrote.

    python -m bench.specforge_data --target FOLDER --features FOLDER --conversations JSONL --out
    FOLDER

- `OUT/target`: the target with an untied head and an index file, without which SpecForge cannot
  load its head
- `OUT/features`: a `.ckpt` a sample
- `OUT/conversations.jsonl`: plain text
- `OUT/draft.json`: the draft's configuration in SpecForge's format
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bench import common
from eagle3fn.base.draft_keys import draft_config_from_target
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import whole_folder, write_json
from eagle3fn.base.read import read_json
from eagle3fn.data.features import open_features, read_sample
from eagle3fn.data.file_kinds import open_unpacked
from eagle3fn.data.target_source import target_config

HEAD = "lm_head.weight"
EMBED = "model.embed_tokens.weight"
SHARD = "model-00001-of-00001.safetensors"
DRAFT_FIELDS = (  # of `DraftConfig`, under the same names in SpecForge's file
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "draft_vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "initializer_range",
)


def untie(source: Path, out: Path) -> None:
    """A copy of a single-file target whose head is a tensor of its own, with an index.

    Raises:
        UserError: no `model.safetensors`, or no embedding in it.
    """
    weights = source / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{weights}: no such file; name a target of one safetensors file")
    tensors = load_file(weights)
    if EMBED not in tensors:
        raise UserError(f"{weights}: no tensor {EMBED}; name a causal language model")
    tensors.setdefault(HEAD, tensors[EMBED].clone())

    with whole_folder(out) as folder:
        save_shard(folder, tensors)
        for path in source.iterdir():
            if path.is_file() and path.name not in ("model.safetensors", "config.json"):
                shutil.copy(path, folder)
        config = read_json(source / "config.json") | {"tie_word_embeddings": False}
        (folder / "config.json").write_text(json.dumps(config, indent=2))


def save_shard(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A target's tensors as one shard, with the index file that SpecForge looks for."""
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, SHARD)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_ckpts(features: Path, out: Path) -> int:
    """Every sample as SpecForge's file; returns how many. Names sort in the folder's order."""
    opened = open_features(features)
    count = len(opened.samples)
    with whole_folder(out) as folder:
        for number in range(count):
            sample = read_sample(opened, number)
            tree = {
                "input_ids": sample.input_ids.clone(),
                "loss_mask": sample.token_mask.clone(),
                "hidden_state": sample.last_hidden[None].clone(),
                "aux_hidden_state": sample.aux_hidden[None].clone(),
            }
            torch.save(tree, folder / f"data_{number:06d}.ckpt")
    return count


def draft_tree(tree: dict[str, Any], size: int) -> dict[str, Any]:
    """The draft's configuration as SpecForge's JSON files have it.

    Args:
        tree: the target's `config.json`.
        size: draft vocabulary.
    """
    draft = draft_config_from_target(tree, "target", size)
    fixed = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    return fixed | {name: getattr(draft, name) for name in DRAFT_FIELDS}


def parse() -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    for name in ("target", "features", "conversations", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--draft-vocab", type=int, default=8192)
    return parser.parse_args()


def main() -> None:
    options = parse()
    out = options.out
    tree = target_config(options.target)
    untie(options.target, out / "target")
    count = write_ckpts(options.features, out / "features")
    write_json(out / "draft.json", draft_tree(tree, options.draft_vocab))
    with open_unpacked(options.conversations) as file:
        (out / "conversations.jsonl").write_bytes(file.read())
    print(f"{out}: {count} samples, target, draft.json, conversations.jsonl")


if __name__ == "__main__":
    sys.exit(common.program("bench.specforge_data", main))
