"""Model classes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache

from cellprior._plugins import plugins, warn_broken
from cellprior.model._base import PretrainedModel
from cellprior.model._convert import convert
from cellprior.model._data import NotCountsError
from cellprior.model._fitting import DivergedError
from cellprior.model._loading import LoadableModel
from cellprior.model.cellplm import CellPLM
from cellprior.model.geneformer import Geneformer
from cellprior.model.multiomeclip import MultiomeCLIP
from cellprior.model.scbert import ScBERT
from cellprior.model.scgpt import ScGPT

__all__ = [
    "CellPLM",
    "DivergedError",
    "Geneformer",
    "MultiomeCLIP",
    "NotCountsError",
    "PretrainedModel",
    "ScBERT",
    "ScGPT",
    "convert",
    "model_class",
]

MODELS: tuple[type[LoadableModel], ...] = (CellPLM, ScBERT, MultiomeCLIP, Geneformer, ScGPT)


def models() -> Iterator[type[LoadableModel]]:
    """Our model classes, then those of plug-ins, which are imported when it comes to them."""
    yield from MODELS
    yield from _added()


@cache
def _added() -> tuple[type[LoadableModel], ...]:
    """Model classes of plug-ins."""
    found = []
    for plugin in plugins():
        try:
            model = plugin.load()
        except Exception as error:  # noqa: BLE001 - whatever it raises, the others are usable
            warn_broken(plugin, f"its import fails ({error!r}).")
            continue
        if isinstance(model, type) and issubclass(model, LoadableModel):
            found.append(model)
        else:
            warn_broken(plugin, "it is no subclass of cellprior.model.PretrainedModel.")
    return tuple(found)


def model_class(weights: str | os.PathLike[str]) -> type[LoadableModel]:
    """Class that loads some weights: a registry name, a bundle folder or an official checkpoint file.

    Raises
    ------
    WeightsError
        If no model knows them.
    """
    from cellprior.weights import WeightsError, resolve
    from cellprior.weights._bundle import model_of

    path = resolve(weights)
    name = model_of(path)
    known = []
    for model in models():
        known.append(model.__name__)
        if model.__name__ == name or (name is None and model.recognises(path)):
            return model
    msg = f"{weights} holds {name or 'weights'} of no model that is known here: {', '.join(known)}."
    if path.suffix == ".ckpt":
        msg += " A checkpoint of scCLIP can be made into a bundle: see `cellprior convert`."
    raise WeightsError(msg)
