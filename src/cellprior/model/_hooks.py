"""What a model class gives to the base, in one place and with types; what is not given has a default, or is refused.

The table in the user guide, under "Adding a model", is tested against this class.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
import torch
from scvi.train import TrainRunner
from torch import Tensor

from cellprior._docs import described
from cellprior.model.data._minibatches import VocabularySplitter
from cellprior.model.engine._encoder import Encoder
from cellprior.model.learning._masked import MaskedScores
from cellprior.model.learning._training import TrainingPlan
from cellprior.weights import Bundle, InertCheckpoint, WeightsError
from cellprior.weights._reading import read_genes

RETIRED = ("_encode", "_hidden", "_counts", "_units", "_submit", "_sentences")


class Hooks(ABC):
    """Members that a model class gives, or may give, to :class:`~cellprior.model._base.PretrainedModel`.

    Attributes
    ----------
    _module_cls
        The network; needed.
    obsm_key
        Where embeddings are written; needed.
    _setup_method
        Name of the method that registers data.
    _encoder_cls
        How cells are encoded: sentences, options, what is told of each cell besides its counts.
    default_batch_size
        Cells in memory at a time on a CPU.
    _input_buffers
        Buffers of the network that say how counts become its input, which no training changes.
    peaks
        A second vocabulary.
    sizes
        Widths and layers of a new network by ``size``, if the class takes it: ``"small"`` and ``"released"``, which
        name the same arguments.
    objectives
        Ways of training without labels by name, and for each the options of the training plan; the first is the
        default.
    _data_splitter_cls, _training_plan_cls, _train_runner_cls
        What training is done with, as of scvi-tools' own training mixin.
    _alike
        Whether most of a hidden state is the same in all cells: the annotation head then learns from what is left.
    """

    _module_cls: ClassVar[Any]
    obsm_key: ClassVar[str]
    _setup_method = "setup_anndata"
    _encoder_cls: type[Encoder] = Encoder
    default_batch_size = 1024
    _input_buffers: tuple[str, ...] = ()
    peaks: list[str] | None = None
    sizes: dict[str, dict[str, int]] = {}
    objectives: dict[str, dict[str, Any]] = {}
    _data_splitter_cls: Any = VocabularySplitter
    _training_plan_cls: Any = TrainingPlan
    _train_runner_cls: type[TrainRunner] = TrainRunner
    _alike = False

    module: Any
    registry: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        described(cls)
        if retired := [name for name in RETIRED if name in vars(cls)]:
            msg = (
                f"{cls.__name__} gives {', '.join(retired)}, which nothing asks for any more: how cells are encoded is "
                "said by a class of its own, _encoder_cls. See the user guide, 'Adding a model'."
            )
            raise TypeError(msg)

    @classmethod
    def can(cls, what: str) -> bool:
        """Whether the model can do something.

        Parameters
        ----------
        what
            ``"train"`` without labels, ``"annotate"`` (``fine_tune`` and ``predict``), ``"predict hidden genes"``, or
            ``"read two modalities"``.

        Raises
        ------
        KeyError
            For anything else.
        """
        return {
            "train": bool(cls.objectives) or cls._training_plan_cls is not TrainingPlan,
            "annotate": hasattr(cls._module_cls, "trainable_parts"),
            "predict hidden genes": cls._masked_scores is not Hooks._masked_scores,
            "read two modalities": cls._setup_method == "setup_mudata",
        }[what]

    # weights

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether a file or folder holds an official checkpoint of this model."""
        return False

    @classmethod
    def _read_official(cls, path: Path) -> tuple[Bundle, Path]:
        """Contents of an official checkpoint, as strictly as those of a bundle, and the file that stands for it."""
        msg = f"{path} is not a {cls.__name__} bundle: a folder with config.json and model.safetensors is needed."
        raise WeightsError(msg)

    @classmethod
    def _files_beside(cls, name: str) -> Sequence[str]:
        """Names of the files that belong beside an official checkpoint of this name."""
        return ()

    @classmethod
    def _genes_on_hand(cls, name: str, folder: Path) -> pd.DataFrame | None:
        """Vocabulary of the weights of this name, if it can be had without a download; ``folder`` has their files."""
        return read_genes(folder)

    @classmethod
    def _blank(cls, *, genes: pd.DataFrame, **network: Any) -> torch.nn.Module:
        """The module that ``__init__`` makes with these arguments, by itself: what weights are compared with."""
        return cls._module_cls(len(genes), **network)

    @classmethod
    def from_pickle(
        cls,
        checkpoint: InertCheckpoint,
        content: Any,
        *,
        reference: Any,
        layer: str | Mapping[str, str | None] | None,
    ) -> tuple[Self | Bundle, list[str]] | None:
        """Model or bundle of an official checkpoint that is a pickle, and notes for its card; None if not this one's.

        See :func:`cellprior.model.convert`, which alone may call this.
        """
        return None

    @property
    def _species_of_genes(self) -> str | None:
        """Species that the names of the data's genes are of, for models that know several; None to find it."""
        return self.registry["setup_args"].get("species")

    # training

    @property
    def training_state_(self) -> dict[str, Any]:
        """What training needs besides the tensors to go on where it stopped; saved with the model."""
        return {}

    @training_state_.setter
    def training_state_(self, state: dict[str, Any]) -> None:
        del state  # there is none

    def _objective(self, name: str | None) -> dict[str, Any]:
        """Options of the training plan for one of ``objectives``.

        Raises
        ------
        NotImplementedError
            If the model lacks what training needs.
        ValueError
            If there is no such objective.
        """
        needed = {
            "objectives": bool(self.objectives),
            "_fit_floor": type(self)._fit_floor is not Hooks._fit_floor,
            "training_losses of its module": hasattr(self.module, "training_losses"),
        }
        if lacking := [member for member, is_there in needed.items() if not is_there]:
            msg = (
                f"{type(self).__name__} cannot be trained: it does not give {', '.join(lacking)}. What a model gives "
                "to be trained is listed in the user guide, under 'Adding a model'."
            )
            raise NotImplementedError(msg)
        if name not in (None, *self.objectives):
            msg = f"objective={name!r} is not known; choose one of {', '.join(map(repr, self.objectives))}."
            raise ValueError(msg)
        return dict(self.objectives[name or next(iter(self.objectives))])

    def _fit_floor(self, batches: Iterable[Mapping[str, Tensor]], measured: Tensor) -> torch.nn.Module:
        """Predictors that know no biology, from the minibatches of the training cells.

        See :class:`~cellprior.model.learning._training.TrainingPlan`.
        """
        raise NotImplementedError

    def _fit_predictors(self, batches: Callable[[], Iterable[Mapping[str, Tensor]]], measured: Tensor) -> Any:
        """What :meth:`_masked_scores` needs to know of training cells, from passes over them; the floor, if no more."""
        return self._fit_floor(batches(), measured).to(self.module.device)

    def _masked_scores(
        self,
        counts: Tensor,
        fitted: Any,
        *,
        share: float,
        rng: np.random.Generator,
        measured: Tensor,
        batch: int,
    ) -> MaskedScores:
        """How well genes that are hidden from the network are predicted, by it and by predictors without biology.

        Parameters
        ----------
        counts
            Raw counts over the vocabulary ``(cells, n_genes)``, of one sentence.
        fitted
            From :meth:`_fit_predictors`.
        share
            Of the genes that is hidden.
        rng
            Draws them.
        measured
            Which genes were measured ``(n_genes,)``.
        batch
            Code of the cells' batch.

        Raises
        ------
        NotImplementedError
            If a model does not have it: ``evaluate.masked_prediction`` is then not for this model.
        """
        msg = f"{type(self).__name__} does not say how it predicts hidden genes: it gives no _masked_scores."
        raise NotImplementedError(msg)
