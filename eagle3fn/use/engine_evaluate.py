"""Evaluation of a draft in a serving engine: losslessness, accepted length, tokens a second.

The engine decodes the same prompts plainly and with the draft, one at a time. Its counts are
reported as they are, and the accepted length twice: by `use.evaluate`'s definition and by the
engines' own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eagle3fn.base.draft_json import draft_config_from_json
from eagle3fn.base.errors import UserError
from eagle3fn.base.sampling import GREEDY, Sampling, check_sampling
from eagle3fn.base.sections import require
from eagle3fn.data.target import stop_ids
from eagle3fn.data.target_loading import load_tokenizer
from eagle3fn.data.target_source import loaded_config
from eagle3fn.data.template import ChatTemplate
from eagle3fn.data.user_turns import chat_prompt
from eagle3fn.engines.decoding import (
    ENGINES,
    Counts,
    DecoderSettings,
    EngineAnswer,
    EngineRun,
    decode_all,
    kept_accepted,
    open_decoder,
    total,
    verifications,
)
from eagle3fn.train.drafts import check_files_finite, config_of_draft
from eagle3fn.use.counts import differing_tokens, repeated_share
from eagle3fn.use.decode import check_pair
from eagle3fn.use.evaluate import Progress, check_prompts
from eagle3fn.use.groups import check_categories, describe_groups

SAMPLED = "sampled: not compared token by token"


@dataclass(frozen=True)
class EngineEvalSettings:
    """Which engine decodes, how much, and how.

    Attributes:
        engine: a key of `engines.decoding.ENGINES`.
        python: the Python of an environment that has it.
        dtype: what target and draft compute in; None leaves it to the engine and its files.
        sampling: greedy by default; the answers of both ways are compared only then.
        arguments: further arguments of the engine's own.
        template_arguments: of the chat template.
    """

    engine: str
    python: str
    tasks: int = 10
    max_new: int = 128
    draft_length: int = 7
    dtype: str | None = "float32"
    sampling: Sampling = GREEDY
    arguments: Mapping[str, Any] = field(default_factory=dict)
    template_arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        known = sorted(ENGINES)
        require(self.engine in known, "evaluate.engine", self.engine, f"one of {', '.join(known)}")
        for name in ("tasks", "draft_length"):
            value = getattr(self, name)
            require(value >= 1, f"evaluate.{name}", value, "at least 1")
        require(self.max_new >= 2, "evaluate.max_new", self.max_new, "at least 2")
        check_sampling(self.sampling)


def engine_evaluate(
    target: str | Path,
    draft: str | Path,
    prompts: Sequence[str],
    settings: EngineEvalSettings,
    log: str | Path,
    *,
    served: tuple[str | Path, str | Path] | None = None,
    on_progress: Progress = lambda stage, done, total: None,
    prompts_name: str | None = None,
    categories: Sequence[str] = (),
) -> dict[str, Any]:
    """Decode the first prompts in an engine, plainly and with the draft, and compare.

    The engine is started twice, one after the other, so that it has the device's memory alone:
    with target and draft, and with the target. Each time a short answer warms it up.

    Args:
        target: folder, id or GGUF file; gives the tokenizer, the chat template and the stop ids.
        draft: an exported folder, or a GGUF file.
        prompts: user turns; each is put into the target's chat template.
        settings: what is decoded, by which engine.
        log: files for what the engine prints: this name with ".plain.log" and ".draft.log".
        served: target and draft as the engine loads them; by default the two above.
        on_progress: called with stage, prompts done and prompts in all.
        prompts_name: the prompts' name, kept in the report for its plot.
        categories: of the prompts, "" of one that has none; no names at all: no categories.

    Returns:
        The report, with the keys of `use.evaluate.evaluate` where they mean the same.
        `accepted_length` leaves out the prefills' tokens and what goes beyond an answer's end;
        `engine_accepted_length` is `1 + accepted / rounds` of the engine's own counts, which leave
        out neither. `acceptance_by_position` is null where the engine does not count the drafted
        tokens by position. `lossless` compares with the engine's own plain answers, and is null for
        sampled ones.

    Raises:
        UserError: no prompts, or one beyond the position limit; a draft of another target; the
            engine is missing or too old, refuses target or draft, or dies.
    """
    check_categories(prompts, categories)
    encoded, end_tokens = encode_prompts(target, draft, prompts[: settings.tasks], settings)
    started = DecoderSettings(
        max_length=max(map(len, encoded)) + settings.max_new,
        end_tokens=end_tokens,
        draft_length=settings.draft_length,
        dtype=settings.dtype or "auto",
        arguments=settings.arguments,
    )
    loaded_target, loaded_draft = served or (target, draft)

    def run(stage: str, loaded: str | Path | None) -> EngineRun:
        with open_decoder(
            settings.engine,
            settings.python,
            loaded_target,
            loaded,
            started,
            f"{log}.{stage}.log",
        ) as decoder:
            return decode_all(
                decoder,
                encoded,
                settings.max_new,
                settings.sampling,
                lambda done: on_progress(stage, done, len(encoded)),
            )

    # With the draft first: most faults are of the draft.
    drafted = run("draft", loaded_draft)
    plain = run("plain", None)
    return {
        "prompts": prompts_name,
        "tasks": len(encoded),
        "max_new": settings.max_new,
        "draft_length": settings.draft_length,
        "template_arguments": dict(settings.template_arguments),
        "engine": settings.engine,
        "engine_version": drafted.version,
        "engine_arguments": dict(settings.arguments),
        "sampling": settings.sampling._asdict(),
        **compare_answers(plain.answers, drafted.answers, settings.sampling),
        **describe_counts(drafted.answers, settings.max_new),
        **describe_groups(
            drafted.answers,
            [len(ids) for ids in encoded],
            categories[: settings.tasks],
            describe_group,
        ),
        **describe_speed(plain.answers, drafted.answers, settings),
        "repeated_8gram_share": repeated_share([one.tokens for one in plain.answers]),
    }


def encode_prompts(
    target: str | Path, draft: str | Path, prompts: Sequence[str], settings: EngineEvalSettings
) -> tuple[list[list[int]], tuple[int, ...]]:
    """The prompts' token ids and the stop ids; all that can be checked before an engine starts.

    Raises:
        UserError: no prompts, or one beyond the position limit; a draft of another target, or with
            weights that are not finite.
    """
    check_prompts(prompts)
    text_config = loaded_config(target).get_text_config()
    limits = [getattr(text_config, "max_position_embeddings", None)]

    # A GGUF file of a draft is left to the engine.
    if Path(draft).suffix != ".gguf":
        config = draft_config_from_json(config_of_draft(draft), None)
        check_files_finite(draft)
        check_pair(config, text_config, str(draft), str(target))
        limits.append(config.max_position_embeddings)

    tokenizer = load_tokenizer(target)
    template = ChatTemplate(tokenizer, arguments=dict(settings.template_arguments))
    known = [limit for limit in limits if limit]
    room = min(known) if known else math.inf
    encoded = []
    for number, text in enumerate(prompts, 1):
        rendered = chat_prompt(template, text)
        ids = tokenizer(rendered, add_special_tokens=False).input_ids
        needed = DecoderSettings(
            len(ids) + settings.max_new, (), draft_length=settings.draft_length
        ).positions
        if needed > room:
            raise UserError(
                f"prompt {number}: {len(ids)} tokens, max_new = {settings.max_new} and two rounds "
                f"of {settings.draft_length} drafted tokens: beyond max_position_embeddings = "
                f"{room}; shorten the prompt or lower --max-new"
            )
        encoded.append(list(ids))
    return encoded, stop_ids(target, tokenizer)


# The report


def compare_answers(
    plain: Sequence[EngineAnswer], drafted: Sequence[EngineAnswer], sampling: Sampling
) -> dict[str, Any]:
    """Whether the answers with the draft are the engine's plain ones, and where they part."""
    if sampling.temperature > 0:
        return {"lossless": None, "lossless_note": SAMPLED}

    differing = []
    count = 0
    for number, (left, right) in enumerate(zip(plain, drafted, strict=True), 1):
        count += differing_tokens(left.tokens, right.tokens)
        if left.tokens != right.tokens:
            place = first_difference(left.tokens, right.tokens)
            differing.append(
                {
                    "prompt": number,
                    "position": place,
                    "plain": token_at(left.tokens, place),
                    "draft": token_at(right.tokens, place),
                }
            )
    return {
        "lossless": not differing,
        "differing_prompts": differing,
        "timed_tokens": sum(len(one.tokens) for one in plain),
        "differing_tokens": count,
    }


def first_difference(left: Sequence[int], right: Sequence[int]) -> int:
    """The first position at which two answers differ; the shorter one's length if it begins both.

    Counted from 0.
    """
    for position, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return position
    return min(len(left), len(right))


def token_at(tokens: Sequence[int], position: int) -> int | None:
    """The token at a position, None beyond the end."""
    return tokens[position] if position < len(tokens) else None


def describe_counts(answers: Sequence[EngineAnswer], max_new: int) -> dict[str, Any]:
    """Rounds, drafted and accepted tokens, and the accepted length by both definitions."""
    counts = total(answers)
    runs = [verifications(one) for one in answers]
    kept = [kept_accepted(one, max_new) for one in answers]
    return {
        "rounds": counts.rounds,
        "drafted": counts.drafted,
        "accepted": counts.accepted,
        "drafted_by_position": counts.drafted_by_position,
        "accepted_by_position": counts.accepted_by_position,
        "verifications": _sum(runs),
        "accepted_within_answers": _sum(kept),
        "accepted_length": accepted_length(answers),
        "engine_accepted_length": engine_accepted_length(counts),
        "acceptance_by_position": acceptance_by_position(counts),
    }


def describe_group(answers: Sequence[EngineAnswer]) -> dict[str, Any]:
    """What `use.counts.describe_answers` says, by the engine's counts; None for what it lacks."""
    return {
        "prompts": len(answers),
        "tokens": sum(len(one.tokens) for one in answers),
        "verifications": _sum([verifications(one) for one in answers]),
        "accepted_length": accepted_length(answers),
    }


def _sum(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def accepted_length(answers: Sequence[EngineAnswer]) -> float | None:
    """Tokens emitted per run of the target after the prefill, as `use.evaluate` counts them.

    0 without runs; None where the engine does not tell them.
    """
    runs = _sum([verifications(one) for one in answers])
    if runs is None:
        return None
    emitted = sum(len(one.tokens) - 1 for one in answers)
    return emitted / runs if runs else 0.0


def engine_accepted_length(counts: Counts) -> float | None:
    """`1 + accepted / rounds`; 0 without rounds, None where the engine does not tell them."""
    if counts.rounds is None or counts.accepted is None:
        return None
    return 1 + counts.accepted / counts.rounds if counts.rounds else 0.0


def acceptance_by_position(counts: Counts) -> list[float] | None:
    """Conditional acceptance rate of each draft position, by the engine's counts.

    It is the share of drafted tokens accepted, among those whose predecessors all were; 0 where
    there are none. None where the engine does not count the drafted tokens by position: rounds near
    the limit may then have drafted less.
    """
    accepted = counts.accepted_by_position
    if accepted is None or counts.drafted_by_position is None:
        return None
    rates = []
    reached = counts.rounds or 0
    for count in accepted:
        rates.append(count / reached if reached else 0.0)
        reached = count
    return rates


def describe_speed(
    plain: Sequence[EngineAnswer], drafted: Sequence[EngineAnswer], settings: EngineEvalSettings
) -> dict[str, Any]:
    """Tokens a second both ways, prefills included."""
    plain_rate = tokens_per_second(plain)
    rate = tokens_per_second(drafted)
    return {
        "speed_dtype": settings.dtype,
        "speed_draft_length": settings.draft_length,
        "speed_tasks": len(plain),
        "plain_tokens_per_s": plain_rate,
        "tokens_per_s": rate,
        "speedup": rate / plain_rate,
    }


def tokens_per_second(answers: Sequence[EngineAnswer]) -> float:
    """Tokens a second over all answers, prefills included."""
    return sum(len(one.tokens) for one in answers) / sum(one.seconds for one in answers)


def describe(report: Mapping[str, Any]) -> str:
    """The report in lines for a user."""
    engine = f"{report['engine']} {report['engine_version']}"
    lossless = report["lossless"]
    if lossless is None:
        same = f"temperature {report['sampling']['temperature']:g}, {report['lossless_note']}"
    else:
        same = f"lossless {lossless}"
    lines = [f"{engine}: {same}, {report['speedup']:.2f} times as fast"]
    for one in report.get("differing_prompts", []):
        lines.append(
            f"  prompt {one['prompt']}: token {one['position']} is {one['draft']} with the draft, "
            f"{one['plain']} without"
        )
    lines.append(_counts_line(report))
    return "\n".join(lines)


def _counts_line(report: Mapping[str, Any]) -> str:
    if report["accepted_length"] is None:
        return (
            f"accepted length unknown: {report['engine']} decoded beyond an end token that its "
            "files do not name as one"
        )
    return (
        f"accepted length {report['accepted_length']:.3f} (per run of the target, without the "
        f"prefill's token and what goes beyond an answer's end), "
        f"{report['engine_accepted_length']:.3f} by {report['engine']}'s counts "
        f"(1 + accepted / rounds: 1 + {report['accepted']} / {report['rounds']})"
    )
