"""The target: its configuration and digests, the weights the draft takes from it, its features.

transformers is imported here inside functions, never when the file is loaded.
"""

import hashlib
import inspect
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from eagle3fn.base.config import Config
from eagle3fn.base.draft_config import refuse_vision
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import json_sha256, read_json
from eagle3fn.base.types import Frozen, VocabMap
from eagle3fn.data.hooks import layer_outputs
from eagle3fn.data.weights import check_weights, find_key, read_tensor, weight_files

# Settings that make logits more than `last_hidden @ head.T`, with the value that changes nothing.
_LOGIT_TRANSFORMS = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
}
# Families whose RMS norm multiplies by `1 + weight`.
_NORM_ADDS_ONE = ("gemma", "gemma2", "gemma3_text")
# Settings that two copies of one target may differ in.
_VOLATILE = (
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
)
_PROBED_VALUES = 64


class TargetTensors(NamedTuple):
    """What the draft takes from the target. `head` is `embed_tokens` where the target ties them."""

    embed_tokens: Tensor  # (V, Ht)
    head: Tensor  # (V, Ht)
    norm: Tensor  # (Ht,), the factor that the normed value is multiplied by


# Configuration and digests


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
                f"{where}: {key} = {value} (model_type {kind!r}): "
                "targets that transform their logits are not supported; choose another target"
            )


def config_hash(tree: dict[str, Any]) -> str:
    """Hex digest of a target's configuration without its path, dtype and library version."""
    stable = {key: value for key, value in tree.items() if key not in _VOLATILE}
    return json_sha256(stable, default=str)


def stop_ids(path_or_id: str | Path, tokenizer: Any) -> tuple[int, ...]:
    """The target's stop tokens, ascending, without building the model.

    Those of generation_config.json, or of config.json where it names none, and the tokenizer's
    `eos_token_id`. A folder may hold the tokenizer alone.

    Raises:
        UserError: not readable, or none at all.
    """
    ids = _ids(_stored_json(path_or_id, "generation_config.json"))
    ids = ids or _ids(_stored_json(path_or_id, "config.json"))
    ids |= _ids({"eos_token_id": tokenizer.eos_token_id})
    if not ids:
        raise UserError(
            f"{path_or_id}: no eos_token_id in generation_config.json, config.json or the "
            "tokenizer's files; add the id of the token that ends an answer to "
            "generation_config.json"
        )
    return tuple(sorted(ids))


def _ids(tree: dict[str, Any]) -> set[int]:
    """`eos_token_id` as a set: one id, a list of them, or none."""
    found = tree.get("eos_token_id")
    if found is None and isinstance(tree.get("text_config"), dict):
        found = tree["text_config"].get("eos_token_id")
    found = found if isinstance(found, (list, tuple)) else [found]
    return {value for value in found if type(value) is int and value >= 0}


def _stored_json(path_or_id: str | Path, name: str) -> dict[str, Any]:
    """A JSON object of a folder, of an id or, in its place, of a GGUF file; empty if there is none.

    Raises:
        UserError: damaged, or not an id.
    """
    path = Path(path_or_id)
    if path.suffix == ".gguf":
        return _gguf_config(path) if name == "config.json" else {}

    if path.is_dir():
        file = path / name if (path / name).is_file() else None
    else:
        from transformers.utils import cached_file

        # Without a connection the cache may lack a file that the id does not have at all.
        silent = {
            "_raise_exceptions_for_missing_entries": False,
            "_raise_exceptions_for_connection_errors": False,
        }
        try:
            file = cached_file(str(path_or_id), name, **silent)  # type: ignore
        except _load_errors() as error:
            raise _not_loadable(path_or_id, error) from None
    if file is None:
        return {}
    tree = read_json(file)
    if not isinstance(tree, dict):
        raise UserError(f"{file}: not a JSON object; fetch the target's files again")
    return tree


def _gguf_config(path: Path) -> dict[str, Any]:
    """What a GGUF file says of the model's configuration."""
    from transformers import PretrainedConfig

    name, extra = _source(path)
    try:
        return PretrainedConfig.get_config_dict(name, **extra)[0]
    except _load_errors() as error:
        raise _not_loadable(path, error) from None


def weights_digest(model: nn.Module) -> str:
    """Hex digest of the first 64 values of every parameter.

    It distinguishes training states of one model without reading all the weights.
    """
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        head = value.detach().flatten()[:_PROBED_VALUES].cpu().contiguous()
        digest.update(name.encode() + bytes(head.view(torch.uint8).tolist()))
    return digest.hexdigest()


def known_hidden_size(path_or_id: str | Path) -> int | None:
    """The target's hidden size, Ht; None where a folder holds the tokenizer alone."""
    tree = _stored_json(path_or_id, "config.json")
    size = tree.get("hidden_size") or tree.get("text_config", {}).get("hidden_size")
    return size if isinstance(size, int) else None


def load_tokenizer(path_or_id: str | Path) -> Any:
    """The target's tokenizer alone; a folder needs no config.json and no weights.

    Raises:
        UserError: not loadable.
    """
    from transformers import AutoTokenizer

    has_config = not Path(path_or_id).is_dir() or (Path(path_or_id) / "config.json").is_file()
    name, extra = _source(path_or_id) if has_config else (str(path_or_id), {})
    try:
        return AutoTokenizer.from_pretrained(name, **extra)
    except _load_errors() as error:
        raise _not_loadable(path_or_id, error) from None


# The model


def load_target(
    path_or_id: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    attn: str = "sdpa",
) -> tuple[Any, Any]:
    """The target model, in eval mode and without gradients, and its tokenizer.

    A target that has no `attn` implementation is loaded with "eager".

    Raises:
        UserError: as `target_config`; the weights are not loadable, do not fit or are not all
            there; a biased head.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    target_config(path_or_id)
    logging.disable_progress_bar()
    name, extra = _source(path_or_id)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **extra)
        model, loading = _load_model(name, attn, dtype=dtype, **extra)
    except _load_errors() as error:
        # transformers' own message rarely names the damaged file; `check_weights` does.
        if not extra and Path(name).is_dir():
            check_weights(Path(name))
        raise _not_loadable(path_or_id, error) from None

    # transformers draws at random what the files lack.
    parameters = {key for key, _ in model.named_parameters()}
    missing = set(loading["missing_keys"]) & parameters
    if missing:
        raise _no_fit(path_or_id, f"no tensor {min(missing)}, which config.json asks for")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise _head_bias(path_or_id)
    return model.to(device).eval().requires_grad_(False), tokenizer


def _load_model(name: str, attn: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model by its `attn` implementation or else by "eager", and the loading report."""
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    options["output_loading_info"] = True
    try:
        return loader.from_pretrained(name, attn_implementation=attn, **options)
    except ValueError as error:
        unsupported = attn in str(error) or "attention implementation" in str(error)
        if attn == "eager" or not unsupported:
            raise
    return loader.from_pretrained(name, attn_implementation="eager", **options)


def _source(path_or_id: str | Path) -> tuple[str, dict[str, str]]:
    """What transformers loads from: a folder or id, and for a GGUF file the option that names it.

    Raises:
        UserError: the GGUF file is missing, or the folder has no config.json.
    """
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
    errors: tuple[type[Exception], ...] = (
        OSError,
        ValueError,
        LookupError,
        ImportError,
        RuntimeError,
        AttributeError,
        TypeError,
        SafetensorError,
        struct.error,
    )
    try:
        from huggingface_hub.errors import StrictDataclassError
    except ImportError:
        return errors
    return (*errors, StrictDataclassError)


def _no_fit(path_or_id: str | Path, what: str) -> UserError:
    return UserError(
        f"{path_or_id}: {what}; fetch the target's files again or choose another target"
    )


def _not_loadable(path_or_id: str | Path, error: Exception) -> UserError:
    if "ignore_mismatched_sizes" in str(error):
        return _no_fit(path_or_id, "tensors in its files have other shapes than config.json says")

    # The first line of the message, and the second where the first only announces it.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    count = 2 if lines[0].endswith(":") else 1
    reason = " ".join(line.strip() for line in lines[:count])[:300]
    return UserError(
        f"{path_or_id}: not loadable as a target ({reason}); "
        "name a folder with config.json, tokenizer and safetensors, a GGUF file, "
        "or a Hugging Face id that is reachable or in the cache"
    )


def _head_bias(path_or_id: str | Path) -> UserError:
    return UserError(
        f"{path_or_id}: lm_head.bias: targets with a biased head are not supported; "
        "choose another target"
    )


# Its tensors


def read_target_tensors(path_or_id: str | Path, dtype: torch.dtype) -> TargetTensors:
    """Embedding, head and final norm in `dtype`.

    They are read from the safetensors files without building the model; a GGUF file is loaded.

    Raises:
        UserError: as `target_config`; no safetensors, a file missing or damaged, a tensor missing
            or of another shape, a biased head.
    """
    tree = target_config(path_or_id)
    if Path(path_or_id).suffix == ".gguf":
        model, _ = load_target(path_or_id, dtype)
        return _tensors_of_model(model, tree)

    folder = _weights_folder(path_or_id)
    files = weight_files(folder)
    if any(key.endswith("lm_head.bias") for key in files):
        raise _head_bias(path_or_id)

    # The norm is looked for next to the embedding: other norms end in `norm.weight` too.
    vocab = tree.get("vocab_size")
    hidden = tree.get("hidden_size")
    embed_key = find_key(files, "embed_tokens.weight", folder)
    norm_ending = embed_key.removesuffix("embed_tokens.weight") + "norm.weight"
    norm_key = find_key(files, norm_ending, folder)
    embed = read_tensor(folder, files, embed_key, dtype, (vocab, hidden))  # (V, Ht)
    norm = read_tensor(folder, files, norm_key, dtype, (hidden,))  # (Ht,)

    if tree.get("tie_word_embeddings"):
        head = embed
    else:
        head_key = find_key(files, "lm_head.weight", folder)
        head = read_tensor(folder, files, head_key, dtype, (vocab, hidden))  # (V, Ht)
    return TargetTensors(embed, head, _norm_factor(norm, tree))


def make_frozen(
    target: TargetTensors, vocab_map: VocabMap, config: Config, device: str | None = None
) -> Frozen:
    """What training reads of the target and never differentiates, in the run's dtype.

    Args:
        target: as `read_target_tensors` returns it.
        vocab_map: as `load_map` returns it.
        config: `train.dtype` is read, `train.device`, and whether the draft trains an embedding of
            its own: then the target's is left out.
        device: in place of `train.device`.
    """
    dtype = getattr(torch, config.train.dtype)
    device = device or config.train.device
    embedding = None if config.draft.own_embedding else target.embed_tokens.to(device, dtype)
    return Frozen(
        embed_tokens=embedding,
        target_head=target.head.to(device, dtype),
        t2d=vocab_map.t2d.to(device),
        d2t=vocab_map.d2t.to(device),
        target_norm=target.norm.to(device, dtype),
    )


def _tensors_of_model(model: Any, tree: dict[str, Any]) -> TargetTensors:
    norm = decoder(model).norm.weight.detach()
    return TargetTensors(
        embed_tokens=model.get_input_embeddings().weight.detach(),
        head=model.get_output_embeddings().weight.detach(),
        norm=_norm_factor(norm, tree),
    )


def _norm_factor(weight: Tensor, tree: dict[str, Any]) -> Tensor:
    return weight + 1 if tree.get("model_type") in _NORM_ADDS_ONE else weight


def _weights_folder(path_or_id: str | Path) -> Path:
    """The folder of the safetensors files; those of an id are downloaded, or taken from the cache.

    Raises:
        UserError: not reachable.
    """
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise _not_loadable(path_or_id, error) from None


# Its features


def decoder(model: Any) -> Any:
    """The base model: its `layers` are the decoder layers, its output comes after the final norm.

    Looked for in `model.get_decoder()`, in `model`, and in what they hold as `model` and
    `language_model`.

    Raises:
        UserError: none found.
    """
    candidates = []
    if callable(getattr(model, "get_decoder", None)):
        candidates.append(model.get_decoder())
    candidates.append(model)

    for module in candidates:  # grows while it is read
        if isinstance(getattr(module, "layers", None), nn.ModuleList):
            return module
        for name in ("model", "language_model"):
            inner = getattr(module, name, None)
            if inner is not None and inner is not module:
                candidates.append(inner)
    raise UserError(
        f"{type(model).__name__}: no list of decoder layers found; choose another target"
    )


@torch.no_grad()
def hidden_states(
    model: Any, input_ids: Tensor, attention_mask: Tensor, layers: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Outputs of three decoder layers `(B, S, 3·Ht)` and the final, normed state `(B, S, Ht)`.

    `input_ids` and `attention_mask` are `(B, S)` int64, padded on the right; padded rows hold no
    meaning.
    """
    base = decoder(model)
    with layer_outputs([base.layers[index] for index in layers]) as outputs:
        out = base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return torch.cat(outputs, dim=-1), out.last_hidden_state


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
