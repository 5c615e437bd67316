"""Train the CellPLM that ships with cellprior as `cellplm-starter`.

    python scripts/train_starter_cellplm.py --data <folder of .h5ad> --gene-tables <folder> --out <folder>

Needs the sets named in `_starter_corpus.py` and the two GENCODE tables. The studies that the weights are judged on
are not trained on at all, neither by the judged weights nor by the shipped ones: they are the same. Everything is
seeded (`--seed`); the number of threads (`--threads`) may change the last digits. `_starter_judge.py` writes the card.
With `--encoder-done`, the encoder in the folder stays, and decoder and annotation head are made anew.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from _starter_corpus import (
    Source,
    average_share,
    cells_of,
    draw_cells,
    log_input,
    pooled_axes,
    read_sources,
)
from _starter_data import CellSet
from _starter_fit import cosine, train
from _starter_head import add_head
from scvi import REGISTRY_KEYS
from torch.optim.lr_scheduler import LambdaLR

from cellprior.model import CellPLM
from cellprior.model.cellplm._loss import GeneMeans, reconstruction_loss
from cellprior.model.cellplm._module import CellPLMModule
from cellprior.model.cellplm._views import N_RECONSTRUCTED, view_losses
from cellprior.model.learning._plan import Plan
from cellprior.model.learning._views import View, draw_view
from cellprior.weights import write_bundle, write_trained_on

log = logging.getLogger("starter")


@dataclass(frozen=True)
class Recipe:
    """Every choice of the training."""

    seed: int = 0
    n_hidden: int = 256
    n_layers: int = 1
    n_heads: int = 8
    n_latent: int = 128
    decoder_rank: int = 96
    dropout_rate: float = 0.1
    target_sum: float = 10_000.0
    start_cells: int = 400  # of a set, from which the PCA that the network starts from is made
    steps: int = 1_500
    cells: int = 192  # of a step
    profiles: float = 0.35  # of the steps, whose cells are made of average profiles
    one_batch: float = 0.5  # of the steps, whose cells are from one batch of a set
    learning_rate: float = 5e-4
    table_rate: float = 0.1  # times the learning rate: of the gene vectors, which start small from a PCA
    decoder_rate: float = 2.0  # times the learning rate: the decoder starts from nothing
    unknown_set: float = 0.2  # of the steps with cells of a set, in which the decoder is not told which
    warm_up: int = 50  # steps over which the learning rate rises
    weight_decay: float = 1e-3
    clip: float = 5.0
    decoder_steps: int = 800  # more, in which the encoder stands still
    average: float = 0.995  # of the weights, exponential, per step
    temperature: float = 0.1  # at first: it is learned
    reconstruction_weight: float = 3.0
    kl_weight: float = 1e-3


@dataclass(frozen=True)
class Corpus:
    """What a step is drawn from, and what is known of an average cell."""

    vocabulary: pd.DataFrame
    sets: list[CellSet]
    sources: list[Source]
    share: np.ndarray
    average: np.ndarray
    floors: dict[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def n_sets(self) -> int:
        """Sources that are cells; they come first."""
        return sum(not source.is_profile for source in self.sources)

    @property
    def n_cells(self) -> int:
        """Cells and profiles."""
        return sum(source.counts.shape[0] for source in self.sources)


def read(data: Path, gene_tables: Path, recipe: Recipe) -> Corpus:
    """Read the sets and the profiles, and choose the vocabulary."""
    vocabulary, sets, sources = read_sources(data, gene_tables)
    share = average_share(sources, len(vocabulary))
    rng = np.random.default_rng(recipe.seed)
    total, n_known = np.zeros(len(vocabulary)), np.zeros(len(vocabulary))
    floors = {}
    for source in sources:
        x = log_input(source, np.arange(source.counts.shape[0]), share, recipe.target_sum)
        total[source.measured] += np.asarray(x.mean(axis=0)).ravel()[source.measured]
        n_known[source.measured] += 1
        counts, _ = draw_cells(source, 500, 0.0, rng)
        measured = torch.zeros(1, len(vocabulary), dtype=torch.bool)
        measured[0, source.measured] = True
        means = GeneMeans.fit([{REGISTRY_KEYS.X_KEY: counts}], measured)
        floors[source.name] = means.share[0].clamp(min=1e-9), means.dispersion[0]
    return Corpus(vocabulary, sets, sources, share, total / np.maximum(n_known, 1), floors)


@torch.no_grad()
def start_from_pca(module: CellPLMModule, corpus: Corpus, recipe: Recipe) -> None:
    """Let the untrained network compute a PCA, up to its norms: a few minutes of training then go a long way.

    The gene vectors become principal axes of the pooled, per-set centred cells and profiles (each set weighs the
    same), of genes over their standard deviation + 0.3, components over the fourth root of their variance; the linear
    layer passes half of the components on with both signs, so that the ReLU loses nothing; the residual branches start
    small; the latent means start as these components.
    """
    axes, root = pooled_axes(
        corpus.sources,
        corpus.share,
        recipe.n_hidden,
        cells=recipe.start_cells,
        target_sum=recipe.target_sum,
        seed=recipe.seed,
    )
    vectors = axes / root[: recipe.n_latent].mean()

    embedder, latent = module.embedder, module.latent
    embedder.gene_embedding.copy_(torch.from_numpy(vectors).float())
    embedder.share.copy_(torch.from_numpy(1e4 * corpus.share))
    embedder.average.copy_(torch.from_numpy(corpus.average))
    n_components = recipe.n_hidden // 2
    channels = torch.randperm(recipe.n_hidden)  # the norm's groups are alike
    plus, minus = channels[:n_components], channels[n_components:]
    component = torch.arange(n_components)
    embedder.linear.weight.normal_(std=0.005)
    embedder.linear.weight[plus, component] += 1.0
    embedder.linear.weight[minus, component] -= 1.0
    embedder.linear.bias.zero_()
    for layer in module.encoder:
        for branch in (layer.attention.out, layer.ff[3]):
            branch.weight.mul_(0.1)
            branch.bias.zero_()
    first = torch.arange(recipe.n_latent)
    latent.mu.weight.zero_()
    latent.mu.bias.zero_()
    latent.mu.weight[first, plus[: recipe.n_latent]] = 1.0
    latent.mu.weight[first, minus[: recipe.n_latent]] = -1.0
    latent.log_var.weight.mul_(0.1)
    latent.log_var.bias.fill_(-2.0)
    # the decoder begins where it knows no cell: every gene has its share of the average cell
    decoder = module.decoder
    decoder.log_mean.weight.mul_(0.1)
    decoder.log_mean.bias.copy_(torch.from_numpy(np.log(1e4 * corpus.share)))
    decoder.log_dispersion.copy_(
        torch.stack([floor[1].log() for floor in corpus.floors.values()]).median(0)[0]
    )


class Sentence(NamedTuple):
    """Number of a source, counts `(cells, genes)`, labels, two views, the measured genes, and what draws the rest."""

    source: int
    counts: torch.Tensor
    code: torch.Tensor
    views: tuple[View, View]
    measured: torch.Tensor
    rng: np.random.Generator


def draw_sentence(corpus: Corpus, recipe: Recipe, rng: np.random.Generator) -> Sentence:
    """Some cells of a set, or made of the profiles of a tissue; sets are drawn evenly, and tissues are."""
    made = rng.random() < recipe.profiles
    choice = [i for i, source in enumerate(corpus.sources) if source.is_profile == made]
    number = choice[rng.integers(len(choice))]
    source = corpus.sources[number]
    counts, code = draw_cells(source, recipe.cells, recipe.one_batch, rng)
    measured = torch.from_numpy(source.measured)
    views = draw_view(counts, measured, rng), draw_view(counts, measured, rng)
    return Sentence(number, counts, torch.from_numpy(code), views, measured, rng)


class StarterPlan(Plan):
    """Contrast of views and of labels, and reconstruction; the temperature is learned."""

    def __init__(self, module: CellPLMModule, corpus: Corpus, recipe: Recipe) -> None:
        super().__init__(
            module, n_steps=recipe.steps, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.recipe, self.floors = recipe, list(corpus.floors.values())
        self.n_sets = corpus.n_sets
        self.log_temperature = torch.nn.Parameter(torch.tensor(float(np.log(recipe.temperature))))

    def training_step(self, batch: Sentence, batch_idx: int) -> torch.Tensor:
        told = batch.source < self.n_sets and batch.rng.random() >= self.recipe.unknown_set
        losses = view_losses(
            self.module,
            batch.counts,
            batch.views,
            batch.measured,
            batch.rng,
            floor=self.floors[batch.source],
            code=batch.code,
            temperature=self.log_temperature.clamp(-4.0, 0.0).exp(),
            reconstruction_weight=self.recipe.reconstruction_weight,
            kl_weight=self.recipe.kl_weight,
            dataset=torch.full((len(batch.counts),), batch.source) if told else None,
        )
        # each sentence counts the same
        logged = {**losses, "temperature": self.log_temperature.exp()}
        self.log_epoch({name: value.detach() for name, value in logged.items()}, 1, shown="loss")
        return losses["loss"]

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        groups: list[dict[str, Any]] = [{"params": [self.log_temperature], "weight_decay": 0.0}]
        for name, parameter in self.module.named_parameters():
            rate = recipe.decoder_rate if name.startswith("decoder.") else 1.0
            if name == "embedder.gene_embedding":
                rate = recipe.table_rate
            decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
            groups.append({"params": [parameter], "weight_decay": decay, "lr": rate * recipe.learning_rate})
        optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate)

        def share(step: int) -> float:
            return cosine(step + 1, recipe.steps) * min(1.0, (step + 1) / recipe.warm_up)

        return [optimizer], [{"scheduler": LambdaLR(optimizer, share), "interval": "step"}]


class DecoderPlan(Plan):
    """Reconstruction alone, from latents of an encoder that stands still."""

    def __init__(self, module: CellPLMModule, corpus: Corpus, recipe: Recipe) -> None:
        lr = recipe.decoder_rate * recipe.learning_rate
        super().__init__(module, n_steps=recipe.decoder_steps, lr=lr, weight_decay=recipe.weight_decay)
        self.recipe, self.floors = recipe, list(corpus.floors.values())
        self.n_sets = corpus.n_sets

    def on_train_epoch_start(self) -> None:
        """Dropout in the decoder, and nowhere else."""
        self.module.eval()
        self.module.decoder.train()

    def training_step(self, batch: Sentence, batch_idx: int) -> torch.Tensor:
        """Counts of some measured genes, from a view of the cells."""
        told = batch.source < self.n_sets and batch.rng.random() >= self.recipe.unknown_set
        view, drawn = batch.views[0], batch.rng.permutation(len(batch.measured))[:N_RECONSTRUCTED]
        genes = batch.measured[torch.from_numpy(np.sort(drawn))]
        with torch.no_grad():
            z = self.module.latent_of(self.module.hidden(view.counts, gene_index=view.genes))
        code = torch.full((len(z),), batch.source) if told else None
        target, (share, dispersion) = batch.counts[:, genes], self.floors[batch.source]
        loss = reconstruction_loss(target, *self.module.decode(z, genes=genes, dataset=code)) / len(genes)
        floor = reconstruction_loss(target, share[genes].expand_as(target), dispersion[genes]) / len(genes)
        losses = {"reconstruction": loss.detach(), "reconstruction_floor_gene_means": floor}
        self.log_epoch(losses, 1, shown="reconstruction")
        return loss


def train_decoder(model: CellPLM, corpus: Corpus, recipe: Recipe) -> None:
    """Let the decoder catch up: it starts from nothing, where the encoder starts from a PCA."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    model.module.requires_grad_(False)
    model.module.decoder.requires_grad_(True)
    plan = DecoderPlan(model.module, corpus, recipe)
    steps = {
        "n_train": corpus.n_cells,
        "steps": recipe.decoder_steps,
        "clip": recipe.clip,
        "average": recipe.average,
    }
    train(model, plan, lambda: draw_sentence(corpus, recipe, rng), **steps)
    model.module.requires_grad_(True)


def network_of(corpus: Corpus, recipe: Recipe) -> dict[str, Any]:
    """Arguments of the network."""
    names = ("n_hidden", "n_layers", "n_heads", "n_latent", "dropout_rate", "target_sum", "decoder_rank")
    return {name: getattr(recipe, name) for name in names} | {
        "latent": "vae",
        "n_datasets": corpus.n_sets,
        "absent": "average",
        "embedding": "direction",
    }


def build(corpus: Corpus, recipe: Recipe) -> CellPLM:
    """The network before training."""
    torch.manual_seed(recipe.seed)
    ids = corpus.vocabulary["ensembl_id"]
    adata = ad.AnnData(sp.csr_matrix(np.ones((2, len(ids)), np.float32)), var=pd.DataFrame(index=ids))
    CellPLM.setup_anndata(adata)
    model = CellPLM(adata, genes=corpus.vocabulary, **network_of(corpus, recipe))
    start_from_pca(model.module, corpus, recipe)
    return model


def train_on(corpus: Corpus, recipe: Recipe, callbacks: Sequence[Any] = ()) -> CellPLM:
    """Train on the cells of a corpus."""
    model = build(corpus, recipe)
    rng = np.random.default_rng(recipe.seed)
    plan = StarterPlan(model.module, corpus, recipe)
    steps = {"n_train": corpus.n_cells, "steps": recipe.steps, "clip": recipe.clip, "average": recipe.average}
    train(model, plan, lambda: draw_sentence(corpus, recipe, rng), callbacks=callbacks, **steps)
    return model


def write(folder: Path, model: CellPLM, recipe: Recipe, card: str) -> None:
    """A bundle in half precision."""
    config = {
        "model": "CellPLM",
        "network": model._network(),
        "annotation": model.annotation_,
        "recipe": asdict(recipe),
    }
    write_bundle(
        folder,
        state_dict=model.module.state_dict(),
        config=config,
        genes=model.genes,
        card=card,
        dtype=torch.float16,
        overwrite=True,
    )


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the .h5ad files")
    parser.add_argument("--gene-tables", type=Path, required=True, help="folder with the two GENCODE tables")
    parser.add_argument("--out", type=Path, required=True, help="folder for the bundle and training.log")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--encoder-done", action="store_true", help="go on from the weights in --out")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    mode = "a" if args.encoder_done else "w"
    handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(args.out / "training.log", mode=mode)]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers)
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    recipe = Recipe(seed=args.seed)
    log.info("%s", asdict(recipe))
    corpus = read(args.data, args.gene_tables, recipe)
    sizes = {source.name: source.counts.shape[0] for source in corpus.sources}
    log.info("%d genes; cells or profiles: %s", len(corpus.vocabulary), sizes)
    if not args.encoder_done:
        write(args.out, train_on(corpus, recipe), recipe, "Not judged yet.\n")
    model = CellPLM.from_pretrained(args.out)  # in half precision, as it is shipped
    train_decoder(model, corpus, recipe)
    found = add_head(model, corpus.sources, corpus.sets, seed=recipe.seed)
    log.info(
        "the head, on studies that it has not seen: %s", {name: round(x, 4) for name, x in found.items()}
    )
    write(args.out, model, recipe, "Not judged yet.\n")
    write_trained_on(args.out, cells_of(corpus.sets, corpus.sources, corpus.vocabulary))


if __name__ == "__main__":
    main()
