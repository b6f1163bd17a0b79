"""What every program here ends with: an exit code, and one line on stderr for bad input."""

import sys
from collections.abc import Callable

from safetensors import SafetensorError

from eagle3fn.base import progress
from eagle3fn.base.errors import UserError


def exit_code(name: str, run: Callable[[], int | None]) -> int:
    """The exit code of a program: what `run` returns, 0 for None.

    A `UserError`, or a failure of a file, becomes 2 and one line on stderr that begins with `name`.
    """
    try:
        return run() or 0
    except UserError as error:
        message = str(error)
    except BrokenPipeError:  # the reader of our output has enough
        sys.stdout = None
        return 1
    except (OSError, SafetensorError) as error:
        message = f"{error}; check that the path is right, writable and has room"
    progress.close()
    print(f"{name}: {message}", file=sys.stderr)
    return 2
