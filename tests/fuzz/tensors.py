"""safetensors files mutated: the header as JSON, the values, whole tensors."""

import json
import struct
from pathlib import Path
from random import Random

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.fuzz.trees import dump, mutate_tree

NAN = "not finite: "  # begins what is said of files with such values


def mutate_tensors(path: Path, random: Random) -> str:
    """Change a safetensors file's header, its length, its values or its tensors."""
    return random.choice((_header, _header, _fields, _fields, _length, _values, _whole))(
        path, random
    )


def _parts(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _write(path: Path, header: bytes, data: bytes) -> None:
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def _header(path: Path, random: Random) -> str:
    """Any place of the header's tree."""
    tree, data = _parts(path)
    tree, done = mutate_tree(tree, random)
    _write(path, dump(tree).encode("utf-8", "surrogatepass"), data)
    return f"header: {done}"


_DTYPES = ("BOOL", "U8", "I8", "F8_E4M3", "I16", "F16", "BF16", "I32", "F32", "F64", "I64", "C64")


def _fields(path: Path, random: Random) -> str:
    """What a tensor's entry says, in values that may be right for another tensor."""
    tree, data = _parts(path)
    name = random.choice([name for name in tree if name != "__metadata__"])
    entry = tree[name]
    kind = random.choice(("dtype", "shape", "start", "end", "other"))
    if kind == "dtype":
        entry["dtype"] = random.choice(_DTYPES)
    elif kind == "shape":
        entry["shape"] = random.choice(
            (entry["shape"][::-1], [1, *entry["shape"]], [], [2**62, 4], [0], entry["shape"] + [1])
        )
    elif kind == "other":
        other = random.choice([other for other in tree if other != "__metadata__"])
        tree[name], tree[other] = tree[other], tree[name]
    else:
        place = 0 if kind == "start" else 1
        offsets = entry["data_offsets"]
        offsets[place] = random.choice(
            (0, offsets[place] + 4, offsets[place] - 4, 2**63, len(data))
        )
    _write(path, json.dumps(tree).encode(), data)
    return f"{name}: {kind}, {tree[name]}"


def _length(path: Path, random: Random) -> str:
    data = path.read_bytes()
    size = random.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(data), 100_000_001))
    path.write_bytes(struct.pack("<Q", size) + data[8:])
    return f"the header's length is {size}"


def read_all(path: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """The tensors and the metadata."""
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        return {name: file.get_tensor(name).clone() for name in names}, file.metadata()


def _values(path: Path, random: Random) -> str:
    """Other values in one tensor."""
    tensors, metadata = read_all(path)
    name = random.choice(list(tensors))
    kind = change_values(tensors, name, random)
    save_file(tensors, path, metadata)
    return kind


def change_values(tensors: dict[str, Tensor], name: str, random: Random) -> str:
    """Change one tensor in place: a value, or all; says what."""
    value = tensors[name]
    if not value.numel():
        return "nothing"
    flat = value.view(-1)
    place = random.randrange(value.numel())
    if value.is_floating_point():
        what = random.choice((torch.nan, torch.inf, -torch.inf, 0.0, 1e30, 1.0))
        if random.random() < 0.3:
            flat.fill_(what)
        else:
            flat[place] = what
        bad = not torch.isfinite(value.float()).all()
        return f"{NAN if bad else ''}values of {name} are {what}"
    if value.dtype == torch.bool:
        flat[place] = ~flat[place]
    else:
        flat[place] = random.choice((-1, 0, 1, 2**31 - 1, int(flat[place]) + 1, 299, 300))
    return f"value {place} of {name} is {flat[place].item()}"


_WHOLE = ("missing", "renamed", "twice", "longer", "empty", "float64", "int8", "0-d")


def _whole(path: Path, random: Random) -> str:
    """A tensor missing, renamed, doubled, of another shape or dtype."""
    tensors, metadata = read_all(path)
    name = random.choice(list(tensors))
    kind = random.choice(
        ("missing", "renamed", "twice", "longer", "empty", "float64", "int8", "0-d")
    )
    value = tensors[name]
    if kind == "missing":
        del tensors[name]
    elif kind == "renamed":
        tensors["a\nb\x1b[2J"] = tensors.pop(name)
    elif kind == "twice":
        tensors[name + ".x"] = value.clone()
    elif kind == "longer":
        tensors[name] = torch.cat([value, value[:1]]) if value.ndim else value[None]
    elif kind == "empty":
        tensors[name] = value[:0].clone() if value.ndim else value[None][:0]
    elif kind == "0-d":
        tensors[name] = value.reshape(-1)[:1].reshape(()).clone()
    else:
        tensors[name] = value.to(getattr(torch, kind))
    if random.random() < 0.1:
        metadata = {"format": "tf"}
    save_file(tensors, path, metadata)
    return f"tensor {name} is {kind}"
