"""The tree of docs/tree.md, made from the first sentence of each module: `python -m tests.tree`.

It rewrites the block in place; `tests/test_readme.py` compares.
"""

import ast
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/tree.md"
FOLDERS = ("eagle3fn", "examples", "scripts", "bench", "tests")
WIDTH = 120
BLOCK = re.compile(r"(<!-- python -m tests\.tree -->\n\n```text\n)(.*?)(```)", re.S)


def tree() -> str:
    """A line for each Python file and script, under its folder."""
    lines = []
    for folder in FOLDERS:
        lines += _folder(ROOT / folder, depth=0)
    return "\n".join(lines) + "\n"


def _folder(folder: Path, depth: int) -> list[str]:
    init = folder / "__init__.py"
    lines = [_line(f"{folder.name}/", _about(init) if init.exists() else "", depth)]
    files = sorted(path for path in folder.iterdir() if path.suffix in (".py", ".sh"))
    for file in files:
        if file.name != "__init__.py":
            lines.append(_line(file.name, _about(file), depth + 1))
    for sub in sorted(path for path in folder.iterdir() if path.is_dir()):
        if any(sub.rglob("*.py")):
            lines += _folder(sub, depth + 1)
    return lines


def _line(name: str, about: str, depth: int) -> str:
    start = f"{'  ' * depth}{name}"
    wrapped = textwrap.wrap(
        about,
        WIDTH,
        initial_indent=f"{start:<32}",
        subsequent_indent=" " * 32,
        break_on_hyphens=False,
    )
    return "\n".join(wrapped) or start


def _about(file: Path) -> str:
    """The first sentence of a module's docstring, or of a script's first comment."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".sh":
        found = re.search(r"^# (?!!)(.*)$", text, re.M)
        sentence = found.group(1) if found else ""
    else:
        sentence = ast.get_docstring(ast.parse(text)) or ""
    sentence = " ".join(sentence.split("\n\n")[0].split())
    return re.split(r"(?<=[.;])\s", sentence)[0].rstrip(".;")


def main() -> int:
    """Rewrite the block."""
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(BLOCK.sub(lambda found: found[1] + tree() + found[3], page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
