"""The pages say what is: their snippets run; settings, options and names are the code's."""

import argparse
import ast
import importlib
import importlib.util
import json
import re
from dataclasses import MISSING, fields
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from eagle3fn.base.draft_config import DraftConfig
from eagle3fn.base.sections import (
    READERS,
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from eagle3fn.cli import parser
from eagle3fn.model.losses import LOSSES
from eagle3fn.specforge.recipes import SETTINGS
from eagle3fn.train.defaults import chosen_defaults
from eagle3fn.train.optimizer import OPTIMIZERS
from eagle3fn.train.recipe import Recipe
from eagle3fn.train.schedules import SCHEDULES
from eagle3fn.use.eval_settings import EvalSettings
from tests.small_run import write_run
from tests.specforge.certificate import NOT_SEEN, seen

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
SPECFORGE = DOCS["specforge"]
SECTIONS: dict[str, Any] = {
    "draft": DraftConfig,
    "objective": ObjectiveConfig,
    "optimizer": OptimizerConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "evaluate": EvalSettings,
}


def tables(text: str) -> list[list[str]]:
    """Cells of all tables' lines in a text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def commands() -> dict[str, list[argparse.Action]]:
    """Options of every sub-command."""
    sub = next(
        action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    return {
        name: [a for a in one._actions if a.dest != "help"] for name, one in sub.choices.items()
    }


def snippets(page: str) -> list[str]:
    """A page's pieces of Python that can be run; those marked as a fragment of a file cannot."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
WITH_SNIPPETS = [page for page in PAGES if snippets(page)]


def test_pages_with_snippets() -> None:
    assert {"docs/own-parts.md", "docs/ranks.md", "docs/testing.md"} <= set(WITH_SNIPPETS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `run/` is as the pages' commands leave it, and `run/target` the target."""
    folder = tmp_path_factory.mktemp("pages")
    write_run(folder / "run")
    return folder


@pytest.mark.parametrize("page", WITH_SNIPPETS)
def test_snippets_run(page: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = snippets(page)
    assert blocks, page
    monkeypatch.chdir(run)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page}, snippet {number}", "exec"), names)


def made_pages() -> ModuleType:
    """docs/generate.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = made_pages()


def test_made_pages_are_current() -> None:
    assert GENERATE.stale() == [], "run python docs/generate.py"


def test_a_stale_page_is_named_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for page in GENERATE.PAGES:
        (tmp_path / page).write_text(DOCS[Path(page).stem], encoding="utf-8")
    whole = (tmp_path / "settings.md").read_text()
    assert whole.count("`0.015`") == 1
    (tmp_path / "settings.md").write_text(whole.replace("`0.015`", "`0.02`"))
    monkeypatch.setattr(GENERATE, "DOCS", tmp_path)

    assert GENERATE.main(["--check"]) == 1
    assert capsys.readouterr().out.startswith("docs/settings.md: ")
    assert GENERATE.main([]) == 0
    assert (tmp_path / "settings.md").read_text() == whole
    assert GENERATE.main(["--check"]) == 0


def setting_rows() -> dict[str, list[str]]:
    """The cells of each setting's row."""
    rows = {cells[0].strip("`"): cells for cells in tables(DOCS["settings"])}
    return {name: cells for name, cells in rows.items() if "." in name}


def test_every_setting_has_its_default_and_a_meaning() -> None:
    known = {
        f"{section}.{field.name}": field.default
        for section, kind in SECTIONS.items()
        for field in fields(kind)
        if field.default is not MISSING
    }
    table = setting_rows()
    assert set(known) <= set(table)
    for name, default in known.items():
        cell = table[name][1]
        value = None if cell == "unset" else json.loads(cell.strip("`"))
        assert value == (list(default) if isinstance(default, tuple) else default), name
        assert len(table[name][2]) > 10, name


@pytest.mark.parametrize("section", SECTIONS)
def test_every_choice_of_a_setting_is_in_its_meaning(section: str) -> None:
    table = setting_rows()
    found = 0
    for name, hint in get_type_hints(SECTIONS[section]).items():
        if get_origin(hint) is Literal:
            found += 1
            named = set(re.findall(r'`"(\w+)"`', table[f"{section}.{name}"][2]))
            assert set(get_args(hint)) <= named, name
    assert found or section in ("draft", "data", "evaluate")


def test_settings_that_train_chooses_are_marked() -> None:
    draft = DraftConfig(8, 8, 1, 1, 8, 8, 8, 8, 8)
    chosen = {choice.setting for choice in chosen_defaults(draft, 100, ranks=2)}
    marked = {name for name, cells in setting_rows().items() if "†" in cells[-1]}
    assert marked == chosen


NAMED = {
    "objective.loss": LOSSES,
    "optimizer.name": OPTIMIZERS,
    "optimizer.schedule": SCHEDULES,
}


def test_every_loss_optimizer_and_schedule_is_named() -> None:
    page = {cells[0] for cells in tables(DOCS["losses"])}
    for setting, names in NAMED.items():
        cells = setting_rows()[setting]
        assert set(names) | {"module:function"} <= set(re.findall(r'`"([\w:]+)"`', " ".join(cells)))
        assert {f'`"{name}"`' for name in names} <= page


def test_the_page_on_losses_says_who_reads_a_setting() -> None:
    table = {cells[0].strip("`"): cells for cells in tables(DOCS["losses"])}
    for setting, row in READERS.items():
        if row.choice != "name":
            continue
        _, default, readers = table[setting]
        assert repr(ast.literal_eval(default.strip("`"))) == repr(getattr(OptimizerConfig, setting))
        assert tuple(re.findall(r"`(\w+)`", readers)) == row.values
    for role in OptimizerConfig().decay_roles:
        assert f'`"{role}"`' in DOCS["losses"]


def test_every_option_of_every_command_is_there() -> None:
    _, *parts = re.split(r"^## ", DOCS["command-line"], flags=re.M)
    table = {
        part.split("\n", 1)[0]: set(re.findall(r"^\| `(--[\w-]+)", part, re.M)) for part in parts
    }
    assert table == {
        name: {option.option_strings[0] for option in options if option.option_strings}
        for name, options in commands().items()
    }
    assert len(table) > 10


def test_settings_of_specforges_recipe_are_the_codes() -> None:
    """The settings among the table's rows.

    The functions among them are named by the record's fields.
    """
    lines = [line for line in SPECFORGE.splitlines() if line.startswith("| `")]
    cells = [[cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in lines]
    table = {
        name: value for name, value, *_ in cells if name.split(".")[0] in (*SECTIONS, "Recipe")
    }

    settings = {}
    for section, values in SETTINGS.items():
        for key, value in values.items():
            settings[f"{section}.{key}"] = value
    named = {name: value for name, value in table.items() if not name.startswith("Recipe.")}
    assert {name: ast.literal_eval(value) for name, value in named.items()} == settings

    functions = {name.removeprefix("Recipe.") for name in table if name.startswith("Recipe.")}
    assert functions == set(Recipe._fields) - {"name", "optimizer"}


def takes_a_device(file: str) -> bool:
    """Whether a test, or a fixture, of the file has an argument `device`."""
    functions = (
        n for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, ast.FunctionDef)
    )
    return any(
        a.arg == "device"
        for f in functions
        if f.name.startswith(("test_", "placed"))
        for a in f.args.args
    )


def test_each_claim_says_whether_a_card_has_seen_it() -> None:
    """The last column is made of the gate's result files.

    A row without a test that takes a device has a dash.
    """
    rows = [
        line.strip("| ").split(" | ")
        for line in DOCS["verification"].split("\n## The CUDA gate")[0].splitlines()
    ]
    rows = [
        row
        for row in rows
        if len(row) > 1 and not row[0].startswith(("property", "---", "CUDA, `", "anything"))
    ]
    assert len(rows) > 30 and {len(row) for row in rows} == {4}
    for title, how, _, on_card in rows:
        files = {
            name
            for name in re.findall(r"tests/[\w/]*test_\w+\.py", f"{title} {how}")
            if takes_a_device(name)
        }
        if files and on_card != "-":
            assert on_card == seen(files, ROOT / "bench" / "results"), title
        elif on_card != "-":
            links = re.findall(r"\.\./(bench/results/[\w.-]+)", on_card)
            assert "bench" in how and (on_card == NOT_SEEN or links), title
            assert all((ROOT / link).is_file() for link in links), title
    assert sum(row[3] != "-" for row in rows) > 12


def test_every_file_has_a_first_sentence() -> None:
    lines = [line for folder in GENERATE.FOLDERS for line in GENERATE.branch(ROOT / folder, 0)]
    assert len(lines) > 300
    for line in lines:
        name, *about = line.split()
        if name.endswith((".py", ".sh")):
            assert about, f"{name} has no first sentence"


@pytest.mark.parametrize("page", ["README", *sorted(DOCS)])
def test_named_files_and_functions_exist(page: str) -> None:
    text = {"README": README, **DOCS}[page]
    for path in re.findall(r"`((?:tests|scripts|bench|examples|eagle3fn)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).is_file(), path
    for folder, name in re.findall(r"`(base|data|model|testing|train|use)\.([\w.]+)`", text):
        if name != "safetensors" and name not in getattr(
            SECTIONS.get(folder), "__dataclass_fields__", {}
        ):
            file, *rest = name.split(".")
            found: Any = importlib.import_module(f"eagle3fn.{folder}.{file}")
            for part in rest:
                found = getattr(found, part)
