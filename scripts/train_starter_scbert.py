"""Train the ScBERT that ships with cellprior as `scbert-starter`.

    python scripts/train_starter_scbert.py --data <folder of .h5ad> --gene-tables <folder> --out <folder>

Cells, profiles and vocabulary are those of `cellplm-starter`, see `_starter_corpus.py`, and so are the studies that
are kept aside to judge it: neither the judged nor the shipped weights, which are the same, have seen them. Everything
is seeded (`--seed`); the number of threads (`--threads`) may change the last digits. `_starter_scbert_card.py` judges
the weights and writes the card.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from _starter_corpus import Source, average_share, cells_of, draw_cells, pooled_axes, read_sources
from _starter_data import CellSet
from _starter_fit import cosine, train
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from cellprior.model import ScBERT
from cellprior.model.learning._contrast import chance_of_labels, info_nce, label_contrast
from cellprior.model.learning._plan import Plan
from cellprior.model.learning._views import draw_view
from cellprior.model.scbert._attention import FavorAttention
from cellprior.model.scbert._inputs import sample_mask
from cellprior.model.scbert._module import ScBERTModule, sample_genes
from cellprior.weights import write_bundle, write_trained_on

log = logging.getLogger("starter")


@dataclass(frozen=True)
class Recipe:
    """Every choice of the training."""

    seed: int = 0
    n_hidden: int = 112
    n_layers: int = 1
    n_heads: int = 8
    head_dim: int = 14
    n_bins: int = 7
    n_features: int = 32
    n_zero_genes: int = 256  # unexpressed genes of a cell of which genes are hidden, at most
    pooling: str = "cls"
    token_width: int = 16  # dimensions in which tokens, and not genes, differ at first
    height: float = (
        3.0  # of a token's vector: root mean square over all dimensions, where a gene's is about 0.35
    )
    start_cells: int = 400  # of a set, from which the PCA that the network starts from is made
    target_sum: float = 10_000.0  # of that PCA
    steps: int = 400
    cells: int = 128  # of a step
    profiles: float = 0.35  # of the steps, whose cells are made of average profiles
    one_batch: float = 0.5  # of the steps, whose cells are from one batch of a set
    depths: tuple[float, float] = (200.0, 20_000.0)  # of a view
    masked_cells: int = 8  # of a step, some of whose genes are hidden
    mask_rate: float = 0.2  # the original: 0.15
    replace_rate: float = 0.9
    most_masked: int = 64  # genes of a cell that are asked for
    masked_weight: float = 0.3
    bins_draws: int = (
        600  # at the end, of some cells with hidden genes, from which nothing but their bins is learned
    )
    learning_rate: float = 1e-3
    table_rate: float = 0.2  # times the learning rate: of the gene vectors, which start from a PCA
    warm_up: int = 50  # steps over which the learning rate rises
    weight_decay: float = 1e-3
    clip: float = 5.0
    average: float = 0.99  # of the weights, exponential, per step
    temperature: float = 0.1  # at first: it is learned


@dataclass(frozen=True)
class Corpus:
    """What a step is drawn from, and what share of an average cell's counts each gene has."""

    vocabulary: pd.DataFrame
    sets: list[CellSet]
    sources: list[Source]
    share: np.ndarray

    @property
    def n_cells(self) -> int:
        """Cells to train on, without those that are made of profiles."""
        return sum(source.counts.shape[0] for source in self.sources if not source.is_profile)


def read(data: Path, gene_tables: Path) -> Corpus:
    """Read the sets and the profiles, and choose the vocabulary."""
    vocabulary, sets, sources = read_sources(data, gene_tables)
    return Corpus(vocabulary, sets, sources, average_share(sources, len(vocabulary)))


class Seen(NamedTuple):
    """The positions that a pass sees `(cells, positions)`: bins, genes, how many genes each stands for."""

    tokens: Tensor
    genes: Tensor
    weight: Tensor

    def states(self, module: ScBERTModule, read: slice) -> Tensor:
        """Hidden states of some positions; the class token is the last."""
        return module._encode(self.tokens, self.genes, F.pad(self.weight, (0, 1), value=1.0), read=read)


class Hidden(NamedTuple):
    """Cells some of whose genes are hidden; those that are asked for are the last positions before the class token."""

    seen: Seen
    bins: Tensor  # (cells, asked)
    asked: Tensor  # which of these are to be predicted


class Step(NamedTuple):
    """Bins of two views of some cells, one below the other; labels; and hidden genes."""

    tokens: Tensor
    code: Tensor
    hidden: Hidden


def see(tokens: Tensor, n_zero_genes: int, rng: np.random.Generator) -> Seen:
    """The expressed genes of each cell and a random sample of the others."""
    genes, weight = sample_genes(tokens, n_zero_genes, torch.from_numpy(rng.permutation(tokens.shape[1])))
    return Seen(tokens.gather(1, genes), genes, weight)


def hide(tokens: Tensor, recipe: Recipe, rng: np.random.Generator) -> Hidden:
    """Hide some expressed genes of each cell and ask for at most so many of them."""
    mask = sample_mask(
        tokens.numpy(), rng, rate=recipe.mask_rate, replace=recipe.replace_rate, n_bins=recipe.n_bins
    )
    selected, replaced = (torch.from_numpy(part) for part in mask)
    seen = see(tokens, recipe.n_zero_genes, rng)
    chosen = selected.gather(1, seen.genes) & (seen.weight > 0)
    order = (chosen + 0.5 * torch.from_numpy(rng.random(chosen.shape))).argsort(1)
    seen, chosen = Seen(*(part.gather(1, order) for part in seen)), chosen.gather(1, order)
    n_asked = min(int(chosen.sum(1).max()), recipe.most_masked)
    bins, asked = seen.tokens[:, -n_asked:], chosen[:, -n_asked:]
    shown = seen.tokens.masked_fill(replaced.gather(1, seen.genes), recipe.n_bins + 1)
    return Hidden(seen._replace(tokens=shown), bins, asked)


def draw_step(module: ScBERTModule, corpus: Corpus, recipe: Recipe, rng: np.random.Generator) -> Step:
    """Some cells of a set, or made of the profiles of a tissue."""
    source = draw_source(corpus, recipe, rng)
    counts, code = draw_cells(source, recipe.cells, recipe.one_batch, rng)
    measured = torch.from_numpy(source.measured)
    views = [draw_view(counts, measured, rng, depths=recipe.depths) for _ in range(2)]
    tokens = torch.cat([module.tokens(view.counts, gene_index=view.genes) for view in views])
    some = rng.permutation(len(counts))[: recipe.masked_cells]
    hidden = hide_some(module, counts[some], measured, recipe, rng)
    return Step(tokens, torch.from_numpy(code), hidden)


def draw_source(corpus: Corpus, recipe: Recipe, rng: np.random.Generator) -> Source:
    """A set, or the profiles of a tissue; sets are drawn evenly, and tissues are."""
    made = rng.random() < recipe.profiles
    choice = [source for source in corpus.sources if source.is_profile == made]
    return choice[rng.integers(len(choice))]


def hide_some(
    module: ScBERTModule,
    counts: Tensor,
    measured: Tensor,
    recipe: Recipe,
    rng: np.random.Generator,
    *,
    panel_rate: float = 0.0,
) -> Hidden:
    """Hide genes of cells that are thinned, and some of which are seen through a panel."""
    view = draw_view(counts, measured, rng, depths=recipe.depths, panel_rate=panel_rate)
    return hide(module.tokens(view.counts, gene_index=view.genes), recipe, rng)


@torch.no_grad()
def start_from_pca(module: ScBERTModule, corpus: Corpus, recipe: Recipe) -> None:
    """Let the untrained network compute a PCA: what it has to learn first would else be to multiply genes and bins.

    A position's vector is that of its gene, in all but `token_width` dimensions, plus that of its bin, in these. The
    class token pays each position an attention that grows as the bin's number and hardly sees bin 0; what it reads are
    the gene vectors, principal axes of pooled cells. Its state is then a weighted mean of them, which is centred, and
    whose length the last norm takes away.
    """
    n_axes = recipe.n_hidden - recipe.token_width
    axes, _ = pooled_axes(
        corpus.sources,
        corpus.share,
        n_axes,
        cells=recipe.start_cells,
        target_sum=recipe.target_sum,
        seed=recipe.seed,
    )
    embedder, layer = module.embedder, module.encoder[0]
    attention = layer.attention
    embedder.gene_vectors.normal_(std=0.02)
    embedder.gene_vectors[:, :n_axes] = torch.from_numpy(axes / axes.std()).float() * 0.35
    width = recipe.token_width
    signs = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(width)] for i in range(width)])
    height = recipe.height * math.sqrt(recipe.n_hidden / width)  # so that the first norm hardly sees the gene
    embedder.token_embedding.weight.normal_(std=0.02)
    embedder.token_embedding.weight[:, n_axes:] = height * signs[1 : module.n_bins + 3]
    target = torch.tensor([1e-3, *range(1, module.n_bins + 1), 1e-3])
    query, keys = weights_of_bins(attention, target)
    patterns = (
        embedder.token_embedding.weight[:, n_axes:] / recipe.n_hidden / recipe.height
    )  # over their squared length
    per_head = range(attention.n_heads)
    for linear in (attention.query, attention.key, attention.value):
        linear.weight.normal_(std=0.01)
    for head in per_head:
        rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        attention.query.weight[rows, n_axes:] += query[:, None] * patterns[0]
        attention.key.weight[rows, n_axes:] += keys.T @ patterns
    n_read = n_axes // attention.n_heads
    attention.out.weight.normal_(std=0.005)
    attention.out.bias.zero_()
    for axis in range(n_axes):
        row = (axis % attention.n_heads) * attention.head_dim + axis // attention.n_heads
        assert axis // attention.n_heads < min(n_read + 1, attention.head_dim)
        attention.value.weight[row, axis] += recipe.height
        attention.out.weight[axis, row] += 1.0
    layer.ff2.weight.mul_(0.1)
    layer.ff2.bias.zero_()
    centre(module, corpus, recipe)


@torch.no_grad()
def centre(module: ScBERTModule, corpus: Corpus, recipe: Recipe) -> None:
    """Let the class token's state be around 0, with components of about 1."""
    rng = np.random.default_rng(recipe.seed)
    layer, read = module.encoder[0], []
    catch = layer.norm2.register_forward_hook(lambda _, given, __: read.append(given[0]))
    for source in corpus.sources:
        module.pool(module.tokens(draw_cells(source, 32, 0.0, rng)[0]))
    catch.remove()
    state = torch.cat(read)
    n_axes = recipe.n_hidden - recipe.token_width
    scale = 1.0 / state[:, :n_axes].std(0).square().mean().sqrt()
    attention = layer.attention
    attention.out.weight[:n_axes] *= scale
    attention.out.bias[:n_axes] = -scale * state[:, :n_axes].mean(0)
    attention.out.bias[n_axes:] = -state[:, n_axes:].mean(0)


@torch.enable_grad()
def weights_of_bins(attention: FavorAttention, target: Tensor) -> tuple[Tensor, Tensor]:
    """A query `(head_dim,)` and keys of tokens `(tokens, head_dim)` that give weights in proportion to `target`."""
    scale = attention.head_dim**-0.25
    features = attention.projection * scale
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(attention.head_dim, generator=generator).requires_grad_()
    keys = (0.5 * torch.randn(len(target), attention.head_dim, generator=generator)).requires_grad_()
    optimizer = torch.optim.Adam([query, keys], lr=0.03)
    for _ in range(600):
        of_query = (features @ query - (scale * query).square().sum() / 2).exp()
        of_keys = (keys @ features.T - (scale * keys).square().sum(1, keepdim=True) / 2).exp()
        difference = (of_keys @ of_query).log() - target.log()
        loss = (difference - difference[1]).square().mean() + 1e-4 * (
            query.square().sum() + keys.square().mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    log.info(
        "weights of the bins at the start: %s", (difference - difference[1]).exp().detach().numpy().round(3)
    )
    return query.detach(), keys.detach()


class StarterPlan(Plan):
    """Contrast of views and of labels, and the bins of hidden genes; the temperature is learned."""

    def __init__(self, module: ScBERTModule, recipe: Recipe) -> None:
        super().__init__(
            module, n_steps=recipe.steps, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.recipe = recipe
        self.log_temperature = torch.nn.Parameter(torch.tensor(math.log(recipe.temperature)))

    def training_step(self, batch: Step, batch_idx: int) -> Tensor:
        first, second = self.module.pool(batch.tokens).chunk(2)
        temperature = self.log_temperature.clamp(-4.0, 0.0).exp()
        views = info_nce(first, second, temperature=temperature)
        labels = label_contrast(first, second, batch.code, temperature=temperature)
        states = batch.hidden.seen.states(self.module, slice(-1 - batch.hidden.bins.shape[1], -1))
        asked = batch.hidden.asked
        logits = self.module.predict_bins(states[asked])
        masked = F.cross_entropy(logits, batch.hidden.bins[asked].long()) if len(logits) else views * 0.0
        loss = views + labels + self.recipe.masked_weight * masked
        self.log_epoch(
            {
                "loss": loss.detach(),
                "view_contrast": views.detach(),
                "view_contrast_floor_chance": math.log(len(first)),
                "label_contrast": labels.detach(),
                "label_contrast_floor_chance": chance_of_labels(batch.code),
                "masked": masked.detach(),
                "temperature": temperature.detach(),
            },
            1,  # each step counts the same
            shown="loss",
        )
        return loss

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        groups: list[dict[str, Any]] = [{"params": [self.log_temperature], "weight_decay": 0.0}]
        for name, parameter in self.module.named_parameters():
            rate = recipe.table_rate if name == "embedder.gene_vectors" else 1.0
            groups.append({"params": [parameter], "lr": rate * recipe.learning_rate})
        optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        schedule = LambdaLR(
            optimizer, lambda i: min(1.0, (i + 1) / recipe.warm_up) * cosine(i + 1, recipe.steps)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def train_bins(model: ScBERT, corpus: Corpus, recipe: Recipe) -> None:
    """Let the prediction of bins, a linear layer, catch up: in passing it learns too slowly.

    A logistic regression on the states of hidden genes. Nothing else changes, the class token included.
    """
    rng = np.random.default_rng(recipe.seed)
    module, hidden = model.module, replace(recipe, replace_rate=1.0)  # what is seen can be copied
    states, bins = [], []
    with torch.no_grad():
        for _ in range(recipe.bins_draws):
            source = draw_source(corpus, recipe, rng)
            counts, _ = draw_cells(source, recipe.masked_cells, recipe.one_batch, rng)
            measured = torch.from_numpy(source.measured)
            drawn = hide_some(module, counts, measured, hidden, rng, panel_rate=0.5)
            states.append(drawn.seen.states(module, slice(-1 - drawn.bins.shape[1], -1))[drawn.asked])
            bins.append(drawn.bins[drawn.asked].long())
    x, bins = torch.cat(states), torch.cat(bins)
    middle, spread = x.mean(0), x.std(0) + 1e-3
    x = (x - middle) / spread
    linear = torch.nn.Linear(x.shape[1], module.n_bins + 2)
    torch.nn.init.zeros_(linear.weight)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(linear(x), bins) + 1e-4 * linear.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    common = bins.bincount().float() / len(bins)
    floor = -(common * common.clamp(min=1e-9).log()).sum()
    found = F.cross_entropy(linear(x), bins)
    log.info("bins of %d hidden genes: masked %.4f, masked_floor_all_genes %.4f", len(bins), found, floor)
    with torch.no_grad():
        module.bins.weight.copy_(linear.weight / spread)
        module.bins.bias.copy_(linear.bias - linear.weight @ (middle / spread))


def build(corpus: Corpus, recipe: Recipe) -> ScBERT:
    """The network before training."""
    torch.manual_seed(recipe.seed)
    ids = corpus.vocabulary["ensembl_id"]
    adata = ad.AnnData(sp.csr_matrix(np.ones((2, len(ids)), np.float32)), var=pd.DataFrame(index=ids))
    ScBERT.setup_anndata(adata)
    names = ("n_hidden", "n_layers", "n_heads", "head_dim", "n_bins", "n_features", "pooling")
    model = ScBERT(adata, genes=corpus.vocabulary, **{name: getattr(recipe, name) for name in names})
    start_from_pca(model.module, corpus, recipe)
    return model


def train_on(corpus: Corpus, recipe: Recipe, callbacks: Sequence[Any] = ()) -> ScBERT:
    """Train on the cells of a corpus."""
    model = build(corpus, recipe)
    rng = np.random.default_rng(recipe.seed)
    plan = StarterPlan(model.module, recipe)
    steps = {"n_train": corpus.n_cells, "steps": recipe.steps, "clip": recipe.clip, "average": recipe.average}
    train(model, plan, lambda: draw_step(model.module, corpus, recipe, rng), callbacks=callbacks, **steps)
    return model


def write(folder: Path, model: ScBERT, recipe: Recipe, card: str) -> None:
    """A bundle in half precision, the gene vectors in 8 bits."""
    tensors = {name: tensor.half() for name, tensor in model.module.state_dict().items()}
    table = "embedder.gene_vectors"
    tensors[table] = tensors[table].to(torch.float8_e4m3fn)
    config = {"model": "ScBERT", "network": model._network(), "recipe": asdict(recipe)}
    write_bundle(folder, state_dict=tensors, config=config, genes=model.genes, card=card, overwrite=True)


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
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(args.out / "training.log", mode="w")]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers)
    torch.set_num_threads(args.threads)
    recipe = Recipe(seed=args.seed)
    log.info("%s", asdict(recipe))
    corpus = read(args.data, args.gene_tables)
    sizes = {source.name: source.counts.shape[0] for source in corpus.sources}
    log.info("%d genes; cells or profiles: %s", len(corpus.vocabulary), sizes)
    write(args.out, train_on(corpus, recipe), recipe, "Not judged yet.\n")
    model = ScBERT.from_pretrained(args.out)  # in few bits, as it is shipped
    train_bins(model, corpus, recipe)
    write(args.out, model, recipe, "Not judged yet.\n")
    write_trained_on(args.out, cells_of(corpus.sets, corpus.sources, corpus.vocabulary))


if __name__ == "__main__":
    main()
