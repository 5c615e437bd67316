"""What all pretrained models share: setup, weights, gene matching, the embedding loop, saving."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self
from uuid import uuid4

import anndata as ad
import numpy as np
import pandas as pd
import rich.pretty  # noqa: F401  scvi-tools 1.4.2 uses it without importing it
import scipy.sparse as sp
import torch
from scvi import REGISTRY_KEYS
from scvi.data.fields import CategoricalObsField
from scvi.train import TrainRunner
from torch import Tensor

from cellprior import genes as gene_matching
from cellprior.genes._table import read_vocabulary
from cellprior.model._annotation import AnnotatingModel
from cellprior.model._data import CountsField, CountsManager, VocabularyLoader, VocabularySplitter
from cellprior.model._training import GeneMeans, TrainingPlan, warn_above_floor
from cellprior.weights import Bundle, WeightsError, read_bundle, resolve, sha256, write_bundle

logger = logging.getLogger(__name__)

Precision = Literal["float32", "bfloat16"]
MIN_CHUNK = (
    16  # products of one to three rows go through other kernels, which round differently in the fifth digit
)


class PretrainedModel(AnnotatingModel):
    """Base of the model classes.

    A subclass gives ``_module_cls``, ``obsm_key``, an ``__init__`` that ends in :meth:`_finish_init`, and, for
    checkpoints in its authors' layout, :meth:`_read_official`. A model whose cells see each other also gives
    :meth:`_groups` and :meth:`_encode`.
    """

    _data_loader_cls = VocabularyLoader
    obsm_key: str
    default_batch_size = 1024

    def __init__(
        self,
        adata: ad.AnnData | None,
        registry: dict | None,
        genes: pd.DataFrame | Sequence[str] | None,
        min_coverage: float,
    ) -> None:
        super().__init__(adata, registry)
        gene_key = self.registry["setup_args"]["gene_key"]
        if genes is None:
            if adata is None:
                msg = "A model without data needs its vocabulary: pass genes=."
                raise ValueError(msg)
            genes = list(adata.var_names if gene_key is None else adata.var[gene_key])
        self.genes = read_vocabulary(genes)
        self.min_coverage = min_coverage
        self.pretrained_: dict[str, str] | None = None
        self.gene_match: gene_matching.GeneMatch | None = (
            None if adata is None else self._match(self.adata_manager)
        )

    def _finish_init(self, init_locals: dict[str, Any]) -> None:
        """Last line of a subclass's ``__init__``: keep what is needed to build the model again."""
        self.init_params_ = self._get_init_params({**init_locals, "genes": self.genes})
        self._model_summary_string = f"{type(self).__name__}: {len(self.genes):,} genes, " + ", ".join(
            f"{name}={value!r}" for name, value in self._network().items()
        )

    def _network(self) -> dict[str, Any]:
        """Arguments of the network."""
        params = self.init_params_["non_kwargs"]
        return {name: value for name, value in params.items() if name not in ("genes", "min_coverage")}

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
        layer
            Layer with raw counts; ``None`` for ``X``.
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

    @staticmethod
    def _manager(adata: ad.AnnData, setup_method_args: dict[str, Any], **kwargs: Any) -> CountsManager:
        """Manager of an AnnData, or of a query, for which ``source_registry`` is given."""
        args = setup_method_args["setup_args"]
        if args["gene_key"] is not None and args["gene_key"] not in adata.var:
            msg = f"{args['gene_key']!r} not found in adata.var; its columns are {list(adata.var.columns)}."
            raise KeyError(msg)
        fields: list[Any] = [CountsField(REGISTRY_KEYS.X_KEY, args["layer"])]
        if args["batch_key"] is not None:
            fields.append(CategoricalObsField(REGISTRY_KEYS.BATCH_KEY, args["batch_key"]))
        # labels are no field: they are read when they are learned, and a query need not have them
        if args["labels_key"] not in (None, *adata.obs) and "source_registry" not in kwargs:
            msg = f"{args['labels_key']} not found in adata.obs."
            raise KeyError(msg)
        manager = CountsManager(fields=fields, setup_method_args=setup_method_args)
        manager.register_fields(adata, **kwargs)
        return manager

    @classmethod
    def from_pretrained(
        cls,
        weights: str | os.PathLike[str],
        adata: ad.AnnData,
        *,
        min_coverage: float = 0.25,
        device: str | int | torch.device = "auto",
        known_hash: str | None = None,
    ) -> Self:
        """Load pretrained weights and attach data.

        Parameters
        ----------
        weights
            Registry name (see :func:`cellprior.weights.available`), folder written by :meth:`save_pretrained`,
            official checkpoint file, or address of one (then ``known_hash`` is needed).
        adata
            Data to attach. Set up like the data it is a copy or part of, or with default arguments, if it has not
            been set up itself.
        min_coverage
            Least share of genes that must match, see :func:`cellprior.genes.match`.
        device
            ``"auto"`` is the first GPU if there is one, else the CPU.
        known_hash
            sha256 of the file.

        Raises
        ------
        WeightsError
            If the weights are not found, damaged, or another model's.
        GeneMatchError
            If too few genes match.
        """
        path = resolve(weights, known_hash=known_hash)
        bundle, hashed = cls._read_weights(path)
        adata = without_view(adata)
        known = cls._setup_adata_manager_store.get(adata.uns.get("_scvi_uuid"))
        if known is None:
            cls.setup_anndata(adata)
        elif known.adata is not adata:  # a copy, or a part, of data that have been set up
            adata.uns["_scvi_uuid"] = str(uuid4())
            cls.setup_anndata(adata, **known.registry["setup_args"])
        with torch.random.fork_rng(devices=[]):  # what the network starts from is overwritten
            model = cls(adata, genes=bundle.genes, min_coverage=min_coverage, **bundle.config["network"])
        model.annotation_ = bundle.config.get("annotation", {})
        load_strictly(model.module, bundle.state_dict, str(weights))
        model.pretrained_ = {"weights": str(weights), "sha256": sha256(hashed)}
        model.training_state_ = bundle.config.get("training_state", {})
        model.is_trained_ = True
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model.to_device(device)
        model.module.eval()
        return model

    @classmethod
    def load(cls, dir_path: str, adata: ad.AnnData | None = None, *args: Any, **kwargs: Any) -> Self:
        """Load a model saved with ``save``; see :meth:`scvi.model.base.BaseModelClass.load`."""
        with warnings.catch_warnings():
            # scvi-tools warns of genes in another order; here they are matched by name
            warnings.filterwarnings("ignore", message="`var_names` for the loaded", category=UserWarning)
            return super().load(dir_path, adata, *args, **kwargs)

    @classmethod
    def _read_weights(cls, path: Path) -> tuple[Bundle, Path]:
        """Contents of a bundle or an official checkpoint, and the file or folder that stands for it in a hash."""
        if not (path / "config.json").is_file():
            return cls._read_official(path)
        bundle = read_bundle(path)
        if bundle.config["model"] != cls.__name__:
            msg = f"{path} holds a {bundle.config['model']}: load it with cellprior.model.{bundle.config['model']}."
            raise WeightsError(msg)
        return bundle, path

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether a file or folder holds an official checkpoint of this model."""
        return False

    @classmethod
    def _read_official(cls, path: Path) -> tuple[Bundle, Path]:
        msg = f"{path} is not a {cls.__name__} bundle: a folder with config.json and model.safetensors is needed."
        raise WeightsError(msg)

    def train(
        self,
        max_epochs: int = 100,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        batch_size: int = 512,
        early_stopping: bool = False,
        plan_kwargs: dict[str, Any] | None = None,
        datasplitter_kwargs: dict[str, Any] | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Train on the attached data with the model's self-supervised objective, from where the weights are.

        ``history`` gets, per epoch, ``train_loss`` and ``validation_loss``, their parts, and the ``floor`` of each:
        what a predictor that knows only each gene's mean reaches on the same cells. A warning says if the model ends
        above it.

        Parameters
        ----------
        max_epochs
            Passes over the training cells.
        accelerator, devices
            See :class:`~lightning.pytorch.trainer.trainer.Trainer`.
        train_size, validation_size, shuffle_set_split
            Split of the cells, see :class:`~scvi.dataloaders.DataSplitter`; by default 90 % are trained on.
        batch_size
            Cells of a minibatch, within one category of ``batch_key``.
        early_stopping
            Stop when ``validation_loss`` has not fallen for 45 epochs, see :class:`~scvi.train.Trainer`.
        plan_kwargs
            ``lr``, ``weight_decay``, ``warmup``, and arguments of the objective, see
            :class:`~cellprior.model._training.TrainingPlan`.
        datasplitter_kwargs
            To :class:`~scvi.dataloaders.DataSplitter`.
        **trainer_kwargs
            To :class:`~scvi.train.Trainer`. ``gradient_clip_val`` is 2 unless given.

        Raises
        ------
        ValueError
            If the model has no data.
        """
        if self.adata is None or self.gene_match is None:
            msg = "The model was loaded without data; load it with the data to train on."
            raise ValueError(msg)
        splitter = VocabularySplitter(
            self.adata_manager,
            train_size=train_size,
            validation_size=validation_size,
            shuffle_set_split=shuffle_set_split,
            batch_size=batch_size,
            column=self.gene_match.index,
            n_columns=len(self.genes),
            by_batch=True,
            dense=True,
            **(datasplitter_kwargs or {}),
        )
        splitter.setup()
        loader = splitter.train_dataloader()
        index = self.gene_match.index
        plan = TrainingPlan(
            self.module,
            GeneMeans.fit(loader),
            measured=torch.from_numpy(np.unique(index[index >= 0])),
            n_steps=max_epochs * len(loader),
            **(plan_kwargs or {}),
        )
        defaults: dict[str, Any] = {"gradient_clip_val": 2.0, "early_stopping_monitor": "validation_loss"}
        if splitter.n_val:
            defaults["check_val_every_n_epoch"] = 1
        runner = TrainRunner(
            self,
            training_plan=plan,
            data_splitter=splitter,
            max_epochs=max_epochs,
            accelerator=accelerator,
            devices=devices,
            early_stopping=early_stopping,
            **{**defaults, **trainer_kwargs},
        )
        self.module.train()  # loaded weights are in eval mode, and Lightning leaves them there
        was_trained = self.is_trained_
        self.is_trained_ = "train_loss" in (
            self.history_ or {}
        )  # scvi-tools appends only to columns that are there
        try:
            runner()
        finally:
            self.is_trained_ |= was_trained
        warn_above_floor(self.history)

    @property
    def training_state_(self) -> dict[str, Any]:
        """What training needs besides the tensors to go on where it stopped; saved with the model."""
        return {}

    @training_state_.setter
    def training_state_(self, state: dict[str, Any]) -> None:
        pass

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, card: str | None = None, overwrite: bool = False
    ) -> None:
        """Write the weights as a bundle that :meth:`from_pretrained` loads, without any of the data.

        Parameters
        ----------
        folder
            Where to write ``model.safetensors``, ``config.json``, ``genes.tsv`` and ``README.md``.
        card
            Markdown for ``README.md``: what the weights were trained on, how good they are, and their licence.
        overwrite
            Replace a bundle that is already there.
        """
        if card is None:
            origin = f" Loaded from {self.pretrained_['weights']}." if self.pretrained_ else ""
            card = (
                f"# {type(self).__name__}\n\n{self._model_summary_string}.{origin}\n\nNo card was written.\n"
            )
        write_bundle(
            folder,
            state_dict=self.module.state_dict(),
            config={
                "model": type(self).__name__,
                "network": self._network(),
                "training_state": self.training_state_,
                "annotation": self.annotation_,
            },
            genes=self.genes,
            card=card,
            overwrite=overwrite,
        )

    def get_latent_representation(
        self,
        adata: ad.AnnData | None = None,
        indices: Sequence[int] | Sequence[bool] | np.ndarray | None = None,
        batch_size: int | None = None,
        *,
        precision: Precision = "float32",
    ) -> np.ndarray:
        """Embed cells.

        Parameters
        ----------
        adata
            Data to embed, by default the attached. Its genes are matched by name; it is not kept.
        indices
            Cells to embed, as numbers or a mask; the result is in this order.
        batch_size
            Cells in memory at a time, at least 16. Bounds the memory and never changes the result.
        precision
            ``"bfloat16"`` computes the large products in half the bits, several times faster on recent hardware.

        Returns
        -------
        Float32 array ``(n_cells, n_latent)``.

        Raises
        ------
        RuntimeError
            If the model has neither been trained nor loaded from weights.
        NotCountsError, GeneMatchError
            If the data are not raw counts, or too few of their genes are known.
        """
        return self._embed(adata, indices, batch_size, precision)

    @torch.inference_mode()
    def _embed(
        self,
        adata: ad.AnnData | None,
        indices: Sequence[int] | Sequence[bool] | np.ndarray | None,
        batch_size: int | None,
        precision: Precision,
        *,
        encode: Callable[..., Iterable[Tensor]] | None = None,
        width: int | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Embedding loop; ``options`` go to :meth:`_encode`, or to what gives ``width`` columns instead."""
        self._check_if_trained(warn=False)
        if precision not in ("float32", "bfloat16"):
            msg = f'precision={precision!r} is not known; choose "float32" or "bfloat16".'
            raise ValueError(msg)
        batch_size = self.default_batch_size if batch_size is None else batch_size
        if batch_size < 1:
            msg = f"batch_size={batch_size}; at least one cell at a time is needed."
            raise ValueError(msg)
        batch_size = max(batch_size, MIN_CHUNK)
        self.module.eval()
        with self._attached(adata) as manager:
            rows = row_numbers(indices, manager.adata.n_obs)
            match = self._match_of(manager)
            used, column = self._columns(match)
            whole = len(used) == len(self.genes)  # then the columns are the vocabulary, in order
            gene_index = None if whole else torch.as_tensor(used, device=self.module.device)
            latent = np.empty((len(rows), width or self.module.n_latent), dtype=np.float32)
            for group in self._groups(manager, rows):
                loader = self._data_loader_cls(
                    manager,
                    indices=rows[group],
                    batch_size=batch_size,
                    data_and_attributes=[REGISTRY_KEYS.X_KEY],
                    column=column,
                    n_columns=len(used),
                )
                with torch.autocast(self.module.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                    start = 0
                    for z in (encode or self._encode)(self._counts(loader), gene_index, **options):
                        latent[group[start : start + len(z)]] = z.float().cpu().numpy()
                        start += len(z)
        return latent

    @staticmethod
    def _columns(match: gene_matching.GeneMatch) -> tuple[np.ndarray, np.ndarray]:
        """Vocabulary rows that the data have, increasing, and which of them each column of the data is, -1 for none."""
        used, position = np.unique(match.index[match.index >= 0], return_inverse=True)
        column = np.full(len(match.index), -1, dtype=np.int32)
        column[match.index >= 0] = position
        return used, column

    def _groups(self, manager: CountsManager, rows: np.ndarray) -> Iterable[np.ndarray]:
        """Positions in ``rows`` of the cells that are encoded together: all, where cells do not see each other."""
        return [np.arange(len(rows))]

    def _encode(
        self, chunks: Iterable[Tensor], gene_index: Tensor | None, **options: Any
    ) -> Iterator[Tensor]:
        """Latents ``(cells, n_latent)`` of each chunk of one group."""
        return (self.module.encode(counts, gene_index=gene_index, **options) for counts in chunks)

    def _hidden(self, chunks: Iterable[Tensor], gene_index: Tensor | None) -> Iterable[Tensor]:
        """Hidden states ``(cells, n_hidden)`` of each chunk of one group, what the annotation head reads."""
        return (self.module.hidden(counts, gene_index=gene_index) for counts in chunks)

    def _counts(self, loader: VocabularyLoader) -> Iterator[Tensor]:
        device = self.module.device
        for batch in loader:
            counts = batch[REGISTRY_KEYS.X_KEY]
            # Apple's GPUs have no sparse tensors
            yield counts.to_dense().to(device) if device.type == "mps" else counts.to(device)

    def _match(self, manager: CountsManager) -> gene_matching.GeneMatch:
        """Match the genes of an AnnData to the vocabulary."""
        x = manager.get_from_registry(REGISTRY_KEYS.X_KEY)
        in_memory = isinstance(x, np.ndarray) or sp.issparse(
            x
        )  # elsewhere the totals would cost a pass over the file
        return gene_matching.match(
            manager.adata.var,
            self.genes,
            gene_key=manager.registry["setup_args"]["gene_key"],
            gene_counts=np.asarray(x.sum(axis=0), dtype=np.float64).ravel() if in_memory else None,
            min_coverage=self.min_coverage,
        )

    def _match_of(self, manager: CountsManager) -> gene_matching.GeneMatch:
        """Genes of a query, or of the attached data, matched already unless they have changed since."""
        if manager is not self.adata_manager:
            return self._match(manager)
        if self.gene_match is None or not self.gene_match.var_names.equals(manager.adata.var_names):
            self.gene_match = self._match(manager)
        return self.gene_match

    @contextmanager
    def _attached(self, adata: ad.AnnData | None) -> Iterator[CountsManager]:
        """Manager of some data for the time of one call, so that a query does not stay in memory."""
        if adata is None and self.adata is None:
            msg = "The model was loaded without data: pass adata=."
            raise ValueError(msg)
        adata = self._validate_anndata(adata)
        try:
            yield self.get_anndata_manager(adata, required=True)
        finally:
            if adata is not self.adata:
                self._per_instance_manager_store[self.id].pop(adata.uns["_scvi_uuid"], None)

    def provenance(self) -> dict[str, Any]:
        """Which weights the model has, and how much of the attached data it reads; for the record."""
        match = None if self.adata is None else self._match_of(self.adata_manager)
        return {
            "model": type(self).__name__,
            **(self.pretrained_ or {}),
            "coverage": match and match.coverage,
            "vocabulary_share": match and match.vocabulary_share,
            "counts_share": match and match.counts_share,
            "cellprior_version": version("cellprior"),
        }

    def release(self) -> None:
        """Let go of the attached data; scvi-tools otherwise holds it for as long as the process runs."""
        if self.adata is not None:
            type(self)._setup_adata_manager_store.pop(self.adata.uns["_scvi_uuid"], None)
        type(self)._per_instance_manager_store.pop(self.id, None)

    def _validate_anndata(self, adata: ad.AnnData | None = None, copy_if_view: bool = True) -> ad.AnnData:
        """Register other data than the attached as a query: its genes, batches and labels may differ."""
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


def load_strictly(module: torch.nn.Module, state_dict: dict[str, Tensor], source: str) -> None:
    """Copy tensors into a module; each must have its place and each place its tensor.

    Raises
    ------
    WeightsError
        With the names that are missing, left over, or of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} has no place" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} is {found[name]}, needed {expected[name]}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:10]) + ("; ..." if len(problems) > 10 else "")
        msg = f"{source} does not fit the network its configuration describes: {shown}. Nothing was loaded."
        raise WeightsError(msg)
    module.load_state_dict(state_dict)


def without_view(adata: ad.AnnData) -> ad.AnnData:
    """A copy of a view, which scvi-tools cannot register, in memory; other data as they are."""
    if not adata.is_view:
        return adata
    return adata.to_memory() if adata.isbacked else adata.copy()


def row_numbers(indices: Sequence[int] | Sequence[bool] | np.ndarray | None, n_obs: int) -> np.ndarray:
    """Row numbers of the cells that ``indices``, numbers or a mask, mean."""
    if indices is None:
        return np.arange(n_obs)
    rows = np.asarray(indices)
    if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iub"):
        msg = f"indices must be whole numbers or a mask, one per cell; found {rows.dtype} of shape {rows.shape}."
        raise TypeError(msg)
    if rows.dtype == bool:
        if len(rows) != n_obs:
            msg = f"The mask has {len(rows)} entries for {n_obs} cells."
            raise ValueError(msg)
        return np.flatnonzero(rows)
    rows = rows.astype(np.int64) if rows.size else np.empty(0, dtype=np.int64)
    if rows.size and not (-n_obs <= rows.min() and rows.max() < n_obs):
        msg = f"indices go from {rows.min()} to {rows.max()}; there are {n_obs} cells."
        raise IndexError(msg)
    return rows % n_obs
