"""How hidden states lie in a file in half the bytes of bfloat16: pure functions on tensors.

A hidden tensor `(S, A·W)` is `A` parts of `W` values: the taps, or the last hidden state alone.
Their magnitudes differ, so each part of each token has a scale of its own.

    fp8    value ≈ scale · e4m3, scale = largest / 448 of the token's part
    int8   value ≈ scale · int8, scale = largest / 127 of the token's part, without its outliers:
           the columns that are largest in the sample are kept as they are

What is read is bfloat16: a float32 product, rounded once, the same bits on every machine.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError

OUTLIERS = 8
"""Columns of a part that `int8` keeps as they are."""

_FP8 = torch.float8_e4m3fn
_FP8_LARGEST = 448.0
_E4M3 = torch.arange(256, dtype=torch.uint8).view(_FP8).float()  # the number of each code
_INT8_LARGEST = 127.0
_SMALLEST_SCALE = 2.0**-100  # below it products are no normal float32 numbers
_SCALE_BYTES = 4
_OUTLIER_BYTES = 2

Parts = dict[str, Tensor]
"""The stored tensors of one hidden tensor, by the ends of their names in a file; `""` is no end."""


class Store(NamedTuple):
    """A format of stored hidden states.

    `encode` takes `(S, A, W)` bfloat16, finite; `decode` returns `(S, A, W)` float32, exact but
    for the last rounding, and both keep zeros.
    """

    dtypes: dict[str, torch.dtype]  # of the stored tensors, by the ends of their names
    encode: Callable[[Tensor], Parts]
    decode: Callable[[Parts], Tensor]
    bytes_per_part: Callable[[int], int]  # of one token, by W


# fp8


def _encode_fp8(value: Tensor) -> Parts:
    exact = value.float()
    scale = _scale(exact, _FP8_LARGEST)  # (S, A)
    small = exact.div_(scale[..., None]).clamp_(-_FP8_LARGEST, _FP8_LARGEST)
    return {"": small.to(_FP8), "scale": scale}


def _decode_fp8(parts: Parts) -> Tensor:
    # By a table: five times as fast as torch's conversion on a CPU, and the same numbers.
    codes = parts[""].contiguous().view(torch.uint8)
    numbers = _E4M3.index_select(0, codes.flatten().int()).view(codes.shape)
    return numbers.mul_(parts["scale"][..., None])


# int8


def _encode_int8(value: Tensor) -> Parts:
    # The outliers, ties to the lowest column: (A, C) columns, (S, A, C) values.
    largest = value.abs().amax(0) if len(value) else value.new_zeros(value.shape[1:])  # (A, W)
    by_size = largest.sort(descending=True, stable=True).indices
    columns = by_size[:, :OUTLIERS].sort().values
    at = columns.expand(len(value), -1, -1)
    outliers = value.gather(-1, at)

    # The rest.
    rest = value.float().scatter_(-1, at, 0.0)
    scale = _scale(rest, _INT8_LARGEST)  # (S, A)
    small = rest.div_(scale[..., None]).round_().clamp_(-_INT8_LARGEST, _INT8_LARGEST)
    return {
        "": small.to(torch.int8),
        "scale": scale,
        "outliers": outliers,
        "columns": columns.to(torch.int32),
    }


def _decode_int8(parts: Parts) -> Tensor:
    rest = parts[""].float().mul_(parts["scale"][..., None])
    columns = parts["columns"].long().expand(len(rest), -1, -1)
    return rest.scatter_(-1, columns, parts["outliers"].float())


# The table

STORES = {
    "fp8": Store(
        dtypes={"": _FP8, "scale": torch.float32},
        encode=_encode_fp8,
        decode=_decode_fp8,
        bytes_per_part=lambda width: width + _SCALE_BYTES,
    ),
    "int8": Store(
        dtypes={
            "": torch.int8,
            "scale": torch.float32,
            "outliers": torch.bfloat16,
            "columns": torch.int32,
        },
        encode=_encode_int8,
        decode=_decode_int8,
        bytes_per_part=lambda width: width + _SCALE_BYTES + _OUTLIER_BYTES * min(OUTLIERS, width),
    ),
}
"""The formats by name. Without one the values themselves are stored."""


def check_store(name: str | None, dtype: torch.dtype) -> None:
    """Refuse a store that there is none of, or one whose features are to be read in `dtype`.

    Raises:
        UserError: names what there is.
    """
    if name is None:
        return
    if name not in STORES:
        raise UserError(f"store {name!r}: must be one of {', '.join(STORES)}")
    if dtype != torch.bfloat16:
        found = str(dtype).removeprefix("torch.")
        raise UserError(
            f"store {name!r}: is read as bfloat16, not {found}; set stored to torch.bfloat16"
        )


def store_entry(name: str | None) -> dict[str, str]:
    """What an index says of its store: nothing, where the values themselves are stored."""
    return {} if name is None else {"store": name}


def encode(name: str, value: Tensor, width: int) -> Parts:
    """The tensors to store of a hidden tensor, by the ends of their names.

    Args:
        name: of `STORES`.
        value: `(S, A·W)`, of any floating-point dtype; rounded to bfloat16 first.
        width: `W`.

    Raises:
        UserError: NaN, infinity, or a value that bfloat16 has no number for.
    """
    rounded = value.to(torch.bfloat16)
    finite = rounded.abs().amax(-1).isfinite()  # (S,): NaN is the largest of all
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise UserError(
            f"hidden states: NaN or infinity in bfloat16 at token {row}: {name} has no number for "
            "it; leave the sample out"
        )
    parts = STORES[name].encode(rounded.unflatten(-1, (-1, width)))
    return {end: _flat(tensor) for end, tensor in parts.items()}


def decode(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """The hidden tensor `(S, A·W)`, bfloat16, of tensors that `encode` made.

    Raises:
        UserError: they are of other dtypes or shapes; without the name of their file.
    """
    store = STORES[name]
    for end, dtype in store.dtypes.items():
        if parts[end].dtype != dtype:
            raise UserError(f"{end or 'values'} of {name} are {parts[end].dtype}, not {dtype}")

    values = parts[""]
    tokens = values.shape[0] if values.ndim == 2 else -1
    scale = parts["scale"]
    count = scale.shape[1] if scale.ndim == 2 else 0  # A
    if scale.shape != (tokens, count) or count == 0 or values.shape[1] % count:
        raise UserError(
            f"values {tuple(values.shape)} and scale {tuple(scale.shape)} of {name} do not fit"
        )
    shaped = {"": values.unflatten(-1, (count, -1)), "scale": scale}
    if "columns" in store.dtypes:
        shaped |= _shaped_outliers(parts, tokens, count, width=values.shape[1] // count)
    return store.decode(shaped).to(torch.bfloat16).flatten(1)


def _shaped_outliers(
    parts: Mapping[str, Tensor], tokens: int, count: int, width: int
) -> dict[str, Tensor]:
    """Columns `(A, C)` and outliers `(S, A, C)`."""
    columns = parts["columns"]
    outliers = parts["outliers"]
    kept = columns.shape[-1] if columns.ndim == 2 else -1
    if columns.shape != (count, kept) or outliers.shape != (tokens, count * kept):
        raise UserError(
            f"columns {tuple(columns.shape)} and outliers {tuple(outliers.shape)} do not fit"
        )
    if kept and not 0 <= int(columns.min()) <= int(columns.max()) < width:
        raise UserError(f"columns beyond [0, {width})")
    return {"columns": columns, "outliers": outliers.unflatten(-1, (count, kept))}


def _scale(value: Tensor, largest: float) -> Tensor:
    """What `largest` stands for in each part of each token: `(S, A, W)` to `(S, A)` float32."""
    return (value.abs().amax(-1) / largest).clamp(min=_SMALLEST_SCALE)


def _flat(tensor: Tensor) -> Tensor:
    """`(S, A, X)` as `(S, A·X)`; two dimensions stay."""
    return tensor.flatten(1).contiguous()
