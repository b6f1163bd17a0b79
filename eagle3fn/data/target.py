"""The target: its configuration, its weights that the draft shares, and features tapped from its layers.

The only file that imports transformers.
"""

import inspect
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from eagle3fn.base.draft_config import refuse_vision
from eagle3fn.base.errors import UserError
from eagle3fn.data.hooks import layer_outputs
from eagle3fn.data.weights import check_weights, find_key, read_tensor, weight_files

_LOGIT_TRANSFORMS = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
}
_NORM_ADDS_ONE = ("gemma", "gemma2", "gemma3_text")


class TargetTensors(NamedTuple):
    """What the draft takes from the target. `head` is `embed_tokens` where the target ties them."""

    embed_tokens: Tensor  # (V, Ht)
    head: Tensor  # (V, Ht)
    norm: Tensor  # (Ht,), the factor that the normed value is multiplied by


def target_config(path_or_id: str | Path) -> dict[str, Any]:
    """The target's configuration as a dict.

    Raises:
        UserError: not loadable, a vision-language model, or a model that transforms its logits.
    """
    from transformers import AutoConfig

    name, extra = _source(path_or_id)
    try:
        tree = AutoConfig.from_pretrained(name, **extra).to_dict()
    except _load_errors() as error:
        raise _not_loadable(_config_of(path_or_id), error) from None
    refuse_vision(tree, str(path_or_id))
    refuse_logit_transform(tree, str(path_or_id))
    return tree


def refuse_logit_transform(tree: dict[str, Any], where: str) -> None:
    """Raise a UserError if the target's logits are more than `last_hidden @ head.T`."""
    for key, neutral in _LOGIT_TRANSFORMS.items():
        value = tree.get(key)
        if value is not None and value != neutral:
            kind = tree.get("model_type")
            raise UserError(
                f"{where}: {key} = {value} (model_type {kind!r}): targets that transform their logits "
                "are not supported; choose another target"
            )


def load_target(
    path_or_id: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    attn: str = "sdpa",
) -> tuple[Any, Any]:
    """The target model, in eval mode and without gradients, and its tokenizer.

    A target that has no `attn` implementation is loaded with "eager".

    Raises:
        UserError: as `target_config`; the weights are not loadable, do not fit or are not all there; a biased head.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    target_config(path_or_id)
    logging.disable_progress_bar()
    name, extra = _source(path_or_id)
    loader: Any = AutoModelForCausalLM
    options: Any = {"dtype": dtype, "output_loading_info": True, **extra}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **extra)
        try:
            model, loading = loader.from_pretrained(name, attn_implementation=attn, **options)
        except ValueError as error:
            if attn == "eager" or not any(
                word in str(error) for word in (attn, "attention implementation")
            ):
                raise
            model, loading = loader.from_pretrained(name, attn_implementation="eager", **options)
    except _load_errors() as error:
        if not extra and Path(name).is_dir():
            check_weights(Path(name))
        raise _not_loadable(path_or_id, error) from None
    missing = set(loading["missing_keys"]) & {key for key, _ in model.named_parameters()}
    if missing:
        raise _no_fit(path_or_id, f"no tensor {min(missing)}, which config.json asks for")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise _head_bias(path_or_id)
    return model.to(device).eval().requires_grad_(False), tokenizer


def _source(path_or_id: str | Path) -> tuple[str, dict[str, str]]:
    """What transformers is given: a folder or id, and for a GGUF file its name."""
    path = Path(path_or_id)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; name a GGUF file, a model folder or a Hugging Face id"
            )
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"{path}: no config.json there; name a folder that holds a Hugging Face model, or an id"
        )
    return str(path_or_id), {}


def _config_of(path_or_id: str | Path) -> str | Path:
    path = Path(path_or_id)
    return path / "config.json" if path.is_dir() else path_or_id


def _load_errors() -> tuple[type[Exception], ...]:
    """What transformers raises on damaged files and on values that it didn't expect."""
    plain = (
        *(OSError, ValueError, LookupError, ImportError, RuntimeError, AttributeError, TypeError),
        *(SafetensorError, struct.error),
    )
    try:
        from huggingface_hub.errors import StrictDataclassError
    except ImportError:
        return plain
    return (*plain, StrictDataclassError)


def _no_fit(path_or_id: str | Path, what: str) -> UserError:
    return UserError(
        f"{path_or_id}: {what}; fetch the target's files again or choose another target"
    )


def _not_loadable(path_or_id: str | Path, error: Exception) -> UserError:
    if "ignore_mismatched_sizes" in str(error):
        return _no_fit(path_or_id, "tensors in its files have other shapes than config.json says")
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")])[:300]
    return UserError(
        f"{path_or_id}: not loadable as a target ({reason}); name a folder with config.json, tokenizer and "
        "safetensors, a GGUF file, or a Hugging Face id that is reachable or in the cache"
    )


def _head_bias(path_or_id: str | Path) -> UserError:
    return UserError(
        f"{path_or_id}: lm_head.bias: targets with a biased head are not supported; choose another target"
    )


def read_target_tensors(path_or_id: str | Path, dtype: torch.dtype) -> TargetTensors:
    """Embedding, head and final norm in `dtype`, read from the safetensors files without building the model.

    Raises:
        UserError: as `target_config`; no safetensors, a file missing or damaged, a tensor missing or of another shape.
    """
    tree = target_config(path_or_id)
    if Path(path_or_id).suffix == ".gguf":
        return _tensors_of_model(load_target(path_or_id, dtype)[0], tree)
    folder = _weights_folder(path_or_id)
    files = weight_files(folder)
    if any(key.endswith("lm_head.bias") for key in files):
        raise _head_bias(path_or_id)
    vocab, hidden = tree.get("vocab_size"), tree.get("hidden_size")
    embed_key = find_key(files, "embed_tokens.weight", folder)
    embed = read_tensor(folder, files, embed_key, dtype, (vocab, hidden))
    norm_key = embed_key.removesuffix("embed_tokens.weight") + "norm.weight"
    norm = read_tensor(folder, files, find_key(files, norm_key, folder), dtype, (hidden,))
    head = embed
    if not tree.get("tie_word_embeddings"):
        head = read_tensor(
            folder, files, find_key(files, "lm_head.weight", folder), dtype, (vocab, hidden)
        )
    return TargetTensors(embed, head, _norm_factor(norm, tree))


def _tensors_of_model(model: Any, tree: dict[str, Any]) -> TargetTensors:
    embed, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return TargetTensors(
        embed.detach(), head.detach(), _norm_factor(decoder(model).norm.weight.detach(), tree)
    )


def _norm_factor(weight: Tensor, tree: dict[str, Any]) -> Tensor:
    return weight + 1 if tree.get("model_type") in _NORM_ADDS_ONE else weight


def _weights_folder(path_or_id: str | Path) -> Path:
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise _not_loadable(path_or_id, error) from None


def decoder(model: Any) -> Any:
    """The base model whose `layers` are the decoder layers and whose output is behind the final norm.

    Raises:
        UserError: none found.
    """
    queue = [model.get_decoder()] if callable(getattr(model, "get_decoder", None)) else []
    queue.append(model)
    for module in queue:
        if isinstance(getattr(module, "layers", None), nn.ModuleList):
            return module
        queue += [
            m
            for m in (getattr(module, n, None) for n in ("model", "language_model"))
            if m not in (None, module)
        ]
    raise UserError(
        f"{type(model).__name__}: no list of decoder layers found; choose another target"
    )


@torch.no_grad()
def hidden_states(
    model: Any, input_ids: Tensor, attention_mask: Tensor, layers: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Outputs of three decoder layers `(B, S, 3·Ht)` and the final, normed hidden state `(B, S, Ht)`.

    `input_ids` and `attention_mask` are `(B, S)` int64, padded on the right; padded rows hold no meaning.
    """
    base = decoder(model)
    with layer_outputs([base.layers[index] for index in layers]) as outputs:
        out = base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return torch.cat(outputs, -1), out.last_hidden_state


def empty_cache() -> Any:
    """A key-value cache of the target for one decoding."""
    from transformers import DynamicCache

    return DynamicCache()


def cache_name(model: Any) -> str:
    """What `model` calls its key-value cache, as an argument and in its output.

    "cache" in newer releases of transformers (5.24 knows both), "past_key_values" in older ones and in models that
    bring their own code.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
