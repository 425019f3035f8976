"""The errors a user can cause, each with the exit code that scripts rely on.

Every message is one readable paragraph: what is wrong, where, and the remedy. The
command line prints it without a traceback (``--debug`` shows the traceback).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_USAGE = 2
EXIT_INTEGRITY = 42
EXIT_PREEMPTED = 138


class CmkdError(Exception):
    """Base of every error that is reported as a paragraph instead of a traceback."""

    exit_code = EXIT_FAULT


class UsageError(CmkdError):
    """Wrong configuration, arguments, environment or launch: exit code 2."""

    exit_code = EXIT_USAGE


class IntegrityError(CmkdError):
    """Data or a checkpoint is not what its digest or format promises: exit code 42."""

    exit_code = EXIT_INTEGRITY


class PreemptedError(CmkdError):
    """The run was asked to stop and has saved its state; run it again: exit code 138."""

    exit_code = EXIT_PREEMPTED


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Name the nearest valid spelling of ``name``, or list what is valid.

    Returns a clause that completes an error message, for example
    ``did you mean 'steps'?`` or ``valid: audio, image, text``.
    """
    choices = sorted(valid)
    near = difflib.get_close_matches(name, choices, n=1)
    return f"did you mean '{near[0]}'?" if near else f"valid: {', '.join(choices)}"
