"""When to say "unknown": limits on held-out cells that keep a promise on new ones."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.stats import binom

from cellprior._talk import warn

ERROR_CONFIDENCE = 0.9  # with which the error among the named cells is promised
NAMED_SHARES = tuple(np.arange(4, 21) / 20)  # of the cells that look known, tried until the error is too high
SPARE_ERRORS = 3  # of the first share tried, lest one unlucky cell among a few ends the search


# that as many unknown cells come about although no more than twice the usual share is expected
SURPRISE = 0.05
REJECTS = tuple(np.arange(1, 100) / 100)  # tried when it is said which of them names cells


class Limits(NamedTuple):
    """A cell is unknown from this novelty on, or up to this confidence."""

    novelty: float
    confidence: float

    def unknown(self, novelty: np.ndarray, confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which cells are too far, and which of the others too uncertain ``(cells,)``."""
        far = novelty >= self.novelty
        return far, ~far & (confidence <= self.confidence)


class Calibration(NamedTuple):
    """Scores of the calibration cells ``(cells,)``."""

    novelty: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray


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

    Raises ValueError, with the number of cells needed, and the advice.
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
    """:func:`limits_of` calibration cells.

    Warns
    -----
    UserWarning
        If they call every cell unknown.
    """
    limits = limits_of(novelty, confidence, correct, reject=reject)
    if limits.confidence == np.inf:
        found = smallest_reject(Calibration(novelty, confidence, correct), novelty, confidence, share=0.0)
        larger = (
            "a larger reject" if found is None else f"a larger reject (from {found[0]:g} on, cells are named)"
        )
        msg = (
            f"No share of the calibration cells is named with an error that is surely below reject={reject}: all cells "
            f"are called unknown. Allow {larger}, or train longer or on more cells."
        )
        warn(msg)
    return limits


def limits_of(novelty: np.ndarray, confidence: np.ndarray, correct: np.ndarray, *, reject: float) -> Limits:
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
    return Limits(float(far), float(limit))


def smallest_reject(
    calibration: Calibration, novelty: np.ndarray, confidence: np.ndarray, *, share: float
) -> tuple[float, int] | None:
    """The smallest reject that can be promised and names more than a share of some cells, and how many it names.

    As ``reject`` grows, less certain names are given, and fewer cells are near enough.
    """
    for reject in REJECTS:
        if len(calibration.novelty) >= cells_needed(reject):
            far, uncertain = limits_of(*calibration, reject=reject).unknown(novelty, confidence)
            if (n_named := int(np.sum(~far & ~uncertain))) > share * len(novelty):
                return float(reject), n_named
    return None


def explain_unknown(
    calibration: Calibration,
    limits: Limits,
    novelty: np.ndarray,
    confidence: np.ndarray,
    *,
    reject: float,
    unknown: str,
    guess: str,
) -> None:
    """Say why, if far more cells are unknown than of cells like those calibrated on.

    ``guess`` says where the best guess of each cell is found. The warning has the number of cells that are too far
    and too uncertain, the likely cause, and a ``reject`` that names more.
    """
    far, uncertain = (int(x.sum()) for x in limits.unknown(novelty, confidence))
    n_cells, n_unknown = len(novelty), far + uncertain
    usual = float(np.mean(np.logical_or(*limits.unknown(calibration.novelty, calibration.confidence))))

    def is_surprising(count: int, share: float) -> bool:
        most = min(2 * max(share, reject), (1 + share) / 2)
        return count > 0 and bool(binom.sf(count - 1, n_cells, most) <= SURPRISE)

    # too far as well: where every cell is unknown for its name, it would not be noticed
    if not is_surprising(n_unknown, usual) and not is_surprising(far, reject):
        return
    if far >= uncertain:
        cause = (
            "Cells of another protocol, depth, species or panel of genes than the reference's lie far from it, and so "
            "do types that it lacks."
        )
    else:
        cause = "Names are uncertain where the query is shallower than the reference, or lacks genes that tell types."
    if half := smallest_reject(calibration, novelty, confidence, share=0.5):
        way_out = f"reject={half[0]:g} is the smallest that names half of them ({half[1]:,} of {n_cells:,})."
    elif some := smallest_reject(calibration, novelty, confidence, share=0.0):
        way_out = f"No reject names half of them; reject={some[0]:g} names {some[1]:,} of {n_cells:,}."
    else:
        way_out = "No reject names any of them."
    msg = (
        f"{n_unknown:,} of {n_cells:,} cells are called {unknown!r}. If they were like the reference, about "
        f"{usual:.0%} would be. {far:,} are too far from every type, {uncertain:,} too uncertain. {cause} {way_out} "
        f"What reject promises does not hold for such cells. The best guess for each cell is {guess}."
    )
    warn(msg)
