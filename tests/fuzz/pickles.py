"""Pickles mutated: files of `torch.save`, and a checkpoint's `.metadata`.

Some would make a folder `CANARY` in the working folder, if their code ran.
"""

import builtins
import gzip
import io
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from tests.fuzz.tensors import change_values

CANARY = "CANARY"


class Hostile:
    """Its pickle calls a function when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def hostile(random: Random) -> Hostile:
    """One of several ways to make the canary."""
    code = f"__import__('os').mkdir({CANARY!r})"
    ways = (
        Hostile(os.mkdir, CANARY),
        Hostile(os.system, f"mkdir {CANARY}"),
        Hostile(builtins.exec, code),
        Hostile(builtins.eval, code),
        Hostile(pickle.loads, pickle.dumps(Hostile(os.mkdir, CANARY))),
    )
    return random.choice(ways)


# torch.save


def mutate_saved(path: Path, random: Random) -> str:
    """Change what a file of `torch.save` holds; it may be compressed."""
    data = path.read_bytes()
    packed = path.name.endswith(".gz")
    if packed:
        data = gzip.decompress(data)
    way = random.choice((_tree, _tree, _tree, _values, _hostile, _pickle_bytes, _records))
    data, done = way(data, random)
    path.write_bytes(gzip.compress(data, mtime=0) if packed else data)
    return done


def _load(data: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(data), weights_only=True)


def _save(tree: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(tree, file, **options)
    return file.getvalue()


_ODD: dict[str, Callable[[torch.Tensor], Any]] = {
    "on the meta device": lambda value: value.to("meta"),
    "quantised": lambda value: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
    "sparse": lambda value: value.float().to_sparse(),
    "compressed sparse": lambda value: torch.eye(3).to_sparse_csr(),
    "nested": lambda value: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "complex": lambda value: value.to(torch.complex64),
    "of bools": torch.Tensor.bool,
    "of float8": lambda value: value.float().to(torch.float8_e4m3fn),
    "of int8": lambda value: value.to(torch.int8),
    "a number": lambda value: 7,
    "a list": lambda value: value.tolist() if value.numel() < 10_000 else [1],
    "null": lambda value: None,
    "a text": lambda value: "text",
    "0-d": lambda value: torch.tensor(1),
    "empty": lambda value: value.flatten()[:0].clone(),
    "longer": lambda value: torch.cat([value, value], -1 if value.ndim == 1 else 1),
    "shorter": lambda value: value[..., :-1].clone(),
    "of five axes": lambda value: value[None, None, None],
    "a parameter": lambda value: torch.nn.Parameter(value.float()),
    "expanded": lambda value: torch.zeros(1).expand(2**40),
    "negative ids": lambda value: -value.long() - 1,
    "large ids": lambda value: value.long() + 10**9,
    "fp64": torch.Tensor.double,
    "conjugate": lambda value: value.to(torch.complex64).conj(),
    "transposed": lambda value: value.transpose(0, -1),
}
"""What may stand where a tensor should be."""


def _tree(data: bytes, random: Random) -> tuple[bytes, str]:
    """Another tree: a field changed, missing, renamed, or another container."""
    tree = _load(data)
    name = random.choice(list(tree))
    kind = random.choice(("field", "field", "field", "missing", "renamed", "more", "container"))
    if kind == "field":
        kind = random.choice(list(_ODD))
        tree[name] = _ODD[kind](tree[name])
    elif kind == "missing":
        del tree[name]
    elif kind == "renamed":
        tree["a\nb\x1b[2J"] = tree.pop(name)
    elif kind == "more":
        tree["another"] = random.choice((torch.ones(2), [1] * 1000, "x" * 100_000, {}))
    else:
        tree = random.choice(([tree], list(tree.values()), {"data": tree}, torch.ones(2), 7, {}))
        name = "the whole"
    older = random.random() < 0.15
    return _save(tree, _use_new_zipfile_serialization=not older), f"{name}: {kind}"


def _values(data: bytes, random: Random) -> tuple[bytes, str]:
    tree = _load(data)
    done = change_values(tree, random.choice(list(tree)), random)
    return _save(tree), done


def _hostile(data: bytes, random: Random) -> tuple[bytes, str]:
    """Code that would run."""
    evil = hostile(random)
    kind = random.choice(("a plain pickle", "the whole", "a field", "an older format"))
    if kind == "a plain pickle":
        return pickle.dumps(evil), f"code in {kind}"
    tree: Any = evil
    if kind != "the whole":
        tree = {**_load(data), "another": evil}
    return _save(tree, _use_new_zipfile_serialization=kind != "an older format"), f"code in {kind}"


def _pickle_bytes(data: bytes, random: Random) -> tuple[bytes, str]:
    """The pickle in the archive, damaged, with a right archive around it."""
    names = _records_of(data)
    (name,) = [name for name in names if name.endswith("data.pkl")]
    text = bytearray(names[name])
    for _ in range(random.choice((1, 2, 10))):
        text[random.randrange(len(text))] = random.randrange(256)
    names[name] = bytes(text)
    return _archive(names), "bytes of the pickle"


def _records(data: bytes, random: Random) -> tuple[bytes, str]:
    """A record of the archive missing, empty, cut or longer."""
    names = _records_of(data)
    name = random.choice(list(names))
    kind = random.choice(("missing", "empty", "cut", "longer"))
    found = names.pop(name)
    changed = {"empty": b"", "cut": found[: len(found) // 2], "longer": found + bytes(64)}
    if kind != "missing":
        names[name] = changed[kind]
    return _archive(names), f"record {name} is {kind}"


def _records_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _archive(names: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in names.items():
            archive.writestr(name, data)
    return file.getvalue()


# A checkpoint's `.metadata`


def mutate_metadata(path: Path, random: Random) -> str:
    """Change a checkpoint's pickled table of contents."""
    return random.choice((_code_beside, _code_whole, _contents, _contents, _opcodes))(path, random)


def _code_whole(path: Path, random: Random) -> str:
    path.write_bytes(pickle.dumps(hostile(random)))
    return "code in place of the whole"


def _code_beside(path: Path, random: Random) -> str:
    """The same contents, and code in a field or before them."""
    found = pickle.loads(path.read_bytes())
    kind = random.choice(("planner_data", "storage_data", "state_dict_metadata", "before"))
    if kind == "before":
        first = pickle.dumps(hostile(random), protocol=2)[:-1]
        path.write_bytes(first + b"0" + path.read_bytes()[2:])
        return "code before the contents"
    held = getattr(found, kind)
    if isinstance(held, dict):
        held["zz"] = hostile(random)
    else:
        setattr(found, kind, hostile(random))
    path.write_bytes(pickle.dumps(found))
    return f"code in {kind}"


def _contents(path: Path, random: Random) -> str:
    """An entry missing, of another type, or naming another place."""
    found = pickle.loads(path.read_bytes())
    kind = random.choice(("planner_data", "storage_data", "state_dict_metadata", "attribute"))
    if kind == "attribute":
        name = random.choice(list(vars(found)))
        value = random.choice((None, 7, "text", {}, []))
        setattr(found, name, value)
        path.write_bytes(pickle.dumps(found))
        return f"{name} is {value!r}"

    held = getattr(found, kind)
    if not isinstance(held, dict) or not held:
        path.write_bytes(pickle.dumps(7))
        return "a number in place of the whole"
    key = random.choice(list(held))
    entry = held[key]
    way = random.choice(("missing", "null", "a field", "a field", "another's"))
    if way == "missing":
        del held[key]
    elif way == "null":
        held[key] = None
    elif way == "another's":
        held[key] = held[random.choice(list(held))]
    elif hasattr(entry, "__dict__") and vars(entry):
        name = random.choice(list(vars(entry)))
        values = (
            -1,
            2**62,
            "../../../outside/victim.json",
            "/dev/zero",
            None,
            0,
            [],
            torch.Size([1]),
        )
        value = random.choice(values)
        object.__setattr__(entry, name, value)
        way = f"{name} is {value!r}"
    path.write_bytes(pickle.dumps(found))
    return f"{kind}, {key!s:.60}: {way}"


def _opcodes(path: Path, random: Random) -> str:
    """A global's name changed in the pickle's own text."""
    data = path.read_bytes()
    names = {
        argument
        for opcode, argument, _ in pickletools.genops(data)
        if isinstance(argument, str) and argument.isidentifier() and len(argument) > 3
    }
    old = random.choice(sorted(names))
    new = "os" + "x" * (len(old) - 2)
    path.write_bytes(data.replace(old.encode(), new.encode()))
    return f"{old} is called {new}"
