"""What is trained on of one conversation, from Python: its tokens, their mask, and both as text."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from eagle3fn.data.inspection import show_sample
from eagle3fn.data.samples import Encoded, SampleMaker, Samples
from eagle3fn.data.target import stop_ids
from eagle3fn.data.target_loading import load_tokenizer
from eagle3fn.data.template import ChatTemplate
from eagle3fn.data.turns import check_given, conversation_of


class Encoder(NamedTuple):
    """Two functions of a target's tokenizer and chat template, and the tokenizer."""

    tokenizer: Any
    """transformers' object: `decode(ids)` is the text."""

    encode: Callable[[Mapping[str, Any]], Samples]
    """`row → Samples`: of a conversation, written as a line of a JSONL file is, the samples that
    `eagle3fn extract` makes; and why an answer gives none. Raises a UserError that names the turn
    where the row is malformed or the chat template does not render it.
    """

    show: Callable[[Encoded], str]
    """A sample as `eagle3fn inspect` prints it, prompt and answer apart, supervised text in ⟦ ⟧."""


def open_encoder(
    target: str | Path,
    max_length: int = 2048,
    template_arguments: Mapping[str, Any] | None = None,
) -> Encoder:
    """Read a target's tokenizer and chat template. No weights are read.

    Args:
        target: its folder, GGUF file or id.
        max_length: tokens that a sample is cut to.
        template_arguments: what the chat template is given besides the turns, as by
            `--template-arg`: `{"enable_thinking": False}`.

    Raises:
        UserError: not loadable, or an argument that is not the user's to give.
    """
    arguments = dict(template_arguments or {})
    check_given(arguments, "template_arguments")

    tokenizer = load_tokenizer(target)
    template = ChatTemplate(tokenizer, stop_ids(target, tokenizer), arguments)
    maker = SampleMaker(template, max_length)

    def encode(row: Mapping[str, Any]) -> Samples:
        return maker.samples("row", conversation_of(dict(row), "row"), "row")

    return Encoder(tokenizer, encode, partial(show_sample, tokenizer, colour=False))
