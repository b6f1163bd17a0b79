"""Evaluation of a draft: losslessness, accepted length, and the gain in tokens a second."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.config import require
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import read_jsonl
from eagle3fn.data.synthesize import chat_prompt, end_tokens
from eagle3fn.data.target import load_target
from eagle3fn.use.costs import Costs, best_length, expected_length, measure_costs
from eagle3fn.use.decode import Decoded, check_pair, check_request, speculate
from eagle3fn.use.export import Draft, load_draft
from eagle3fn.use.target_answers import greedy_answer, greedy_answers

NGRAM = 8


@dataclass(frozen=True)
class EvalSettings:
    """How much is decoded.

    The first `tasks` prompts are decoded at `draft_length`, and the first `speed_tasks` of them are
    timed. The first `few` serve the bf16 and untrained parts; 0 leaves these parts out.
    """

    tasks: int = 10
    max_new: int = 128
    draft_length: int = 7
    speed_tasks: int = 4
    few: int = 2
    repeats: int = 8
    device: str = "cpu"
    attn: str = "sdpa"

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in ("tasks", "draft_length", "speed_tasks", "repeats"):
            value = getattr(self, name)
            require(value >= 1, f"evaluate.{name}", value, "at least 1")
        require(self.max_new >= 2, "evaluate.max_new", self.max_new, "at least 2")
        require(self.few >= 0, "evaluate.few", self.few, "at least 0")


class _Pair(NamedTuple):
    """Target and draft in one dtype, and the prompts as token ids `(1, P)`."""

    model: Any
    draft: Draft
    prompts: list[Tensor]
    end_tokens: set[int]


class _Comparison(NamedTuple):
    """The same prompts decoded plainly and speculatively, in turn."""

    plain: list[list[int]]
    plain_seconds: float
    speculative: list[Decoded]

    @property
    def plain_rate(self) -> float:
        """Tokens a second of plain decoding, prefills included."""
        return sum(map(len, self.plain)) / self.plain_seconds

    @property
    def rate(self) -> float:
        """Tokens a second of speculative decoding, prefills included."""
        return tokens_per_second(self.speculative)


Progress = Callable[[str, int, int], None]


def evaluate(
    target_folder: str | Path,
    draft_folder: str | Path,
    prompts: Sequence[str],
    settings: EvalSettings,
    untrained_folder: str | Path | None = None,
    plain_store: str | Path | None = None,
    on_progress: Progress = lambda stage, done, total: None,
    prompts_name: str | None = None,
) -> dict[str, Any]:
    """Decode the first prompts plainly and speculatively, and compare.

    Args:
        target_folder: the target, or its id.
        draft_folder: an exported draft.
        prompts: user turns; each is put into the target's chat template.
        settings: how much to decode.
        untrained_folder: an exported draft before training, for the accepted length by chance.
        plain_store: JSON file that keeps the target's own answers for the next draft.
        on_progress: called with stage, prompts done and prompts in all.
        prompts_name: the prompts' name, such as their file's; kept in the report for its plot.

    Returns:
        The report, plain numbers and lists. All rates are tokens a second with prefills included.
        `speedup` is the rate at `speed_draft_length` over that of plain decoding; the two decode
        prompt by prompt in turn. `speed_draft_length` is the cheapest draft length by the
        acceptance and costs measured here. `break_even_accepted_length` is the cost of a round at
        that length over the cost of a plain step.

    Raises:
        UserError: no prompts, one beyond the position limit, or a draft of another target.
    """
    if not prompts or not all(text.strip() for text in prompts):
        raise UserError(
            f"prompts: {len(prompts)} given, and none may be empty; "
            "name a file of rows with a prompt"
        )

    # fp32: a block and a single row round alike closely enough to require equal tokens.
    pair = _load(target_folder, draft_folder, prompts[: settings.tasks], torch.float32, settings)
    store = Path(plain_store) if plain_store else None
    report = {"prompts": prompts_name, **_full_precision(pair, settings, store, on_progress)}

    # The untrained draft with the same target.
    if untrained_folder is not None and settings.few:
        untrained = load_draft(untrained_folder, torch.float32, settings.device)
        text = pair.model.config.get_text_config()
        check_pair(untrained, text, str(untrained_folder), str(target_folder))
        few = pair._replace(draft=untrained, prompts=pair.prompts[: settings.few])
        answers = _speculate_all(few, settings, settings.draft_length)
        report["untrained_accepted_length"] = accepted_length(answers)

    # bf16, after the fp32 models have been freed.
    del pair
    if settings.few:
        count = min(settings.few, settings.tasks)
        few = _load(target_folder, draft_folder, prompts[:count], torch.bfloat16, settings)
        report["bf16"] = _half_precision(few, settings, report["speed_draft_length"], on_progress)
    return report


def read_prompts(path: str | Path) -> list[str]:
    """The `prompt` of each row of a JSONL file (plain, `.gz`, `.xz`).

    Raises:
        UserError: unreadable, no rows, or a row without a prompt; the message names the row.
    """
    prompts = []
    for number, row in enumerate(read_jsonl(path), 1):
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f'{path}: row {number} has no text under "prompt"; mend or delete it')
        prompts.append(prompt)
    if not prompts:
        raise UserError(f'{path}: no rows; write one JSON object with a "prompt" a line')
    return prompts


def _load(
    target: str | Path,
    folder: str | Path,
    prompts: Sequence[str],
    dtype: torch.dtype,
    settings: EvalSettings,
) -> _Pair:
    model, tokenizer = load_target(target, dtype, settings.device, settings.attn)
    draft = load_draft(folder, dtype, settings.device)
    check_pair(draft, model.config.get_text_config(), str(folder), str(target))

    # All prompts are checked before the first is decoded.
    encoded = [_encode(tokenizer, text).to(settings.device) for text in prompts]
    for number, ids in enumerate(encoded, 1):
        try:
            check_request(model, draft, ids, settings.draft_length, settings.max_new)
        except UserError as error:
            raise UserError(f"prompt {number}: {error}") from None
    return _Pair(model, draft, encoded, end_tokens(model))


def _encode(tokenizer: Any, text: str) -> Tensor:
    """Token ids `(1, P)` of one user turn in the chat template."""
    prompt = chat_prompt(tokenizer, text)
    return tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids


def _full_precision(
    pair: _Pair, settings: EvalSettings, store: Path | None, on_progress: Progress
) -> dict[str, Any]:
    count = len(pair.prompts)

    # Answers both ways, at the full draft length.
    answers = greedy_answers(
        pair.model,
        pair.prompts,
        settings.max_new,
        pair.end_tokens,
        store,
        lambda done: on_progress("plain", done, count),
    )
    decoded = _speculate_all(
        pair, settings, settings.draft_length, lambda done: on_progress("fp32", done, count)
    )
    acceptance = acceptance_by_position(decoded)

    # Costs, after the first prompt and about half of an answer.
    first_prompt = pair.prompts[0]
    first_answer = torch.tensor([answers[0]], device=settings.device)
    context = torch.cat([first_prompt, first_answer], dim=1)
    context = context[:, : first_prompt.shape[1] + settings.max_new // 2]
    costs = measure_costs(pair.model, pair.draft, context, settings.draft_length, settings.repeats)

    # Speed, at the draft length that these costs and rates make cheapest.
    chosen = best_length(costs, acceptance)
    timed = pair._replace(prompts=pair.prompts[: settings.speed_tasks])
    speed = _compare(
        timed, settings, chosen, lambda done: on_progress("speed", done, len(timed.prompts))
    )

    same_answers = answers == [one.tokens for one in decoded]
    same_timed = speed.plain == [one.tokens for one in speed.speculative]
    return {
        "tasks": count,
        "max_new": settings.max_new,
        "draft_length": settings.draft_length,
        "lossless": same_answers and same_timed,
        "accepted_length": accepted_length(decoded),
        "acceptance_by_position": acceptance,
        "speed_draft_length": chosen,
        "speed_tasks": len(timed.prompts),
        "speed_accepted_length": accepted_length(speed.speculative),
        "plain_tokens_per_s": speed.plain_rate,
        "tokens_per_s": speed.rate,
        "speedup": speed.rate / speed.plain_rate,
        "break_even_accepted_length": costs.round(chosen) / costs.verify[0],
        "costs": _costs_report(costs, acceptance, context.shape[1]),
        "repeated_8gram_share": repeated_share(answers),
    }


def _costs_report(costs: Costs, acceptance: list[float], context: int) -> dict[str, Any]:
    lengths = range(1, len(acceptance) + 1)
    predicted = [costs.round(k) / expected_length(acceptance, k) for k in lengths]
    return {
        "context": context,
        "verify_seconds": costs.verify,
        "first_draft_seconds": costs.commit,
        "next_draft_seconds": costs.extend,
        "predicted_seconds_per_token": predicted,
    }


def _half_precision(
    pair: _Pair, settings: EvalSettings, draft_length: int, on_progress: Progress
) -> dict[str, Any]:
    """Speed in bf16, and how many tokens differ.

    In bf16 a block and a single row round differently, so equal tokens are not required.
    """
    count = len(pair.prompts)
    speed = _compare(pair, settings, draft_length, lambda done: on_progress("bf16", done, count))
    differing = 0
    for plain, decoded in zip(speed.plain, speed.speculative, strict=True):
        differing += differing_tokens(plain, decoded.tokens)
    return {
        "tasks": count,
        "draft_length": draft_length,
        "plain_tokens_per_s": speed.plain_rate,
        "tokens_per_s": speed.rate,
        "accepted_length": accepted_length(speed.speculative),
        "tokens": sum(map(len, speed.plain)),
        "differing_tokens": differing,
    }


def _compare(
    pair: _Pair, settings: EvalSettings, draft_length: int, on_done: Callable[[int], None]
) -> _Comparison:
    """Decode both ways, prompt by prompt in turn.

    So a change of the machine's load affects both alike. Two tokens both ways warm up.
    """
    model, draft, prompts, ends = pair
    greedy_answer(model, prompts[0], 2, ends)
    speculate(model, draft, prompts[0], draft_length, 2, ends)

    answers = []
    total = 0.0
    decoded = []
    for number, prompt in enumerate(prompts, 1):
        tokens, seconds = greedy_answer(model, prompt, settings.max_new, ends)
        answers.append(tokens)
        total += seconds
        decoded.append(speculate(model, draft, prompt, draft_length, settings.max_new, ends))
        on_done(number)
    return _Comparison(answers, total, decoded)


def _speculate_all(
    pair: _Pair,
    settings: EvalSettings,
    draft_length: int,
    on_done: Callable[[int], None] = lambda number: None,
) -> list[Decoded]:
    model, draft, prompts, ends = pair
    decoded = []
    for number, prompt in enumerate(prompts, 1):
        decoded.append(speculate(model, draft, prompt, draft_length, settings.max_new, ends))
        on_done(number)
    return decoded


# Numbers over decoded answers.


def tokens_per_second(decoded: list[Decoded]) -> float:
    """Tokens a second over all answers, prefills included."""
    tokens = sum(len(one.tokens) for one in decoded)
    return tokens / sum(one.seconds for one in decoded)


def accepted_length(decoded: list[Decoded]) -> float:
    """Tokens emitted per verification over all answers; 0 without verifications.

    The prefills' tokens do not count.
    """
    verifications = sum(one.verifications for one in decoded)
    if not verifications:
        return 0.0
    return sum(len(one.tokens) - 1 for one in decoded) / verifications


def acceptance_by_position(decoded: list[Decoded]) -> list[float]:
    """Conditional acceptance rate of each draft position, over all answers.

    It is the share of drafted tokens emitted, among those whose predecessors all were; 0 where
    there are none.
    """
    accepted = _column_sums([one.accepted_by_position for one in decoded])
    reached = _column_sums([one.reached_by_position for one in decoded])
    rates = []
    for emitted, tried in zip(accepted, reached, strict=True):
        rates.append(emitted / tried if tried else 0.0)
    return rates


def _column_sums(rows: list[list[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]


def differing_tokens(left: list[int], right: list[int]) -> int:
    """Positions at which two answers differ; positions of only the longer answer differ too."""
    count = abs(len(left) - len(right))
    for one, other in zip(left, right, strict=False):
        if one != other:
            count += 1
    return count


def repeated_share(answers: list[list[int]]) -> float:
    """Share of tokens inside a run of eight tokens that occurred before in the same answer."""
    total = sum(map(len, answers))
    if not total:
        return 0.0
    return sum(map(_repeated_tokens, answers)) / total


def _repeated_tokens(tokens: list[int]) -> int:
    seen: set[tuple[int, ...]] = set()
    inside: set[int] = set()  # positions inside a repeated run; runs may overlap
    for start in range(len(tokens) - NGRAM + 1):
        run = tuple(tokens[start : start + NGRAM])
        if run in seen:
            inside.update(range(start, start + NGRAM))
        seen.add(run)
    return len(inside)
