"""Floors of predicting hidden bins: what can be known of them without any biology of the cell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from scvi import REGISTRY_KEYS
from torch import Tensor, nn

PRIOR = 1.0  # cells of the average gene that each gene is mixed with
SLOPE_PRIOR = 20.0  # and for how its bin changes with depth, which few cells do not tell


class BinFloors(nn.Module):
    """Bins of a hidden gene, as real numbers, by predictors that know no biology.

    With d the logarithm of how many genes a cell expresses, and sums over the training cells that express gene g, or,
    where genes in bin 0 are asked for too, over all:

    ``zero``
        0.
    ``gene_mean``
        The mean bin of the gene.
    ``gene_mean_at_depth``
        The least-squares line of the gene's bin against d: how its mean bin changes with the depth of a cell.

    Each gene's mean is mixed with one cell of the average gene, so that a gene that no training cell expresses has
    the mean of all; and its slope with twenty cells of the slope within genes.

    Parameters
    ----------
    sums
        Per gene ``n, Σ b, Σ d, Σ d², Σ b d``, of the cells that express it, and of all ``(2, 5, n_genes)``.
    of_batches
        Cells of each batch ``(n_batches,)``.
    """

    sums: Tensor
    of_batches: Tensor

    def __init__(self, sums: Tensor, of_batches: Tensor) -> None:
        super().__init__()
        self.register_buffer("sums", sums)
        self.register_buffer("of_batches", of_batches)

    @classmethod
    def fit(cls, module: object, batches: Iterable[Mapping[str, Tensor]], measured: Tensor) -> BinFloors:
        """Sum up in one pass over minibatches of raw counts, each of one batch, which ``module`` bins."""
        n_genes = measured.shape[1]
        sums = torch.zeros(2, 5, n_genes, dtype=torch.float64)
        of_batches = torch.zeros(1)
        for batch in batches:
            code = int(batch[REGISTRY_KEYS.BATCH_KEY][0]) if REGISTRY_KEYS.BATCH_KEY in batch else 0
            tokens = module.tokens(batch[REGISTRY_KEYS.X_KEY])  # type: ignore[attr-defined]
            gene, value = tokens.gene.cpu()[:, 1:], tokens.value.cpu()[:, 1:]
            depth = depth_of(tokens.length).double()
            row, place = (gene < n_genes).nonzero(as_tuple=True)
            g, b, d = gene[row, place], value[row, place].double(), depth[row]
            for i, x in enumerate((torch.ones_like(b), b, d, d * d, b * d)):
                sums[0, i].index_add_(0, g, x)
            known = measured[code if len(measured) > 1 else 0].double()
            for i, total in ((0, len(depth)), (2, depth.sum()), (3, (depth * depth).sum())):
                sums[1, i] += known * total
            if code >= len(of_batches):
                of_batches = torch.cat([of_batches, torch.zeros(code + 1 - len(of_batches))])
            of_batches[code] += len(depth)
        sums[1, 1], sums[1, 4] = sums[0, 1], sums[0, 4]
        return cls(sums.float(), of_batches)

    def predict(self, gene: Tensor, depth: Tensor, *, with_zeros: bool = False) -> dict[str, Tensor]:
        """Bins by predictor ``(places,)``, of vocabulary rows in cells of a depth, see :func:`depth_of`.

        ``with_zeros`` says whether genes in bin 0 are among what is asked for.
        """
        sums = self.sums[int(with_zeros)]
        average = sums.sum(1) / sums[0].sum().clamp(min=1.0)  # of one cell of the average gene
        n, b, d, dd, bd = sums[:, gene] + PRIOR * average[:, None]
        n = n.clamp(min=1e-6)
        mean, at = b / n, d / n
        common, spread = self._common_slope(int(with_zeros))
        covariance, variance = bd - n * mean * at, (dd - n * at * at).clamp(min=0.0)
        slope = (covariance + SLOPE_PRIOR * spread * common) / (variance + SLOPE_PRIOR * spread).clamp(
            min=1e-6
        )
        at_depth = (mean + slope * (depth - at)).clamp(min=0.0 if with_zeros else 1.0)
        return {"zero": torch.zeros_like(mean), "gene_mean": mean, "gene_mean_at_depth": at_depth}

    def _common_slope(self, i: int) -> tuple[Tensor, Tensor]:
        """Slope against depth within genes, of all genes together, and the variance of depth that it is from."""
        n, b, d, dd, bd = self.sums[i]
        n = n.clamp(min=1e-6)
        covariance, variance = (bd - b * d / n).sum(), (dd - d * d / n).sum().clamp(min=1e-6)
        return covariance / variance, variance / n.sum()

    def rate(self, gene: Tensor) -> Tensor:
        """Share of the cells that express a gene ``(places,)``."""
        expressed, cells = self.sums[0, 0], self.sums[1, 0]
        average = expressed.sum() / cells.sum().clamp(min=1.0)
        return (expressed[gene] + PRIOR * average) / (cells[gene] + PRIOR)

    def surprise_of_batch(self, code: int) -> Tensor:
        """``-ln`` of the share of a batch: what who sees nothing of a cell loses on average by naming its batch."""
        share = (self.of_batches[code] if code < len(self.of_batches) else self.of_batches.new_zeros(())) + 1
        return -(share / (self.of_batches.sum() + len(self.of_batches))).log()


def depth_of(length: Tensor) -> Tensor:
    """Logarithm of how many genes a cell expresses, at least 1, from its number of tokens ``(cells,)``."""
    return (length - 1).clamp(min=1).float().log()
