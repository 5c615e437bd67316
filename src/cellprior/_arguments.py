"""Ranges of arguments: those that networks state, checked alike for users and for files, and those of methods."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

LARGEST = 2**20  # of a width or a number of layers, and far above any
LARGEST_SUM = 1e12  # counts that a cell is scaled to: squares of it are finite in float32


def whole(*, least: int = 1, most: int = LARGEST, **values: Any) -> None:
    """Refuse what is no whole number of this range.

    Raises ValueError, with the name of the argument.
    """
    for name, value in values.items():
        if not _is(value, Integral) or not least <= value <= most:
            msg = f"{name}={_shown(value)}; needed: a whole number from {least} to {most:,}."
            raise ValueError(msg)


def count(**values: Any) -> None:
    """Refuse what is no whole number from 1 on."""
    for name, value in values.items():
        if not _is(value, Integral) or value < 1:
            msg = f"{name}={value!r}; a whole number is needed, 1 or more."
            raise ValueError(msg)


def pair(*, least: int = 1, **values: Any) -> None:
    """Refuse what is no pair of whole numbers."""
    for name, value in values.items():
        if not isinstance(value, list | tuple) or len(value) != 2:
            msg = f"{name}={_shown(value)}; needed: two whole numbers."
            raise ValueError(msg)
        whole(least=least, **{f"{name}[{i}]": part for i, part in enumerate(value)})


def share(**values: Any) -> None:
    """Refuse what is no number from 0 to below 1."""
    for name, value in values.items():
        if not _is(value, Real) or not 0 <= value < 1:
            msg = f"{name}={_shown(value)}; needed: a number from 0 to below 1."
            raise ValueError(msg)


def positive(*, most: float = LARGEST_SUM, **values: Any) -> None:
    """Refuse what is no number above 0."""
    for name, value in values.items():
        if not _is(value, Real) or not 0 < value <= most:
            msg = f"{name}={_shown(value)}; needed: a number above 0, of at most {most:g}."
            raise ValueError(msg)


def flag(**values: Any) -> None:
    """Refuse what is neither True nor False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            msg = f"{name}={_shown(value)}; needed: True or False."
            raise ValueError(msg)


def one_of(choices: Collection[str], **values: Any) -> None:
    """Refuse what is none of some words."""
    for name, value in values.items():
        if not isinstance(value, str) or value not in choices:
            known = " or ".join(f'"{word}"' for word in choices)
            msg = f"{name}={_shown(value)} is not known; choose {known}."
            raise ValueError(msg)


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
