"""MultiomeCLIP in evaluation, as far as an AnnData with genes goes."""

from __future__ import annotations

import numpy as np
import pytest

import cellprior as cp
from cellprior.evaluate._twin import random_twin

from .data import cells


def test_rna_is_compared_beside_pca_and_the_same_network_with_random_layers(bundle):
    new = cells(120, seed=3)
    rna = new["rna"].copy()
    rna.obs["type"] = new.obs["type"].to_numpy()
    table = cp.evaluate.zero_shot(rna, str(bundle), labels_key="type", seeds=2, progress=False)
    name = next(method for method in table["method"].unique() if method.startswith("random weights of"))
    assert {name, name.removeprefix("random weights of ")} <= set(table["method"])
    f1 = table.loc[table["metric"] == "macro_f1", "value"]
    assert len(f1) and f1.notna().all()


def test_a_random_twin_reads_the_components_that_were_found_and_has_layers_of_its_own(trained, mdata):
    twin = random_twin(trained, mdata["rna"], seed=1)
    mine, its = trained.module.state_dict(), twin.module.state_dict()
    assert all((mine[name] == its[name]).all() for name in trained._input_buffers)
    assert not np.allclose(
        trained.get_latent_representation(mdata["rna"]),
        twin.get_latent_representation(mdata["rna"]),
        atol=0.1,
    )


def test_peaks_alone_have_no_baselines_made_of_genes_which_is_said_before_they_are_embedded(
    bundle, mdata, monkeypatch
):
    atac = mdata["atac"].copy()
    atac.obs["type"] = mdata.obs["type"].to_numpy()
    monkeypatch.setattr(cp.model.MultiomeCLIP, "get_latent_representation", None)
    with pytest.raises(ValueError, match="MultiomeCLIP\\) reads no genes of these data"):
        cp.evaluate.zero_shot(atac, str(bundle), labels_key="type", seeds=2, progress=False)


def test_a_mudata_is_refused_with_the_way_to_compare_what_it_holds(bundle, mdata):
    for ask in (
        lambda: cp.evaluate.report(mdata, str(bundle), "type"),
        lambda: cp.evaluate.transfer(mdata, mdata, str(bundle), "type"),
    ):
        with pytest.raises(
            TypeError, match="found a MuData.*put the embedding beside the genes, rna = mdata"
        ):
            ask()
