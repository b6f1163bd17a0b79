"""User errors: one type, raised with what is wrong, where, and what to do."""


class UserError(ValueError):
    """Bad input or configuration. The message names the file or value, the constraint, the remedy.

    The command line prints it without a traceback and exits with status 2.
    """
