"""The target writes its own conversations: it completes a user turn, answers it, and so on.

Batch `b` is a pure function of (target, seed, settings, threads, `b`): a run that was cut off goes
on where it stopped, with the number of threads that it began with. What is kept of a batch is
decided by `data.filters`, from the texts alone.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from eagle3fn.base.errors import UserError
from eagle3fn.data.cache_check import check_batch
from eagle3fn.data.filters import MOST_REPEATED, Sieve
from eagle3fn.data.generate import Continuation, Sampling, batch_generator, generate
from eagle3fn.data.grams import grams_of_file
from eagle3fn.data.openings import ENGLISH, check_languages, opening, stub
from eagle3fn.data.parts import Parts, hold_parts, parts_digest
from eagle3fn.data.rejects import Dropped, rejecting, usable
from eagle3fn.data.row_files import FileRow, read_rows
from eagle3fn.data.row_values import shown, unicode_text, width
from eagle3fn.data.template import ChatTemplate
from eagle3fn.data.tokens import Tokens
from eagle3fn.data.turns import Turn
from eagle3fn.data.user_turns import prompt_after, user_head

# A target is refused if after this many batches less than this share of its turns are usable.
_TRIED_BATCHES = 20
_USABLE_SHARE = 0.05

_SHORTEST_USER = 12  # columns (`row_values.width`)
_SHORTEST_ANSWER = 16  # tokens
_NOT_WRITTEN = (
    f"have a user turn that is cut or under {_SHORTEST_USER} columns, or an answer of under "
    f"{_SHORTEST_ANSWER} tokens"
)

USER_TURN = Sampling(temperature=0.8, top_p=0.95, max_new=144)
ANSWER = Sampling(temperature=0.5, top_p=0.95, max_new=224)


class Settings(NamedTuple):
    """What the batches are a function of, next to the target and its template."""

    answer: Sampling = ANSWER
    seed: int = 0  # of all that is drawn
    batch: int = 64  # conversations written together
    turns: int = 1  # user turns of a conversation, at most
    systems: tuple[str, ...] = ()  # one is drawn for each conversation; an empty one is none
    languages: tuple[str, ...] = (ENGLISH,)  # of openings; one is drawn for each conversation


class Written(NamedTuple):
    """What `synthesize` wrote."""

    conversations: int
    turns: int  # user turns in them
    asked: int  # conversations that were begun
    dropped: Dropped  # of these, by reason


def synthesize(
    model: Any,
    template: ChatTemplate,
    out: str | Path,
    count: int,
    settings: Settings = Settings(),  # noqa: B008
    exclude: str | Path | None = None,
    most_repeated: float = MOST_REPEATED,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Written:
    """Write `count` or more conversations to `out` (JSONL, `.xz` and `.gz` compress).

    Finished batches are kept in `<out>.parts/` until all are there. A call with the same target,
    template and settings takes them up again, also under other bounds.

    A conversation ends before a user turn that is not usable or does not fit the target's
    positions, before an answer of under 16 tokens, and after an answer that the limit cut. It is
    dropped if that leaves nothing, if its user turn or more than half of its 13-grams were in
    those before it, or by the two bounds.

    Args:
        model: the target, on any device.
        template: the chat template of the target's tokenizer, with its arguments.
        out: the file of conversations.
        count: conversations to write, at least.
        settings: how they are written.
        exclude: a file or folder of rows whose texts must be kept out. Conversations that share
            13 words in a row with it are dropped.
        most_repeated: the share of a turn's 8-grams that may be repetitions; 1 drops none.
        on_progress: called with the conversations so far and `count`.

    Raises:
        UserError: the tokenizer has no chat template, or it does not show system turns where there
            are system texts; an unknown language; rows of the target's cache cannot be dropped (not
            with `batch` 1), or less than 5% of the turns asked for are usable.
    """
    check_languages(settings.languages)
    _check_systems(template, settings.systems)
    if settings.batch > 1:
        check_batch(model)
    sieve = Sieve(grams_of_file(exclude) if exclude else set(), most_repeated)
    with hold_parts(out):
        parts = Parts(out, parts_digest(model, template, out, USER_TURN, *settings))
        batches = _batches(model, template, parts, settings)
        rows, asked, dropped = _chosen(batches, sieve, count, settings.batch, on_progress)
        parts.finish(rows)
    turns = sum(turn["role"] == "user" for row in rows for turn in row["conversations"])
    return Written(len(rows), turns, asked, dropped)


def read_systems(path: str | Path) -> tuple[str, ...]:
    """The system texts of a file: JSON texts, or rows with `system`, one a line.

    An empty text is one without a system turn.

    Raises:
        UserError: unreadable, bad rows, or none.
    """
    with rejecting(path) as rejects:
        texts = tuple(usable(read_rows(path), _system, rejects))
    if not texts:
        raise UserError(f'{path}: no system texts; write one JSON text a line, as "Be brief."')
    return texts


def _system(row: FileRow) -> str:
    text = row.value.get("system") if isinstance(row.value, dict) else row.value
    if not isinstance(text, str):
        raise UserError(
            f'{row.where}: {shown(row.value)}: must be a JSON text, as "Be brief.", or a row with '
            "system; mend or delete the row"
        )
    return unicode_text(text, "system", row.where)


def _check_systems(template: ChatTemplate, systems: Sequence[str]) -> None:
    if any(systems) and not template.has_role("system", first=True):
        raise UserError(
            f"the chat template of {template.name} does not render system turns; leave --system out"
        )


def _chosen(
    batches: Iterator[list[dict]],
    sieve: Sieve,
    count: int,
    batch: int,
    on_progress: Callable[[int, int], None],
) -> tuple[list[dict], int, Dropped]:
    """The first `count` conversations that are kept, or a few more; how many were begun, and
    why the others are dropped.
    """
    rows: list[dict] = []
    dropped = Dropped()
    for tried in itertools.count(1):
        written = next(batches)
        if len(written) < batch:
            dropped[_NOT_WRITTEN] += batch - len(written)
        for row in written:
            reason = sieve.reason_against(row["conversations"])
            if reason is None:
                rows.append(row)
            else:
                dropped[reason] += 1

        on_progress(len(rows), count)
        if len(rows) >= count:
            return rows, tried * batch, dropped
        if tried >= _TRIED_BATCHES and len(rows) < _USABLE_SHARE * tried * batch:
            reasons = dropped.describe_reasons(
                f"target wrote {len(rows)} usable turns of {tried * batch} asked for"
            )
            raise UserError(f"{reasons}; take an instruction-tuned target, or exclude less")
    raise AssertionError("batches are endless")


def _batches(
    model: Any, template: ChatTemplate, parts: Parts, settings: Settings
) -> Iterator[list[dict]]:
    """Endless batches of conversations."""
    for index in itertools.count():
        yield parts.batch(index, partial(_write_batch, model, template, settings, index))


# Writing a batch


class _Talk(NamedTuple):
    """A conversation that goes on."""

    name: int
    turns: list[Turn]
    start: str = ""  # what its next user turn begins with: at first the opening


def _write_batch(model: Any, template: ChatTemplate, settings: Settings, index: int) -> list[dict]:
    """The usable conversations of batch `index`, at most `settings.batch`."""
    write = partial(
        generate, model, template.tokenizer, generator=batch_generator(settings.seed, index)
    )
    tokens = Tokens(template)
    names = range(index * settings.batch, (index + 1) * settings.batch)
    going = [_begun(settings, name) for name in names]
    answered: dict[int, list[Turn]] = {}
    for _ in range(settings.turns):
        # User turns: the target writes on after the template's beginning of such a turn.
        fitting = list(_fitting(model, template, tokens, going, settings))
        completed = write([head for _, head in fitting], USER_TURN)
        asking = []
        for (talk, _), rest in zip(fitting, completed, strict=True):
            user = _user_text(template, talk, rest, settings.seed)
            if user is not None:
                asking.append(_Talk(talk.name, [*talk.turns, {"role": "user", "content": user}]))

        # Answers, of any ending; short ones are dropped, and after one that was cut nothing comes.
        prompts = [prompt_after(template, talk.turns) for talk in asking]
        going = []
        for talk, answer in zip(asking, write(prompts, settings.answer), strict=True):
            if len(answer.ids) < _SHORTEST_ANSWER:
                continue
            text = tokens.text(answer.ids)
            answered[talk.name] = [*talk.turns, {"role": "assistant", "content": text}]
            if answer.ended:
                going.append(_Talk(talk.name, answered[talk.name]))
    return [_row(template, settings.seed, name, turns) for name, turns in answered.items()]


def _begun(settings: Settings, name: int) -> _Talk:
    """Conversation `name` with its system turn, if it has one, and its opening."""
    turns: list[Turn] = []
    if settings.systems:
        text = random.Random(f"system/{settings.seed}/{name}").choice(settings.systems)
        if text:
            turns.append({"role": "system", "content": text})
    return _Talk(name, turns, opening(settings.seed, name, settings.languages))


def _fitting(
    model: Any,
    template: ChatTemplate,
    tokens: Tokens,
    going: list[_Talk],
    settings: Settings,
) -> Iterator[tuple[_Talk, str]]:
    """The conversations that can go on, each with the text up to its next user turn.

    Those that have an answer go on only while another turn of the longest fits the target's
    positions.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    turn = USER_TURN.max_new + settings.answer.max_new
    for talk in going:
        head = user_head(template, talk.turns) + talk.start
        if talk.start or limit is None or len(tokens.prompt(head)) + turn <= limit:
            yield talk, head


def _user_text(template: ChatTemplate, talk: _Talk, rest: Continuation, seed: int) -> str | None:
    """A user turn, from what the target wrote; None if it cannot be used.

    It can if it ended by itself, or is code to be cut after its docstring.
    """
    if not rest.ended and '"""' not in talk.start:
        return None
    text = talk.start + template.tokenizer.decode(rest.ids, skip_special_tokens=True)
    text = stub(text, seed, talk.name).strip()
    return text if width(text) >= _SHORTEST_USER else None


def _row(template: ChatTemplate, seed: int, name: int, turns: list[Turn]) -> dict[str, Any]:
    row: dict[str, Any] = {"id": f"{seed}-{name}", "conversations": turns}
    if template.arguments:
        row["chat_template_kwargs"] = template.arguments
    return row
