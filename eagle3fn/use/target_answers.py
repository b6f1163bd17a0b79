"""The target's own greedy answers by transformers' `generate`, to compare with."""

import hashlib
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eagle3fn.base.errors import UserError
from eagle3fn.base.files import json_sha256, write_json
from eagle3fn.base.places import check_out_file
from eagle3fn.base.read import read_object
from eagle3fn.data.target_files import check_kept, loaded_digest
from eagle3fn.use.decode import until_end

_TOGETHER = 10  # prompts decoded together


def greedy_together(
    model: Any, prompts: list[Tensor], max_new: int, end_tokens: Collection[int]
) -> list[list[int]]:
    """Greedy answers to prompts, each `(1, P)`, decoded together, padded on the left.

    The model's own generation config has no effect, and is as before afterwards.
    """
    # (B, P) of the longest prompt's P
    longest = max(prompt.shape[1] for prompt in prompts)
    padded = []
    for prompt in prompts:
        padded.append(F.pad(prompt, (longest - prompt.shape[1], 0), value=min(end_tokens)))
    lengths = torch.tensor([[prompt.shape[1]] for prompt in prompts])
    mask = (torch.arange(longest) >= longest - lengths).long().to(model.device)

    # `generate` fills values missing in its argument from the model's config, so that one is
    # replaced too.
    greedy = _greedy_config(max_new, end_tokens)
    own = model.generation_config
    model.generation_config = greedy
    try:
        out = model.generate(torch.cat(padded), attention_mask=mask, generation_config=greedy)
    finally:
        model.generation_config = own

    # After its end token a row is padded.
    return [until_end(row, end_tokens) for row in out[:, longest:].tolist()]


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

    `store`, a JSON file, keeps the answers for the next draft of the same target, each with its
    digest. It is written after every few new answers.

    Raises:
        UserError: `store` holds something else, or an answer that was changed.
    """
    keep = None if store is None else kept_hashes(store)
    stored = {} if store is None else read_store(store)

    # An answer belongs to the target's weights, its dtype, the limits and the prompt.
    target = loaded_digest(model, keep)
    keys = []
    for prompt in prompts:
        request = (target, str(model.dtype), max_new, sorted(end_tokens), prompt.tolist())
        keys.append(hashlib.sha256(repr(request).encode()).hexdigest())

    # New ones, a few together: a step reads the weights once for all of them.
    new = [number for number, key in enumerate(keys) if key not in stored]
    for start in range(0, len(new), _TOGETHER):
        chosen = new[start : start + _TOGETHER]
        asked = [prompts[number] for number in chosen]
        found = greedy_together(model, asked, max_new, end_tokens)
        stored |= {keys[number]: answer for number, answer in zip(chosen, found, strict=True)}
        if store is not None:
            write_json(store, {key: _kept(key, answer) for key, answer in stored.items()})
        on_done(len(prompts) - len(new) + start + len(chosen))

    answers = [stored[key] for key in keys]
    size = model.get_input_embeddings().num_embeddings
    for answer in answers:
        if not 1 <= len(answer) <= max_new or not all(0 <= token < size for token in answer):
            raise UserError(f"{store}: holds an answer that the target cannot give; delete it")
    return answers


def kept_hashes(store: Path) -> Path:
    """The file next to a store that keeps hashes of the target's files."""
    return store.with_suffix(".target.json")


def read_store(store: Path) -> dict[str, list[int]]:
    """The kept answers by their keys; none if there is no file yet.

    Those of earlier versions, which are lists without a digest, are left out.

    Raises:
        UserError: no place for the file, another file, or an answer that was changed; something
            else is in the place of `kept_hashes`.
    """
    check_out_file(store)
    check_kept(kept_hashes(store))
    tree = read_object(store) if os.path.lexists(store) else {}
    answers = {}
    for key, entry in tree.items():
        tokens = entry.get("tokens") if isinstance(entry, dict) else entry
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise UserError(
                f"{store}: does not hold the target's kept answers; name another file, or delete it"
            )
        if tokens is entry:
            continue
        if entry != _kept(key, tokens):
            raise UserError(
                f"{store}: an answer was changed since it was kept; delete the file, and the "
                "target answers anew"
            )
        answers[key] = tokens
    return answers


def _kept(key: str, tokens: list[int]) -> dict[str, Any]:
    """An answer as it is kept, with a digest of it and of what it answers."""
    return {"tokens": tokens, "sha256": json_sha256([key, tokens])}
