"""Reading, splitting and gene-naming of the public data sets behind the starter weights.

The files come from `shared/data/rna`; the two gene tables are GENCODE 48 and 38 as CZ CELLxGENE publishes them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp

TRAINING_SETS = (
    "pbmc_facs_zheng2017",
    "pbmc3k_seurat",
    "pbmc_kang_ifnb_muscat",
    "pbmc_kang_ifnb_harmony_unlabelled",
    "gut_crohn_scp1884_68types",
    "celllines_sc_mixology",
)
UNSEEN_TISSUE = "pancreas_5tech_panc8small"
UNSEEN_BLOOD = "pbmc68k_reduced"
DEPTH_CONFOUNDED = "gut_crohn_scp1884_68types"  # cells of a type were picked at nearly the same depth
UNLABELLED = "pbmc_kang_ifnb_harmony_unlabelled"
CURRENT_TABLE = "genes_homo_sapiens.gencode48.csv.gz"
OLDER_TABLE = "genes_homo_sapiens.gencode38.csv.gz"


@dataclass(frozen=True)
class CellSet:
    """Cells of one study.

    Attributes
    ----------
    counts
        Raw counts, cells by `genes`.
    genes
        Names of the columns: symbols as the study wrote them, or the ids of a vocabulary.
    labels
        One cell type per cell; None when the study has none.
    batch
        One technical batch per cell.
    cells
        Names of the cells.
    provenance
        Where the file came from, for the card.
    """

    name: str
    counts: sp.csr_matrix
    genes: pd.Index
    labels: np.ndarray | None
    batch: np.ndarray
    cells: pd.Index
    provenance: dict[str, str]
    ensembl_id: np.ndarray | None = None


def read_set(folder: Path, name: str) -> CellSet:
    """Read one `.h5ad` file of integer counts."""
    adata = ad.read_h5ad(folder / f"{name}.h5ad")
    return CellSet(
        name=name,
        counts=sp.csr_matrix(adata.X, dtype=np.float32),
        genes=adata.var_names,
        labels=labels_of(adata.obs) if name != UNLABELLED else None,
        batch=adata.obs["batch"].astype(str).to_numpy(),
        cells=adata.obs_names,
        provenance={key: str(value) for key, value in adata.uns["provenance"].items()},
        ensembl_id=adata.var["ensembl_id"].astype(str).to_numpy() if "ensembl_id" in adata.var else None,
    )


def labels_of(obs: pd.DataFrame) -> np.ndarray | None:
    """Cell types as text, None where a study names none."""
    return obs["cell_type"].astype(str).to_numpy() if "cell_type" in obs else None


def read_pbmc68k_reduced() -> CellSet:
    """Scanpy's bundled 700 blood cells, with the counts recovered from `raw`.

    `raw` holds log1p of depth-normalised counts, rounded to three decimals; a cell's smallest non-zero value is
    one count.
    """
    adata = sc.datasets.pbmc68k_reduced()
    normalised = sp.csr_matrix(adata.raw.X).astype(np.float64)
    normalised.data = np.expm1(normalised.data)
    one_count = np.array([row.data.min() for row in normalised])
    counts = sp.csr_matrix(sp.diags(1.0 / one_count) @ normalised)
    whole = np.rint(counts.data)
    worst = np.abs(counts.data - whole).max()
    if worst > 0.2:
        msg = f"pbmc68k_reduced: a recovered count is {worst:.2f} away from a whole number; expected raw log1p values."
        raise ValueError(msg)
    counts.data = whole
    return CellSet(
        name=UNSEEN_BLOOD,
        counts=counts.astype(np.float32),
        genes=adata.raw.var_names,
        labels=adata.obs["bulk_labels"].astype(str).to_numpy(),
        batch=np.full(adata.n_obs, "pbmc68k"),
        cells=adata.obs_names,
        provenance={
            "repo": "scverse/scanpy",
            "licence": "BSD-3-Clause (package); data 10x Genomics, Zheng et al. 2017",
        },
    )


def read_gene_names(folder: Path, studies: list[CellSet]) -> pd.DataFrame:
    """Every (Ensembl id, symbol) pair: of GENCODE 48 (`current`), of 38, and of studies that carry ids themselves."""
    columns = ["ensembl_id", "symbol"]
    older = pd.read_csv(folder / OLDER_TABLE, header=None, usecols=[0, 1], names=columns)
    named = [*columns, "biotype"]  # of which the older table says nothing
    newer = pd.read_csv(folder / CURRENT_TABLE, header=None, usecols=[0, 1, 4], names=named)
    own = [
        pd.DataFrame(dict(zip(columns, (own_ids(c), c.genes), strict=True)))
        for c in studies
        if c.ensembl_id is not None
    ]
    names = pd.concat(
        [newer.assign(current=True), *(t.assign(current=False) for t in (older, *own))], ignore_index=True
    )
    return names[names["ensembl_id"].str.startswith("ENSG")].drop_duplicates(columns)


def own_ids(cells: CellSet) -> np.ndarray:
    """Ids that the study gives itself, without versions."""
    return pd.Series(cells.ensembl_id).str.replace(r"\.\d+$", "", regex=True).to_numpy(dtype=object)


def ensembl_ids(cells: CellSet, names: pd.DataFrame) -> np.ndarray:
    """Ensembl id of every column; an empty string where neither the study nor GENCODE knows one.

    A study's own ids win; then current symbols; then retired ones.
    """
    by_symbol = names.drop_duplicates("symbol").set_index("symbol")["ensembl_id"]
    ids = by_symbol.reindex(cells.genes).fillna("").to_numpy(dtype=object)
    if cells.ensembl_id is not None:
        own = own_ids(cells)
        ids = np.where(pd.Series(own).str.startswith("ENSG"), own, ids)
    return ids


def gene_relevance(counts: sp.csr_matrix, *, theta: float = 100.0) -> np.ndarray:
    """Variance of the analytic Pearson residuals of each gene (Lause et al. 2021); 0 if seen in under 10 cells."""
    relevance = np.zeros(counts.shape[1])
    detected = np.flatnonzero(np.asarray((counts > 0).sum(axis=0)).ravel() >= 10)
    depth = np.asarray(counts.sum(axis=1)).ravel()
    total = np.asarray(counts.sum(axis=0)).ravel()
    limit = np.sqrt(counts.shape[0])
    for part in np.array_split(detected, len(detected) // 500 + 1):
        expected = np.outer(depth, total[part]) / total.sum()
        residual = (counts[:, part].toarray() - expected) / np.sqrt(expected + expected**2 / theta + 1e-12)
        relevance[part] = np.clip(residual, -limit, limit).var(axis=0)
    return relevance


def choose_vocabulary(training: list[CellSet], names: pd.DataFrame, *, n_genes: int) -> pd.DataFrame:
    """Take the sets' most variable genes in turn, best first, until there are `n_genes`.

    Only cells that are trained on are given here. Genes without a current symbol in GENCODE 48 are left out.

    Returns
    -------
    Columns `ensembl_id`, `symbol`, `previous_symbols` ("A|B"), sorted by id.
    """
    current = names[names["current"] & (names["symbol"] != names["ensembl_id"])].drop_duplicates("symbol")
    current = current.set_index("ensembl_id")["symbol"]
    ranks = {}
    for cells in training:
        ids = ensembl_ids(cells, names)
        relevance = gene_relevance(cells.counts)
        known = pd.Series(relevance, index=ids)[(relevance > 0) & np.isin(ids, current.index)]
        known = known[~known.index.duplicated()]
        ranks[cells.name] = known.rank(ascending=False, method="first")
    best = pd.DataFrame(ranks).min(axis=1).sort_values(kind="stable")
    chosen = np.sort(best.index[:n_genes].to_numpy(dtype=str))

    pairs = names[names["ensembl_id"].isin(chosen) & ~names["symbol"].isin(current)]
    pairs = pairs[~pairs["symbol"].str.contains("ENSG", regex=False)]
    # A retired name that two ids of the vocabulary share tells nothing.
    pairs = pairs.drop_duplicates("symbol", keep=False)
    previous = pairs.groupby("ensembl_id")["symbol"].agg("|".join).reindex(chosen).fillna("")
    columns = {"ensembl_id": chosen, "symbol": current.loc[chosen], "previous_symbols": previous}
    return pd.DataFrame({name: np.asarray(values) for name, values in columns.items()})


def to_vocabulary(
    cells: CellSet, vocabulary: pd.DataFrame, names: pd.DataFrame
) -> tuple[CellSet, np.ndarray]:
    """Bring a set's columns into vocabulary order (duplicates are summed).

    Returns
    -------
    The set with `len(vocabulary)` columns, and which of them the study measured.
    """
    row = pd.Series(np.arange(len(vocabulary)), index=vocabulary["ensembl_id"])
    target = row.reindex(ensembl_ids(cells, names)).to_numpy()
    column = np.flatnonzero(~np.isnan(target))
    target = target[column].astype(np.int64)
    select = sp.csr_matrix(
        (np.ones(len(column), np.float32), (column, target)), shape=(cells.counts.shape[1], len(vocabulary))
    )
    measured = np.zeros(len(vocabulary), bool)
    measured[target] = True
    moved = replace(
        cells,
        counts=sp.csr_matrix(cells.counts @ select),
        genes=pd.Index(vocabulary["ensembl_id"]),
        ensembl_id=None,
    )
    return moved, measured


def held_out(sets: list[CellSet], *, share: float, seed: int) -> dict[str, np.ndarray]:
    """A seeded mask of held-out cells per set.

    The two Kang files share some cells (same barcode); such a cell is held out of both or of neither.
    """
    rng = np.random.default_rng(seed)
    out = {}
    for cells in sets:
        n = len(cells.cells)
        mask = np.zeros(n, bool)
        mask[rng.permutation(n)[: round(share * n)]] = True
        out[cells.name] = mask
    kang = {c.name: c.cells.str.split("_").str[0] for c in sets if c.name.startswith("pbmc_kang")}
    if len(kang) == 2:
        first, second = kang
        hidden = kang[first][out[first]]
        shared = kang[second].isin(kang[first])
        out[second] = np.where(shared, kang[second].isin(hidden), out[second])
    return out


def subset(cells: CellSet, keep: np.ndarray) -> CellSet:
    """The cells where `keep` is true."""
    return replace(
        cells,
        counts=cells.counts[keep],
        labels=None if cells.labels is None else cells.labels[keep],
        batch=cells.batch[keep],
        cells=cells.cells[keep],
    )


def at_equal_depth(
    cells: CellSet, held_out: np.ndarray, *, depth: int, seed: int
) -> tuple[CellSet, np.ndarray]:
    """Draw `depth` counts from every cell that has them, without replacement; other cells are left out.

    Returns
    -------
    The set under a name that says so, and which of its cells are held out.
    """
    rng = np.random.default_rng(seed)
    deep = np.asarray(cells.counts.sum(axis=1)).ravel() >= depth
    kept = subset(cells, deep)
    counts = kept.counts.copy()
    for i in range(counts.shape[0]):
        row = slice(counts.indptr[i], counts.indptr[i + 1])
        counts.data[row] = rng.multivariate_hypergeometric(counts.data[row].astype(np.int64), depth)
    counts.eliminate_zeros()
    return replace(kept, name=f"{cells.name} at {depth} counts", counts=counts), held_out[deep]
