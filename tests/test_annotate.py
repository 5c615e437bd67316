"""`tl.annotate` and `cellprior annotate`: what the model class does, in one call."""

from __future__ import annotations

from typing import Any

import anndata as ad
import numpy as np
import pytest
import scvi
import torch
from anndata import AnnData

import cellprior as cp
from cellprior.cli import main
from cellprior.model import CellPLM
from cellprior.model.learning._annotation import labels_of
from tests.contract.models import blood_cells, tiny_scbert

STARTER, KEY = "cellplm-starter", "cellplm_label"
QUICK: dict[str, Any] = {"max_epochs": 10, "enable_progress_bar": False}


@pytest.fixture(autouse=True)
def offline_and_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLPRIOR_OFFLINE", "1")
    scvi.settings.seed = 0


@pytest.fixture
def reference() -> AnnData:
    return blood_cells()[:500].copy()


@pytest.fixture
def query() -> AnnData:
    query = blood_cells()[500:].copy()
    query = query[:, ::-1].copy()  # genes in another order
    query.obs["truth"] = query.obs.pop("bulk_labels")
    return query


def test_the_names_are_those_of_the_model_class_and_their_origin_is_noted(reference, query):
    setup = {"batch_key": "batch"}
    by_hand = reference.copy()
    CellPLM.setup_anndata(by_hand, **setup, labels_key="bulk_labels")
    model = CellPLM.from_pretrained(STARTER, by_hand)
    model.fine_tune(**QUICK)
    scvi.settings.seed = 0
    columns = list(query.obs)
    assert cp.tl.annotate(query, STARTER, reference, "bulk_labels", **setup, **QUICK) is None
    np.testing.assert_array_equal(query.obs[KEY], model.predict(query))
    probability = model.predict(query, soft=True).max(axis=1)
    np.testing.assert_allclose(query.obs[f"{KEY}_probability"], probability, rtol=1e-5)
    assert (query.obs[KEY].astype(str) == query.obs["truth"].astype(str)).mean() > 0.6
    added = [name for name in query.obs if name not in columns]
    assert added == [KEY, f"{KEY}_probability"]
    record = query.uns["cellprior"][KEY]
    coverage = model.gene_match.coverage
    assert (record["model"], record["weights"], record["coverage"]) == ("CellPLM", STARTER, coverage)
    assert record["params"] == {
        "batch_key": "batch",
        "min_coverage": 0.25,
        "labels_key": "bulk_labels",
        **QUICK,
    }
    assert "cellprior" not in reference.uns and KEY not in reference.obs
    left = [
        name for data in (query, reference) for name in (*data.uns, *data.obs) if name.startswith("_scvi")
    ]
    assert left == []  # the setup was for a while


def test_weights_that_have_learned_the_labels_need_no_reference(reference, query, tmp_path):
    cp.tl.annotate(query, STARTER, reference, "bulk_labels", save=tmp_path / "taught", **QUICK)
    later = query.copy()
    del later.obs[KEY]
    cp.tl.annotate(later, tmp_path / "taught", key_added="name")
    np.testing.assert_array_equal(later.obs["name"], query.obs[KEY])
    assert list(later.uns["cellprior"]) == [KEY, "name"]


def test_a_cell_can_be_called_unknown_and_the_file_can_be_written(reference, query, tmp_path):
    seen = reference[reference.obs["bulk_labels"] != "CD19+ B"].copy()
    copy = cp.tl.annotate(
        query, STARTER, seen, "bulk_labels", reject=0.3, copy=True, **{**QUICK, "max_epochs": 40}
    )
    assert copy is not None
    assert KEY not in query.obs
    copy.write_h5ad(tmp_path / "named.h5ad")
    named = ad.read_h5ad(tmp_path / "named.h5ad")
    unknown = named.obs[KEY] == "unknown"
    is_b = named.obs["truth"] == "CD19+ B"
    assert unknown[is_b].mean() > 0.5 > unknown[~is_b].mean()
    assert named.uns["cellprior"][KEY]["params"]["reject"] == 0.3
    assert sum(named.uns["cellprior"][KEY]["unknown"].values()) == unknown.sum()
    guess = named.obs[f"{KEY}_best_guess"].astype(str)
    assert "unknown" not in set(guess)
    assert (guess == named.obs[KEY].astype(str)).equals(~unknown)


@pytest.mark.parametrize("by", ["python", "command line"])
def test_the_word_for_no_label_can_be_said_and_its_spelling_is_warned_of(
    by, reference, query, tmp_path, monkeypatch
):
    learned = []

    def learn(self: CellPLM, key: str, **options: Any) -> None:
        learned.append(labels_of(self, key))
        raise RuntimeError("no labels to give")

    monkeypatch.setattr(CellPLM, "fine_tune", learn)
    reference.obs["label"] = reference.obs["bulk_labels"].astype(str)
    reference.obs.loc[reference.obs_names[:90], "label"] = "Unknown"

    def annotate(**options: Any) -> None:
        if by == "python":
            cp.tl.annotate(query, STARTER, reference, "label", **options)
            return
        reference.write_h5ad(tmp_path / "reference.h5ad")
        query.write_h5ad(tmp_path / "query.h5ad")
        paths = [str(tmp_path / name) for name in ("query.h5ad", "out.h5ad", "reference.h5ad")]
        said = [arg for value in options.values() for arg in ("--unlabeled", value)]
        names = ["--weights", STARTER, "--reference", paths[2], "--labels", "label", *said]
        assert main(["annotate", *paths[:2], *names]) == 1
        raise RuntimeError("no labels to give")

    with pytest.warns(UserWarning, match="has the label 'Unknown'.*unlabeled_category='Unknown'"):
        with pytest.raises(RuntimeError, match="no labels to give"):
            annotate()
    with pytest.raises(RuntimeError, match="no labels to give"):
        annotate(unlabeled_category="Unknown")
    labels, code = learned[1]
    assert "Unknown" in learned[0][0] and "Unknown" not in labels
    assert (code[:90] == -1).all() and (code[90:] >= 0).all()


def test_a_reference_may_hold_counts_and_batches_in_other_places_than_the_query(reference, query, tmp_path):
    learn = {"max_epochs": 2, "trainable": "head", "enable_progress_bar": False}
    same = query.copy()
    cp.tl.annotate(same, STARTER, reference, "bulk_labels", batch_key="batch", **learn)
    query.raw = query.copy()
    query.X = np.log1p(query.X)
    query.obs["lane"] = query.obs.pop("batch")
    for place, move in (("X", None), ("counts", "layers")):
        other = reference.copy()
        if move:
            other.layers["counts"] = other.X
            other.X = np.log1p(other.X)
        columns, x = list(other.obs), other.X
        scvi.settings.seed = 0
        cp.tl.annotate(
            query,
            STARTER,
            other,
            "bulk_labels",
            layer="raw",
            batch_key="lane",
            reference_layer=place,
            reference_batch_key="batch",
            **learn,
        )
        np.testing.assert_array_equal(query.obs[f"{KEY}_probability"], same.obs[f"{KEY}_probability"])
        assert list(other.obs) == columns and other.X is x and not other.uns.get("_scvi_uuid")
    with pytest.raises(
        ValueError, match=r"no counts in 'raw', where those of the query are.*=\"X\" or .*=\"counts\""
    ):
        cp.tl.annotate(query, STARTER, other, "bulk_labels", layer="raw")
    with pytest.raises(KeyError, match="lane.* not found in obs of the reference.*reference_batch_key="):
        cp.tl.annotate(
            query, STARTER, other, "bulk_labels", layer="raw", batch_key="lane", reference_layer="X"
        )
    with pytest.raises(ValueError, match="name the query's column of batches too"):
        cp.tl.annotate(
            query,
            STARTER,
            other,
            "bulk_labels",
            layer="raw",
            reference_layer="X",
            reference_batch_key="batch",
        )
    with pytest.raises(ValueError, match="reference_layer: nothing is learned without reference="):
        cp.tl.annotate(query, STARTER, reference_layer="X")
    # on the command line
    query.write_h5ad(tmp_path / "query.h5ad")
    other.write_h5ad(tmp_path / "reference.h5ad")
    paths = [str(tmp_path / name) for name in ("query.h5ad", "out.h5ad")]
    there = [
        "--layer",
        "raw",
        "--reference-layer",
        "counts",
        "--batch-key",
        "lane",
        "--reference-batch-key",
        "batch",
    ]
    names = ["--reference", str(tmp_path / "reference.h5ad"), "--labels-key", "bulk_labels"]
    scvi.settings.seed = 0
    short = ["--max-epochs", "2", "--trainable", "head", "-q"]
    assert main(["annotate", *paths, "--weights", STARTER, *names, *there, *short]) == 0
    np.testing.assert_array_equal(ad.read_h5ad(paths[1]).obs[KEY], query.obs[KEY])


def test_what_makes_no_sense_is_refused_and_nothing_is_written(reference, query, tmp_path):
    before = list(query.obs)
    for arguments, error, message in (
        ((STARTER, reference), ValueError, "needed together"),
        ((STARTER, None, "bulk_labels"), ValueError, "needed together"),
        ((tiny_scbert(),), RuntimeError, "no labels to give"),
        ((STARTER, reference, "nope"), KeyError, "'nope' not found in adata.obs"),
    ):
        with pytest.raises(error, match=message):
            cp.tl.annotate(query, *arguments)
    with pytest.raises(ValueError, match=r"max_epochs, save: nothing is learned without reference="):
        cp.tl.annotate(query, STARTER, max_epochs=3, save="folder")
    with pytest.raises(FileExistsError, match="is there already: choose another folder"):
        cp.tl.annotate(query, STARTER, reference, "bulk_labels", save=tmp_path)
    assert [name for name in query.obs if not name.startswith("_scvi")] == before
    assert "cellprior" not in query.uns


def test_what_cannot_be_named_is_said_before_anything_is_learned(reference, query, monkeypatch):
    def learn(*args: Any, **kwargs: Any) -> None:
        pytest.fail("The model began to learn.")

    before = list(query.obs)
    monkeypatch.setattr(CellPLM, "fine_tune", learn)
    with pytest.raises(ValueError, match="reject=2"):
        cp.tl.annotate(query, STARTER, reference, "bulk_labels", reject=2)
    query.var_names = [f"locus{i}" for i in range(query.n_vars)]
    with pytest.raises(cp.genes.GeneMatchError):
        cp.tl.annotate(query, STARTER, reference, "bulk_labels")
    assert [name for name in query.obs if not name.startswith("_scvi")] == before
    assert "cellprior" not in query.uns


def test_what_was_learned_is_saved_even_if_naming_fails(reference, query, tmp_path):
    with pytest.raises(ValueError, match=r"reject=0\.001 can be promised from"):
        cp.tl.annotate(
            query, STARTER, reference, "bulk_labels", reject=0.001, save=tmp_path / "taught", **QUICK
        )
    cp.tl.annotate(query, tmp_path / "taught")
    assert KEY in query.obs


# on the command line


def test_annotate_writes_names_and_says_how_many_cells_have_each(reference, query, tmp_path, capsys):
    reference.write_h5ad(tmp_path / "reference.h5ad")
    query.write_h5ad(tmp_path / "query.h5ad")
    paths = [str(tmp_path / name) for name in ("query.h5ad", "named.h5ad")]
    taught = str(tmp_path / "taught")
    learn = [
        "--reference",
        str(tmp_path / "reference.h5ad"),
        "--labels-key",
        "bulk_labels",
        "--max-epochs",
        "5",
    ]
    assert (
        main(["annotate", *paths, "--weights", STARTER, *learn, "--trainable", "head", "--save", taught]) == 0
    )
    printed = capsys.readouterr().out
    named = ad.read_h5ad(paths[1])
    assert f"obs['{KEY}'], 200 cells" in printed
    for name, n in named.obs[KEY].value_counts().items():
        assert f"{name:40} {n:8,}" in printed
    assert main(["annotate", *paths, "--weights", taught, "--key-added", "again", "--overwrite"]) == 0
    np.testing.assert_array_equal(ad.read_h5ad(paths[1]).obs["again"], named.obs[KEY])


def test_annotate_without_anything_to_learn_from_says_so(query, tmp_path, capsys):
    query.write_h5ad(tmp_path / "query.h5ad")
    paths = [str(tmp_path / name) for name in ("query.h5ad", "named.h5ad")]
    assert main(["annotate", *paths, "--weights", tiny_scbert()]) == 1
    assert "cellprior annotate: The model has no labels to give" in capsys.readouterr().err
    assert not (tmp_path / "named.h5ad").exists()


COARSE = {
    "CD4+/CD25 T Reg": "T cell",
    "CD4+/CD45RA+/CD25- Naive T": "T cell",
    "CD4+/CD45RO+ Memory": "T cell",
    "CD8+ Cytotoxic T": "T cell",
    "CD8+/CD45RA+ Naive Cytotoxic": "T cell",
    "CD19+ B": "B cell",
    "CD14+ Monocyte": "myeloid cell",
    "Dendritic": "myeloid cell",
    "CD56+ NK": "innate lymphoid cell",
}


def test_the_starter_names_blood_without_a_reference_and_knows_the_ontology(query, tmp_path):
    query.write_h5ad(tmp_path / "cells.h5ad")
    cp.tl.annotate(query, STARTER)
    coarse = query.obs[f"{KEY}_coarse"].astype(str)
    right = query.obs["truth"].astype(str).map(COARSE)
    asked = right.notna()
    named = coarse[asked] != "unknown"
    assert named.mean() > 0.7
    assert (coarse[asked] == right[asked])[named].mean() > 0.9
    fine, ids = query.obs[KEY].astype(str), query.obs[f"{KEY}_ontology_term_id"].astype(str)
    assert ((ids == "") == (fine == "unknown")).all()
    assert set(ids[fine == "B cell"]) == {"CL:0000236"}
    assert "none of these" not in {*fine, *query.obs[f"{KEY}_best_guess"]}
    record = query.uns["cellprior"][KEY]
    assert record["params"]["reject"] == CellPLM.from_pretrained(STARTER).annotation_["reject"]
    # on the command line, and with every cell named
    assert (
        main(["annotate", *(str(tmp_path / x) for x in ("cells.h5ad", "out.h5ad")), "--weights", STARTER])
        == 0
    )
    assert (ad.read_h5ad(tmp_path / "out.h5ad").obs[KEY].astype(str) == fine).all()
    cp.tl.annotate(query, STARTER, reject=None)
    assert "unknown" not in {*query.obs[KEY], *query.obs[f"{KEY}_coarse"]}


def test_cells_of_no_type_that_the_weights_name_are_unknown_and_no_best_guess_says_so(query, tmp_path):
    model = CellPLM.from_pretrained(STARTER)
    none = model.annotation_["labels"].index(model.annotation_["none"])
    with torch.no_grad():
        model.module.annotation.linear.bias[none] += 20.0
    model.save_pretrained(tmp_path / "weights")
    with pytest.warns(UserWarning, match="cells are called 'nothing'") as said:
        cp.tl.annotate(query, tmp_path / "weights", unlabeled_category="nothing")
    assert set(query.obs[KEY]) == set(query.obs[f"{KEY}_coarse"]) == {"nothing"}
    assert {warning.filename for warning in said if "are called" in str(warning.message)} == {__file__}
    assert set(query.obs[f"{KEY}_ontology_term_id"]) == {""}
    assert query.obs[f"{KEY}_probability"].max() < 0.01
    assert "none of these" not in set(query.obs[f"{KEY}_best_guess"])


def test_a_reject_that_is_neither_a_share_nor_stored_is_refused(query):
    with pytest.raises(
        ValueError, match='a share between 0 and 1 is needed, such as 0.1, or None, or "stored"'
    ):
        cp.tl.annotate(query, STARTER, reject="high")
