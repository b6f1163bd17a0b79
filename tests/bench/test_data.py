"""`bench.data` on tiny folders: what it measures is there, and of the sizes asked for."""

import json
import sys

import pytest

from bench import data


def test_tiny_folders_are_measured(tmp_path, monkeypatch, capsys):
    tiny = data.Folder("tiny", 32, 4)
    monkeypatch.setattr(data, "DELIVERED", {"smollm2": tiny, "qwen2.5-7b": tiny})
    monkeypatch.setattr(data, "LONG", tiny)
    options = ["--samples", "256", "--steps", "20", "--rounds", "2", "--step-7b", "1e3"]
    monkeypatch.setattr(sys, "argv", ["data", *options, "--out", str(tmp_path / "data.json")])
    data.main()

    lines = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "data.json").read_text())
    assert json.loads(lines[-1]) == found
    first = found["first_batch"]
    assert (first["samples"], first["shards"], len(first["seconds"])) == (256, 4, 2)
    assert all(
        0 < part < whole for part, whole in zip(first["opening"], first["seconds"], strict=True)
    )
    assert found["memory"]["steps"] == 20
    assert found["memory"]["growth"] == pytest.approx(
        found["memory"]["late"] - found["memory"]["early"]
    )
    big = found["delivery"]["qwen2.5-7b"]
    assert big["step"] == 1000 and big["ratio"] == big["median"] / 1000
    assert found["delivery"]["smollm2"]["step"] > 0
