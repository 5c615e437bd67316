"""The same model, which also learns: loadings and means by gradient descent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from scvi import REGISTRY_KEYS
from torch import Tensor, nn

from reference_pca._model import ReferencePCA
from reference_pca._module import ReferencePCAModule


class TrainedPCAModule(ReferencePCAModule):
    """A network that says how far it is from what it should give."""

    def __init__(self, n_genes: int, **network: Any) -> None:
        super().__init__(n_genes, **network)
        nn.init.normal_(self.loadings, std=n_genes**-0.5)

    def training_losses(
        self, batch: Mapping[str, Tensor], *, floor: GeneMeans, measured: Tensor, rng_seed: int
    ) -> dict[str, Tensor]:
        """Squared error of cells that are put together from their embedding, and that of the mean of each gene."""
        del (
            rng_seed
        )  # nothing is drawn here; of a mask, say: another in each step, the same in each validation
        counts = batch[REGISTRY_KEYS.X_KEY]  # raw, over the whole vocabulary, dense (cells, n_genes)
        code = int(batch[REGISTRY_KEYS.BATCH_KEY][0]) if len(measured) > 1 else 0  # one in all of the cells
        known = measured[code]  # (n_genes,); the other genes are 0 for not having been looked at
        log = self.logarithms(counts)
        found = self.mean + self.encode(counts) @ self.loadings.T
        loss = (found - log)[:, known].square().mean()
        of_means = (floor.mean - log)[:, known].square().mean()
        return {"loss": loss, "error": loss, "error_floor_gene_mean": of_means}


class GeneMeans(nn.Module):
    """What can be said of a cell without looking at it; a module, so that it goes where the network goes."""

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)


class TrainedPCA(ReferencePCA):
    """See :class:`ReferencePCA`."""

    _module_cls = TrainedPCAModule
    objectives = {"reconstruction": {}}  # its name, and options that training_losses gets

    def _fit_floor(self, batches: Iterable[Mapping[str, Tensor]], measured: Tensor) -> GeneMeans:
        total, n_cells = torch.zeros(measured.shape[1]), 0
        for batch in batches:  # of training cells, on the CPU, in one pass
            total += self.module.logarithms(batch[REGISTRY_KEYS.X_KEY]).sum(dim=0)
            n_cells += len(batch[REGISTRY_KEYS.X_KEY])
        return GeneMeans(total / n_cells)
