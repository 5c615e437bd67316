"""What pretraining asks for, hidden genes, against predictors that know no biology of the cell."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scvi import REGISTRY_KEYS

from cellprior._docs import described
from cellprior._talk import bar
from cellprior.evaluate._intervals import Resampling, compared
from cellprior.evaluate._splits import Split, random_splits
from cellprior.model._base import PretrainedModel
from cellprior.model.data._cells import Cells
from cellprior.model.data._panels import measured_genes
from cellprior.model.learning._masked import MODEL

HIGHER_IS_BETTER = ("accuracy",)
SENTENCE = 512  # cells at most


class PerCell(NamedTuple):
    """Of the test cells of a split, see :class:`~cellprior.model.learning._masked.MaskedScores`."""

    n_hidden: np.ndarray
    sums: dict[str, dict[str, np.ndarray]]


@described
def masked_prediction(
    model: PretrainedModel,
    adata: ad.AnnData | None = None,
    *,
    mask_shares: Sequence[float] = (0.15, 0.3),
    seeds: int = 3,
    test_size: float = 0.2,
    max_cells: int = 500,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Compare the model's prediction of hidden genes with predictors that know no biology of the cell.

    These are fitted to the training cells of each split, of the same batch where ``batch_key`` was given to
    ``setup_anndata``, and asked about the same hidden genes of the same test cells. All hidden genes are hidden from
    the network, none is predicted in plain sight. The model was pretrained on other cells, or on these, test cells
    among them; the predictors know the rates of these genes in these data. A model that is no better than they are has
    learned how deep cells are and how common genes are, which is a few numbers.

    Of ScBERT, the bins of expressed genes; measures are ``accuracy`` and ``cross_entropy`` (nats per gene):

    ``uniform``, ``all_genes``
        All bins, and the most frequent one of all genes.
    ``per_gene``, ``per_cell``
        The most frequent one of the gene, and of the genes in sight of the cell [Boiarsky et al., bioRxiv
        2023.10.19.563100].
    ``gene_mean_and_cell``
        The bin nearest to the gene's mean plus how far the cell's genes in sight are above theirs; no probabilities.
    ``rate_and_depth``
        A Poisson count of the gene's rate at the cell's depth that is not in bin 0.

    Of ScGPT, the bins of expressed genes as numbers; ``squared_error``:

    ``zero``, ``gene_mean``
        0, and the gene's mean bin.
    ``gene_mean_at_depth``
        The line of the gene's bin against the logarithm of how many genes a cell expresses.

    Of CellPLM, the counts of genes, expressed or not; ``negative_binomial`` and ``poisson`` loss (nats per gene). The
    decoder gets the covariates of pretraining that fit the training cells best:

    ``gene_means``
        Each gene's share of all counts, at the depth of what is in sight of the cell.
    ``equal_shares``
        The same share for all genes.

    Parameters
    ----------
    model
        With pretrained weights.
    adata
        Data, by default the attached. Its genes are matched by name.
    mask_shares
        Of a cell's genes that are hidden: of the expressed ones (ScBERT, ScGPT), of all (CellPLM, where it is the most
        frequent share, and a quarter of the cells hides none).
    seeds
        Splits into training and test cells, each with masks of its own.
    test_size
        Share of the cells that the predictors are not fitted to.
    max_cells
        Of the test cells of a split, at most; drawn at random.
    <progress>

    Returns
    -------
    A row per ``mask_share``, measure (``metric``) and predictor (``method``, the network is ``model``): ``split``
    (kind), ``value`` per hidden gene with its 95 % interval ``low`` to ``high``; ``versus``, the best predictor that is
    not the model, and the paired ``difference`` to it with ``difference_low`` and ``difference_high``; ``better``,
    whether the ``"higher"`` or the ``"lower"`` value is; ``seeds``, ``n_hidden`` genes in all, and ``seconds`` of it
    all. The interval is of cells, and of splits, drawn again.

    Raises
    ------
    NotImplementedError
        If the model is of another kind.
    <not_embedded>
    ValueError
        If a share is not between 0 and 1, or there are too few cells.
    """
    if not model.can("predict hidden genes"):
        msg = (
            f"{type(model).__name__} does not predict hidden genes: masked_prediction is not for this model."
        )
        raise NotImplementedError(msg)
    model._check_if_trained(warn=False)
    if wrong := [share for share in (*mask_shares, test_size) if not 0 < share < 1]:
        msg = f"{wrong[0]} is no share of genes or cells: a number between 0 and 1 is needed, such as 0.15."
        raise ValueError(msg)
    start = time.perf_counter()
    cells = model._cells(adata)
    splits = _splits(cells.n_obs, seeds=seeds, test_size=test_size, max_cells=max_cells)
    draws = Resampling(cells.n_obs, splits)
    scores: dict[float, list[PerCell]] = {share: [] for share in mask_shares}
    with bar(len(scores) * seeds, "masked prediction", unit=" draws", progress=progress) as steps:
        for split in splits:
            predictors = _Predictors(model, cells, split)
            for share, of_share in scores.items():
                of_share.append(predictors.scores(share))
                steps.update()
    tables = []
    for share, of_share in scores.items():
        table = _table(of_share, draws)
        table.insert(0, "mask_share", share)
        tables.append(table)
    table = pd.concat(tables, ignore_index=True)
    table.insert(3, "split", splits[0].kind)
    table.insert(table.columns.get_loc("n_hidden"), "seeds", seeds)
    return table.assign(seconds=time.perf_counter() - start)


def _splits(n_obs: int, *, seeds: int, test_size: float, max_cells: int) -> list[Split]:
    """Random splits, with no more than ``max_cells`` test cells each."""
    if n_obs < 10 or seeds < 1 or max_cells < 1:
        msg = f"{n_obs} cells, seeds={seeds}, max_cells={max_cells}; at least 10, 1 and 1 are needed."
        raise ValueError(msg)
    found = random_splits(np.zeros(n_obs, dtype=np.int64), seeds=seeds, test_size=test_size)
    return [
        replace(split, test=np.sort(np.random.default_rng(split.seed).permutation(split.test)[:max_cells]))
        for split in found
    ]


class _Predictors:
    """The model, and what the training cells of a split have to say."""

    @torch.inference_mode()
    def __init__(self, model: PretrainedModel, cells: Cells, split: Split) -> None:
        self.model, self.cells, self.split = model, cells, split
        model.module.eval()
        self.codes = np.zeros(len(split.test), dtype=np.int64)
        measured = torch.from_numpy(measured_genes(None, model.genes, cells.counts["rna"].match))
        if cells.batch is not None:
            self.codes = cells.batch[split.test]
        of_batches = measured.expand(max(len(cells.batches), 1), -1)
        self.fitted = model._fit_predictors(lambda: self._batches(split.train), of_batches)
        self.measured = measured[0].to(model.device)

    @torch.inference_mode()
    def scores(self, share: float) -> PerCell:
        """Sums over the hidden genes of each test cell."""
        rng = np.random.default_rng(self.split.seed)
        n_cells = len(self.split.test)
        n_hidden = np.zeros(n_cells)
        sums: dict[str, dict[str, np.ndarray]] = {}
        for code in np.unique(self.codes):  # a sentence is of one batch
            of_batch = np.flatnonzero(self.codes == code)
            start = 0
            for batch in self._batches(self.split.test[of_batch]):
                counts = batch[REGISTRY_KEYS.X_KEY].to(self.model.device)
                rows = of_batch[start : start + len(counts)]
                start += len(counts)
                covariates: dict[str, Any] = {key: batch[key] for key in self.cells.covariates}
                found = self.model._masked_scores(
                    counts,
                    self.fitted,
                    share=share,
                    rng=rng,
                    measured=self.measured,
                    batch=int(code),
                    **covariates,
                )
                n_hidden[rows] = found.n_hidden.cpu().numpy()
                for measure, by_predictor in found.sums.items():
                    for name, values in by_predictor.items():
                        of_measure = sums.setdefault(measure, {})
                        of_measure.setdefault(name, np.zeros(n_cells))[rows] = values.cpu().numpy()
        return PerCell(n_hidden, sums)

    def _batches(self, rows: np.ndarray) -> Iterator[dict[str, torch.Tensor]]:
        """Minibatches of raw counts over the vocabulary, in the order of ``rows`` where these are of one batch."""
        codes = np.zeros(len(rows), dtype=np.int64) if self.cells.batch is None else self.cells.batch[rows]
        for code in np.unique(codes):
            of_batch = rows[codes == code]
            for piece in np.array_split(of_batch, -(-len(of_batch) // SENTENCE)):
                counts = self.cells.counts["rna"].over_vocabulary(piece, len(self.model.genes))
                batch = {REGISTRY_KEYS.X_KEY: torch.from_numpy(counts)}
                for name, values in self.cells.covariates.items():
                    batch[name] = torch.from_numpy(values[piece])
                if self.cells.batch is not None:
                    batch[REGISTRY_KEYS.BATCH_KEY] = torch.from_numpy(
                        self.cells.batch[piece].astype(np.int64)
                    )[:, None]
                yield batch


def _table(scores: Sequence[PerCell], draws: Resampling) -> pd.DataFrame:
    """Rows of one share, as :func:`masked_prediction` gives them."""
    n_hidden = draws.mean([of_split.n_hidden for of_split in scores])
    tables = []
    for measure, by_predictor in scores[0].sums.items():
        # per hidden gene, as sums over cells: a cell weighs as much as it has hidden genes
        values = {
            name: draws.mean([of_split.sums[measure][name] for of_split in scores]) / n_hidden
            for name in by_predictor
        }
        higher = measure in HIGHER_IS_BETTER
        others = {name: value[0] for name, value in values.items() if name != MODEL}
        best = (max if higher else min)(others, key=others.__getitem__)
        table = compared(values, versus=best)
        table.insert(1, "metric", measure)
        tables.append(table.assign(better="higher" if higher else "lower"))
    table = pd.concat(tables, ignore_index=True)
    return table.assign(n_hidden=int(sum(of_split.n_hidden.sum() for of_split in scores)))
