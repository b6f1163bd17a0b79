"""Evaluation of a draft: losslessness, accepted length, and the gain in tokens a second."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.config import require
from eagle3fn.base.device import fast_dtype
from eagle3fn.base.errors import UserError
from eagle3fn.data.cache_check import check_roll_back
from eagle3fn.data.rejects import rejecting, usable
from eagle3fn.data.row_files import FileRow, read_rows
from eagle3fn.data.synthesize import chat_prompt
from eagle3fn.data.target import load_target, stop_ids
from eagle3fn.data.template import ChatTemplate
from eagle3fn.use.costs import Costs, best_length, expected_length, measure_costs
from eagle3fn.use.decode import Decoded, check_pair, check_request, speculate
from eagle3fn.use.export import Draft, load_draft
from eagle3fn.use.few_rows import speed_up_few_rows
from eagle3fn.use.target_answers import greedy_answers, greedy_together, read_store

NGRAM = 8


@dataclass(frozen=True)
class EvalSettings:
    """How much is decoded, and in what.

    The first `tasks` prompts are decoded in fp32 at `draft_length`. The first `speed_tasks` of them
    are timed in `speed_dtype` (None: what the device multiplies fast), and the first `few` serve
    the untrained draft.
    """

    tasks: int = 10
    max_new: int = 128
    draft_length: int = 7
    speed_tasks: int = 3
    speed_dtype: str | None = None
    few: int = 2
    repeats: int = 4
    device: str = "cpu"
    attn: str = "sdpa"
    template_arguments: Mapping[str, Any] = field(default_factory=dict)  # of the chat template

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in ("tasks", "draft_length", "speed_tasks", "few", "repeats"):
            value = getattr(self, name)
            require(value >= 1, f"evaluate.{name}", value, "at least 1")
        require(self.max_new >= 2, "evaluate.max_new", self.max_new, "at least 2")


class _Pair(NamedTuple):
    """Target and draft in one dtype, and the prompts as token ids `(1, P)`."""

    model: Any
    draft: Draft
    prompts: list[Tensor]
    end_tokens: tuple[int, ...]


class _Comparison(NamedTuple):
    """The same prompts decoded plainly and speculatively, in turn and by the same loop."""

    plain: list[Decoded]
    speculative: list[Decoded]


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

    In fp32, where a block and a single row round alike closely enough to require equal tokens: the
    target's own answers by transformers' `generate`, and the draft's at the full draft length. Then
    the speed in the dtype that the device multiplies fast.

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
        `speedup` is the rate at `speed_draft_length` over that of plain decoding by the same loop;
        the two decode prompt by prompt in turn, in `speed_dtype` on `threads` threads.
        `speed_draft_length` is the cheapest draft length by the acceptance and costs measured here.
        `break_even_accepted_length` is the cost of a round at that length over the cost of a plain
        step. `lossless` speaks of fp32; `differing_tokens` counts, of the `timed_tokens` that were
        decoded plainly for the speed, those that came out otherwise with the draft.

    Raises:
        UserError: no prompts, one beyond the position limit, or a draft of another target; a target
            whose cache cannot be rolled back.
    """
    if not prompts or not all(text.strip() for text in prompts):
        raise UserError(
            f"prompts: {len(prompts)} given, and none may be empty; "
            "name a file of rows with a prompt"
        )
    used = prompts[: settings.tasks]
    store = Path(plain_store) if plain_store else None

    # What is wrong with files is found before the target is loaded, and before anything is decoded.
    if store is not None:
        read_store(store)
    untrained = None
    if untrained_folder is not None:
        untrained = load_draft(untrained_folder, torch.float32, settings.device)

    # Tokens in fp32.
    exact = _load(target_folder, draft_folder, used, torch.float32, settings)
    check_roll_back(exact.model)
    if untrained is not None:
        config = exact.model.config.get_text_config()
        check_pair(untrained.config, config, str(untrained_folder), str(target_folder))
    answers = greedy_answers(
        exact.model,
        exact.prompts,
        settings.max_new,
        exact.end_tokens,
        store,
        lambda done: on_progress("plain", done, len(used)),
    )
    decoded = _speculate_all(
        exact, settings, settings.draft_length, lambda done: on_progress("draft", done, len(used))
    )
    acceptance = acceptance_by_position(decoded)
    report: dict[str, Any] = {
        "prompts": prompts_name,
        "tasks": len(used),
        "max_new": settings.max_new,
        "draft_length": settings.draft_length,
        "template_arguments": dict(settings.template_arguments),
        "lossless": _same_tokens(exact, answers, decoded, settings.max_new),
        "accepted_length": accepted_length(decoded),
        "acceptance_by_position": acceptance,
        "repeated_8gram_share": repeated_share(answers),
    }

    if untrained is not None:
        few = exact._replace(draft=untrained, prompts=exact.prompts[: settings.few])
        found = _speculate_all(few, settings, settings.draft_length)
        report["untrained_accepted_length"] = accepted_length(found)

    # Speed; another dtype's models come after the fp32 ones have been freed.
    dtype = fast_dtype(settings.device)
    if settings.speed_dtype is not None:
        dtype = getattr(torch, settings.speed_dtype)
    timed = exact._replace(prompts=exact.prompts[: settings.speed_tasks])
    if dtype != torch.float32:
        del exact, timed
        timed = _load(target_folder, draft_folder, used[: settings.speed_tasks], dtype, settings)
    speed = _speed(timed, settings, acceptance, answers[0], on_progress)
    if dtype == torch.float32:
        report["lossless"] &= speed["differing_tokens"] == 0
    return {**report, **speed}


def read_prompts(path: str | Path) -> list[str]:
    """The `prompt` of each row of a file or folder (`data.row_files`).

    Raises:
        UserError: unreadable, no rows, or rows without a prompt; the message counts them and names
            the first.
    """
    with rejecting(path) as rejects:
        prompts = list(usable(read_rows(path), _prompt_of, rejects))
    if not prompts:
        raise UserError(f'{path}: no rows; write one JSON object with a "prompt" a line')
    return prompts


def _prompt_of(row: FileRow) -> str:
    prompt = row.value.get("prompt") if isinstance(row.value, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError('no text under "prompt"; mend or delete the row')
    return prompt


def _load(
    target: str | Path,
    folder: str | Path,
    prompts: Sequence[str],
    dtype: torch.dtype,
    settings: EvalSettings,
) -> _Pair:
    draft = load_draft(folder, dtype, settings.device)
    model, tokenizer = load_target(target, dtype, settings.device, settings.attn)
    check_pair(draft.config, model.config.get_text_config(), str(folder), str(target))

    # All prompts are checked before the first is decoded.
    template = ChatTemplate(tokenizer, arguments=dict(settings.template_arguments))
    encoded = [_encode(template, text).to(settings.device) for text in prompts]
    for number, ids in enumerate(encoded, 1):
        try:
            check_request(model, draft, ids, settings.draft_length, settings.max_new)
        except UserError as error:
            raise UserError(f"prompt {number}: {error}") from None

    # Plain and speculative decoding go through the same target.
    speed_up_few_rows(model)
    return _Pair(model, draft, encoded, stop_ids(model, tokenizer))


def _encode(template: ChatTemplate, text: str) -> Tensor:
    """Token ids `(1, P)` of one user turn in the chat template."""
    prompt = chat_prompt(template, text)
    return template.tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids


def _same_tokens(
    pair: _Pair, answers: list[list[int]], decoded: list[Decoded], max_new: int
) -> bool:
    """Whether every answer is the target's own.

    Answers decoded together may round otherwise than one alone, so one that differs is compared
    once more with the target's answer to that prompt alone.
    """
    for prompt, answer, found in zip(pair.prompts, answers, decoded, strict=True):
        if found.tokens == answer:
            continue
        (alone,) = greedy_together(pair.model, [prompt], max_new, pair.end_tokens)
        if found.tokens != alone:
            return False
    return True


def _speed(
    pair: _Pair,
    settings: EvalSettings,
    acceptance: list[float],
    answer: list[int],
    on_progress: Progress,
) -> dict[str, Any]:
    """Costs and rates of a pair; `answer` is that to its first prompt."""
    # Costs, after the first prompt and about half of its answer.
    prompt = pair.prompts[0]
    context = torch.cat([prompt, torch.tensor([answer], device=settings.device)], dim=1)
    context = context[:, : prompt.shape[1] + settings.max_new // 2]
    costs = measure_costs(pair.model, pair.draft, context, settings.draft_length, settings.repeats)

    # Rates, at the draft length that these costs and the acceptance make cheapest.
    chosen = best_length(costs, acceptance)
    count = len(pair.prompts)
    found = _compare(pair, settings, chosen, lambda done: on_progress("speed", done, count))
    differing = 0
    for plain, speculative in zip(found.plain, found.speculative, strict=True):
        differing += differing_tokens(plain.tokens, speculative.tokens)

    plain_rate = tokens_per_second(found.plain)
    rate = tokens_per_second(found.speculative)
    return {
        "speed_dtype": str(pair.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "device": settings.device,
        "speed_draft_length": chosen,
        "speed_tasks": count,
        "speed_accepted_length": accepted_length(found.speculative),
        "plain_tokens_per_s": plain_rate,
        "tokens_per_s": rate,
        "speedup": rate / plain_rate,
        "timed_tokens": sum(len(one.tokens) for one in found.plain),
        "differing_tokens": differing,
        "break_even_accepted_length": costs.round(chosen) / costs.verify[0],
        "costs": _costs_report(costs, acceptance, context.shape[1]),
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


def _compare(
    pair: _Pair, settings: EvalSettings, draft_length: int, on_done: Callable[[int], None]
) -> _Comparison:
    """Decode both ways, prompt by prompt in turn.

    So a change of the machine's load affects both alike. Two tokens both ways warm up.
    """
    plain: list[Decoded] = []
    speculative: list[Decoded] = []

    def decode(prompt: Tensor, length: int, max_new: int) -> Decoded:
        draft = pair.draft if length else None
        return speculate(pair.model, draft, prompt, length, max_new, pair.end_tokens)

    for length in (0, draft_length):
        decode(pair.prompts[0], length, 2)
    for number, prompt in enumerate(pair.prompts, 1):
        plain.append(decode(prompt, 0, settings.max_new))
        speculative.append(decode(prompt, draft_length, settings.max_new))
        on_done(number)
    return _Comparison(plain, speculative)


def _speculate_all(
    pair: _Pair,
    settings: EvalSettings,
    draft_length: int,
    on_done: Callable[[int], None] = lambda number: None,
) -> list[Decoded]:
    model, draft, ends = pair.model, pair.draft, pair.end_tokens
    decoded = []
    for number, prompt in enumerate(pair.prompts, 1):
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
