"""Weights in, weights out, shared by the models."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any
from uuid import uuid4

import anndata as ad
import torch

from cellprior.model.data._fields import without_view
from cellprior.model.data._files import with_frames
from cellprior.model.files._strict import check_fits, load_strictly
from cellprior.model.learning._finite import refuse_not_finite
from cellprior.weights import (
    Bundle,
    WeightsError,
    read_bundle,
    read_trained_on,
    resolve,
    sha256,
    write_bundle,
    write_trained_on,
)
from cellprior.weights._fetch import fetch_beside
from cellprior.weights._inert import MAX_EXPANSION
from cellprior.weights._reading import check_genes, model_of

SHARES = ("coverage", "vocabulary_share", "counts_share")  # of a match, for the record

version_of = cache(version)  # which reads a file each time

SETUP = "_scvi_"  # what the keys of scvi-tools' setup begin with


def from_pretrained(
    cls: type[Any],
    weights: str | os.PathLike[str],
    adata: Any,
    *,
    min_coverage: float,
    device: str | int | torch.device,
    known_hash: str | None,
) -> Any:
    """See :meth:`cellprior.model._base.PretrainedModel.from_pretrained`."""
    device = usable_device(device)
    path = resolve(weights, known_hash=known_hash)
    bundle, file = _read_fetched(cls, str(weights), path)
    digest = sha256(*(bundle.files or (file,)))
    adata = None if adata is None else attachable(cls, adata)
    with torch.random.fork_rng(devices=[]):  # what the network starts from is overwritten
        arguments = {**bundle.config["network"], **bundle.vocabulary}
        model = cls(adata, min_coverage=min_coverage, **arguments)
        model.annotation_ = bundle.config.get("annotation", {})
    load_strictly(model.module, bundle.state_dict, str(weights))
    model.pretrained_ = {"weights": str(weights), "sha256": digest}
    model.trained_on_ = read_trained_on(path)
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


@contextmanager
def opened(
    cls: type[Any],
    weights: str | os.PathLike[str],
    adata: ad.AnnData,
    *,
    layer: str | Mapping[str, str | None] | None,
    modalities: Mapping[str, str] | None,
    where: Mapping[str, Any],
    setup: Mapping[str, Any],
    **options: Any,
) -> Iterator[Any]:
    """See :meth:`cellprior.model._base.PretrainedModel.opened`; ``where`` is what all setups take."""
    if not isinstance(adata, ad.AnnData) or modalities is not None or isinstance(layer, Mapping):
        msg = (
            f"The weights {weights} are of a {cls.__name__}, which reads an AnnData with one matrix of counts. Of "
            'a MuData give it the modality with the genes, such as mdata["rna"], and the name of one layer.'
        )
        raise ValueError(msg)
    adata = with_frames(without_view(adata))
    keys = SetupKeys(adata)
    users = cls._setup_adata_manager_store.get(adata.uns.get("_scvi_uuid"))  # of a setup before this call
    model = None
    try:
        cls.setup_anndata(adata, layer=layer, **where, **setup)
        model = cls.from_pretrained(weights, adata, **options)
        yield model
    finally:
        if model is not None:
            model.release()
        keys.put_back(adata)
        if users is not None:
            cls.register_manager(users)


def refuse_setup(cls: type[Any], setup: Mapping[str, Any]) -> None:
    """Refuse what the setup of this model does not take besides what all models take.

    Raises ValueError, with the names that it takes.
    """
    of_all = signature(cls.opened).parameters.keys() | {"adata", "mdata", "labels_key", "kwargs"}
    method = getattr(cls, cls._setup_method)
    own = [name for name in signature(method).parameters if name not in of_all and "layer" not in name]
    if unknown := [name for name in setup if name not in own]:
        known = f"takes {', '.join(own)} there" if own else "takes nothing there"
        msg = f"setup= has {unknown[0]!r}; {cls.__name__}.{cls._setup_method} {known}."
        raise ValueError(msg)


def attachable(cls: type[Any], adata: ad.AnnData) -> ad.AnnData:
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


def _read_fetched(cls: type[Any], weights: str, path: Path) -> tuple[Bundle, Path]:
    """As :func:`read_weights`; what belongs beside a checkpoint from an address comes from beside it there."""
    if not weights.startswith(("http://", "https://")):
        return read_weights(cls, path)
    names = cls._files_beside(path.name)
    here = [name for name in names if (path.parent / name).exists()]
    fetch_beside(weights, path, here)  # verifies what was recorded of them
    try:
        return read_weights(cls, path)
    except WeightsError as error:
        if not (absent := [name for name in names if name not in here]):
            raise
        problems = fetch_beside(weights, path, absent)
        if len(problems) < len(absent):
            return read_weights(cls, path)
        msg = (
            f"{error} It was looked for beside the checkpoint: {'; '.join(problems)}. Download it, put both into "
            f"one folder, and pass the path of {path.name} there."
        )
        raise WeightsError(msg) from error


def read_weights(cls: type[Any], path: Path) -> tuple[Bundle, Path]:
    """Contents of a bundle or an official checkpoint, and the file or folder that stands for it in a hash."""
    if model_of(path) is None:
        return _read_checked(cls, path)

    def check(bundle: Bundle) -> None:
        if bundle.config["model"] != cls.__name__:
            name = ascii(bundle.config["model"])[1:-1]
            msg = f"{path} holds a {name}: load it with {name}.from_pretrained, not with {cls.__name__}."
            raise WeightsError(msg)
        check_fits(cls, bundle, str(path))

    return read_bundle(path, check=check), path


def _read_checked(cls: type[Any], path: Path) -> tuple[Bundle, Path]:
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


def save_pretrained(model: Any, folder: str | os.PathLike[str], *, card: str | None, overwrite: bool) -> None:
    """See :meth:`cellprior.model._base.PretrainedModel.save_pretrained`."""
    refuse_not_finite(model.module)
    if card is None:
        origin = f" Loaded from {model.pretrained_['weights']}." if model.pretrained_ else ""
        card = f"# {type(model).__name__}\n\n{model._model_summary_string}.{origin}\n\nNo card was written.\n"
    write_bundle(
        folder,
        state_dict=model.module.state_dict(),
        config={
            "model": type(model).__name__,
            "network": model._network(),
            "training_state": model.training_state_,
            "annotation": model.annotation_,
            **({"split": model.split_} if model.split_ else {}),
        },
        genes=model.genes,
        peaks=model.peaks,
        card=card,
        overwrite=overwrite,
    )
    if model.trained_on_ is not None and not model.history:  # after a training there would be more
        write_trained_on(folder, model.trained_on_)


def provenance(model: Any, adata: Any) -> dict[str, Any]:
    """See :meth:`cellprior.model._base.PretrainedModel.provenance`."""
    read: dict[str, Any] = {}
    if not all(data is None for data in (adata, model.adata, model._opened)):
        cells = model._cells(adata)
        for name, counts in cells.counts.items():
            prefix = f"{name}_" if cells.joint else ""
            shares = ("coverage", "counts_share") if cells.joint else SHARES
            read |= {prefix + share: getattr(counts.match, share) for share in shares}
    version_ = {"cellprior_version": version_of("cellprior")}
    return {"model": type(model).__name__, **(model.pretrained_ or {}), **read, **version_}


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
