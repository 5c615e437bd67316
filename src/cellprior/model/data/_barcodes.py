"""Barcodes of two modalities that are the same but for what was added to them."""

from __future__ import annotations

import pandas as pd

# the well or the modality behind a barcode (-1, _2, _rna, #atac), and the sample in front (s1#, s1:)
_ADDED = r"^(?:[^#:]+[#:])?(.+?)(?:[-_.#:](?:\d{1,3}|[A-Za-z]{2,8}))?$"
_MOST = 0.5  # share of the smaller modality
_FEW = 0.1


def differ_by_suffix(rna: pd.Index, atac: pd.Index) -> str:
    """What to say where few barcodes of two modalities are the same, and most would be without what was added to them.

    A sentence with an example of each; empty if this is not so.
    """
    smaller = min(len(rna), len(atac))
    if not smaller or rna.isin(atac).sum() > _FEW * smaller:
        return ""
    bare = [
        names.astype(str).to_series().str.extract(_ADDED, expand=False).to_numpy() for names in (rna, atac)
    ]
    one, other = (pd.Series(names.astype(str), index=b) for names, b in zip((rna, atac), bare, strict=True))
    if one.index.nunique() < 0.9 * len(one) or other.index.nunique() < 0.9 * len(other):
        return ""  # what was taken off is what tells the cells apart
    common = one.index.intersection(other.index)
    if len(common) <= _MOST * smaller:
        return ""
    first = common[0]
    return (
        f"The barcodes of RNA and ATAC differ by what was added to them, such as {one[[first]].iloc[0]!r} and "
        f"{other[[first]].iloc[0]!r}: {len(common):,} cells would have both modalities and are taken for two cells "
        "each. Write them alike before the MuData is made, for instance: rna.obs_names = "
        'rna.obs_names.str.replace(r"[-_.]\\w+$", "", regex=True), the same for atac, and mudata.MuData({"rna": rna, '
        '"atac": atac}).'
    )
