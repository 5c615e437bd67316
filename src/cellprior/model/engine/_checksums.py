"""Sums by which rows that were written to disk are known again."""

from __future__ import annotations

import numpy as np

NAN = np.uint32(0x7FC00000)  # there are many; what is missing in an array on disk is read back as this one
# odd constants of splitmix64 (Steele et al., OOPSLA 2014)
GOLDEN, MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9


def row_sums(latent: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A number for each row, of its bits and its place, uint64 ``(rows,)``, whose sum is that of several rows.

    The bits of each value, times an odd number of its column and one of its row, modulo 2^64: any single value that
    differs gives another sum.
    """
    latent = np.ascontiguousarray(latent, dtype=np.float32)
    bits = latent.view(np.uint32)
    missing = np.isnan(latent)
    if missing.any():
        bits = np.where(missing, NAN, bits)
    column = np.arange(1, latent.shape[1] + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    column = (column ^ (column >> np.uint64(29))) * np.uint64(MIX) | np.uint64(1)
    of_row = 2 * np.asarray(rows, dtype=np.uint64) + np.uint64(1)
    return (bits.astype(np.uint64) @ column + np.uint64(GOLDEN)) * of_row


def total(sums: np.ndarray) -> str:
    """Sum of some rows, sixteen hexadecimal digits."""
    return f"{int(sums.sum(dtype=np.uint64)):016x}"
