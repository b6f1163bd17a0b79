"""The target's own greedy answers by transformers' `generate`, to compare with."""

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import read_json, write_json
from eagle3fn.data.target import weights_digest


def greedy_answer(
    model: Any, prompt: Tensor, max_new: int, end_tokens: Collection[int]
) -> tuple[list[int], float]:
    """Greedy tokens after `prompt` `(1, P)`, and the seconds taken.

    The model's own generation config has no effect, and is as before afterwards.
    """
    begin = perf_counter()
    greedy = _greedy_config(max_new, end_tokens)

    # `generate` fills values missing in its argument from the model's config, so that one is
    # replaced too.
    own = model.generation_config
    model.generation_config = greedy
    try:
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=greedy
        )
    finally:
        model.generation_config = own
    return out[0, prompt.shape[1] :].tolist(), perf_counter() - begin


def _greedy_config(max_new: int, end_tokens: Collection[int]) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new,
        eos_token_id=sorted(end_tokens),
        pad_token_id=min(end_tokens),
    )


def greedy_answers(
    model: Any,
    prompts: list[Tensor],
    max_new: int,
    end_tokens: Collection[int],
    store: Path | None = None,
    on_done: Callable[[int], None] = lambda number: None,
) -> list[list[int]]:
    """Greedy answers to all prompts, each `(1, P)`; `on_done` gets the number of prompts answered.

    `store`, a JSON file, keeps the answers for the next draft of the same target. It is written
    after every new answer.

    Raises:
        UserError: `store` holds something else.
    """
    stored: dict[str, list[int]] = {}
    if store is not None and store.exists():
        stored = _read_store(store)
    target = weights_digest(model)

    answers = []
    for number, prompt in enumerate(prompts, 1):
        # An answer belongs to the target's weights, its dtype, the limits and the prompt.
        request = (target, str(model.dtype), max_new, sorted(end_tokens), prompt.tolist())
        key = hashlib.sha256(repr(request).encode()).hexdigest()
        if key not in stored:
            stored[key], _ = greedy_answer(model, prompt, max_new, end_tokens)
            if store is not None:
                write_json(store, stored)
        answers.append(stored[key])
        on_done(number)
    return answers


def _read_store(store: Path) -> dict[str, list[int]]:
    stored = read_json(store) if store.is_file() else None
    if not isinstance(stored, dict) or not all(map(_is_answer, stored.values())):
        raise UserError(
            f"{store}: does not hold the target's kept answers; name another file, or delete it"
        )
    return stored


def _is_answer(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)
