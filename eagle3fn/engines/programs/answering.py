"""The engine's end of `engines.process`: one line of JSON in, one out.

It runs under the engine's Python, beside whatever that environment holds: the standard library
alone is imported here.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

Answer = Callable[[dict[str, Any]], Any]

LONGEST = 600  # characters of an error
LOOK_SECONDS = 0.5  # between two looks at the parent


def serve(start: Callable[[dict[str, Any]], tuple[dict[str, Any], Answer]]) -> None:
    """Read the settings, start, and answer requests until stdin is closed.

    `start(settings)` returns the program's facts and a function from a request to its answer, JSON
    values all. An exception becomes one sentence; the traceback goes to stderr, which is a log.
    """
    # Engines print to stdout: it becomes stderr, and the answers have a handle of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    # The parent's death closes stdin, which a program at work does not read.
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()

    def say(**tree: Any) -> None:
        answers.write(json.dumps(tree) + "\n")
        answers.flush()

    try:
        facts, answer = start(json.loads(sys.stdin.readline()))
    except BaseException as error:
        say(error=sentence(error))
        raise SystemExit(1) from None
    say(ready=facts)

    for line in sys.stdin:
        try:
            say(answer=answer(json.loads(line)))
        except Exception as error:
            say(error=sentence(error))


def end_with(parent: int) -> None:
    """End this process once its parent has ended.

    Linux's own signal of that (PR_SET_PDEATHSIG) comes already when the parent's thread ends that
    started this process.
    """
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def sentence(error: BaseException) -> str:
    """An exception in one line."""
    traceback.print_exc(file=sys.stderr)
    if isinstance(error, ModuleNotFoundError):
        return f"{sys.executable} has no module {error.name}; install it there"
    text = " ".join(str(error).split())
    if type(error).__name__ == "UserError":  # a whole sentence already
        return text[:LONGEST]
    return f"{type(error).__name__}: {text}"[:LONGEST]
