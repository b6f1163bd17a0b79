"""Logits of a draft in another program: what it is given, what it answers, what is refused."""

import sys

import pytest
import torch

from eagle3fn.base.errors import UserError
from eagle3fn.engines import logits, process
from eagle3fn.engines.logits import Chain, LogitSettings, open_logits

PROGRAM = """
import sys
sys.path.insert(0, {programs!r})
from answering import serve

def start(settings):
    from safetensors.torch import load_file, save_file
    import torch

    def answer(request):
        found = {{
            "aux": torch.full((len(request["prompt"]), 6), float(settings["taps"][2])),
            "next_ids": torch.tensor(request["prompt"]),
            "drafted": torch.arange(settings["draft_length"]),
        }}
        if "rows" in request:
            found = load_file(request["rows"])
        steps = len(found["drafted"]) - (settings["arguments"].get("short") or 0)
        save_file({{**found, "logits": torch.ones(steps, 5)}}, request["out"])
        return {{"out": request["out"]}}

    return {{"version": "7.8"}}, answer

if __name__ == "__main__":
    serve(start)
"""

CHAIN = Chain(torch.rand(3, 6), torch.tensor([4, 5, 6]), torch.tensor([7, 8]))


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Starts the stand-in as one of the engines."""
    text = PROGRAM.format(programs=str(process.PROGRAMS))
    for known in logits.ENGINES.values():
        (tmp_path / known.program).write_text(text)
    monkeypatch.setattr(process, "PROGRAMS", tmp_path)

    def started(engine: str, **arguments):
        settings = LogitSettings(64, 2, (1, 3, 4), threads=1, arguments=arguments)
        return open_logits(engine, sys.executable, "target", "draft", settings, tmp_path / "log")

    return started


@pytest.mark.parametrize("engine", ["speculators", "eagle"])
def test_a_program_of_a_draft_alone_is_given_the_rows(begin, engine):
    with begin(engine) as held:
        chain, found = held.logits([1, 2, 3], CHAIN)
    assert held.version == "7.8"
    assert held.given
    assert all(torch.equal(left, right) for left, right in zip(chain, CHAIN, strict=True))
    assert found.shape == (2, 5)


def test_a_program_of_both_says_on_which_rows_its_draft_ran(begin):
    with begin("vllm") as held:
        chain, _ = held.logits([1, 2, 3, 9], CHAIN)
    assert not held.given
    assert torch.equal(chain.aux, torch.full((4, 6), 4.0))
    assert chain.next_ids.tolist() == [1, 2, 3, 9]


def test_logits_of_other_steps_are_refused(begin):
    with begin("speculators", short=1) as held, pytest.raises(UserError, match="gave logits"):
        held.logits([1, 2, 3], CHAIN)


def test_rows_that_share_memory_are_given_too(begin):
    whole = torch.rand(5, 6)
    given = CHAIN._replace(aux=whole[1:4].t().contiguous().t(), drafted=torch.arange(9)[3:5])
    with begin("eagle") as held:
        chain, _ = held.logits([1], given)
    assert torch.equal(chain.aux, whole[1:4])
    assert chain.drafted.tolist() == [3, 4]


def test_a_closed_engine_leaves_no_program_and_no_folder(begin):
    held = begin("eagle")
    held.logits([1, 2, 3], CHAIN)
    program, folder = held._process._process, held._folder
    assert folder.is_dir() and program.poll() is None
    for _ in range(2):
        held.close()
        assert not folder.exists() and program.poll() is not None
