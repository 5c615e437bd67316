"""How far a cell moves in an embedding when something changes that is not its biology."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import paired_cosine_distances
from sklearn.neighbors import NearestNeighbors

from cellprior._docs import described
from cellprior._matrix import matrix_of
from cellprior._talk import bar
from cellprior.evaluate._expression import log_normalised, of_genes, raw_counts
from cellprior.evaluate._intervals import Resampling, compared
from cellprior.evaluate._splits import Split
from cellprior.genes._kinds import which_are_genes
from cellprior.model._base import PretrainedModel
from cellprior.model.data._fields import without_view
from cellprior.model.learning._masked import MODEL

N_COMPONENTS = 50
N_PAIRS = 10_000  # of cells, for the typical distance
BASELINE = "PCA"
ALL_CELLS = "all cells"  # nothing is held out
ALL = slice(None)


class Perturbed(NamedTuple):
    """Cells that something was done to."""

    what: str
    rows: np.ndarray  # which cells, in the order of the parts
    parts: list[ad.AnnData]  # embedded one by one
    counts: sp.csr_matrix | None = None  # of all genes; ``None`` where they are as they were


class Moved(NamedTuple):
    """What a perturbation does to cells in one space, ``(cells,)`` each."""

    shift: np.ndarray  # in typical distances
    kept: np.ndarray  # share of the neighbours


@described
def stability(
    model: PretrainedModel,
    adata: ad.AnnData | None = None,
    *,
    depths: Sequence[float] = (0.5, 0.25),
    gene_dropouts: Sequence[float] = (0.1, 0.3),
    n_companions: int = 32,
    n_neighbors: int = 15,
    seeds: int = 3,
    max_cells: int = 1000,
    embed_options: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Embed the same cells in other company, shallower, and with fewer genes, and see how far they move.

    ``half of the companions``
        A random half of the cells, embedded without the other half.
    ``32 companions``
        All cells, a few of the same batch at a time, as where small minibatches are embedded by themselves.
    ``all batches together``
        All cells as one batch. Only where ``batch_key`` was given to ``setup_anndata``, and there are several.
    ``50% of the counts``, ...
        Binomial thinning: each count of a cell is kept with this probability.
    ``10% of the genes dropped``, ...
        A random part of the genes is taken out of the data.

    Beside the model, a PCA of log-normalised genes (50 components, fitted to the cells as they were). Company means
    nothing to it.

    Parameters
    ----------
    model
        With pretrained weights.
    adata
        Data, by default the attached. Its genes are matched by name.
    depths
        Shares of the counts that are kept.
    gene_dropouts
        Shares of the genes that are dropped.
    n_companions
        Cells that are embedded together in the second of the above.
    n_neighbors
        Of each cell, by cosine.
    seeds
        Draws of each kind.
    max_cells
        At most; drawn at random. The others are not their companions either.
    embed_options
        To ``get_latent_representation``.
    <progress>

    Returns
    -------
    A row per ``perturbation``, ``metric`` and ``method`` (``model`` and ``PCA``): ``split``, ``value`` with its 95 %
    interval ``low`` to ``high``; ``versus``, ``PCA``, with the paired ``difference``, ``difference_low`` and
    ``difference_high``; ``typical_distance``, ``n_cells``, ``seeds`` and ``seconds``. Metrics are

    ``median_shift``, ``q95_shift``
        Cosine distance between a cell's two vectors, median and 95 % quantile over the cells, in units of the
        ``typical_distance``: the median of that between two random cells as they were. At 1, a cell is as far from
        itself as from any other.
    ``neighbours_kept``
        Share of a cell's nearest neighbours that it keeps; ``n_neighbors / (n_cells - 1)`` by chance.

    Raises
    ------
    NotImplementedError
        If the model is of another kind.
    <not_embedded>
    ValueError
        If a share is not between 0 and 1, or there are not more cells than twice ``n_neighbors``.
    """
    model._check_if_trained(warn=False)
    if wrong := [share for share in (*depths, *gene_dropouts) if not 0 < share < 1]:
        msg = f"{wrong[0]} is no share of counts or genes: a number between 0 and 1 is needed, such as 0.5."
        raise ValueError(msg)
    cells = Cells(model, adata, max_cells)
    n_cells = len(cells.batch)
    if n_cells <= 2 * n_neighbors or min(n_companions, n_neighbors, seeds) < 1:
        msg = (
            f"{n_cells} cells, n_neighbors={n_neighbors}, n_companions={n_companions}, seeds={seeds}; at least 1 of "
            "each is needed, and more cells than twice n_neighbors."
        )
        raise ValueError(msg)
    spaces = Spaces(model, cells, n_neighbors, embed_options or {})
    found: dict[str, list[tuple[np.ndarray, dict[str, Moved]]]] = {}
    seconds: dict[str, float] = defaultdict(float)
    start = time.perf_counter()
    with bar(None, "stability", unit=" changes", progress=progress) as steps:
        for seed in range(seeds):
            for perturbed in cells.perturbed(seed, depths, gene_dropouts, n_companions):
                steps.set_postfix_str(perturbed.what)
                found.setdefault(perturbed.what, []).append((perturbed.rows, spaces.moved(perturbed)))
                now = time.perf_counter()
                seconds[perturbed.what] += now - start
                start = now
                steps.update()
    tables = []
    for what, of_draws in found.items():
        table = _table(of_draws, n_cells)
        table.insert(0, "perturbation", what)
        tables.append(table.assign(seconds=seconds[what]))
    table = pd.concat(tables, ignore_index=True)
    table["typical_distance"] = table["method"].map(spaces.typical)
    return table.assign(n_cells=n_cells, seeds=seeds)


class Cells:
    """Cells as they were, and what can be done to them."""

    def __init__(self, model: PretrainedModel, adata: ad.AnnData | None, max_cells: int) -> None:
        if model.can("read two modalities"):
            msg = (
                f"stability changes the counts of an AnnData with genes, and a {type(model).__name__} is set up with a "
                "MuData: it is not for this model."
            )
            raise NotImplementedError(msg)
        args = model.registry["setup_args"]
        self.layer, self.batch_key = args["layer"], args["batch_key"]
        adata = model.adata if adata is None else adata
        batch = model._cells(adata).batch
        rows = np.sort(np.random.default_rng(0).permutation(adata.n_obs)[:max_cells])
        some = without_view(adata[rows])
        self.batch = np.zeros(len(rows), dtype=np.int64) if batch is None else batch[rows]
        var = matrix_of(some, self.layer).var
        self.obs, self.var = some.obs, var[which_are_genes(var)]
        self.counts = of_genes(raw_counts(some, self.layer), var)

    def data(
        self,
        counts: sp.csr_matrix | None = None,
        *,
        rows: np.ndarray | slice = ALL,
        genes: np.ndarray | slice = ALL,
        batch: str | None = None,
    ) -> ad.AnnData:
        """Some of the cells and genes, with other counts, or of one batch."""
        counts = (self.counts if counts is None else counts)[rows][:, genes]
        obs = self.obs.iloc[rows]
        if batch is not None:
            obs = obs.assign(**{self.batch_key: batch})
        where: dict[str, Any] = {"X": counts} if self.layer is None else {"layers": {self.layer: counts}}
        return ad.AnnData(obs=obs.copy(), var=self.var.iloc[genes].copy(), **where)

    def perturbed(
        self, seed: int, depths: Sequence[float], gene_dropouts: Sequence[float], n_companions: int
    ) -> Iterator[Perturbed]:
        """One draw of each kind."""
        rng = np.random.default_rng(seed)
        n_cells, n_genes = self.counts.shape
        everyone = np.arange(n_cells)
        half = np.sort(rng.permutation(n_cells)[: n_cells // 2])
        yield Perturbed("half of the companions", half, [self.data(rows=half)])
        groups = [
            group
            for code in np.unique(self.batch)
            for of_batch in [rng.permutation(np.flatnonzero(self.batch == code))]
            for group in np.array_split(of_batch, -(-len(of_batch) // n_companions))
        ]
        parts = [self.data(rows=group) for group in groups]
        yield Perturbed(f"{n_companions} companions", np.concatenate(groups), parts)
        if len(np.unique(self.batch)) > 1:
            together = self.data(batch=str(self.obs[self.batch_key].iloc[0]))
            yield Perturbed("all batches together", everyone, [together])
        for share in depths:
            thin = self.counts.copy()
            thin.data = rng.binomial(thin.data.astype(np.int64), share).astype(np.float32)
            yield Perturbed(f"{share:.0%} of the counts", everyone, [self.data(thin)], thin)
        for share in gene_dropouts:
            kept = np.ones(n_genes)
            kept[rng.permutation(n_genes)[: round(share * n_genes)]] = 0
            silent = sp.csr_matrix(self.counts @ sp.diags_array(kept), dtype=np.float32)
            data = self.data(genes=np.flatnonzero(kept))
            yield Perturbed(f"{share:.0%} of the genes dropped", everyone, [data], silent)


class Spaces:
    """The model's embedding of cells as they were, a PCA beside it, and how cells move in both."""

    def __init__(
        self, model: PretrainedModel, cells: Cells, n_neighbors: int, options: Mapping[str, Any]
    ) -> None:
        self.model, self.options, self.n_neighbors = model, options, n_neighbors
        x = log_normalised(cells.counts)
        self.pca = PCA(min(N_COMPONENTS, min(x.shape) - 1), svd_solver="arpack", random_state=0).fit(x)
        self.was = {MODEL: self._embed([cells.data()]), BASELINE: self.pca.transform(x)}
        one, other = np.random.default_rng(0).integers(len(cells.batch), size=(2, N_PAIRS))
        pairs = one[one != other], other[one != other]
        self.typical = {
            name: float(np.median(paired_cosine_distances(z[pairs[0]], z[pairs[1]])))
            for name, z in self.was.items()
        }

    def moved(self, perturbed: Perturbed) -> dict[str, Moved]:
        """By space; a PCA does not see company."""
        now = {MODEL: self._embed(perturbed.parts)}
        if perturbed.counts is not None:
            now[BASELINE] = self.pca.transform(log_normalised(perturbed.counts))
        return {
            name: Moved(
                paired_cosine_distances(self.was[name][perturbed.rows], z) / self.typical[name],
                self._kept(self.was[name][perturbed.rows], z),
            )
            for name, z in now.items()
        }

    def _embed(self, parts: Sequence[ad.AnnData]) -> np.ndarray:
        latent = [self.model.get_latent_representation(part, **self.options) for part in parts]
        return np.concatenate(latent).astype(np.float64)

    def _kept(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Share of each cell's nearest neighbours that are the same ``(cells,)``."""
        nearest = NearestNeighbors(n_neighbors=self.n_neighbors, metric="cosine", algorithm="brute")
        old, new = (nearest.fit(z).kneighbors(return_distance=False) for z in (before, after))
        return np.asarray((old[:, :, None] == new[:, None, :]).any(axis=2).mean(axis=1))


def _table(draws: Sequence[tuple[np.ndarray, Mapping[str, Moved]]], n_cells: int) -> pd.DataFrame:
    """Rows of one perturbation, as :func:`stability` gives them."""
    nobody = np.empty(0, dtype=np.int64)
    again = Resampling(
        n_cells, [Split(ALL_CELLS, seed, "", nobody, rows) for seed, (rows, _) in enumerate(draws)]
    )
    names = list(draws[0][1])
    metrics = {
        "median_shift": {
            name: again.quantile([moved[name].shift for _, moved in draws], 0.5) for name in names
        },
        "q95_shift": {
            name: again.quantile([moved[name].shift for _, moved in draws], 0.95) for name in names
        },
        "neighbours_kept": {name: again.mean([moved[name].kept for _, moved in draws]) for name in names},
    }
    versus = BASELINE if BASELINE in names else None
    tables = [compared(values, versus=versus).assign(metric=name) for name, values in metrics.items()]
    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "metric", table.pop("metric"))
    table.insert(2, "split", ALL_CELLS)
    return table
