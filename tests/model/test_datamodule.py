"""Training cells that a datamodule of scvi-tools reads from disk."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

from cellprior.genes import GeneMatchError
from cellprior.model import CellPLM, NotCountsError, ScBERT
from cellprior.model._base import PretrainedModel
from cellprior.model.data._collection import Sections
from cellprior.model.data._datamodule import StreamedCells
from cellprior.model.learning._training import refuse_with_datamodule
from tests.contract.models import blood_cells

QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1}
SMALL = {"n_hidden": 16, "n_layers": 1, "n_heads": 2}
pytestmark = pytest.mark.filterwarnings("ignore:After training:UserWarning")


class Loader:
    """Some cells, as annbatch gives them: not yet what a model reads."""

    def __init__(self, counts: np.ndarray, batch_size: int) -> None:
        self.counts, self.batch_size = counts, batch_size

    def __len__(self) -> int:
        return -(-len(self.counts) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self.counts), self.batch_size):
            yield {"X": self.counts[start : start + self.batch_size], "obs": None}


class SomeCells(pl.LightningDataModule):
    """What of ``scvi.dataloaders.AnnbatchDataModule`` is read."""

    def __init__(self, adata: AnnData) -> None:
        super().__init__()
        self.counts = adata.X.toarray()
        self.registry = {
            "field_registries": {"X": {"state_registry": {"column_names": list(adata.var_names)}}}
        }

    def set_split(self, *, train_size: float, batch_size: int, **others: Any) -> None:
        self.n_train, self.batch_size = round(train_size * len(self.counts)), batch_size
        self.n_val = len(self.counts) - self.n_train

    def train_dataloader(self) -> Loader:
        return Loader(self.counts[: self.n_train], self.batch_size)

    def val_dataloader(self) -> Loader:
        return Loader(self.counts[self.n_train :], self.batch_size)

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return {"X": torch.from_numpy(batch["X"]), "batch": torch.zeros(len(batch["X"]), 1)}


@pytest.fixture
def adata() -> AnnData:
    adata = blood_cells()
    del adata.layers["log"]
    return adata


@pytest.fixture(params=[CellPLM, ScBERT])
def model(request: pytest.FixtureRequest, adata: AnnData) -> PretrainedModel:
    few = adata[:10].copy()
    request.param.setup_anndata(few, batch_key="batch")
    torch.manual_seed(0)
    options = {"n_batches": 2} if request.param is CellPLM else {"head_dim": 8}
    return request.param(few, genes=adata.var_names[::-1][:400], **SMALL, **options)


def test_cells_of_a_datamodule_are_trained_on_and_held_out(model, adata):
    model.train(max_epochs=3, batch_size=100, datamodule=SomeCells(adata), plan_kwargs={"lr": 1e-2}, **QUIET)
    for stage in ("train", "validation"):
        loss = model.history[f"{stage}_loss"].iloc[:, 0].astype(float)
        assert len(loss) == 3
        assert loss.iloc[-1] < loss.iloc[0]
    assert any("_floor_" in name for name in model.history)
    assert model.get_latent_representation(adata).shape[0] == adata.n_obs


def test_a_model_without_data_can_be_trained_on_a_datamodule(adata, tmp_path):
    few = adata[:10].copy()
    CellPLM.setup_anndata(few)
    CellPLM(few, genes=adata.var_names, **SMALL).save(tmp_path / "model")
    model = CellPLM.load(tmp_path / "model", adata=False)
    model.train(max_epochs=1, batch_size=350, datamodule=SomeCells(adata), **QUIET)
    assert model.is_trained_


def test_counts_are_in_the_order_of_the_vocabulary(adata):
    shuffled = adata[:, np.random.default_rng(0).permutation(adata.n_vars)].copy()
    genes = pd.DataFrame(
        {"ensembl_id": "", "symbol": ["no such gene", *adata.var_names[:300]], "previous_symbols": ""}
    )
    split = {"train_size": None, "validation_size": None, "shuffle_set_split": True, "batch_size": 64}
    cells = StreamedCells(SomeCells(shuffled), genes, 0.1, **split)
    assert (cells.n_train, cells.n_val) == (630, 70)
    for loader, rows in ((cells.train_dataloader(), slice(630)), (cells.val_dataloader(), slice(630, None))):
        counts = torch.cat([batch["X"] for batch in loader]).numpy()
        np.testing.assert_array_equal(counts[:, 1:], adata.X[rows, :300].toarray())
        assert not counts[:, 0].any()
    assert len(list(cells.floor_minibatches())) == len(cells.train_dataloader()) == 10


def test_predictors_without_biology_are_fitted_to_some_of_many_cells(adata, monkeypatch):
    monkeypatch.setattr("cellprior.model.data._datamodule.FLOOR_CELLS", 200)
    split = {"train_size": 1.0, "validation_size": None, "shuffle_set_split": True, "batch_size": 64}
    genes = pd.DataFrame({"ensembl_id": "", "symbol": adata.var_names, "previous_symbols": ""})
    assert len(list(StreamedCells(SomeCells(adata), genes, 0.1, **split).floor_minibatches())) == 3


def test_what_a_datamodule_cannot_do_is_refused(model, adata):
    with pytest.raises(ValueError, match="measured= names genes by batch"):
        model.train(datamodule=SomeCells(adata), measured={"a": [], "b": []}, **QUIET)
    with pytest.raises(ValueError, match="each process would train on the same cells"):
        model.train(datamodule=SomeCells(adata), strategy="ddp_spawn", **QUIET)
    log = adata.copy()
    log.X = log.X.log1p()
    with pytest.raises(NotCountsError, match="does not give raw counts: gene '.*' is 0.693147 in a cell"):
        model.train(datamodule=SomeCells(log), **QUIET)
    adata.var_names = [f"peak {i}" for i in range(adata.n_vars)]
    with pytest.raises(GeneMatchError):
        model.train(datamodule=SomeCells(adata), **QUIET)


# annbatch and anndata announce many changes to come
@pytest.mark.filterwarnings("ignore")
def test_annbatch_reads_the_training_cells_from_a_collection_on_disk(model, adata, tmp_path, monkeypatch):
    annbatch = pytest.importorskip("annbatch")
    zarr = pytest.importorskip("zarr")
    from scvi.dataloaders import AnnbatchDataModule

    monkeypatch.chdir(tmp_path)
    for name, cells in (("a", slice(350)), ("b", slice(350, None))):
        adata[cells].copy().write_h5ad(f"{name}.h5ad")
    collection = annbatch.DatasetCollection(zarr.open_group("cells.zarr", mode="w"))
    collection.add_adatas([Path("a.h5ad"), Path("b.h5ad")], shuffle=True)
    size: dict[str, Any] = {"chunk_size": 16, "preload_nchunks": 8, "preload_to_gpu": False}
    loader = annbatch.Loader(batch_size=64, to="torch", **size).use_collection(collection)
    datamodule = AnnbatchDataModule(loader, var_names=list(adata.var_names), shuffle=True, **size)
    model.train(max_epochs=3, batch_size=64, datamodule=datamodule, plan_kwargs={"lr": 1e-2}, **QUIET)
    loss = model.history["train_loss"].iloc[:, 0].astype(float)
    assert loss.iloc[-1] < loss.iloc[0]
    assert model.history["validation_loss"].notna().all().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = torch.cat(
            [
                batch["X"]
                for batch in StreamedCells(
                    datamodule,
                    model.genes,
                    0.1,
                    train_size=1.0,
                    validation_size=None,
                    shuffle_set_split=True,
                    batch_size=64,
                ).train_dataloader()
            ]
        )
    known = adata[:, model.genes["symbol"]].X.sum(axis=0)
    np.testing.assert_array_equal(seen.sum(0).numpy(), np.asarray(known).ravel())


@pytest.mark.parametrize(("n_ranks", "batch_size", "size"), [(1, 64, None), (2, 48, 500), (3, 10, 700)])
def test_no_cell_is_read_twice_in_a_pass_and_every_process_has_as_many_minibatches(n_ranks, batch_size, size):
    sections = Sections(110, 2_300, batch_size, size, seed=3, chunk=16)
    passes = []
    for number in range(2):
        seen = []
        for section in range(number * sections.n_sections, (number + 1) * sections.n_sections):
            for rank in range(n_ranks):
                batches = [
                    np.concatenate([np.arange(s.start, s.stop) for s in request["requests"]])[split]
                    for request in sections.requests(section, rank=rank, n_ranks=n_ranks)
                    for split in request["splits"]
                ]
                assert len(batches) == sections.n_batches(n_ranks) > 0
                assert {len(batch) for batch in batches} == {batch_size}
                seen += batches
        passes.append(np.concatenate(seen))
        assert len(np.unique(passes[-1])) == len(passes[-1])
        assert passes[-1].min() >= 110 and passes[-1].max() < 2_300
        assert len(passes[-1]) > 0.8 * 2_190  # of few cells, more are left over
    assert not np.array_equal(*passes)
    again = Sections(110, 2_300, batch_size, size, seed=3, chunk=16)
    assert again.chunks(1, rank=0, n_ranks=n_ranks) == sections.chunks(1, rank=0, n_ranks=n_ranks)


def test_processes_may_share_the_cells_of_a_datamodule_that_deals_them_out():
    refuse_with_datamodule(SimpleNamespace(by_process=True), measured=None, strategy="ddp")
    with pytest.raises(ValueError, match="each process would train on the same cells"):
        refuse_with_datamodule(SimpleNamespace(), measured=None, strategy="ddp")
