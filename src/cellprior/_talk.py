"""What is said while something runs: bars and lines on the standard error, as :data:`cellprior.settings` asks."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from cellprior.settings import settings

SOON = 2.0  # seconds; a step that takes less leaves no bar behind
SELDOM = 10.0  # seconds between two states of a bar in a log file, where none overwrites the one before
BAR = "{l_bar}{bar}| {n:,.0f} of {total:,.0f}{unit} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
LIGHTNING = ("lightning.pytorch", "lightning.fabric")

_inside: ContextVar[bool] = ContextVar("inside", default=False)  # of a step that has a bar
_wanted: ContextVar[bool | None] = ContextVar("wanted", default=None)  # by a caller of several steps


@contextmanager
def drawing(progress: bool | None) -> Iterator[None]:
    """Let all steps within draw bars or not, as the ``progress=`` of their caller says; ``None`` changes nothing."""
    token = _wanted.set(_wanted.get() if progress is None else progress)
    try:
        yield
    finally:
        _wanted.reset(token)


@contextmanager
def bar(
    total: int | None,
    what: str,
    *,
    unit: str = " cells",
    progress: bool | None = None,
    initial: int = 0,
    parts: int = 1,
) -> Iterator[Any]:
    """A bar of progress with speed and time left, for a step of more than a few seconds.

    Steps within this one draw no bar and say nothing: the outermost speaks for them.

    Parameters
    ----------
    total
        How much there is to do; ``None`` if that is not known.
    what
        What is done, in front of the bar.
    unit
        What is counted, with a space before it; ``"B"`` for bytes.
    progress
        Whether to draw it; ``None`` for what :func:`drawing` or else ``cellprior.settings.progress`` says. In a log
        file or a notebook, a short step draws one only if it was asked for by name.
    initial
        How much is done already.
    parts
        Updates that make one of ``unit``; ``total`` and ``initial`` count updates.
    """
    from tqdm import tqdm

    progress = _wanted.get() if progress is None else progress
    wanted = settings.progress if progress is None else progress
    on_screen = sys.stderr is not None and sys.stderr.isatty()
    at_once = on_screen or bool(progress or settings._progress)
    shown: dict[str, Any] = {"unit_scale": True} if unit == "B" else {"unit_scale": 1 / parts}
    if total is not None and unit != "B":
        shown["bar_format"] = BAR
    with tqdm(
        total=total,
        initial=initial,
        desc=what,
        unit=unit,
        disable=not wanted or _inside.get(),
        dynamic_ncols=on_screen,
        ncols=None if on_screen else 120,
        mininterval=0.1 if on_screen else SELDOM,
        delay=0.0 if at_once else SOON,
        **shown,
    ) as drawn:
        token = _inside.set(True)
        try:
            yield drawn
        finally:
            _inside.reset(token)
            if not drawn.disable:
                drawn.leave = not on_screen or drawn.format_dict["elapsed"] >= SOON
                drawn.miniters = 0  # the last state is drawn, however few steps it is away


def tell(text: str, *, verbosity: int = 1) -> None:
    """Say something that is no warning, if ``cellprior.settings.verbosity`` is high enough."""
    if settings.verbosity < verbosity or (_inside.get() and settings.verbosity < 2):
        return
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def warn(text: str) -> None:
    """A UserWarning at the line of the first caller outside this package, however deep it comes from."""
    package = os.path.join(os.path.dirname(__file__), "")
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, UserWarning, stacklevel=level)


@contextmanager
def without_trainer_talk() -> Iterator[None]:
    """Leave out what Lightning says of devices, products and its own future; a level that a user has set is kept.

    With ``settings.verbosity = 2`` it is all there.
    """
    if settings.verbosity > 1:
        yield
        return
    loggers = [logger for logger in map(logging.getLogger, LIGHTNING) if logger.level == logging.INFO]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):
                warnings.filterwarnings("ignore", category=category, module=r"lightning\.")
            yield
    finally:
        for logger in loggers:
            logger.setLevel(logging.INFO)
