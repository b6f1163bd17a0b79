"""Decoding by a serving engine, with a draft or plainly, one prompt at a time.

    with open_decoder("vllm", python, target, draft, settings, log) as decoder:
        answer = decoder.decode(prompt_ids, 128)
        answer.tokens, answer.counts

Counts are the engine's own: of a last round that goes beyond an end token or the limit, all drafted
and accepted tokens count. `kept_accepted` gives the number as `use.decode` counts it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from eagle3fn.base.errors import UserError
from eagle3fn.base.sampling import GREEDY, Sampling
from eagle3fn.engines.process import (
    ANSWER_SECONDS,
    EngineClient,
    EngineProcess,
    engine_version,
)


class Counts(NamedTuple):
    """What an engine counted for one answer, or for several; None: it does not tell.

    Attributes:
        rounds: runs of the target that verified at least one drafted token.
        drafted: tokens that were drafted.
        accepted: drafted tokens that agreed with the target, also those after the answer's end.
        drafted_by_position: as `drafted`, for each draft position.
        accepted_by_position: as `accepted`, for each draft position.
    """

    rounds: int | None = None
    drafted: int | None = None
    accepted: int | None = None
    drafted_by_position: list[int] | None = None
    accepted_by_position: list[int] | None = None


class EngineAnswer(NamedTuple):
    """One decoded answer.

    `tokens` begins with the prefill's and ends with the first end token, if one came.
    """

    tokens: list[int]
    counts: Counts | None  # None: decoded plainly
    seconds: float  # in the engine, prefill included


class EngineRun(NamedTuple):
    """Several prompts decoded by one engine, in order."""

    engine: str
    version: str
    answers: list[EngineAnswer]


@dataclass(frozen=True)
class DecoderSettings:
    """What an engine starts with.

    Attributes:
        max_length: tokens of the longest prompt and its answer. The engine gets room for two whole
            rounds more (`positions`): vLLM does not draft where the rows of the last round and
            those of the next would not fit.
        end_tokens: decoding stops after the first of these (`data.target.stop_ids`).
        draft_length: tokens drafted in a round; without meaning where nothing is drafted.
        dtype: what target and draft compute in; "auto" leaves it to the engine.
        arguments: further arguments of the engine's own, by its names.
    """

    max_length: int
    end_tokens: tuple[int, ...]
    draft_length: int = 7
    dtype: str = "float32"
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def positions(self) -> int:
        """Tokens that the engine has room for."""
        return self.max_length + 2 * (self.draft_length + 1)


class Engine(NamedTuple):
    """What is known of an engine before it starts."""

    program: str  # file of `engines/programs/`
    oldest: tuple[int, ...]
    environment: dict[str, str]


ENGINES = {
    "vllm": Engine(
        "vllm_decode.py",
        (0, 18),
        {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"},
    ),
    "llamacpp": Engine("llamacpp_decode.py", (2026,), {}),
    "eagle": Engine("eagle_decode.py", (), {"HF_HUB_OFFLINE": "1"}),  # its version is a commit
}


class Decoder(EngineClient):
    """An engine that holds a target, and a draft if it was given one; a context manager."""

    def __init__(self, engine: str, version: str, process: EngineProcess, speculates: bool) -> None:
        self.engine = engine
        self.version = version
        self.facts = process.facts
        self.speculates = speculates
        super().__init__(process)

    def decode(
        self,
        prompt_ids: Sequence[int],
        max_new: int,
        sampling: Sampling = GREEDY,
        seconds: float = ANSWER_SECONDS,
    ) -> EngineAnswer:
        """Decode at most `max_new` tokens after `prompt_ids`.

        Args:
            prompt_ids: token ids.
            max_new: at most so many tokens, the prefill's included.
            sampling: greedy by default.
            seconds: the longest time for the answer.

        Raises:
            UserError: the engine cannot sample with a draft, reports a fault, died, or took too
                long.
        """
        if self.speculates and sampling.temperature > 0 and not self.facts.get("samples", True):
            raise UserError(
                f"{self.engine} {self.version}: samples wrongly with a draft on this device (its "
                "temperature is lost there); decode greedily, without --temperature"
            )
        request = {"prompt": list(prompt_ids), "max_new": max_new, **sampling._asdict()}
        found = self._process.ask(request, seconds)
        counts = found["counts"]
        if counts is not None:
            counts = Counts(**counts)
        return EngineAnswer(found["tokens"], counts, found["seconds"])

    def check_drafted(self, answers: Sequence[EngineAnswer]) -> None:
        """Refuse answers without a drafted token: llama.cpp goes on without a draft it cannot use.

        Answers of two tokens may need none.

        Raises:
            UserError: nothing was drafted though a draft was given.
        """
        long = any(len(one.tokens) > 2 for one in answers)
        if self.speculates and long and total(answers).drafted == 0:
            raise UserError(
                f"{self.engine}: drafted nothing, so it did not take the draft; "
                f"see {self._process.log} and check that the draft is an EAGLE-3 draft of this "
                "target"
            )


def open_decoder(
    engine: str,
    python: str | Path,
    target: str | Path,
    draft: str | Path | None,
    settings: DecoderSettings,
    log: str | Path,
) -> Decoder:
    """Start an engine with a target, and with a draft unless it is None.

    Args:
        engine: a key of `ENGINES`.
        python: the Python of an environment that has it.
        target: folder, id or file that the engine loads.
        draft: exported folder or file that the engine loads.
        settings: what it starts with.
        log: file for what the engine prints; replaced.

    Raises:
        UserError: the engine is missing or too old, refuses target or draft, or dies.
    """
    known = ENGINES[engine]
    values = {
        "target": str(target),
        "draft": None if draft is None else str(draft),
        "draft_length": settings.draft_length,
        "positions": settings.positions,
        "end_tokens": list(settings.end_tokens),
        "dtype": settings.dtype,
        "arguments": dict(settings.arguments),
    }
    process = EngineProcess(
        engine, python, known.program, values, log, environment=known.environment
    )
    try:
        version = engine_version(process.facts, known.oldest, engine, str(python))
    except UserError:
        process.close()
        raise
    return Decoder(engine, version, process, draft is not None)


def decode_all(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new: int,
    sampling: Sampling = GREEDY,
    on_done: Callable[[int], None] = lambda number: None,
) -> EngineRun:
    """Decode prompts one at a time. A short answer before them, which counts nowhere, warms up.

    `on_done` is called with the number of prompts done.

    Raises:
        UserError: as `Decoder.decode`, or the engine decoded without the draft.
    """
    decoder.check_drafted([decoder.decode(prompts[0], min(max_new, 8), sampling)])
    answers = []
    for number, prompt in enumerate(prompts, 1):
        answers.append(decoder.decode(prompt, max_new, sampling))
        on_done(number)
    decoder.check_drafted(answers)
    return EngineRun(decoder.engine, decoder.version, answers)


# Numbers over answers


def verifications(answer: EngineAnswer) -> int | None:
    """Runs of the target after the prefill; None where the engine does not tell.

    A round emits its accepted tokens and one of the target's, the prefill emits one. What is left
    of the answer came one by one, from runs that verified no drafted token.
    """
    counts = answer.counts
    if counts is None:
        return len(answer.tokens) - 1
    if counts.rounds is None or counts.accepted is None:
        return None
    alone = len(answer.tokens) - 1 - counts.rounds - counts.accepted
    return counts.rounds + max(alone, 0)


def kept_accepted(answer: EngineAnswer, max_new: int) -> int | None:
    """The accepted tokens as `use.decode` counts them: none after an end token or the limit.

    Engines that draft beyond the limit accept `1 + rounds + accepted - len(tokens)` tokens that
    are cut off. At the limit `use.decode` drafts less, so that the last token is the target's; an
    end token inside a round is a drafted one.

    None where the engine does not tell rounds or accepted tokens.
    """
    counts = answer.counts
    if counts is None or counts.rounds is None or counts.accepted is None:
        return None
    cut = 1 + counts.rounds + counts.accepted - len(answer.tokens)
    if len(answer.tokens) < max_new:
        cut -= 1
    return counts.accepted - max(cut, 0)


def total(answers: Sequence[EngineAnswer]) -> Counts:
    """The counts of all answers together; None for what one of them lacks."""
    found = [answer.counts or Counts() for answer in answers]
    return Counts(
        rounds=_sum([one.rounds for one in found]),
        drafted=_sum([one.drafted for one in found]),
        accepted=_sum([one.accepted for one in found]),
        drafted_by_position=_sums([one.drafted_by_position for one in found]),
        accepted_by_position=_sums([one.accepted_by_position for one in found]),
    )


def _sum(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _sums(rows: Sequence[Sequence[int] | None]) -> list[int] | None:
    known = [row for row in rows if row is not None]
    if len(known) < len(rows):
        return None
    return [sum(column) for column in zip(*known, strict=True)]
