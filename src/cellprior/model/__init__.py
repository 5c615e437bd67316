"""Model classes."""

from __future__ import annotations

import json
import os

from cellprior.model._convert import convert
from cellprior.model._data import NotCountsError
from cellprior.model._loading import LoadableModel
from cellprior.model.cellplm import CellPLM
from cellprior.model.multiomeclip import MultiomeCLIP
from cellprior.model.scbert import ScBERT

__all__ = ["CellPLM", "MultiomeCLIP", "NotCountsError", "ScBERT", "convert", "model_class"]

MODELS: tuple[type[LoadableModel], ...] = (CellPLM, ScBERT, MultiomeCLIP)


def model_class(weights: str | os.PathLike[str]) -> type[LoadableModel]:
    """Class that loads some weights: a registry name, a bundle folder or an official checkpoint file.

    Raises
    ------
    WeightsError
        If no model knows them.
    """
    from cellprior.weights import WeightsError, resolve

    path = resolve(weights)
    config = path / "config.json"
    name = json.loads(config.read_text()).get("model") if config.is_file() else None
    for model in MODELS:
        if model.__name__ == name or (name is None and model.recognises(path)):
            return model
    msg = f"{weights} holds {name or 'weights'} of no model that this version knows: {[m.__name__ for m in MODELS]}."
    if path.suffix == ".ckpt":
        msg += " A checkpoint of scCLIP can be made into a bundle: see `cellprior convert`."
    raise WeightsError(msg)
