"""The nightly shards and the seeded mutations: what they keep, repeat, draw and leave out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

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


def call(out: Path, *more: str) -> int:
    return nightly.main(["--cases", "7", "--shards", "3", "--seed", "5", "--out", str(out), *more])


def result(path: Path) -> dict[str, Any]:
    """A shard's file without the time that it took."""
    return {
        name: value for name, value in json.loads(path.read_text()).items() if name != "seconds"
    }


def test_finished_shards_are_not_repeated(
    oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert call(tmp_path) == 0
    total = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (total["cases"], total["equal"], total["first_difference"]) == (7, 7, None)
    assert total["oracle"]["sha256"] == oracle.digest
    assert sum(total["counts"]["K"].values()) == 7

    paths = [tmp_path / f"shard-{number:04}.json" for number in range(3)]
    shards = [result(path) for path in paths]
    places = [(shard["key"]["first"], shard["key"]["last"]) for shard in shards]
    assert places == [(0, 1), (2, 3), (4, 6)]

    def written() -> list[int]:
        return [path.stat().st_mtime_ns for path in paths]

    # One is missing, one was made with other sources; then both are damaged.
    other_key = shards[2]["key"] | {"sha256": "other sources"}
    for second, third in (
        (None, json.dumps(shards[2] | {"key": other_key})),
        (paths[1].read_text()[:50], "[]"),
    ):
        paths[1].unlink()
        if second is not None:
            paths[1].write_text(second)
        paths[2].write_text(third)
        kept = paths[0].stat().st_mtime_ns
        assert call(tmp_path) == 0
        assert written()[0] == kept
        assert [result(path) for path in paths] == shards
        assert "1 of 3 shards are finished" in capsys.readouterr().out

    before = written()
    assert call(tmp_path) == 0
    assert written() == before
    assert "3 of 3 shards are finished" in capsys.readouterr().out


def test_shards_have_the_cases_of_parity() -> None:
    listed = [for_specforge(case) for case in drawn(7, 5)]
    assert nightly.cases_of(5, range(2, 4)) + nightly.cases_of(5, range(4, 7)) == listed[2:]


def test_a_difference_is_kept_with_its_place(
    oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SpecForge's norms are given another epsilon."""

    def other_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 0.03)
        return self.weight * scaled.to(x.dtype)

    monkeypatch.setattr(oracle.draft.LlamaRMSNorm, "forward", other_norm)
    assert call(tmp_path) == 1
    total = json.loads((tmp_path / "summary.json").read_text())
    assert total["equal"] == 0
    difference = total["first_difference"]
    assert difference["leaf"] == "midlayer.input_layernorm.weight"
    assert difference["step"] == 0


def test_more_shards_than_cases_are_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        nightly.parse(["--cases", "3", "--shards", "4", "--out", "x"])
    assert "--shards 4: must be between 1 and --cases 3" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-1", "1000000"])
def test_a_count_that_cannot_be_drawn_is_refused(count: str, capsys: pytest.CaptureFixture) -> None:
    found = find_mutations("file.py", SOURCE, set(range(1, 30)))
    assert mutate.run(mutate.parse(["--count", count]), found) == 2
    assert "must be between 1 and 5" in capsys.readouterr().err


def test_the_same_mutations_are_drawn_for_the_same_seed() -> None:
    found = find_mutations("file.py", SOURCE, set(range(1, 30)))
    drawn_ones = mutate.draw(found, 4, 7)
    assert drawn_ones == mutate.draw(found, 4, 7)
    assert len({mutation.line for mutation in drawn_ones}) == 4
    assert any(mutate.draw(found, 4, seed) != drawn_ones for seed in range(5))


def test_mutated_tests_find_specforge_by_a_relative_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run in another folder; without SpecForge there they would be skipped, and pass."""
    monkeypatch.setenv("SPECFORGE_SRC", "SpecForge")
    assert mutate.environment()["SPECFORGE_SRC"] == str(Path.cwd() / "SpecForge")
    monkeypatch.delenv("SPECFORGE_SRC")
    assert "SPECFORGE_SRC" not in mutate.environment()


def test_files_and_tests_of_the_mutations_exist() -> None:
    for file in mutate.FILES:
        assert (mutate.ROOT / file).is_file(), file
    for test in mutate.TESTS:
        file, _, name = test.partition("::")
        assert name in (mutate.ROOT / file).read_text(), test


def test_changed_lines_are_shown() -> None:
    before = b"a\n  b = 1\nc\n"
    assert mutate.changed_lines(before, b"a\n  b = 2\nc\n") == ("b = 1", "b = 2")
    assert mutate.changed_lines(before, b"a\n  b = (\n    2)\nc\n") == ("b = 1", "b = ( 2)")


def test_mutations_leave_out_refusals_texts_and_annotations() -> None:
    found = find_mutations("file.py", SOURCE, set(range(1, 30)))
    assert {mutation.line for mutation in found} == {15, 16, 17, 19, 20}

    texts = set()
    for mutation in found:
        changed = mutation.apply(SOURCE)
        assert changed != SOURCE
        compile(changed, "file.py", "exec")
        texts.add((mutation.kind, changed.decode().splitlines()[mutation.line - 1].strip()))
    assert ("without the last argument", "total: float = scale(x, device=x.device)") in texts
    assert ("arguments swapped", "total: float = scale(2, x, device=x.device)") in texts
    assert ("another operator", "total = (total * 2)") in texts
    assert ("statement left out", "pass") in texts
    assert ("another constant", "unused = x * 8") in texts
    assert not any("device" in kind for kind, _ in texts)


def test_only_executed_lines_are_changed() -> None:
    assert {mutation.line for mutation in find_mutations("file.py", SOURCE, {16})} == {16}
    # Of a statement its own line, not those of statements within it.
    assert {mutation.line for mutation in find_mutations("file.py", SOURCE, {18})} == {19}
    assert Mutation("file.py", 1, "text", 0, 3, "x").apply(b"abcdef") == b"xdef"
