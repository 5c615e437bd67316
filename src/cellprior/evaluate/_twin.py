"""A model beside itself: the same network with random weights, or the same weights on other cells."""

from __future__ import annotations

from typing import Any

import anndata as ad
import torch

from cellprior.model._base import PretrainedModel
from cellprior.model.files._loading import attachable
from cellprior.model.files._strict import load_strictly

RANDOM_WEIGHTS = "random weights"  # what the provenance of a twin says


def random_twin(model: Any, adata: ad.AnnData, *, seed: int) -> PretrainedModel:
    """A model of the same class, network and vocabulary with random weights, ready to embed.

    What pretraining has given a model is what it has beyond its twin. The twin counts as trained, so that it embeds
    and fine-tunes exactly as the model does; see :func:`has_random_weights`. The data are set up like those they are
    a copy or part of, or like those of ``model``, which stays as it is. Call ``release()`` of the twin to let go of
    them. The global random state is left alone. Raises TypeError if ``model`` is not one that embeds an AnnData.
    """
    if not isinstance(model, PretrainedModel):
        msg = (
            f"A model such as CellPLM or ScBERT is needed, with weights loaded; found {type(model).__name__}."
        )
        raise TypeError(msg)
    cls = type(model)
    vocabulary = {"genes": model.genes} | ({} if model.peaks is None else {"peaks": model.peaks})
    attached: ad.AnnData | None = (
        None  # cells with genes alone are read by a model of two modalities, not set up
    )
    if not cls.can("read two modalities"):
        if adata.uns.get("_scvi_uuid") not in cls._setup_adata_manager_store:
            adata = adata.copy() if adata.is_view else adata
            cls.setup_anndata(adata, **model.registry["setup_args"])
        attached = attachable(cls, adata)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = cls(attached, min_coverage=model.min_coverage, **vocabulary, **model._network())
    if attached is None:
        twin.registry["setup_args"].update(model.registry["setup_args"])
        twin._opened = adata
    for name in model._input_buffers:
        twin.module.get_buffer(name).copy_(model.module.get_buffer(name))
    twin.pretrained_ = {"weights": RANDOM_WEIGHTS, "seed": str(seed)}
    twin.is_trained_ = True
    twin.to_device(model.device)
    twin.module.eval()
    return twin


def has_random_weights(model: PretrainedModel) -> bool:
    """Whether a model is a twin, or new, and has not been trained since."""
    is_twin = (model.pretrained_ or {}).get("weights") == RANDOM_WEIGHTS
    return not model.is_trained_ or (is_twin and not model.history)


def same_weights(model: PretrainedModel, adata: ad.AnnData) -> PretrainedModel:
    """A copy of a model with other data attached, without its annotation head; arguments as of :func:`random_twin`."""
    copy = random_twin(model, adata, seed=0)
    tensors = {
        name: tensor
        for name, tensor in model.module.state_dict().items()
        if not name.startswith("annotation.")
    }
    load_strictly(copy.module, tensors, "The model")
    copy.pretrained_ = model.pretrained_
    copy.training_state_ = model.training_state_
    return copy
