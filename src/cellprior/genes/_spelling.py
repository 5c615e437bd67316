"""Names whose letters are right and whose signs are not, and what else was done to names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

# "." and "_" for "-", as R's make.names and file formats have it, and the hyphens of typography
_SIGNS = str.maketrans(
    dict.fromkeys("._\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d\u00ad", "-")
)
_X = re.compile(r"\nX[0-9]")
# Genes of mouse without a name, in capitals (Gm1234, 0610005C13Rik): no human gene is called so
_GM = re.compile(r"\nGM[0-9]{3,}(?=\n)")
_RIK = re.compile(r"\n[0-9A-Z][0-9]{5,6}[A-Z][0-9]{2}RIK[0-9]?(?=\n)")
_FEWEST_IN_CAPITALS = 3
GENOME = re.compile(
    r"((?:GRC[a-z]+\d+|hg\d+|mm\d+|rn\d+|T2T|CHM13|human|mouse|homo_sapiens|mus_musculus)(?:[^A-Za-z0-9]+))(.+)",
    re.IGNORECASE,
)
"""Name of a genome with the signs behind it, and what follows."""


def plain(names: Sequence[str] | np.ndarray) -> list[str]:
    """Names with hyphens for all their signs."""
    return "\n".join(names).translate(_SIGNS).split("\n") if len(names) else []


def signed(names: Sequence[str] | np.ndarray) -> list[tuple[int, str]]:
    """Number and `plain` form of each name that has a sign, or an X before a digit."""
    spelled = plain(names)
    found = [(i, name) for i, name in enumerate(spelled) if "-" in name]
    if _X.search("\n".join(["", *spelled])):
        found += [(i, name) for i, name in enumerate(spelled) if "-" not in name and name.startswith("X")]
    return found


def in_capitals(text: str) -> str:
    """What to say of mouse genes in capitals; empty if there are none.

    Parameters
    ----------
    text
        Names between line breaks.
    """
    found = _GM.findall(text) + (_RIK.findall(text) if "RIK" in text else [])
    if len(found) < _FEWEST_IN_CAPITALS:
        return ""
    return (
        f"{len(found):,} names are those of mouse genes in capitals (such as {found[0].strip()} and "
        f"{found[-1].strip()}), which no human gene has: changing mouse symbols to upper case pairs genes that are not "
        "the same. Use a model trained on mouse, or map the genes to one-to-one orthologues (Ensembl BioMart)."
    )


def genome_of_most(names: Iterable[object]) -> str | None:
    """What stands in front of more than half of some names, if it is a genome (``"hg19_"``)."""
    listed = [str(name) for name in names]
    found = Counter(match[1] for name in listed if (match := GENOME.fullmatch(name)))
    prefix, n = found.most_common(1)[0] if found else ("", 0)
    return prefix if 2 * n > len(listed) else None
