"""What every model promises, run for each model of `models.py`."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from functools import cache
from itertools import cycle, product
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData

import cellprior as cp
from cellprior.genes import GeneMatchError
from cellprior.model import NotCountsError
from cellprior.model._base import PretrainedModel

from .models import PRETRAINED, TAUGHT, Entry, WithPeaks
from .shared import FORMATS, NOT_COUNTS, Bomb, fingerprint, no_network  # noqa: F401  a fixture for every test

# what Nicheformer says of data that are set up without a word
pytestmark = pytest.mark.filterwarnings("ignore:No assay is named:UserWarning")

ROOT = Path(__file__).parents[2]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SOME = np.array([5, 3, 3, 699, 0, 100, 101, 102, 5])  # unsorted and repeated


@pytest.fixture(params=PRETRAINED, ids=lambda entry: entry.name)
def entry(request: pytest.FixtureRequest) -> Entry:
    return request.param


also_taught = pytest.mark.parametrize(
    "entry", [*PRETRAINED, *TAUGHT], ids=lambda entry: entry.name, indirect=True
)
"""For what training can change: the network, its head and what is saved of both; not how counts and genes are read."""


@cache
def _model(entry: Entry) -> PretrainedModel:
    return entry.attach(entry.make_data())


@cache
def _reference(entry: Entry) -> np.ndarray:
    return _model(entry).get_latent_representation()


@pytest.fixture
def model(entry: Entry) -> PretrainedModel:
    """The pretrained model with its data attached; shared by all tests, which leave it as it is."""
    return _model(entry)


@pytest.fixture
def reference(entry: Entry) -> np.ndarray:
    """Embedding of the entry's data as they are."""
    return _reference(entry)


@also_taught
def test_the_embedding_is_float32_finite_and_tells_cells_apart(model, reference):
    assert reference.dtype == np.float32
    assert reference.shape == (model.adata.n_obs, model.module.n_latent)
    assert np.isfinite(reference).all()
    assert len(np.unique(reference.round(3), axis=0)) == len(reference)


# 1. formats


# All formats for one model: how a matrix is read is the same code in all. Of the others, one of each kind of reading.
READINGS = [(PRETRAINED[0], how) for how in FORMATS] + [
    (entry, how) for entry in PRETRAINED[1:] for how in ("csc", "dense F float32", "backed csr", "dask csr")
]


@pytest.mark.parametrize(
    ("entry", "how"),
    READINGS,
    ids=[f"{entry.name}-{how}" for entry, how in READINGS],
    indirect=["entry"],
)
def test_any_format_of_the_matrix_gives_the_same_embedding(entry, model, reference, tmp_path, how):
    place, convert = FORMATS[how]
    adata = entry.make_data()
    formatted = place(adata, tmp_path, convert(adata.X))
    attached = entry.attach(formatted)
    np.testing.assert_allclose(attached.get_latent_representation(), reference, **CLOSE)
    np.testing.assert_allclose(
        attached.get_latent_representation(indices=SOME, batch_size=4),
        model.get_latent_representation(indices=SOME),
        **CLOSE,
    )
    attached.release()


@pytest.mark.parametrize("how", ["csc_array", "backed view", "dask csr"])
def test_any_format_can_be_a_query(entry, model, reference, tmp_path, how):
    place, convert = FORMATS[how]
    adata = entry.make_data()
    query = place(adata, tmp_path, convert(adata.X))
    np.testing.assert_allclose(model.get_latent_representation(query), reference, **CLOSE)


def test_an_embedding_that_is_written_as_it_is_made_is_the_one_in_memory(entry, reference, tmp_path):
    """No option is given there: each has the same default in the encoder."""
    cp.tl.embed(entry.make_data(), entry.weights, out=tmp_path / "out.zarr", progress=False)
    found = ad.read_zarr(tmp_path / "out.zarr").obsm[entry.model.obsm_key]
    np.testing.assert_allclose(found, reference, **CLOSE)


def test_counts_in_a_layer_are_as_good_as_in_x(entry, reference):
    adata = entry.make_data()
    adata.layers["counts"], adata.X = adata.X, adata.layers["log"]
    np.testing.assert_allclose(entry.embed(adata, setup={"layer": "counts"}), reference, **CLOSE)


# 2. batch size and order


@also_taught
@pytest.mark.parametrize("setup", [{}, {"batch_key": "batch"}], ids=["one group", "two batches"])
def test_the_embedding_does_not_depend_on_the_batch_size(entry, setup):
    model = entry.attach(entry.make_data(), **setup)
    reference = model.get_latent_representation()
    for batch_size in (1, 7, 1000):
        latent = model.get_latent_representation(batch_size=batch_size)
        np.testing.assert_allclose(latent, reference, **CLOSE)
    model.release()


def test_the_embedding_of_2000_real_cells_does_not_depend_on_the_batch_size(entry, shared_data):
    model = entry.attach(ad.read_h5ad(shared_data / "rna" / "pbmc3k_seurat.h5ad")[:2000].copy())
    reference = model.get_latent_representation()
    for batch_size in (1, 7, 1000):
        latent = model.get_latent_representation(batch_size=batch_size)
        np.testing.assert_allclose(latent, reference, **CLOSE)
    model.release()


@also_taught
@pytest.mark.parametrize("setup", [{}, {"batch_key": "batch"}], ids=["one group", "two batches"])
def test_cells_in_another_order_have_the_same_embedding(entry, setup):
    adata = entry.make_data()
    order = np.random.default_rng(0).permutation(adata.n_obs)
    latent = entry.embed(adata[order].copy(), setup=setup, batch_size=64)
    reference = entry.embed(adata, setup=setup)
    np.testing.assert_allclose(latent, reference[order], **CLOSE)


# 3. genes


def with_genes(adata: AnnData, names: Any, x: Any = None) -> AnnData:
    return AnnData(adata.X if x is None else x, obs=adata.obs.copy(), var=pd.DataFrame(index=pd.Index(names)))


def shuffled(adata: AnnData) -> AnnData:
    return adata[:, np.random.default_rng(0).permutation(adata.n_vars)].copy()


def with_unknown_genes(adata: AnnData) -> AnnData:
    unknown = sp.random(adata.n_obs, 100, 0.3, "csr", random_state=np.random.default_rng(0)).ceil() * 5
    names = [*adata.var_names, *(f"FOREIGN{i}" for i in range(100))]
    return with_genes(adata, names, sp.hstack([adata.X, unknown], "csr"))


def with_repeated_names(adata: AnnData) -> AnnData:
    """Every count above one is divided between two columns of the same name."""
    part = adata.X.copy()
    part.data = np.floor(part.data / 2)
    return with_genes(adata, [*adata.var_names] * 2, sp.hstack([part, adata.X - part], "csr"))


@pytest.mark.filterwarnings("ignore:Variable names are not unique:UserWarning")
@pytest.mark.filterwarnings("ignore:var_names are not unique:UserWarning")
@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.reset_index")  # mudata, of such names
@pytest.mark.parametrize("change", [shuffled, with_unknown_genes, with_repeated_names])
def test_genes_are_found_wherever_they_are(entry, model, reference, change):
    changed = change(entry.make_data())
    np.testing.assert_allclose(entry.embed(changed), reference, **CLOSE)
    np.testing.assert_allclose(model.get_latent_representation(changed), reference, **CLOSE)


def test_a_gene_that_is_missing_counts_as_zero_or_as_the_weights_say(entry):
    adata = entry.make_data()
    missing = np.arange(adata.n_vars) % 4 == 0
    zeroed = adata.copy()
    zeroed.X = sp.csr_matrix(zeroed.X.multiply(~missing))
    without, as_zero = entry.embed(adata[:, ~missing].copy()), entry.embed(zeroed)
    if getattr(entry.attach(adata.copy()), "_network", dict)().get("absent") == "average":
        # weights that know an average cell say so: there a gene that is missing is not a count of 0
        assert np.abs(without - as_zero).max() > 1e-3
        return
    np.testing.assert_allclose(without, as_zero, **CLOSE)


def symbols(genes: pd.DataFrame) -> pd.Series:
    return genes["symbol"]


def ids(genes: pd.DataFrame) -> pd.Series:
    return genes["ensembl_id"]


def ids_with_version(genes: pd.DataFrame) -> pd.Series:
    return genes["ensembl_id"] + ".7"


def retired_symbols(genes: pd.DataFrame) -> pd.Series:
    """The first former symbol of each gene, unless it has none or shares it with another."""
    former = genes["previous_symbols"].str.split("|")
    every = pd.concat([genes["symbol"], former.explode()])
    first = former.str[0]
    return first.where((first != "") & ~first.isin(every[every.duplicated()]), genes["symbol"])


@pytest.mark.parametrize(
    ("names_of", "route"),
    [
        (symbols, "symbol"),
        (ids, "ensembl_id"),
        (ids_with_version, "ensembl_id"),
        (retired_symbols, "retired_symbol"),
    ],
)
def test_genes_may_go_by_any_of_their_names(entry, model, names_of, route):
    adata, genes, row = entry.make_data(), model.genes, model.gene_match.index
    has_both = ((genes["symbol"] != "") & (genes["ensembl_id"] != "")).to_numpy()
    known = (row >= 0) & has_both[row]
    unknown = [f"FOREIGN{i}" for i in range(adata.n_vars)]
    expected = entry.embed(with_genes(adata, np.where(known, adata.var_names, unknown)))

    names = np.where(known, names_of(genes).to_numpy()[row], unknown)
    in_the_index = with_genes(adata, names)
    in_a_column = with_genes(adata, [f"row{i}" for i in range(len(names))])
    in_a_column.var["names"] = names
    for renamed in (in_the_index, in_a_column):
        attached = entry.attach(renamed)
        assert attached.gene_match.routes[route] >= 5
        assert attached.gene_match.n_matched == len(np.unique(row[known]))
        np.testing.assert_allclose(attached.get_latent_representation(), expected, **CLOSE)
        attached.release()


def only_known(adata: AnnData, model: PretrainedModel, n: int) -> AnnData:
    """The data with all but `n` of the known genes renamed."""
    known = np.flatnonzero(model.gene_match.index >= 0)[:n]
    names = [name if i in known else f"FOREIGN{i}" for i, name in enumerate(adata.var_names)]
    return with_genes(adata, names)


def test_too_few_genes_are_an_error_that_says_what_was_found_and_needed_and_what_to_do(entry, model):
    some = {n: only_known(entry.make_data(), model, n) for n in (0, 1, 100)}
    attempts = (entry.attach, model.get_latent_representation)
    for (n, adata), attempt in product(some.items(), attempts):
        with pytest.raises(GeneMatchError) as error:
            attempt(adata)
        assert str(error.value).startswith(f"{n} of {adata.n_vars} genes match the vocabulary")
        assert "needed: 20 genes and a coverage of 0.25" in str(error.value)
        assert "gene_key names the column" in str(error.value)


def test_a_low_coverage_is_a_warning_and_the_least_one_can_be_set(entry, model):
    adata = only_known(entry.make_data(), model, 100)
    with pytest.warns(UserWarning, match="Only 100 of 765 genes match"):
        lenient = entry.pretrained(adata, min_coverage=0.1)
    assert np.isfinite(lenient.get_latent_representation()).all()
    lenient.release()


# 4. raw counts

PLACES = ("X", "a layer", "a sparse query", "a dense query")


@pytest.mark.parametrize(("kind", "place"), [*zip(NOT_COUNTS, cycle(PLACES), strict=False)])
def test_what_is_not_raw_counts_is_refused_with_the_cell_the_gene_and_the_way_out(entry, model, kind, place):
    change, reason = NOT_COUNTS[kind]
    adata = entry.make_data()
    x = change(adata.X.toarray())
    with np.errstate(invalid="ignore"):
        cell, gene = np.argwhere(~((x >= 0) & (x == np.rint(x)) & np.isfinite(x)))[0]
    if place == "a layer":
        adata.layers["other"] = sp.csr_matrix(x)
    else:
        adata.X = x if place == "a dense query" else sp.csr_matrix(x)
    with pytest.raises(NotCountsError) as error:
        if "query" in place:
            model.get_latent_representation(adata, batch_size=150)
        else:
            entry.embed(adata, setup={"layer": "other" if place == "a layer" else None})
    message = str(error.value)
    assert ("layers['other']" if place == "a layer" else "X") in message.split()[0]
    assert f"cell {adata.obs_names[cell]!r}, gene {adata.var_names[gene]!r} is {x[cell, gene]:g}" in message
    assert reason in message
    assert "layer=" in message
    assert "recover_counts" in message


@also_taught
def test_a_cell_without_counts_has_a_finite_row(entry, reference):
    adata = entry.make_data()
    empty = np.isin(np.arange(adata.n_obs), [0, 300, 699])
    adata.X = sp.csr_matrix(adata.X.multiply(~empty[:, None]))
    latent = entry.embed(adata)
    assert np.isfinite(latent).all()
    np.testing.assert_allclose(latent[empty], np.broadcast_to(latent[0], (3, latent.shape[1])), **CLOSE)
    alone = adata[empty].copy()
    assert np.isfinite(entry.embed(alone)).all()


def test_data_without_cells_or_genes_are_refused(entry, model):
    for shape in ((0, 765), (700, 0), (0, 0)):
        adata = entry.make_data()[: shape[0], : shape[1]].copy()
        needed = f" has {shape[0]} cells and {shape[1]} genes; at least one of each is needed"
        with pytest.raises(ValueError, match=needed):
            entry.attach(adata)
        with pytest.raises(ValueError, match=needed):
            model.get_latent_representation(adata)


# 5. the user's objects


@pytest.mark.parametrize(
    "how",
    [
        "csc",
        "csr of int64",
        "csr with repeated and unsorted indices",
        "dense F float32",
        "view",
        "backed csr with repeated and unsorted indices",
    ],
)
def test_the_users_data_are_left_as_they_were(entry, model, tmp_path, how):
    place, convert = FORMATS[how]
    # fewer cells than are looked at before anything else, or more: both are read in ways of their own
    many = how in ("csc", "backed csr with repeated and unsorted indices")
    adata = entry.make_data()[: 700 if many else 200].copy()
    data = place(adata, tmp_path, convert(adata.X))
    before, x = fingerprint(data), data.X
    model.get_latent_representation(data, batch_size=1000)
    assert fingerprint(data) == before
    setup = {} if data.is_view else {"batch_key": "batch", "labels_key": "batch"}
    attached = entry.attach(data, **setup)
    attached.get_latent_representation(batch_size=1000)
    attached.release()
    assert fingerprint(data) == before
    assert data.is_view or data.isbacked or data.X is x


def test_the_parent_of_a_view_is_left_as_it_was(entry, model):
    parent = entry.make_data()
    before = fingerprint(parent)
    half = parent[::2]
    model.get_latent_representation(half)
    entry.embed(half)
    assert half.is_view
    assert fingerprint(parent) == before
    assert not parent.uns


@also_taught
def test_global_random_states_are_left_as_they_were(entry):
    adata = entry.make_data()
    np_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    entry.embed(adata, setup={"batch_key": "batch"})
    np.testing.assert_array_equal(np.random.get_state()[1], np_before)
    np.testing.assert_array_equal(torch.get_rng_state(), torch_before)


# 6. saving


FRESH_PROCESS = """
import sys
import anndata as ad
import numpy as np
from tests.contract.models import PRETRAINED, TAUGHT
name, folder = sys.argv[1:]
entry = next(entry for entry in [*PRETRAINED, *TAUGHT] if entry.name == name)
adata = ad.read_h5ad(f"{folder}/data.h5ad")
without_data = entry.load(f"{folder}/saved", adata=False)
attached = entry.load(f"{folder}/saved", adata=adata.copy())
bundle = entry.pretrained(adata.copy(), f"{folder}/bundle")
np.savez(
    f"{folder}/latents.npz",
    without_data=without_data.get_latent_representation(adata),
    attached=attached.get_latent_representation(),
    bundle=bundle.get_latent_representation(),
)
"""


@also_taught
def test_a_saved_model_gives_the_same_embedding_in_a_fresh_process(entry, reference, tmp_path):
    adata = entry.make_data()
    adata.write_h5ad(tmp_path / "data.h5ad")
    model = entry.attach(adata)
    model.save(tmp_path / "saved")
    model.save_pretrained(tmp_path / "bundle")
    model.release()
    command = [sys.executable, "-c", FRESH_PROCESS, entry.name, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    with np.load(tmp_path / "latents.npz") as latents:
        assert set(latents) == {"without_data", "attached", "bundle"}
        for latent in latents.values():
            np.testing.assert_allclose(latent, reference, **CLOSE)


@pytest.mark.filterwarnings("ignore:From 0.4 .update:FutureWarning")  # of mudata
@also_taught
def test_a_model_saved_with_its_data_finds_them_again(entry, reference, tmp_path):
    model = entry.attach(entry.make_data(), batch_key="batch")
    model.save(tmp_path / "saved", save_anndata=True)
    again = entry.load(tmp_path / "saved")
    np.testing.assert_array_equal(again.get_latent_representation(), model.get_latent_representation())
    assert again.pretrained_ == model.pretrained_
    model.release()
    again.release()


@also_taught
def test_a_model_loaded_without_data_embeds_queries_and_does_not_adopt_them(entry, reference, tmp_path):
    model = entry.attach(entry.make_data())
    model.save(tmp_path / "saved")
    model.release()
    loaded = entry.load(tmp_path / "saved", adata=False)
    with pytest.raises(ValueError, match="loaded without data: pass adata="):
        loaded.get_latent_representation()
    np.testing.assert_allclose(loaded.get_latent_representation(entry.make_data()), reference, **CLOSE)
    assert loaded.adata is None
    loaded.save(
        tmp_path / "saved again"
    )  # the saving of a model without data is where scvi's rules are easily broken
    again = entry.load(tmp_path / "saved again", adata=shuffled(entry.make_data()))
    np.testing.assert_allclose(again.get_latent_representation(), reference, **CLOSE)
    again.release()


# queries


@also_taught
def test_a_query_is_not_kept_in_memory(entry, model):
    fine, refused, foreign = (entry.make_data() for _ in range(3))
    model.get_latent_representation(fine)
    refused.X = refused.X * 0.5
    with pytest.raises(NotCountsError):
        model.get_latent_representation(refused)
    foreign.var_names = [f"FOREIGN{i}" for i in range(foreign.n_vars)]
    with pytest.raises(GeneMatchError):
        model.get_latent_representation(foreign)
    kept = [weakref.ref(adata) for adata in (fine, refused, foreign)]
    del fine, refused, foreign
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3


def test_attached_data_are_let_go_with_release(entry):
    adata = entry.make_data()
    model = entry.attach(adata)
    model.get_latent_representation(indices=[0])
    model.release()
    kept = weakref.ref(adata)
    del adata, model
    gc.collect()
    assert kept() is None


@also_taught
@pytest.mark.parametrize("labels", [None, "unseen"])
def test_a_query_may_lack_the_labels_or_have_others_and_have_batches_of_its_own(entry, labels):
    query = entry.make_data()
    query.obs["batch"] = np.where(np.arange(query.n_obs) < 300, "new", "a")
    expected = entry.embed(query.copy(), setup={"batch_key": "batch"})
    del query.obs["bulk_labels"]
    if labels is not None:
        query.obs["bulk_labels"] = labels
    columns = list(query.obs)
    model = entry.attach(entry.make_data(), batch_key="batch", labels_key="bulk_labels")
    before = model.get_latent_representation()
    np.testing.assert_allclose(model.get_latent_representation(query), expected, **CLOSE)
    assert [name for name in query.obs if not name.startswith("_scvi_")] == columns
    np.testing.assert_array_equal(model.get_latent_representation(), before)
    model.release()


def test_a_query_without_the_batch_column_is_an_error_that_names_it(entry):
    if isinstance(entry, WithPeaks):
        pytest.skip("its embedding does not look at batches")
    model = entry.attach(entry.make_data(), batch_key="batch")
    query = entry.make_data()
    del query.obs["batch"]
    with pytest.raises(KeyError, match="'batch' not found in adata.obs"):
        model.get_latent_representation(query)
    model.release()


@also_taught
def test_a_query_may_have_other_genes_than_the_attached_data(entry, model):
    query = shuffled(entry.make_data())[:300, :500].copy()
    expected = entry.embed(query.copy())
    np.testing.assert_allclose(model.get_latent_representation(query), expected, **CLOSE)


def test_cells_are_chosen_by_numbers_or_a_mask(model):
    mask = np.arange(model.adata.n_obs) % 7 == 0
    by_mask = model.get_latent_representation(indices=mask)
    assert by_mask.shape == (100, model.module.n_latent)
    np.testing.assert_array_equal(by_mask, model.get_latent_representation(indices=np.flatnonzero(mask)))
    np.testing.assert_array_equal(by_mask, model.get_latent_representation(indices=pd.Series(mask)))
    from_the_end = np.flatnonzero(mask) - model.adata.n_obs
    np.testing.assert_array_equal(by_mask, model.get_latent_representation(indices=from_the_end.tolist()))


def test_no_cells_give_an_array_without_rows(model):
    for none in ([], np.array([], dtype=int), np.zeros(700, dtype=bool)):
        latent = model.get_latent_representation(indices=none)
        assert latent.shape == (0, model.module.n_latent)
        assert latent.dtype == np.float32


def test_cells_that_do_not_exist_are_an_error(model):
    for indices in ([0, 700], [-701]):
        with pytest.raises(IndexError, match="there are 700 cells"):
            model.get_latent_representation(indices=indices)


def test_a_mask_of_another_length_is_an_error(model):
    with pytest.raises(ValueError, match="The mask has 3 entries for 700 cells"):
        model.get_latent_representation(indices=[True, False, True])


# 7. offline; wrong hashes and broken downloads are tested in tests/weights


def test_offline_with_an_empty_cache_the_error_says_what_to_do(entry):
    table = cp.weights.available()
    mine = table[(table["model"] == entry.model.__name__) & (table["status"] == "not downloaded")]
    for name in mine.index:
        with pytest.raises(cp.weights.WeightsError) as error:
            entry.pretrained(entry.make_data(), name)
        assert name in str(error.value)
        assert "CELLPRIOR_OFFLINE" in str(error.value)
        assert "CELLPRIOR_MIRROR" in str(error.value)
        assert "from_pretrained(" in str(error.value)


@also_taught
def test_weights_with_another_hash_than_the_known_one_are_refused(entry, model, reference, tmp_path):
    model.save_pretrained(tmp_path / "bundle")
    digest = cp.weights.sha256(tmp_path / "bundle")
    with pytest.raises(cp.weights.WeightsError, match=f"it has sha256 {digest}, needed is {'0' * 64}"):
        entry.pretrained(entry.make_data(), tmp_path / "bundle", known_hash="0" * 64)
    right = entry.pretrained(entry.make_data(), tmp_path / "bundle", known_hash=digest)
    np.testing.assert_allclose(right.get_latent_representation(), reference, **CLOSE)
    right.release()


# 8. strict loading, no pickle


@also_taught
def test_every_tensor_of_a_bundle_has_its_place_or_the_error_lists_it(entry, model, tmp_path):
    tensors = dict(model.module.state_dict())
    lost, *_, cut = tensors
    tensors["foreign"] = torch.zeros(1)
    del tensors[lost]
    tensors[cut] = tensors[cut][:-1]
    config = {"model": entry.model.__name__, "network": model._network(), "annotation": model.annotation_}
    cp.weights.write_bundle(
        tmp_path / "bundle",
        state_dict=tensors,
        config=config,
        genes=model.genes,
        peaks=model.peaks,
        card="",
    )
    with pytest.raises(cp.weights.WeightsError, match="Nothing was loaded") as error:
        entry.pretrained(entry.make_data(), tmp_path / "bundle")
    for problem in (
        f"{lost} is missing",
        "foreign has no place",
        f"{cut} is {tuple(tensors[cut].shape)}, needed",
    ):
        assert problem in str(error.value)


def test_the_weights_of_another_model_are_refused_by_name(entry, model, tmp_path):
    config = {"model": "Another", "network": {}}
    cp.weights.write_bundle(
        tmp_path / "bundle", state_dict=model.module.state_dict(), config=config, genes=model.genes, card=""
    )
    with pytest.raises(
        cp.weights.WeightsError, match="holds a Another: load it with Another.from_pretrained"
    ):
        entry.pretrained(entry.make_data(), tmp_path / "bundle")


@pytest.mark.parametrize("name", ["x.best.ckpt", "x.pth", "bundle/model.safetensors"])
def test_nothing_in_a_file_of_weights_is_executed(entry, model, tmp_path, name):
    if name.startswith("bundle"):
        model.save_pretrained(tmp_path / "bundle")
    path = tmp_path / name
    torch.save({"model_state_dict": Bomb(tmp_path / "exploded")}, path)
    (tmp_path / "x.config.json").write_text("{}")
    with pytest.raises(cp.weights.WeightsError):
        entry.pretrained(entry.make_data(), path.parent if name.startswith("bundle") else path)
    assert not (tmp_path / "exploded").exists()
    with path.open("rb") as file:
        torch.load(file, weights_only=False)  # the bomb is live
    assert (tmp_path / "exploded").exists()
