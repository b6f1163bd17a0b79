"""JSON mutated by its structure: a value at a place of the tree becomes another one."""

import json
from pathlib import Path
from random import Random
from typing import Any, NamedTuple


class Raw(NamedTuple):
    """A text that is written as it is, where a JSON value would be."""

    text: str


class Twice(NamedTuple):
    """A key that is written once more."""

    key: str


DEEP = 1000
DIGITS = 5000

VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "false": False,
    "minus one": -1,
    "zero": 0,
    "one": 1,
    "a fraction": 0.5,
    "10**30": 10**30,
    "2**63": 2**63,
    "5,000 digits": Raw("1" * DIGITS),
    "1e999": Raw("1e999"),
    "NaN": Raw("NaN"),
    "-Infinity": Raw("-Infinity"),
    "an empty text": "",
    "a text": "word",
    "a number in a text": "7",
    "a long text": "long " * 20_000,
    "a text with line breaks and escape codes": "a\nb\r\n\x1b[2J\x1b]0;title\x07\x00c",
    "a lone surrogate": Raw('"\\ud800"'),
    "a path above": "../../outside/victim.json",
    "an absolute path": "/etc/hostname",
    "a device": "/dev/zero",
    "an empty list": [],
    "a list": [1, "two", None],
    "an empty object": {},
    "an object": {"key": "value"},
    "lists nested": Raw("[" * DEEP + "]" * DEEP),
    "objects nested": Raw('{"a":' * DEEP + "1" + "}" * DEEP),
    "unclosed lists": Raw("[" * 100_000),
}
"""What a value becomes, by name."""


def dump(value: Any) -> str:
    """JSON of a tree that may hold `Raw` values and `Twice` keys."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)}: {dump(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value)


def _key(key: Any) -> str:
    return json.dumps(key.key if isinstance(key, Twice) else str(key))


def mutate_tree(tree: Any, random: Random) -> tuple[Any, str]:
    """Another tree, and what was done; `tree` itself may be changed."""
    holder, key, where = _place(tree, random)
    if holder is None:
        name = random.choice(list(VALUES))
        return VALUES[name], f"the whole is {name}"
    return tree, _CHANGES[random.choices(list(_CHANGES), _WEIGHTS)[0]](holder, key, where, random)


def _place(tree: Any, random: Random) -> tuple[Any, Any, str]:
    """A container in the tree, a key in it, and their path as text; None for the whole tree."""
    if not isinstance(tree, (dict, list)) or not tree or random.random() < 0.03:
        return None, None, ""
    holder = tree
    where = ""
    while True:
        key = random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        where += f"/{key!s:.40}"
        inner = holder[key]
        if not isinstance(inner, (dict, list)) or not inner or random.random() < 0.3:
            return holder, key, where
        holder = inner


def _replace(holder: Any, key: Any, where: str, random: Random) -> str:
    name = random.choice(list(VALUES))
    holder[key] = VALUES[name]
    return f"{where} is {name}"


def _nudge(holder: Any, key: Any, where: str, random: Random) -> str:
    """A value of the same type that is near."""
    value = holder[key]
    if isinstance(value, bool):
        holder[key] = not value
    elif isinstance(value, (int, float)):
        holder[key] = random.choice([value + 1, value - 1, value * 2, -value, float(value)])
    elif isinstance(value, str):
        holder[key] = random.choice([value[:-1], value + "x", value.upper(), value[::-1]])
    elif isinstance(value, list):
        holder[key] = random.choice([value[:-1], value + value[:1], value[::-1]])
    elif isinstance(value, dict):
        value["another key"] = 1
    else:
        holder[key] = 0
    return f"{where} is {holder[key]!r:.60}"


def _drop(holder: Any, key: Any, where: str, random: Random) -> str:
    del holder[key]
    return f"{where} is missing"


def _double(holder: Any, key: Any, where: str, random: Random) -> str:
    if isinstance(holder, list):
        holder.insert(key, holder[key])
        return f"{where} is there twice"
    name = random.choice(list(VALUES))
    holder[Twice(key)] = VALUES[name]
    return f"{where} is there twice, then {name}"


def _swap(holder: Any, key: Any, where: str, random: Random) -> str:
    other = random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    holder[key], holder[other] = holder[other], holder[key]
    return f"{where} and {other} are exchanged"


def _rename(holder: Any, key: Any, where: str, random: Random) -> str:
    if isinstance(holder, list):
        return _replace(holder, key, where, random)
    names = ["", "x", "../x", "a\nb\x1b[2J", "\ud800", str(key) + " ", "n" * 10_000]
    name = random.choice(names)
    holder[name] = holder.pop(key)
    return f"{where} is called {name!r:.40}"


_CHANGES = {
    "replace": _replace,
    "nudge": _nudge,
    "drop": _drop,
    "double": _double,
    "swap": _swap,
    "rename": _rename,
}
_WEIGHTS = (6, 2, 2, 1, 1, 1)


def mutate_json(path: Path, random: Random) -> str:
    """Change one place of a JSON file."""
    tree, done = mutate_tree(json.loads(path.read_text(encoding="utf-8")), random)
    path.write_text(dump(tree), encoding="utf-8", errors="surrogatepass")
    return done


def mutate_remote_code(path: Path, random: Random) -> str:
    """A target that says that it needs code of its folder; the code would make the canary."""
    code = path.with_name("evil.py")
    code.write_text(_EVIL)
    tree = json.loads(path.read_text())
    auto = "AutoTokenizer" if "tokenizer" in path.name else "AutoModelForCausalLM"
    tree["auto_map"] = {"AutoConfig": "evil.Config", auto: "evil.Model"}
    if "tokenizer" in path.name:
        tree["auto_map"] = {auto: ["evil.Model", None]}
    own = random.random() < 0.7
    if own:
        tree["model_type"] = "evil"
        tree["architectures"] = ["Model"]
        tree["tokenizer_class"] = "Model"
    path.write_text(json.dumps(tree))
    return f"code of its folder is asked for{', of an own type' if own else ''}"


_EVIL = """import os
os.makedirs("CANARY", exist_ok=True)
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model
"""
