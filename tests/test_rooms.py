"""The house's order: a room imports only rooms above it, and heavy optional packages stand in one file each."""

import ast
from pathlib import Path

import eagle3fn

ROOT = Path(eagle3fn.__file__).parent
ALLOWED = {
    "base": set(),
    "data": {"base"},
    "model": {"base"},
    "train": {"base", "data", "model"},
    "testing": {"base", "data", "model", "train", "use"},
    "use": {"base", "data", "model", "train"},
}
ANYWHERE = {"cli.py", "__init__.py"}
ONE_FILE = {"matplotlib": "use/report.py"}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def files() -> list[Path]:
    return [
        path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).as_posix() not in ANYWHERE
    ]


def test_rooms_import_only_upwards():
    wrong = []
    for path in files():
        room = path.relative_to(ROOT).parts[0]
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "eagle3fn" and len(parts) > 1 and parts[1] not in ALLOWED[room] | {room}:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong
    assert {path.relative_to(ROOT).parts[0] for path in files()} == set(ALLOWED)


def top_level(path: Path) -> set[str]:
    """Full names of what a file imports when it is loaded."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_only_the_command_line_imports_testing_and_lazily():
    users = [
        path
        for path in ROOT.rglob("*.py")
        if any(name.startswith("eagle3fn.testing") for name in imports(path))
    ]
    outside = {path.relative_to(ROOT).as_posix() for path in users if path.parent.name != "testing"}
    assert outside == {"cli.py"}
    assert not any(name.startswith("eagle3fn.testing") for name in top_level(ROOT / "cli.py"))
    users = [path for path in ROOT.rglob("*.py") if "hypothesis" in imports(path)]
    assert {path.parent.name for path in users} == {"testing"}


def test_heavy_packages_are_imported_in_one_file_and_lazily():
    for package, home in ONE_FILE.items():
        users = {
            p.relative_to(ROOT).as_posix()
            for p in files()
            if any(n.split(".")[0] == package for n in imports(p))
        }
        assert users == {home}
    users = [p for p in files() if any(name.split(".")[0] == "triton" for name in imports(p))]
    assert users and {p.parent.relative_to(ROOT).as_posix() for p in users} == {"model/kernels"}
    for path in files():
        top = {name.split(".")[0] for name in top_level(path)}
        assert not top & {"transformers", "matplotlib", "triton", "hypothesis", "pytest"}, path


def test_one_file_knows_dtensor():
    wanted = "torch.distributed.tensor"
    assert {p.relative_to(ROOT).as_posix() for p in files() if wanted in p.read_text()} == {
        "train/shard.py"
    }


def test_files_stay_small():
    long = {
        path.name: n
        for path in ROOT.rglob("*.py")
        if (n := len(path.read_text().splitlines())) > 260
    }
    assert not long


def test_package_bench_and_scripts_import_neither_tests_nor_each_other():
    apart = {
        "eagle3fn": {"bench", "scripts", "tests"},
        "bench": {"scripts", "tests"},
        "scripts": {"bench", "tests"},
    }
    wrong = []
    for folder, others in apart.items():
        paths = list((ROOT.parent / folder).rglob("*.py"))
        assert paths, folder
        for path in paths:
            for name in imports(path):
                if name.split(".")[0] in others:
                    wrong.append(f"{path.relative_to(ROOT.parent)} imports {name}")
    assert not wrong
