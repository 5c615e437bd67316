"""Genes deleted or overexpressed in silico: how far a cell moves, beside how far it moves for any gene like them.

Theodoris et al., Nature 618:616, 2023, who take a gene from the list of a cell, or put it to the top, and compare the
embeddings before and after. That an embedding moves is no finding: it moves for any gene. So each perturbation is done
to random genes of equal expression too, and to random genes of any, which know that a token more or less is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from cellprior.model.data._panels import gene_rows
from cellprior.model.geneformer._context import token_chunks
from cellprior.model.geneformer._inputs import CLS, EOS

if TYPE_CHECKING:
    from cellprior.model.geneformer._module import GeneformerModule, Pooling

How = Literal["delete", "overexpress", "inhibit"]
HOWS = ("delete", "overexpress", "inhibit")
CELL = "cell"
COLUMNS = ["cell", "genes", "how", "of", "rank", "n_tokens", "n_tokens_after"]
COLUMNS += ["shift", "expression_control", "count_control"]
NEAREST = 50  # genes that count as of equal expression, at least
ROWS = 32  # lists of genes whose hidden states are in memory at a time


@dataclass(frozen=True)
class Request:
    """What is to be done to each cell, genes as tokens."""

    perturbed: dict[str, np.ndarray]  # by name
    watched: dict[str, int]  # genes whose own vectors are compared
    how: How
    n_controls: int
    seed: int
    pooling: Pooling
    layer: int
    measured: np.ndarray  # tokens of the genes that the data have, by rising median
    place: dict[int, int] = field(default_factory=dict)  # of each among them

    @classmethod
    def of(
        cls,
        model: Any,
        adata: Any,
        genes: Sequence[str | Sequence[str]],
        shift_of: Sequence[str],
        how: How,
        **options: Any,
    ) -> Request:
        """Names into tokens.

        Raises KeyError if a gene is not in the vocabulary; ValueError if nothing is asked for, or what is not
        possible.
        """
        refuse_impossible(genes, shift_of, how, options["n_controls"])
        groups = [(name,) if isinstance(name, str) else tuple(name) for name in genes]
        module = model.module
        match = model._match_of(adata)

        def tokens_of(names: Sequence[str]) -> np.ndarray:
            return gene_rows(names, model.genes, match) + module.first_gene

        perturbed = {"+".join(names): tokens_of(names) for names in groups}
        if wrong := [name for name, tokens in perturbed.items() if len(np.unique(tokens)) < len(tokens)]:
            msg = f"{wrong[0]} names one gene twice; a gene is perturbed once."
            raise ValueError(msg)
        rows = np.unique(match.index[match.index >= 0])
        scale = module.gene_scale.cpu().numpy()[rows]
        measured = rows[np.argsort(scale, kind="stable")] + module.first_gene
        return cls(
            perturbed=perturbed,
            watched=dict(zip(shift_of, tokens_of(shift_of).tolist(), strict=True)),
            how=how,
            pooling=module.checked_pooling(options.pop("pooling")),
            measured=measured,
            place={int(token): i for i, token in enumerate(measured)},
            **options,
        )


def refuse_impossible(genes: Any, shift_of: Any, how: str, n_controls: int) -> None:
    """Refuse arguments that cannot be meant; see :meth:`Request.of`."""
    for argument, names in (("genes", genes), ("shift_of", shift_of)):
        if isinstance(names, str):
            msg = f'{argument}="{names}" is one name; a list is needed: {argument}=["{names}"].'
            raise ValueError(msg)
    if how not in HOWS:
        msg = f"how={how!r} is not known; choose one of {', '.join(map(repr, HOWS))}."
        raise ValueError(msg)
    if not len(genes) or any(not isinstance(name, str) and not len(name) for name in genes):
        msg = 'No genes to perturb: give names, or tuples of names, such as ["CD3D", ("CD3D", "CD3E")].'
        raise ValueError(msg)
    if n_controls < 0:
        msg = f"n_controls={n_controls}; a number of random genes is needed, or 0 for no controls."
        raise ValueError(msg)


def perturb(
    model: Any,
    adata: Any,
    indices: Any,
    request: Request,
    *,
    batch_size: int | None,
    out: Path | None,
) -> pd.DataFrame | None:
    """See :meth:`cellprior.model.Geneformer.perturb`."""
    tables = _tables(model, adata, indices, request, batch_size)
    if out is None:
        found = list(tables)
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=COLUMNS)
    if out.exists():
        msg = f"{out} is there already: delete it, or choose another name."
        raise FileExistsError(msg)
    partial = out.with_name(out.name + ".part")
    pd.DataFrame(columns=COLUMNS).to_csv(partial, index=False)
    for table in tables:
        table.to_csv(partial, index=False, mode="a", header=False)
    partial.replace(out)
    return None


def _tables(
    model: Any, adata: Any, indices: Any, request: Request, batch_size: int | None
) -> Iterator[pd.DataFrame]:
    """Results of a few cells at a time."""
    obs_names = (model.adata if adata is None else adata).obs_names
    for rows, tokens in token_chunks(model, adata, indices, batch_size):
        found = [
            {"cell": obs_names[row], "how": request.how, **result}
            for row, of_cell in zip(rows, tokens, strict=True)
            for result in of_one_cell(model.module, of_cell, request, row=int(row))
        ]
        if found:
            yield pd.DataFrame(found)[COLUMNS]


def of_one_cell(
    module: GeneformerModule, tokens: Tensor, request: Request, *, row: int
) -> Iterator[dict[str, Any]]:
    """Results of each perturbation of one cell, from its tokens ``(positions,)``, that can be done to it.

    What its random genes depend on is the number of the cell, ``row``, and the seed.
    """
    genes = tokens[tokens >= module.first_gene].cpu().numpy()
    draw = Draw(genes, request, np.random.default_rng([request.seed, row]))
    jobs: list[tuple[str, str, np.ndarray]] = []  # perturbation, what for, tokens
    counts: dict[tuple[int, int], list[np.ndarray]] = {}
    for name, changed in request.perturbed.items():
        here = np.isin(changed, genes)
        if not (request.how == "overexpress" or here.all()):
            continue
        jobs.append((name, "shift", changed))
        key = (int(here.sum()), int((~here).sum()))
        if key not in counts:
            counts[key] = draw.any(*key)
        jobs += [(name, "expression_control", like) for like in draw.like(changed, here)]
        jobs += [(name, "count_control", any_genes) for any_genes in counts[key]]
    if not jobs:
        return
    unique = list(dict.fromkeys(tuple(changed.tolist()) for _, _, changed in jobs))
    moved = dict(zip(unique, _moved(module, genes, unique, request).tolist(), strict=True))
    for name, changed in request.perturbed.items():
        of_name = [(what, tuple(tokens.tolist())) for job, what, tokens in jobs if job == name]
        if not of_name:
            continue
        places = np.flatnonzero(np.isin(genes, changed)) + 1
        for i, of in enumerate((CELL, *request.watched)):
            values = {
                what: [moved[key][i] for kind, key in of_name if kind == what]
                for what in ("shift", "expression_control", "count_control")
            }
            if np.isnan(
                values["shift"][0]
            ):  # a gene that this cell does not have, or that is perturbed itself
                continue
            yield {
                "genes": name,
                "of": of,
                "rank": float(places.mean()) if len(places) else np.nan,
                "n_tokens": len(genes),
                "n_tokens_after": len(changed_list(genes, changed, request.how, room(module))),
                **{what: _mean(found) for what, found in values.items()},
            }


class Draw:
    """Random genes for one cell, from the tokens of its genes, in order, and those that the data have."""

    def __init__(self, genes: np.ndarray, request: Request, rng: np.random.Generator) -> None:
        self.genes, self.request, self.rng = genes, request, rng
        self.absent = request.measured[~np.isin(request.measured, genes)]  # by rising median

    def any(self, n_here: int, n_absent: int) -> list[np.ndarray]:
        """Draws of as many genes of the cell, and of those that it lacks; none if there are too few."""
        if n_here > len(self.genes) or n_absent > len(self.absent):
            return []
        kinds = ((self.genes, n_here), (self.absent, n_absent))
        return [
            np.concatenate([self.rng.choice(pool, n, replace=False) for pool, n in kinds])
            for _ in range(self.request.n_controls)
        ]

    def like(self, changed: np.ndarray, here: np.ndarray) -> list[np.ndarray]:
        """Draws of as many other genes as ``changed``, each near it in rank, or if the cell lacks it, in median."""
        pools = [self._nearest(token, present, changed) for token, present in zip(changed, here, strict=True)]
        found = []
        for _ in range(self.request.n_controls):
            taken: list[int] = []
            for pool in pools:
                free = pool[~np.isin(pool, taken)]
                if not len(free):
                    return []
                taken.append(int(self.rng.choice(free)))
            found.append(np.array(taken))
        return found

    def _nearest(self, token: int, present: bool, changed: np.ndarray) -> np.ndarray:
        others = self.genes if present else self.absent
        n = max(NEAREST, len(others) // 50)
        if present:
            distance = np.abs(np.arange(len(others)) - int(np.flatnonzero(others == token)[0]))
        else:
            place = self.request.place
            own = place.get(int(token), len(place) // 2)
            distance = np.abs(np.array([place[int(other)] for other in others]) - own)
        order = np.argsort(distance, kind="stable")
        return others[order][~np.isin(others[order], changed)][:n]


def room(module: GeneformerModule) -> int:
    """Genes that a cell can have."""
    return module.n_positions - 2 * module.special


def changed_list(genes: np.ndarray, changed: np.ndarray, how: How, n_most: int) -> np.ndarray:
    """Genes of a cell after a perturbation, as tokens, in order, and at most ``n_most``.

    ``"delete"`` takes the changed ones out, ``"overexpress"`` puts them to the top, ``"inhibit"`` to the end, if they
    are there.
    """
    rest = genes[~np.isin(genes, changed)]
    if how == "overexpress":
        return np.concatenate([changed, rest])[:n_most]
    if how == "inhibit":
        return np.concatenate([rest, changed[np.isin(changed, genes)]])
    return rest


@torch.inference_mode()
def _moved(
    module: GeneformerModule, genes: np.ndarray, changes: list[tuple[int, ...]], request: Request
) -> np.ndarray:
    """One minus the cosine of the vectors of the cell, and of the watched genes, before and after each change.

    The mean over a cell's genes is taken without the perturbed ones, before and after. NaN for a gene that the cell
    lacks, before or after, or that is perturbed itself.
    """
    before = module.states(_padded(module, [genes]), layer=request.layer)[0]
    shifts = np.empty((len(changes), 1 + len(request.watched)))
    for start in range(0, len(changes), ROWS):
        part = [np.array(change) for change in changes[start : start + ROWS]]
        after = [changed_list(genes, change, request.how, room(module)) for change in part]
        tokens = _padded(module, after)
        pairs = list(zip(after, part, strict=True))
        if request.watched:
            states = module.states(tokens, layer=request.layer)
            new = [_vectors(module, s, *pair, request) for s, pair in zip(states, pairs, strict=True)]
        else:
            left_out = torch.zeros_like(tokens, dtype=torch.bool)
            for i, (ordered, change) in enumerate(pairs):
                at = np.flatnonzero(np.isin(ordered, change)) + int(module.special)
                left_out[i, at.tolist()] = True
            pooled = module.pool(tokens, request.pooling, layer=request.layer, left_out=left_out)
            new = list(pooled[:, None])
        for i, change in enumerate(part):
            old = _vectors(module, before, genes, change, request)
            cosine = F.cosine_similarity(old.double(), new[i].double(), dim=1, eps=1e-30)
            shifts[start + i] = (1 - cosine).cpu().numpy()
    return shifts


def _vectors(
    module: GeneformerModule, states: Tensor, genes: np.ndarray, change: np.ndarray, request: Request
) -> Tensor:
    """Vectors of a cell and of the watched genes in it ``(1 + watched, n_hidden)``, NaN for what is not there."""
    first = int(module.special)
    of_genes = states[first : first + len(genes)]
    kept = torch.from_numpy(~np.isin(genes, change)).to(states.device)
    cell = states[0] if request.pooling == "cls" else of_genes[kept].mean(0)
    found = [cell]
    for token in request.watched.values():
        place = np.flatnonzero(genes == token)
        there = len(place) and token not in change
        found.append(of_genes[int(place[0])] if there else torch.full_like(cell, torch.nan))
    return torch.stack(found)


def _padded(module: GeneformerModule, lists: list[np.ndarray]) -> Tensor:
    """Tokens of cells from their genes, with what V2 puts around them ``(cells, positions)``."""
    around = ([CLS], [EOS]) if module.special else ([], [])
    rows = [torch.tensor([*around[0], *genes.tolist(), *around[1]], dtype=torch.long) for genes in lists]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(module.device)


def _mean(values: list[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else np.nan
