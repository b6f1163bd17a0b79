"""Two checkouts in paired rounds: what is compared, and what is refused."""

import json
from pathlib import Path

import pytest

from bench import paired
from eagle3fn.base.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--shape", "tiny", "--seq", "96", "--dtype", "float32", "--rounds", "2"]


def test_checkout_against_itself_has_the_same_losses(tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "paired.json"
    monkeypatch.setattr(
        "sys.argv", ["paired", "--other", str(ROOT), *TINY, "--json", "--out", str(out)]
    )
    paired.main()
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(out.read_text())
    assert result["same_losses"]
    for name in ("ratio", "processor_ratio"):
        found = result[name]
        assert 0 < found["first_quartile"] <= found["median"] <= found["third_quartile"]
    times = result["all_seconds"]
    ratios = [a / b for a, b in zip(times["here"], times["other"], strict=True)]
    assert len(ratios) == 2 and result["ratio"]["median"] == pytest.approx(sum(ratios) / 2)
    memory = result["memory"]
    assert result["memory_ratio"] == memory["here"]["step"] / memory["other"]["step"]


def test_other_losses_and_a_failing_process_are_reported(tmp_path: Path) -> None:
    """A checkout whose `bench.step` is a stand-in: a step that returns its own number, or fails."""
    (tmp_path / "eagle3fn").mkdir()
    (tmp_path / "eagle3fn" / "__init__.py").write_text("")
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").write_text("")
    (tmp_path / "bench" / "common.py").write_text("synchronize = lambda device: None\n")
    step = tmp_path / "bench" / "step.py"
    step.write_text(
        "from argparse import Namespace\n"
        "parse = lambda words: Namespace(device='cpu')\n"
        "problem_of = lambda options: None\n"
        "side_of = lambda *_: lambda: (bytearray(b'1') * (32 << 20), 3.0)[1]\n"
    )
    options = paired.parse(["--other", str(tmp_path), *TINY])
    result = paired.measure(options)
    assert not result["same_losses"] and result["last_loss"]["other"] == 3.0

    step.write_text("raise RuntimeError('planted')\n")
    with pytest.raises(UserError, match="its process ended"):
        paired.measure(options)


def test_folder_without_a_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name a checkout"):
        paired.parse(["--other", str(tmp_path)])


def test_quartiles_are_of_the_rounds_ratios() -> None:
    found = paired.ratios([1.0, 4.0, 9.0, 16.0, 5.0], [1.0, 2.0, 3.0, 4.0, 1.0])
    assert found == {"median": 3.0, "first_quartile": 2.0, "third_quartile": 4.0}
    assert set(paired.middle([2.0]).values()) == {2.0}
