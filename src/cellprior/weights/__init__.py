"""Files to tensors: what can be had, under which licence, and how it gets onto this machine."""

from __future__ import annotations

from cellprior.weights._bundle import Bundle, read_checkpoint, write_bundle
from cellprior.weights._card import Card, card
from cellprior.weights._digest import sha256
from cellprior.weights._fetch import fetch, resolve
from cellprior.weights._inert import InertCheckpoint
from cellprior.weights._reading import read_bundle
from cellprior.weights._registry import WeightsError, available
from cellprior.weights._trained_on import fingerprints, read_trained_on, write_trained_on

__all__ = [
    "Bundle",
    "Card",
    "InertCheckpoint",
    "WeightsError",
    "available",
    "card",
    "fetch",
    "fingerprints",
    "read_bundle",
    "read_checkpoint",
    "read_trained_on",
    "resolve",
    "sha256",
    "write_bundle",
    "write_trained_on",
]


def __dir__() -> list[str]:
    return list(__all__)
