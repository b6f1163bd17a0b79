"""Engines' environments: made once, at pinned versions; sources that are named or fetched."""

import tarfile
from pathlib import Path

import pytest

from eagle3fn.base.errors import UserError
from eagle3fn.engines import environments
from eagle3fn.engines.environments import (
    ENVIRONMENTS,
    Environment,
    Place,
    fetch_source,
    find_places,
    make_environment,
)


class Runner:
    """Takes commands in place of a system; the one that has `fails` in it fails."""

    def __init__(self, fails: str = "-") -> None:
        self.commands: list[list[str]] = []
        self.fails = fails

    def __call__(self, command) -> int:
        self.commands.append(list(command))
        return 3 if self.fails in command else 0


@pytest.fixture(autouse=True)
def no_sources(monkeypatch):
    for source in environments.SOURCES.values():
        monkeypatch.delenv(source.variable, raising=False)


def test_an_environment_is_made_by_these_commands(tmp_path):
    run = Runner()
    python = make_environment("speculators", tmp_path, run, python="py")
    place = tmp_path / "speculators"
    assert python == place / "bin/python"
    venv, install, uninstall = run.commands
    assert venv == ["py", "-m", "venv", "--clear", str(place)]
    assert install[:4] == [str(python), "-m", "pip", "install"]
    assert install[-2:] == ["speculators==0.9.0", "torch==2.13.0"]
    assert uninstall[3] == "uninstall"
    assert "torchvision" in uninstall
    assert "--yes" in uninstall


def test_a_complete_environment_is_used_again(tmp_path):
    make_environment("eagle", tmp_path, Runner())
    again = Runner()
    assert make_environment("eagle", tmp_path, again) == tmp_path / "eagle/bin/python"
    assert again.commands == []


def test_other_versions_make_it_anew(tmp_path, monkeypatch):
    make_environment("eagle", tmp_path, Runner())
    monkeypatch.setitem(ENVIRONMENTS, "eagle", Environment(("transformers==9",)))
    again = Runner()
    make_environment("eagle", tmp_path, again)
    assert len(again.commands) == 2


def test_a_failed_installation_begins_anew(tmp_path):
    with pytest.raises(UserError, match=r"^eagle: .* pip .* exit code 3; .*--python eagle=PATH$"):
        make_environment("eagle", tmp_path, Runner("install"))
    again = Runner()
    make_environment("eagle", tmp_path, again)
    assert len(again.commands) == 2


def test_a_failed_update_does_not_pass_for_the_old_one(tmp_path, monkeypatch):
    make_environment("eagle", tmp_path, Runner())
    old = ENVIRONMENTS["eagle"]
    monkeypatch.setitem(ENVIRONMENTS, "eagle", Environment(("transformers==9",)))
    with pytest.raises(UserError):
        make_environment("eagle", tmp_path, Runner("install"))
    monkeypatch.setitem(ENVIRONMENTS, "eagle", old)
    again = Runner()
    make_environment("eagle", tmp_path, again)
    assert len(again.commands) == 2


@pytest.mark.parametrize("engine", ENVIRONMENTS)
def test_every_version_is_pinned(engine):
    assert all("==" in package for package in ENVIRONMENTS[engine].packages)


def test_a_command_that_fails_is_named_with_its_exit_code(tmp_path):
    with pytest.raises(UserError, match="exit code"):
        make_environment("eagle", tmp_path / "no" / "such", python="false")


def test_a_named_python_is_used_as_it_is(tmp_path):
    run = Runner()
    places = find_places(["vllm", "speculators"], tmp_path, {"vllm": "/v/python"}, run)
    assert places["vllm"] == Place(Path("/v/python"))
    assert places["speculators"].python == tmp_path / "speculators/bin/python"
    assert not any(str(tmp_path / "vllm") in word for command in run.commands for word in command)


def test_eagles_source_must_be_named_before_anything_is_installed(tmp_path, monkeypatch):
    run = Runner()
    with pytest.raises(UserError, match=r"EAGLE_SRC = '': has no eagle/model/ea_model\.py; set it"):
        find_places(["vllm", "eagle"], tmp_path, {}, run)
    monkeypatch.setenv("EAGLE_SRC", str(tmp_path))
    with pytest.raises(UserError, match=r"has no eagle/model/ea_model\.py"):
        find_places(["vllm", "eagle"], tmp_path, {}, run)
    assert run.commands == []

    (tmp_path / "eagle/model").mkdir(parents=True)
    (tmp_path / "eagle/model/ea_model.py").touch()
    assert find_places(["eagle"], tmp_path, {"eagle": "py"}, run)["eagle"].source == tmp_path


def test_a_named_tree_of_llamacpp_is_used(tmp_path, monkeypatch):
    (tmp_path / "convert_hf_to_gguf.py").touch()
    monkeypatch.setenv("LLAMACPP_SRC", str(tmp_path))
    run = Runner()
    assert find_places(["llamacpp"], "none", {"llamacpp": "py"}, run)["llamacpp"].source == tmp_path
    assert run.commands == []


def packed(names: list[str]):
    """A stand-in for pip that downloads a source package with these files."""

    def run(command) -> int:
        folder = Path(command[command.index("--dest") + 1])
        archive = folder / "llama_cpp_python-0.3.36.tar.gz"
        (folder / "file").write_text("content")
        with tarfile.open(archive, "w:gz") as tar:
            for name in names:
                tar.add(folder / "file", f"llama_cpp_python-0.3.36/vendor/llama.cpp/{name}")
        run.calls.append(command)
        return 0

    run.calls = []
    return run


def test_llamacpps_converter_comes_from_a_source_package(tmp_path):
    names = ["convert_hf_to_gguf.py", "conversion/a.py", "gguf-py/gguf/b.py", "ggml/c.cpp"]
    run = packed(names)
    source = fetch_source("llamacpp", tmp_path, "py", run)
    found = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
    assert found == ["conversion/a.py", "convert_hf_to_gguf.py", "gguf-py/gguf/b.py"]
    assert run.calls[0][-1] == "llama-cpp-python==0.3.36"
    assert fetch_source("llamacpp", tmp_path, "py", run) == source
    assert len(run.calls) == 1


def test_a_package_without_the_converter_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has not all of .* set LLAMACPP_SRC to a checkout"):
        fetch_source("llamacpp", tmp_path, "py", packed(["convert_hf_to_gguf.py"]))
