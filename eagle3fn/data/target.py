"""The target: its configuration and digests, the weights the draft takes from it, its features.

transformers is imported here inside functions, never when the file is loaded.
"""

import hashlib
import inspect
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from eagle3fn.base.config import Config
from eagle3fn.base.device import check_device
from eagle3fn.base.draft_config import refuse_vision
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import json_sha256
from eagle3fn.base.types import Frozen, VocabMap
from eagle3fn.data.decoder import check_present, final_norm
from eagle3fn.data.stored_config import VOLATILE, stored_config, stored_stops, token_ids
from eagle3fn.data.teacher_check import (
    architecture,
    check_architecture,
    check_teacher,
    norm_factor,
)
from eagle3fn.data.weights import check_weights, find_key, read_tensor, weight_files

_REMEDY = "fetch the target's files again or choose another target"
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")
_PROBED_VALUES = 64
_ROWS = 2048  # of a tensor, hashed at once


class TargetTensors(NamedTuple):
    """What the draft takes from the target. `head` is `embed_tokens` where the target ties them."""

    embed_tokens: Tensor  # (V, Ht)
    head: Tensor  # (V, Ht)
    norm: Tensor  # (Ht,), the factor that the normed value is multiplied by


# Configuration and digests


def target_config(path_or_id: str | Path) -> dict[str, Any]:
    """The target's configuration as a dict, with the library's defaults.

    Raises:
        UserError: not loadable, a vision-language model, or one without the sizes that are read.
    """
    return _loaded_config(path_or_id).to_dict()


def _loaded_config(path_or_id: str | Path) -> Any:
    from transformers import AutoConfig

    name, extra = _source(path_or_id)
    try:
        config = AutoConfig.from_pretrained(name, **extra)
    except _load_errors() as error:
        raise _not_loadable(_config_of(path_or_id), error) from None
    tree = config.to_dict()
    refuse_vision(tree, str(path_or_id))
    for key in _SIZES:
        if type(tree.get(key)) is not int:
            raise UserError(
                f"{path_or_id}: model_type {config.model_type!r}: no {key} in its configuration; "
                "such targets are not supported, choose another"
            )
    return config


def check_supported(path_or_id: str | Path) -> None:
    """Refuse a target whose logits are more than `last_hidden @ head.T`, by its architecture alone.

    Its weights are not read.

    Raises:
        UserError: as `target_config`; names the model type and how far the logits are off.
    """
    config = _loaded_config(path_or_id)
    check_architecture(architecture(config, str(path_or_id)), str(path_or_id))


def config_hash(path_or_id: str | Path) -> str:
    """Hex digest of what the target's config.json, or its GGUF file, says.

    Without its path, dtype and library version. The library's defaults are not in it, so it stays
    the same when transformers is upgraded.

    Raises:
        UserError: damaged, or there is none.
    """
    tree = stored_config(path_or_id)
    if not tree:
        raise UserError(f"{path_or_id}: no config.json; {_REMEDY}")
    return json_sha256(tree)


def config_hashes(path_or_id: str | Path) -> tuple[str, str]:
    """`config_hash`, and the kind of digest that earlier versions wrote.

    Features and maps of either belong to the target. The earlier kind is of the configuration with
    the defaults of the library that is installed.

    Raises:
        UserError: as `target_config` and `config_hash`.
    """
    return config_hash(path_or_id), _loaded_hash(target_config(path_or_id))


def model_config_hash(model: Any) -> str:
    """`config_hash` of the files that a model was loaded from.

    Of its configuration as loaded, where it comes from no files.
    """
    name = str(model.config.name_or_path)
    try:
        tree = stored_config(name) if name else {}
    except UserError:
        tree = {}
    return json_sha256(tree) if tree else _loaded_hash(model.config.to_dict())


def _loaded_hash(tree: dict[str, Any]) -> str:
    stable = {key: value for key, value in tree.items() if key not in VOLATILE}
    return json_sha256(stable, default=str)


def stop_ids(path_or_id: str | Path, tokenizer: Any) -> tuple[int, ...]:
    """The target's stop tokens, ascending, without building the model.

    Those of generation_config.json, or of config.json where it names none, and the tokenizer's
    `eos_token_id`. A folder may hold the tokenizer alone.

    Raises:
        UserError: not readable, or none at all.
    """
    ids = stored_stops(path_or_id) | token_ids(tokenizer.eos_token_id)
    if not ids:
        raise UserError(
            f"{path_or_id}: no eos_token_id in generation_config.json, config.json or the "
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


def tensors_record(model: Any) -> dict[str, str]:
    """What a model runs with: digests of its embedding, head and final norm, and their dtype.

    `read_target_tensors` finds the same tensors by them.

    Raises:
        UserError: it has no such tensors.
    """
    dtype = model.dtype
    tensors = _tensors_of(model)
    embed = tensor_digest(tensors.embed_tokens, dtype)
    tied = tensors.head is tensors.embed_tokens
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "embed_tokens": embed,
        "head": embed if tied else tensor_digest(tensors.head, dtype),
        "norm": tensor_digest(tensors.norm, dtype),
    }


def tensor_digest(value: Tensor, dtype: torch.dtype) -> str:
    """Hex digest of a tensor's shape and of its values in `dtype`."""
    digest = hashlib.sha256(str(tuple(value.shape)).encode())
    for rows in value.detach().split(_ROWS):  # so that no copy is large
        values = rows.to("cpu", dtype).contiguous()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def known_hidden_size(path_or_id: str | Path) -> int | None:
    """The target's hidden size, Ht; None where a folder holds the tokenizer alone."""
    tree = stored_config(path_or_id)
    text = tree.get("text_config")
    size = tree.get("hidden_size", text.get("hidden_size") if isinstance(text, dict) else None)
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

    A target that has no `attn` implementation is loaded with "eager". What training will read and
    compute is compared with the model (`data.teacher_check`, `read_target_tensors`).

    Raises:
        UserError: as `target_config`; a device that is not there; the weights are not loadable, do
            not fit or are not all there; logits that are not `last_hidden @ head.T`; training
            would read other tensors than the model has.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    check_device(device)
    _loaded_config(path_or_id)
    name, extra = _source(path_or_id)
    if not extra:
        weight_files(_weights_folder(path_or_id))  # training reads them: refused before all else
    logging.disable_progress_bar()
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
    model = model.to(device).eval().requires_grad_(False)
    if extra:
        model.config.name_or_path = str(path_or_id)  # the file, not its folder

    # The teacher must be this model, and its tensors those that training will read.
    check_teacher(model, str(path_or_id))
    if not extra:
        _read_tensors(path_or_id, model.dtype, _loaded(model))
    return model, tokenizer


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
    return UserError(f"{path_or_id}: {what}; {_REMEDY}")


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


class _Wanted(NamedTuple):
    """The tensors that a model ran with: by which a candidate of the files is told."""

    dtype: torch.dtype  # of the model
    matches: Callable[[str, Tensor], bool]  # whether a tensor is the one of a name
    text: str  # what it failed to be, and the remedy


def _recorded(record: Mapping[str, str]) -> _Wanted:
    """Those of features, by their digests."""
    dtype = getattr(torch, record["dtype"])
    return _Wanted(
        dtype,
        lambda name, value: tensor_digest(value, dtype) == record[name],
        "that the features were made with; name the target that they were made with, or run "
        "eagle3fn extract again into another folder",
    )


def _loaded(model: Any) -> _Wanted:
    """Those of a model in memory."""
    own = _tensors_of(model)._asdict()
    return _Wanted(
        model.dtype,
        lambda name, value: torch.equal(value.to(own[name].dtype), own[name].cpu()),
        "that transformers runs with; save the target anew, by from_pretrained and "
        "save_pretrained into another folder",
    )


def read_target_tensors(
    path_or_id: str | Path, dtype: torch.dtype, record: Mapping[str, str] | None = None
) -> TargetTensors:
    """Embedding, head and final norm in `dtype`.

    They are read from the safetensors files without the model's other weights; a GGUF file is
    loaded. The architecture, built without weights, gives the norm's factor and must have the
    logits `last_hidden @ head.T`.

    Args:
        path_or_id: the target's folder, GGUF file or id.
        dtype: of the tensors.
        record: what the model ran with (`tensors_record`; `data.features.tensors_of`). Without it,
            transformers' own choice is taken: model.safetensors before an index, and an own head
            before a tied one.

    Raises:
        UserError: as `target_config`; no safetensors, a file missing or damaged, a tensor missing
            or of another shape, a biased head; logits that are more than this product; no tensor
            in the files is the recorded one.
    """
    wanted = None if record is None else _recorded(record)
    return _read_tensors(path_or_id, dtype, wanted)


def _read_tensors(
    path_or_id: str | Path, dtype: torch.dtype, wanted: _Wanted | None
) -> TargetTensors:
    if Path(path_or_id).suffix == ".gguf":
        model, found = _read_gguf(path_or_id, dtype, wanted)
    else:
        model, found = _read_files(path_or_id, wanted)

    # Cast once each: a head that is the embedding stays so.
    embed = found.embed_tokens.to(dtype)
    head = embed if found.head is found.embed_tokens else found.head.to(dtype)
    norm = norm_factor(model, found.norm.to(dtype), str(path_or_id))
    return TargetTensors(embed, head, norm)


def _read_gguf(
    path: str | Path, dtype: torch.dtype, wanted: _Wanted | None
) -> tuple[Any, TargetTensors]:
    """The model and its tensors, the norm's weight in place of its factor."""
    model, _ = load_target(path, wanted.dtype if wanted else dtype)
    found = _tensors_of(model)
    for name, value in found._asdict().items():
        _first_match(str(path), wanted, name, {f"its {name}": lambda value=value: value})
    return model, found


def _read_files(path_or_id: str | Path, wanted: _Wanted | None) -> tuple[Any, TargetTensors]:
    """The architecture and the stored tensors, the norm's weight in place of its factor."""
    # The architecture: where the norm is, and whether the teacher's logits are the target's.
    where = str(path_or_id)
    config = _loaded_config(path_or_id)
    model = architecture(config, where)
    folder = _weights_folder(path_or_id)
    files = weight_files(folder)
    biased = getattr(model.get_output_embeddings(), "bias", None) is not None
    if biased or any(key.endswith("lm_head.bias") for key in files):
        raise _head_bias(path_or_id)
    check_architecture(model, where)

    tree = config.to_dict()
    rows = (tree["vocab_size"], tree["hidden_size"])

    def read(key: str, shape: tuple[int, ...] = rows) -> Callable[[], Tensor]:
        return lambda: read_tensor(folder, files, key, shape)

    # The norm is looked for next to the embedding: other norms end in its name too.
    embed_key = find_key(files, "embed_tokens.weight", folder)
    norm_ending = f"{embed_key.removesuffix('embed_tokens.weight')}{final_norm(model)[0]}.weight"
    norm_key = find_key(files, norm_ending, folder)
    embed = _first_match(where, wanted, "embed_tokens", {embed_key: read(embed_key)})  # (V, Ht)
    norm = _first_match(where, wanted, "norm", {norm_key: read(norm_key, rows[1:])})  # (Ht,)

    # The head: the files' own, or the embedding where it is tied.
    tied = bool(tree.get("tie_word_embeddings"))
    candidates: dict[str, Callable[[], Tensor]] = {}
    if not tied or any(key.endswith("lm_head.weight") for key in files):
        head_key = find_key(files, "lm_head.weight", folder)
        candidates[head_key] = read(head_key)
    candidates[embed_key] = lambda: embed
    head = _first_match(where, wanted, "head", candidates)  # (V, Ht)
    if tied and torch.equal(head, embed):
        head = embed
    return model, TargetTensors(embed, head, norm)


def _first_match(
    where: str, wanted: _Wanted | None, name: str, candidates: dict[str, Callable[[], Tensor]]
) -> Tensor:
    """The first candidate, read by its key, that is the wanted tensor; or the first, if none is.

    Raises:
        UserError: one is wanted, and it is none of them.
    """
    for read in candidates.values():
        value = read()
        if wanted is None or wanted.matches(name, value):
            return value
    assert wanted is not None
    keys = " or ".join(candidates)
    raise UserError(f"{where}: {keys}: not the {name} {wanted.text}")


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


def _tensors_of(model: Any) -> TargetTensors:
    """A model's own tensors, the norm's weight in place of its factor.

    Raises:
        UserError: it has none, or they are not in memory.
    """
    check_present(model)
    output = model.get_output_embeddings()
    if output is None:
        raise UserError(f"{type(model).__name__}: no head found; choose another target")
    embed = model.get_input_embeddings().weight
    head = output.weight
    _, norm = final_norm(model)
    found = embed.detach()
    return TargetTensors(found, found if head is embed else head.detach(), norm.weight.detach())


def _weights_folder(path_or_id: str | Path) -> Path:
    """The folder of the safetensors files; those of an id are downloaded, or taken from the cache.

    Raises:
        UserError: not reachable.
    """
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    from huggingface_hub import snapshot_download

    # Some repositories hold the same weights once more, in folders or under other names.
    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    others = ["*/*", "consolidated*"]
    try:
        return Path(
            snapshot_download(str(path_or_id), allow_patterns=patterns, ignore_patterns=others)
        )
    except (OSError, ValueError) as error:
        raise _not_loadable(path_or_id, error) from None


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
