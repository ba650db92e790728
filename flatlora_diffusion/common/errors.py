"""The errors that a user can mend: each is one line that says what was met, where, and what to do."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input. Command lines print its message and exit with code 2."""


class ToldElsewhereError(UserError):
    """What ended another process of the same command, which prints it; this one only exits with code 2."""


class RunInterruptedError(Exception):
    """A signal stopped the run after its state had been saved.

    Args:
        message: What was saved, and how to continue.
        signal_number: The signal; command lines exit with 128 plus it.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
