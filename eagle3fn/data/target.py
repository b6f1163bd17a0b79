"""The target, ready to run: its model, tokenizer, stop tokens, weights' digest, key-value cache.

transformers is imported here inside functions, never when the file is loaded.
"""

import hashlib
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eagle3fn.base.errors import UserError
from eagle3fn.data.target_model import load_model
from eagle3fn.data.target_tensors import check_stored
from eagle3fn.data.target_values import stored_stops, token_ids

_PROBED_VALUES = 64


def load_target(
    path_or_id: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    attn: str = "sdpa",
) -> tuple[Any, Any]:
    """The target model, in eval mode and without gradients, and its tokenizer.

    A target that has no `attn` implementation is loaded with "eager". What training will read and
    compute is compared with the model (`data.teacher_check`, `read_target_tensors`).

    Raises:
        UserError: as `target_config`; a device that is not there; the weights are not loadable, do
            not fit or are not all there; logits that are not `last_hidden @ head.T`; training
            would read other tensors than the model has.
    """
    model, tokenizer = load_model(path_or_id, dtype, device, attn)
    check_stored(path_or_id, model)
    return model, tokenizer


def stop_ids(target: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer, ascending: in samples, in sampling and in decoding.

    Those of the generation configuration, or of the model's where it names none, and the
    tokenizer's `eos_token_id`.

    Args:
        target: its folder, GGUF file or id, of which no weights are read and which may hold the
            tokenizer alone; or the model.
        tokenizer: the target's.

    Raises:
        UserError: not readable, or none at all.
    """
    if isinstance(target, (str, Path)):
        name = target
        ids = stored_stops(target)
    else:
        name = target.name_or_path
        config = target.config.get_text_config()
        ids = token_ids(getattr(target.generation_config, "eos_token_id", None))
        ids = ids or token_ids(getattr(config, "eos_token_id", None))

    ids |= token_ids(tokenizer.eos_token_id)
    if not ids:
        raise UserError(
            f"{name}: no eos_token_id in generation_config.json, config.json or the "
            "tokenizer's files; add the id of the token that ends an answer to "
            "generation_config.json"
        )
    return tuple(sorted(ids))


def weights_digest(model: nn.Module) -> str:
    """Hex digest of the first 64 values of every parameter.

    It distinguishes training states of one model without reading all the weights.
    """
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        head = value.detach().flatten()[:_PROBED_VALUES].cpu().contiguous()
        digest.update(name.encode() + bytes(head.view(torch.uint8).tolist()))
    return digest.hexdigest()


# Its key-value cache


def empty_cache() -> Any:
    """A key-value cache of the target for one decoding."""
    from transformers import DynamicCache

    return DynamicCache()


def cache_name(model: Any) -> str:
    """The name of `model`'s key-value cache, as an argument and in its output.

    "cache" in newer releases of transformers (5.24 takes both), "past_key_values" in older ones and
    in models that bring their own code.
    """
    arguments = inspect.signature(model.forward).parameters
    return "cache" if "cache" in arguments else "past_key_values"
