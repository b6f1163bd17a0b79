"""Links of the pages: files and headings that are there, here as on GitHub and in the site."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md"))
)


def without_code(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.M | re.S)


def links(text: str) -> list[str]:
    """Where a page's links and pictures lead, but to other sites."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(text))
    return [link for link in found if not re.match(r"https?:|mailto:", link)]


def anchors(text: str) -> set[str]:
    """The names that GitHub and MyST give to a page's headings."""
    names: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", without_code(text), re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        count = names.count(slug)
        names.append(slug)
        if count:
            names.append(f"{slug}-{count}")
    return set(names)


def broken(page: Path) -> list[str]:
    """The links of a page that lead nowhere."""
    found = []
    for link in links(page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        is_there = target.exists()
        if is_there and anchor:
            is_there = anchor in anchors(target.read_text(encoding="utf-8"))
        if not is_there:
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert broken(ROOT / page) == []


def test_missing_files_and_headings_are_found(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# A `title`, and more\n\n## Part\n\n## Part\n")
    page = tmp_path / "a.md"
    good = ["b.md", "b.md#a-title-and-more", "b.md#part-1", "#here", "https://example.org/c.md"]
    bad = ["c.md", "b.md#title", "b.md#part-2", "#there"]
    lines = [f"[text]({link})" for link in good + bad]
    page.write_text("\n".join(["# Here", *lines, "```text", "[x](no.md)", "```\n"]))
    assert broken(page) == bad


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\{toctree\}\n(.*?)^```", index, re.M | re.S)
    listed = [line for block in blocks for line in re.findall(r"^[\w-]+$", block, re.M)]
    assert len(listed) == len(set(listed))
    assert set(listed) == {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}


def test_pages_that_the_code_names_are_there() -> None:
    named = {}
    for folder in ("eagle3fn", "scripts", "examples", "bench", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            for page in re.findall(r"\b(?:docs/[\w-]+|[A-Z]{4,})\.md\b", file.read_text()):
                named[page] = file.relative_to(ROOT).as_posix()
    assert len(named) > 5
    missing = {page: file for page, file in named.items() if not (ROOT / page).is_file()}
    assert missing == {}
