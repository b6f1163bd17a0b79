"""What both training scripts read, of seeded random numbers: target, features, map, draft."""

import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.problem import Drawer, draft_of, make_frozen, turns
from bench.specforge_data import EMBED, HEAD, draft_tree, save_shard
from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.files import write_json

UNROLL = 7
BATCH = 2
SAMPLES = 10
MASKED = 0.5  # share of the tokens without a loss, in turns
TEMPLATE = "qwen"
TARGET_FIELDS = (  # of `DraftConfig`, under the same names in a target's configuration
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
)


class Sizes(NamedTuple):
    """What is trained on a device."""

    shape: str  # of bench.problem.SHAPES
    length: int  # tokens of the longest sample
    rate: float


def write_target(folder: Path, draft: DraftConfig, device: str, seed: int) -> dict[str, Any]:
    """A random target: embedding, final norm, head, and a tokenizer of one word.

    Returns:
        Its vocabulary map as SpecForge stores one: `t2d` `(V,)` bool, `d2t` `(D,)` int64.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    frozen = make_frozen(draft, seed, torch.bfloat16, device)
    assert frozen.embed_tokens is not None
    tensors = {
        EMBED: frozen.embed_tokens.cpu(),
        "model.norm.weight": torch.ones(draft.target_hidden_size, dtype=torch.bfloat16),
        HEAD: frozen.target_head.cpu(),
    }
    folder.mkdir(parents=True)
    save_shard(folder, tensors)
    write_json(folder / "config.json", target_tree(draft))
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(folder)
    return {"t2d": frozen.t2d.cpu(), "d2t": frozen.d2t.cpu()}


def target_tree(draft: DraftConfig) -> dict[str, Any]:
    """The configuration of a target for which this draft is made."""
    fixed = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_hidden_layers": 28,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return fixed | {name: getattr(draft, name) for name in TARGET_FIELDS}


def write_features(folder: Path, draft: DraftConfig, length: int, device: str, seed: int) -> None:
    """Samples of four lengths, in SpecForge's files; half of the tokens are trained, in turns."""
    folder.mkdir(parents=True)
    source = torch.Generator().manual_seed(seed)
    draw = Drawer(seed + 3, torch.bfloat16, device)
    for number in range(SAMPLES):
        size = length - number % 4 * (length // 16)
        tree = {
            "input_ids": torch.randint(0, draft.vocab_size, (size,), generator=source),
            "loss_mask": turns(size, MASKED, source),
            "aux_hidden_state": draw((1, size, 3 * draft.target_hidden_size), 1.0).cpu(),
            "hidden_state": draw((1, size, draft.target_hidden_size), 2.0).cpu(),
        }
        torch.save(tree, folder / f"data_{number:06d}.ckpt")


def write_problem(root: Path, sizes: Sizes, updates: int, device: str, seed: int) -> list[str]:
    """All that both scripts read, under `root`; returns their arguments for so many updates.

    Large tensors are drawn on `device`, so their values depend on it.
    """
    draft = draft_of(sizes.shape, None, sizes.length)
    vocab = write_target(root / "target", draft, device, seed)
    write_features(root / "features", draft, sizes.length, device, seed)
    write_json(root / "draft.json", draft_tree(target_tree(draft), draft.draft_vocab_size))

    # The map where both look first; its name is a hash of what it would be counted from.
    sources = (root / "none.jsonl", sizes.length, TEMPLATE, root / "target")
    key = hashlib.md5("-".join(map(str, sources)).encode()).hexdigest()
    folder = root / "cache" / "vocab_mapping"
    folder.mkdir(parents=True)
    torch.save(vocab, folder / f"{key}.pt")

    settings = {
        "target-model-path": root / "target",
        "draft-model-config": root / "draft.json",
        "train-data-path": root / "none.jsonl",
        "train-hidden-states-path": root / "features",
        "cache-dir": root / "cache",
        "chat-template": TEMPLATE,
        "attention-backend": "sdpa",
        "max-length": sizes.length,
        "batch-size": BATCH,
        "ttt-length": UNROLL,
        "learning-rate": sizes.rate,
        "warmup-ratio": 0.1,
        "num-epochs": math.ceil(updates / (SAMPLES // BATCH)),
        "max-num-steps": updates,
        "seed": seed,
        "dataloader-num-workers": 0,
        "build-dataset-num-proc": 1,
    }
    arguments = []
    for name, value in settings.items():
        arguments += [f"--{name}", str(value)]
    return arguments
