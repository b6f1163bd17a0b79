"""Drafts that differ from one in a single thing that engines read: taps, vocabulary, RoPE.

Their weights are the given draft's, so they draft worse; what is compared, logits and counts, must
agree for any weights.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.draft_config import DraftConfig, aux_layers
from eagle3fn.base.types import Frozen, Params, VocabMap
from eagle3fn.model.table import HEAD
from eagle3fn.use.export import Draft, export

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
}
"""A setting of each variant.

All but dynamic change the second position already. YaRN's original length and factor give SmolLM2's
8,192 positions: vLLM takes their product for the draft's longest sequence.
"""


class Variant(NamedTuple):
    """A draft, and what it differs in."""

    name: str
    draft: Draft


def variants(draft: Draft, target_layers: int, target_head: Tensor) -> Iterator[Variant]:
    """Yield the variants of a draft, the draft itself first.

    Args:
        draft: in fp32.
        target_layers: L, the target's number of decoder layers; at least 4.
        target_head: `(V, Ht)`; its rows are the head of the variant with the whole vocabulary.
    """
    config = draft.config
    yield Variant("as trained", draft)

    own = aux_layers(config, target_layers)
    layers = (0, target_layers // 3, target_layers - 2)
    if layers == own:
        layers = (0, target_layers // 2, target_layers - 1)
    yield Variant("other taps", draft._replace(config=replace(config, aux_layers=layers)))

    if config.target_hidden_size == config.hidden_size:
        yield Variant("D = V", _whole_vocabulary(draft, target_head))

    for name, scaling in ROPES.items():
        yield Variant(f"RoPE {name}", draft._replace(config=replace(config, rope_scaling=scaling)))


def _whole_vocabulary(draft: Draft, head: Tensor) -> Draft:
    """The draft with one row of the head for every token of the target."""
    size = draft.config.vocab_size
    params: Params = {**draft.params, HEAD: head.detach().float()}
    vocab = VocabMap(torch.ones(size, dtype=torch.bool), torch.zeros(size, dtype=torch.int64))
    config: DraftConfig = replace(draft.config, draft_vocab_size=size)
    return draft._replace(config=config, params=params, vocab=vocab)


def write_variant(variant: Variant, folder: str | Path, target_layers: int) -> None:
    """Export a variant.

    Raises:
        UserError: as `use.export.export`.
    """
    draft = variant.draft
    frozen = Frozen(
        embed_tokens=draft.embed_tokens,
        target_head=torch.zeros(1),  # not written
        t2d=draft.vocab.t2d,
        d2t=draft.vocab.d2t,
    )
    export(draft.params, frozen, draft.config, folder, target_layers, torch.float32, any_rope=True)
