"""The annotation head of the starter: what it learns from, how its "unknown" is calibrated, and how it is written.

Calibrated on whole studies: a head that has not seen a study names its cells, and how sure it was, how far they lay
and whether it was right is what the limits are found from. They stand for a query of another study.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from _starter_corpus import Source, draw_cells
from _starter_data import CellSet
from _starter_terms import NONE, TERMS, terms_of

from cellprior.model import CellPLM
from cellprior.model.learning._annotation_plan import AnnotationHead
from cellprior.model.learning._views import draw_view

LABELS = [*TERMS, NONE]
SETS = (
    "pbmc_facs_zheng2017",
    "blood_tregs_tconv_deconvseq",
    "lymphoid_ref_spacexr",
    "gut_crohn_scp1884_68types",
    "breast_cancer_lines_gambardella2022",
)
N_VIEWS, N_PROFILE_VIEWS = 12, 4  # of each source
N_CELLS, N_PROFILE_CELLS = 384, 160  # of a view, at most
FEW_TERMS = 0.5  # of the views, that hold one to three terms only, as sorted cells do
STEPS, BATCH, RATE, DECAY = 500, 512, 3e-3, 1e-3
GROUPS = 6  # of profiles, that are left out together
REJECT, REJECT_COARSE = 0.2, 0.1  # of the names that are given by default


class Examples(NamedTuple):
    """Hidden states `(cells, n_hidden)`, codes in LABELS, and numbers of the sources."""

    hidden: torch.Tensor
    code: np.ndarray
    source: np.ndarray


@dataclass(frozen=True)
class Labelled:
    """A source of which some cells have terms."""

    source: Source
    code: np.ndarray


def labelled(sources: Sequence[Source], sets: Sequence[CellSet]) -> list[Labelled]:
    """Sources with the terms of their cells; those without a term are left out."""
    labels = {cells.name: cells.labels for cells in sets}
    number = {term: i for i, term in enumerate(LABELS)}
    found = []
    for source in sources:
        if not source.is_profile and source.name not in SETS:
            continue
        terms = terms_of(source.name, labels[source.name])
        rows = np.flatnonzero(terms != "")
        if len(rows):
            code = np.array([number[term] for term in terms[rows]])
            kept = {"counts": source.counts[rows], "batch": source.batch[rows], "labels": code}
            found.append(Labelled(replace(source, **kept), code))
    return found


@torch.no_grad()
def examples(module: Any, sources: Sequence[Labelled], *, seed: int) -> Examples:
    """Hidden states of views of the labelled cells."""
    rng = np.random.default_rng(seed)
    module.eval()
    hidden, code, number = [], [], []
    for i, of in enumerate(sources):
        for _ in range(N_PROFILE_VIEWS if of.source.is_profile else N_VIEWS):
            source = of.source
            if rng.random() < FEW_TERMS:
                few = rng.permutation(np.unique(of.code))[: rng.integers(1, 4)]
                rows = np.flatnonzero(np.isin(of.code, few))
                kept = {"counts": source.counts[rows], "batch": source.batch[rows]}
                source = replace(source, **kept, labels=of.code[rows])
            n_cells = min(N_PROFILE_CELLS, 32 * source.counts.shape[0]) if source.is_profile else N_CELLS
            counts, labels = draw_cells(source, n_cells, 0.5, rng)
            labels = source.labels[labels] if source.is_profile else labels
            view = draw_view(counts, torch.from_numpy(source.measured), rng)
            hidden.append(module.hidden(view.counts, gene_index=view.genes))
            code.append(labels)
            number.append(np.full(len(labels), i))
    return Examples(torch.cat(hidden), np.concatenate(code), np.concatenate(number))


def fit_head(module: Any, data: Examples, *, seed: int) -> AnnotationHead:
    """A head that each source and each of its terms have taught alike."""
    torch.manual_seed(seed)
    head = AnnotationHead(module.n_hidden, module.n_latent, len(LABELS))
    head.standardise(data.hidden.numpy())
    pairs, of_pair, size = np.unique(
        np.stack([data.source, data.code]), axis=1, return_inverse=True, return_counts=True
    )
    n_sources = np.bincount(pairs[1], minlength=len(LABELS))
    chance = torch.from_numpy(1.0 / (size * np.sqrt(n_sources[pairs[1]]))[of_pair.ravel()])
    target = torch.from_numpy(data.code)
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    head.train()
    for _ in range(STEPS):
        rows = torch.multinomial(chance, BATCH, replacement=True)
        loss = F.cross_entropy(head(data.hidden[rows]), target[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    head.eval()
    with torch.no_grad():
        latent = module.latent_of(data.hidden).numpy()
        known = data.code != LABELS.index(NONE)
        # what must not be named is no place to be near to
        locate(head, latent[known], data.code[known])
    return head


def locate(head: AnnotationHead, latent: np.ndarray, code: np.ndarray) -> None:
    """Where the terms lie; what has no examples lies nowhere."""
    present = np.unique(code)
    part = AnnotationHead(1, latent.shape[1], len(present))
    part.locate(latent, np.searchsorted(present, code))
    head.whitening.copy_(part.whitening)
    head.center.fill_(1e3)
    head.center[present] = part.center
    head.spread[present] = part.spread


@torch.no_grad()
def scores(module: Any, head: AnnotationHead, data: Examples) -> dict[str, np.ndarray]:
    """Novelty, and for terms and coarse names how sure the head is and whether it is right."""
    probability = head(data.hidden).double().softmax(1).numpy()[:, :-1]
    novelty = head.novelty(module.latent_of(data.hidden)).numpy()
    of, group = np.unique([TERMS[term][1] for term in TERMS], return_inverse=True)
    sums = probability @ np.eye(len(of))[group]
    return {
        "novelty": novelty,
        "confidence": probability.max(axis=1),
        "correct": probability.argmax(axis=1) == data.code,
        "coarse_confidence": sums.max(axis=1),
        "coarse_correct": sums.argmax(axis=1) == group[np.minimum(data.code, len(group) - 1)],
    }


def calibrate(
    module: Any, data: Examples, sources: Sequence[Labelled], *, seed: int
) -> dict[str, np.ndarray]:
    """Scores of cells of terms that other studies have as well, of heads that have not seen their study."""
    rng = np.random.default_rng(seed)
    is_profile = np.array([of.source.is_profile for of in sources])
    groups = [[i] for i in np.flatnonzero(~is_profile)]
    groups += [list(part) for part in np.array_split(rng.permutation(np.flatnonzero(is_profile)), GROUPS)]
    none, parts = LABELS.index(NONE), []
    for group in groups:
        out = np.isin(data.source, group)
        if not (data.code[out] != none).any():
            continue
        rest = Examples(data.hidden[~out], data.code[~out], data.source[~out])
        rows = np.flatnonzero(out & np.isin(data.code, rest.code) & (data.code != none))
        rows = rng.permutation(rows)[:200]
        head = fit_head(module, rest, seed=seed)
        parts.append(scores(module, head, Examples(data.hidden[rows], data.code[rows], data.source[rows])))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def add_head(
    model: CellPLM, sources: Sequence[Source], sets: Sequence[CellSet], *, seed: int
) -> dict[str, float]:
    """Teach the names, and give how sure and how right heads were on the studies that they had not seen."""
    module = model.module
    of = labelled(sources, sets)
    data = examples(module, of, seed=seed)
    found = calibrate(module, data, of, seed=seed)
    rounded = {
        name: [bool(x) if name.endswith("correct") else round(float(x), 4) for x in values]
        for name, values in found.items()
    }
    model.annotation_ = {
        "labels": LABELS,
        "ontology": [TERMS[term][0] for term in TERMS] + [""],
        "none": NONE,
        "reject": REJECT,
        "calibration": {name: rounded[name] for name in ("novelty", "confidence", "correct")},
        "coarse": {
            "labels": [TERMS[term][1] for term in TERMS] + [""],
            "reject": REJECT_COARSE,
            "calibration": {
                "novelty": rounded["novelty"],
                "confidence": rounded["coarse_confidence"],
                "correct": rounded["coarse_correct"],
            },
        },
    }
    module.annotation.load_state_dict(fit_head(module, data, seed=seed).state_dict())
    return {name: float(values.mean()) for name, values in found.items()}
