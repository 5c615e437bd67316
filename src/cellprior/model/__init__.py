"""Model classes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cellprior._plugins import plugins, warn_broken
from cellprior.model.files._convert import convert

if TYPE_CHECKING:
    from cellprior.model._base import PretrainedModel
    from cellprior.model.cellplm import CellPLM
    from cellprior.model.data._counts import NotCountsError
    from cellprior.model.files._loading import LoadableModel
    from cellprior.model.geneformer import Geneformer
    from cellprior.model.learning._finite import DivergedError
    from cellprior.model.multiomeclip import MultiomeCLIP
    from cellprior.model.nicheformer import Nicheformer
    from cellprior.model.scbert import ScBERT
    from cellprior.model.scgpt import ScGPT
    from cellprior.model.uce import UCE

    MODELS: tuple[type[LoadableModel], ...]

__all__ = [
    "UCE",
    "CellPLM",
    "DivergedError",
    "Geneformer",
    "MultiomeCLIP",
    "Nicheformer",
    "NotCountsError",
    "PretrainedModel",
    "ScBERT",
    "ScGPT",
    "convert",
    "model_class",
]

# Imported when they are asked for: with them comes scvi-tools, and a file that is refused needs none of it.
_MODELS = {
    "CellPLM": "cellplm",
    "ScBERT": "scbert",
    "MultiomeCLIP": "multiomeclip",
    "Geneformer": "geneformer",
    "ScGPT": "scgpt",
    "Nicheformer": "nicheformer",
    "UCE": "uce",
}
_PLACES = {
    **_MODELS,
    "DivergedError": "learning._finite",
    "LoadableModel": "files._loading",
    "NotCountsError": "data._counts",
    "PretrainedModel": "_base",
}


def __getattr__(name: str) -> Any:
    if name == "MODELS":
        found: Any = tuple(getattr(sys.modules[__name__], model) for model in _MODELS)
    elif name in _PLACES:
        found = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    else:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def models() -> Iterator[type[LoadableModel]]:
    """Our model classes, then those of plug-ins, which are imported when it comes to them."""
    yield from sys.modules[__name__].MODELS
    yield from _added()


@cache
def _added() -> tuple[type[LoadableModel], ...]:
    """Model classes of plug-ins."""
    from cellprior.model.files._loading import LoadableModel

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


def model_class(weights: str | os.PathLike[str], *, known_hash: str | None = None) -> type[LoadableModel]:
    """Class that loads some weights: a registry name, a bundle folder, an official checkpoint file or its address.

    Raises
    ------
    WeightsError
        If no model knows them.
    """
    from cellprior.weights import WeightsError, resolve
    from cellprior.weights._fetch import fetch_beside
    from cellprior.weights._reading import model_of

    path = resolve(weights, known_hash=known_hash)
    name = model_of(path)
    known = []
    for model in models():
        known.append(model.__name__)
        absent = [other for other in model._files_beside(path.name) if not (path.parent / other).exists()]
        if absent and str(weights).startswith(("http://", "https://")):
            fetch_beside(str(weights), path, absent)  # some are recognised by it
        if model.__name__ == name or (name is None and model.recognises(path)):
            return model
    held = ascii(name)[1:-1] if name else "weights"
    msg = f"{weights} holds {held} of no model that is known here: {', '.join(known)}."
    if path.suffix == ".ckpt":
        msg += " A checkpoint of scCLIP or Nicheformer can be made into a bundle: see `cellprior convert`."
    raise WeightsError(msg)
