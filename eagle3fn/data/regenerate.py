"""A file's answers replaced by the target's own, to train on.

The context of each answer is the conversation so far: the file's other turns, and the target's own
answers to them. The target runs in this process (`ByModel`), or is asked over HTTP
(`data.by_endpoint.ByEndpoint`); either way a run that was cut off goes on where it stopped.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from eagle3fn.data.asked import (
    Asked,
    Given,
    is_finished,
    read_asked,
    turns_before,
    written_row,
)
from eagle3fn.data.cache_check import check_batch
from eagle3fn.data.generate import Sampling, batch_generator, generate
from eagle3fn.data.grams import grams_of_file, without
from eagle3fn.data.parts import Parts, hold_parts, parts_digest
from eagle3fn.data.rendering import Rendering
from eagle3fn.data.template import ChatTemplate
from eagle3fn.data.tokens import Tokens

ANEW = Sampling(temperature=0.5, top_p=0.95, max_new=512)
"""How answers are drawn where nothing else is said."""

OnProgress = Callable[[int, int], None]
"""Called with the conversations answered so far and in all."""


class Source(Protocol):
    """Where answers come from."""

    @property
    def positions(self) -> int | None:
        """The target's, which a conversation must fit; None if they are not known."""
        ...

    def parts(self, out: str | Path, rows: list[Asked], sampling: Sampling, seed: int) -> Parts:
        """Where the answers are kept until all are there."""
        ...

    def answers(
        self,
        parts: Parts,
        rows: list[Asked],
        sampling: Sampling,
        seed: int,
        on_progress: OnProgress,
    ) -> list[list[Given]]:
        """The answers of each row, in the rows' order; those that are kept in `parts` are read."""
        ...


class Regenerated(NamedTuple):
    """What `regenerate` wrote."""

    conversations: int
    answers: int
    cut: int  # answers that ended by the limit; they are kept
    empty: int  # answers without a text; they are kept, and give no sample
    calls: int  # answers that are calls of tools, after which a conversation ends
    kept: int  # calls and answers that stayed as they were, with weight 0
    excluded: int  # conversations left out for the texts of `exclude`
    rejects: str  # a line on bad rows that were left out, or nothing


def regenerate(
    source: Source,
    template: ChatTemplate,
    conversations: str | Path,
    out: str | Path,
    sampling: Sampling = ANEW,
    seed: int = 0,
    limit: int | None = None,
    skip_bad: float | None = None,
    exclude: str | Path | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Regenerated:
    """Give every trained answer of `conversations` anew and write `out`, in the same order.

    An answer that is cut by the limit is kept: the loss is against the target's probabilities at
    every place of it, and an engine cuts answers too. Its row has their number under `cut`.

    Args:
        source: where the answers come from.
        template: the chat template of the target's tokenizer, with its arguments.
        conversations: a file or folder (`data.row_files`) of rows with `prompt`, or with turns
            under `conversations` or `messages`. After a last turn that is no answer, one is added.
            An answer before any other turn has no prompt and stays as it is; calls of tools and
            answers of weight 0 stay too (`data.asked`).
        out: the file of conversations; `.xz` and `.gz` compress.
        sampling: how answers are drawn. With temperature 0 they are the greedy ones.
        seed: of sampling.
        limit: only the first rows; all, if None.
        skip_bad: the share of bad rows that is left out and written to `<out>.rejects.jsonl`;
            None: none may be bad.
        exclude: a file or folder of rows whose texts must be kept out. Conversations that share
            13 words in a row with it are dropped.
        on_progress: called with the conversations answered so far and in all.

    Raises:
        UserError: before the target runs: no chat template, bad rows (`read_asked`); then, what the
            source raises.
    """
    rows, rejects = read_asked(
        conversations,
        template,
        sampling.max_new,
        source.positions,
        limit=limit,
        skip_bad=skip_bad,
        rejects_path=f"{out}.rejects.jsonl",
    )
    forbidden = grams_of_file(exclude) if exclude else set()
    with hold_parts(out):
        parts = source.parts(out, rows, sampling, seed)
        answers = source.answers(parts, rows, sampling, seed, on_progress)
        written = [
            written_row(row, given, template.arguments)
            for row, given in zip(rows, answers, strict=True)
        ]
        kept = without(written, forbidden)
        parts.finish(kept)

    everything = [each for given in answers for each in given]
    return Regenerated(
        conversations=len(kept),
        answers=len(everything),
        cut=sum(each.cut for each in everything),
        empty=sum(each.is_empty for each in everything),
        calls=sum(each.is_call for each in everything),
        kept=sum(row.kept for row in rows),
        excluded=len(written) - len(kept),
        rejects=rejects,
    )


# In this process


class ByModel(NamedTuple):
    """The target in this process answers `batch` conversations together.

    Batch `b` is a pure function of (target, settings, rows of batch `b`).
    """

    model: Any
    template: ChatTemplate
    batch: int = 64

    @property
    def positions(self) -> int | None:
        """As the target's configuration says."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def parts(self, out: str | Path, rows: list[Asked], sampling: Sampling, seed: int) -> Parts:
        """One part for each batch.

        Raises:
            UserError: rows of the target's cache cannot be dropped (not with `batch` 1).
        """
        if self.batch > 1:
            check_batch(self.model)
        asked = [(row.id, row.conversation[:-1], row.places) for row in rows]  # no unused keys
        made_from = (sampling, seed, self.batch, asked)
        return Parts(out, parts_digest(self.model, self.template, out, *made_from))

    def answers(
        self,
        parts: Parts,
        rows: list[Asked],
        sampling: Sampling,
        seed: int,
        on_progress: OnProgress,
    ) -> list[list[Given]]:
        """Batch after batch; finished ones are kept."""
        tokens = Tokens(self.template)
        answers: list[list[Given]] = []
        for index, start in enumerate(range(0, len(rows), self.batch)):
            group = rows[start : start + self.batch]
            write = partial(
                generate,
                self.model,
                self.template.tokenizer,
                sampling=sampling,
                generator=batch_generator(seed, index),
            )
            made = parts.batch(index, partial(_answer_batch, write, self.template, tokens, group))
            answers += [[Given(*each) for each in given] for given in made]
            on_progress(len(answers), len(rows))
        return answers


def _answer_batch(
    write: Callable[..., Any], template: ChatTemplate, tokens: Tokens, rows: Sequence[Asked]
) -> list[list[Given]]:
    """The rows' answers, together: the first answer of all, then the second, …"""
    given: list[list[Given]] = [[] for _ in rows]
    while True:
        # The rows that have answers to come, each up to the place of the next one.
        asked = [index for index, row in enumerate(rows) if not is_finished(row, given[index])]
        if not asked:
            return given
        prompts = []
        for index in asked:
            turns = turns_before(rows[index], given[index])
            conversation = rows[index].conversation._replace(turns=turns)
            rendering = Rendering(template, conversation, rows[index].where)
            prompts.append(rendering.prompt(len(turns)))

        # The answers become the rows' turns: the next ones are given after them.
        for index, answer in zip(asked, write(prompts=prompts), strict=True):
            turn = {"role": "assistant", "content": tokens.text(answer.ids)}
            given[index].append(Given(turn, cut=not answer.ended))
