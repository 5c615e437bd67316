"""What the shared space is for: partners, labels and the other modality of a cell."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from cellprior._arguments import count
from cellprior._obs import read_names
from cellprior.model.data._counts import csr_tensor, read_rows
from cellprior.model.learning._holdout import recalled
from cellprior.model.learning._rejection import Calibration, check_reject, explain_unknown, find_limits
from cellprior.model.multiomeclip._cells import Cells, codes_of, counts_matrix, features_of
from cellprior.model.multiomeclip._inputs import log_share, open_peaks
from cellprior.model.multiomeclip._matching import Method, nearest, pairs
from cellprior.model.multiomeclip._module import MODALITIES, Modality
from cellprior.model.multiomeclip._reading import Data, ReadingModel


@dataclass(frozen=True, eq=False)
class Voters:
    """Cells that name others.

    Attributes
    ----------
    latent
        Unit vectors ``(cells, n_latent)``.
    labels
        Their names ``(cells,)``.
    n_neighbors
        How many of them vote on a cell.
    """

    latent: np.ndarray
    labels: np.ndarray
    n_neighbors: int

    def name(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Name of each cell, its share of the votes, and how far the voters are: 1 - mean cosine ``(cells,)``."""
        names, code = np.unique(self.labels, return_inverse=True)
        index, cosine = nearest(points, self.latent, self.n_neighbors)
        votes = np.zeros((len(points), len(names)))
        np.add.at(votes, (np.arange(len(points))[:, None], code[index]), 1.0 / max(index.shape[1], 1))
        return names[votes.argmax(axis=1)].astype(object), votes.max(axis=1), 1.0 - cosine.mean(axis=1)


def _without_ties(share: np.ndarray, novelty: np.ndarray) -> np.ndarray:
    """Share of the votes; where it is the same, nearer voters count more."""
    return share - 1e-6 * novelty


class RetrievalModel(ReadingModel):
    """The part of :class:`~cellprior.model.multiomeclip._model.MultiomeCLIP` that compares cells across modalities."""

    def match(
        self, atac: Data | None = None, rna: Data | None = None, *, method: Method = "transport"
    ) -> pd.DataFrame:
        """Find for each cell with ATAC the cell whose RNA belongs to it.

        Within one category of ``batch_key`` if both have that column. Memory grows with the product of the numbers of
        cells of a batch: 10,000 of each take about 1 GB.

        Parameters
        ----------
        atac
            Data with ATAC, by default the attached.
        rna
            Data with RNA, by default the same as ``atac``.
        method
            ``"transport"``: entropic optimal transport, as of MatchCLOT [Gossi23]_; a cell may be the partner of
            several. ``"greedy"``: pairs of falling similarity, each cell once.

        Returns
        -------
        A row per cell with ATAC: ``partner``, the name of the cell with RNA, or None if none is left; and ``score``,
        the probability of that partner (``"transport"``) or the cosine (``"greedy"``).

        References
        ----------
        .. [Gossi23] Gossi et al., Matching single cells across modalities with contrastive learning and optimal
           transport, Briefings in Bioinformatics 24:bbad130, 2023.

        Raises
        ------
        ValueError
            If no batch is in both data, or a cell has none.

        Warns
        -----
        UserWarning
            If some batches have no cell with RNA, so that their cells have no partner.
        """
        first, a, a_rows = self._latents(atac, "atac")
        second, b, b_rows = self._latents(atac if rna is None else rna, "rna")
        partner = np.full(len(a), None, dtype=object)
        score = np.zeros(len(a))
        for i, j in self._batches(first.obs.iloc[a_rows], second.obs.iloc[b_rows]):
            if len(j):
                found, score[i] = pairs(a[i] @ b[j].T, method)
                names = second.obs.index.to_numpy()[b_rows[j]]
                partner[i] = np.where(found >= 0, names[found], None)
        return pd.DataFrame({"partner": partner, "score": score}, index=first.obs.index[a_rows])

    def transfer_labels(
        self,
        reference: Data | None = None,
        query: Data | None = None,
        *,
        labels_key: str | None = None,
        source: Modality = "rna",
        target: Modality = "atac",
        n_neighbors: int = 30,
        reject: float | None = None,
    ) -> pd.DataFrame:
        """Name cells after the most similar cells of a reference, across modalities.

        ``reject`` lets a cell be called ``unlabeled_category``, as in ``predict`` of the other models: for lying far
        from all cells of the reference with probability at most ``reject``; and so that of the cells that get a name,
        at most a share ``reject`` has a wrong one, with 90 % confidence. Both hold on average over types, for cells
        exchangeable with those that it is calibrated on: cells of the reference with a label and both modalities, which
        are named by the others and no longer vote. Of the data that the model was trained on, known by the names of all
        cells, these are the cells that :meth:`train` held out; of other data, a fifth. A part of the training data is
        not recognised: with it, nothing is promised.

        Parameters
        ----------
        reference
            Labelled data, by default the attached.
        query
            Data to name, by default the attached.
        labels_key
            Column of the reference's ``obs``; by default that of the setup. Cells of ``unlabeled_category`` are left
            out.
        source, target
            Modality in which the reference and the query are looked at.
        n_neighbors
            Cells of the reference that vote.
        reject
            Between 0 and 1, see above; ``None`` names every cell.

        Returns
        -------
        A row per cell of the query with the modality: ``label``, and ``score``, its share of the votes. With
        ``reject``, also ``best_guess``, the name that most votes are for, unknown or not; and a warning that explains
        it, if far more cells are unknown than of the calibration cells.

        Raises
        ------
        ValueError
            If there is no ``labels_key``, or no labelled cell; or if ``reject`` is not between 0 and 1, or cannot be
            promised with so few calibration cells.
        KeyError
            If there is no such column.
        """
        count(n_neighbors=n_neighbors)  # before anything is embedded
        args = self.registry["setup_args"]
        key = args["labels_key"] if labels_key is None else labels_key
        if key is None:
            msg = "labels_key is needed, here or in the setup: the column of the reference's obs with the labels."
            raise ValueError(msg)
        cells, latent, rows = self._latents(reference, source)
        code = codes_of(cells.obs, key, unlabeled=args["unlabeled_category"])
        assert code is not None  # a key was given
        held_out = np.empty(0, dtype=np.int64)
        if reject is not None:
            held_out = self._held_out(reference, cells.complete & (code >= 0))
            advice = "These are held-out cells of the reference with a label and both modalities; give more"
            check_reject(reject, len(held_out), advice)
        votes = (code[rows] >= 0) & ~np.isin(rows, held_out)
        if not votes.any():
            msg = f"No cell of the reference with {source.upper()} has a label in {key!r}."
            raise ValueError(msg)
        labels = read_names(cells.obs, key, frame="mdata.obs")
        voters = Voters(latent[votes], labels[rows[votes]], n_neighbors)
        asked, points, asked_rows = self._latents(query, target)
        label, share, novelty = voters.name(points)
        found = {"label": label, "score": share}
        if reject is not None:
            unknown = str(args["unlabeled_category"])
            own = self._embed(self._counts(reference, cells)[target], held_out)
            named, certain, far = voters.name(own)
            calibration = Calibration(far, _without_ties(certain, far), named == labels[held_out])
            limits = find_limits(*calibration, reject=reject)
            certainty = _without_ties(share, novelty)
            explain_unknown(
                calibration,
                limits,
                novelty,
                certainty,
                reject=reject,
                unknown=unknown,
                guess='in the column "best_guess"',
            )
            found["label"] = np.where(np.logical_or(*limits.unknown(novelty, certainty)), unknown, label)
            found["best_guess"] = label
        return pd.DataFrame(found, index=asked.obs.index[asked_rows])

    def _held_out(self, reference: Data | None, candidates: np.ndarray) -> np.ndarray:
        """Numbers of the cells to calibrate on, of those that can be ``(cells,)``."""
        rows = np.flatnonzero(candidates)
        names = self._cells(reference).obs.index
        if (kept := recalled(self.split_.get("train", {}), names)) is not None:
            return np.intersect1d(rows, kept["validation"])
        is_attached = reference is None or reference is self.adata
        if (
            is_attached and not self.split_ and self.validation_indices is not None
        ):  # saved by an older version
            return np.intersect1d(rows, self.validation_indices)
        return np.sort(np.random.default_rng(0).permutation(rows)[: len(rows) // 5])

    def predict_modality(
        self,
        query: Data | None = None,
        reference: Data | None = None,
        *,
        target: Modality = "rna",
        n_neighbors: int = 30,
    ) -> ad.AnnData:
        """Predict RNA from ATAC, or ATAC from RNA: the mean of the most similar cells of a reference.

        A mean of real cells: it tells cell types and states apart and smooths over what differs within them. On
        held-out cells of a shallow data set (SNARE-seq, 2,039 cells, 247 counts of RNA and 82 of ATAC per cell) the
        predicted and observed expression of a gene correlated by 0.1 on average, and over the genes of a cell the
        prediction was no better than the mean of all cells. Do not test for differences between cells with it.

        Parameters
        ----------
        query
            Data with the other modality, by default the attached.
        reference
            Data with the modality that is predicted, by default the attached.
        target
            ``"rna"`` gives log-normalised expression, ``"atac"`` the share of cells in which a peak is open.
        n_neighbors
            Cells of the reference that are averaged.

        Returns
        -------
        AnnData with a row per cell of the query that has the other modality, and the reference's genes or peaks.
        """
        count(n_neighbors=n_neighbors)
        if target not in MODALITIES:
            msg = f'target={target!r} is not known; choose "rna" or "atac".'
            raise ValueError(msg)
        given: Modality = "atac" if target == "rna" else "rna"
        cells, latent, rows = self._latents(reference, target)
        asked, points, asked_rows = self._latents(query, given)
        index, _ = nearest(points, latent, n_neighbors)
        used, position = np.unique(index, return_inverse=True)
        k = max(index.shape[1], 1)
        weight = sp.csr_matrix(
            (np.full(index.size, 1 / k, np.float32), position.ravel(), np.arange(len(points) + 1) * k),
            shape=(len(points), len(used)),
        )
        adata = cells.data[target]
        counts = read_rows(counts_matrix(adata, cells.layers[target]), cells.rows[target][rows[used]])
        features, names = features_of(cells, target)
        counts = counts if len(features) == counts.shape[1] else sp.csr_matrix(counts[:, features])
        tensor = csr_tensor(counts)
        values = log_share(tensor) if target == "rna" else open_peaks(tensor)
        scaled = sp.csr_matrix((values.values().numpy(), counts.indices, counts.indptr), shape=counts.shape)
        obs = pd.DataFrame(index=asked.obs.index[asked_rows])
        return ad.AnnData(weight @ scaled, obs=obs, var=pd.DataFrame(index=names))

    @torch.inference_mode()
    def _latents(self, adata: Data | None, modality: Modality) -> tuple[Cells, np.ndarray, np.ndarray]:
        """Cells of some data, unit vectors of those with a modality, and their row numbers.

        Raises
        ------
        ValueError
            If none has it.
        """
        self._check_if_trained(warn=False)
        cells = self._cells(adata)
        if modality not in MODALITIES:
            msg = f'{modality!r} is no modality; choose "rna" or "atac".'
            raise ValueError(msg)
        rows = np.flatnonzero(cells.has(modality))
        if not len(rows):
            msg = f"No cell of the data has {modality.upper()}; they have {' and '.join(cells.data)}."
            raise ValueError(msg)
        return cells, self._embed(self._counts(adata, cells)[modality], rows), rows

    def _batches(self, first: pd.DataFrame, second: pd.DataFrame) -> list[tuple[np.ndarray, np.ndarray]]:
        """Numbers of the cells of both that may belong to each other."""
        key = self.registry["setup_args"]["batch_key"]
        if key is None or key not in first or key not in second:
            return [(np.arange(len(first)), np.arange(len(second)))]
        a, b = (read_names(obs, key, frame="obs") for obs in (first, second))
        if alone := sorted(set(a) - set(b)):
            msg = (
                f"{int(np.isin(a, alone).sum())} of {len(a)} cells with ATAC have no partner: no cell with RNA is of "
                f"their batch, obs[{key!r}] {', '.join(map(repr, alone[:5]))}; with RNA there are "
                f"{', '.join(map(repr, sorted(set(b))[:5]))}. If these are the same, call them by the same names."
            )
            if len(alone) == len(set(a)):
                raise ValueError(msg)
            warnings.warn(msg, UserWarning, stacklevel=3)
        return [(np.flatnonzero(a == name), np.flatnonzero(b == name)) for name in np.unique(a.astype(str))]
