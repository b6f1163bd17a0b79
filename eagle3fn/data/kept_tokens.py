"""Which tokens a draft must be able to propose however rare they are in the data."""

from pathlib import Path
from typing import Any, NamedTuple

from eagle3fn.base.errors import UserError, one_line
from eagle3fn.data.target_loading import load_tokenizer
from eagle3fn.data.target_values import stored_stops, token_ids


class KeptTokens(NamedTuple):
    """Ids that a vocabulary map always has, and what they are."""

    ids: tuple[int, ...]  # ascending, below the vocabulary's size
    texts: tuple[str, ...]  # of each; its number where the tokenizer isn't known
    unknown: str = ""  # why the tokenizer's tokens are not among them; empty if they are


def kept_tokens(target: str | Path, vocab_size: int) -> KeptTokens:
    """The stop tokens, and the tokenizer's added tokens that its chat template names.

    A draft that can't propose its stop token drafts on after every answer. What the template names
    (marks of turns, of tool calls, of thoughts) is what a target may write that is no plain text;
    reserved tokens, of which some tokenizers have hundreds, are in no template.

    Args:
        target: its folder, GGUF file or id.
        vocab_size: `V`; ids from there on have no logit.

    Raises:
        UserError: a damaged generation_config.json or config.json.
    """
    ids = stored_stops(target)
    texts: dict[int, str] = {}
    unknown = ""
    try:
        tokenizer = load_tokenizer(target)
    except UserError as error:
        unknown = one_line(str(error))
    else:
        ids |= token_ids(tokenizer.eos_token_id)
        templates = _templates(tokenizer)
        for number, token in tokenizer.added_tokens_decoder.items():
            texts[number] = token.content
            if any(token.content in template for template in templates):
                ids.add(number)

    known = sorted(number for number in ids if number < vocab_size)
    return KeptTokens(tuple(known), tuple(texts.get(n, str(n)) for n in known), unknown)


def _templates(tokenizer: Any) -> list[str]:
    """The texts of the tokenizer's chat templates: none, one, or several by name."""
    found = tokenizer.chat_template
    return list(found.values()) if isinstance(found, dict) else [found] if found else []
