"""Errors that several rooms raise."""

from __future__ import annotations

NOT_FINITE = (
    "What the network makes of these cells is not finite: its weights are too large, as after a training that "
    "diverged. Load the weights anew, or train again with a smaller learning rate."
)


class DivergedError(RuntimeError):
    """A loss, or a weight, is no longer finite."""
