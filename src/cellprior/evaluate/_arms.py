"""The arms of the ablation of pretraining, and what each learns from the cells of a split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from cellprior._matrix import matrix_of
from cellprior.evaluate import _probes as probes
from cellprior.evaluate._expression import log_normalised, of_genes, raw_counts
from cellprior.evaluate._splits import Split
from cellprior.evaluate._twin import random_twin, same_weights
from cellprior.model._base import PretrainedModel
from cellprior.model.data._fields import without_view

LEARNED = 0.2  # of the training cells that the largest class gets wrong, at least, for an arm to have learned
RISING = 0.02  # of macro-F1 in the last fifth of the epochs: not yet a plateau


@dataclass(frozen=True, slots=True)
class Arm:
    """A network and what is learned of it."""

    pretrained: bool
    trainable: str | None  # ``None``: nothing, a linear probe reads the embedding
    note: str = ""


CONTROL = "scratch + all trained"
FROZEN = "scratch + last only"
RANDOM_FEATURES = "random features + logistic regression"
GENES = "logistic regression on genes"
LARGEST = "largest class"
NETWORKS = {
    "pretrained + head": Arm(True, "head"),
    "pretrained + last": Arm(True, "last"),
    "pretrained + all": Arm(True, "all"),
    "pretrained features + logistic regression": Arm(True, None),
    CONTROL: Arm(False, "all"),
    FROZEN: Arm(False, "last", "layers frozen at random: not 'no pretraining'"),
    RANDOM_FEATURES: Arm(False, None),
}
ARMS = (*NETWORKS, GENES, LARGEST)
COMPARISONS = {  # with each of these, the arms that are compared with it
    CONTROL: ("pretrained + head", "pretrained + last", "pretrained + all", FROZEN),
    RANDOM_FEATURES: ("pretrained features + logistic regression",),
    GENES: tuple(name for name, arm in NETWORKS.items() if arm.pretrained),
}


class Fit(NamedTuple):
    """One arm on one split."""

    test: np.ndarray  # labels given to the test cells
    train_accuracy: float
    learned: bool
    lr: float = np.nan
    epochs: float = np.nan
    rising: bool = False
    seconds: float = np.nan


class Trained(NamedTuple):
    """A network that was fine-tuned with one learning rate."""

    network: PretrainedModel
    lr: float
    macro_f1: list[float]  # of the validation cells, by epoch
    reached: tuple[float, float]  # the highest, and minus the lowest loss


class Cells:
    """Cells of one split, and what the arms learn from them."""

    def __init__(
        self, model: PretrainedModel, split: Split, codes: np.ndarray, names: list[str], seed: int
    ) -> None:
        self.train, self.test = (without_view(model.adata[rows]) for rows in (split.train, split.test))
        self.model, self.codes, self.names, self.seed = model, codes[split.train], names, seed

    def fit(
        self, arm: str, lrs: Sequence[float], options: Mapping[str, Any], embed_options: Mapping[str, Any]
    ) -> Fit:
        """Learn from the training cells, and then name the test cells."""
        if arm == LARGEST:
            return self._named(probes.largest(self.codes, self.train.n_obs + self.test.n_obs))
        if arm == GENES:
            layer = self.model.registry["setup_args"]["layer"]
            x, y = (
                log_normalised(of_genes(raw_counts(cells, layer), matrix_of(cells, layer).var))
                for cells in (self.train, self.test)
            )
            return self._named(probes.sparse_on_genes(x, self.codes, sp.vstack([x, y], format="csr")))
        if NETWORKS[arm].trainable is None:
            return self._probed(NETWORKS[arm], embed_options)
        return self._fine_tuned(NETWORKS[arm], lrs, options)

    def _probed(self, arm: Arm, options: Mapping[str, Any]) -> Fit:
        """A linear probe of the embedding."""
        network = self._network(arm)
        try:
            x, y = (network.get_latent_representation(cells, **options) for cells in (None, self.test))
        finally:
            network.release()
        return self._named(probes.linear(x, self.codes, np.concatenate([x, y]), seed=self.seed))

    def _fine_tuned(self, arm: Arm, lrs: Sequence[float], options: Mapping[str, Any]) -> Fit:
        """The network with the learning rate that is best on the validation part of the training cells."""
        best = self._trained(arm, lrs[0], options)
        for lr in lrs[1:]:  # a large network is in memory twice, not as often as there are rates
            other = self._trained(arm, lr, options)
            if other.reached > best.reached:
                best, other = other, best
            other.network.release()
        try:
            named = np.concatenate([best.network.predict(), best.network.predict(self.test)])
        finally:
            best.network.release()
        fit = self._named(pd.Index(self.names).get_indexer(named))
        rising = is_rising(best.macro_f1, options["max_epochs"])
        return fit._replace(lr=best.lr, epochs=len(best.macro_f1), rising=rising)

    def _trained(self, arm: Arm, lr: float, options: Mapping[str, Any]) -> Trained:
        network = self._network(arm)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(
                self.seed
            )  # in all arms the same validation cells, first head and order of cells
            network.fine_tune(trainable=str(arm.trainable), lr=lr, calibration_size=0.0, **options)
        macro_f1, loss = (
            network.history[f"annotation_validation_{name}"].iloc[:, 0].astype(float).tolist()
            for name in ("macro_f1", "loss")
        )
        return Trained(network, lr, macro_f1, (max(macro_f1), -min(loss)))

    def _network(self, arm: Arm) -> PretrainedModel:
        if arm.pretrained:
            return same_weights(self.model, self.train)
        return random_twin(self.model, self.train, seed=self.seed)

    def _named(self, codes: np.ndarray) -> Fit:
        """From labels of the training and then the test cells."""
        n_train = len(self.codes)
        n_wrong = np.sum(codes[:n_train] != self.codes)
        n_not_largest = np.sum(probes.largest(self.codes, n_train) != self.codes)
        return Fit(codes[n_train:], 1 - n_wrong / n_train, bool(n_wrong <= (1 - LEARNED) * n_not_largest))


def is_rising(macro_f1: Sequence[float], max_epochs: int) -> bool:
    """Whether training ended before a plateau: not stopped early, and still better in the last fifth of the epochs."""
    n_before = max_epochs - max(max_epochs // 5, 1)
    return max(macro_f1[n_before:], default=0.0) > max(macro_f1[:n_before], default=0.0) + RISING
