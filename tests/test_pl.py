"""Plots that have no room of their own; the others are tested with what they draw."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

import cellprior as cp
from tests.contract.models import blood_cells


@pytest.mark.parametrize("with_counts", [True, False])
def test_the_plot_of_a_gene_match_shows_each_route_and_names_what_was_lost(with_counts):
    adata = blood_cells()
    counts = np.asarray(adata.X.sum(axis=0)).ravel() if with_counts else None
    genes = cp.weights.read_bundle(cp.weights.fetch("cellplm-starter")).vocabulary["genes"]
    match = cp.genes.match(adata.var, genes, gene_counts=counts)
    ax = cp.pl.gene_match(match, n_lost=2, ax=Figure().subplots())
    routes = [*match.routes, ""]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["symbol", "retired symbol", "not found"]
    weights = [np.ones(adata.n_vars), counts] if with_counts else [np.ones(adata.n_vars)]
    assert len(ax.containers) == len(weights)
    for bars, weight in zip(ax.containers, weights, strict=True):
        shares = [weight[match.route == route].sum() / weight.sum() for route in routes]
        np.testing.assert_allclose([bar.get_width() for bar in bars], shares)
        assert sum(shares) == pytest.approx(1)
    assert ax.get_xlabel().endswith(f"{', '.join(match.lost_genes(2)['name'])}, ...")
    assert f"{match.n_matched:,} of" in ax.get_title()


def test_the_plot_of_a_gene_match_without_a_loss_names_none():
    adata = blood_cells()
    match = cp.genes.match(adata.var, list(adata.var_names))
    ax = cp.pl.gene_match(match, ax=Figure().subplots())
    assert ax.get_xlabel() == ""
    assert [bar.get_width() for bar in ax.containers[0]] == [1, 0]


@pytest.mark.parametrize("n_epochs", [1, 3, 30])
def test_epochs_are_whole_numbers_on_the_axis(n_epochs):
    names = ("train_masked", "train_masked_floor_gene_means")
    model = SimpleNamespace(
        history={name: pd.DataFrame({name: np.linspace(3, 1, n_epochs)}) for name in names}
    )
    ax = cp.pl.training(model, ax=Figure().subplots())
    assert all(float(tick).is_integer() for tick in ax.get_xticks())
