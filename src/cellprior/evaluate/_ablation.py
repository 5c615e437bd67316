"""Does pretraining help? The same network fine-tuned from pretrained and from random weights, on the same cells."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from cellprior._obs import text_of
from cellprior._talk import bar
from cellprior.evaluate._arms import ARMS, COMPARISONS, CONTROL, FROZEN, LARGEST, NETWORKS, Cells, Fit
from cellprior.evaluate._expression import raw_counts
from cellprior.evaluate._intervals import CLASS_SCORES, Resampling, compared
from cellprior.evaluate._splits import Split, batch_splits, label_codes, random_splits
from cellprior.evaluate._task import seen_by_weights, trained_on
from cellprior.evaluate._twin import has_random_weights
from cellprior.model._base import PretrainedModel
from cellprior.weights._registry import entries

LRS = (3e-4, 1e-3, 3e-3)
MIN_LRS = 3  # that the control may choose among
FAILED, UNFINISHED = "did not learn", "still improving at the last epoch"


def pretraining_ablation(
    model: PretrainedModel,
    *,
    labels_key: str | None = None,
    batch_key: str | None = None,
    arms: Sequence[str] | None = None,
    seeds: int = 5,
    test_size: float = 0.2,
    lrs: Sequence[float] = LRS,
    max_epochs: int = 100,
    embed_options: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    **fine_tune: Any,
) -> pd.DataFrame:
    """Compare fine-tuning from pretrained weights with fine-tuning the same network from random ones.

    All arms learn from the same training cells and are asked about the same test cells, once, when all choices have
    been made. Those that are fine-tuned have the same head, the same number of epochs, the same early stopping, and
    the same learning rates to choose from, by macro-F1 on the same part of the training cells.

    ``pretrained + head``, ``pretrained + last``, ``pretrained + all``
        ``fine_tune`` with this ``trainable``.
    ``scratch + all trained``
        Random weights, all of them trained. This is "no pretraining".
    ``scratch + last only``
        Random weights, all but the last layer frozen at random. Published comparisons have called it "no pretraining",
        which it is not [issues 17 of scBERT, 5 of sc-foundation-eval]: it shows what the head can do by itself.
    ``pretrained features + logistic regression``, ``random features + logistic regression``
        The embedding, of pretrained or of random weights, read by a linear probe.
    ``logistic regression on genes``
        L1, on all log-normalised genes [Boiarsky et al., bioRxiv 2023.10.19.563100].
    ``largest class``
        One label for all.

    Parameters
    ----------
    model
        With pretrained weights and data. Stays as it is. If it was trained without labels on these very cells, test
        cells among them, it has an advantage that weights from elsewhere would not have.
    labels_key
        Column of ``obs``; by default the one given to ``setup_anndata``. Cells without a label, and labels of fewer
        than 5 cells, are left out.
    batch_key
        Column of ``obs`` with batches, donors or studies: each is held out in turn. By default the one given to
        ``setup_anndata``; without one, random cells are held out.
    arms
        Some of the above; all by default.
    seeds
        Splits into training and test cells, each with random weights of its own; of held-out batches, fits of each.
    test_size
        Share of the cells that is asked about, of each label; not read with batches.
    lrs
        Learning rates to choose from, at least three.
    max_epochs
        Of each fit, with a cosine down to 0.
    embed_options
        To ``get_latent_representation``, for the embeddings.
    progress
        Whether to draw a bar, by default as ``cellprior.settings.progress`` says.
    **fine_tune
        Other arguments of ``fine_tune``, the same for all arms: ``batch_size``, ``patience``, ``validation_size``, ...

    Returns
    -------
    A row per arm, metric (macro-F1, balanced accuracy and accuracy) and comparison: ``arm``, ``metric``, ``split``
    (kind), ``value`` with its 95 % interval ``low`` to ``high``; ``versus``, the arm that it is compared with, and the
    paired ``difference`` with ``difference_low`` and ``difference_high``; ``seeds``; of the fits, mean
    ``train_accuracy``, median of the chosen ``lr``, mean ``epochs``, and ``seconds`` of all; and a ``note``. With
    ``versus``

    * ``scratch + all trained``, the difference is what pretraining gives to fine-tuning;
    * ``random features + logistic regression``, what it gives to the embedding;
    * ``logistic regression on genes``, whether the model is worth the trouble;
    * empty, there is none: an arm that the others are compared with.

    The interval is of cells, and of splits, drawn again, see :class:`~cellprior.evaluate._intervals.Resampling`.

    Raises
    ------
    ValueError
        If the model has no data or random weights; if it has learned labels, unless its weights are those of the
        registry, whose card tells of which cells; if an arm is not one of those above, or a network frozen at random
        would stand for "no pretraining"; if there are fewer than three learning rates, or labels or batches cannot be
        split.
    KeyError
        If a column is not in ``obs``.

    Warns
    -----
    UserWarning
        If an arm did not learn: in some fit it names hardly more of its training cells than the largest class would.
        Its note says so, and nothing is compared with it. Also if an arm was still improving in the last epochs, and if
        the weights say that they were trained on these cells.
    """
    chosen = _arms(arms)
    _refuse(model, fine_tune, lrs)
    codes, names, key = _labels(model, labels_key)
    _warn_of_known_cells(model, codes)
    splits = _splits(model, codes, batch_key, seeds=seeds, test_size=test_size)
    if model.device.type == "cpu":
        fine_tune = {"accelerator": "cpu", **fine_tune}
    options = {"labels_key": key, "max_epochs": max_epochs, **fine_tune}
    fits: dict[str, list[Fit]] = {arm: [] for arm in chosen}
    with bar(len(chosen) * len(splits), "ablation", unit=" fits", progress=progress) as steps:
        for seed, split in enumerate(splits):
            cells = Cells(model, split, codes, names, seed)
            for arm in chosen:
                steps.set_postfix_str(arm)
                start = time.perf_counter()
                fit = cells.fit(arm, lrs, options, embed_options or {})
                fits[arm].append(fit._replace(seconds=time.perf_counter() - start))
                steps.update()
    return _table(fits, codes, splits, seeds)


def _arms(arms: Sequence[str] | None) -> list[str]:
    """The chosen arms in their order."""
    chosen = list(ARMS if arms is None else arms)
    wrong = "is not 'no pretraining': random layers that stay as they are, and a head that works around them"
    if frozen := [arm for arm in chosen if arm.startswith("scratch") and arm not in (CONTROL, FROZEN)]:
        msg = f"{frozen[0]!r} {wrong}. Take {CONTROL!r}, or {FROZEN!r} beside it."
        raise ValueError(msg)
    if unknown := [arm for arm in chosen if arm not in ARMS]:
        msg = f"The arm {unknown[0]!r} is not known; choose among {', '.join(map(repr, ARMS))}."
        raise ValueError(msg)
    if FROZEN in chosen and CONTROL not in chosen:
        msg = f"{FROZEN!r} {wrong}. It cannot stand alone: add {CONTROL!r}."
        raise ValueError(msg)
    if not chosen:
        msg = f"No arms; choose among {', '.join(map(repr, ARMS))}."
        raise ValueError(msg)
    return [arm for arm in ARMS if arm in chosen]


def _refuse(model: PretrainedModel, fine_tune: Mapping[str, Any], lrs: Sequence[float]) -> None:
    """Refuse models and options that would make an arm another than it says."""
    if model.adata is None:
        msg = "The model was loaded without data; load it with the labelled cells to compare on."
        raise ValueError(msg)
    if has_random_weights(model):
        msg = "The model has random weights: there is no pretraining to take away. Load weights, or train it first."
        raise ValueError(msg)
    of_registry = (model.pretrained_ or {}).get("weights") in entries() and not model.history
    if model.annotation_ and not of_registry:  # whose names are of cells that their card tells
        msg = (
            "The model has learned labels already, maybe of cells that it would be asked about. Give one that has "
            "only been pretrained, or weights of the registry as from_pretrained loads them."
        )
        raise ValueError(msg)
    if set_here := sorted({"trainable", "lr", "calibration_size"} & set(fine_tune)):
        msg = f"{set_here[0]} is set by the ablation: trainable by the arm, lr by lrs, and nothing is calibrated."
        raise ValueError(msg)
    if fine_tune.get("validation_size", 1) <= 0:
        msg = "validation_size=0 leaves no cells to choose learning rate and epoch on; a share such as 0.15 is needed."
        raise ValueError(msg)
    if len(set(lrs)) < MIN_LRS:
        msg = (
            f"lrs={tuple(lrs)}; at least {MIN_LRS} learning rates are needed: what suits pretrained weights can let "
            "random ones learn nothing."
        )
        raise ValueError(msg)


def _warn_of_known_cells(model: PretrainedModel, codes: np.ndarray) -> None:
    if model.trained_on_ is None:
        return
    asked = np.flatnonzero(codes >= 0)
    counts = raw_counts(model.adata, model.registry["setup_args"]["layer"])
    n_known = trained_on(model, counts[asked])
    if seen_by_weights(n_known, len(asked)) == "these cells":
        warnings.warn(
            f"The model was trained on at least {n_known:,} of these {len(asked):,} cells, maybe with their labels. "
            "What it gains here, it need not gain on others.",
            stacklevel=3,
        )


def _labels(model: PretrainedModel, labels_key: str | None) -> tuple[np.ndarray, list[str], str]:
    """Number of each cell's label, -1 for those left out; names of the labels; their column."""
    args = model.registry["setup_args"]
    key = args["labels_key"] if labels_key is None else labels_key
    if key is None:
        msg = "No labels: give labels_key, here or to setup_anndata, the column of adata.obs that holds them."
        raise ValueError(msg)
    labels = _column(model.adata, key).astype(object)
    codes, names = label_codes(labels.mask(labels.map(text_of) == text_of(args["unlabeled_category"])))
    return codes, names, key


def _splits(
    model: PretrainedModel, codes: np.ndarray, batch_key: str | None, *, seeds: int, test_size: float
) -> list[Split]:
    if seeds < 1:
        msg = f"seeds={seeds}; at least one is needed."
        raise ValueError(msg)
    key = batch_key if batch_key is not None else model.registry["setup_args"]["batch_key"]
    if key is None or (batch_key is None and model.adata.obs[key].nunique() < 2):
        return random_splits(codes, seeds=seeds, test_size=test_size)
    held_out = batch_splits(codes, _column(model.adata, key))
    return [replace(split, seed=seed) for split in held_out for seed in range(seeds)]


def _column(adata: ad.AnnData, key: str) -> pd.Series:
    if key not in adata.obs:
        msg = f"{key!r} not found in adata.obs; its columns are {list(adata.obs.columns)}."
        raise KeyError(msg)
    return adata.obs[key]


def _table(
    fits: Mapping[str, list[Fit]], codes: np.ndarray, splits: Sequence[Split], seeds: int
) -> pd.DataFrame:
    """Rows as :func:`pretraining_ablation` gives them."""
    draws = Resampling(len(codes), splits)
    scores = {arm: draws.classification(codes, [fit.test for fit in of_arm]) for arm, of_arm in fits.items()}
    notes = {arm: _note(arm, of_arm) for arm, of_arm in fits.items()}
    failed = {arm for arm, note in notes.items() if note.startswith(FAILED)}
    for arm, note in notes.items():
        if arm in failed or note.startswith(UNFINISHED):
            warnings.warn(f"{arm}: {note}.", UserWarning, stacklevel=3)
    comparisons = {
        versus: [arm for arm in others if arm in fits]
        for versus, others in COMPARISONS.items()
        if versus in fits and versus not in failed
    }
    alone = [arm for arm in fits if not any(arm in others for others in comparisons.values())]
    rows = []
    for metric in CLASS_SCORES:
        of_metric = {arm: score[metric] for arm, score in scores.items()}
        options: dict[str, Any] = {"of": draws.interval, "within": (0.0, 1.0)}
        parts = [compared({arm: of_metric[arm] for arm in alone}, **options)]
        for versus, others in comparisons.items():
            both = compared({arm: of_metric[arm] for arm in (versus, *others)}, versus=versus, **options)
            parts.append(both[both["method"] != versus])
        table = pd.concat(parts, ignore_index=True).rename(columns={"method": "arm"})
        table.insert(1, "metric", metric)
        rows.append(table)
    table = pd.concat(rows, ignore_index=True)
    table.insert(2, "split", splits[0].kind)
    table["seeds"] = seeds
    summaries: dict[str, Callable[[list[float]], Any]] = {
        "train_accuracy": np.mean,
        "lr": np.median,
        "epochs": np.mean,
        "seconds": np.sum,
    }
    for column, of_fits in summaries.items():
        table[column] = table["arm"].map(
            {arm: float(of_fits([getattr(fit, column) for fit in of_arm])) for arm, of_arm in fits.items()}
        )
    table["note"] = table["arm"].map(notes)
    order = {arm: i for i, arm in enumerate(ARMS)}
    return table.sort_values("arm", key=lambda arm: arm.map(order), kind="stable", ignore_index=True)


def _note(arm: str, fits: Sequence[Fit]) -> str:
    """What there is to say of an arm."""
    fixed = NETWORKS[arm].note if arm in NETWORKS else ""
    n_failed, n_rising = sum(not fit.learned for fit in fits), sum(fit.rising for fit in fits)
    if arm != LARGEST and n_failed:
        reached = min(fit.train_accuracy for fit in fits)
        return (
            f"{FAILED} in {n_failed} of {len(fits)} fits, lowest training accuracy {reached:.2f}; no control"
        )
    if n_rising:
        return f"{UNFINISHED} in {n_rising} of {len(fits)} fits: give a larger max_epochs; {fixed}".rstrip(
            "; "
        )
    return fixed
