"""Evaluation of a draft: losslessness, accepted length, and the gain in tokens a second."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from eagle3fn.base.device import fast_dtype
from eagle3fn.base.errors import UserError
from eagle3fn.data.cache_check import check_roll_back
from eagle3fn.use.counts import (
    acceptance_by_position,
    accepted_length,
    describe_answers,
    expected_acceptance,
    repeated_share,
)
from eagle3fn.use.decode import Decoded, check_pair
from eagle3fn.use.eval_pair import EvalPair, decode_each, load_eval_pair
from eagle3fn.use.eval_settings import EvalSettings
from eagle3fn.use.export import load_draft
from eagle3fn.use.groups import check_categories, describe_groups
from eagle3fn.use.rounds import describe_rounds
from eagle3fn.use.sampled_check import check_sampled, note
from eagle3fn.use.speed import measure_speed
from eagle3fn.use.target_answers import greedy_answers, greedy_together, read_store

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
    categories: Sequence[str] = (),
) -> dict[str, Any]:
    """Decode the first prompts plainly and speculatively, and compare.

    In fp32, where a block and a single row round alike closely enough to require equal tokens: the
    target's own answers by transformers' `generate`, and the draft's at the full draft length; at a
    temperature the draft's alone, with what can be checked of them. Then the speed in the dtype
    that the device multiplies fast.

    Args:
        target_folder: the target, or its id.
        draft_folder: an exported draft.
        prompts: user turns; each is put into the target's chat template.
        settings: how much to decode, and how tokens are chosen.
        untrained_folder: an exported draft before training, for the accepted length by chance.
        plain_store: JSON file that keeps the target's own greedy answers for the next draft.
        on_progress: called with stage, prompts done and prompts in all.
        prompts_name: the prompts' name, such as their file's; kept in the report for its plot.
        categories: of the prompts, "" of one that has none; no names at all: no categories.

    Returns:
        The report, plain numbers and lists. All rates are tokens a second with prefills included.
        `speedup` is the rate at `speed_draft_length` over that of plain decoding by the same loop;
        the two decode prompt by prompt in turn, in `speed_dtype` on `threads` threads.
        `speed_draft_length` is the cheapest draft length by the acceptance and costs measured here.
        `break_even_accepted_length` is the cost of a round at that length over the cost of a plain
        step. `lossless` speaks of fp32; `differing_tokens` counts, of the `timed_tokens` that were
        decoded plainly for the speed, those that came out otherwise with the draft.

        At a temperature `lossless` is None, `sampling_check` has what `use.sampled_check` found,
        and `expected_acceptance_by_position` the mean chances to accept, `Σ min(p, q)`.

        `by_category` and `by_prompt_length` have for each group `use.counts.describe_answers`.

        `examples` are the first answers round by round, as `use.rounds.describe_rounds` gives them.

    Raises:
        UserError: no prompts, one beyond the position limit, or a draft of another target; a target
            whose cache cannot be rolled back; a store of greedy answers for sampled ones.
    """
    check_prompts(prompts)
    check_categories(prompts, categories)
    used = prompts[: settings.tasks]
    store = Path(plain_store) if plain_store else None

    # What is wrong with files is found before the target is loaded, and before anything is decoded.
    if store is not None:
        _check_store(store, settings)
    untrained = None
    if untrained_folder is not None:
        untrained = load_draft(untrained_folder, torch.float32, settings.device)

    # Tokens in fp32.
    exact = load_eval_pair(target_folder, draft_folder, used, torch.float32, settings)
    check_roll_back(exact.model)
    if untrained is not None:
        config = exact.model.config.get_text_config()
        check_pair(untrained.config, config, str(untrained_folder), str(target_folder))
    decoded, found = _tokens(exact, settings, store, on_progress)
    lengths = [prompt.shape[1] for prompt in exact.prompts]
    groups = describe_groups(decoded, lengths, categories[: settings.tasks], describe_answers)
    report = {"prompts": prompts_name, **_asked(settings, len(used)), **found, **groups}
    examples = describe_rounds(decoded, used, exact.tokenizer)

    if untrained is not None:
        few = exact._replace(draft=untrained, prompts=exact.prompts[: settings.few])
        report["untrained_accepted_length"] = accepted_length(decode_each(few, settings))

    # Speed; another dtype's models come after the fp32 ones have been freed.
    dtype = _speed_dtype(settings)
    timed = exact._replace(prompts=exact.prompts[: settings.speed_tasks])
    if dtype != torch.float32:
        del exact, timed
        few_prompts = used[: settings.speed_tasks]
        timed = load_eval_pair(target_folder, draft_folder, few_prompts, dtype, settings)
    report |= measure_speed(
        timed,
        settings,
        report.get("expected_acceptance_by_position", report["acceptance_by_position"]),
        decoded[0].tokens,
        lambda done: on_progress("speed", done, len(timed.prompts)),
    )
    if dtype == torch.float32 and report["lossless"]:
        report["lossless"] = report["differing_tokens"] == 0
    return report | {"examples": examples}


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuse no prompts, and empty ones.

    Raises:
        UserError: how many were given, and the remedy.
    """
    if not prompts or not all(text.strip() for text in prompts):
        raise UserError(
            f"prompts: {len(prompts)} given, and none may be empty; "
            "name a file of rows with a prompt"
        )


def _asked(settings: EvalSettings, tasks: int) -> dict[str, Any]:
    """What was asked for, as the report has it."""
    return {
        "tasks": tasks,
        "max_new": settings.max_new,
        "draft_length": settings.draft_length,
        "template_arguments": dict(settings.template_arguments),
    }


def _speed_dtype(settings: EvalSettings) -> torch.dtype:
    """What speed is measured in."""
    if settings.speed_dtype is None:
        return fast_dtype(settings.device)
    return getattr(torch, settings.speed_dtype)


def _check_store(store: Path, settings: EvalSettings) -> None:
    if settings.temperature:
        raise UserError(
            f"--plain {store}: keeps greedy answers, which have no use at temperature "
            f"{settings.temperature:g}; leave it out"
        )
    read_store(store)


def _tokens(
    pair: EvalPair, settings: EvalSettings, store: Path | None, on_progress: Progress
) -> tuple[list[Decoded], dict[str, Any]]:
    """The answers with the draft, and what is reported of their tokens."""
    count = len(pair.prompts)
    answers = None
    if not settings.temperature:
        answers = greedy_answers(
            pair.model,
            pair.prompts,
            settings.max_new,
            pair.end_tokens,
            store,
            lambda done: on_progress("plain", done, count),
        )
    decoded = decode_each(pair, settings, lambda done: on_progress("draft", done, count))
    if answers is None:
        found = _sampled_report(pair, decoded, settings)
    else:
        found = {"lossless": _same_tokens(pair, answers, decoded, settings.max_new)}

    # The target's own answers; sampled ones are as good as its own.
    own = [one.tokens for one in decoded] if answers is None else answers
    return decoded, found | {
        "accepted_length": accepted_length(decoded),
        "acceptance_by_position": acceptance_by_position(decoded),
        "repeated_8gram_share": repeated_share(own),
    }


def _sampled_report(
    pair: EvalPair, decoded: list[Decoded], settings: EvalSettings
) -> dict[str, Any]:
    """What a report says of sampled answers in place of the same text."""
    check = check_sampled(pair, decoded, settings.sampling)
    return {
        "sampling": settings.sampling._asdict(),
        "lossless": None,
        "lossless_note": note(check, settings.sampling),
        "sampling_check": check,
        "expected_acceptance_by_position": expected_acceptance(decoded),
    }


def _same_tokens(
    pair: EvalPair, answers: list[list[int]], decoded: list[Decoded], max_new: int
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
