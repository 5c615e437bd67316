"""Vectors of genes and peaks, and which peaks go with which genes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from mudata import MuData
from scipy.stats import false_discovery_control

from cellprior.genes._genomes import GENOMES
from cellprior.genes._intervals import read_peaks
from cellprior.genes._positions import places_of
from cellprior.model.multiomeclip import _controls, _training
from cellprior.model.multiomeclip import _links as links

from .data import N_GENES, N_PEAKS, multiome, part, peak_names


def positions() -> pd.DataFrame:
    """Genes along the four chromosomes, each near a peak."""
    names = [f"GENE{i}" for i in range(N_GENES)]
    i = np.arange(len(names))
    start = 40_000 * i + 10_000 * (i % 4) + 1_700
    table = {"chrom": [f"chr{1 + k % 4}" for k in i], "start": start, "end": start + 3_000}
    return pd.DataFrame(table | {"strand": np.where(i % 3 == 0, "-", "+")}, index=names)


def open_cells(mdata: MuData) -> pd.Series:
    return pd.Series((mdata["atac"].X > 0).sum(axis=0).A1, index=mdata["atac"].var_names)


@pytest.fixture(scope="module")
def found(trained) -> pd.DataFrame:
    return trained.peak_gene_links(gene_positions=positions())


@pytest.mark.parametrize("modality", ["rna", "atac"])
def test_a_features_vector_is_where_the_cells_are_that_have_it(trained, mdata, modality, monkeypatch):
    monkeypatch.setattr(_training, "ROWS", 30)
    rows = np.arange(5, 155)
    vectors = trained.get_feature_representation(modality, indices=rows)
    x = mdata.mod[modality].X.toarray()[rows]
    values = (x > 0).astype(float) if modality == "atac" else x
    values = np.log1p(1e4 * values / values.sum(axis=1, keepdims=True))
    z = trained.get_latent_representation(modality=modality)[rows]
    assert vectors.shape == (N_GENES if modality == "rna" else N_PEAKS, 16)
    for j, name in ((0, 0), (30, 30), (58, 58)):
        expected = np.average(z, axis=0, weights=values[:, j]) - z.mean(axis=0)
        np.testing.assert_allclose(vectors.iloc[name], expected, rtol=1e-4, atol=1e-6)
    nowhere = values.sum(axis=0) == 0
    assert (vectors[nowhere] == 0).all(axis=None)


def test_genes_lie_near_the_peaks_that_are_open_in_the_same_cells(trained, mdata):
    genes, peaks = (
        links.unit(trained.get_feature_representation(name).to_numpy()) for name in ("rna", "atac")
    )
    kind = mdata.obs["type"].cat.codes.to_numpy()
    shares = []
    for name in ("rna", "atac"):
        x = mdata.mod[name].X.toarray()
        mean = np.stack([x[kind == k].mean(axis=0) for k in range(4)])
        shares.append((mean / np.maximum(mean.sum(axis=0), 1e-9)).T)  # of each type in a feature
    together = shares[0] @ shares[1].T
    cosine = genes @ peaks.T
    assert cosine[together > 0.6].mean() > cosine[together < 0.1].mean() + 0.5
    assert trained.get_feature_representation("rna").index[0] == "GENE0"


def test_pairs_within_the_window_are_found_with_distances_along_the_gene(found, mdata):
    table, expected = positions(), {}
    for gene, row in table.iterrows():
        start = row.end - 1 if row.strand == "-" else row.start
        for peak in mdata["atac"].var_names:
            chromosome, place = peak.split(":")
            distance = sum(map(int, place.split("-"))) // 2 - start
            if chromosome == row.chrom and abs(distance) <= 500_000:
                expected[gene, peak] = -distance if row.strand == "-" else distance
    n_cells = open_cells(mdata)
    expected = {
        pair: d for pair, d in expected.items() if n_cells[pair[1]] >= 10 and pair[0] in set(found.gene)
    }
    assert len(expected) > 1000
    assert found.gene.nunique() > 50
    assert dict(zip(zip(found.gene, found.peak, strict=True), found.distance, strict=True)) == expected
    assert len(found) == len(expected)


def test_scores_controls_and_correlations_are_what_they_are_called(trained, found, mdata):
    genes, peaks = (trained.get_feature_representation(name) for name in ("rna", "atac"))
    genes, peaks = (pd.DataFrame(links.unit(x.to_numpy()), index=x.index) for x in (genes, peaks))
    values = {}
    for name in ("rna", "atac"):
        x = mdata.mod[name].X.toarray()
        x = (x > 0).astype(float) if name == "atac" else x
        values[name] = np.log1p(1e4 * x / x.sum(axis=1, keepdims=True))
    for row in found.iloc[::150].itertuples():
        assert row.score == pytest.approx(genes.loc[row.gene] @ peaks.loc[row.peak], abs=1e-5)
        frequent = peaks[(open_cells(mdata) >= 10).to_numpy()]
        others = frequent[~frequent.index.str.startswith(row.peak.split(":")[0] + ":")].to_numpy()
        control = others @ genes.loc[row.gene].to_numpy()
        assert row.background_mean == pytest.approx(control.mean(), abs=1e-5)
        assert row.background_sd == pytest.approx(control.std(), abs=1e-5)
        i = mdata["rna"].var_names.get_loc(row.gene), mdata["atac"].var_names.get_loc(row.peak)
        r = np.corrcoef(values["rna"][:, i[0]], values["atac"][:, i[1]])[0, 1]
        assert row.correlation == pytest.approx(r, abs=1e-4)
    assert found.p.between(0, 1, inclusive="right").all()
    assert found.p.is_monotonic_increasing
    assert (found.q >= found.p).all()
    assert list(found.columns) == links.COLUMNS


def test_p_is_even_where_places_say_nothing_and_small_where_they_do():
    rng = np.random.default_rng(0)
    n_genes, n_peaks, where = 300, 3000, rng.integers(0, 4, 3300)
    of_genes, of_peaks = where[:n_genes], where[n_genes:]
    hub = 2 * rng.normal(size=6)  # in which most peaks lie
    genes, peaks = rng.normal(size=(n_genes, 6)), rng.normal(size=(n_peaks, 6)) + hub
    n_cells = rng.geometric(0.02, n_peaks)
    peaks[n_cells < 30] *= rng.uniform(0.5, 2, 6)  # rare ones lie elsewhere
    gene, peak = rng.integers(0, n_genes, 4000), rng.integers(0, n_peaks, 4000)
    same = of_genes[gene] == of_peaks[peak]
    pairs = links.Candidates(gene[same], peak[same], np.zeros(same.sum(), dtype=int))
    group = _controls.groups(rng.random(n_peaks) < 0.2, n_cells, 500)
    background = _controls.Background(
        links.unit(genes), links.unit(peaks), of_genes.astype(str), of_peaks.astype(str), group
    )
    score = (links.unit(genes)[pairs.gene] * links.unit(peaks)[pairs.peak]).sum(axis=1)
    p = background.of(pairs, score)[2]
    for level in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert (p <= level).mean() == pytest.approx(level, abs=0.05)
    assert background.of(pairs, score + 1.5)[2].max() < 0.05


def test_control_peaks_are_as_open_and_as_near_to_the_start_of_a_gene():
    rng = np.random.default_rng(0)
    n_cells, near = rng.integers(1, 500, 4000), rng.random(4000) < 0.25
    group = _controls.groups(near, n_cells, 250)
    for i in range(group.max() + 1):
        assert 250 <= (group == i).sum() < 300
        assert len(set(near[group == i])) == 1
        assert np.ptp(n_cells[group == i]) < 150
    assert len(set(_controls.groups(np.arange(4000) < 60, n_cells, 4000))) == 1  # too few to tell apart
    peaks = read_peaks(["chr1:900-1100", "chr1:4000-4200", "2:900-1100", "none"])
    table = pd.DataFrame({"chrom": ["1"], "start": [2100], "end": [9000], "strand": ["+"]}, index=["a"])
    assert _controls.is_promoter(places_of(table), peaks).tolist() == [True, True, False, False]


def test_features_of_a_query_keep_their_names_and_rare_ones_are_left_out(trained, found, mdata):
    query = multiome(dict(mdata.mod))
    query["atac"].var_names = [name.removeprefix("chr").replace(":", "-") for name in peak_names()]
    query["rna"].var = positions()
    again = trained.peak_gene_links(query)
    assert again.peak[0] == found.peak[0].removeprefix("chr").replace(":", "-")
    pd.testing.assert_frame_equal(again.drop(columns="peak"), found.drop(columns="peak"))
    some = trained.peak_gene_links(query, genes="GENE7")
    all_of_it = again[again.gene == "GENE7"].reset_index(drop=True)
    pd.testing.assert_frame_equal(some.drop(columns="q"), all_of_it.drop(columns="q"))
    np.testing.assert_allclose(some.q, false_discovery_control(some.p))
    some = trained.peak_gene_links(query, genes=["GENE7", "GENE9"], window=100_000, min_cells=20)
    assert set(some.gene) == {"GENE7", "GENE9"}
    assert open_cells(query)[some.peak].min() >= 20
    assert some.distance.abs().max() <= 100_000


def test_what_is_missing_for_links_is_named(trained, mdata):
    def refuse(
        match: str, kind: type[Exception] = ValueError, data: object = None, **options: object
    ) -> None:
        with pytest.raises(kind, match=match):
            trained.peak_gene_links(data, **({"gene_positions": positions()} | options))

    refuse(r"var of RNA has no positions.*read_positions", gene_positions=None)
    refuse(r"gene_positions has no positions.*\['place'\]", gene_positions=pd.DataFrame({"place": ["a"] * 9}))
    refuse("DataFrame is needed", TypeError, gene_positions=["chr1"])
    refuse("0 of the cells have both modalities", data=mdata["atac"])
    refuse("n_controls=10", n_controls=10)
    refuse("'TP53' is none of the 59 genes", genes=["TP53"])
    refuse("none is given of the 59 genes", genes=[])
    refuse("is found in 500 of 160 cells", min_cells=500)
    refuse("No peak lies within 5 base pairs", window=5)
    refuse(
        r"no chromosome in common: genes lie on 7, peaks on 1, 2, 3",
        gene_positions=positions().assign(chrom="chr7"),
    )
    with pytest.raises(ValueError, match="modality='joint'"):
        trained.get_feature_representation("joint")
    with pytest.raises(ValueError, match="None of the cells has RNA"):
        trained.get_feature_representation("rna", mdata["atac"])


def test_genes_without_a_position_and_peaks_far_from_all_genes_are_warned_of(trained, mdata):
    with pytest.warns(UserWarning, match=r"23 of 59 genes have a position; GENE24, GENE25, GENE26"):
        trained.peak_gene_links(gene_positions=positions().iloc[:24])
    pairs = links.Candidates(np.arange(5000), np.arange(5000), np.linspace(-500_000, 500_000, 5000))
    with pytest.warns(UserWarning, match=r"100 peaks lie within 10,000 base pairs.*one genome build"):
        links.warn_if_not_near(pairs, 500_000)


def test_genes_and_peaks_of_two_genome_builds_are_refused():
    def ends(genome: str) -> pd.DataFrame:
        lengths = GENOMES[genome]
        end = np.array(list(lengths.values()))
        return pd.DataFrame({"chrom": list(lengths), "start": end - 100, "end": end}, index=list(lengths))

    human, mouse = (places_of(ends(genome)) for genome in ("hg38", "mm10"))
    peaks = read_peaks([f"chr{c}:{e - 400}-{e}" for c, e in GENOMES["mm10"].items()])
    links.refuse_two_genomes(mouse, peaks)
    with pytest.raises(ValueError, match=r"genes fit hg38, those of the peaks mm10"):
        links.refuse_two_genomes(human, peaks)
    with pytest.raises(ValueError, match="peaks have no positions"):
        links.refuse_two_genomes(mouse, read_peaks(["peak1", "peak2"]))


def test_links_of_cells_are_those_of_these_cells(trained, found, mdata: MuData):
    rows = np.arange(0, 160, 2)
    apart = multiome({name: part(mdata, name, rows) for name in ("rna", "atac")})
    named = trained.peak_gene_links(apart, gene_positions=positions())
    pd.testing.assert_frame_equal(named, trained.peak_gene_links(indices=rows, gene_positions=positions()))
    assert not np.allclose(
        named.correlation.sort_values(), found.correlation.iloc[: len(named)].sort_values()
    )
