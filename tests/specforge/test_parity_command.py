"""`eagle3fn parity`: what it prints, what it finds, where a difference begins, and what it says without an old tool."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eagle3fn.base.types import Aux
from eagle3fn.cli import main
from eagle3fn.model import attention, forward, layers, losses, table
from eagle3fn.specforge import bisect
from eagle3fn.specforge.oracle import ENVIRONMENT, Oracle
from eagle3fn.testing.builders import Case

CASE = Case(steps=3, dtype="bfloat16", loss="lk_lambda", lengths=(8, 6))


def last_line(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


def test_the_last_line_is_the_summary(oracle: Oracle, capsys):
    assert main(["parity", "--cases", "25", "--seed", "4", "--json"]) == 0
    out = capsys.readouterr().out
    found = last_line(out)
    assert list(found) == ["oracle", "cases", "nontrivial", "equal", "first_difference"]
    assert found["oracle"] == {
        "name": "SpecForge",
        "kind": oracle.kind,
        "sha256": oracle.digest,
        "level": 2,
    }
    assert found["cases"] == found["equal"] == 25 and found["nontrivial"] >= 20
    assert found["first_difference"] is None
    told = {line.split(":")[0]: line for line in out.splitlines()}
    for name in ("dtype", "loss", "K"):
        assert sum(int(part.split()[-1]) for part in told[name].split(":")[1].split(",")) == 25
    assert "level 2" in told and all(digest[:16] in out for digest in oracle.hashes.values())


def test_without_json_the_last_line_is_text(oracle: Oracle, capsys):
    assert main(["parity", "--cases", "3", "--seed", "1"]) == 0
    assert capsys.readouterr().out.strip().endswith("non-trivial")


def wrong_norm(x, weight, eps):
    wide = x.to(layers.at_least_fp32(x.dtype))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) * 1.01 + eps)).to(
        x.dtype
    )


def test_a_difference_is_counted_named_and_repeated(oracle: Oracle, capsys, monkeypatch):
    monkeypatch.setattr(layers, "rms_norm", wrong_norm)
    assert main(["parity", "--cases", "10", "--json", "--bisect"]) == 1
    out = capsys.readouterr().out
    found = last_line(out)
    assert found["equal"] < 10
    first = found["first_difference"]
    assert first["step"] == 0 and first["leaf"] == table.INPUT_NORM and first["ulps"] > 0
    assert first["operation"] == "scaling by the root mean square"
    code = out.split("to repeat it:\n")[1].rsplit("\n", 2)[0]
    with pytest.raises(AssertionError, match="not equal"):
        exec(compile(code, "snippet", "exec"), {})
    assert main(["parity", "--cases", "10", "--json"]) == 1
    assert last_line(capsys.readouterr().out)["first_difference"].keys() == {"case", "leaf", "ulps"}


def place(oracle: Oracle, case: Case = CASE) -> tuple[int, str, str]:
    found = bisect.first_difference(case, bisect.ours(), bisect.theirs(oracle))
    assert found is not None and found.ulps > 0
    return found[:3]


def test_equal_runs_have_no_first_difference(oracle: Oracle):
    assert bisect.first_difference(CASE, bisect.ours(), bisect.theirs(oracle)) is None


@pytest.mark.parametrize("tied", [False, True])
def test_a_fault_at_the_first_weight_is_found_there(oracle: Oracle, monkeypatch, tied):
    """With a tied head too, whose product with the target's states is no step of the draft."""
    monkeypatch.setattr(layers, "rms_norm", wrong_norm)
    expected = (0, "scaling by the root mean square", table.INPUT_NORM)
    assert place(oracle, replace(CASE, tied=tied)) == expected


def test_a_fault_in_attention_is_found_at_its_step(oracle: Oracle, monkeypatch):
    def late(q, keys, values, mask):
        out = attention.unrolled_attention(q, keys, values, mask)
        return out * 1.01 if len(keys) == 2 else out

    monkeypatch.setattr(forward, "unrolled_attention", late)
    step, operation, leaf = place(oracle)
    assert (step, leaf) == (1, table.O) and operation.startswith("attention")


def test_a_fault_in_the_loss_is_found_at_its_step(oracle: Oracle, monkeypatch):
    plain = losses.kl_loss

    def biased(logits, p, mask, n):
        return plain(logits, p, mask, n) * 1.001

    monkeypatch.setattr(losses, "kl_loss", biased)
    assert place(oracle) == (0, "loss and metrics", "losses")


def test_a_fault_in_a_gradient_alone_is_found_at_its_step(oracle: Oracle, monkeypatch):
    """Same values forward, another gradient, from the second step on."""
    plain = layers.logits
    calls = []

    def bent(params, config, hidden):
        calls.append(hidden)
        out = plain(params, config, hidden)
        return out + (out - out.detach()) * 0.5 if len(calls) % CASE.steps == 2 else out

    monkeypatch.setattr(layers, "logits", bent)

    def run(case: Case):
        calls.clear()
        return bisect.ours()[0](case)

    found = bisect.first_difference(CASE, (run, bisect.ours()[1]), bisect.theirs(oracle))
    assert found is not None and found[:3] == (1, "backward", table.HEAD) and found.ulps > 0


def test_a_metric_is_compared(oracle: Oracle, monkeypatch):
    plain = forward._aux
    monkeypatch.setattr(
        forward,
        "_aux",
        lambda steps: Aux(*(x + 1 if i == 1 else x for i, x in enumerate(plain(steps)))),
    )
    assert place(oracle) == (0, "loss and metrics", "correct")


def in_process(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, without the oracle's environment."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in (*ENVIRONMENT, "SPECFORGE_SRC")
    }
    command = [sys.executable, "-m", "eagle3fn.cli", "parity", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=kept | environment
    )


def test_the_environment_is_set_before_torch(oracle: Oracle):
    source = os.environ.get("SPECFORGE_SRC", "")
    done = in_process(["--cases", "2", "--seed", "2", "--json"], SPECFORGE_SRC=source)
    assert done.returncode == 0, done.stderr
    assert last_line(done.stdout)["equal"] == 2


def test_an_old_tool_that_cannot_be_loaded_is_none(tmp_path: Path):
    """With other versions of its dependencies it fails in other ways than by an import."""
    (tmp_path / "specforge").mkdir()
    (tmp_path / "specforge" / "optimizer.py").touch()
    (tmp_path / "specforge" / "__init__.py").write_text(
        "raise AttributeError('not in this version')"
    )
    done = in_process(["--cases", "2"], SPECFORGE_SRC=str(tmp_path))
    assert done.returncode == 3 and "AttributeError: not in this version" in done.stderr


def test_without_an_old_tool_it_says_what_to_install(tmp_path: Path):
    done = in_process(["--cases", "2"], SPECFORGE_SRC=str(tmp_path))
    assert done.returncode == 3
    for text in ("SPECFORGE_SRC", "specforge==0.2.0", "yunchang==0.6.4", "triton==3.8.0"):
        assert text in done.stderr
