"""Tiny pieces for tests: configurations, frozen tensors, batches, features.

Every tensor is a function of the arguments alone. Shape letters: `B` batch, `S` sequence, `H` draft
hidden, `Ht` target hidden, `V` target vocabulary, `D` draft vocabulary. Drawn cases of the
objective, for properties, come from `eagle3fn.testing` instead, and so do the target, its tokenizer
and conversations.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import eagle3fn as e3
from eagle3fn.base.types import Batch, Frozen, Sample, VocabMap
from eagle3fn.data.feature_index import own_hash
from eagle3fn.data.feature_writing import write_index, write_shard
from eagle3fn.data.features import open_features
from eagle3fn.data.target_tensors import TargetTensors
from eagle3fn.testing.builders import Case, Unaligned
from eagle3fn.testing.tiny_target import (  # noqa: F401  the tests take them from here
    CHATML,
    SIZES,
    talk,
    tiny_model,
    tiny_tokenizer,
    write_talks,
)

# Configurations and tensors of a tiny draft.

GATE = Case(
    heads=(4, 2),
    head_dim=16,
    hidden=64,
    target_hidden=64,
    intermediate=128,
    vocab=256,
    draft_vocab=64,
    lengths=(16, 16),
    steps=3,
    mask="full",
    eps=1e-5,
    dtype="bfloat16",
)
"""The shapes of SpecForge's own equivalence tests."""

UNROLL = 4
"""Unroll steps of `make_config` and `make_batch`."""


def make_draft(
    hidden_size: int = 16, vocab_size: int = 40, draft_vocab_size: int = 24, **changes: Any
) -> e3.DraftConfig:
    """A draft as wide as its target; `changes` are other fields of `DraftConfig`.

    The initial weights are larger than the default, so that gradients of a tiny draft are not tiny.
    """
    fields = {
        "hidden_size": hidden_size,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "vocab_size": vocab_size,
        "draft_vocab_size": draft_vocab_size,
        "target_hidden_size": hidden_size,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    return e3.DraftConfig(**(fields | changes))


def make_config(
    dtype: str = "float32",
    steps: int = 20,
    draft: e3.DraftConfig | None = None,
    train: dict[str, Any] | None = None,
    **objective: Any,
) -> e3.Config:
    """The fast numerics over `UNROLL` steps, from random parameters.

    Args:
        dtype: of the parameters.
        steps: updates of the run.
        draft: `make_draft()` if absent.
        train: more fields of `TrainConfig`.
        objective: fields of `ObjectiveConfig`.
    """
    return e3.Config(
        draft=draft or make_draft(),
        objective=e3.ObjectiveConfig(**({"ttt_length": UNROLL, "numerics": "fast"} | objective)),
        optimizer=e3.OptimizerConfig(learning_rate=1e-2),
        train=e3.TrainConfig(
            **({"steps": steps, "dtype": dtype, "init": "random"} | (train or {}))
        ),
    )


def make_map(vocab_size: int, draft_vocab_size: int, source: torch.Generator) -> VocabMap:
    """A random draft vocabulary: `t2d` `(V,)` bool, `d2t` `(D,)` int64 offsets."""
    kept = torch.randperm(vocab_size, generator=source)[:draft_vocab_size].sort().values
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[kept] = True
    return VocabMap(t2d, kept - torch.arange(draft_vocab_size))


def make_frozen(config: e3.Config, seed: int = 99) -> Frozen:
    """A random target in the run's dtype: embedding `(V, H)`, head `(V, Ht)`, a map; no norm."""
    draft = config.draft
    dtype = getattr(torch, config.train.dtype)
    source = torch.Generator().manual_seed(seed)

    vocab_map = make_map(draft.vocab_size, draft.draft_vocab_size, source)
    embedding = normal(source, draft.vocab_size, draft.hidden_size)
    head = normal(source, draft.vocab_size, draft.target_hidden_size)
    return Frozen(embedding.to(dtype), head.to(dtype), *vocab_map)


def make_target(vocab_size: int = 40, hidden_size: int = 16, seed: int = 2) -> TargetTensors:
    """What a run reads of a random target: embedding and head `(V, Ht)`, norm `(Ht,)` of ones."""
    source = torch.Generator().manual_seed(seed)
    embedding = normal(source, vocab_size, hidden_size)
    head = normal(source, vocab_size, hidden_size)
    return TargetTensors(embedding, head, torch.ones(hidden_size))


def normal(source: torch.Generator, *shape: int) -> Tensor:
    """Normal numbers of a shape, fp32 whatever the default dtype."""
    return torch.randn(shape, generator=source, dtype=torch.float32)


def make_unaligned(
    seed: int, lengths: Sequence[int], hidden_size: int = 16, vocab_size: int = 40
) -> Unaligned:
    """Random samples of `lengths` tokens, padded on the right; about four of five rows are trained.

    `S` is the longest length, `B` their number; the features are fp32. Change a mask, ids or hidden
    states here, then call `aligned(k)`.
    """
    source = torch.Generator().manual_seed(seed)
    b = len(lengths)
    s = max(lengths)
    real = (torch.arange(s)[None] < torch.tensor(lengths)[:, None]).long()  # (B, S)
    chosen = torch.rand(b, s, generator=source, dtype=torch.float32) < 0.8  # (B, S)
    return Unaligned(
        input_ids=torch.randint(0, vocab_size, (b, s), generator=source) * real,
        attention_mask=real,
        row_mask=chosen.long() * real,
        aux_hidden=normal(source, b, s, 3 * hidden_size) * real[..., None],
        last_hidden=normal(source, b, s, hidden_size) * real[..., None],
    )


def make_batch(
    seed: int,
    lengths: Sequence[int],
    hidden_size: int = 16,
    vocab_size: int = 40,
    k: int = UNROLL,
) -> Batch:
    """`make_unaligned`, aligned for the unroll of `make_config`, or of `k` steps."""
    return make_unaligned(seed, lengths, hidden_size, vocab_size).aligned(k)


def pad_batch(batch: Batch, places: int) -> Batch:
    """The same samples with more padded places at the end of the sequence: `(B, S + places, …)`.

    Without a plan of its rows.
    """
    assert batch.position_ids is None

    def pad(x: Tensor) -> Tensor:
        return F.pad(x, (0, places))

    def pad_features(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, places))

    return batch._replace(
        next_ids=pad(batch.next_ids),
        attention_mask=pad(batch.attention_mask),
        row_mask=pad(batch.row_mask),
        aux_hidden=pad_features(batch.aux_hidden),
        label_hidden=pad_features(batch.label_hidden),
        plan=None,
    )


class LossInput(NamedTuple):
    """What one unroll step's loss is computed from."""

    logits: Tensor  # (B, S, D)
    p_draft: Tensor  # (B, S, D)
    p_full: Tensor  # (B, S, D)
    mask: Tensor  # (B, S, 1)


def underflow() -> LossInput:
    """Four rows of two tokens; in rows 0, which is masked, and 2 the acceptance rate underflows.

    There the draft's probability is zero where the teacher's is not, and the other way round.
    """
    logits = torch.tensor([[[0.0, 200.0], [0.0, 1.0], [0.0, 200.0], [1.0, 0.0]]])
    p_full = torch.tensor([[[0.5, 0.0], [0.5, 0.4], [0.5, 0.0], [0.2, 0.3]]])
    p_draft = p_full / p_full.sum(-1, keepdim=True)
    return LossInput(logits, p_draft, p_full, torch.tensor([[0, 1, 1, 1]])[..., None])


# Targets, tokenizers and conversations.

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The text of `CHATML`, with the assistant's tokens marked by the template."""


def tiny_template(template: str | None = CHATML, **arguments: Any) -> Any:
    """`tiny_tokenizer`'s chat template, with arguments."""
    from eagle3fn.data.template import ChatTemplate

    return ChatTemplate(tiny_tokenizer(template), (), arguments)


# Samples and feature folders.


def random_sample(length: int, seed: int, vocab: int = 50, hidden: int = 4) -> Sample:
    """Random ids and token mask `(S,)`, and bf16 features `(S, A·Ht)` and `(S, Ht)`."""
    source = torch.Generator().manual_seed(seed)
    return Sample(
        input_ids=torch.randint(vocab, (length,), generator=source),
        token_mask=torch.randint(2, (length,), generator=source),
        aux_hidden=normal(source, length, 3 * hidden).bfloat16(),
        last_hidden=normal(source, length, hidden).bfloat16(),
    )


def supervised_sample(length: int, seed: int, vocab: int = 50, hidden: int = 4) -> Sample:
    """`random_sample`, every token of it the assistant's."""
    sample = random_sample(length, seed, vocab, hidden)
    return sample._replace(token_mask=torch.ones_like(sample.token_mask))


def write_folder(
    folder: Path, samples: list[Sample], vocab: int = 50, hidden: int = 4, per_shard: int = 3
) -> Path:
    """Write a feature folder as `eagle3fn extract` does, of samples named `row0`, `row1`, …"""
    folder.mkdir(parents=True, exist_ok=True)

    sidecars = []
    for number, start in enumerate(range(0, len(samples), per_shard)):
        part = {}
        entries = []
        for i in range(start, min(start + per_shard, len(samples))):
            sample = samples[i]
            part[str(i)] = sample
            entry = {
                "id": f"row{i}",
                "key": str(i),
                "length": len(sample.input_ids),
                "supervised": int(sample.token_mask.sum()),
            }
            entries.append(entry)
        sidecars.append(write_shard(folder, number, part, {"samples": entries}))

    target = {"name": "tiny", "hidden_size": hidden, "vocab_size": vocab}
    write_index(folder, {"target": target, "dtype": "bfloat16", "max_length": 64}, sidecars)
    return folder


def as_schema_1(folder: Path) -> Path:
    """Rewrite a folder's index as folders had it before the samples' table; its path."""
    path = folder / "index.json"
    samples = list(open_features(folder).samples)
    index = json.loads(path.read_text())
    del index["table"]
    shards = [{key: shard[key] for key in ("file", "bytes", "sha256")} for shard in index["shards"]]
    index |= {"schema": 1, "shards": shards, "samples": samples}
    index["sha256"] = own_hash(index)
    path.write_text(json.dumps(index))
    (folder / "samples.safetensors").unlink()
    return path
