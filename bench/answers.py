"""The child's half of a side that runs in a process of its own: lines in, lines of JSON out.

It imports nothing of this package, so that it also loads in a peer's environment. Its other half is
`bench.peers`.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO


def open_answers() -> TextIO:
    """The real stdout, for answers alone: whatever else is printed goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def serve(answers: TextIO, ready: dict[str, Any], update: Callable[[], Any]) -> None:
    """Answer `ready`, then make one step for each line on stdin, until it ends.

    Between the lines the process is blocked: it takes no processor time from the other sides.

    Args:
        answers: from `open_answers`.
        ready: the first answer; JSON values.
        update: makes a step; returns its loss as a number or a tensor of one.
    """
    _answer(answers, ready)
    for _ in sys.stdin:
        begin = time.process_time()
        loss = float(update())
        spent = time.process_time() - begin
        _answer(answers, {"loss": loss, "processor_seconds": spent})


def _answer(answers: TextIO, values: dict[str, Any]) -> None:
    print(json.dumps(values), file=answers, flush=True)
