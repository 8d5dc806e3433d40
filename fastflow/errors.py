"""Failures that are the user's to fix: the command line prints their message alone, without a traceback, and exits
with 2."""

from __future__ import annotations

__all__ = ["MissingExtra", "UserError", "missing_extra"]


class UserError(Exception):
    """Something that the person at the keyboard can put right: a wrong name, a broken file, a full disk.

    The message says what was expected, what came and what to do next; it is shown as it is.
    """


class MissingExtra(UserError):
    """A package that belongs to one of the optional extras is not installed."""


def missing_extra(extra: str, package: str) -> MissingExtra:
    """The error for `package`, which `extra` would have installed.

    Args:
        extra: name of the extra in setup.py, such as "rl".
        package: name of the package whose import failed, such as "ogbench".
    """
    return MissingExtra(f'{package} is not installed, and this needs it: pip install "fastflow[{extra}]"')
