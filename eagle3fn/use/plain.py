"""The target's own greedy answers by the library's decoding: what speculative decoding is compared with."""

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from eagle3fn.base.files import read_json, write_json
from eagle3fn.data.fingerprint import weights_digest


def plain(model: Any, prompt: Tensor, max_new: int, ends: Collection[int]) -> tuple[list[int], float]:
    """Greedy tokens behind `prompt` `(1, P)` and the seconds taken; the generation config's processors are off."""
    begin = perf_counter()
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends),
    )
    return out[0, prompt.shape[1] :].tolist(), perf_counter() - begin


def plain_answers(
    model: Any,
    prompts: list[Tensor],
    max_new: int,
    ends: Collection[int],
    store: Path | None = None,
    done: Callable[[int], None] = lambda number: None,
) -> list[list[int]]:
    """Answers to all prompts. `store` keeps them for the next draft of the same target; it grows prompt by prompt."""
    kept: dict[str, list[int]] = read_json(store) if store is not None and store.exists() else {}
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
