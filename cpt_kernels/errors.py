"""The error that a user of the package can mend, and how a library's errors become it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something that the user gave cannot be used. The message names it and says how to mend it.

    Commands print the message in one line and exit with code 2. Any other exception is a bug and keeps its traceback.
    """


class UnavailableError(UserError, RuntimeError):
    """Something that the user asked for by name is not installed, or cannot run on this machine."""


def describe_failure(error: Exception) -> str:
    """Returns the type, message and last line of code of an exception that a function of the user raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"


@contextmanager
def at_place(where: str, types: tuple[type[Exception], ...] = (UserError,)) -> Iterator[None]:
    """Puts a place, such as a row or a file, in front of the message of a :class:`UserError`, or of other ``types``."""
    try:
        yield
    except types as error:
        raise UserError(f"{where}: {error}") from error


@contextmanager
def user_error(
    what: str | None = None, types: tuple[type[Exception], ...] = (ValueError, OSError, ImportError)
) -> Iterator[None]:
    """Turns the exceptions by which a library refuses a user's input into :class:`UserError`.

    Put it around the call of the library and nothing else: a bug of ours inside would lose its traceback.

    Args:
        what: the option and its value, for a library whose message names neither.
        types: the exceptions that this library raises for bad input.

    Raises:
        UserError: the library raised one of ``types``, which is the cause.
    """
    try:
        yield
    except UserError:
        raise
    except types as error:
        message = str(error).strip() or type(error).__name__
        raise UserError(f"{what}: {message}" if what else message) from error
