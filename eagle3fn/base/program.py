"""What every program here ends with: an exit code, and one line on stderr where it did not end."""

import shlex
from collections.abc import Callable, Sequence

from safetensors import SafetensorError

from eagle3fn.base import progress
from eagle3fn.base.cores import all_ranks
from eagle3fn.base.errors import UserError, is_out_of_memory, one_line
from eagle3fn.base.output import lasting_output, print_error
from eagle3fn.base.signals import Interrupted, signals_raised

AGAIN = "nothing is half written; call again"
"""What to do after a signal, where a program does not say more."""

_SMALLER = (
    "use less at a time (--batch, --batch-tokens, data.micro_batch), shorter samples "
    "(--max-length, data.max_length), or a machine with more memory; eagle3fn plan counts what "
    "training needs"
)


def exit_code(
    name: str, run: Callable[[], int | None], again: str = AGAIN, as_json: bool = False
) -> int:
    """The exit code of a program: what `run` returns, 0 for None.

    A `UserError`, a failure of a file or too little memory becomes 2 and one line on stderr that
    begins with `name`; line breaks and control codes, of a file's text in it, are escaped. A signal
    becomes 128 and its number, and one line that ends with `again`. With `as_json` the line is a
    JSON object with `error` and `exit_code`.
    """
    with lasting_output():
        try:
            with signals_raised():
                return run() or 0
        except Interrupted as error:
            message, code = f"{error}; {again}", 128 + error.number
        except UserError as error:
            message, code = str(error), 2
        except (OSError, SafetensorError) as error:
            message = f"{error}; check that the path is right, writable and has room"
            code = 2
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            message, code = f"out of memory ({_first_line(error)}); {_SMALLER}", 2
        progress.close()
        print_error(f"{name}: {one_line(message)}", code, as_json)
        return code


def _first_line(error: BaseException) -> str:
    """What an allocator says, without the places in its source."""
    text = str(error) or type(error).__name__
    return text.partition("]")[2].strip()[:200] if "enforce fail" in text else text.splitlines()[0]


def called_as(arguments: Sequence[str], ranks: int = 0) -> str:
    """The command line of `eagle3fn` with these arguments, as a user types it.

    `ranks`: processes that torchrun started; 0: those that the environment names.
    """
    ranks = ranks or all_ranks()
    program = "eagle3fn"
    if ranks > 1:
        program = f"torchrun --nproc-per-node {ranks} -m eagle3fn.cli"
    return f"{program} {shlex.join(arguments)}"
