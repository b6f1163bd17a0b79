"""Bytes, rows, TOML and templates mutated."""

import gzip
import json
import lzma
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.trees import dump, mutate_tree

Mutator = Callable[[Path, Random], str]

# Bytes


def mutate_bytes(path: Path, random: Random) -> str:
    """Damage a file as a disk, a copy or an editor does."""
    data = path.read_bytes()
    done, data = random.choice(_BYTES)(data, random)
    path.write_bytes(data)
    return done


def _flip(data: bytes, random: Random) -> tuple[str, bytes]:
    changed = bytearray(data)
    count = random.choice([1, 1, 1, 3, 20])
    for _ in range(count if data else 0):
        changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return f"{count} bits flipped", bytes(changed)


def _cut(data: bytes, random: Random) -> tuple[str, bytes]:
    at = random.randrange(len(data) + 1)
    return f"cut after {at} of {len(data)} bytes", data[:at]


def _cut_start(data: bytes, random: Random) -> tuple[str, bytes]:
    at = random.randrange(1, 20)
    return f"the first {at} bytes are gone", data[at:]


def _insert(data: bytes, random: Random) -> tuple[str, bytes]:
    at = random.randrange(len(data) + 1)
    new = random.choice([b"\x00", b"\xff\xfe", b"\n", b"{", b'"', b"\xed\xa0\x80", b"\x1b[2J"])
    new *= random.choice([1, 1, 50])
    return f"{new!r:.30} inserted at {at}", data[:at] + new + data[at:]


def _duplicate(data: bytes, random: Random) -> tuple[str, bytes]:
    start = random.randrange(len(data) + 1)
    end = min(len(data), start + random.randrange(1, 200))
    return f"bytes {start} to {end} are there twice", data[:end] + data[start:]


def _empty(data: bytes, random: Random) -> tuple[str, bytes]:
    return "empty", b""


def _append(data: bytes, random: Random) -> tuple[str, bytes]:
    new = random.choice([b"\x00" * 16, b"garbage", b"\n{}\n", b"\xff", data])
    return f"{new!r:.30} appended", data + new


def _swap(data: bytes, random: Random) -> tuple[str, bytes]:
    size = max(1, len(data) // random.randrange(3, 40))
    first = random.randrange(len(data) + 1)
    second = random.randrange(len(data) + 1)
    first, second = sorted((first, second))
    one = data[first : first + size][: second - first]
    other = data[second : second + size]
    middle = data[first + len(one) : second]
    return (
        f"{size} bytes at {first} and {second} exchanged",
        data[:first] + other + middle + one + data[second + size :],
    )


def _zeros(data: bytes, random: Random) -> tuple[str, bytes]:
    start = random.randrange(len(data) + 1)
    end = min(len(data), start + random.choice([1, 8, 512, len(data)]))
    return f"bytes {start} to {end} are zeros", data[:start] + bytes(end - start) + data[end:]


_BYTES = (_flip, _flip, _cut, _cut, _cut_start, _insert, _duplicate, _empty, _append, _swap, _zeros)


# The file itself


def mutate_entry(path: Path, random: Random) -> str:
    """Put something else than a file in a file's place."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        os.replace(path, path.with_name(f"{path.name}.moved"))
    done = random.choice(list(ENTRIES))
    ENTRIES[done](path)
    return done


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "inner.txt").write_text("inner\n")


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2 << 30)


ENTRIES: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: None,
    "a folder": _folder,
    "a pipe": os.mkfifo,
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to /dev/null": lambda path: path.symlink_to("/dev/null"),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to the file": lambda path: path.symlink_to(f"{path.name}.moved"),
    "2 GiB of zeros": _sparse,
}
NO_FILE = [name for name in ENTRIES if name not in ("missing", "a link to the file")]
"""What no call may take for a file that is not there."""


# Rows


def mutate_rows(path: Path, random: Random) -> str:
    """Change the rows of a JSONL file, which may be compressed."""
    unpack, pack = _PACKED.get(path.suffix, (bytes, bytes))
    if path.suffix in _PACKED and random.random() < 0.06:
        path.write_bytes(pack(bytes(1 << 20)) * 4096)
        return "4 GiB of zeros, compressed"
    lines = unpack(path.read_bytes()).decode().splitlines()
    done = random.choices(list(_ROWS), _ROW_WEIGHTS)[0]
    lines = _ROWS[done](lines, random)
    if isinstance(lines, tuple):
        lines, done = lines
    data = "\n".join([*lines, ""]).encode("utf-8", "surrogatepass")
    path.write_bytes(pack(data))
    return done


_PACKED: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    ".gz": (gzip.decompress, lambda data: gzip.compress(data, mtime=0)),
    ".xz": (lzma.decompress, lzma.compress),
}
_FOREIGN = (
    "null",
    "[]",
    "{}",
    "7",
    '"text"',
    '{"foo": 1}',
    "not JSON",
    '{"step": 2',
    '{"step": 1000000}',
    '{"step": -1, "loss": null}',
    "[" * 1000 + "]" * 1000,
    "1" * 5000,
    '{"id": "a\\nb\\u001b[2J", "conversations": 7, "prompt": 7}',
    '{"prompt": "\\ud800", "conversations": [{"role": "user", "content": "\\ud800"}]}',
    "\x00\x00\x00",
)


def _changed_row(lines: list[str], random: Random) -> tuple[list[str], str]:
    number = random.randrange(len(lines))
    tree, done = mutate_tree(json.loads(lines[number]), random)
    return [*lines[:number], dump(tree), *lines[number + 1 :]], f"row {number + 1}: {done}"


def _foreign_row(lines: list[str], random: Random) -> tuple[list[str], str]:
    number = random.randrange(len(lines) + 1)
    row = random.choice(_FOREIGN)
    kept = lines[number + random.randrange(2) :]
    return [*lines[:number], row, *kept], f"row {number + 1} is {row!r:.40}"


def _swapped(lines: list[str], random: Random) -> list[str]:
    return [*lines[1:], *lines[:1]]


def _dropped(lines: list[str], random: Random) -> tuple[list[str], str]:
    number = random.randrange(len(lines))
    return [*lines[:number], *lines[number + 1 :]], f"row {number + 1} is missing"


def _doubled(lines: list[str], random: Random) -> tuple[list[str], str]:
    number = random.randrange(len(lines))
    return [*lines[: number + 1], *lines[number:]], f"row {number + 1} is there twice"


def _half(lines: list[str], random: Random) -> tuple[list[str], str]:
    number = random.randrange(len(lines))
    half = lines[number][: len(lines[number]) // 2]
    return [*lines[:number], half, *lines[number + 1 :]], f"half of row {number + 1} is gone"


_ROWS: dict[str, Callable[[list[str], Random], Any]] = {
    "changed": _changed_row,
    "foreign": _foreign_row,
    "dropped": _dropped,
    "doubled": _doubled,
    "half": _half,
    "rows moved by one": _swapped,
    "rows reversed": lambda lines, random: lines[::-1],
    "no rows": lambda lines, random: [],
    "blank lines between": lambda lines, random: [
        part for line in lines for part in (line, "", " ")
    ],
    "a mark of the byte order": lambda lines, random: ["\ufeff" + lines[0], *lines[1:]],
    "Windows' line ends": lambda lines, random: [line + "\r" for line in lines],
}
_ROW_WEIGHTS = (10, 6, 2, 2, 2, 1, 1, 1, 1, 1, 1)


# TOML

_TOML_VALUES = (
    "true",
    "-1",
    "0",
    "1" * 5000,
    "1" + "0" * 30,
    "nan",
    "-inf",
    "1e999",
    '""',
    '"word"',
    "'../../outside'",
    '"\\u001b[2J\\n"',
    '"' + "long " * 20_000 + '"',
    "[]",
    "[1, 'two']",
    "[" * 1000 + "]" * 1000,
    "{" + "a = {" * 1000,
    "{ a = 1 }",
    "1979-05-27T07:32:00Z",
    "",
    "'''\nlines\n'''",
)


def mutate_toml(path: Path, random: Random) -> str:
    """Change a line of a TOML file."""
    lines = path.read_text().splitlines()
    number = random.choice([i for i, line in enumerate(lines) if line.strip()])
    line = lines[number]
    key = line.partition(" = ")[0]
    value = random.choice(_TOML_VALUES)
    kind = random.choice(("value", "value", "value", "missing", "twice", "unknown", "key"))
    if kind == "value":
        new = [f"{key} = {value}"] if " = " in line else [f"[{key[1:-1]}.{value[:20]}]"]
    elif kind == "missing":
        new = []
    elif kind == "twice":
        new = [line, line]
    elif kind == "unknown":
        new = [line, f"unknown = {value}"]
    else:
        new = [
            line.replace(key, random.choice(("a.b.c", "'a b'", "x" * 5000, ".".join("a" * 1000))))
        ]
    lines[number : number + 1] = new
    path.write_text("\n".join(lines) + "\n")
    return f"line {number + 1} ({key:.30}): {kind}, {new!r:.60}"


# Templates

_TEMPLATES = (
    "",
    "{% for m in messages %}",
    "{{ messages | no_such_filter }}",
    "{{ no_such_function() }}",
    "{{ messages[99].content }}",
    "{{ 1 / 0 }}",
    "{{ messages.no.such.thing }}",
    "{{ raise_exception('a\nb\x1b[2J') }}",
    "{% for i in range(10**12) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ 10**10**8 }}",
    "{{ 'x'.ljust(10**10) }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ ('x' * 10**6)|list|map('upper')|join * 10**5 }}",
    "{{ range(10**9)|list|length }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% include 'other' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}",
    "{{ self.__init__.__globals__['__builtins__']['open']('CANARY', 'w') }}",
    "{{ messages.append({'role': 'user', 'content': 'more'}) }}{{ messages|length }}",
    "{% for m in messages %}{{ m.clear() }}{% endfor %}",
    "{{ messages }}",
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "same text",
    "{{ '\ud800' }}",
    "{{ strftime_now('%' * 10**5) }}",
    "{{ " + "(" * 1000 + "1" + ")" * 1000 + " }}",
    "{{ " + " + ".join("1" * 5000) + " }}",
    "{% set x = [] %}{% for i in range(200) %}{{ x.append(x) }}{% endfor %}{{ x }}",
    "{{ 'a' | tojson(indent=10**9) }}",
    "{{ messages | tojson(indent=10**6) }}",
    "{{ namespace(a=1).a.b.c.d }}",
    "{% generation %}{% endgeneration %}",
    "{{ 'x' | indent(10**10) }}",
    "{{ 'x' | center(10**10) }}",
    "{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' | wordwrap(1) * 10**9 }}",
    "{{ '1' | int(base=10**30) }}",
    "{{ lipsum(n=10**7) }}",
)


def mutate_template(path: Path, random: Random) -> str:
    """Another chat template, or the same one with a piece put in."""
    text = path.read_text()
    piece = random.choice(_TEMPLATES)
    place = random.choice(("whole", "before", "after", "within"))
    if place == "whole":
        text = piece
    elif place == "before":
        text = piece + text
    elif place == "after":
        text += piece
    else:
        at = text.index("{{") if "{{" in text else len(text)
        text = text[:at] + piece + text[at:]
    path.write_text(text, errors="surrogatepass")
    return f"{place}: {piece!r:.60}"


# Parquet


def mutate_parquet(path: Path, random: Random) -> str:
    """A table with another column, other values or no rows."""
    import pyarrow as pa
    from pyarrow import parquet

    table = parquet.read_table(path)
    name = random.choice(table.column_names)
    at = table.column_names.index(name)
    texts = ["a\nb\x1b[2J"] * len(table)
    done = random.choice(("missing", "of texts", "of nulls", "of numbers", "of bytes", "no rows"))
    columns = {
        "of texts": pa.array(texts),
        "of nulls": pa.nulls(len(table)),
        "of numbers": pa.array([1e30] * len(table)),
        "of bytes": pa.array([b"\xff"] * len(table)),
    }
    if done == "missing":
        table = table.drop_columns([name])
    elif done == "no rows":
        table = table.slice(0, 0)
    else:
        table = table.set_column(at, name, columns[done])
    parquet.write_table(table, path)
    return f"column {name} {done}"
