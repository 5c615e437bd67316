"""What the starters are trained on: cells of many studies, average profiles of cell types, and one vocabulary.

Studies that the starters are judged on are left out together, with all that they share cells or a donor with where the
name of the set says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from _starter_data import CellSet, ensembl_ids, labels_of, read_gene_names, read_set
from sklearn.utils.extmath import randomized_svd

from cellprior.genes import match
from cellprior.weights import fingerprints

TRAINING_SETS = (
    "pbmc_facs_zheng2017",
    "blood_tregs_tconv_deconvseq",
    "pbmc1k_v2_10x",
    "pbmc4k_10x_soupx",
    "blood_ctcl_citeseq_mimitou2019",
    "bonemarrow_aml027_pre_zheng2017",
    "lymphoid_ref_spacexr",
    "lymphoma_malt_10x",
    "gut_crohn_scp1884_68types",
    "skin_ctcl_healthy_gaydosik2019",
    "lung_tcells_trex",
    "lung_nsclc_dendritic_zilionis2019",
    "lung_ipf_adams2020",
    "thyroid_atc_gao2021",
    "breast_tnbc_copykat",
    "breast_cancer_lines_gambardella2022",
    "glioblastoma_zhao2021_300genes",
    "brain_pfc_opc_zhou2020",
    "heart_ipsc_cm_day2_friedman2018",
    "heart_ipsc_cm_day5_friedman2018",
)
PROFILES = "profiles_human_tissues_celltypes"
# never seen: of tissues that are, as other cells or as average profiles
UNSEEN_STUDIES = (
    "pancreas_5tech_panc8small",
    "breast_tnbc_wu2021_cid4465",
    "lung_adeno_kim2020",
    "pbmc3k_seurat",
    "pbmc_kang_ifnb_muscat",
)
# never seen, and unlike what is: full-length reads, one chromosome, lines, embryos
UNLIKE = (
    "oligodendroglioma_tirosh2016",
    "brain_dlpfc_libd",
    "celllines_sc_mixology",
    "embryo_yan2013",
)
# labels that were not found in the expression of these genes: sorted, gated, or lines
TRUSTED = (
    "pbmc_facs_zheng2017",
    "blood_tregs_tconv_deconvseq",
    "breast_cancer_lines_gambardella2022",
)
MANY_GENES = 8_000  # measured, from which on a set says what share of its counts a gene has
LEAST_SHARE = 1e-9


@dataclass(frozen=True)
class Source:
    """Cells of one study, or average profiles of one tissue, over the vocabulary.

    Attributes
    ----------
    counts
        Cells by genes: raw counts, or of profiles the expected counts of a cell with 10,000.
    measured
        Numbers of the genes that the source measured.
    labels, batch
        Code of each cell; labels are negative where there is none.
    """

    name: str
    counts: sp.csr_matrix
    measured: np.ndarray
    labels: np.ndarray
    batch: np.ndarray
    is_profile: bool = False


def read_corpus(folder: Path) -> list[CellSet]:
    """The training sets."""
    return [read_set(folder, name) for name in TRAINING_SETS]


def read_profiles(folder: Path) -> dict[str, tuple[CellSet, np.ndarray]]:
    """Average profiles by tissue, and which of the columns each measured."""
    adata = ad.read_h5ad(folder / f"{PROFILES}.h5ad")
    provenance = {key: str(value) for key, value in adata.uns["provenance"].items()}
    found = {}
    for source in adata.obs["source"].astype(str).unique():
        rows = np.flatnonzero(adata.obs["source"].astype(str) == source)
        obs = adata.obs.iloc[rows]
        cells = CellSet(
            name=source,
            counts=sp.csr_matrix(adata.X[rows], dtype=np.float32),
            genes=adata.var_names,
            labels=labels_of(obs),
            batch=np.full(len(rows), source),
            cells=obs.index,
            provenance=provenance,
        )
        found[source] = cells, adata.var[f"measured_{source}"].to_numpy(dtype=bool)
    return found


def read_sources(folder: Path, gene_tables: Path) -> tuple[pd.DataFrame, list[CellSet], list[Source]]:
    """The vocabulary, and all sets and profiles: as they are, and over the vocabulary; sets come first."""
    sets, profiles = read_corpus(folder), read_profiles(folder)
    names = read_gene_names(gene_tables, sets)
    vocabulary = choose_vocabulary(sets, [cells for cells, _ in profiles.values()], names)
    sources = [source_of(cells, vocabulary, names) for cells in sets]
    sources += [source_of(cells, vocabulary, names, measured) for cells, measured in profiles.values()]
    return vocabulary, [*sets, *(cells for cells, _ in profiles.values())], sources


def choose_vocabulary(
    sets: Sequence[CellSet], profiles: Sequence[CellSet], names: pd.DataFrame
) -> pd.DataFrame:
    """All protein-coding genes of GENCODE 48 that two of the sources have counts of.

    Returns
    -------
    Columns `ensembl_id`, `symbol`, `previous_symbols` ("A|B"), sorted by id.
    """
    current = names[names["current"] & (names["biotype"] == "protein_coding")]
    current = current[current["symbol"] != current["ensembl_id"]].drop_duplicates("symbol")
    current = current.drop_duplicates("ensembl_id").set_index("ensembl_id")["symbol"]
    seen = pd.Series(0, index=current.index)
    for cells in (*sets, *profiles):
        has = np.asarray(cells.counts.sum(axis=0)).ravel() > 0
        ids = np.unique(ensembl_ids(cells, names)[has])
        seen[seen.index.isin(ids)] += 1
    chosen = np.sort(seen.index[seen >= 2].to_numpy(dtype=str))
    pairs = names[names["ensembl_id"].isin(chosen) & ~names["symbol"].isin(current)]
    pairs = pairs[~pairs["symbol"].str.contains("ENSG", regex=False)]
    # a retired name that two ids of the vocabulary share tells nothing
    pairs = pairs.drop_duplicates(["ensembl_id", "symbol"]).drop_duplicates("symbol", keep=False)
    previous = pairs.groupby("ensembl_id")["symbol"].agg("|".join).reindex(chosen).fillna("")
    columns = {"ensembl_id": chosen, "symbol": current.loc[chosen], "previous_symbols": previous}
    return pd.DataFrame({name: np.asarray(values) for name, values in columns.items()})


def source_of(
    cells: CellSet, vocabulary: pd.DataFrame, names: pd.DataFrame, measured: np.ndarray | None = None
) -> Source:
    """A set over the vocabulary; `measured` says which columns were measured, by default all."""
    row = pd.Series(np.arange(len(vocabulary)), index=vocabulary["ensembl_id"])
    target = row.reindex(ensembl_ids(cells, names)).to_numpy()
    known = ~np.isnan(target) if measured is None else ~np.isnan(target) & measured
    column, target = np.flatnonzero(known), target[known].astype(np.int64)
    select = sp.csr_matrix(
        (np.ones(len(column), np.float32), (column, target)), shape=(cells.counts.shape[1], len(vocabulary))
    )
    labels = np.full(len(cells.cells), -1)
    if cells.labels is not None:
        labels = pd.factorize(cells.labels)[0]
    return Source(
        cells.name,
        sp.csr_matrix(cells.counts @ select),
        np.unique(target),
        labels,
        pd.factorize(cells.batch)[0],
        is_profile=measured is not None,
    )


def cells_of(sets: Sequence[CellSet], sources: Sequence[Source], vocabulary: pd.DataFrame) -> np.ndarray:
    """Numbers by which the cells are known again, by symbols as by Ensembl ids; average profiles are no cells."""
    found = []
    for cells, source in zip(sets, sources, strict=True):
        if not source.is_profile:
            by_symbol = match(pd.DataFrame(index=cells.genes), vocabulary).index
            found += [fingerprints(cells.counts, by_symbol)]
            found += [fingerprints(source.counts, np.arange(len(vocabulary)))]
    return np.concatenate(found)


def average_share(sources: Sequence[Source], n_genes: int) -> np.ndarray:
    """Share of the counts of an average cell that each gene has, over the sources that measured many genes."""
    found = []
    for source in sources:
        if len(source.measured) < MANY_GENES:
            continue
        depth = np.maximum(np.asarray(source.counts.sum(axis=1)).ravel(), 1.0)
        share = np.asarray((sp.diags(1 / depth) @ source.counts).mean(axis=0)).ravel()
        known = np.full(n_genes, np.nan)
        known[source.measured] = share[source.measured]
        found.append(known)
    stacked = np.stack(found)
    n_known = (~np.isnan(stacked)).sum(axis=0)
    mean = np.nansum(stacked, axis=0) / np.maximum(n_known, 1)
    return np.maximum(mean / mean.sum(), LEAST_SHARE)


def log_input(source: Source, rows: np.ndarray, share: np.ndarray, target_sum: float) -> sp.csr_matrix:
    """The network's input: log1p of counts scaled to what an average cell has in the measured genes."""
    counts = source.counts[rows]
    depth = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1e-6 if source.is_profile else 1.0)
    part = target_sum * share[source.measured].sum() / share.sum()
    return sp.csr_matrix(sp.diags(part / depth) @ counts).log1p()


def pooled_axes(
    sources: Sequence[Source], share: np.ndarray, n_axes: int, *, cells: int, target_sum: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Principal axes of pooled cells and profiles, each source centred and of the same weight.

    Of genes over their standard deviation + 0.3; components are over the fourth root of their variance, so that cells
    times axes have them so.

    Parameters
    ----------
    cells
        Of a source, at most, drawn at random.

    Returns
    -------
    Axes ``(n_genes, n_axes)``, and the square roots of the components' sizes ``(n_axes,)``.
    """
    rng = np.random.default_rng(seed)
    rows, variance = [], np.zeros(len(share))
    for source in sources:
        some = rng.permutation(source.counts.shape[0])[:cells]
        x = log_input(source, some, share, target_sum).toarray()
        x -= x.mean(axis=0)
        variance += (x**2).mean(axis=0)
        rows.append(x / np.sqrt(len(x) * len(sources)))
    scale = 1.0 / (np.sqrt(variance / len(sources)) + 0.3)
    pooled = np.concatenate(rows)
    pooled *= scale.astype(np.float32)
    _, size, axes = randomized_svd(pooled, n_axes, random_state=seed, n_iter=3)
    root = np.sqrt(size)
    return (axes * scale / root[:, None]).T, root


def draw_cells(
    source: Source, n_cells: int, one_batch: float, rng: np.random.Generator
) -> tuple[torch.Tensor, np.ndarray]:
    """Counts of some cells of a source `(cells, n_genes)`, and their labels; cells are made of profiles."""
    if source.is_profile:
        rows = rng.integers(source.counts.shape[0], size=n_cells)
        return torch.from_numpy(cells_of_profiles(source, rows, rng)), rows
    rows = np.arange(source.counts.shape[0])
    if rng.random() < one_batch:
        rows = np.flatnonzero(source.batch == rng.choice(source.batch))
    rows = rng.permutation(rows)[:n_cells]
    return torch.from_numpy(source.counts[rows].toarray()), source.labels[rows]


def cells_of_profiles(
    source: Source,
    rows: np.ndarray,
    rng: np.random.Generator,
    *,
    spread: float = 0.5,
    depths: tuple[float, float] = (600.0, 8_000.0),
) -> np.ndarray:
    """Cells around average profiles: each gene's mean is lognormal around the profile's, counts are multinomial."""
    means = source.counts[rows][:, source.measured].toarray()
    means *= np.exp(np.float32(spread) * rng.standard_normal(means.shape, dtype=np.float32))
    total = means.cumsum(axis=1, dtype=np.float64)
    out = np.zeros((len(rows), source.counts.shape[1]), np.float32)
    for i, depth in enumerate(np.exp(rng.uniform(*np.log(depths), size=len(rows))).astype(int)):
        drawn = np.searchsorted(total[i], rng.random(depth) * total[i, -1])
        out[i, source.measured] = np.bincount(drawn, minlength=len(source.measured))[: len(source.measured)]
    return out
