"""The target's own greedy answers by the library's decoding: what speculative decoding is compared with."""

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import read_json, write_json
from eagle3fn.data.fingerprint import weights_digest


def plain(
    model: Any, prompt: Tensor, max_new: int, ends: Collection[int]
) -> tuple[list[int], float]:
    """Greedy tokens behind `prompt` `(1, P)` and the seconds taken; nothing of the model's generation config acts."""
    begin = perf_counter()
    greedy, own = _greedy(max_new, ends), model.generation_config
    model.generation_config = greedy  # what `generate` is not told, it takes from there
    try:
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=greedy
        )
    finally:
        model.generation_config = own
    return out[0, prompt.shape[1] :].tolist(), perf_counter() - begin


def _greedy(max_new: int, ends: Collection[int]) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends),
    )


def plain_answers(
    model: Any,
    prompts: list[Tensor],
    max_new: int,
    ends: Collection[int],
    store: Path | None = None,
    done: Callable[[int], None] = lambda number: None,
) -> list[list[int]]:
    """Answers to all prompts. `store` keeps them for the next draft of the same target; it grows prompt by prompt.

    Raises:
        UserError: `store` holds something else.
    """
    kept = _read_store(store) if store is not None and store.exists() else {}
    target = weights_digest(model)
    answers = []
    for number, prompt in enumerate(prompts, 1):
        text = repr((target, str(model.dtype), max_new, sorted(ends), prompt.tolist()))
        key = hashlib.sha256(text.encode()).hexdigest()
        if key not in kept:
            kept[key], _ = plain(model, prompt, max_new, ends)
            if store is not None:
                write_json(store, kept)
        answers.append(kept[key])
        done(number)
    return answers


def _read_store(store: Path) -> dict[str, list[int]]:
    kept = read_json(store) if store.is_file() else None
    if not isinstance(kept, dict) or not all(map(_is_answer, kept.values())):
        raise UserError(
            f"{store}: does not hold the target's kept answers; name another file, or delete it"
        )
    return kept


def _is_answer(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)
