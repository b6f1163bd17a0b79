"""Drafts that differ from one in what engines read: taps, vocabulary, RoPE, switches.

Their weights are the given draft's, and drawn ones where it has none, so they draft worse; what is
compared, logits and counts, must agree for any weights.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.draft_config import DraftConfig, aux_layers
from eagle3fn.base.types import Frozen, Params, VocabMap
from eagle3fn.model.table import EMBED, HEAD, weights
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


SWITCHES: dict[str, dict[str, Any]] = {
    "norm_before_fc": {"norm_before_fc": True},
    "fc_norm": {"fc_norm": True},
    "norm_output": {"norm_output": True},
    "norm_before_residual": {"norm_before_residual": True},
    "attention_bias": {"attention_bias": True},
    "qk_norm": {"qk_norm": True},
    "two layers": {"num_hidden_layers": 2},
    "window": {"draft_window": 12},
    "own embedding": {"train_embedding": True},
    "EAGLE-3.1": {"fc_norm": True, "norm_output": True},
    "all": {
        "norm_before_fc": True,
        "fc_norm": True,
        "norm_output": True,
        "norm_before_residual": True,
        "qk_norm": True,
        "num_hidden_layers": 3,
        "train_embedding": True,
    },
}
"""Switches of the draft, each alone and together. The window hides something of every prompt."""


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

    for name, switches in SWITCHES.items():
        yield Variant(name, with_shape(draft, replace(config, **switches)))
    for count in (2, 4):
        taps = tuple(range(count))
        yield Variant(f"{count} taps", with_shape(draft, replace(config, aux_layers=taps)))
    half = replace(config, hidden_size=config.hidden_size // 2)
    yield Variant("half as wide", with_shape(draft, half))


def with_shape(draft: Draft, config: DraftConfig) -> Draft:
    """A draft of another shape: weights that it shares are the given ones, others are drawn."""
    generator = torch.Generator().manual_seed(0)
    params: Params = {}
    for name, weight in weights(config).items():
        shape = weight.shape(config)
        given = draft.params.get(name)
        if given is not None and given.shape == shape:
            params[name] = given
            continue
        noise = torch.randn(shape, generator=generator)
        if weight.role == "norm":
            params[name] = 1 + 0.1 * noise
        elif weight.role == "bias":
            params[name] = 0.1 * noise
        elif name == EMBED and draft.embed_tokens is not None and not config.other_width:
            params[name] = draft.embed_tokens.float() + 0.1 * noise
        else:
            params[name] = noise * shape[1] ** -0.5
    embed = None if config.own_embedding else draft.embed_tokens
    return draft._replace(config=config, params=params, embed_tokens=embed)


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
