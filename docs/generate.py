"""Writes the pages that are made of the code: settings, commands, public names, files.

python docs/generate.py           # write them
python docs/generate.py --check   # name those that the code has left; exit code 1 if there are any

The text of a page between its two marks is made; what stands around them is written by hand.
"""

import argparse
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eagle3fn
import eagle3fn.testing
from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.files import write_text
from eagle3fn.base.sections import (
    READERS,
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from eagle3fn.cli import parser
from eagle3fn.train.defaults import chosen_defaults
from eagle3fn.use.eval_settings import EvalSettings

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
BEGIN = "<!-- python docs/generate.py -->\n\n"
END = "<!-- end -->\n"

SECTIONS: dict[str, type] = {
    "draft": DraftConfig,
    "objective": ObjectiveConfig,
    "optimizer": OptimizerConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "evaluate": EvalSettings,
}
FOLDERS = ("eagle3fn", "docs", "examples", "scripts", "bench", "tests")
WIDTH = 120


def table(head: str, rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; `head` has the columns' names, with bars between them."""
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def prose(text: str) -> str:
    """A docstring's text in one line: names of pages are links, quoted values are code."""
    line = " ".join(text.split())
    line = re.sub(r'(?<!`)("[\w:]+")(?!`)', r"`\1`", line)
    return re.sub(r"\bdocs/([\w-]+\.md)", r"[\1](\1)", line)


# Settings


def settings() -> str:
    """A table for each section: name, default, meaning; † where `train` chooses the value."""
    shape = DraftConfig(8, 8, 1, 1, 8, 8, 8, 8, 8)
    chosen = {choice.setting for choice in chosen_defaults(shape, samples=100, ranks=2)}

    parts = []
    for section, kind in SECTIONS.items():
        meanings = attributes(kind)
        rows = []
        for field in fields(kind):
            if has_default(field):
                name = f"{section}.{field.name}"
                mark = " †" if name in chosen else ""
                meaning = prose(meanings[field.name]) + read_by(section, field.name) + mark
                rows.append((f"`{name}`", shown_default(field), meaning))
        parts.append(f"## `{section}`\n\n" + table("setting | default | meaning", rows))
    return "\n".join(parts)


def attributes(kind: type) -> dict[str, str]:
    """The `Attributes:` of a class's docstring by name."""
    text = (inspect.getdoc(kind) or "").split("Attributes:\n", 1)[1]
    return dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", text, re.M))


def has_default(field: Field[Any]) -> bool:
    """Whether a field may be left out."""
    return field.default is not MISSING or field.default_factory is not MISSING


def shown_default(field: Field[Any]) -> str:
    """A field's default as TOML has it."""
    value = field.default if field.default is not MISSING else {}
    return "unset" if value is None else f"`{json.dumps(value)}`"


def read_by(section: str, name: str) -> str:
    """Which optimizers or schedules read a setting, as a sentence, if not all do."""
    if section != "optimizer" or name not in READERS:
        return ""
    return f" Read by {', '.join(f'`{value}`' for value in READERS[name].values)} alone."


# The command line


def command_line() -> str:
    """The commands in a table, then each with its call, its options and an example."""
    (sub,) = (one for one in parser()._actions if isinstance(one, argparse._SubParsersAction))
    rows = [(f"[`{name}`](#{name})", prose(one.description)) for name, one in sub.choices.items()]
    parts = [table("command | what it does", rows)]
    parts += [command(name, one) for name, one in sub.choices.items()]
    return "\n".join(parts)


def command(name: str, sub: argparse.ArgumentParser) -> str:
    """One command."""
    text = f"## {name}\n\n{prose(sub.description or '')}\n\n```text\n{usage(name, sub)}\n```\n"
    for group in sub._action_groups:
        rows = [option(one) for one in group._group_actions if one.dest != "help"]
        if rows:
            title = group.title if group.title not in (None, "options") else "option"
            text += "\n" + table(f"{title} | default | meaning", rows)

    examples = re.findall(r"^\s*(eagle3fn .*(?:\\\n.*)*)", sub.epilog or "", re.M)
    if examples:
        text += "\n```bash\n" + "\n".join(examples) + "\n```\n"
    return text


def usage(name: str, sub: argparse.ArgumentParser) -> str:
    """A call with all that must be given."""
    words = [f"eagle3fn {name}"]
    words += [spelled(one) for one in sub._actions if one.required]
    for group in sub._mutually_exclusive_groups:
        if group.required:
            words.append(f"({' | '.join(spelled(one) for one in group._group_actions)})")
    return " ".join([*words, "[options]"])


def option(action: argparse.Action) -> tuple[str, str, str]:
    """An option's row; the default is what its help ends with in parentheses."""
    about = (action.help or "") % {**vars(action), "prog": "eagle3fn"}
    default = "required" if action.required else ""
    stated = re.fullmatch(r"(.*) \(default:? ([^()]*)\)", about, re.S)
    if stated:
        about, default = stated.groups()
    elif action.default not in (None, False, [], argparse.SUPPRESS):
        default = json.dumps(action.default)
    return f"`{spelled(action)}`", prose(default), prose(about)


def spelled(action: argparse.Action) -> str:
    """An option with the name of its value, or the values it may have."""
    words = [action.option_strings[0]] if action.option_strings else []
    if action.nargs != 0:
        values = f"{{{','.join(map(str, action.choices))}}}" if action.choices else None
        words.append(str(action.metavar or values or action.dest.upper()))
    return " ".join(words)


# The public names


def public_names() -> str:
    """A table for each public module, and what the site shows of it."""
    parts = []
    for module in (eagle3fn, eagle3fn.testing):
        rows = [
            (f"`{name}`", prose(about(value)))
            for name, value in vars(module).items()
            if not name.startswith("_") and not inspect.ismodule(value)
        ]
        site = f".. automodule:: {module.__name__}\n   :members:\n   :imported-members:\n"
        parts.append(
            f"## {module.__name__}\n\n"
            + table("name | what it is", rows)
            + f"\n```{{eval-rst}}\n{site}```\n"
        )
    return "\n".join(parts)


def about(value: Any) -> str:
    """What a name is, in one sentence; of a table of variants their names."""
    if isinstance(value, dict):
        return f"A table: {', '.join(map(json.dumps, value))}"
    return sentence_of(inspect.getdoc(value) or "")


# What each file does


def tree() -> str:
    """A line for each Python file and script, under its folder."""
    parts = []
    for folder in FOLDERS:
        lines = "\n".join(branch(ROOT / folder, depth=0))
        parts.append(f"## {folder}/\n\n```text\n{lines}\n```\n")
    return "\n".join(parts)


def branch(folder: Path, depth: int) -> Iterator[str]:
    """The lines of a folder: its own, its files', its folders'."""
    init = folder / "__init__.py"
    yield file_line(f"{folder.name}/", first_sentence(init) if init.exists() else "", depth)
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".py", ".sh")):
        if file.name != "__init__.py":
            yield file_line(file.name, first_sentence(file), depth + 1)
    for sub in sorted(path for path in folder.iterdir() if path.is_dir()):
        if any(sub.rglob("*.py")):
            yield from branch(sub, depth + 1)


def file_line(name: str, about: str, depth: int) -> str:
    """A name and what it is, wrapped."""
    start = f"{'  ' * depth}{name}"
    wrapped = textwrap.wrap(
        about,
        WIDTH,
        initial_indent=f"{start:<32}",
        subsequent_indent=" " * 32,
        break_on_hyphens=False,
    )
    return "\n".join(wrapped) or start


def first_sentence(file: Path) -> str:
    """The first sentence of a module's docstring, or of a script's first comment."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".sh":
        found = re.search(r"^# (?!!)(.*)$", text, re.M)
    else:
        found = re.match(r'(?:#[^\n]*\n)*r?"""(.*?)"""', text, re.S)
    return sentence_of(found[1]) if found else ""


def sentence_of(text: str) -> str:
    """The first sentence of a docstring."""
    paragraph = " ".join(text.split("\n\n", maxsplit=1)[0].split())
    return re.split(r"(?<=[.;])\s", paragraph)[0].rstrip(".;")


# The pages

PAGES: dict[str, Callable[[], str]] = {
    "settings.md": settings,
    "command-line.md": command_line,
    "api.md": public_names,
    "tree.md": tree,
}


def renewed(page: str) -> str:
    """A page with its made part as the code has it now."""
    text = (DOCS / page).read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN}{PAGES[page]()}\n{END}{after}"


def stale() -> list[str]:
    """The pages that are not what the code makes."""
    return [page for page in PAGES if renewed(page) != (DOCS / page).read_text(encoding="utf-8")]


def main(arguments: list[str]) -> int:
    """Write the pages, or check them; returns the exit code."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--check", action="store_true", help="write nothing, name stale pages")
    check = options.parse_args(arguments).check

    pages = stale()
    for page in pages:
        if check:
            print(f"docs/{page}: not what the code makes; run python docs/generate.py")
        else:
            write_text(DOCS / page, renewed(page))
    return int(check and bool(pages))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
