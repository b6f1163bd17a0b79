"""Target and draft of an evaluation, loaded in one dtype, with the prompts as token ids."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.data.target import load_target, stop_ids
from eagle3fn.data.template import ChatTemplate
from eagle3fn.data.user_turns import chat_prompt
from eagle3fn.use.decode import Decoded, check_pair, check_request, speculate
from eagle3fn.use.eval_settings import EvalSettings
from eagle3fn.use.export import Draft, load_draft
from eagle3fn.use.few_rows import speed_up_few_rows
from eagle3fn.use.sampling import of_prompt


class EvalPair(NamedTuple):
    """Target and draft in one dtype, and the prompts as token ids `(1, P)`."""

    model: Any
    draft: Draft
    prompts: list[Tensor]
    end_tokens: tuple[int, ...]
    tokenizer: Any


def load_eval_pair(
    target: str | Path,
    folder: str | Path,
    prompts: Sequence[str],
    dtype: torch.dtype,
    settings: EvalSettings,
) -> EvalPair:
    """Load both and encode the prompts; all of them are checked before the first is decoded.

    Raises:
        UserError: a draft of another target, or a prompt beyond the position limit.
    """
    draft = load_draft(folder, dtype, settings.device)
    model, tokenizer = load_target(target, dtype, settings.device, settings.attn)
    check_pair(draft.config, model.config.get_text_config(), str(folder), str(target))

    template = ChatTemplate(tokenizer, arguments=dict(settings.template_arguments))
    encoded = [_encode(template, text).to(settings.device) for text in prompts]
    for number, ids in enumerate(encoded, 1):
        try:
            check_request(model, draft, ids, settings.draft_length, settings.max_new)
        except UserError as error:
            raise UserError(f"prompt {number}: {error}") from None

    # Plain and speculative decoding go through the same target.
    speed_up_few_rows(model)
    return EvalPair(model, draft, encoded, stop_ids(model, tokenizer), tokenizer)


def _encode(template: ChatTemplate, text: str) -> Tensor:
    """Token ids `(1, P)` of one user turn in the chat template."""
    prompt = chat_prompt(template, text)
    return template.tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids


def decode_one(
    pair: EvalPair, settings: EvalSettings, number: int, draft_length: int, max_new: int
) -> Decoded:
    """Decode prompt `number`, counted from 0; a sampled answer is a function of seed and number."""
    return speculate(
        pair.model,
        pair.draft if draft_length else None,
        pair.prompts[number],
        draft_length,
        max_new,
        pair.end_tokens,
        of_prompt(settings.sampling, number),
    )


def decode_each(
    pair: EvalPair,
    settings: EvalSettings,
    on_done: Callable[[int], None] = lambda number: None,
) -> list[Decoded]:
    """Decode all prompts with the draft; `on_done` gets the number of prompts decoded."""
    decoded = []
    for number in range(len(pair.prompts)):
        found = decode_one(pair, settings, number, settings.draft_length, settings.max_new)
        decoded.append(found)
        on_done(number + 1)
    return decoded
