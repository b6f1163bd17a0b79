"""Prompts that the target answers as training goes, as rows of token ids.

A row's prompt is what its chat template renders of the turns before its first trained answer. What
the row says after that is not read: `eagle3fn regenerate` answers every turn of a conversation.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from eagle3fn.base.errors import UserError
from eagle3fn.data.asked import read_asked
from eagle3fn.data.rejects import Dropped
from eagle3fn.data.rendering import Rendering
from eagle3fn.data.sample_file import SampleFile, pack
from eagle3fn.data.samples import Encoded
from eagle3fn.data.template import ChatTemplate
from eagle3fn.data.tokens import Tokens

NO_ROOM = "have no room for an answer within the maximal length"
NOTHING_ASKED = "have no answer to be trained"


class PromptRows(NamedTuple):
    """The prompts of a file, and what it has besides them."""

    samples: SampleFile
    rows: int  # read
    dropped: Dropped  # rows without a prompt, by reason
    further: int  # rows with further answers, which are not written
    rejects: str  # a line on bad rows that were left out, or nothing

    def counts(self) -> dict[str, int]:
        """What an index says of the rows."""
        return {"rows": self.rows, "dropped": self.dropped.total(), "further": self.further}

    def describe(self) -> list[str]:
        """Lines on what is not trained; none if nothing is left out."""
        lines = [self.rejects, self.dropped.describe(self.rows, "prompts")]
        if self.further:
            lines.append(
                f"of {self.further} conversations the first answer alone is written and trained; "
                "eagle3fn regenerate writes all"
            )
        return [line for line in lines if line]


def prompt_rows(
    template: ChatTemplate,
    path: str | Path,
    *,
    max_length: int,
    max_new: int,
    out: str | Path | None = None,
    limit: int | None = None,
    skip_bad: float | None = None,
    rejects: str | Path | None = None,
) -> PromptRows:
    """The prompts of the first `limit` rows of a file (all, if None).

    Each is followed by `max_new` supervised places: what an answer may have, its stop token
    included.

    Args:
        template: the chat template of the target's tokenizer, with its arguments.
        path: a file or folder that `data.row_files` reads, as `regenerate` reads it.
        max_length: tokens of prompt and answer; a longer prompt is dropped, and counted.
        max_new: tokens of an answer, at most.
        out: the file that the rows are written to; None: a temporary one.
        limit: rows read.
        skip_bad: the share of rows that may be bad and are left out; None: none may.
        rejects: the file that rows left out are written to.

    Raises:
        UserError: as `data.asked.read_asked`; no prompt at all.
    """
    asked, said = read_asked(
        path, template, max_new, None, limit=limit, skip_bad=skip_bad, rejects_path=rejects
    )
    tokens = Tokens(template)
    dropped = Dropped()
    further = 0
    samples = SampleFile(out)
    for row in asked:
        if not row.places:
            dropped[NOTHING_ASKED] += 1
            continue
        first = row.places[0]
        rendering = Rendering(template, row.conversation, row.where)
        ids = tokens.prompt(rendering.prompt(first))
        if len(ids) + max_new > max_length:
            dropped[NO_ROOM] += 1
            continue
        further += len(row.places) > 1
        samples.append(pack(_prompt(row.id, ids, max_new)))

    if not samples:
        samples.close()
        raise UserError(
            f"{path}: no prompt: {dropped.describe(len(asked), 'prompts')}; raise --max-length, or "
            "lower --max-new"
        )
    return PromptRows(samples, len(asked), dropped, further, said)


def _prompt(name: str, ids: list[int], max_new: int) -> Encoded:
    """A prompt and the places of an answer, whose ids are not known: the prompt's last one."""
    filled = ids + ids[-1:] * max_new
    mask = [0] * len(ids) + [1] * max_new
    return Encoded(name, torch.tensor(filled), torch.tensor(mask))
