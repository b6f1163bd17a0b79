"""What the draft takes from the target: embedding, head and final norm, and digests of them."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.config import Config
from eagle3fn.base.errors import UserError
from eagle3fn.base.types import Frozen, VocabMap
from eagle3fn.data.decoder import check_present, final_norm
from eagle3fn.data.target_model import check_unbiased, load_model
from eagle3fn.data.target_source import config_file, loaded_config, weights_folder
from eagle3fn.data.teacher_check import (
    architecture,
    check_architecture,
    norm_factor,
    stored_norm,
)
from eagle3fn.data.weights import find_key, read_tensor, weight_files

_ROWS = 2048  # of a tensor, hashed at once


class TargetTensors(NamedTuple):
    """What the draft takes from the target. `head` is `embed_tokens` where the target ties them."""

    embed_tokens: Tensor  # (V, Ht)
    head: Tensor  # (V, Ht)
    norm: Tensor  # (Ht,), the factor that the normed value is multiplied by


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


def make_frozen(
    target: TargetTensors, vocab_map: VocabMap, config: Config, device: str | None = None
) -> Frozen:
    """What training reads of the target and never differentiates, in the run's dtype.

    Args:
        target: as `read_target_tensors` returns it.
        vocab_map: as `load_map` returns it.
        config: `train.dtype` is read, `train.device`, and whether the draft has another width: then
            the target's embedding is left out. One that the draft trains starts from it.
        device: in place of `train.device`.
    """
    dtype = getattr(torch, config.train.dtype)
    device = device or config.train.device
    embedding = None if config.draft.other_width else target.embed_tokens.to(device, dtype)
    return Frozen(
        embed_tokens=embedding,
        target_head=target.head.to(device, dtype),
        t2d=vocab_map.t2d.to(device),
        d2t=vocab_map.d2t.to(device),
        target_norm=target.norm.to(device, dtype),
    )


# Digests


def tensors_record(model: Any) -> dict[str, str]:
    """What a model runs with: digests of its embedding, head and final norm, and their dtype.

    `read_target_tensors` finds the same tensors by them.

    Raises:
        UserError: it has no such tensors.
    """
    return _record(_tensors_of(model), model.dtype)


def _record(tensors: TargetTensors, dtype: torch.dtype) -> dict[str, str]:
    """Digests in `dtype` of tensors, the norm's weight in place of its factor."""
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


# Which tensors are wanted


class _Wanted(NamedTuple):
    """The tensors that a model ran with: by which a candidate of the files is recognized."""

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


# Reading


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


class StoredTarget(NamedTuple):
    """What can be had of a target without its layers."""

    head: Tensor  # (V, Ht)
    norm: Any  # the final norm, a module on the CPU
    zero_embedding: Tensor  # (V,) bool, tokens whose embedding is all zeros
    record: dict[str, str]  # as `tensors_record` of the model in this dtype


def read_stored_target(path_or_id: str | Path, dtype: torch.dtype) -> StoredTarget:
    """Head, final norm and digests as a model in `dtype` would have them, read from the files.

    Of a quantised target these tensors and the embedding must not be quantised.

    Raises:
        UserError: as `read_target_tensors`; a GGUF file; a final norm that needs more than its
            weight.
    """
    if Path(path_or_id).suffix == ".gguf":
        raise UserError(f"{path_or_id}: a GGUF file; name a folder or an id with safetensors")
    model, found = _read_files(path_or_id, None)
    weight = found.norm.to(dtype)
    norm_factor(model, weight, str(path_or_id))  # refuses norms that training cannot start from
    norm = stored_norm(model, weight, str(path_or_id))
    zero = (found.embed_tokens == 0).all(-1)
    return StoredTarget(found.head.to(dtype), norm, zero, _record(found, dtype))


def check_stored(path_or_id: str | Path, model: Any) -> None:
    """Refuse a target whose files training would read other tensors from than the model has.

    A GGUF file is not read: its tensors are always taken from the model.

    Args:
        path_or_id: the target's folder, GGUF file or id.
        model: as it was loaded from there.

    Raises:
        UserError: as `read_target_tensors`; names the tensor that differs.
    """
    if Path(path_or_id).suffix != ".gguf":
        _read_tensors(path_or_id, model.dtype, _loaded(model))


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
    model, _ = load_model(path, wanted.dtype if wanted else dtype)
    found = _tensors_of(model)
    for name, value in found._asdict().items():
        _first_match(str(path), wanted, name, {f"its {name}": lambda value=value: value})
    return model, found


def _read_files(path_or_id: str | Path, wanted: _Wanted | None) -> tuple[Any, TargetTensors]:
    """The architecture and the stored tensors, the norm's weight in place of its factor."""
    # The architecture: where the norm is, and whether the teacher's logits are the target's.
    where = str(path_or_id)
    config = loaded_config(path_or_id)
    model = architecture(config, config_file(path_or_id))
    folder = weights_folder(path_or_id)
    files = weight_files(folder)
    check_unbiased(model, path_or_id, files)
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
