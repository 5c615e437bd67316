"""Where genes lie in the genome: from an annotation file, or from columns of a table."""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cellprior.genes._intervals import read_peaks

_ID = re.compile(r'\bgene_id[ =]"?([^";]+)')
_SYMBOL = re.compile(r'\b(?:gene_name|gene_symbol|Name)[ =]"?([^";]+)')
_COLUMNS = ["gene_id", "chrom", "start", "end", "strand"]
_SENSE = {"+": 1, "1": 1, "+1": 1, "1.0": 1, "-": -1, "-1": -1, "-1.0": -1}


@dataclass(frozen=True, eq=False)
class Places:
    """Genes in the genome.

    Attributes
    ----------
    chromosome
        Without "chr", "" of a gene without a place ``(n_genes,)``.
    first, last
        Where the gene starts, in base pairs: twice the same with a strand; without one, both ends of what is given
        ``(n_genes,)``.
    sense
        1 or -1 by the strand, 0 if it is not known ``(n_genes,)``.
    """

    chromosome: np.ndarray
    first: np.ndarray
    last: np.ndarray
    sense: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """Which genes have a place."""
        return self.first >= 0

    def take(self, rows: np.ndarray) -> Places:
        """Some of the genes."""
        return Places(self.chromosome[rows], self.first[rows], self.last[rows], self.sense[rows])


def read_positions(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Positions of genes from a GTF, GFF3 or BED file, which may be gzipped.

    Of a GTF or GFF3, the records of genes; if it has none, a gene reaches over all of its transcripts.

    Parameters
    ----------
    path
        The annotation that the reads were counted with, such as ``genes/genes.gtf.gz`` of a Cell Ranger reference.

    Returns
    -------
    A row per gene, by symbol: ``gene_id``, ``chrom``, ``start``, ``end`` (from 0, the end not included, as in BED)
    and ``strand``.

    Raises
    ------
    ValueError
        If no gene is found in the file.

    Examples
    --------
    >>> positions = cp.genes.read_positions("gencode.vM25.annotation.gtf.gz")
    >>> links = model.peak_gene_links(gene_positions=positions)
    """
    path = Path(path)
    genes: list[tuple[str | int, ...]] = []
    transcripts: list[tuple[str | int, ...]] = []
    for fields in _rows(path):
        if len(fields) >= 9 and fields[3].isdigit() and fields[4].isdigit():
            if (is_gene := fields[2].endswith("gene")) or fields[2] in ("transcript", "mRNA"):  # ncRNA_gene
                identifier, symbol = _ID.search(fields[8]), _SYMBOL.search(fields[8])
                name = symbol or identifier
                if name:
                    place = fields[0], int(fields[3]) - 1, int(fields[4]), fields[6]
                    record = (name[1], identifier[1] if identifier else "", *place)
                    (genes if is_gene else transcripts).append(record)
        elif len(fields) >= 4 and fields[1].isdigit() and fields[2].isdigit():
            strand = fields[5] if len(fields) > 5 else "."
            genes.append((fields[3], "", fields[0], int(fields[1]), int(fields[2]), strand))
    if not genes and not transcripts:
        msg = (
            f"No gene is found in {path}: a GTF or GFF3 with records of genes is needed, or a BED with chromosome, "
            "start, end, name, score and strand. A table of another form can be read with pandas; its columns are to "
            "be called chrom, start, end and strand, its index the names of the genes."
        )
        raise ValueError(msg)
    found = pd.DataFrame(genes or transcripts, columns=["gene", *_COLUMNS])
    if not genes:
        by_gene = found.groupby(["gene", "gene_id", "chrom", "strand"], sort=False, as_index=False)
        found = by_gene.agg(start=("start", "min"), end=("end", "max"))
    return found.set_index("gene")[_COLUMNS]


def _rows(path: Path) -> Iterator[list[str]]:
    """Fields of each line that is no comment."""
    with path.open("rb") as file:
        is_gzipped = file.read(2) == b"\x1f\x8b"
    with gzip.open(path, "rt") if is_gzipped else path.open() as lines:
        for line in lines:
            if not line.startswith("#"):
                yield line.rstrip("\n").split("\t")


def places_of(table: pd.DataFrame) -> Places:
    """Where the genes of a table start.

    Parameters
    ----------
    table
        Genes as index, and columns with chromosome, start and end, under their usual names, or one with all of them
        (``interval``); and the strand, if it is known.
    """
    intervals = read_peaks(table)
    column = next((values for name, values in table.items() if str(name).lower() == "strand"), None)
    sense = np.zeros(len(table), dtype=np.int64)
    if column is not None:
        sense = column.astype(str).map(_SENSE).fillna(0).to_numpy(dtype=np.int64)
    last_base = np.maximum(intervals.end - 1, intervals.start)
    first = np.where(sense < 0, last_base, intervals.start)
    last = np.where(sense > 0, intervals.start, last_base)
    return Places(intervals.chromosome, first, last, sense)
