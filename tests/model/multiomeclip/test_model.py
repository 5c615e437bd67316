from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from mudata import MuData

from cellprior import pp
from cellprior._compat import without_pulled_columns
from cellprior.genes import PeakMatchError
from cellprior.model import NotCountsError
from cellprior.model.multiomeclip import MultiomeCLIP
from cellprior.weights import WeightsError

from .data import N_CELLS, QUIET, cells, multiome, part

# two epochs are not meant to learn anything
pytestmark = pytest.mark.filterwarnings("ignore:After training:UserWarning")

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


# embedding


def test_the_embedding_is_float32_finite_and_tells_types_apart(trained, latent):
    kind = trained.adata.obs["type"].to_numpy()
    for z in latent.values():
        assert z.shape == (N_CELLS, 16) and z.dtype == np.float32 and np.isfinite(z).all()
        unit = z / np.linalg.norm(z, axis=1, keepdims=True)
        similar = unit @ unit.T
        same = kind[:, None] == kind[None]
        assert similar[same].mean() > similar[~same].mean() + 0.5


def test_centred_modalities_lie_together_and_joint_is_the_mean_of_both(trained, latent):
    np.testing.assert_allclose(latent["joint"], (latent["rna"] + latent["atac"]) / 2, **CLOSE)
    np.testing.assert_array_equal(trained.get_latent_representation(), latent["joint"])
    raw = {name: trained.get_latent_representation(modality=name, center=False) for name in ("rna", "atac")}
    for z in (*raw.values(), latent["rna"], latent["atac"]):
        np.testing.assert_allclose(np.linalg.norm(z, axis=1), np.ones(N_CELLS), rtol=1e-5)

    def share_of_other_modality(z: dict[str, np.ndarray]) -> float:
        points = np.concatenate([z["rna"], z["atac"]])
        near = np.argsort(-points @ points.T, axis=1)[:, 1:16]
        return float(((near >= N_CELLS) != (np.arange(2 * N_CELLS) >= N_CELLS)[:, None]).mean())

    assert share_of_other_modality(latent) > 0.3
    assert share_of_other_modality(latent) > share_of_other_modality(raw)


def test_batch_size_order_and_choice_of_cells_change_nothing(trained, latent):
    some = np.array([7, 3, 3, 150, 0])
    for size in (1, 7, 1000):
        found = trained.get_latent_representation(indices=some, batch_size=size)
        np.testing.assert_allclose(found, latent["joint"][some], **CLOSE)
    mask = np.zeros(N_CELLS, dtype=bool)
    mask[[2, 5]] = True
    np.testing.assert_allclose(
        trained.get_latent_representation(indices=mask), latent["joint"][mask], **CLOSE
    )
    assert trained.get_latent_representation(indices=[]).shape == (0, 16)


def test_cells_are_embedded_without_dropout_whatever_mode_the_network_is_in(trained, latent):
    trained.module.train()
    np.testing.assert_array_equal(trained.get_latent_representation(), latent["joint"])


def test_cells_in_another_order_in_each_modality_are_the_same_by_barcode(trained, latent, mdata):
    rng = np.random.default_rng(0)
    shuffled = multiome({name: part(mdata, name, rng.permutation(N_CELLS)) for name in ("rna", "atac")})
    found = trained.get_latent_representation(shuffled)
    order = [int(name.removeprefix("cell")) for name in shuffled.obs_names]
    np.testing.assert_allclose(found, latent["joint"][order], **CLOSE)


# queries


def test_an_rna_only_query_with_shuffled_and_missing_genes_is_embedded(trained, latent, mdata):
    rng = np.random.default_rng(1)
    query = part(mdata, "rna", rng.permutation(N_CELLS), rng.permutation(60)[:54])
    order = [int(name.removeprefix("cell")) for name in query.obs_names]
    report = trained.feature_match(query)
    assert list(report) == ["rna"] and report["rna"].n_matched == 54
    zeroed = mdata.mod["rna"].copy()
    zeroed.X = (zeroed.X.toarray() * zeroed.var_names.isin(query.var_names)).astype(np.float32)
    expected = trained.get_latent_representation(zeroed)[order]
    for asked in (query, multiome({"rna": query})):
        np.testing.assert_allclose(trained.get_latent_representation(asked), expected, **CLOSE)
        np.testing.assert_allclose(
            trained.get_latent_representation(asked, modality="rna"), expected, **CLOSE
        )
    correlation = [np.corrcoef(a, b)[0, 1] for a, b in zip(expected, latent["rna"][order], strict=True)]
    assert np.median(correlation) > 0.8


def test_an_atac_only_query_with_other_peaks_is_embedded(trained, latent, mdata):
    query = mdata.mod["atac"].copy()
    # called anew: other ends, another spelling, and some that the model does not have
    moved = [name.replace("chr", "").replace(":", "-").split("-") for name in query.var_names]
    query.var_names = [f"{c}-{int(s) + 60}-{int(e) + 40}" for c, s, e in moved]
    new = AnnData(np.ones((N_CELLS, 30), np.float32), obs=query.obs)
    new.var_names = [f"9-{i}000-{i}500" for i in range(1, 31)]
    wide = AnnData(
        sp.hstack([query.X, sp.csr_matrix(new.X)], format="csr"),
        obs=query.obs,
        var=pd.DataFrame(index=[*query.var_names, *new.var_names]),
    )
    report = trained.feature_match(wide)["atac"]
    assert report.routes == {"overlap": 240} and report.n_matched == 240
    assert report.counts_share == pytest.approx(60 / 90)
    np.testing.assert_allclose(trained.get_latent_representation(wide), latent["atac"], **CLOSE)


def test_a_multiome_with_unpaired_cells_is_trained_on_and_embedded_by_what_each_cell_has(mdata):
    rng = np.random.default_rng(2)
    order = rng.permutation(N_CELLS)
    lacks = {"rna": order[:24], "atac": order[24:48]}
    kept = {name: np.setdiff1d(np.arange(N_CELLS), rows) for name, rows in lacks.items()}
    ragged = multiome({name: part(mdata, name, rows) for name, rows in kept.items()})
    assert ragged.n_obs == N_CELLS
    found = {}
    for how, data in (("as it is", ragged), ("padded", pp.pad_modalities(ragged))):
        torch.manual_seed(0)
        MultiomeCLIP.setup_mudata(data)
        model = MultiomeCLIP(data, n_hidden=16, n_latent=8, n_components=(6, 8))
        model.train(max_epochs=2, batch_size=64, **QUIET)
        used = np.concatenate([model.train_indices, model.validation_indices])
        complete = np.flatnonzero(np.isin(data.obs_names, [f"cell{i}" for i in order[48:]]))
        np.testing.assert_array_equal(np.sort(used), complete)
        found[how] = pd.DataFrame(model.get_latent_representation(), index=data.obs_names)
        assert np.isfinite(found[how].to_numpy()).all()
        with pytest.warns(UserWarning, match="24 of 160 cells lack atac"):
            atac = pd.DataFrame(model.get_latent_representation(modality="atac"), index=data.obs_names)
        assert set(atac.index[atac.isna().any(axis=1)]) == {f"cell{i}" for i in lacks["atac"]}
        only = [f"cell{i}" for i in lacks["atac"]]
        rna = pd.DataFrame(model.get_latent_representation(data["rna"][only]), index=only)
        np.testing.assert_allclose(found[how].loc[only], rna.loc[only], **CLOSE)
        assert len(model.match()) == N_CELLS - 24
    padded = found["padded"].loc[found["as it is"].index]
    np.testing.assert_allclose(padded, found["as it is"], rtol=1e-3, atol=1e-4)


def test_a_real_cell_without_counts_is_no_missing_cell(trained, mdata):
    for name, row in (("atac", 3), ("rna", 5)):
        mdata.mod[name].X = mdata.mod[name].X.toarray()
        mdata.mod[name].X[row] = 0
    for modality in ("rna", "atac", "joint"):
        assert np.isfinite(trained.get_latent_representation(mdata, modality=modality)).all()


def test_attached_data_whose_columns_have_changed_are_matched_anew(trained, latent, tmp_path):
    trained.save_pretrained(tmp_path / "bundle")
    data = cells()
    model = MultiomeCLIP.from_pretrained(tmp_path / "bundle", data)
    order = np.random.default_rng(0).permutation(60)
    rna = data.mod["rna"]
    rna.X = rna.X[:, order]
    rna.var_names = rna.var_names[order]
    np.testing.assert_allclose(model.get_latent_representation(modality="rna"), latent["rna"], **CLOSE)


def test_queries_are_left_as_they_were(trained, mdata):
    before = cells()
    trained.get_latent_representation(mdata)
    trained.match(mdata)
    assert dict(mdata.uns) == dict(before.uns)
    pd.testing.assert_frame_equal(mdata.obs, before.obs)
    for name in ("rna", "atac"):
        assert (mdata.mod[name].X != before.mod[name].X).nnz == 0
        pd.testing.assert_frame_equal(mdata.mod[name].obs, before.mod[name].obs)
    assert len(type(trained)._per_instance_manager_store[trained.id]) == 1


# what it is for


def test_partners_are_found_within_batches(mdata):
    torch.manual_seed(0)
    MultiomeCLIP.setup_mudata(mdata, batch_key="batch")
    model = MultiomeCLIP(mdata, n_hidden=32, n_latent=16, n_components=(12, 20))
    model.train(max_epochs=5, batch_size=64, **QUIET)
    batch = mdata.obs["batch"]
    for method in ("transport", "greedy"):
        found = model.match(method=method)
        assert list(found.index) == list(mdata.obs_names)
        assert (batch.loc[found["partner"]].to_numpy() == batch.to_numpy()).all()
    assert found["partner"].is_unique
    few = part(mdata, "rna", np.arange(10))
    few.obs["batch"] = "b1"
    with pytest.warns(
        UserWarning, match=r"no partner: no cell with RNA is of their batch, obs\['batch'\] 'b0'"
    ):
        found = model.match(mdata, few, method="greedy")
    assert found["partner"].notna().sum() == 10 and found["partner"].isna()[batch == "b0"].all()


def test_batches_of_two_data_are_compared_by_value(trained, mdata, monkeypatch):
    monkeypatch.setitem(trained.registry["setup_args"], "batch_key", "run")
    rows = np.arange(40)
    atac, rna = part(mdata, "atac", rows), part(mdata, "rna", rows)
    atac.obs["run"] = rows % 2 + 1
    for kind in (float, str, "category", "Int64"):
        rna.obs["run"] = (pd.Series(rows % 2 + 1, index=rna.obs_names)).astype(kind)
        found = trained.match(atac, rna, method="greedy")["partner"]
        assert (atac.obs["run"].loc[found].to_numpy() == atac.obs["run"].to_numpy()).all()
    rna.obs["run"] = np.where(rows % 2, "s1", "s2")
    with pytest.raises(ValueError, match=r"40 of 40 cells with ATAC have no partner.*'1', '2'.*'s1', 's2'"):
        trained.match(atac, rna)
    rna.obs.loc[rna.obs_names[:6], "run"] = None
    with pytest.raises(ValueError, match=r"obs\['run'\] is missing \(NaN\) in 6 of 40 cells"):
        trained.match(atac, rna)


@pytest.mark.parametrize("kind", [str, "category", object, float, "boolean"])
def test_cells_noted_as_padding_are_padding_however_the_note_is_stored(trained, kind):
    data = cells()
    data.mod["atac"] = data.mod["atac"][:100].copy()
    padded = pp.pad_modalities(multiome(dict(data.mod)))
    expected = trained.get_latent_representation(padded)
    note = padded.obs["has_atac"]
    padded.obs["has_atac"] = note.astype(str).astype(kind) if kind == "category" else note.astype(kind)
    np.testing.assert_array_equal(trained.get_latent_representation(padded), expected)
    assert pp.pad_modalities(padded).obs["has_atac"].sum() == 100
    padded.obs["has_atac"] = note.astype(object).where(note, None)
    with pytest.raises(ValueError, match=r"mdata\.obs\['has_atac'\] is missing \(NaN\) in 60 of 160 cells"):
        trained.get_latent_representation(padded)


def test_counts_of_both_modalities_may_be_in_raw(trained, latent):
    data = cells()
    for adata in data.mod.values():
        adata.raw = adata.copy()
        adata.X = sp.csr_matrix(adata.X / 2).log1p()
    data = multiome({name: adata[:, ::2].copy() for name, adata in data.mod.items()}, data.obs)
    MultiomeCLIP.setup_mudata(data, rna_layer="raw", atac_layer="raw")
    model = MultiomeCLIP(data, n_hidden=32, n_latent=16, n_components=(12, 20))
    assert len(model.genes) == data["rna"].raw.n_vars and len(model.peaks) == data["atac"].raw.n_vars
    layers = {"rna_layer": "raw", "atac_layer": "raw"}
    before = dict(trained.registry["setup_args"])
    trained.registry["setup_args"] |= layers
    try:
        np.testing.assert_allclose(
            trained.get_latent_representation(data, modality="rna"), latent["rna"], **CLOSE
        )
        np.testing.assert_allclose(trained.get_latent_representation(data["atac"]), latent["atac"], **CLOSE)
    finally:
        trained.registry["setup_args"] |= before
    with pytest.raises(NotCountsError, match="adata.raw holds raw counts, name it: rna_layer='raw'"):
        trained.get_latent_representation(data)


def test_labels_are_transferred_across_modalities(trained, mdata):
    atac = mdata.mod["atac"]
    for found in (
        trained.transfer_labels(query=atac),
        trained.transfer_labels(trained.adata, atac, labels_key="type", n_neighbors=5),
        trained.transfer_labels(source="atac", target="rna"),
    ):
        assert (found["label"].to_numpy() == mdata.obs["type"].to_numpy()).mean() > 0.9
        assert found["score"].between(0.2, 1).all()
        assert list(found.index) == list(mdata.obs_names)


def test_a_modality_without_the_labels_of_its_mudata_is_told_to_be_passed_whole(trained, mdata):
    with pytest.raises(
        KeyError, match=r"an AnnData.*no column 'type'.*Pass the whole MuData.*mdata\.obs\['type'\]"
    ):
        trained.transfer_labels(mdata["rna"], labels_key="type")


def test_cells_without_a_label_do_not_vote(trained, mdata):
    mdata.obs["type"] = np.where(np.arange(N_CELLS) < 80, mdata.obs["type"].astype(str), "unknown")
    found = trained.transfer_labels(mdata, cells(seed=5))
    assert set(found["label"]) <= {f"type {i}" for i in range(4)}


@pytest.mark.parametrize("target", ["rna", "atac"])
def test_the_other_modality_is_predicted_as_a_mean_of_similar_cells(trained, target):
    new = cells(60, seed=9)
    given = {"rna": "atac", "atac": "rna"}[target]
    found = trained.predict_modality(new.mod[given], target=target, n_neighbors=12)
    assert found.shape == new.mod[target].shape and list(found.obs_names) == list(new.obs_names)
    truth = new.mod[target].X.toarray()
    truth = np.log1p(truth / truth.sum(axis=1, keepdims=True) * 1e4) if target == "rna" else truth > 0
    error = ((found.X.toarray() - truth) ** 2).mean()
    assert error < 0.8 * ((truth.mean(axis=0) - truth) ** 2).mean()


# saving


def test_a_saved_model_gives_the_same_embedding_with_data_or_without(trained, latent, mdata, tmp_path):
    trained.save(str(tmp_path / "model"), save_anndata=False)
    again = MultiomeCLIP.load(str(tmp_path / "model"), mdata)
    np.testing.assert_array_equal(again.get_latent_representation(), latent["joint"])
    without = MultiomeCLIP.load(str(tmp_path / "model"), False)
    np.testing.assert_array_equal(without.get_latent_representation(mdata), latent["joint"])
    assert without.adata is None
    with pytest.raises(ValueError, match="without data"):
        without.get_latent_representation()


@pytest.mark.parametrize("attached", [True, False])
def test_a_bundle_gives_the_same_embedding_and_can_be_trained_on(trained, latent, mdata, tmp_path, attached):
    trained.save_pretrained(tmp_path / "bundle", card="# card")
    model = MultiomeCLIP.from_pretrained(tmp_path / "bundle", mdata if attached else None)
    np.testing.assert_allclose(model.get_latent_representation(mdata), latent["joint"], **CLOSE)
    np.testing.assert_allclose(model.get_latent_representation(mdata.mod["atac"]), latent["atac"], **CLOSE)
    assert model.provenance()["model"] == "MultiomeCLIP"
    if attached:
        assert model.provenance()["atac_coverage"] == 1.0
        components = model.module.atac.components.clone()
        model.train(max_epochs=1, batch_size=64, **QUIET)
        torch.testing.assert_close(
            model.module.atac.components, components
        )  # the weights were learned on these
    else:
        model.save(str(tmp_path / "saved"))
        again = MultiomeCLIP.load(str(tmp_path / "saved"), False)
        np.testing.assert_allclose(again.get_latent_representation(mdata), latent["joint"], **CLOSE)


def test_the_bundle_of_another_model_is_refused(trained, tmp_path):
    trained.save_pretrained(tmp_path / "bundle")
    config = tmp_path / "bundle" / "config.json"
    config.write_text(config.read_text().replace('"MultiomeCLIP"', '"CellPLM"'))
    with pytest.raises(WeightsError, match="holds a CellPLM"):
        MultiomeCLIP.from_pretrained(tmp_path / "bundle")


# bad input


def test_an_untrained_model_does_not_embed(mdata):
    MultiomeCLIP.setup_mudata(mdata)
    with pytest.raises(RuntimeError, match="train"):
        MultiomeCLIP(mdata).get_latent_representation()


def test_a_missing_modality_is_named_with_those_that_there_are(trained, mdata):
    renamed = multiome({"gex": mdata.mod["rna"], "atac": mdata.mod["atac"]})
    with pytest.raises(ValueError, match=r"no modality 'rna'; it has \['gex', 'atac'\]"):
        MultiomeCLIP.setup_mudata(renamed)
    MultiomeCLIP.setup_mudata(renamed, modalities={"rna": "gex"})
    with pytest.raises(ValueError, match=r"keys \['rna_layer'\]"):
        MultiomeCLIP.setup_mudata(renamed, modalities={"rna_layer": "gex"})
    with pytest.raises(ValueError, match="'rna' \\(RNA\\) or 'atac' \\(ATAC\\) is needed"):
        trained.get_latent_representation(multiome({"prot": mdata.mod["rna"]}))


@pytest.mark.parametrize(("rna", "atac"), [("RNA", "atac"), ("rna", "ATAC"), ("Gene Expression", "atac")])
def test_a_modality_under_another_name_is_not_left_out_in_silence(trained, mdata, rna, atac):
    renamed = multiome({rna: mdata.mod["rna"], atac: mdata.mod["atac"]})
    name = atac if rna == "rna" else rna
    with pytest.raises(
        ValueError, match=f"one called '{name}', which would be left out. Name it: modalities="
    ):
        trained.get_latent_representation(renamed)


def test_other_modalities_are_named_where_one_is_missing_and_not_where_none_is(trained, latent, mdata):
    protein = mdata.mod["rna"].copy()
    protein.var_names = [f"protein {i}" for i in range(protein.n_vars)]
    with pytest.warns(UserWarning, match="no modality 'rna'; 'prot' is not read"):
        found = trained.get_latent_representation(multiome({"prot": protein, "atac": mdata.mod["atac"]}))
    np.testing.assert_allclose(found, latent["atac"], **CLOSE)
    both = multiome({**mdata.mod, "prot": protein})
    np.testing.assert_allclose(trained.get_latent_representation(both), latent["joint"], **CLOSE)


def test_modalities_that_share_features_are_refused(trained, mdata):
    with without_pulled_columns():
        mdata.mod["atac"].obs_names = [f"other {i}" for i in range(N_CELLS)]
        stacked = MuData({"rna": mdata.mod["rna"], "atac": mdata.mod["atac"]}, axis=1)
    for use in (MultiomeCLIP.setup_mudata, trained.get_latent_representation):
        with pytest.raises(ValueError, match="has axis=1: its modalities share features"):
            use(stacked)


def test_padding_of_a_modality_that_was_taken_out_has_no_partner(trained, mdata):
    ragged = multiome({"rna": mdata.mod["rna"], "atac": part(mdata, "atac", np.arange(20, N_CELLS))})
    padded = pp.pad_modalities(ragged)
    assert padded["atac"].n_obs == N_CELLS
    found = trained.match(padded["atac"], padded["rna"])
    assert set(found.index) == {f"cell{i}" for i in range(20, N_CELLS)}


@pytest.mark.parametrize("k", [0, -1, 2.5, True])
def test_a_number_of_neighbours_that_is_none_is_refused(trained, mdata, k):
    rna, atac = mdata.mod["rna"], mdata.mod["atac"]
    for use in (
        lambda: trained.transfer_labels(mdata, atac, labels_key="type", n_neighbors=k),
        lambda: trained.predict_modality(atac, rna, n_neighbors=k),
    ):
        with pytest.raises(ValueError, match=f"n_neighbors={k}; a whole number is needed, 1 or more"):
            use()


def test_sizes_of_minibatches_that_are_none_are_refused(mdata):
    MultiomeCLIP.setup_mudata(mdata)
    model = MultiomeCLIP(mdata, n_hidden=16, n_latent=8, n_components=(6, 8))
    for size in ({"micro_batch_size": 0}, {"batch_size": 0}, {"batch_size": 2.5}):
        with pytest.raises(ValueError, match="size=.*; a whole number is needed, 1 or more"):
            model.train(max_epochs=1, **size, **QUIET)
    with pytest.raises(TypeError, match=r"genes='CD3D' is one text; .* genes=\['CD3D'\]"):
        MultiomeCLIP(mdata, genes="CD3D")


def test_what_is_no_mudata_of_its_own_or_not_set_up_is_refused_with_what_to_do(mdata):
    with pytest.raises(
        TypeError, match=r"A MuData with RNA and ATAC is needed, found a AnnData.*mudata\.MuData\("
    ):
        MultiomeCLIP.setup_mudata(mdata.mod["rna"])
    with pytest.raises(ValueError, match="is a view of another.*mdata.copy"):
        MultiomeCLIP.setup_mudata(mdata[:50])
    for data in (mdata, mdata.mod["rna"]):
        with pytest.raises(ValueError, match=f"The {type(data).__name__} is not set up: call .*setup_mudata"):
            MultiomeCLIP(data)


def test_a_part_in_which_no_cell_has_a_modality_is_embedded_by_the_other(trained, latent, mdata):
    ragged = multiome({"rna": mdata.mod["rna"], "atac": part(mdata, "atac", np.arange(50, N_CELLS))})
    rows = ragged.obs_names.get_indexer(mdata.obs_names[:50])
    assert ragged[rows].mod["atac"].n_obs == 0
    np.testing.assert_allclose(trained.get_latent_representation(ragged[rows]), latent["rna"][:50], **CLOSE)


def test_swapped_modalities_are_refused(trained, mdata):
    swapped = multiome({"rna": mdata.mod["atac"], "atac": mdata.mod["rna"]})
    with pytest.raises(ValueError, match="should hold genes and holds peaks.*swapped"):
        MultiomeCLIP.setup_mudata(swapped)
    with pytest.raises(ValueError, match="should hold genes and holds peaks"):
        trained.get_latent_representation(swapped)
    with pytest.raises(PeakMatchError, match="and not the genes"):
        trained.get_latent_representation(multiome({"atac": mdata.mod["rna"]}))


@pytest.mark.parametrize("modality", ["rna", "atac"])
def test_normalised_values_are_refused_with_the_argument_that_names_a_layer(trained, mdata, modality):
    adata = mdata.mod[modality]
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.log1p()
    with pytest.raises(NotCountsError, match=f"{modality}_layer='counts'"):
        MultiomeCLIP.setup_mudata(mdata)
    with pytest.raises(NotCountsError, match=f"{modality}_layer='counts'"):
        trained.get_latent_representation(mdata)
    MultiomeCLIP.setup_mudata(mdata, **{f"{modality}_layer": "counts"})


def test_normalised_real_data_are_refused(shared_data):
    import mudata as md

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # mudata announces other defaults
        mdata = md.read_h5mu(shared_data / "multiome" / "scicar_a549_2641.h5mu")
    with pytest.raises(NotCountsError, match="does not hold raw counts"):
        MultiomeCLIP.setup_mudata(mdata)


def test_no_common_barcode_is_refused_with_examples(mdata):
    other = mdata.mod["atac"].copy()
    other.obs_names = [f"{name}-1" for name in other.obs_names]
    with pytest.raises(ValueError, match=r"No cell has both modalities.*\['cell0'\].*\['cell0-1'\]"):
        MultiomeCLIP.setup_mudata(multiome({"rna": mdata.mod["rna"], "atac": other}))


def test_a_barcode_that_stands_for_two_cells_is_refused(trained, mdata):
    query = mdata.mod["rna"].copy()
    query.obs_names = ["same"] * N_CELLS
    with pytest.raises(ValueError, match="'same' stands for several cells"):
        trained.get_latent_representation(query)


def test_one_cell_is_embedded_and_not_trained_on(trained, latent, mdata):
    one = multiome({name: part(mdata, name, np.array([3])) for name in ("rna", "atac")})
    np.testing.assert_allclose(trained.get_latent_representation(one), latent["joint"][3:4], **CLOSE)
    MultiomeCLIP.setup_mudata(one)
    model = MultiomeCLIP(one)
    with pytest.raises(ValueError, match="1 cells have both modalities.*two at least"):
        model.train(**QUIET)


def test_no_peaks_in_common_are_an_error_that_says_what_to_do(trained, mdata):
    query = mdata.mod["atac"].copy()
    query.var_names = [f"chr17:{i}-{i + 5}" for i in range(0, 2400, 10)]
    with pytest.raises(PeakMatchError, match="no chromosome in common"):
        trained.get_latent_representation(query)


def test_unknown_columns_layers_and_choices_are_errors_that_name_them(trained, mdata):
    with pytest.raises(KeyError, match="'sample' not found"):
        MultiomeCLIP.setup_mudata(mdata, batch_key="sample")
    with pytest.raises(ValueError, match="no layer 'raw'"):
        MultiomeCLIP.setup_mudata(mdata, rna_layer="raw")
    mdata.obs["batch"] = mdata.obs["batch"].where(np.arange(N_CELLS) > 0)
    with pytest.raises(ValueError, match=r"missing \(NaN\) in 1 of [0-9]+ cells, the first 'cell0'"):
        MultiomeCLIP.setup_mudata(mdata, batch_key="batch")
    with pytest.raises(ValueError, match='choose "rna", "atac" or "joint"'):
        trained.get_latent_representation(modality="protein")
    with pytest.raises(ValueError, match="have rna only"):
        trained.get_latent_representation(mdata.mod["rna"], modality="atac")
    with pytest.raises(ValueError, match='choose "transport" or "greedy"'):
        trained.match(method="best")
    with pytest.raises(ValueError, match="No cell of the data has ATAC"):
        trained.match(mdata.mod["rna"])
    with pytest.raises(TypeError, match="found a DataFrame"):
        trained.get_latent_representation(pd.DataFrame())
    with pytest.raises(NotImplementedError, match="setup_mudata"):
        MultiomeCLIP.setup_anndata(mdata.mod["rna"])
    with pytest.raises(ValueError, match="pass genes= and peaks="):
        MultiomeCLIP()


def test_peaks_named_by_columns_are_found_in_queries_named_by_place(mdata):
    atac = mdata.mod["atac"].copy()
    parts = [name.replace(":", "-").split("-") for name in atac.var_names]
    for i, column in enumerate(("chrom", "chromStart", "chromEnd")):
        atac.var[column] = [p[i] for p in parts]
    atac.var_names = [f"peak{i}x" for i in range(atac.n_vars)]
    named = multiome({"rna": mdata.mod["rna"].copy(), "atac": atac})
    MultiomeCLIP.setup_mudata(named)
    model = MultiomeCLIP(named)
    assert model.peaks == list(mdata.mod["atac"].var_names)
    assert model.feature_match(mdata.mod["atac"])["atac"].routes == {"interval": 240}


@pytest.mark.parametrize("method", ["fine_tune", "predict"])
def test_labels_are_transferred_and_not_learned(trained, method):
    with pytest.raises(NotImplementedError, match="MultiomeCLIP does not learn labels: .* transfer_labels"):
        getattr(trained, method)()
