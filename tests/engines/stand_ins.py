"""Puts the stand-in program in place of every engine's."""

import shutil
from pathlib import Path

import pytest

from eagle3fn.engines import decoding, process
from eagle3fn.engines.decoding import Engine


def fake_programs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(process.PROGRAMS / "answering.py", folder)
    shutil.copy(Path(__file__).parent / "fake_engine.py", folder)
    monkeypatch.setattr(process, "PROGRAMS", folder)
    for name in ("vllm", "llamacpp"):
        monkeypatch.setitem(decoding.ENGINES, name, Engine("fake_engine.py", (1,), {}))
