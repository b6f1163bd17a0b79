"""Which target is it: digests of a configuration and of a model's weights."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

_VOLATILE = (
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
)
_PROBE = 64


def config_hash(tree: dict[str, Any]) -> str:
    """Hex digest of a target's configuration, without its place, its dtype and the library's version."""
    stable = {key: value for key, value in tree.items() if key not in _VOLATILE}
    return hashlib.sha256(json.dumps(stable, sort_keys=True, default=str).encode()).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Hex digest of the first values of every parameter: tells one training state from another, quickly."""
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        head = value.detach().flatten()[:_PROBE].cpu().contiguous()
        digest.update(name.encode() + bytes(head.view(torch.uint8).tolist()))
    return digest.hexdigest()
