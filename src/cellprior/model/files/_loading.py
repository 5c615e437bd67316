"""Weights in, weights out, shared by the models."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import anndata as ad
import torch
from scvi.model.base import BaseModelClass

from cellprior.model._hooks import Hooks
from cellprior.model.data._fields import without_view
from cellprior.model.data._files import with_frames
from cellprior.model.files._strict import check_fits, load_strictly
from cellprior.model.learning._finite import DivergedError, not_finite
from cellprior.weights import (
    Bundle,
    WeightsError,
    read_bundle,
    resolve,
    sha256,
    write_bundle,
)
from cellprior.weights._fetch import fetch_beside
from cellprior.weights._inert import MAX_EXPANSION
from cellprior.weights._reading import check_genes, model_of

SHARES = ("coverage", "vocabulary_share", "counts_share")  # of a match, for the record

SETUP = "_scvi_"  # what the keys of scvi-tools' setup begin with


class LoadableModel(Hooks, BaseModelClass):
    """The part of :class:`~cellprior.model._base.PretrainedModel` that reads and writes weights."""

    # what :meth:`from_pretrained` was given, and the sha256 of all that was read: tensors, configuration, vocabulary
    pretrained_: dict[str, str] | None = None
    split_: dict[str, Any] = {}  # by way of training, which cells were held out

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
        device = usable_device(device)
        path = resolve(weights, known_hash=known_hash)
        bundle, file = cls._read_fetched(str(weights), path)
        digest = sha256(*(bundle.files or (file,)))
        adata = None if adata is None else cls._set_up(adata)
        with torch.random.fork_rng(devices=[]):  # what the network starts from is overwritten
            arguments = {**bundle.config["network"], **bundle.vocabulary}
            model = cls(adata, min_coverage=min_coverage, **arguments)
            model.annotation_ = bundle.config.get("annotation", {})
        load_strictly(model.module, bundle.state_dict, str(weights))
        model.pretrained_ = {"weights": str(weights), "sha256": digest}
        try:
            model.training_state_ = bundle.config.get("training_state", {})
        except (ValueError, TypeError, AttributeError) as error:
            msg = f"{weights}: `training_state` in its config.json is not that of a {cls.__name__}: {error}"
            raise WeightsError(msg) from error
        model.split_ = bundle.config.get("split", {})
        model.is_trained_ = True
        model.to_device(device)
        model.module.eval()
        return model

    @classmethod
    @contextmanager
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
    ) -> Iterator[Self]:
        """A model that embeds some data, for a while; then both are let go. See :func:`cellprior.tl.embed`.

        Raises
        ------
        ValueError
            If the model does not read data of this kind.
        """
        if not isinstance(adata, ad.AnnData) or modalities is not None or isinstance(layer, Mapping):
            msg = (
                f"The weights {weights} are of a {cls.__name__}, which reads an AnnData with one matrix of counts. Of "
                'a MuData give it the modality with the genes, such as mdata["rna"], and the name of one layer.'
            )
            raise ValueError(msg)
        adata = with_frames(without_view(adata))
        keys = SetupKeys(adata)
        users = cls._setup_adata_manager_store.get(adata.uns.get("_scvi_uuid"))  # of a setup before this call
        where = {"layer": layer, "gene_key": gene_key, "batch_key": batch_key}
        model = None
        try:
            cls.setup_anndata(adata, **where, unlabeled_category=unlabeled_category, **(setup or {}))
            model = cls.from_pretrained(
                weights, adata, min_coverage=min_coverage, device=device, known_hash=known_hash
            )
            yield model
        finally:
            if model is not None:
                model.release()
            keys.put_back(adata)
            if users is not None:
                cls.register_manager(users)

    @classmethod
    def _refuse_setup(cls, setup: Mapping[str, Any]) -> None:
        """Refuse what the setup of this model does not take besides what all models take.

        Raises ValueError, with the names that it takes.
        """
        of_all = signature(LoadableModel.opened).parameters.keys() | {
            "adata",
            "mdata",
            "labels_key",
            "kwargs",
        }
        method = getattr(cls, cls._setup_method)
        own = [name for name in signature(method).parameters if name not in of_all and "layer" not in name]
        if unknown := [name for name in setup if name not in own]:
            known = f"takes {', '.join(own)} there" if own else "takes nothing there"
            msg = f"setup= has {unknown[0]!r}; {cls.__name__}.{cls._setup_method} {known}."
            raise ValueError(msg)

    @staticmethod
    def _layers_on_disk(
        layer: str | Mapping[str, str | None] | None, modalities: Mapping[str, str] | None
    ) -> str | Mapping[str, str | None] | None:
        """Layer as :func:`cellprior.model.data._files.open_counts` takes it."""
        return layer

    @classmethod
    def _set_up(cls, adata: ad.AnnData) -> ad.AnnData:
        """Data that can be attached: no view, and set up, like those they are a copy or part of, or with defaults."""
        adata = without_view(adata)
        known = cls._setup_adata_manager_store.get(adata.uns.get("_scvi_uuid"))
        setup = getattr(cls, cls._setup_method)
        if known is None:
            setup(adata)
        elif known.adata is not adata:
            adata.uns["_scvi_uuid"] = str(uuid4())
            setup(adata, **known.registry["setup_args"])
        return adata

    @classmethod
    def load(cls, dir_path: str, adata: ad.AnnData | None = None, *args: Any, **kwargs: Any) -> Self:
        """Load a model saved with ``save``; see :meth:`scvi.model.base.BaseModelClass.load`."""
        with warnings.catch_warnings():
            # scvi-tools warns of genes in another order; here they are matched by name
            warnings.filterwarnings("ignore", message="`var_names` for the loaded", category=UserWarning)
            # mudata has renamed what scvi-tools 1.4.2 calls
            warnings.filterwarnings("ignore", message="The method mod_names is deprecated")
            return super().load(dir_path, adata, *args, **kwargs)

    @classmethod
    def _read_fetched(cls, weights: str, path: Path) -> tuple[Bundle, Path]:
        """As :meth:`_read_weights`; what belongs beside a checkpoint from an address comes from beside it there."""
        if not weights.startswith(("http://", "https://")):
            return cls._read_weights(path)
        names = cls._files_beside(path.name)
        here = [name for name in names if (path.parent / name).exists()]
        fetch_beside(weights, path, here)  # verifies what was recorded of them
        try:
            return cls._read_weights(path)
        except WeightsError as error:
            if not (absent := [name for name in names if name not in here]):
                raise
            problems = fetch_beside(weights, path, absent)
            if len(problems) < len(absent):
                return cls._read_weights(path)
            msg = (
                f"{error} It was looked for beside the checkpoint: {'; '.join(problems)}. Download it, put both into "
                f"one folder, and pass the path of {path.name} there."
            )
            raise WeightsError(msg) from error

    @classmethod
    def _read_weights(cls, path: Path) -> tuple[Bundle, Path]:
        """Contents of a bundle or an official checkpoint, and the file or folder that stands for it in a hash."""
        if model_of(path) is None:
            return cls._read_checked(path)

        def check(bundle: Bundle) -> None:
            if bundle.config["model"] != cls.__name__:
                name = ascii(bundle.config["model"])[1:-1]
                msg = f"{path} holds a {name}: load it with {name}.from_pretrained, not with {cls.__name__}."
                raise WeightsError(msg)
            check_fits(cls, bundle, str(path))

        return read_bundle(path, check=check), path

    @classmethod
    def _read_checked(cls, path: Path) -> tuple[Bundle, Path]:
        """An official checkpoint, as strictly as a bundle."""
        try:
            bundle, file = cls._read_official(path)
            check_genes(bundle.genes, file)
            held = sum(tensor.nbytes for tensor in bundle.state_dict.values())
            if held > MAX_EXPANSION * file.stat().st_size:
                msg = f"{file} says that it holds {held / 1e6:,.0f} MB, and has {file.stat().st_size / 1e6:,.0f}."
                raise WeightsError(msg)
        except WeightsError:
            raise
        except Exception as error:  # what is in the files of strangers may raise anything
            msg = f"{path} is damaged, or no checkpoint of a {cls.__name__} ({error!r}). Get it again."
            raise WeightsError(msg) from error
        check_fits(cls, bundle, str(path))
        return bundle, file

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
        self._refuse_not_finite()
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
                **({"split": self.split_} if self.split_ else {}),
            },
            genes=self.genes,
            peaks=self.peaks,
            card=card,
            overwrite=overwrite,
        )

    def save(self, dir_path: str, *args: Any, **kwargs: Any) -> None:
        """Write the model, to be loaded with ``load``; see :meth:`scvi.model.base.BaseModelClass.save`."""
        self._refuse_not_finite()
        super().save(dir_path, *args, **kwargs)

    def _check_if_trained(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to embed without training, and with weights that are not finite."""
        super()._check_if_trained(*args, **kwargs)
        self._refuse_not_finite()

    def _refuse_not_finite(self) -> None:
        if (name := not_finite(self.module)) is not None:
            msg = (
                f"The weights {name} are not finite, as after a training that diverged: nothing can be embedded, "
                "predicted or saved with them. Load the weights anew, or train again with a smaller learning rate."
            )
            raise DivergedError(msg)

    def release(self) -> None:
        """Let go of the attached data; scvi-tools otherwise holds it for as long as the process runs."""
        if self.adata is not None:
            type(self)._setup_adata_manager_store.pop(self.adata.uns["_scvi_uuid"], None)
        type(self)._per_instance_manager_store.pop(self.id, None)

    def provenance(self, adata: ad.AnnData | None = None) -> dict[str, Any]:
        """Which weights the model has, and how much of some data, by default the attached, it reads; for the record."""
        read: dict[str, Any] = {}
        if not all(data is None for data in (adata, self.adata, self._opened)):
            cells = self._cells(adata)
            for name, counts in cells.counts.items():
                prefix = f"{name}_" if cells.joint else ""
                shares = ("coverage", "counts_share") if cells.joint else SHARES
                read |= {prefix + share: getattr(counts.match, share) for share in shares}
        version_ = {"cellprior_version": version("cellprior")}
        return {"model": type(self).__name__, **(self.pretrained_ or {}), **read, **version_}


class SetupKeys:
    """What scvi-tools' setup has written into data before, so that a setup for a while leaves nothing behind."""

    def __init__(self, adata: ad.AnnData) -> None:
        self.uns = {key: value for key, value in adata.uns.items() if str(key).startswith(SETUP)}
        self.obs = {key: adata.obs[key].copy() for key in adata.obs if str(key).startswith(SETUP)}

    def put_back(self, adata: ad.AnnData) -> None:
        """Take away what was added since, and put back what was changed."""
        for place, before in ((adata.uns, self.uns), (adata.obs, self.obs)):
            for key in [key for key in place if str(key).startswith(SETUP) and key not in before]:
                del place[key]
            for key, value in before.items():
                place[key] = value


def usable_device(device: str | int | torch.device) -> str | int | torch.device:
    """A device that is there; ``"auto"`` is the first GPU if there is one, else the CPU.

    Raises ValueError if it is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    n_found = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(
        found.type
    )
    if n_found is not None and (found.index or 0) >= n_found:
        n = n_found or "no"
        msg = f'device={str(device)!r}: PyTorch finds {n} such device(s) here. Leave it out, or use "cpu".'
        raise ValueError(msg)
    return device
