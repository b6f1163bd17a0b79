"""Decoding by engines: a stand-in through the whole seam, counts by hand, faults in one line."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from eagle3fn.base.errors import UserError
from eagle3fn.base.sampling import Sampling
from eagle3fn.engines import decoding
from eagle3fn.engines.decoding import (
    Counts,
    Decoder,
    DecoderSettings,
    EngineAnswer,
    decode_all,
    kept_accepted,
    open_decoder,
    total,
    verifications,
)
from tests.engines.stand_ins import fake_programs

SETTINGS = DecoderSettings(max_length=40, end_tokens=(2,), draft_length=2)


@pytest.fixture(autouse=True)
def stand_in(tmp_path, monkeypatch):
    """Let the programs of all engines be the stand-in."""
    fake_programs(tmp_path, monkeypatch)


def begin(tmp_path: Path, draft: str | None = "draft", **arguments: object) -> Decoder:
    settings = DecoderSettings(40, (2,), 2, arguments=arguments)
    log = tmp_path / "log"
    return open_decoder("vllm", sys.executable, "target", draft, settings, log)


def program(name: str) -> ModuleType:
    """A file of `engines/programs/`, loaded as its engine's Python does."""
    path = Path(decoding.__file__).parent / "programs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tokens_and_counts_arrive_by_prompt(tmp_path):
    done = []
    with begin(tmp_path) as decoder:
        run = decode_all(decoder, [[5], [7, 9]], 6, on_done=done.append)
    assert (run.engine, run.version) == ("vllm", "2030.1")
    assert run.answers[0].tokens == [16, 49, 20, 61, 56, 41]

    # Rounds accept 0, 1 and 2 drafted tokens and emit one more each: one of the six is cut off.
    assert run.answers[0].counts == Counts(3, 6, 3, [3, 3], [2, 1])
    assert done == [1, 2]
    with begin(tmp_path, draft=None) as decoder:
        plain = decode_all(decoder, [[5]], 6)
    assert plain.answers[0] == EngineAnswer([16, 49, 20, 61, 56, 41], None, 1.0)


def test_positions_have_room_for_two_whole_rounds_at_the_end():
    assert SETTINGS.positions == 40 + 3 + 3


@pytest.mark.parametrize(
    ("tokens", "counts", "runs", "kept"),
    [
        # The prefill's token, rounds that emit 1, 2 and 3: nothing is cut off.
        (7, Counts(3, 6, 3), 3, 3),
        # At the limit of 7 two were cut off; ours would have drafted two less.
        (7, Counts(3, 6, 5), 3, 3),
        # An end token as the first of the last round: of its two accepted tokens it is one.
        (5, Counts(3, 6, 3), 3, 2),
        # An end token as the last of its round is the target's own.
        (6, Counts(3, 6, 2), 3, 2),
        # llama.cpp: the last token came from a run that verified nothing.
        (7, Counts(3, 6, 2), 4, 2),
        (1, Counts(0, 0, 0), 0, 0),
        (7, Counts(), None, None),
        (7, None, 6, None),
    ],
)
def test_counts_as_ours_by_hand(tokens, counts, runs, kept):
    answer = EngineAnswer(list(range(tokens)), counts, 1.0)
    assert verifications(answer) == runs
    assert kept_accepted(answer, max_new=7) == kept


def test_totals_are_unknown_where_one_answer_is():
    one = EngineAnswer([1, 2], Counts(1, 2, 1, [1, 1], [1, 0]), 1.0)
    other = EngineAnswer([1, 2], Counts(2, 4, 1, None, [0, 1]), 1.0)
    assert total([one, other]) == Counts(3, 6, 2, None, [1, 1])
    assert total([one, EngineAnswer([1], Counts(), 1.0)]) == Counts()


# Faults


def test_a_refused_draft_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^vllm: RuntimeError: no such draft: fc.weight has the"):
        begin(tmp_path, refuses=True)


def test_an_old_engine_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"vllm 0\.9 .*too old, 1 or later"):
        begin(tmp_path, version="0.9")


def test_an_engine_that_leaves_the_draft_out_is_a_fault(tmp_path):
    with begin(tmp_path, ignores=True) as decoder:
        with pytest.raises(UserError, match=r"vllm: drafted nothing, so it did not take the draft"):
            decode_all(decoder, [[5]], 6)

        # Two tokens need no draft, and say nothing.
        assert len(decode_all(decoder, [[5]], 2).answers[0].tokens) == 2


def test_an_engine_that_samples_wrongly_with_a_draft_is_not_asked(tmp_path):
    with begin(tmp_path, greedy=True) as decoder:
        with pytest.raises(UserError, match=r"vllm 2030.1: samples wrongly with a draft"):
            decoder.decode([5], 6, Sampling(0.5))
        assert len(decoder.decode([5], 6).tokens) == 6
    with begin(tmp_path, draft=None, greedy=True) as decoder:
        assert len(decoder.decode([5], 6, Sampling(0.5)).tokens) == 6


def test_an_engine_that_dies_is_named(tmp_path):
    with (
        begin(tmp_path, dies=True) as decoder,
        pytest.raises(UserError, match=r"^vllm: ended with exit code 7 .at work."),
    ):
        decoder.decode([5], 6)


# What the programs do with what the engines say


def test_vllm_counts_are_differences_of_its_counters():
    vllm = program("vllm_decode")
    names = (vllm.ROUNDS, vllm.DRAFTED, vllm.ACCEPTED, vllm.BY_POSITION)
    before: dict[str, Any] = dict(zip(names, (10, 20, 5, [4, 1]), strict=True))
    after: dict[str, Any] = dict(zip(names, (13, 26, 8, [6, 2]), strict=True))
    assert Counts(**vllm.difference(before, after, 2)) == Counts(3, 6, 3, [3, 3], [2, 1])

    # A round that drafted less: which positions, it does not say.
    after[vllm.DRAFTED] = 25
    assert Counts(**vllm.difference(before, after, 2)) == Counts(3, 5, 3, None, [2, 1])


METRICS = """# HELP llamacpp:spec_decode_num_drafts_total verification steps
llamacpp:n_decode_total 10
llamacpp:spec_decode_num_draft_tokens_total 27
llamacpp:spec_decode_num_accepted_tokens_total 3
llamacpp:spec_decode_num_drafts_total 8
llamacpp:spec_decode_num_accepted_tokens_per_pos_total{position="0"} 2
llamacpp:spec_decode_num_accepted_tokens_per_pos_total{position="1"} 1
"""


class Server:
    """llama.cpp's server, of which only the metrics are asked."""

    def __init__(self, text: str) -> None:
        self.text = text

    def handle_metrics(self) -> str:
        return self.text


def test_llamacpp_counts_are_read_from_its_metrics():
    llamacpp = program("llamacpp_decode")
    before = llamacpp.metrics(Server(METRICS.split("llamacpp:spec", maxsplit=1)[0]))
    after = llamacpp.metrics(Server(METRICS))
    assert Counts(**llamacpp.difference(before, after, 2)) == Counts(8, 27, 3, None, [2, 1])

    # A server without counts by position.
    fewer = llamacpp.metrics(
        Server(METRICS.split("llamacpp:spec_decode_num_accepted_tokens_per", maxsplit=1)[0])
    )
    assert Counts(**llamacpp.difference(before, fewer, 2)) == Counts(8, 27, 3, None, None)


def test_llamacpp_settings_that_are_not_there_are_refused():
    llamacpp = program("llamacpp_decode")

    class Parameters:
        n_ctx = 1

    llamacpp.put(Parameters, "n_ctx", 3)
    assert Parameters.n_ctx == 3
    for name in ("cpu.n_threads", "n_threads"):
        with pytest.raises(ValueError, match=rf"takes no {name} = 3"):
            llamacpp.put(Parameters, name, 3)


def test_llamacpp_answers_end_with_the_first_end_token():
    llamacpp = program("llamacpp_decode")
    assert llamacpp.until_end([5, 2, 7], [2, 9]) == [5, 2]
    assert llamacpp.until_end([5, 7], [2]) == [5, 7]
