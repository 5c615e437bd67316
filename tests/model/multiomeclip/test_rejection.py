"""`transfer_labels` can say "unknown", at a rate that held-out cells give."""

from __future__ import annotations

import numpy as np
import pytest

from cellprior.model.multiomeclip import MultiomeCLIP, _matching

from .data import N_CELLS, cells, multiome, part


def rates(found, truth) -> tuple[float, float]:
    """Share of cells that are called unknown, and of the others the share that has a wrong name."""
    label, truth = found["label"].to_numpy(), np.asarray(truth).astype(str)
    named = label != "unknown"
    return float(1 - named.mean()), float((label != truth)[named].mean())


@pytest.mark.parametrize(("source", "target"), [("rna", "atac"), ("atac", "rna"), ("rna", "rna")])
def test_known_cells_are_named_and_few_of_them_wrongly(trained, source, target):
    query = cells(500, seed=5)
    options = {"source": source, "target": target}
    every = trained.transfer_labels(query=query, **options)
    some = trained.transfer_labels(query=query, reject=0.2, **options)
    unknown, wrong = rates(some, query.obs["type"])
    assert 0.02 < unknown < 0.4 and wrong < 0.1
    # calibration cells no longer vote, so that few names may differ
    named = (some["label"] != "unknown").to_numpy()
    assert (some["label"] == every["label"])[named].mean() > 0.95
    assert list(some.index) == list(query.obs_names)


def test_cells_unlike_those_of_the_reference_are_unknown(trained):
    query = cells(200, seed=5)
    rng = np.random.default_rng(0)
    for adata in query.mod.values():  # of no type: as many counts, anywhere
        adata.X = rng.multinomial(60, np.full(adata.n_vars, 1 / adata.n_vars), adata.n_obs).astype(np.float32)
    with pytest.warns(
        UserWarning, match=r"of 200 cells are called 'unknown'.* too far from every type"
    ) as said:
        found = trained.transfer_labels(query=query, reject=0.2)
    assert "reject promises does not hold" in str(said[0].message)
    assert "unknown" not in set(found["best_guess"])
    assert "best_guess" not in trained.transfer_labels(query=query)
    assert set(found["label"][found["label"] != found["best_guess"]]) == {"unknown"}
    strange = (found["label"] == "unknown").mean()  # perhaps all
    known, _ = rates(trained.transfer_labels(query=cells(200, seed=6), reject=0.2), query.obs["type"])
    assert strange > known + 0.4


def test_only_cells_that_the_model_was_not_trained_on_are_calibrated_on(trained, monkeypatch):
    asked = []
    original = _matching._held_out

    def held_out(*args):
        asked.append(original(*args))
        return asked[-1]

    monkeypatch.setattr(_matching, "_held_out", held_out)
    for reference in (None, trained.adata):
        trained.transfer_labels(reference, reject=0.2)
        np.testing.assert_array_equal(asked[-1], np.sort(trained.validation_indices))
    new = cells(300, seed=7)
    new.obs["type"] = np.where(np.arange(300) < 200, new.obs["type"].astype(str), "unknown")
    trained.transfer_labels(new, reject=0.2)
    assert len(asked[-1]) == 40 and asked[-1].max() < 200


def test_held_out_cells_of_a_loaded_model_are_known_by_name_in_whatever_order(trained, tmp_path):
    trained.save_pretrained(tmp_path / "bundle")
    loaded = MultiomeCLIP.from_pretrained(tmp_path / "bundle")
    order = np.random.default_rng(0).permutation(N_CELLS)
    again = multiome({name: adata[order].copy() for name, adata in cells().mod.items()})
    rows = _matching._held_out(loaded, again, loaded._cells(again), np.ones(again.n_obs, dtype=bool))
    held_out = trained.adata.obs_names[trained.validation_indices]
    assert set(again.obs_names[rows]) == set(held_out)


def test_a_reference_of_its_own_serves_a_model_that_was_loaded(trained, tmp_path):
    trained.save_pretrained(tmp_path / "bundle")
    model = MultiomeCLIP.from_pretrained(tmp_path / "bundle")
    reference, query = cells(400, seed=7), cells(300, seed=8)
    found = model.transfer_labels(reference, query, labels_key="type", reject=0.1)
    unknown, wrong = rates(found, query.obs["type"])
    assert unknown < 0.3 and wrong < 0.1
    again = model.transfer_labels(reference, query, labels_key="type", reject=0.1)
    assert found.equals(again)


def test_labels_that_mean_nothing_end_in_unknown_and_a_warning(trained):
    reference = cells(400, seed=7)
    rng = np.random.default_rng(0)
    reference.obs["type"] = rng.permutation(reference.obs["type"].astype(str))
    with pytest.warns(UserWarning, match="all cells are called unknown"):
        found = trained.transfer_labels(reference, cells(50, seed=8), reject=0.2)
    assert (found["label"] == "unknown").all()


def test_a_rate_that_cannot_be_promised_is_refused(trained):
    for reject in (0, 1, -0.1, 2):
        with pytest.raises(ValueError, match="a share between 0 and 1 is needed"):
            trained.transfer_labels(reject=reject)
    with pytest.raises(ValueError, match="from 232 calibration cells on; there are 32"):
        trained.transfer_labels(reject=0.01)
    rna = part(cells(200, seed=7), "rna", np.arange(200))
    rna.obs["type"] = "one"
    with pytest.raises(ValueError, match="there are 0. These are .* with a label and both modalities"):
        trained.transfer_labels(rna, cells(9), reject=0.1)
