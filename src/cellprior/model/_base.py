"""What all pretrained models share: setup, gene matching, the embedding loop."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from inspect import signature
from itertools import chain
from typing import Any, Literal, Self, TypeAlias
from uuid import uuid4

import anndata as ad
import lightning.pytorch as pl
import numpy as np
import pandas as pd
import rich.pretty  # noqa: F401  scvi-tools 1.4.2 uses it without importing it
import torch
from mudata import MuData
from scvi import REGISTRY_KEYS
from scvi.model.base import BaseModelClass

from cellprior import genes as gene_matching
from cellprior._matrix import totals
from cellprior._obs import text_of
from cellprior.genes._kinds import which_are_genes
from cellprior.genes._table import read_vocabulary
from cellprior.model._habits import refuse_habit, told
from cellprior.model._hooks import Hooks
from cellprior.model.data._cells import Cells, Counts, cells_of_anndata, refuse_no_counts
from cellprior.model.data._counts import row_numbers
from cellprior.model.data._datamodule import StreamedCells
from cellprior.model.data._fields import manager_of, refuse_missing_key, without_view
from cellprior.model.data._fingerprint import digest
from cellprior.model.data._minibatches import VocabularyLoader, VocabularySplitter
from cellprior.model.data._panels import distinct, measured_genes, refuse_unmeasured
from cellprior.model.engine._embedding import Embedding, Encode, in_memory
from cellprior.model.engine._encoder import Encoder
from cellprior.model.engine._stream import refuse_impossible, stream
from cellprior.model.files import _loading as loading
from cellprior.model.learning import _annotation as annotation
from cellprior.model.learning import _training as training
from cellprior.model.learning._annotation_plan import AnnotationHead
from cellprior.model.learning._finite import refuse_not_finite

Data: TypeAlias = ad.AnnData | MuData
Indices: TypeAlias = Sequence[int] | Sequence[bool] | np.ndarray | None
Precision = Literal["float32", "bfloat16"]
Size = Literal["small", "released"]
MANY = 100_000  # cells, from which on a new network has the size of the released ones


class _Hinting(type(BaseModelClass)):  # type: ignore[misc]
    """Says what takes the place of a class method of scvi-tools that is missing here."""

    def __getattr__(cls, name: str) -> Any:
        refuse_habit(cls, name)
        return type.__getattribute__(cls, name)  # the error as it always is


class PretrainedModel(Hooks, BaseModelClass, metaclass=_Hinting):
    """Base of the model classes.

    A subclass gives what :class:`~cellprior.model._hooks.Hooks` lists, and an ``__init__`` that calls
    :meth:`_finish_init`; see :doc:`/user_guide/extending`.
    """

    _data_loader_cls = VocabularyLoader
    _opened: Any = None  # data that are read without having been set up
    _annotation: dict[str, Any] = {}
    # what :meth:`from_pretrained` was given, and the sha256 of all that was read: tensors, configuration, vocabulary
    pretrained_: dict[str, str] | None = None
    # numbers of the cells before any further training, if the weights say
    trained_on_: np.ndarray | None = None
    split_: dict[str, Any] = {}  # by way of training, which cells were held out
    is_trained_: bool
    history_: dict[str, Any] | None

    def __init__(
        self,
        adata: ad.AnnData | None,
        registry: dict | None,
        genes: pd.DataFrame | Sequence[str] | None,
        min_coverage: float,
    ) -> None:
        if adata is None and genes is None:
            msg = "A model without data needs its vocabulary: pass genes=."
            raise ValueError(msg)
        super().__init__(adata, registry or (self._registry_without_data(genes) if adata is None else None))
        if genes is None:
            var = self._find_cells(adata).counts["rna"].matrix.var
            gene_key = self.registry["setup_args"].get("gene_key")
            names = (var.index if gene_key is None else var[gene_key])[which_are_genes(var)]
            genes = distinct(read_vocabulary(list(names)))
        self.genes = read_vocabulary(genes)
        self.min_coverage = min_coverage
        self._matches: dict[
            str, tuple[pd.Index, Any]
        ] = {}  # of the attached data, with the names at the time

    @classmethod
    def _registry_without_data(cls, genes: pd.DataFrame | Sequence[str]) -> dict[str, Any]:
        """Registry of a model without data: setup with default arguments."""
        parameters = signature(getattr(cls, cls._setup_method)).parameters.values()
        names = read_vocabulary(genes)["symbol"].to_numpy()
        field = {"data_registry": {}, "state_registry": {"column_names": names}, "summary_stats": {}}
        return {
            "model_name": cls.__name__,
            "setup_method_name": cls._setup_method,
            "setup_args": {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY},
            "field_registries": {REGISTRY_KEYS.X_KEY: field},
        }

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if own := vars(cls).get("get_latent_representation"):
            cls.get_latent_representation = told(own)  # type: ignore[method-assign]

    def __getattr__(self, name: str) -> Any:
        refuse_habit(type(self), name)
        return object.__getattribute__(self, name)  # the error as it is, of a property too

    def _finish_init(self, init_locals: dict[str, Any]) -> None:
        """Keep what is needed to build the model again, and match the data.

        Called with ``locals()`` in a subclass's ``__init__``, after that of the base and before the network is made:
        :meth:`_network` gives the network's arguments from then on.
        """
        vocabulary = {"genes": self.genes} | ({} if self.peaks is None else {"peaks": self.peaks})
        self.init_params_ = self._get_init_params({**init_locals, **vocabulary})
        self.init_params_["non_kwargs"] |= self._sized(**self.init_params_["non_kwargs"])
        sizes = ", ".join(f"{len(names):,} {what}" for what, names in vocabulary.items())
        network = ", ".join(f"{name}={value!r}" for name, value in self._network().items())
        self._model_summary_string = f"{type(self).__name__}: {sizes}, {network}"
        if self.adata is not None:
            self._cells()

    def _sized(self, *, size: Size | None = None, **given: Any) -> dict[str, Any]:
        """Widths and layers that are not given.

        Those of ``size``; without it, those of the released weights if any other is given, or if there are many cells.
        A network that is loaded has been given all.

        Raises ValueError if there is no such size.
        """
        if size is not None and size not in self.sizes:
            msg = f"size={size!r} is not known; choose one of {', '.join(map(repr, self.sizes))}."
            raise ValueError(msg)
        missing = [name for name in self.sizes.get("released", {}) if given.get(name) is None]
        if not missing:
            return {}
        if size is None:
            few = self.adata is not None and self.adata.n_obs < MANY
            size = "small" if few and len(missing) == len(self.sizes["released"]) else "released"
        return {name: self.sizes[size][name] for name in missing}

    def _network(self) -> dict[str, Any]:
        """Arguments of the network.

        Raises NotImplementedError if ``__init__`` has not kept them.
        """
        if not hasattr(self, "init_params_"):
            msg = (
                f"{type(self).__name__}.__init__ does not call self._finish_init(locals()): without it the model "
                "cannot be built again. It comes after that of the base, and before the network is made."
            )
            raise NotImplementedError(msg)
        params = self.init_params_["non_kwargs"]
        others = ("genes", "peaks", "min_coverage", "size")
        return {name: value for name, value in params.items() if name not in others}

    @classmethod
    def setup_anndata(
        cls,
        adata: ad.AnnData,
        *,
        layer: str | None = None,
        gene_key: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        unlabeled_category: str = "unknown",
        **kwargs: Any,
    ) -> None:
        """Register an AnnData.

        Parameters
        ----------
        adata
            Annotated data ``(cells, genes)``; not a view.
        <layer>
        gene_key
            Column of ``var`` with gene symbols or Ensembl ids; by default the place that matches best.
        batch_key
            Column of ``obs`` with the batch of each cell.
        labels_key
            Column of ``obs`` with cell-type labels, for annotation.
        unlabeled_category
            Label that stands for "not labelled".

        Raises
        ------
        NotCountsError
            If the first cells do not hold raw counts.
        ValueError
            If there is no cell, no gene, no such layer, or ``adata`` is a view.
        KeyError
            If a column of ``obs`` is missing.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        cls.register_manager(cls._manager(adata, setup_method_args, **kwargs))

    _manager = staticmethod(manager_of)

    def get_latent_representation(
        self,
        adata: ad.AnnData | None = None,
        indices: Indices = None,
        batch_size: int | None = None,
        *,
        precision: Precision = "float32",
    ) -> np.ndarray:
        """Embed cells.

        Parameters
        ----------
        <embedded>
        batch_size
            Cells in memory at a time, at least 16; by default what fits a quarter of a GPU's free memory, and 1,024 on
            a CPU. Bounds the memory and never changes the result.
        <precision>

        Returns
        -------
        Float32 array ``(n_cells, n_latent)``.

        Raises
        ------
        <not_embedded>
        """
        return self._embed(adata, indices, batch_size, precision)

    # weights, see cellprior.model.files

    @classmethod
    def from_pretrained(
        cls,
        weights: str | os.PathLike[str],
        adata: Any = None,
        *,
        min_coverage: float = 0.25,
        device: str | int | torch.device = "auto",
        known_hash: str | None = None,
    ) -> Self:
        """Load pretrained weights, and attach data.

        Parameters
        ----------
        weights
            Registry name (see :func:`cellprior.weights.available`), folder written by :meth:`save_pretrained`,
            official checkpoint file, or address of one (then ``known_hash`` is needed).
        adata
            Data to attach: an AnnData, for MultiomeCLIP a MuData. Set up like the data it is a copy or part of, or
            with default arguments, if it has not been set up itself. Needed to train on only.
        min_coverage
            Least share of genes that must match, see :func:`cellprior.genes.match`.
        device
            ``"auto"`` is the first GPU if there is one, else the CPU.
        known_hash
            sha256 of the file, or of the whole folder, see :func:`cellprior.weights.sha256`.

        Raises
        ------
        WeightsError
            If the weights are not found, damaged, or another model's.
        GeneMatchError
            If too few genes match.
        """
        options: dict[str, Any] = {"min_coverage": min_coverage, "device": device, "known_hash": known_hash}
        found: Self = loading.from_pretrained(cls, weights, adata, **options)
        return found

    @classmethod
    def opened(
        cls,
        weights: str | os.PathLike[str],
        adata: ad.AnnData,
        *,
        layer: str | Mapping[str, str | None] | None = None,
        gene_key: str | None = None,
        batch_key: str | None = None,
        unlabeled_category: str = "unknown",
        modalities: Mapping[str, str] | None = None,
        min_coverage: float = 0.25,
        device: str | int | torch.device = "auto",
        known_hash: str | None = None,
        setup: Mapping[str, Any] | None = None,
    ) -> AbstractContextManager[Self]:
        """A model that embeds some data, for a while; then both are let go. See :func:`cellprior.tl.embed`.

        Raises
        ------
        ValueError
            If the model does not read data of this kind.
        """
        where = {"gene_key": gene_key, "batch_key": batch_key, "unlabeled_category": unlabeled_category}
        options: dict[str, Any] = {"min_coverage": min_coverage, "device": device, "known_hash": known_hash}
        return loading.opened(
            cls, weights, adata, layer=layer, modalities=modalities, where=where, setup=setup or {}, **options
        )

    @staticmethod
    def _layers_on_disk(
        layer: str | Mapping[str, str | None] | None, modalities: Mapping[str, str] | None
    ) -> str | Mapping[str, str | None] | None:
        """Layer as :func:`cellprior.model.data._files.open_counts` takes it."""
        return layer

    _read_weights = classmethod(loading.read_weights)

    @classmethod
    def load(cls, dir_path: str, adata: ad.AnnData | None = None, *args: Any, **kwargs: Any) -> Self:
        """Load a model saved with ``save``; see :meth:`scvi.model.base.BaseModelClass.load`."""
        with warnings.catch_warnings():
            # scvi-tools warns of genes in another order; here they are matched by name
            warnings.filterwarnings("ignore", message="`var_names` for the loaded", category=UserWarning)
            # mudata has renamed what scvi-tools 1.4.2 calls
            warnings.filterwarnings("ignore", message="The method mod_names is deprecated")
            return super().load(dir_path, adata, *args, **kwargs)

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, card: str | None = None, overwrite: bool = False
    ) -> None:
        """Write the weights as a bundle that :meth:`from_pretrained` loads, without any of the data.

        Parameters
        ----------
        folder
            Where to write ``model.safetensors``, ``config.json``, ``genes.tsv`` (``peaks.tsv``) and ``README.md``.
        card
            Markdown for ``README.md``: what the weights were trained on, how good they are, and their licence.
        overwrite
            Replace a bundle that is already there.
        """
        loading.save_pretrained(self, folder, card=card, overwrite=overwrite)

    def save(self, dir_path: str, *args: Any, **kwargs: Any) -> None:
        """Write the model, to be loaded with ``load``; see :meth:`scvi.model.base.BaseModelClass.save`."""
        refuse_not_finite(self.module)
        super().save(dir_path, *args, **kwargs)

    def _check_if_trained(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to embed without training, and with weights that are not finite."""
        super()._check_if_trained(*args, **kwargs)
        refuse_not_finite(self.module)

    def release(self) -> None:
        """Let go of the attached data; scvi-tools otherwise holds it for as long as the process runs."""
        if self.adata is not None:
            type(self)._setup_adata_manager_store.pop(self.adata.uns["_scvi_uuid"], None)
        type(self)._per_instance_manager_store.pop(self.id, None)

    def provenance(self, adata: ad.AnnData | None = None) -> dict[str, Any]:
        """Which weights the model has, and how much of some data, by default the attached, it reads; for the record."""
        return loading.provenance(self, adata)

    # learning, see cellprior.model.learning

    def train(
        self,
        max_epochs: int | None = None,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        batch_size: int | None = None,
        early_stopping: bool = False,
        plan_kwargs: dict[str, Any] | None = None,
        datasplitter_kwargs: dict[str, Any] | None = None,
        *,
        objective: str | None = None,
        measured: Mapping[str, Sequence[str]] | None = None,
        datamodule: pl.LightningDataModule | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Train on the attached data without labels, from where the weights are.

        ``history`` gets, per epoch, ``train_loss`` and ``validation_loss``, their parts, and beside a part its floor,
        ``<part>_floor_<predictor>``: what a predictor that knows no biology reaches on the same cells. A warning says
        if the model ends above one. See :func:`cellprior.pl.training`.

        Parameters
        ----------
        max_epochs
            Passes over the training cells. By default 100 for up to 20,000 cells, and fewer for more, so that as many
            cells are seen; 10 at least.
        <trainer>
        train_size, validation_size, shuffle_set_split
            Split of the cells, see :class:`~scvi.dataloaders.DataSplitter`; by default 90 % are trained on. It is
            kept with the weights: of the same cells, the next call holds out the same, unless another split is asked
            for, and a warning says if cells that were trained on are held out.
        batch_size
            Cells of a minibatch, within one category of ``batch_key``; of each process, where several train. By
            default a sixteenth of the training cells, as a power of two from 32 to 512.
        early_stopping
            Stop when ``validation_loss`` has not fallen for 45 epochs, see :class:`~scvi.train.Trainer`.
        plan_kwargs
            ``lr``, ``weight_decay``, ``schedule``, ``warmup``, and arguments of the objective, see
            :class:`~cellprior.model.learning._training.TrainingPlan`.
        datasplitter_kwargs
            To :class:`~scvi.dataloaders.DataSplitter`.
        objective
            What is learned, one of the model's ``objectives``; by default the first.
        measured
            For panels that differ between batches: the genes measured in each category of ``batch_key``, as names of
            the data, symbols or Ensembl ids. The counts of the others must be 0 there, and do not count in the loss.
            By default all genes of the data were measured everywhere.
        datamodule
            Train on its cells instead of the attached, read from disk as they are needed: an
            :class:`scvi.dataloaders.AnnbatchDataModule`, see :doc:`/user_guide/scale`. Its minibatches do not keep to
            one batch, and its order does not follow ``scvi.settings.seed``.
        **trainer_kwargs
            To :class:`~scvi.train.Trainer`. ``gradient_clip_val`` is 2 unless given. ``enable_checkpointing=True``
            saves the model of the epoch with the lowest ``validation_loss``; to end with it,
            ``callbacks=[scvi.train.SaveCheckpoint(load_best_on_end=True)]``. ``strategy="ddp"`` trains in several
            processes, see :doc:`/user_guide/scale`.

        Raises
        ------
        ValueError
            If the model has no data, ``objective`` is not known, or an unmeasured gene has counts.
        NotImplementedError
            If the model does not say what it learns.
        RuntimeError
            If several processes have no seed to begin alike.
        KeyError
            If ``measured`` lacks a batch, or names a gene that neither the data nor the vocabulary have.
        <diverged>
        """
        split: dict[str, Any] = {"train_size": train_size, "validation_size": validation_size}
        split |= {"shuffle_set_split": shuffle_set_split, "batch_size": batch_size}
        training.train(
            self,
            max_epochs=max_epochs,
            accelerator=accelerator,
            devices=devices,
            split=split,
            early_stopping=early_stopping,
            plan_kwargs=plan_kwargs,
            datasplitter_kwargs=datasplitter_kwargs,
            objective=objective,
            measured=measured,
            datamodule=datamodule,
            **trainer_kwargs,
        )

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
        <trainer>
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
        annotation.fine_tune(
            self,
            labels_key,
            trainable=trainable,
            max_epochs=max_epochs,
            lr=lr,
            batch_size=batch_size,
            validation_size=validation_size,
            calibration_size=calibration_size,
            class_weights=class_weights,
            patience=patience,
            transductive=transductive,
            accelerator=accelerator,
            devices=devices,
            **trainer_kwargs,
        )

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

        * a cell is called unknown for lying far from all types with probability at most ``reject``, and at nearly that
          rate, as some cells must be the farthest;
        * of the cells that get a name, at most a share ``reject`` has a wrong one, with 90 % confidence over the draw
          of the calibration cells, as long as cells of higher probability are wrong no more often. Where types
          overlap so much that this needs it, the least certain cells are called unknown as well, however many.

        Both hold on average over types, not for each. Other donors, protocols or shares of types void them, and so do,
        for models whose cells see each other, sentences unlike those of the calibration cells. A warning says so, and
        why, if far more cells are unknown than of these. See :doc:`/user_guide/annotation`.

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
        found = annotation.name_cells(self, adata, indices, reject=reject, batch_size=batch_size)
        if soft:
            obs_names = (self.adata if adata is None else adata).obs_names
            index = obs_names if indices is None else obs_names.to_numpy()[list(indices)]
            return pd.DataFrame(found.probability, index=index, columns=self.annotation_["labels"])
        return found.names

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

    # what is trained on

    def _attached_cells(
        self, measured: Mapping[str, Sequence[str]] | None, **options: Any
    ) -> tuple[VocabularySplitter, np.ndarray]:
        """The attached cells, split, and which genes were measured; refuses counts of genes that were not."""
        attached = self._cells()
        match = attached.counts["rna"].match
        seen = measured_genes(measured, self.genes, match, attached)
        options |= {"column": match.index, "n_columns": len(self.genes)}
        cells = self._data_splitter_cls(self.adata_manager, by_batch=True, dense=True, **options)
        cells.setup()
        if measured is not None:
            for batch in chain(cells.train_dataloader(), cells.val_dataloader()):
                known = seen[int(batch[REGISTRY_KEYS.BATCH_KEY][0])]
                refuse_unmeasured(batch[REGISTRY_KEYS.X_KEY].numpy(), known, self.genes)
        return cells, seen

    def _streamed_cells(
        self, datamodule: pl.LightningDataModule, **split: Any
    ) -> tuple[StreamedCells, np.ndarray]:
        """The cells of a datamodule, and which genes were measured."""
        cells = StreamedCells(datamodule, self.genes, self.min_coverage, **split)
        return cells, measured_genes(None, self.genes, cells.match)

    # reading

    def _embed(
        self,
        adata: Data | Cells | None,
        indices: Indices,
        batch_size: int | None,
        precision: Precision = "float32",
        *,
        encode: Encode | None = None,
        width: int | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Embed cells into memory, or what ``encode`` makes of them; ``options`` are those of the encoder."""
        self._check_if_trained(warn=False)
        cells = self._cells(adata)
        how: dict[str, Any] = {
            "batch_size": batch_size,
            "precision": precision,
            "encode": encode,
            "width": width,
        }
        rows = row_numbers(indices, cells.n_obs)
        return in_memory(Embedding(self._encoder(cells, **options), cells, rows, **how))

    def _embedding(self, **options: Any) -> Embedding:
        """All attached cells, to be embedded."""
        self._check_if_trained(warn=False)
        cells = self._cells()
        return Embedding(self._encoder(cells), cells, np.arange(cells.n_obs), **options)

    def _stream(
        self,
        out: str | os.PathLike[str],
        *,
        params: Mapping[str, Any],
        record: Mapping[str, Any] | None = None,
        hidden: str | os.PathLike[str] = "memory",
        client: Any = None,
        **options: Any,
    ) -> None:
        """Embed all attached cells into a zarr folder; see :func:`cellprior.model.engine._stream.stream`."""
        sees_others = self._encoder_cls.sees_others
        refuse_impossible(type(self).__name__, sees_others=sees_others, hidden=hidden, client=client)
        options |= {"hidden": hidden, "client": client, "weights": self._digest()}
        record = {**(record or self.provenance()), "params": params}
        stream(self._embedding, self._cells(), out, record=record, **options)

    def _digest(self) -> str:
        """Digest of all that can change the embedding of a cell."""
        state = sorted(self.module.state_dict().items())
        described = [type(self).__name__, self._network(), self.training_state_]
        return digest(
            [json.dumps(described, sort_keys=True, default=str), (self.pretrained_ or {}).get("sha256")],
            self.genes.to_numpy().ravel(),
            self.peaks or [],
            [name for name, _ in state],
            *(tensor.float().cpu().numpy() for _, tensor in state),
        )

    def _encoder(self, cells: Cells, **options: Any) -> Encoder:
        """What makes latents of some cells."""
        match = next(iter(cells.counts.values())).match
        used = np.unique(match.index[match.index >= 0])
        gene_index = None if len(used) == len(self.genes) else used
        return self._encoder_cls(self.module, gene_index, self.default_batch_size, options)

    def _cells(self, adata: Data | Cells | None = None) -> Cells:
        """Some cells, by default the attached, and where their counts are, in the order of the vocabulary.

        What was found once can be given in the place of the data.

        Raises GeneMatchError if too few genes match.
        """
        if isinstance(adata, Cells):
            return adata
        data = next((found for found in (adata, self._opened, self.adata) if found is not None), None)
        if data is None:
            msg = "The model was loaded without data: pass adata=."
            raise ValueError(msg)
        cells, attached = self._find_cells(data), data is self.adata or data is self._opened
        names = {name: counts.matrix.var.index for name, counts in cells.counts.items()}
        same = self._matches.keys() == names.keys() and all(
            names[name].equals(known) for name, (known, _) in self._matches.items()
        )
        matches = {name: found for name, (_, found) in self._matches.items()}
        if not attached or not same:
            matches = {name: self._match(name, cells) for name in cells.counts}
        if attached:
            self._matches = {name: (names[name], match) for name, match in matches.items()}
        return replace(cells, counts={n: self._in_order(c, matches[n]) for n, c in cells.counts.items()})

    def _find_cells(self, data: Any) -> Cells:
        """Cells of some data, not matched yet."""
        args = self.registry["setup_args"]
        if data is not self.adata:
            data = without_view(data)
            refuse_missing_key(data, args)
            refuse_no_counts(data, args["layer"])
            return cells_of_anndata(data, args)
        self._validate_anndata(data)  # as at the setup, if another model has set it up since
        cells = cells_of_anndata(data, {**args, "batch_key": None})
        if args["batch_key"] is None:
            return cells
        codes = self.adata_manager.get_from_registry(REGISTRY_KEYS.BATCH_KEY).ravel()  # as at the setup
        names = self.adata_manager.get_state_registry(REGISTRY_KEYS.BATCH_KEY).categorical_mapping
        return replace(cells, batch=codes, batches=[text_of(name) for name in names])

    @property
    def gene_match(self) -> gene_matching.GeneMatch | None:
        """Which genes of the attached data the model reads; None without data."""
        return self._matches["rna"][1] if "rna" in self._matches else None

    def _match(self, modality: str, cells: Cells) -> Any:
        """Match the features of some cells to the vocabulary."""
        counts = cells.counts[modality].matrix
        return gene_matching.match(
            counts.var,
            self.genes,
            gene_key=self.registry["setup_args"].get("gene_key"),
            gene_counts=totals(counts),
            min_coverage=self.min_coverage,
            species=self._species_of_genes,
        )

    def _in_order(self, counts: Counts, match: Any) -> Counts:
        """Counts of the features that data and vocabulary share, in the order of the vocabulary."""
        known = match.index >= 0
        used, position = np.unique(match.index[known], return_inverse=True)
        column = np.full(len(match.index), -1, dtype=np.int32)
        column[known] = position
        return counts.matched(match, column, len(used))

    def _match_of(self, adata: Data | None = None) -> gene_matching.GeneMatch:
        """Genes of a query, or of the attached data, matched already unless they have changed since."""
        return self._cells(adata).counts["rna"].match

    def _known_genes(self, adata: Data | None) -> tuple[np.ndarray, pd.Index]:
        """Vocabulary rows and names of the genes of the data that are in the vocabulary."""
        match = self._match_of(adata)
        known = match.index >= 0
        return match.index[known], match.var_names[known]

    def _validate_anndata(self, adata: ad.AnnData | None = None, copy_if_view: bool = True) -> ad.AnnData:
        """Of data that take the place of the attached, genes, batches and labels may differ."""
        if adata is None or adata is self.adata:
            return super()._validate_anndata(adata, copy_if_view)
        adata = without_view(adata)
        if self.adata is not None and adata.uns.get("_scvi_uuid") == self.adata.uns["_scvi_uuid"]:
            adata.uns["_scvi_uuid"] = str(uuid4())  # a copy of the attached data
        setup_method_args = {
            key: self.registry[key] for key in ("model_name", "setup_method_name", "setup_args")
        }
        manager = self._manager(
            adata, setup_method_args, source_registry=self.registry, extend_categories=True
        )
        self._register_manager_for_instance(manager)
        return adata
