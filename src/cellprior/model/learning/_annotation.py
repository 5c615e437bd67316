"""Supervised annotation, shared by the models: learn labels, name cells, and say "unknown"."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from cellprior._obs import read_names, text_of, warn_of_unlabeled
from cellprior.model.data._ranks import from_first
from cellprior.model.learning._annotation_plan import (
    MIN_CELLS,
    NO_CLASS,
    AnnotationCells,
    AnnotationPlan,
    Split,
    only_trainable,
    split_cells,
)
from cellprior.model.learning._fit import KeepBest, fit
from cellprior.model.learning._holdout import keep_split, noted, recalled
from cellprior.model.learning._processes import refuse_unseeded
from cellprior.model.learning._rejection import (
    Calibration,
    Limits,
    check_reject,
    explain_unknown,
    find_limits,
    limits_of,
)

STORED = "stored"


class Names(NamedTuple):
    """What cells are called ``(cells,)``, the best guess for each, and probabilities ``(cells, n_classes)``.

    And how probable the best guess is, how many cells are unknown for lying too far from every type, and for an
    uncertain name, and what else is said of the cells, by name.
    """

    names: np.ndarray
    best_guess: np.ndarray
    probability: np.ndarray
    confidence: np.ndarray
    n_far: int
    n_uncertain: int
    more: dict[str, np.ndarray]


def refuse_unless_annotates(model: Any) -> None:
    """Refuse a model that cannot learn labels.

    Raises NotImplementedError, with what names cells instead.
    """
    if not model.can("annotate"):
        instead = " It names cells by transfer_labels." if hasattr(model, "transfer_labels") else ""
        msg = f"{type(model).__name__} does not learn labels: its module has no trainable_parts.{instead}"
        raise NotImplementedError(msg)


def fine_tune(
    model: Any,
    labels_key: str | None,
    *,
    trainable: str,
    max_epochs: int,
    lr: float,
    batch_size: int,
    validation_size: float,
    calibration_size: float,
    class_weights: Literal["auto"] | None,
    patience: int,
    transductive: bool,
    **trainer_kwargs: Any,
) -> None:
    """See :meth:`cellprior.model._base.PretrainedModel.fine_tune`.

    The module gives ``n_hidden``, ``n_latent``, ``hidden`` and ``trainable_parts``; ``adapted_layers`` if "lora" is
    among these; and ``latent_of`` unless its hidden state is the embedding.
    """
    refuse_unless_annotates(model)
    refuse_unseeded(trainer_kwargs.get("strategy"))
    sizes = [validation_size, calibration_size]
    _refuse_impossible(model, trainable, sizes)
    labels, code = labels_of(model, labels_key)
    if not model.is_trained_ and trainable != "all":
        msg = (
            f"The model has neither been trained nor loaded from weights, and with trainable={trainable!r} much "
            'of it stays random. Train it first, or use trainable="all".'
        )
        warnings.warn(msg, UserWarning, stacklevel=3)
    seed = from_first(int(torch.randint(2**31, ()).item()))  # seeded as all of torch is
    rng = np.random.default_rng(seed)
    drawn = split_cells(code, validation_size=validation_size, calibration_size=calibration_size, rng=rng)
    split = _kept_split(model, drawn, code, sizes)
    model.annotation_ = {"labels": labels, "calibration": {}}
    if model._alike and model.is_trained_:
        width = model.module.n_hidden
        hidden = model._embed(None, split.train, None, "float32", encode=_hidden_states, width=width)
        model.module.annotation.standardise(hidden)
    attached = model._cells()
    read = attached.counts["rna"]
    used, column = np.unique(read.match.index[read.match.index >= 0]), read.column
    cells = AnnotationCells(
        model.adata_manager,
        code,
        split,
        context=np.arange(model.adata.n_obs) if transductive else None,
        batch_size=batch_size,
        column=column,
        n_columns=len(used),
        covariates=list(attached.covariates),
    )
    weights = np.bincount(code[split.train]) ** -0.5 if class_weights == "auto" else np.ones(len(labels))
    watched = {"early_stopping": True, "early_stopping_patience": patience} if cells.n_val else {}
    with only_trainable(model.module, trainable) as parts:
        plan = AnnotationPlan(
            model.module,
            parts,
            gene_index=torch.as_tensor(used),
            class_weights=torch.as_tensor(weights / weights.mean(), dtype=torch.float32),
            n_steps=max_epochs * len(cells.train_dataloader()),
            lr=lr,
        )
        try:
            fit(
                model,
                plan,
                cells,
                max_epochs=max_epochs,
                split={"fine_tune": {"sizes": sizes} | noted(model.adata.obs_names, split._asdict())},
                best=KeepBest("annotation_validation_macro_f1", "max", loss="annotation_validation_loss"),
                join=operator.or_,
                **{**watched, **trainer_kwargs},
            )
        except BaseException:
            model.annotation_ = {}  # a head that has not learned would give names all the same
            raise
    _calibrate(model, code, split, transductive)


def _refuse_impossible(model: Any, trainable: str, sizes: list[float]) -> None:
    if min(sizes) < 0 or sum(sizes) >= 1:
        msg = (
            f"validation_size={sizes[0]} and calibration_size={sizes[1]} leave no cells to train "
            "on; shares of the labelled cells are needed that add up to less than 1."
        )
        raise ValueError(msg)
    if trainable not in model.module.trainable_parts():
        known = ", ".join(f'"{name}"' for name in model.module.trainable_parts())
        msg = f"trainable={trainable!r} is not known; choose one of {known}."
        raise ValueError(msg)
    if bare := [
        type(part).__name__
        for part in model.module.trainable_parts()[trainable]
        if not isinstance(part, nn.Module)
    ]:
        msg = (
            f"trainable_parts()[{trainable!r}] of {type(model.module).__name__} has a {bare[0]}; modules are needed. "
            "Make it part of one."
        )
        raise TypeError(msg)
    n_hidden, n_latent = model.module.n_hidden, model.module.n_latent
    if n_hidden != n_latent and not hasattr(model.module, "latent_of"):
        msg = (
            f"{type(model).__name__} cannot call cells unknown: its hidden state ({n_hidden} columns) is not its "
            f"embedding ({n_latent}), and its module has no latent_of, which makes the one of the other."
        )
        raise NotImplementedError(msg)


def labels_of(model: Any, labels_key: str | None) -> tuple[list[str], np.ndarray]:
    """Names of the classes, sorted, and the class of each attached cell, NO_CLASS for the unlabelled."""
    if model.adata is None:
        msg = "The model was loaded without data; load it with the data to train on."
        raise ValueError(msg)
    args = model.registry["setup_args"]
    key = labels_key if labels_key is not None else args["labels_key"]
    if key is None:
        msg = "No labels: give labels_key, here or to setup_anndata, the column of adata.obs that holds them."
        raise ValueError(msg)
    unknown = text_of(args["unlabeled_category"])
    names = read_names(
        model.adata.obs,
        key,
        advice=f"Call the cells without a label {unknown!r} (unlabeled_category), or leave them out.",
    )
    labels, n_cells = np.unique(names[names != unknown], return_counts=True)
    if len(labels) < 2:
        found = f"only {labels[0]!r}" if len(labels) else f"only {unknown!r}, which stands for no label"
        msg = f"adata.obs[{key!r}] holds {found}; at least two labels are needed to tell apart."
        raise ValueError(msg)
    if small := [f"{label!r} ({n})" for label, n in zip(labels, n_cells, strict=True) if n < MIN_CELLS]:
        msg = (
            f"Fewer than {MIN_CELLS} cells have the label {', '.join(small)}. The model learns from them, but none "
            "is left to validate or calibrate with, and it will often miss such cells. Merge or leave out such labels."
        )
        warnings.warn(msg, UserWarning, stacklevel=4)
    warn_of_unlabeled(labels.tolist(), unknown, where=f"adata.obs[{key!r}]")
    code = pd.Index(labels).get_indexer(names)  # -1, NO_CLASS, for the unlabelled
    return labels.tolist(), code


def _kept_split(model: Any, drawn: Split, code: np.ndarray, sizes: list[float]) -> Split:
    """The split of the fine-tuning before, if it is one of these cells: calibration cells must not be learned."""
    state, names = model.split_.get("fine_tune", {}), model.adata.obs_names
    before, labelled = recalled(state, names), np.flatnonzero(code != NO_CLASS)
    if before is not None and state["sizes"] == sizes:
        new = np.setdiff1d(labelled, np.concatenate(list(before.values())))  # these are split as drawn
        parts = {
            part: np.union1d(np.intersect1d(before[part], labelled), np.intersect1d(rows, new))
            for part, rows in drawn._asdict().items()
        }
        if len(np.unique(code[parts["train"]])) == code.max() + 1:
            return Split(**parts)
    return Split(**keep_split(state, names, drawn._asdict(), sizes_given=True, rows_given=True))


@torch.no_grad()
def _calibrate(model: Any, code: np.ndarray, split: Split, transductive: bool) -> None:
    """Where the classes lie, from training and validation cells; scores of the calibration cells."""
    known = np.sort(np.concatenate([split.train, split.validation]))
    everything = slice(None)
    rows, of_rows = (None, known) if transductive else (known, everything)
    latent = model._embed(None, rows, None, "float32", encode=partial(_located, model))
    model.module.annotation.locate(latent[of_rows], code[known])
    if not len(split.calibration):
        return
    # in a sentence of their own, as a query is, or in that of the whole data
    rows, of_rows = (None, split.calibration) if transductive else (split.calibration, everything)
    logits, novelty = (scores[of_rows] for scores in scores_of(model, None, rows, None))
    model.annotation_["calibration"] = {
        "novelty": novelty.tolist(),
        "confidence": _softmax(logits).max(axis=1).tolist(),
        "correct": (logits.argmax(axis=1) == code[split.calibration]).tolist(),
    }


def _latent_of(model: Any, hidden: Tensor) -> Tensor:
    """Embedding of hidden states, ``(cells, n_latent)``."""
    module = model.module
    return module.latent_of(hidden) if hasattr(module, "latent_of") else hidden


def _hidden_states(encoder: Any, chunks: Iterable[Tensor], covariates: Any) -> Iterable[Tensor]:
    return encoder.hidden(chunks, covariates)


def _located(model: Any, encoder: Any, chunks: Iterable[Tensor], covariates: Any) -> Iterator[Tensor]:
    """Embedding of each chunk of one group, as :func:`scores_of` reads it."""
    return (_latent_of(model, hidden) for hidden in encoder.hidden(chunks, covariates))


def scores_of(
    model: Any,
    adata: ad.AnnData | None,
    indices: Sequence[int] | Sequence[bool] | np.ndarray | None,
    batch_size: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits ``(cells, n_classes)`` and novelty ``(cells,)``."""
    head = model.module.annotation

    def encode(encoder: Any, chunks: Iterable[Tensor], covariates: Any) -> Iterator[Tensor]:
        for hidden in encoder.hidden(chunks, covariates):
            novelty = head.novelty(_latent_of(model, hidden))
            yield torch.cat([head(hidden), novelty[:, None]], dim=1)

    n_classes = len(model.annotation_["labels"])
    scores = model._embed(adata, indices, batch_size, "float32", encode=encode, width=n_classes + 1)
    return scores[:, :n_classes], scores[:, n_classes]


def name_cells(
    model: Any,
    adata: ad.AnnData | None,
    indices: Sequence[int] | Sequence[bool] | np.ndarray | None = None,
    *,
    reject: float | str | None,
    batch_size: int | None,
    guess: str = "what is given without reject",
) -> Names:
    """Name cells; see :meth:`cellprior.model._base.PretrainedModel.predict`.

    ``guess`` says in a warning where the best guesses are; ``reject=STORED`` is what the weights were saved with.
    """
    refuse_unless_annotates(model)
    if not model.annotation_:
        msg = (
            "The model has no labels to give: these weights have learned none. Give labelled cells to learn from, "
            'cp.tl.annotate(adata, weights, reference, "cell_type"), on the command line --reference and --labels-key; '
            "or call fine_tune first, or load a fine-tuned model."
        )
        raise RuntimeError(msg)
    state = model.annotation_
    share: float | None
    of_coarse: float | None
    if isinstance(reject, str):  # STORED
        share, of_coarse = state.get("reject"), state.get("coarse", {}).get("reject")
    else:
        share = of_coarse = reject
    limits = None if share is None else limits_for(model, share)
    logits, novelty = scores_of(model, adata, indices, batch_size)
    probability = _softmax(logits)
    labels = np.asarray(state["labels"], dtype=object)
    named = labels != state.get("none")
    best = labels[named][probability[:, named].argmax(axis=1)]
    confidence = probability[:, named].max(axis=1)
    unknown = str(model.registry["setup_args"]["unlabeled_category"])
    far = uncertain = np.zeros(len(best), dtype=bool)
    if share is not None and limits is not None:
        far, uncertain = limits.unknown(novelty, confidence)
        explain_unknown(
            calibration_of(model), limits, novelty, confidence, reject=share, unknown=unknown, guess=guess
        )
    names = np.where(far | uncertain, unknown, best).astype(object)
    more = _said_of(model, names, probability, named, novelty, reject=of_coarse, unknown=unknown)
    return Names(names, best, probability, confidence, int(far.sum()), int(uncertain.sum()), more)


def _said_of(
    model: Any,
    names: np.ndarray,
    probability: np.ndarray,
    named: np.ndarray,
    novelty: np.ndarray,
    *,
    reject: float | None,
    unknown: str,
) -> dict[str, np.ndarray]:
    """What else weights that came with names know of them: a coarse name, with a rejection of its own, and its id."""
    state = model.annotation_
    more: dict[str, np.ndarray] = {}
    if "coarse" in state:
        of, groups = np.unique(np.asarray(state["coarse"]["labels"])[named], return_inverse=True)
        sums = probability[:, named] @ np.eye(len(of))[groups]
        coarse, confidence = of[sums.argmax(axis=1)].astype(object), sums.max(axis=1)
        if reject is not None:
            scores = state["coarse"]["calibration"]
            limits = limits_of(*(np.asarray(scores[name]) for name in Calibration._fields), reject=reject)
            far, uncertain = limits.unknown(novelty, confidence)
            coarse = np.where(far | uncertain, unknown, coarse)
        more["coarse"] = coarse
    if "ontology" in state:
        ids = dict(zip(state["labels"], state["ontology"], strict=True))
        more["ontology_term_id"] = np.array([ids.get(name, "") for name in names], dtype=object)
    return more


def calibration_of(model: Any) -> Calibration:
    """Scores of the cells that the model has been calibrated on."""
    scores = model.annotation_["calibration"]
    return Calibration(*(np.asarray(scores.get(name, ())) for name in Calibration._fields))


def limits_for(model: Any, reject: float) -> Limits:
    """Beyond which cells are unknown."""
    calibration = calibration_of(model)
    advice = "Fine-tune with more labelled cells or a larger calibration_size"
    check_reject(reject, len(calibration.novelty), advice)
    return find_limits(*calibration, reject=reject)


def _softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).double().softmax(1).numpy()
