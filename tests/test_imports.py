"""What may import what: imports follow the data flow, heavy packages have one file each.

    base ← engines ← data, model ← train ← use        what a run needs
    testing                                 may import all of these
    specforge                               may import all of these, and testing
    commands                                may import all of these but testing

Only `commands` imports `specforge`, and only `specforge` imports `testing`.
"""

import ast
import tomllib
from pathlib import Path

import pytest

import eagle3fn

PACKAGE = Path(eagle3fn.__file__).parent
ROOT = PACKAGE.parent

ALLOWED = {
    "base": set(),
    "engines": {"base"},
    "data": {"base", "engines"},
    "model": {"base"},
    "train": {"base", "data", "model"},
    "use": {"base", "engines", "data", "model", "train"},
    "testing": {"base", "engines", "data", "model", "train", "use"},
    "specforge": {"base", "engines", "data", "model", "train", "use", "testing"},
    "commands": {"base", "engines", "data", "model", "train", "use", "specforge"},
}
"""By folder, the other folders of the package that its files may import."""

TOP = {"cli.py", "__init__.py"}
"""Files of no folder: the command line, and the package's own names."""

PROGRAMS = {"engines/programs/transformers_states.py"}
"""Programs of a process of their own that run this package: they may import all of it."""

USERS = {
    "matplotlib": set(),
    "hypothesis": {"testing/strategies.py", "specforge/cases.py"},
    "pytest": set(),
    "triton": {
        "model/kernels/score.py",
        "specforge/kl_kernel.py",
        "testing/triton_interpreter.py",
    },
}
"""Heavy packages, and the files that import them; transformers has more users."""

LAZY = {*USERS, "transformers"}
"""Packages that no file imports when it is loaded."""


def files() -> list[Path]:
    """The package's files, but those of no folder."""
    found = sorted(PACKAGE.rglob("*.py"))
    return [path for path in found if name_of(path) not in TOP]


def name_of(path: Path) -> str:
    """A file's path within the package."""
    return path.relative_to(PACKAGE).as_posix()


def names_in(nodes: list[ast.AST]) -> set[str]:
    """Full names of the modules that these nodes import."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def imports(path: Path) -> set[str]:
    """What a file imports anywhere in it."""
    return names_in(list(ast.walk(ast.parse(path.read_text()))))


def top_level(path: Path) -> set[str]:
    """What a file imports when it is loaded."""
    return names_in(list(ast.parse(path.read_text()).body))


def packages(names: set[str]) -> set[str]:
    """The first part of each name."""
    return {name.split(".")[0] for name in names}


def importers_of(folder: str) -> set[str]:
    """The package's files outside a folder that import it."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        inside = path.relative_to(PACKAGE).parts[0] == folder
        if not inside and any(_is_in(name, f"eagle3fn.{folder}") for name in imports(path)):
            found.add(name_of(path))
    return found


def _is_in(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def test_imports_between_folders_go_one_way():
    wrong = []
    for path in files():
        own = path.relative_to(PACKAGE).parts[0]
        if name_of(path) in PROGRAMS:
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "eagle3fn" or len(parts) == 1:
                continue
            if parts[1] != own and parts[1] not in ALLOWED[own]:
                wrong.append(f"{name_of(path)} imports {name}")
    assert not wrong
    assert {path.relative_to(PACKAGE).parts[0] for path in files()} == set(ALLOWED)


def test_only_the_command_line_imports_specforge_and_lazily():
    importers = importers_of("specforge")
    assert importers and all(name.startswith("commands/") for name in importers)
    loaded = top_level(PACKAGE / "cli.py")
    for name in importers:
        loaded |= top_level(PACKAGE / name)
    assert not any(_is_in(name, "eagle3fn.specforge") for name in loaded)


def test_only_specforge_imports_testing():
    importers = importers_of("testing")
    assert importers
    assert all(name.startswith("specforge/") for name in importers)


@pytest.mark.parametrize("package", USERS)
def test_heavy_package_is_imported_by_its_files_alone(package):
    users = {name_of(path) for path in files() if package in packages(imports(path))}
    assert users == USERS[package]


def test_heavy_packages_are_imported_lazily():
    for path in files():
        assert not packages(top_level(path)) & LAZY, name_of(path)


def test_one_file_imports_dtensor():
    module = "torch.distributed.tensor"
    users = {name_of(path) for path in files() if module in path.read_text()}
    assert users == {"train/shard.py"}


def test_package_bench_and_scripts_import_neither_tests_nor_each_other():
    apart = {
        "eagle3fn": {"bench", "scripts", "tests"},
        "bench": {"scripts", "tests"},
        "scripts": {"bench", "tests"},
    }
    wrong = []
    for folder, others in apart.items():
        paths = list((ROOT / folder).rglob("*.py"))
        assert paths, folder
        for path in paths:
            for name in packages(imports(path)) & others:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_tests_import_no_tests():
    """What several test files need has a module of its own."""
    wrong = []
    for path in (ROOT / "tests").rglob("*.py"):
        for name in imports(path):
            last = name.split(".")[-1]
            if name.startswith("tests.") and (last == "conftest" or last.startswith("test_")):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


TEXT = {".py", ".md", ".toml", ".sh", ".txt", ".json"}
OLD_WORD = "leg" + "acy"
MAY_HAVE_IT = ("eagle3fn/specforge/", "tests/specforge/", "bench/results/")


def texts() -> list[Path]:
    """The project's text files: those at the top, and all in its folders."""
    found = list(ROOT.glob("*"))
    for folder in ("eagle3fn", "tests", "bench", "scripts"):
        found += (ROOT / folder).rglob("*")
    return [path for path in found if path.suffix in TEXT and path.is_file()]


def test_old_word_for_specforges_settings_is_in_its_folders_alone():
    """Results of earlier runs keep it too."""
    found = []
    for path in texts():
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(MAY_HAVE_IT):
            continue
        if OLD_WORD in path.read_text(encoding="utf-8").lower():
            found.append(name)
    assert sorted(found) == []


def test_lines_are_at_most_100_characters():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert settings["line-length"] == 100
    assert "E" in settings["lint"]["select"]
    assert "E501" not in settings["lint"]["ignore"]
