from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

from cellprior.evaluate._masked import _Predictors, masked_prediction
from cellprior.evaluate._splits import RANDOM, Split
from cellprior.model import CellPLM, ScBERT
from cellprior.model.cellplm._inputs import sample_mask as cellplm_mask
from cellprior.model.cellplm._loss import GeneMeans
from cellprior.model.cellplm._masked import MIN_MEAN, Fitted, fit_covariates
from cellprior.model.cellplm._masked import masked_scores as cellplm_scores
from cellprior.model.cellplm._module import CellPLMModule
from cellprior.model.scbert._floors import PRIOR, BinFloors
from cellprior.model.scbert._inputs import counts_to_bins, sample_mask
from cellprior.model.scbert._masked import gene_mean_and_cell
from cellprior.model.scbert._masked import masked_scores as scbert_scores
from cellprior.model.scbert._module import ScBERTModule
from tests.contract.models import blood_cells, tiny_scbert

N_BINS = 5
QUICK = {"seeds": 1, "max_cells": 20, "progress": False}
NETWORK = {"n_hidden": 16, "n_layers": 1, "n_heads": 2, "n_latent": 4}
PREDICTORS = ["uniform", "all_genes", "per_gene", "per_cell", "rate_and_depth"]


def counts_of(n_cells: int, n_genes: int = 80, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    share = np.exp(np.random.default_rng(7).normal(0, 1.5, size=n_genes))
    depth = rng.gamma(4.0, 100.0, size=(n_cells, 1))
    return torch.from_numpy(rng.poisson(depth * share / share.sum()).astype(np.float32))


def bin_floors(counts: torch.Tensor) -> BinFloors:
    return BinFloors.fit(
        [{"X": part} for part in counts.split(300)],
        torch.ones(1, counts.shape[1], dtype=torch.bool),
        N_BINS,
    )


def gene_means(counts: torch.Tensor) -> Fitted:
    return Fitted(GeneMeans.fit([{"X": counts}], torch.ones(1, counts.shape[1], dtype=torch.bool)), {})


@pytest.fixture
def scbert_module() -> ScBERTModule:
    torch.manual_seed(0)
    return ScBERTModule(80, n_hidden=8, n_layers=1, n_heads=2, head_dim=4).eval()


@pytest.fixture
def cellplm_module() -> CellPLMModule:
    torch.manual_seed(0)
    return CellPLMModule(80, **NETWORK).eval()


# what is hidden stays hidden


def test_scbert_sees_the_mask_in_place_of_every_gene_that_it_is_asked_about(scbert_module, monkeypatch):
    shown: list[torch.Tensor] = []
    encode = scbert_module.encode
    monkeypatch.setattr(
        scbert_module, "encode", lambda tokens: shown.append(tokens.clone()) or encode(tokens)
    )
    counts = counts_of(6)
    rng = np.random.default_rng(0)
    found = scbert_scores(scbert_module, counts, bin_floors(counts_of(50, seed=1)), share=0.3, rng=rng)
    seen, tokens = torch.cat(shown), counts_to_bins(counts, N_BINS)
    masked = seen == N_BINS + 1
    assert torch.equal(masked.sum(1), found.n_hidden)
    assert torch.equal(found.n_hidden, ((tokens > 0).sum(1) * 0.3).ceil().long())
    assert torch.equal(seen[~masked], tokens[~masked])
    assert (tokens[masked] > 0).all()


def test_cellplm_does_not_see_the_counts_that_it_is_asked_about(cellplm_module, monkeypatch):
    shown: list[torch.Tensor] = []
    hidden_chunks = cellplm_module.hidden_chunks
    monkeypatch.setattr(
        cellplm_module,
        "hidden_chunks",
        lambda chunks: shown.append(chunks[0].clone()) or hidden_chunks(chunks),
    )
    counts = counts_of(40) + 1  # no zeros but hidden ones
    measured = torch.ones(80, dtype=torch.bool)
    measured[:7] = False
    floor, rng = gene_means(counts_of(50, seed=1)), np.random.default_rng(0)
    found = cellplm_scores(cellplm_module, counts, floor, share=0.25, rng=rng, measured=measured)
    masked = shown[0] == 0
    assert torch.equal(masked.sum(1), found.n_hidden)
    assert not masked[:, :7].any()
    assert (found.n_hidden > 0).sum() == 30  # three quarters of the cells
    # and a hidden count changes no prediction: only what it is compared with
    other = counts.clone()
    other[masked] = 50
    again = cellplm_scores(
        cellplm_module, other, floor, share=0.25, rng=np.random.default_rng(0), measured=measured
    )
    assert torch.equal(shown[0], shown[1])
    assert not torch.equal(again.sums["poisson"]["model"], found.sums["poisson"]["model"])


# the numbers


def test_scores_of_scbert_add_up_those_of_the_hidden_genes(scbert_module):
    counts, floor = counts_of(5), bin_floors(counts_of(50, seed=1))
    found = scbert_scores(scbert_module, counts, floor, share=0.3, rng=np.random.default_rng(3))
    tokens = counts_to_bins(counts, N_BINS)
    selected = torch.from_numpy(sample_mask(tokens.numpy(), np.random.default_rng(3), rate=0.3).selected)
    predicted = floor.predict(counts, tokens, selected)
    shown = tokens.masked_fill(selected, N_BINS + 1)
    with torch.no_grad():
        logits = scbert_module.predict_bins(scbert_module.encode(shown)[:, :-1])
    for i in range(5):
        right, loss = dict.fromkeys(["model", *PREDICTORS], 0.0), {}
        for gene in selected[i].nonzero()[:, 0].tolist():
            rank = int(tokens[i, gene]) - 1
            places = selected.nonzero().tolist().index([i, gene])
            probability = {name: p[places].exp() for name, p in predicted.items()}
            probability["model"] = logits[i, gene, 1:-1].softmax(0)
            for name, p in probability.items():
                best = (p == p.max()).double()
                right[name] += float(best[rank] / best.sum())
                loss[name] = loss.get(name, 0.0) - float(p[rank].log())
        for name in right:
            assert found.sums["accuracy"][name][i].item() == pytest.approx(right[name], abs=1e-6)
            assert found.sums["cross_entropy"][name][i].item() == pytest.approx(loss[name], rel=1e-4)
    assert set(found.sums["accuracy"]) - set(found.sums["cross_entropy"]) == {"gene_mean_and_cell"}


def test_a_gene_is_expected_as_far_above_its_mean_as_the_cell_is_in_sight():
    train, test = counts_of(50, seed=1), counts_of(4)
    floor, bins = bin_floors(train), counts_to_bins(test, N_BINS)
    selected = torch.from_numpy(sample_mask(bins.numpy(), np.random.default_rng(0), rate=0.3).selected)
    trained = counts_to_bins(train, N_BINS).double().numpy()
    overall = trained[trained > 0].mean()
    n = (trained > 0).sum(axis=0)
    mean = (trained.sum(axis=0) + PRIOR * overall) / (n + PRIOR)
    expected = []
    for i, gene in selected.nonzero().tolist():
        sight = ((bins[i] > 0) & ~selected[i]).numpy()
        above = (bins[i].numpy()[sight] - mean[sight]).mean()
        expected.append(np.clip(np.round(mean[gene] + above), 1, N_BINS))
    assert gene_mean_and_cell(floor, bins, selected).tolist() == expected


def test_scores_of_cellplm_are_log_probabilities_at_the_depth_in_sight(cellplm_module):
    counts, train = counts_of(8), counts_of(200, seed=1)
    floor = gene_means(train)
    seen: list[torch.Tensor] = []
    decode = cellplm_module.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cellplm_module, "decode", lambda z: seen.append(decode(z)[0]) or decode(z))
        found = cellplm_scores(
            cellplm_module,
            counts,
            floor,
            share=0.25,
            rng=np.random.default_rng(0),
            measured=torch.ones(80, dtype=torch.bool),
        )
    hidden = cellplm_mask(8, 80, rng=np.random.default_rng(0), gene_rate=0.25)
    share = train.sum(0).double().numpy() / train.sum().item()
    theta = floor.floor.dispersion[0].double().numpy()
    x = counts.double().numpy()
    shares = {"gene_means": np.tile(share, (8, 1)), "equal_shares": np.ones((8, 80))}
    shares["model"] = seen[0].double().numpy()
    for name, r in shares.items():
        for i in range(8):
            mean = r[i] * x[i][~hidden[i]].sum() / r[i][~hidden[i]].sum()
            mean = np.maximum(mean, MIN_MEAN)
            poisson = -scipy.stats.poisson.logpmf(x[i], mean)[hidden[i]].sum()
            assert found.sums["poisson"][name][i].item() == pytest.approx(poisson, rel=1e-4, abs=1e-6)
            if name != "model":
                nb = -scipy.stats.nbinom.logpmf(x[i], theta, theta / (theta + mean))[hidden[i]].sum()
                assert found.sums["negative_binomial"][name][i].item() == pytest.approx(
                    nb, rel=1e-3, abs=1e-4
                )


def test_the_decoder_gets_the_covariates_that_fit_the_training_cells_of_a_batch():
    torch.manual_seed(0)
    module = CellPLMModule(80, **NETWORK, n_batches=3, n_datasets=2).eval()
    for covariate in (module.decoder.batch, module.decoder.dataset):
        torch.nn.init.normal_(covariate.embedding.weight, std=3.0)
    measured = torch.ones(80, dtype=torch.bool)
    cells = {0: counts_of(30), 1: counts_of(30, seed=4).flip(1)}
    batches = [{"X": x, "batch": torch.full((30, 1), code)} for code, x in cells.items()]
    found = fit_covariates(module, batches, measured)
    assert found.keys() == {0, 1}
    for code, x in cells.items():

        def loss(**covariates):
            fitted = gene_means(x)._replace(covariates={0: covariates})  # noqa: B023
            rng = np.random.default_rng(0)
            scores = cellplm_scores(module, x, fitted, share=0.25, rng=rng, measured=measured)  # noqa: B023
            return scores.sums["poisson"]["model"].sum().item()

        best = min([{}, *({"dataset": i} for i in range(2))], key=lambda given: loss(**given))
        best = min([best, *({**best, "batch": i} for i in range(3))], key=lambda given: loss(**given))
        assert found[code] == best
        assert loss(**found[code]) < max(loss(dataset=i, batch=j) for i in range(2) for j in range(3))
    assert fit_covariates(CellPLMModule(80, **NETWORK).eval(), batches, measured) == {}


# accuracies that were measured before on 15 % of the expressed genes of a fifth of the cells, the others to fit to
PUBLISHED = {
    "all_genes": 0.579,
    "per_gene": 0.656,
    "per_cell": 0.719,
    "gene_mean_and_cell": 0.766,
    "rate_and_depth": 0.792,
}


def test_the_trivial_predictors_reach_what_was_measured_before_on_pbmc3k(shared_data):
    adata = ad.read_h5ad(shared_data / "rna" / "pbmc3k_seurat.h5ad")
    order = np.random.default_rng(0).permutation(adata.n_obs)
    test, train = np.split(order, [adata.n_obs // 5])
    floor = BinFloors.fit(
        ({"X": torch.from_numpy(adata.X[part].toarray())} for part in np.array_split(train, 10)),
        torch.ones(1, adata.n_vars, dtype=torch.bool),
        N_BINS,
    )
    torch.manual_seed(0)
    module = ScBERTModule(adata.n_vars, n_hidden=2, n_layers=1, n_heads=1, head_dim=2).eval()
    counts = torch.from_numpy(adata.X[test].toarray())
    found = scbert_scores(module, counts, floor, share=0.15, rng=np.random.default_rng(0))
    n_hidden = found.n_hidden.sum()
    for name, accuracy in PUBLISHED.items():
        reached = (found.sums["accuracy"][name].sum() / n_hidden).item()
        assert reached == pytest.approx(accuracy, abs=0.01), name


# the table


def attach(model: type, n_cells: int = 100, **setup: str):
    adata = blood_cells()[:n_cells].copy()
    model.setup_anndata(adata, **setup)
    return model.from_pretrained("cellplm-starter" if model is CellPLM else tiny_scbert(), adata)


@pytest.fixture(scope="module", params=[CellPLM, ScBERT], ids=lambda model: model.__name__)
def table(request) -> pd.DataFrame:
    return masked_prediction(attach(request.param, batch_key="batch"), **{**QUICK, "seeds": 2})


def test_there_is_a_row_per_share_measure_and_predictor(table):
    assert not table.duplicated(["mask_share", "metric", "method"]).any()
    assert table["mask_share"].unique().tolist() == [0.15, 0.3]
    assert (table.groupby(["mask_share", "metric"])["method"].first() == "model").all()
    assert (table["seeds"] == 2).all()
    assert (table["split"] == "random cells").all()
    hidden = table.groupby("mask_share")["n_hidden"].first()
    assert hidden[0.3] / hidden[0.15] == pytest.approx(2, abs=0.4)
    assert table["value"].between(table["low"] - 1e-9, table["high"] + 1e-9).all()


def test_all_are_compared_with_the_best_that_is_not_the_model(table):
    for _, of_measure in table.groupby(["mask_share", "metric"]):
        others = of_measure[of_measure["method"] != "model"].set_index("method")["value"]
        best = others.idxmax() if of_measure["better"].iloc[0] == "higher" else others.idxmin()
        assert (of_measure.loc[of_measure["method"] != best, "versus"] == best).all()
        assert of_measure.loc[of_measure["method"] == best, "difference"].isna().all()
        model = of_measure[of_measure["method"] == "model"].iloc[0]
        assert model["difference"] == pytest.approx(model["value"] - others[best])
    assert ((table["metric"] == "accuracy") == (table["better"] == "higher")).all()


def test_random_weights_are_worse_than_knowing_rates_and_depth():
    found = masked_prediction(attach(ScBERT), **QUICK)
    model = found[(found["method"] == "model") & (found["metric"] == "cross_entropy")]
    assert (model["difference_low"] > 0).all()


def test_the_predictors_are_fitted_to_the_training_cells_and_scores_stay_with_their_cells(monkeypatch):
    """Sentences are of one batch; the cells come back in the order that they were asked in."""
    model = attach(ScBERT, batch_key="batch")
    fitted = []
    fit = ScBERT._fit_floor

    def recorded(self, batches, measured):
        fitted.append(fit(self, batches, measured))
        return fitted[-1]

    monkeypatch.setattr(ScBERT, "_fit_floor", recorded)
    split = Split(RANDOM, 0, "", np.arange(0, 100, 2), np.arange(1, 100, 2)[::-1])
    n_hidden, _ = _Predictors(model, model._cells(), split).scores(0.3)
    index = model.gene_match.index
    counts = np.zeros((100, len(model.genes)), dtype=np.float32)
    counts[:, index[index >= 0]] = model.adata.X.toarray()[:, index >= 0]
    expressed = (counts_to_bins(torch.from_numpy(counts), N_BINS).numpy() > 0).sum(axis=1)
    assert n_hidden.tolist() == np.ceil(expressed[split.test].astype(np.float32) * np.float32(0.3)).tolist()
    for code, batch in enumerate("ab"):  # and to those of the same batch
        known = split.train[(model.adata.obs["batch"] == batch).to_numpy()[split.train]]
        rate = counts[known].sum(axis=0) / counts[known].sum()
        np.testing.assert_allclose(fitted[0].rate[code], rate, rtol=1e-5)


def test_other_data_and_the_same_seeds():
    model, other = attach(CellPLM), blood_cells()[100:180].copy()
    first, second = (masked_prediction(model, other, **QUICK).drop(columns="seconds") for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert not first["value"].equals(masked_prediction(model, **QUICK)["value"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_shares": (0.15, 1.5)}, "1.5 is no share of genes or cells"),
        ({"test_size": 0}, "0 is no share"),
        ({"seeds": 0}, "100 cells, seeds=0, max_cells=500; at least 10, 1 and 1"),
    ],
)
def test_what_cannot_be_asked_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        masked_prediction(attach(CellPLM), **options)


def test_an_untrained_model_is_refused():
    adata = blood_cells()[:40].copy()
    CellPLM.setup_anndata(adata)
    with pytest.raises(RuntimeError, match="trained"):
        masked_prediction(CellPLM(adata, **NETWORK))
