"""When to say "unknown": limits on held-out cells that keep a promise on new ones."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import numpy as np
from scipy.stats import binom

ERROR_CONFIDENCE = 0.9  # with which the error among the named cells is promised
NAMED_SHARES = tuple(np.arange(4, 21) / 20)  # of the cells that look known, tried until the error is too high
SPARE_ERRORS = 3  # of the first share tried, lest one unlucky cell among a few ends the search


class Limits(NamedTuple):
    """A cell is unknown from this novelty on, or up to this confidence."""

    novelty: float
    confidence: float


def cells_needed(reject: float) -> int:
    """Fewest calibration cells with which both promises of ``reject`` can be kept."""
    n = _named_needed(reject)
    while n - int(reject * (n + 1)) < _named_needed(reject):
        n += 1
    return n


def check_share(reject: float) -> None:
    """Refuse with a ValueError what is no share."""
    if not 0 < reject < 1:
        msg = f"reject={reject}; a share between 0 and 1 is needed, such as 0.1."
        raise ValueError(msg)


def check_reject(reject: float, n_cells: int, advice: str) -> None:
    """Refuse a share that is none, or that so few calibration cells cannot promise.

    Raises
    ------
    ValueError
        With the number of cells needed, and the advice.
    """
    check_share(reject)
    if n_cells < (needed := cells_needed(reject)):
        msg = (
            f"reject={reject} can be promised from {needed} calibration cells on; there are {n_cells}. {advice}, or "
            "allow a larger reject."
        )
        raise ValueError(msg)


def _named_needed(reject: float) -> int:
    """Fewest cells that, all named rightly, show an error of at most ``reject``."""
    return math.ceil(math.log(1 - ERROR_CONFIDENCE) / math.log(1 - reject))


def find_limits(novelty: np.ndarray, confidence: np.ndarray, correct: np.ndarray, *, reject: float) -> Limits:
    """Limits that keep ``reject`` on cells exchangeable with the calibration cells.

    The novelty of a new cell is among the k largest of n + 1 with probability k / (n + 1). Below a limit that is one of
    the sorted scores, cells are again independent draws, and the errors among the m most confident are binomial. From
    the smallest of ``NAMED_SHARES`` that would pass with ``SPARE_ERRORS``, or else with all cells at once, a share is
    taken if its errors would be as few as they are with probability at most 0.1 if the error were above ``reject``;
    the first that fails ends the search. Such a fixed sequence of tests needs no correction for their number as long
    as cells of higher confidence are wrong no more often.

    Parameters
    ----------
    novelty, confidence, correct
        Of the calibration cells ``(n,)``.
    reject
        Share between 0 and 1.
    """
    n_cells = len(novelty)
    n_rejected = int(reject * (n_cells + 1))
    far = np.sort(novelty)[n_cells - n_rejected] if n_rejected else np.inf
    near = novelty < far
    order = np.argsort(-confidence[near], kind="stable")
    confidence, wrong = confidence[near][order], ~correct[near][order].astype(bool)
    limit = np.inf
    for share in NAMED_SHARES:
        m = int(share * len(order))
        if share < 1 and binom.cdf(SPARE_ERRORS, m, reject) > 1 - ERROR_CONFIDENCE:
            continue
        if binom.cdf(wrong[:m].sum(), m, reject) > 1 - ERROR_CONFIDENCE:
            break
        limit = confidence[m] if m < len(order) else -np.inf
    if limit == np.inf:
        msg = (
            f"No share of the calibration cells is named with an error that is surely below reject={reject}: all cells "
            "are called unknown. Allow a larger reject, or train longer or on more cells."
        )
        warnings.warn(msg, UserWarning, stacklevel=4)
    return Limits(float(far), float(limit))
