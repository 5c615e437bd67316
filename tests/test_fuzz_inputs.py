"""AnnDatas and MuDatas of many kinds: each is embedded as its counts are, or refused with what was found.

What the counts are is made up first, in float64, and then put into a guise (:mod:`tests.variants`): a type, a layout, a
place, names, features that are no genes, batches. The model embeds this guise; the network alone is given the counts.

Seeded. ``CELLPRIOR_FUZZ=<n>`` tries ``n`` cases of each model, in place of a few. A failure names its number, and
``CELLPRIOR_FUZZ_CASE=<number>`` tries this one alone.
"""

from __future__ import annotations

import os
import shutil
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from mudata import MuData

import cellprior as cp
from cellprior._compat import without_pulled_columns
from cellprior.model import MultiomeCLIP
from cellprior.weights import fetch, read_bundle
from tests import variants
from tests.contract.models import new_folder, tiny_scbert
from tests.model.multiomeclip.data import QUIET
from tests.variants import LARGEST, PLACES, Draw, Known, Placed, Refusal, Table

N = int(os.environ.get("CELLPRIOR_FUZZ", "0")) or 20
ONLY = os.environ.get("CELLPRIOR_FUZZ_CASE")
N_CELLS = 24
CLOSE = 1e-5
MANY_FAILURES = 10
WEIGHTS: dict[str, Callable[[], str]] = {"CellPLM": lambda: "cellplm-starter", "ScBERT": tiny_scbert}


@pytest.fixture(autouse=True)
def offline():
    cp.settings.offline = True


@dataclass
class Case:
    """What embeds data in a guise, and what the network makes of the counts."""

    embed: Callable[[], pd.DataFrame]
    wanted: Callable[[], pd.DataFrame]

    def wrong(self, refusals: list[Refusal]) -> str | None:
        """What is wrong; None if the result is right, or a refusal for a reason that there is."""
        try:
            found = self.embed()
        except Exception as error:  # noqa: BLE001 any other than those expected is what is looked for
            if any(refusal.fits(error) for refusal in refusals):
                return None
            return (
                f"{type(error).__name__}: {error}\n{''.join(traceback.format_tb(error.__traceback__)[-3:])}"
            )
        if any(refusal.must for refusal in refusals):
            return "it was embedded, and should have been refused"
        expected = self.wanted()
        if found.index.tolist() != expected.index.tolist():
            return f"other cells: {found.index.tolist()} and {expected.index.tolist()}"
        scale = 1 + np.abs(expected.to_numpy())
        far = np.abs(found.to_numpy() - expected.to_numpy()) / scale
        if (found.isna() != expected.isna()).any(axis=None) or np.nanmax(far, initial=0) > CLOSE:
            return f"another embedding, by up to {np.nanmax(far, initial=0):.2g}"
        return None


# --- plain data -----------------------------------------------------------------------------------------------------


def plain(genes: pd.DataFrame, rows: np.ndarray, x: np.ndarray, groups: np.ndarray) -> ad.AnnData:
    """Counts as float32 CSR under the names of the vocabulary, with batches that are called 0, 1, ..."""
    obs = pd.DataFrame({"batch": [f"g{i}" for i in groups]}, index=[f"cell{i}" for i in range(len(x))])
    symbol, identifier = genes["symbol"].to_numpy()[rows], genes["ensembl_id"].to_numpy()[rows]
    names = np.where(identifier != "", identifier, symbol)
    return ad.AnnData(sp.csr_matrix(x.astype(np.float32)), obs=obs, var=pd.DataFrame(index=names))


@cache
def genes_of(weights: str) -> pd.DataFrame:
    return read_bundle(fetch(weights) if weights == "cellplm-starter" else Path(weights)).genes


@cache
def known_genes(weights: str) -> Known:
    return Known(genes_of(weights))


@cache
def attached(name: str, weights: str, layer: str | None, gene_key: str | None, batch_key: str | None) -> Any:
    """A model with other data than are embedded, which a query is read like."""
    genes = genes_of(weights)
    groups = np.arange(8) % 2
    x = np.random.default_rng(0).poisson(1.0, (8, len(genes)))
    data = plain(genes, np.arange(len(genes)), x, groups)
    data.obs["batch"] = np.where(groups, "1", "ref")  # of which a query may have one
    data.var["gene_name"] = data.var_names
    data.layers["counts"], data.raw = data.X.copy(), data.copy()
    cls = getattr(cp.model, name)
    cls.setup_anndata(data, layer=layer, gene_key=gene_key, batch_key=batch_key)
    return cls.from_pretrained(weights, data, device="cpu")


# --- models of genes -------------------------------------------------------------------------------------------------


def case_of_genes(name: str, d: Draw, folder: Path) -> Case:
    weights = WEIGHTS[name]()
    dtype, form = variants.draw_layout(d, "counts")
    table = variants.draw_genes(d, known_genes(weights), N_CELLS, LARGEST.get(dtype, 4999))
    batches, groups = variants.draw_batches(d, N_CELLS)
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(N_CELLS)])
    batch_key = None
    if batches is not None:
        obs["batch"], batch_key = batches.array, "batch"
    adata, layer = variants.place(d, table, obs, form, dtype, PLACES, "counts")
    way = draw_way(d, "query", ["embed", "embed a copy", *(["stream"] if writable(obs) else [])], [form])
    data, cells = contained(d, adata, folder, way)

    def embed() -> pd.DataFrame:
        if way == "query":
            model = attached(name, weights, layer, table.gene_key, batch_key)
            return by_name(data.obs_names, model.get_latent_representation(data))
        options = {"layer": layer, "gene_key": table.gene_key, "batch_key": batch_key}
        return embedded(data, weights, way, folder, options)

    def wanted() -> pd.DataFrame:
        model = attached(name, weights, None, None, None)
        x = torch.from_numpy(table.truth(cells).astype(np.float32))
        found = np.empty((len(cells), model.get_latent_representation().shape[1]))
        encoder = type(model)._encoder_cls(model.module, table.rows)
        with torch.inference_mode():
            for group in np.unique(groups[cells]):  # of which the cells see each other
                part = np.flatnonzero(groups[cells] == group)
                found[part] = torch.cat(list(encoder.encode([x[part]], {}))).numpy()
        return by_name([f"cell{i}" for i in cells], found)

    return Case(embed, wanted)


def writable(obs: pd.DataFrame) -> bool:
    """Whether a file can hold a column of batches."""
    if "batch" not in obs or obs["batch"].dtype == "category":
        return True
    return obs["batch"].dtype != "string" and pd.api.types.infer_dtype(obs["batch"])[:5] != "mixed"


def draw_way(d: Draw, usual: str, others: list[str], forms: list[str]) -> str:
    """Which function is called."""
    way: str = d.pick("way", usual, others)
    if way == "stream" and any("csc" in form for form in forms):
        d.refusals.append(Refusal("ValueError", ("gene by gene",)))
    return way


def contained(d: Draw, adata: ad.AnnData, folder: Path, way: str) -> tuple[Any, np.ndarray]:
    """The data, a part of more, or either of them in a file; and which cells they are."""
    cells = np.arange(adata.n_obs)
    if way == "stream":
        adata.write_h5ad(folder / "data.h5ad")
        return folder / "data.h5ad", cells
    files = ["file", "view of a file"][: 2 if way != "embed" else 1] if writable(adata.obs) else []
    kind = d.pick("held", "in memory", ["view", *files], odd=0.6)
    if "file" in kind:
        adata.write_h5ad(folder / "data.h5ad")
        if adata.X is None and (way == "embed a copy" or "view" in kind):
            d.refusals.append(Refusal("ValueError", ("data.h5ad has no X", "anndata.read_h5ad"), must=False))
        adata = ad.read_h5ad(folder / "data.h5ad", backed="r")
    if "view" in kind:
        cells = np.array(d.some(cells[:-1], len(cells)))
        of_all = d.some(range(adata.n_vars), adata.n_vars) if d.rng.random() < 0.5 else slice(None)
        adata = adata[cells, of_all]
    return adata, cells


def embedded(data: Any, weights: str, way: str, folder: Path, options: dict[str, Any]) -> pd.DataFrame:
    """By :func:`cellprior.tl.embed`."""
    key = "E"
    if way == "stream":
        cp.tl.embed(
            data, weights, out=folder / "out.zarr", key_added=key, progress=False, device="cpu", **options
        )
        found: Any = ad.read_zarr(folder / "out.zarr")
    else:
        copy = way != "embed"
        found = (
            cp.tl.embed(data, weights, key_added=key, copy=copy, device="cpu", **options) if copy else data
        )
        if not copy:
            cp.tl.embed(data, weights, key_added=key, device="cpu", **options)
    return by_name(found.obs_names, found.obsm[key])


def by_name(names: Any, x: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(np.asarray(x), index=pd.Index(names)).sort_index()


# --- MultiomeCLIP ----------------------------------------------------------------------------------------------------


def together(modalities: dict[str, ad.AnnData]) -> MuData:
    with without_pulled_columns():
        return MuData(modalities)


@cache
def peaks_of_model() -> list[tuple[int, int, int]]:
    """Chromosome, start and end, far from each other and of many widths."""
    rng = np.random.default_rng(5)
    starts = 10_000 + np.cumsum(rng.integers(3_000, 60_000, 240))
    return [(1 + i // 50, int(start), int(start + rng.integers(200, 900))) for i, start in enumerate(starts)]


def peak_names(rows: np.ndarray | None = None) -> list[str]:
    peaks = peaks_of_model()
    chosen = peaks if rows is None else [peaks[i] for i in rows]
    return [f"chr{c}:{start}-{end}" for c, start, end in chosen]


@cache
def multiome_weights() -> str:
    """A MultiomeCLIP of 120 genes that have ids, and 240 peaks; hardly trained."""
    genes = genes_of(tiny_scbert())
    known = known_genes(tiny_scbert())
    genes = genes.iloc[[*known.signed[:20], *list(known.retired)[:20], *known.rows]]
    genes = genes[~genes.index.duplicated()].iloc[:120].reset_index(drop=True)
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(100)])
    rna = plain(genes, np.arange(120), rng.poisson(0.8, (100, 120)), np.zeros(100, dtype=int))
    counts = sp.csr_matrix(rng.poisson(0.3, (100, 240)).astype(np.float32))
    atac = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=peak_names()))
    mdata = together({"rna": rna, "atac": atac})
    torch.manual_seed(0)
    MultiomeCLIP.setup_mudata(mdata)
    model = MultiomeCLIP(mdata, genes=genes, n_latent=8, n_hidden=16, n_components=(16, 16))
    model.train(max_epochs=1, **QUIET)
    folder = new_folder()
    model.save_pretrained(folder)
    return str(folder)


@cache
def attached_multiome(rna_layer: str | None, atac_layer: str | None) -> MultiomeCLIP:
    """A model with other data than are embedded."""
    genes = genes_of(multiome_weights())
    rna = plain(genes, np.arange(120), np.ones((8, 120)), np.zeros(8, dtype=int))
    atac = ad.AnnData(np.ones((8, 240), dtype=np.float32), obs=rna.obs, var=pd.DataFrame(index=peak_names()))
    for adata in (rna, atac):
        adata.layers["counts"], adata.raw = adata.X.copy(), adata.copy()
    mdata = together({"rna": rna, "atac": atac})
    MultiomeCLIP.setup_mudata(mdata, rna_layer=rna_layer, atac_layer=atac_layer)
    return MultiomeCLIP.from_pretrained(multiome_weights(), mdata, device="cpu")


def case_of_both(name: str, d: Draw, folder: Path) -> Case:
    shape = d.pick("data", "MuData", ["rna", "atac", "one table"], odd=0.6)
    if shape == "one table":
        return case_of_one_table(d, folder)
    tables: dict[str, Table] = {}
    placed: dict[str, Placed] = {}
    cells: dict[str, np.ndarray] = {}
    forms = []
    for modality in ("rna", "atac") if shape == "MuData" else (shape,):
        kind, form = variants.draw_layout(d, modality)
        forms.append(form)
        tables[modality] = table = draw_table(d, modality, LARGEST.get(kind, 4999), alone=shape != "MuData")
        obs = pd.DataFrame(index=[f"cell{i}" for i in range(N_CELLS)])
        placed[modality] = variants.place(d, table, obs, form, kind, PLACES, modality)
        cells[modality] = np.arange(N_CELLS)
    gene_key = tables["rna"].gene_key if "rna" in tables else None
    way = draw_way(d, "embed" if gene_key else "query", ["embed", "stream"], forms)
    layers = {modality: each.layer for modality, each in placed.items()}
    if shape != "MuData":
        data, cells[shape] = contained(d, placed[shape].adata, folder, way)
    else:
        data = some_mudata(d, {modality: each.adata for modality, each in placed.items()}, cells, folder, way)
    return Case(
        *both_ways(d, data, tables, cells, layers if shape == "MuData" else layers[shape], way, folder)
    )


def draw_table(d: Draw, modality: str, largest: int, *, alone: bool) -> Table:
    if modality == "atac":
        return variants.draw_peaks(d, peaks_of_model(), N_CELLS, largest)
    others = [
        kind for kind in variants.OTHERS if kind != "peak" or not alone
    ]  # with peaks it is a table of both
    return variants.draw_genes(d, known_genes(multiome_weights()), N_CELLS, largest, others=others)


def some_mudata(
    d: Draw, modalities: dict[str, ad.AnnData], cells: dict[str, np.ndarray], folder: Path, way: str
) -> Any:
    """A MuData whose modalities have their own cells in their own order, in memory, a view or a file."""
    if d.pick("cells of the modalities", "same", ["own"]) == "own":
        for modality, adata in modalities.items():
            cells[modality] = np.array(d.some(range(N_CELLS), N_CELLS - 4))
            modalities[modality] = adata[cells[modality]].copy()
    mdata = together(modalities)
    if way == "stream":
        mdata.write_h5mu(folder / "data.h5mu")
        return folder / "data.h5mu"
    held = d.pick("held", "in memory", ["view", "file"], odd=0.6)
    if held == "file":
        mdata.write_h5mu(folder / "data.h5mu")
        return mudata.read_h5mu(folder / "data.h5mu", backed="r")
    if held == "view":
        kept = np.sort(d.some(range(mdata.n_obs), mdata.n_obs - 3))
        names = {int(name[4:]) for name in mdata.obs_names[kept]}
        for modality in cells:
            cells[modality] = np.array([i for i in cells[modality] if i in names])
        mdata = mdata[kept]
    return mdata


def case_of_one_table(d: Draw, folder: Path) -> Case:
    """Genes and peaks beside each other in an AnnData."""
    kind, form = variants.draw_layout(d, "counts")
    typed = d.pick("types of genes and peaks", None, ["feature_types", "modality"])
    largest = LARGEST.get(kind, 4999)
    styles = ["Ensembl", "version", "mixed"] + (["dots", "retired", "column"] if typed else [])
    others = [kind for kind in variants.OTHERS if kind != "peak"]
    rna = variants.draw_genes(
        d,
        known_genes(multiome_weights()),
        N_CELLS,
        largest,
        styles=styles,
        others=others,
        typed=typed,
        fewest=25,
    )
    atac = variants.draw_peaks(d, peaks_of_model(), N_CELLS, largest, styles=["-", "_"], fewest=30)
    if typed:
        rna.var[typed] = rna.var[typed].astype(object)
        atac.var[typed] = "Peaks"
    var = pd.concat([rna.var, atac.var])
    none = {"rna": np.full(len(atac.row), -1), "atac": np.full(len(rna.row), -1)}
    x = np.concatenate([rna.x, atac.x], axis=1)
    order = np.array(d.some(range(len(var)), len(var)))
    tables = {
        "rna": Table(np.concatenate([rna.row, none["rna"]]), x, var).in_order(order),
        "atac": Table(np.concatenate([none["atac"], atac.row]), x, var).in_order(order),
    }
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(N_CELLS)])
    places = [place for place in PLACES if "raw" not in place]
    adata, layer = variants.place(d, tables["rna"], obs, form, kind, places, "counts")
    way = draw_way(d, "query", ["embed", "embed a copy", "stream"], [form])
    data, cells = contained(d, adata, folder, way)
    return Case(*both_ways(d, data, tables, {"rna": cells, "atac": cells}, layer, way, folder))


def both_ways(
    d: Draw,
    data: Any,
    tables: dict[str, Table],
    cells: dict[str, np.ndarray],
    layer: Any,
    way: str,
    folder: Path,
) -> tuple[Callable[[], pd.DataFrame], Callable[[], pd.DataFrame]]:
    """What embeds the data, and what the network makes of the counts."""
    modality = d.pick("modality", None, ["joint", *tables], odd=0.5) if way == "query" else None
    gene_key = tables["rna"].gene_key if "rna" in tables else None
    if modality in tables:  # values of the other may not be read
        d.refusals = [replace(each, must=each.must and each.error != "NotCountsError") for each in d.refusals]

    def embed() -> pd.DataFrame:
        if way != "query":
            return embedded(data, multiome_weights(), way, folder, {"layer": layer, "gene_key": gene_key})
        layers = layer if isinstance(layer, dict) else {"rna": layer, "atac": layer}
        model = attached_multiome(layers["rna"], layers["atac"])
        return by_name(data.obs_names, model.get_latent_representation(data, modality=modality))

    def wanted() -> pd.DataFrame:
        module = attached_multiome(None, None).module
        size = {"rna": len(genes_of(multiome_weights())), "atac": len(peaks_of_model())}
        vectors = []
        for name in tables if modality in (None, "joint") else [modality]:
            x = np.zeros((len(cells[name]), size[name]), dtype=np.float32)
            x[:, tables[name].rows] = tables[name].truth(cells[name])
            with torch.inference_mode():
                found = module.alignment[name](module.embed(name, torch.from_numpy(x))).numpy()
            vectors.append(by_name([f"cell{i}" for i in cells[name]], found))
        names = sorted({f"cell{i}" for each in cells.values() for i in each})
        return pd.concat(vectors).groupby(level=0).mean().reindex(names)  # of what a cell has

    return embed, wanted


# --- the tests -------------------------------------------------------------------------------------------------------


def failure_of(name: str, number: int, folder: Path) -> str | None:
    """What is wrong with a case, with all that it was drawn as."""
    d = Draw(f"{name} {number}")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of names that stand twice, of low coverage, of cells without a modality
        case = (case_of_both if name == "MultiomeCLIP" else case_of_genes)(name, d, folder)
        wrong = case.wrong(d.refusals)
    return wrong and f"{name}, case {number}: {wrong}\n  {'; '.join(d.said)}\n  may be refused: {d.refusals}"


@pytest.mark.parametrize("name", ["CellPLM", "ScBERT", "MultiomeCLIP"])
def test_data_in_any_guise_are_embedded_as_what_they_are_or_refused(tmp_path: Path, name: str):
    failures = []
    for number in range(N) if ONLY is None else [int(ONLY)]:
        (folder := tmp_path / str(number)).mkdir()
        if failure := failure_of(name, number, folder):
            failures.append(failure)
        shutil.rmtree(folder, ignore_errors=True)
        if len(failures) == MANY_FAILURES:
            break
    assert not failures, "\n\n".join([f"{len(failures)} cases are wrong", *failures])
