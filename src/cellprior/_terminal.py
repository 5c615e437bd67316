"""What a command owes its user: text that is only text, one line where it ends, and no traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# control characters, invisible ones that turn text around, halves of characters: names in files may hold any
ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
STOPPING = [number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None))]


class Stopped(BaseException):
    """The process is asked to end."""


class Signals:
    """While it is entered, a signal that asks the process to end is an exception; a second one ends it at once.

    Attributes
    ----------
    caught
        Its number.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks
                    self._before[number] = signal.signal(number, self._stop)
        return self

    def _stop(self, number: int, frame: object) -> None:
        self.caught = number
        for other in self._before:
            signal.signal(other, signal.SIG_DFL)
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def printable(text: object) -> str:
    """Text whose control characters are written out, such as the escape of a terminal; lines and tabs stay."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ESCAPED else c.encode("unicode_escape").decode()
        for c in str(text)
    )


def say(text: str) -> None:
    """Write to the standard output, and end in silence if nobody reads it any more (``| head``)."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(printable(text).encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except OSError as error:
        # what is left in the buffer would fail again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise SystemExit(128 + 13) from None
        raise


def complain(text: str) -> None:
    """Write a line to the standard error."""
    encoding = sys.stderr.encoding or "utf-8"
    sys.stderr.write(f"{printable(text)}\n".encode(encoding, "backslashreplace").decode(encoding))


@contextmanager
def warnings_in_words(prefix: str) -> Iterator[None]:
    """Show warnings without the place in our code that they come from."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *args, **options: f"{prefix}: warning: {printable(message)}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before
