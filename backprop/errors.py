"""Errors a user can act on: one class per exit code of the command line.

A `BackpropError` carries the fact, and a hint that can be typed. Programmer's mistakes are not wrapped in it.
"""


class BackpropError(Exception):
    """Something the user can mend.

    Args:
        message: What happened, with the file, row or option; both numbers where there are two.
        hint: What to type or change. None only if there is nothing to be done.
        details: What is too long for the terminal, such as the rows of a batch; a run writes it to its crash.txt.
    """

    code = 1

    def __init__(self, message: str, *, hint: str | None = None, details: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details


class UsageError(BackpropError):
    """An option or configuration that cannot be."""

    code = 2


class DataError(BackpropError):
    """Data that is missing, unreadable, or holds nothing to train on."""

    code = 3


class ModelError(BackpropError):
    """A model that is not found, gated, unsupported, or in an unsafe format."""

    code = 4


class HardwareError(BackpropError):
    """No usable GPU or driver, or a model that does not fit it."""

    code = 5


class TrainingError(BackpropError):
    """Training that went wrong: a loss or gradient that is not finite, or a proof that does not hold."""

    code = 6


class Diverged(TrainingError):  # noqa: N818 - what happened, not whose fault it is
    """A loss or gradient that is not finite; the update was not made."""


class ExportError(BackpropError):
    """An export, or the check of what was exported, that failed."""

    code = 7


class RejectedError(ExportError):
    """A file that is not the model that was trained, or gives no answer."""


class OllamaError(BackpropError):
    """An Ollama server that is unreachable, refuses, or holds another model than it was given."""

    code = 8


class DiskError(BackpropError):
    """A disk that is full or may not be written."""

    code = 9


class ToolError(ExportError):
    """A program or library that export needs, and that is missing or failed."""


class PackageError(UsageError):
    """An option that needs a package which is not installed."""


class Interrupted(BackpropError):  # noqa: N818 - it is not a fault
    """The user pressed Ctrl-C."""

    code = 130


class Stopped(BackpropError):  # noqa: N818 - it is not a fault
    """Another program asked for the end, or the time is over; the same command goes on."""

    code = 75


EXIT_CODE_OF_A_BUG = 1
