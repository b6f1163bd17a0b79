"""The first answers of an evaluation round by round, as texts: proposed, accepted, emitted."""

from collections.abc import Sequence
from typing import Any

from eagle3fn.base.kinds import Check, is_count, is_text
from eagle3fn.use.decode import Decoded

ANSWERS = 3  # of the first prompts
TOKENS = 128  # of an answer: rounds that begin after them are left out
_LETTERS = 4000  # of a prompt
_CONTEXT = 8  # tokens before a proposal that its text is decoded after
_PART = "\ufffd"  # what a tokenizer decodes a part of a letter to


def describe_rounds(
    decoded: Sequence[Decoded], prompts: Sequence[str], tokenizer: Any
) -> list[dict[str, Any]]:
    """Of the first `ANSWERS` answers: the prompt, the prefill's token, and each round.

    A round has what was `drafted`, how many of these were `accepted`, and what was `emitted`: the
    accepted ones, then one of the target's. An end token among the accepted ones is the last of
    both: what follows it is neither accepted nor emitted.

    Each token is its id and the text that it adds, which is empty where a letter is not whole yet.
    `left_out` counts the tokens after the first `TOKENS`.

    Args:
        decoded: by this package; one to each prompt.
        prompts: the user turns.
        tokenizer: the target's.
    """
    examples = []
    for answer, prompt in zip(decoded[:ANSWERS], prompts, strict=False):
        texts = pieces(tokenizer, [], answer.tokens[: TOKENS + 1])
        rounds = []
        place = 1  # the prefill's token comes first
        for each in answer.rounds:
            end = place + each.emitted
            if end > len(texts):
                break
            before = answer.tokens[max(place - _CONTEXT, 0) : place]
            rounds.append(
                {
                    "drafted": each.drafted,
                    "drafted_text": pieces(tokenizer, before, each.drafted),
                    "accepted": min(each.accepted, each.emitted),
                    "emitted": answer.tokens[place:end],
                    "emitted_text": texts[place:end],
                }
            )
            place = end
        examples.append(
            {
                "prompt": _storable(prompt[:_LETTERS]) + ("…" if len(prompt) > _LETTERS else ""),
                "first": answer.tokens[:1],
                "first_text": texts[:1],
                "rounds": rounds,
                "left_out": len(answer.tokens) - place,
            }
        )
    return examples


def pieces(tokenizer: Any, context: list[int], ids: list[int]) -> list[str]:
    """The text that each of `ids` adds after `context`; together they are the text of all.

    A letter of several tokens belongs to its last one.
    """
    shown = _decoded(tokenizer, context).rstrip(_PART)
    texts = []
    for count in range(1, len(ids) + 1):
        text = _decoded(tokenizer, context + ids[:count])
        if text.endswith(_PART) and count < len(ids):
            texts.append("")
            continue
        texts.append(_storable(text[len(shown) :]))
        shown = text
    return texts


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    if not ids:
        return ""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _storable(text: str) -> str:
    """The text without halves of surrogate pairs, which no JSON file may hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


# Read again


def is_examples(value: Any) -> bool:
    """Whether a value is what `describe_rounds` gives."""
    return isinstance(value, list) and len(value) <= ANSWERS and all(map(_is_example, value))


def _is_example(value: Any) -> bool:
    kinds: dict[str, Check] = {"prompt": is_text, "left_out": is_count}
    if not _holds(value, kinds) or not _are_tokens(value, "first"):
        return False
    rounds = value.get("rounds")
    return isinstance(rounds, list) and len(rounds) <= TOKENS and all(map(_is_round, rounds))


def _is_round(value: Any) -> bool:
    if not _holds(value, {"accepted": is_count}):
        return False
    if not _are_tokens(value, "drafted") or not _are_tokens(value, "emitted"):
        return False
    return value["accepted"] <= len(value["drafted"])


def _holds(value: Any, kinds: dict[str, Check]) -> bool:
    if not isinstance(value, dict) or not kinds.keys() <= value.keys():
        return False
    return all(good(value[name]) for name, good in kinds.items())


def _are_tokens(value: dict[str, Any], name: str) -> bool:
    """Ids under a name and their texts."""
    ids = value.get(name)
    texts = value.get(f"{name}_text")
    if not isinstance(ids, list) or not isinstance(texts, list) or len(ids) != len(texts):
        return False
    return all(map(is_count, ids)) and all(map(is_text, texts))
