"""Supervised annotation, shared by the models: learn labels, name cells, and say "unknown"."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scvi.model.base import BaseModelClass
from scvi.train import TrainRunner
from torch import Tensor

from cellprior._obs import read_names, text_of, warn_of_unlabeled
from cellprior.model.data._ranks import from_first
from cellprior.model.learning._annotation_plan import (
    MIN_CELLS,
    NO_CLASS,
    AnnotationCells,
    AnnotationHead,
    AnnotationPlan,
    Split,
    only_trainable,
    split_cells,
)
from cellprior.model.learning._fitting import run
from cellprior.model.learning._holdout import keep_split, noted, recalled
from cellprior.model.learning._processes import trainer_defaults
from cellprior.model.learning._rejection import (
    Calibration,
    Limits,
    check_reject,
    explain_unknown,
    find_limits,
)


class Names(NamedTuple):
    """What cells are called ``(cells,)``, the best guess for each, and probabilities ``(cells, n_classes)``.

    And how many cells are unknown for lying too far from every type, and for an uncertain name.
    """

    names: np.ndarray
    best_guess: np.ndarray
    probability: np.ndarray
    n_far: int
    n_uncertain: int


class AnnotatingModel(BaseModelClass):
    """The supervised half of :class:`~cellprior.model._base.PretrainedModel`.

    The module gives ``n_hidden``, ``n_latent``, ``hidden``, ``trainable_parts`` and ``adapted_layers``, and ``latent``
    unless its hidden state is the embedding.
    """

    history_: dict[str, Any] | None
    is_trained_: bool
    split_: dict[str, Any]
    _annotation: dict[str, Any] = {}
    _alike = False  # whether most of a hidden state is the same in all cells: the head then learns from what is left

    @property
    def annotation_(self) -> dict[str, Any]:
        """Label names and calibration of a fine-tuned model; saved with it. Setting it builds the head."""
        return self._annotation

    @annotation_.setter
    def annotation_(self, state: dict[str, Any]) -> None:
        self._annotation = state
        if hasattr(self.module, "annotation"):
            del self.module.annotation
        if state:
            head = AnnotationHead(self.module.n_hidden, self.module.n_latent, len(state["labels"]))
            self.module.annotation = head.to(self.module.device)

    def fine_tune(
        self,
        labels_key: str | None = None,
        *,
        trainable: str = "last",
        max_epochs: int = 100,
        lr: float = 1e-3,
        batch_size: int = 512,
        validation_size: float = 0.15,
        calibration_size: float = 0.15,
        class_weights: Literal["auto"] | None = "auto",
        patience: int = 20,
        transductive: bool = False,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        **trainer_kwargs: Any,
    ) -> None:
        """Learn the labels of the attached data, for :meth:`predict`.

        A new head, as in CellPLM's annotation pipeline: a linear latent on the hidden state in front of the model's
        own latent, dropout, a linear layer to the classes; cross-entropy. Draws depend on ``scvi.settings.seed``.
        ``history`` gets ``annotation_train_loss``, ``annotation_validation_loss`` and
        ``annotation_validation_macro_f1``. The embedding moves with the parts that are trained; with
        ``trainable="head"`` it stays.

        Parameters
        ----------
        labels_key
            Column of ``obs``; by default the one given to ``setup_anndata``. Cells of ``unlabeled_category`` are not
            trained on.
        trainable
            Besides the head: ``"last"`` trains the last encoder layer and the norm after it, ``"all"`` everything in
            front of the latent, ``"head"`` nothing, ``"lora"`` low-rank changes of the attention's query and value
            projections and the norm; a model may have more. What is not trained keeps every bit, and its dropout is
            off.
        max_epochs
            Passes over the training cells.
        lr
            Peak learning rate of AdamW, after warm-up and before cosine decay.
        batch_size
            Cells of a minibatch, within one category of ``batch_key``.
        validation_size, calibration_size
            Shares of the labelled cells held out, by class to choose the best epoch, and at random to calibrate
            ``reject`` of :meth:`predict`. A class with fewer than 3 cells is trained on only. The next call holds out
            the same cells, if it can; else a warning says how many of them have been trained on.
        class_weights
            ``"auto"`` weighs a class of n cells by ``n ** -0.5``, which changes nothing where labels are even.
        patience
            Stop when macro-F1 on the validation cells has not risen for this many epochs. The best epoch is kept.
        transductive
            Put all cells of the attached data into the sentences as context, labelled or not, as the original does.
            By default a training sentence holds training cells only.
        accelerator, devices
            See :class:`~lightning.pytorch.trainer.trainer.Trainer`.
        **trainer_kwargs
            To :class:`~scvi.train.Trainer`. Gradients are clipped at norm 2 unless ``gradient_clip_val`` says
            otherwise.

        Raises
        ------
        ValueError
            If the model has no data, the labels are missing, NaN, or of fewer than two classes, or an argument is not
            one of those above.
        KeyError
            If ``labels_key`` is not in ``obs``.
        DivergedError
            If a loss is not finite. The model has the last weights with a finite loss, and no labels.
        """
        defaults = trainer_defaults(trainer_kwargs.get("strategy"))
        if min(validation_size, calibration_size) < 0 or validation_size + calibration_size >= 1:
            msg = (
                f"validation_size={validation_size} and calibration_size={calibration_size} leave no cells to train "
                "on; shares of the labelled cells are needed that add up to less than 1."
            )
            raise ValueError(msg)
        if trainable not in self.module.trainable_parts():
            known = ", ".join(f'"{name}"' for name in self.module.trainable_parts())
            msg = f"trainable={trainable!r} is not known; choose one of {known}."
            raise ValueError(msg)
        labels, code = self._labels(labels_key)
        if not self.is_trained_ and trainable != "all":
            msg = (
                f"The model has neither been trained nor loaded from weights, and with trainable={trainable!r} much "
                'of it stays random. Train it first, or use trainable="all".'
            )
            warnings.warn(msg, UserWarning, stacklevel=2)
        seed = from_first(int(torch.randint(2**31, ()).item()))  # seeded as all of torch is
        split = split_cells(
            code,
            validation_size=validation_size,
            calibration_size=calibration_size,
            rng=np.random.default_rng(seed),
        )
        split = self._kept_split(split, code, [validation_size, calibration_size])
        self.annotation_ = {"labels": labels, "calibration": {}}
        if self._alike and self.is_trained_:
            width = self.module.n_hidden
            hidden = self._embed(None, split.train, None, "float32", encode=self._hidden, width=width)
            self.module.annotation.standardise(hidden)
        used, column = self._columns(self._match_of(self.adata_manager))
        cells = AnnotationCells(
            self.adata_manager,
            code,
            split,
            context=np.arange(self.adata.n_obs) if transductive else None,
            batch_size=batch_size,
            column=column,
            n_columns=len(used),
        )
        weights = np.bincount(code[split.train]) ** -0.5 if class_weights == "auto" else np.ones(len(labels))
        with only_trainable(self.module, trainable) as parts:
            plan = AnnotationPlan(
                self.module,
                parts,
                gene_index=torch.as_tensor(used),
                class_weights=torch.as_tensor(weights / weights.mean(), dtype=torch.float32),
                n_steps=max_epochs * len(cells.train_dataloader()),
                lr=lr,
            )
            defaults["gradient_clip_val"] = 2.0
            if len(split.validation):
                defaults |= {
                    "check_val_every_n_epoch": 1,
                    "early_stopping": True,
                    "early_stopping_monitor": "annotation_validation_macro_f1",
                    "early_stopping_mode": "max",
                    "early_stopping_patience": patience,
                }
            runner = TrainRunner(
                self,
                training_plan=plan,
                data_splitter=cells,
                max_epochs=max_epochs,
                accelerator=accelerator,
                devices=devices,
                **{**defaults, **trainer_kwargs},
            )
            self.module.train()  # Lightning warns otherwise; the plan then sets the mode of each part
            sizes = {"sizes": [validation_size, calibration_size]}
            self.split_ = {**self.split_, "fine_tune": sizes | noted(self.adata.obs_names, split._asdict())}
            try:
                run(self, runner, operator.or_)
            except BaseException:
                self.annotation_ = {}  # a head that has not learned would give names all the same
                raise
        self._calibrate(code, split, transductive)

    def _labels(self, labels_key: str | None) -> tuple[list[str], np.ndarray]:
        """Names of the classes, sorted, and the class of each attached cell, NO_CLASS for the unlabelled."""
        if self.adata is None:
            msg = "The model was loaded without data; load it with the data to train on."
            raise ValueError(msg)
        args = self.registry["setup_args"]
        key = labels_key if labels_key is not None else args["labels_key"]
        if key is None:
            msg = "No labels: give labels_key, here or to setup_anndata, the column of adata.obs that holds them."
            raise ValueError(msg)
        unknown = text_of(args["unlabeled_category"])
        names = read_names(
            self.adata.obs,
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
                f"Fewer than {MIN_CELLS} cells have the label {', '.join(small)}: trained on, but neither validated "
                "nor calibrated. Expect them to be missed; merge or leave out such labels."
            )
            warnings.warn(msg, UserWarning, stacklevel=3)
        warn_of_unlabeled(labels.tolist(), unknown, where=f"adata.obs[{key!r}]")
        code = pd.Index(labels).get_indexer(names)  # -1, NO_CLASS, for the unlabelled
        return labels.tolist(), code

    def _kept_split(self, drawn: Split, code: np.ndarray, sizes: list[float]) -> Split:
        """The split of the fine-tuning before, if it is one of these cells: calibration cells must not be learned."""
        state, names = self.split_.get("fine_tune", {}), self.adata.obs_names
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
    def _calibrate(self, code: np.ndarray, split: Split, transductive: bool) -> None:
        """Where the classes lie, from training and validation cells; scores of the calibration cells."""
        known = np.sort(np.concatenate([split.train, split.validation]))
        everything = slice(None)
        rows, of_rows = (None, known) if transductive else (known, everything)
        latent = self._embed(None, rows, None, "float32", encode=self._located)
        self.module.annotation.locate(latent[of_rows], code[known])
        if not len(split.calibration):
            return
        # in a sentence of their own, as a query is, or in that of the whole data
        rows, of_rows = (None, split.calibration) if transductive else (split.calibration, everything)
        logits, novelty = (scores[of_rows] for scores in self._scores(None, rows, None))
        self._annotation["calibration"] = {
            "novelty": novelty.tolist(),
            "confidence": _softmax(logits).max(axis=1).tolist(),
            "correct": (logits.argmax(axis=1) == code[split.calibration]).tolist(),
        }

    def _latent_of(self, hidden: Tensor) -> Tensor:
        """Embedding of hidden states, ``(cells, n_latent)``."""
        return self.module.latent.mean(hidden) if hasattr(self.module, "latent") else hidden

    def _located(self, chunks: Iterable[Tensor], gene_index: Tensor | None) -> Iterator[Tensor]:
        """Embedding of each chunk of one group, as :meth:`_scores` reads it."""
        return (self._latent_of(hidden) for hidden in self._hidden(chunks, gene_index))

    def _scores(
        self,
        adata: ad.AnnData | None,
        indices: Sequence[int] | Sequence[bool] | np.ndarray | None,
        batch_size: int | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits ``(cells, n_classes)`` and novelty ``(cells,)``."""
        head = self.module.annotation

        def encode(chunks: Iterable[Tensor], gene_index: Tensor | None) -> Iterator[Tensor]:
            for hidden in self._hidden(chunks, gene_index):
                novelty = head.novelty(self._latent_of(hidden))
                yield torch.cat([head(hidden), novelty[:, None]], dim=1)

        n_classes = len(self._annotation["labels"])
        scores = self._embed(adata, indices, batch_size, "float32", encode=encode, width=n_classes + 1)
        return scores[:, :n_classes], scores[:, n_classes]

    def predict(
        self,
        adata: ad.AnnData | None = None,
        indices: Sequence[int] | Sequence[bool] | np.ndarray | None = None,
        *,
        soft: bool = False,
        reject: float | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray | pd.DataFrame:
        """Name cells, or give the probabilities of the names.

        ``reject`` lets a cell be called ``unlabeled_category``, by conformal p-values [Vovk et al., 2005; Bates et
        al., Ann. Stat. 2023] and a fixed sequence of tests [Angelopoulos et al., Learn then Test, 2021], both on cells
        held out of training. Of cells that are exchangeable with these (same types in the same shares, same protocol):

        * a cell is called unknown for lying far from all types with probability at most ``reject``, over the draw of
          the calibration cells and the cell; and at nearly that rate, as some cells must be the farthest;
        * of the cells that get a name, at most a share ``reject`` has a wrong one, with 90 % confidence over the draw
          of the calibration cells, as long as cells of higher probability are wrong no more often. Where types
          overlap so much that this needs it, the least certain cells are called unknown as well, however many.

        Both hold on average over types, not for each; a rare type may be rejected more often. Other donors,
        protocols or shares of types void them, and so do, for models whose cells see each other, sentences unlike
        those of the calibration cells: if half of a sentence is of an unseen type, many known cells look strange
        too. That an unseen type lies far from the known ones is likely, not promised. A warning says so, and why, if
        far more cells are unknown than of the calibration cells.

        Parameters
        ----------
        adata
            Data to name, by default the attached. Its genes are matched by name.
        indices
            Cells to name, as numbers or a mask.
        soft
            Give probabilities.
        reject
            Between 0 and 1, see above; ``None`` names every cell.
        batch_size
            Cells in memory at a time. Never changes the result.

        Returns
        -------
        Names ``(cells,)``; with ``soft`` a frame of probabilities, a row per cell and a column per label.

        Raises
        ------
        RuntimeError
            Before :meth:`fine_tune`.
        ValueError
            If ``reject`` is not between 0 and 1, cannot be promised with so few calibration cells, or is given with
            ``soft``.
        """
        if soft and reject is not None:
            msg = (
                "soft=True gives the probabilities of all labels, reject= applies to names. Give one of them."
            )
            raise ValueError(msg)
        found = self._name_cells(adata, indices, reject=reject, batch_size=batch_size)
        if soft:
            obs_names = (self.adata if adata is None else adata).obs_names
            index = obs_names if indices is None else obs_names.to_numpy()[list(indices)]
            return pd.DataFrame(found.probability, index=index, columns=self._annotation["labels"])
        return found.names

    def _name_cells(
        self,
        adata: ad.AnnData | None,
        indices: Sequence[int] | Sequence[bool] | np.ndarray | None = None,
        *,
        reject: float | None,
        batch_size: int | None,
        guess: str = "what is given without reject",
    ) -> Names:
        """Name cells; see :meth:`predict`. ``guess`` says in a warning where the best guesses are."""
        if not self._annotation:
            msg = "The model has no labels to give: call fine_tune first, or load a fine-tuned model."
            raise RuntimeError(msg)
        limits = None if reject is None else self._limits(reject)
        logits, novelty = self._scores(adata, indices, batch_size)
        probability = _softmax(logits)
        best = np.asarray(self._annotation["labels"], dtype=object)[probability.argmax(axis=1)]
        if reject is None or limits is None:
            return Names(best, best, probability, 0, 0)
        unknown = str(self.registry["setup_args"]["unlabeled_category"])
        confidence = probability.max(axis=1)
        far, uncertain = limits.unknown(novelty, confidence)
        explain_unknown(
            self._calibration(), limits, novelty, confidence, reject=reject, unknown=unknown, guess=guess
        )
        names = np.where(far | uncertain, unknown, best).astype(object)
        return Names(names, best, probability, int(far.sum()), int(uncertain.sum()))

    def _calibration(self) -> Calibration:
        scores = self._annotation["calibration"]
        return Calibration(*(np.asarray(scores.get(name, ())) for name in Calibration._fields))

    def _limits(self, reject: float) -> Limits:
        calibration = self._calibration()
        advice = "Fine-tune with more labelled cells or a larger calibration_size"
        check_reject(reject, len(calibration.novelty), advice)
        return find_limits(*calibration, reject=reject)


def _softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).double().softmax(1).numpy()
