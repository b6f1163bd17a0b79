"""Is decoding lossless, how many tokens a verification emits, and what that gains in tokens a second."""

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
from eagle3fn.use.metrics import (
    acceptance_by_position,
    accepted_length,
    differing,
    rate_of,
    repeated_share,
)
from eagle3fn.use.target_answers import plain, plain_answers


@dataclass(frozen=True)
class EvalSettings:
    """How much is decoded: the first `tasks` prompts at `draft_length`, the first `speed_tasks` of them for speed.

    The first `few` serve the bf16 and untrained parts; 0 leaves them out.
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
            require(getattr(self, name) >= 1, f"evaluate.{name}", getattr(self, name), "at least 1")
        require(self.max_new >= 2, "evaluate.max_new", self.max_new, "at least 2")
        require(self.few >= 0, "evaluate.few", self.few, "at least 0")


class _Pair(NamedTuple):
    """Target and draft in one dtype, and the prompts as token ids `(1, P)`."""

    model: Any
    draft: Draft
    prompts: list[Tensor]
    ends: set[int]


class _Plain(NamedTuple):
    """Answers of the library's own decoding."""

    tokens: list[list[int]]
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second, prefills included."""
        return sum(map(len, self.tokens)) / self.seconds


Progress = Callable[[str, int, int], None]


def evaluate(
    target_folder: str | Path,
    draft_folder: str | Path,
    prompts: Sequence[str],
    settings: EvalSettings,
    untrained_folder: str | Path | None = None,
    plain_store: str | Path | None = None,
    on_progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Decode the first prompts plainly and speculatively, and compare.

    Args:
        target_folder: the target, or its id.
        draft_folder: an exported draft.
        prompts: user turns; each is put into the target's chat template.
        settings: how much to decode.
        untrained_folder: an exported draft before training, for the accepted length that chance gives.
        plain_store: JSON file that keeps the target's own answers for the next draft.
        on_progress: called with stage, prompts done and prompts in all.

    Returns:
        The report, plain numbers and lists. Prefills count in every rate. `speedup` divides the rate at
        `speed_draft_length`, chosen on the acceptance and costs measured here, by that of plain decoding, which
        took turns with it prompt by prompt. `break_even_accepted_length` divides the cost of a round at that length
        by that of one plain step.

    Raises:
        UserError: no prompts, one beyond the position limit, or a draft of another target.
    """
    if not prompts or not all(text.strip() for text in prompts):
        raise UserError(
            f"prompts: {len(prompts)} given, and none may be empty; name a file of rows with a prompt"
        )
    pair = _load(target_folder, draft_folder, prompts[: settings.tasks], torch.float32, settings)
    report = _full_precision(
        pair, settings, Path(plain_store) if plain_store else None, on_progress
    )
    if untrained_folder is not None and settings.few:
        other = load_draft(untrained_folder, torch.float32, settings.device)
        check_pair(
            other, pair.model.config.get_text_config(), str(untrained_folder), str(target_folder)
        )
        few = pair._replace(draft=other, prompts=pair.prompts[: settings.few])
        report["untrained_accepted_length"] = accepted_length(
            _speak(few, settings, settings.draft_length)
        )
    del pair
    if settings.few:
        few = _load(
            target_folder,
            draft_folder,
            prompts[: min(settings.few, settings.tasks)],
            torch.bfloat16,
            settings,
        )
        report["bf16"] = _half_precision(few, settings, report["speed_draft_length"], on_progress)
    return report


def read_prompts(path: str | Path) -> list[str]:
    """The `prompt` of each row of a JSONL file (plain, `.gz`, `.xz`).

    Raises:
        UserError: unreadable, no rows, or a row without a prompt; the message names the row.
    """
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("prompt"), str)
            or not row["prompt"].strip()
        ):
            raise UserError(f'{path}: row {number} has no text under "prompt"; mend or delete it')
    if not rows:
        raise UserError(f'{path}: no rows; write one JSON object with a "prompt" a line')
    return [row["prompt"] for row in rows]


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
    ids = [_encode(tokenizer, text).to(settings.device) for text in prompts]
    for number, one in enumerate(ids, 1):
        try:
            check_request(model, draft, one, settings.draft_length, settings.max_new)
        except UserError as error:
            raise UserError(f"prompt {number}: {error}") from None
    return _Pair(model, draft, ids, end_tokens(model))


def _encode(tokenizer: Any, text: str) -> Tensor:
    return tokenizer(
        chat_prompt(tokenizer, text), return_tensors="pt", add_special_tokens=False
    ).input_ids


def _full_precision(
    pair: _Pair, settings: EvalSettings, store: Path | None, on_progress: Progress
) -> dict[str, Any]:
    full, count = settings.draft_length, len(pair.prompts)
    answers = plain_answers(
        pair.model,
        pair.prompts,
        settings.max_new,
        pair.ends,
        store,
        lambda done: on_progress("plain", done, count),
    )
    spoken = _speak(pair, settings, full, lambda done: on_progress("fp32", done, count))
    acceptance = acceptance_by_position(spoken)
    context = torch.cat(
        [pair.prompts[0], torch.tensor([answers[0]], device=settings.device)], dim=1
    )
    context = context[:, : pair.prompts[0].shape[1] + settings.max_new // 2]
    costs = measure_costs(pair.model, pair.draft, context, full, settings.repeats)
    chosen = best_length(costs, acceptance)
    quick = pair._replace(prompts=pair.prompts[: settings.speed_tasks])
    again, fast = _alternate(
        quick, settings, chosen, lambda done: on_progress("speed", done, len(quick.prompts))
    )
    plain_rate, rate = again.rate, rate_of(fast)
    return {
        "tasks": len(pair.prompts),
        "max_new": settings.max_new,
        "draft_length": full,
        "lossless": answers == [one.tokens for one in spoken]
        and again.tokens == [one.tokens for one in fast],
        "accepted_length": accepted_length(spoken),
        "acceptance_by_position": acceptance,
        "speed_draft_length": chosen,
        "speed_tasks": len(quick.prompts),
        "speed_accepted_length": accepted_length(fast),
        "plain_tokens_per_s": plain_rate,
        "tokens_per_s": rate,
        "speedup": rate / plain_rate,
        "break_even_accepted_length": costs.round(chosen) / costs.verify[0],
        "costs": _costs_report(costs, acceptance, context.shape[1]),
        "repeated_8gram_share": repeated_share(answers),
    }


def _costs_report(costs: Costs, acceptance: list[float], context: int) -> dict[str, Any]:
    lengths = range(1, len(acceptance) + 1)
    return {
        "context": context,
        "verify_seconds": costs.verify,
        "first_draft_seconds": costs.commit,
        "next_draft_seconds": costs.extend,
        "predicted_seconds_per_token": [
            costs.round(k) / expected_length(acceptance, k) for k in lengths
        ],
    }


def _half_precision(
    pair: _Pair, settings: EvalSettings, chosen: int, on_progress: Progress
) -> dict[str, Any]:
    """In bf16 a block and a single row round differently, so tokens may differ: they are counted, not required."""
    library, spoken = _alternate(
        pair, settings, chosen, lambda done: on_progress("bf16", done, len(pair.prompts))
    )
    pairs = list(zip(library.tokens, (one.tokens for one in spoken), strict=True))
    return {
        "tasks": len(pair.prompts),
        "draft_length": chosen,
        "plain_tokens_per_s": library.rate,
        "tokens_per_s": rate_of(spoken),
        "accepted_length": accepted_length(spoken),
        "tokens": sum(len(left) for left, _ in pairs),
        "differing_tokens": sum(differing(left, right) for left, right in pairs),
    }


def _alternate(
    pair: _Pair, settings: EvalSettings, draft_length: int, done: Callable[[int], None]
) -> tuple[_Plain, list[Decoded]]:
    """Both ways, prompt by prompt in turn, so that a change of the machine's load hits both alike."""
    plain(pair.model, pair.prompts[0], 2, pair.ends)
    speculate(pair.model, pair.draft, pair.prompts[0], draft_length, 2, pair.ends)
    answers, total, spoken = [], 0.0, []
    for number, prompt in enumerate(pair.prompts, 1):
        tokens, seconds = plain(pair.model, prompt, settings.max_new, pair.ends)
        answers.append(tokens)
        total += seconds
        spoken.append(
            speculate(pair.model, pair.draft, prompt, draft_length, settings.max_new, pair.ends)
        )
        done(number)
    return _Plain(answers, total), spoken


def _speak(
    pair: _Pair,
    settings: EvalSettings,
    draft_length: int,
    done: Callable[[int], None] = lambda number: None,
) -> list[Decoded]:
    spoken = []
    for number, prompt in enumerate(pair.prompts, 1):
        spoken.append(
            speculate(pair.model, pair.draft, prompt, draft_length, settings.max_new, pair.ends)
        )
        done(number)
    return spoken
