"""Where a user turn begins in a rendered conversation, and where the answer to it does."""

from collections.abc import Sequence

from eagle3fn.base.errors import UserError, printable
from eagle3fn.data.template import ChatTemplate
from eagle3fn.data.turns import Turn

_PLACEHOLDER = "\x02user turn\x02"  # found again in a rendered template


def user_head(template: ChatTemplate, turns: Sequence[Turn] = ()) -> str:
    """What the chat template has before a user turn that follows `turns`.

    Raises:
        UserError: no chat template, or it refuses the turns, or does not show the last of them.
    """
    messages = [template.message(turn) for turn in (*turns, _user(_PLACEHOLDER))]
    text = template.render(messages, "a user turn", **template.arguments)
    head, placeholder, _ = text.partition(_PLACEHOLDER)
    if not placeholder:
        raise UserError(
            f"{template.name}: its chat template does not show a user turn after "
            f"{len(turns)} others; lower --turns, or leave --system out"
        )
    return head


def prompt_after(template: ChatTemplate, turns: Sequence[Turn], where: str = "a user turn") -> str:
    """The chat template around `turns`, up to where the answer to the last one begins.

    Raises:
        UserError: no chat template, or it refuses the turns; `where` names them.
    """
    messages = [template.message(turn) for turn in turns]
    return template.render(messages, where, add_generation_prompt=True, **template.arguments)


def chat_prompt(template: ChatTemplate, user: str, where: str = "a user turn") -> str:
    """`prompt_after` one user turn."""
    return prompt_after(template, [_user(user)], where)


def describe_prompts(template: ChatTemplate) -> str:
    """A line for people on what a prompt becomes: the chat template around the word PROMPT.

    Raises:
        UserError: as `chat_prompt`.
    """
    rendered = printable(chat_prompt(template, "PROMPT"), 200)
    return f"prompts go into the chat template of {template.name}: {rendered}"


def _user(text: str) -> Turn:
    return {"role": "user", "content": text}
