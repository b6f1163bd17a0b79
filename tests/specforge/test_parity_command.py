"""`eagle3fn parity`: what it prints, what it finds, and where a difference begins.

Also SpecForge as a side of `assert_equivalent`, and the messages without SpecForge.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given

import eagle3fn as e3
from eagle3fn.base.dtypes import wide
from eagle3fn.base.weights import Weights
from eagle3fn.cli import main
from eagle3fn.model import plain, table
from eagle3fn.model.forward import ForwardLoss
from eagle3fn.specforge import bisect
from eagle3fn.specforge import oracle as oracle_file
from eagle3fn.specforge.arithmetic import SPECFORGE, forward_loss, kl_loss
from eagle3fn.specforge.cases import for_specforge, specforge_cases
from eagle3fn.specforge.oracle import ENVIRONMENT, LK, Oracle, OracleMissingError, side
from eagle3fn.specforge.parity import counts
from eagle3fn.testing import Case, assert_equivalent
from eagle3fn.testing.strategies import LOSS_SUMS, drawn
from tests.specforge.helpers import loss_with

SPECFORGES_LOSS: dict[Any, str] = {
    "nla": "lk_alpha",
    "lk": "lk_lambda",
    LOSS_SUMS[1]: "lk_lambda",
}  # the others become the KL
"""Of each of our losses, the nearest that SpecForge has."""

CASE = Case(steps=3, dtype="bfloat16", loss="lk_lambda", lengths=(8, 6))


def last_line(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


def test_the_last_line_is_the_summary(oracle: Oracle, capsys):
    assert main(["parity", "--cases", "25", "--seed", "4", "--json"]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1
    found = last_line(printed.out)
    assert list(found) == ["oracle", "cases", "nontrivial", "equal", "first_difference"]
    assert found["oracle"] == {
        "name": "SpecForge",
        "kind": oracle.kind,
        "sha256": oracle.digest,
        "level": 2,
    }
    assert found["cases"] == found["equal"] == 25 and found["nontrivial"] >= 20
    assert found["first_difference"] is None

    lines = {line.split(":")[0]: line for line in printed.err.splitlines()}
    for name in ("dtype", "loss", "K"):
        numbers = [int(part.split()[-1]) for part in lines[name].split(":")[1].split(",")]
        assert sum(numbers) == 25
    assert "level 2" in lines
    assert all(digest[:16] in printed.err for digest in oracle.hashes.values())


def test_without_json_the_last_line_is_text(oracle: Oracle, capsys):
    assert main(["parity", "--cases", "3", "--seed", "1"]) == 0
    assert capsys.readouterr().out.strip().endswith("non-trivial")


def wrong_norm(x, weight, eps):
    scale = torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) * 1.01 + eps)
    return weight * (wide(x) * scale).to(x.dtype)


def test_a_difference_is_counted_named_and_repeated(oracle: Oracle, capsys, monkeypatch):
    monkeypatch.setattr(plain, "rms_norm", wrong_norm)
    assert main(["parity", "--cases", "10", "--json", "--bisect"]) == 1
    printed = capsys.readouterr()
    found = last_line(printed.out)
    assert found["equal"] < 10
    first = found["first_difference"]
    assert first["step"] == 0 and first["leaf"] == table.INPUT_NORM and first["ulps"] > 0
    assert first["operation"] == "scaling by the root mean square"
    code = printed.err.split("to repeat it:\n")[1]
    with pytest.raises(AssertionError, match="not equal"):
        exec(compile(code, "snippet", "exec"), {})
    assert main(["parity", "--cases", "10", "--json"]) == 1
    assert last_line(capsys.readouterr().out)["first_difference"].keys() == {"case", "leaf", "ulps"}


def place(
    oracle: Oracle, function: ForwardLoss = forward_loss, case: Case = CASE
) -> tuple[int, str, str]:
    """Unroll step, operation and leaf at which a function first differs from SpecForge."""
    found = bisect.first_difference(case, bisect.ours(function), bisect.theirs(oracle))
    assert found is not None and found.ulps > 0
    return found.step, found.operation, found.leaf


def test_equal_runs_have_no_first_difference(oracle: Oracle):
    assert bisect.first_difference(CASE, bisect.ours(), bisect.theirs(oracle)) is None


@pytest.mark.parametrize("tied", [False, True])
def test_a_fault_at_the_first_weight_is_found_there(oracle: Oracle, monkeypatch, tied):
    """With a tied head too, whose product with the target's states is no step of the draft."""
    monkeypatch.setattr(plain, "rms_norm", wrong_norm)
    expected = (0, "scaling by the root mean square", table.INPUT_NORM)
    assert place(oracle, case=replace(CASE, tied=tied)) == expected


def test_a_fault_in_attention_is_found_at_its_step(oracle: Oracle):
    def late(query, keys, values, mask):
        out = plain.attend(query, keys, values, mask)
        return out * 1.01 if len(keys) == 2 else out

    function = loss_with(ops=SPECFORGE._replace(attend=late))
    step, operation, leaf = place(oracle, function)
    assert (step, leaf) == (1, table.O)
    assert operation == "attention: rotated queries and keys, scores, softmax, values"


def test_a_fault_in_the_loss_is_found_at_its_step(oracle: Oracle):
    def biased(logits, p_draft, mask, count):
        return kl_loss(logits, p_draft, mask, count) * 1.001

    assert place(oracle, loss_with(biased)) == (0, "loss and metrics", "losses")


def test_a_fault_in_a_gradient_alone_is_found_at_its_step(oracle: Oracle):
    """Same values forward, another gradient, in the second step alone."""
    calls = 0

    def bent(logits, p_draft, mask, count):
        nonlocal calls
        calls += 1
        bend = 1.5 if calls == 2 else 1.0
        return kl_loss(logits.detach() + (logits - logits.detach()) * bend, p_draft, mask, count)

    def function(params, batch, *, config, frozen, loss=None):
        nonlocal calls
        calls = 0
        run = loss_with(bent)
        return run(params, batch, config=config, frozen=frozen)

    case = replace(CASE, loss="kl", dtype="float32")
    assert place(oracle, function, case) == (1, "backward", table.HEAD)


def test_a_metric_is_compared(oracle: Oracle):
    def miscounted(params, batch, *, config, frozen, loss=None):
        loss, aux = forward_loss(params, batch, config=config, frozen=frozen)
        return loss, aux._replace(correct=aux.correct + 1)

    assert place(oracle, miscounted) == (0, "loss and metrics", "correct")


def test_our_objective_is_equivalent_to_specforge(oracle: Oracle):
    assert_equivalent(forward_loss, against=side(), cases=30, seed=1)


def test_the_plain_kl_is_equivalent_to_specforge(oracle: Oracle):
    """Its other losses are means over a batch, and SpecForge's alone."""
    assert_equivalent(e3.forward_loss, against=side(), cases=30, seed=1, loss="kl")


def test_a_difference_from_specforge_is_repeated_by_its_snippet(oracle: Oracle):
    def doubled(params, batch, *, config, frozen, loss=None):
        loss, aux = forward_loss(params, batch, config=config, frozen=frozen)
        return loss * 2, aux

    with pytest.raises(AssertionError, match="loss: ") as failure:
        assert_equivalent(doubled, against=side(), cases=20, dtype="bfloat16")
    code = str(failure.value).split("to repeat it:\n")[1]
    assert code.endswith("against=side())")
    assert code.index("os.environ") < code.index("import side")
    with pytest.raises(AssertionError, match="loss: "):
        exec(compile(code, "snippet", "exec"), {"doubled": doubled})


def test_the_side_without_specforge_names_what_to_install(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("SPECFORGE_SRC", str(tmp_path))
    oracle_file._load.cache_clear()
    try:
        with pytest.raises(OracleMissingError, match="SPECFORGE_SRC"):
            side()
    finally:
        oracle_file._load.cache_clear()


@given(specforge_cases())
def test_specforge_cases_are_those_that_it_can_run(case: Case):
    assert case.target_hidden == case.hidden
    assert case.normalization == "rows"
    assert case.loss in oracle_file.LK
    assert for_specforge(case) == case


def test_adapted_cases_keep_all_other_fields():
    for case in drawn(20, 0):
        changed = for_specforge(case)
        expected = replace(
            case,
            target_hidden=case.hidden,
            normalization="rows",
            loss=SPECFORGES_LOSS.get(case.loss, "kl"),
            switches=(),
            taps=3,
        )
        assert changed == expected


def test_cases_are_counted_by_losses_and_sums_of_them():
    sum_of = Weights({"tv": 0.9, "ce": 0.1})
    cases = [Case(loss=loss) for loss in ("kl", sum_of, "ce", "kl", sum_of)]
    found = counts([*cases, Case(steps=12), Case(steps=2)])
    assert found["loss"] == {"ce": 1, "kl": 4, "{'ce': 0.1, 'tv': 0.9}": 2}
    assert list(found["K"]) == ["2", "3", "12"]


def test_a_loss_that_is_specforges_stays():
    for loss in LK:
        assert for_specforge(Case(loss=loss)) == Case(loss=loss)


def in_process(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, without the oracle's environment."""
    settings = dict(os.environ)
    for name in (*ENVIRONMENT, "SPECFORGE_SRC"):
        settings.pop(name, None)
    command = [sys.executable, "-m", "eagle3fn.cli", "parity", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=settings | environment
    )


def test_the_environment_is_set_before_torch(oracle: Oracle):
    source = os.environ.get("SPECFORGE_SRC", "")
    done = in_process(["--cases", "2", "--seed", "2", "--json"], SPECFORGE_SRC=source)
    assert done.returncode == 0, done.stderr
    assert last_line(done.stdout)["equal"] == 2


def test_specforge_that_cannot_be_loaded_is_none(tmp_path: Path):
    """With other versions of its dependencies it fails in other ways than by an import."""
    (tmp_path / "specforge").mkdir()
    (tmp_path / "specforge" / "optimizer.py").touch()
    (tmp_path / "specforge" / "__init__.py").write_text(
        "raise AttributeError('not in this version')"
    )
    done = in_process(["--cases", "2"], SPECFORGE_SRC=str(tmp_path))
    assert done.returncode == 3 and "AttributeError: not in this version" in done.stderr


def test_without_specforge_the_message_names_what_to_install(tmp_path: Path):
    done = in_process(["--cases", "2"], SPECFORGE_SRC=str(tmp_path))
    assert done.returncode == 3
    for text in ("SPECFORGE_SRC", "specforge==0.2.0", "yunchang==0.6.4", "triton==3.8.0"):
        assert text in done.stderr
