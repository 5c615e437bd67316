"""Model classes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellprior._plugins import plugins, warn_broken

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

    from cellprior.model._base import PretrainedModel
    from cellprior.model.cellplm import CellPLM
    from cellprior.model.data._counts import NotCountsError
    from cellprior.model.geneformer import Geneformer
    from cellprior.model.learning._finite import DivergedError
    from cellprior.model.multiomeclip import MultiomeCLIP
    from cellprior.model.nicheformer import Nicheformer
    from cellprior.model.scbert import ScBERT
    from cellprior.model.scgpt import ScGPT
    from cellprior.model.uce import UCE

    MODELS: tuple[type[PretrainedModel], ...]

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
    return list(__all__)


def models() -> Iterator[type[PretrainedModel]]:
    """Our model classes, then those of plug-ins, which are imported when it comes to them."""
    yield from sys.modules[__name__].MODELS
    yield from _added()


@cache
def _added() -> tuple[type[PretrainedModel], ...]:
    """Model classes of plug-ins."""
    from cellprior.model._base import PretrainedModel

    found = []
    for plugin in plugins():
        try:
            model = plugin.load()
        except Exception as error:  # noqa: BLE001 - whatever it raises, the others are usable
            warn_broken(plugin, f"its import fails ({error!r}).")
            continue
        if isinstance(model, type) and issubclass(model, PretrainedModel):
            found.append(model)
        else:
            warn_broken(plugin, "it is no subclass of cellprior.model.PretrainedModel.")
    return tuple(found)


def convert(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    trust: bool = False,
    reference: AnnData | MuData | None = None,
    layer: str | Mapping[str, str | None] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the official checkpoint of a model as a bundle, which ``from_pretrained`` loads without its authors' code.

    Checkpoints of CellPLM and scBERT hold tensors and plain values. That of :class:`~cellprior.model.Nicheformer` has
    numbers of NumPy among them; those of scCLIP, for :class:`~cellprior.model.MultiomeCLIP`, are pickles of objects
    from pandas, transformers and argparse. Read in the usual way (``torch.load`` with ``weights_only=False``), such a
    file may run whatever its author put in. That is not done here: every name in it becomes a placeholder, none is
    imported or called, and tensors, gene and peak names are dug out of these. What remains are flaws of Python's own
    unpickler, and numbers that are not what they claim to be; so a file is opened only with ``trust=True``, and
    ``from_pretrained`` never does.

    Parameters
    ----------
    path
        Checkpoint file; beside it, or in the same folder, what its model's ``from_pretrained`` needs.
    folder
        Bundle to write.
    trust
        That you know who made a file that is a pickle.
    reference
        For scCLIP: raw counts of RNA, and better also of ATAC of the same cells. The original divides the expression
        of each gene by its largest in the data set at hand, and stores none; here the largest of these cells, of
        20,000 at most, become a part of the weights. Best are the data that the model was trained on. From cells with
        both modalities it is also found how the modalities are turned together (``center=True``); without, they lie
        apart as in the original.
    layer
        Layer of ``reference`` with the counts, see :func:`cellprior.tl.embed`.
    overwrite
        Replace a bundle that is already there.

    Returns
    -------
    The folder.

    Raises
    ------
    WeightsError
        If the file is a pickle and ``trust`` is off, and then with what can be said of it unopened; or it is damaged,
        of no known model, or names what no checkpoint needs.
    ValueError
        If ``reference`` is needed and missing, or does not have what is needed.
    """
    from cellprior.model.files._convert import convert as into_bundle

    options: dict[str, Any] = {"trust": trust, "reference": reference, "layer": layer, "overwrite": overwrite}
    return into_bundle(models, path, folder, **options)


def model_class(weights: str | os.PathLike[str], *, known_hash: str | None = None) -> type[PretrainedModel]:
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
    msg = f"{weights} holds {held} of an unknown model. Known are {', '.join(known)}."
    if path.suffix == ".ckpt":
        msg += " A checkpoint of scCLIP or Nicheformer can be made into a bundle: see `cellprior convert`."
    raise WeightsError(msg)
