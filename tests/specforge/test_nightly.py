"""The nightly shards and the seeded mutations: what they keep, repeat, draw and leave out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eagle3fn.specforge.cases import for_specforge
from eagle3fn.specforge.oracle import Oracle
from eagle3fn.testing.strategies import drawn
from tests.specforge import mutate, nightly
from tests.specforge.mutations import Mutation, find_mutations

SOURCE = b'''"""A file."""
LIMIT = 3


def check_sizes(x):
    return x + 1


def halve(x: int = 4, *, keep: bool = True) -> int:
    """Half of it."""
    if x < 0:
        raise ValueError(f"{x - 1} is too small")
    assert x + 1 > 0
    check_sizes(x - 1)
    total: float = scale(x, 2, device=x.device)
    total = total / 2
    unused = x * 7
    match x:
        case 1:
            return total * 5
    return total
'''


def call(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> int:
    monkeypatch.setattr(
        sys, "argv", ["nightly", "--cases", "7", "--shards", "3", "--out", str(out), *arguments]
    )
    return nightly.main()


def test_finished_shards_are_not_repeated(
    oracle: Oracle, tmp_path: Path, monkeypatch, capsys
) -> None:
    assert call(monkeypatch, tmp_path, "--seed", "5") == 0
    total = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (total["cases"], total["equal"], total["first_difference"]) == (7, 7, None)
    assert total["oracle"]["sha256"] == oracle.digest and sum(total["counts"]["K"].values()) == 7
    paths = [tmp_path / f"shard-{number:04}.json" for number in range(3)]
    shards = [json.loads(path.read_text()) for path in paths]
    assert [(shard["key"]["first"], shard["key"]["last"]) for shard in shards] == [
        (0, 1),
        (2, 3),
        (4, 6),
    ]
    paths[1].unlink()
    paths[2].write_text(
        json.dumps(shards[2] | {"key": shards[2]["key"] | {"sha256": "other sources"}})
    )
    seen = []
    compare = nightly.parity.compare
    monkeypatch.setattr(nightly.parity, "compare", lambda *a: seen.append(a[1]) or compare(*a))
    assert call(monkeypatch, tmp_path, "--seed", "5") == 0
    listed = [for_specforge(case) for case in drawn(7, 5)]
    assert seen[-2:] == [listed[2:4], listed[4:7]] and len(seen) == 4  # two for the estimate
    seen.clear()
    paths[1].write_text(paths[1].read_text()[:50])
    paths[2].write_text("[]")
    assert call(monkeypatch, tmp_path, "--seed", "5") == 0 and seen[-2:] == [
        listed[2:4],
        listed[4:7],
    ]
    seen.clear()
    assert call(monkeypatch, tmp_path, "--seed", "5") == 0 and seen == []
    assert "3 of 3 shards are finished" in capsys.readouterr().out


def test_a_difference_is_kept_with_its_place(
    oracle: Oracle, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("eagle3fn.model.layers.at_least_fp32", lambda dtype: dtype)
    assert call(monkeypatch, tmp_path, "--seed", "5") == 1
    total = json.loads((tmp_path / "summary.json").read_text())
    assert (
        total["equal"] < 7
        and total["first_difference"]["leaf"] == "midlayer.input_layernorm.weight"
    )


@pytest.mark.parametrize("count", [0, -1, 10**6])
def test_a_count_that_cannot_be_drawn_is_refused(
    count: int, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(sys, "argv", ["mutate", "--count", str(count)])
    monkeypatch.setattr(
        mutate, "executed", lambda: {file: set(range(999)) for file in mutate.FILES}
    )
    assert mutate.main() == 2 and "must be between 1 and" in capsys.readouterr().err


def test_mutated_tests_find_the_old_tool_by_a_relative_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They run in another folder; with no old tool there they would be skipped, and pass."""
    seen = []
    monkeypatch.setenv("SPECFORGE_SRC", "SpecForge")
    monkeypatch.setattr(
        mutate.subprocess, "run",
        lambda *a, **k: seen.append(k["env"]["SPECFORGE_SRC"]) or subprocess.CompletedProcess(a, 0, "", ""),
    )  # fmt: skip
    mutate.passes(tmp_path, 1)
    assert seen == [str(Path.cwd() / "SpecForge")]


def test_mutations_leave_out_refusals_texts_and_annotations() -> None:
    found = find_mutations("file.py", SOURCE, set(range(1, 30)))
    assert {mutation.line for mutation in found} == {15, 16, 17, 19, 20}
    texts = {
        (mutation.kind, mutation.apply(SOURCE).decode().splitlines()[mutation.line - 1].strip())
        for mutation in found
    }
    assert ("without the last argument", "total: float = scale(x, device=x.device)") in texts
    assert ("arguments swapped", "total: float = scale(2, x, device=x.device)") in texts
    assert ("another operator", "total = (total * 2)") in texts
    assert ("statement left out", "pass") in texts
    assert ("another constant", "unused = x * 8") in texts
    assert not any("device" in kind for kind, _ in texts)
    for mutation in found:
        changed = mutation.apply(SOURCE)
        assert changed != SOURCE
        compile(changed, "file.py", "exec")


def test_only_executed_lines_are_changed() -> None:
    assert {mutation.line for mutation in find_mutations("file.py", SOURCE, {16})} == {16}
    assert {m.line for m in find_mutations("file.py", SOURCE, {18})} == {
        19
    }  # not what stands in the case
    assert Mutation("file.py", 1, "text", 0, 3, "x").apply(b"abcdef") == b"xdef"
