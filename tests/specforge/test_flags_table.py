"""docs/specforge.md has every option of SpecForge's script, and what ours does with it."""

import re
from pathlib import Path

import pytest

from eagle3fn.specforge.script import OPTIONS, Option

PAGE = Path(__file__).resolve().parents[2] / "docs" / "specforge.md"
WORDS = {"used": "used", "none": "no effect", "refused": "refused"}


def table() -> dict[str, str]:
    """By option, without its dashes, the cell on what our script does with it."""
    chapter = PAGE.read_text(encoding="utf-8").split("\n## Flags of SpecForge, and ours\n", 1)[1]
    rows = [line for line in chapter.split("\n## ", 1)[0].splitlines() if line.startswith("| `--")]

    effects = {}
    for row in rows:
        names, _, effect = row.strip("|").split(" | ")
        for name in re.findall(r"`--([\w-]+)", names):
            assert name not in effects, f"--{name} stands there twice"
            effects[name] = effect
    return effects


def test_every_option_stands_in_the_table_once() -> None:
    assert set(table()) == {option.name for option in OPTIONS}


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_the_table_says_what_becomes_of_an_option(option: Option) -> None:
    assert WORDS[option.effect] in table()[option.name] or option.name == "attention-backend"
