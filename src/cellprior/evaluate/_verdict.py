"""From scores to words: whether an embedding helps, with the reason and the uncertainty."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cellprior.evaluate._ask import KNN, LINEAR, Answers, Asked
from cellprior.evaluate._intervals import Draws
from cellprior.evaluate._null import N_PERMUTATIONS
from cellprior.evaluate._splits import HELD_OUT
from cellprior.evaluate._task import CHOSEN, Task

Outcome = Literal[
    "helps",
    "no better",
    "worse",
    "cannot tell",
    "helps on these donors",
    "worse on these donors",
    "no signal",
    "no verdict",
]

METRIC = "macro_f1"
TIE = 0.02  # a gain below this is none that one would change a method for
SIGNAL = 0.01  # chance that labels without any signal are said to have one
FEW_DONORS = 4  # fewer stand for themselves only
WITHIN_TYPES = "neighbours_kept_within_types"
BY_CHANCE = (
    0.02  # of the neighbours within types, beyond chance, that an embedding keeps at least if it knows more
)
CEILING = 0.995  # of both scores: nothing is left to gain
DOUBTS = {
    "all cells": ", unless it was made with these labels",
    "not known": ", unless it was trained on these cells",
    "these cells": ", on cells that it was trained on",
}
UNKNOWN = "not known which cells its weights were trained on: if on these"
USE, OTHERS = "use it", "ask about cells that it was not trained on"
WIDTH = 100


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an embedding helps on some data.

    The outcome of a question is ``"helps"`` if the paired 95 % interval of the difference in macro-F1 to the baseline
    is above 0, and no other baseline is ahead of the embedding; ``"worse"`` if it is below. If it holds 0,
    ``"no better"`` when a gain of 0.02 or more is ruled out, and otherwise ``"cannot tell"``. With fewer than four
    batches held out, the first two are said of ``"these donors"`` alone. ``"no signal"``: no method reads the labels
    better than permuted ones. ``"no verdict"``: one split only.
    """

    embedding: str
    neighbours: Outcome
    """Of the embedding as it is: names by nearest neighbours, against the baseline embedding."""
    naming: Outcome
    """Of labels learned from it: a linear probe, against the same on baselines and on genes."""
    text: str
    """Both in words, with numbers."""

    def __str__(self) -> str:
        return _wrapped(self.text)


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of one question, in words, and what to do."""

    outcome: Outcome
    words: str
    advice: str


def judge(
    task: Task,
    answers: Answers,
    scores: Mapping[Asked, Mapping[str, Draws]],
    embedding: str,
    within_types: Mapping[str, float] | None = None,
) -> Verdict:
    """The verdict on one embedding, from the headline splits.

    ``within_types`` are neighbours kept within types, of each method, see
    :func:`~cellprior.evaluate._preserved.neighbors_kept`.
    """
    if len(answers.splits) == 1 and answers.splits[0].kind != HELD_OUT:
        text = (
            f"{embedding}: no verdict, as one split says too little.\nNext: leave out seeds, or ask for more."
        )
        return Verdict(embedding, "no verdict", "no verdict", text)
    if answers.p_value is not None and answers.p_value > SIGNAL:
        text = (
            f"{embedding}: no signal. No method reads these labels clearly better than labels drawn again at random "
            f"(p = {answers.p_value:.2f}, {N_PERMUTATIONS} permutations), so nothing can be said of pretraining.\n"
            "Next: look whether these are the labels of these cells."
        )
        return Verdict(embedding, "no signal", "no signal", text)
    whole = {asked: of[METRIC] for asked, of in scores.items() if asked.n_per_class is None}
    neighbours = compare(answers, whole, embedding, KNN)
    naming = compare(answers, whole, embedding, LINEAR)
    same = neighbours.outcome == naming.outcome
    short = (
        neighbours.outcome
        if same
        else f"{neighbours.outcome} as an embedding, {naming.outcome} to name cells"
    )
    seen = next(method.seen for method in task.methods if method.name == embedding)
    doubt = DOUBTS.get(seen, "") if "helps" in short else ""
    lines = [
        f"{embedding}: {short}{doubt}.",
        f"- As an embedding: {neighbours.words}.",
        f"- To name cells: {naming.words}.",
        f"- {_where(answers)}; intervals of 95 %.",
    ]
    if seen == "these cells":
        n_known = task.n_trained_on[embedding]
        proves = f", so this proves {'nothing' if n_known > task.n_asked / 2 else 'little'}" if doubt else ""
        some = "all" if n_known == task.n_asked else f"at least {n_known:,}"
        lines.append(f"- It was trained on {some} of these {task.n_asked:,} cells{proves}.")
    elif doubt:
        what = "an array: if it was made with these labels" if seen == "all cells" else UNKNOWN
        lines.append(f"- It is {what}, this proves nothing.")
    own, of_pca = ((within_types or {}).get(name, np.nan) for name in (embedding, "PCA"))
    if own < BY_CHANCE and of_pca > 2 * BY_CHANCE and "worse" not in neighbours.outcome:
        lines.append(
            f"- Within types its neighbours are those of chance ({own:.2f}; of PCA {of_pca:.2f}): it knows the types "
            "and nothing else of these cells, as labels and noise would."
        )
    to_do, to_name = (
        OTHERS if seen == "these cells" and of.advice == USE else of.advice for of in (neighbours, naming)
    )
    if to_name != to_do:
        to_do = f"as an embedding, {to_do}; to name cells, {to_name}"
    return Verdict(embedding, neighbours.outcome, naming.outcome, "\n".join([*lines, f"Next: {to_do}."]))


def compare(answers: Answers, scores: Mapping[Asked, Draws], embedding: str, reader: str) -> Answer:
    """Outcome of one question, and its sentence."""
    own, best = (
        next(of for asked, of in scores.items() if asked.method == name and asked.reader == reader)
        for name in (embedding, CHOSEN)
    )
    baselines = {asked.method: float(of[0]) for asked, of in scores.items() if asked.is_rival(reader)}
    ahead = max(baselines, key=lambda name: baselines[name])  # of each by itself; which, the test cells say
    again = answers.resampling
    difference, low, high = again.interval(own - best)
    baseline = answers.words(CHOSEN, reader)
    numbers = (
        f"macro-F1 {_plus_minus(answers, own)} by {reader} "
        f"({answers.words(embedding, reader)}) against {_plus_minus(answers, best)} ({baseline}), "
        f"difference {difference:+.2f} [{low:+.2f}, {high:+.2f}]"
    )
    few = answers.splits[0].kind == HELD_OUT and again.n_units < FEW_DONORS
    if again.n_units:
        each = zip(again.units, own[1:] - best[1:], strict=True)
        numbers += f"; {', '.join(f'{_short(unit)} {gain:+.2f}' for unit, gain in each)}"
    shown = again.sure() * again.error(own - best)
    more = "label cells of more donors" if again.n_units or few else "label more cells"
    outcome: Outcome
    if low > 0 and own[0] < baselines[ahead]:
        outcome, said = "cannot tell", f"better than the baseline that was chosen, and not than {ahead}"
        advice = f"{more}, or use {ahead}"
    elif low > 0:
        outcome = "helps on these donors" if few else "helps"
        said, advice = "better than the baseline", f"{more}, at least four" if few else USE
    elif high < 0:
        outcome = "worse on these donors" if few else "worse"
        said, advice = "worse than the baseline", f"use {_name(baseline)}"
    elif min(own[0], best[0]) >= CEILING:
        outcome, said = "no better", "both name every cell: these labels are too easy to show a gain"
        advice = "take finer labels, or cells of other donors"
    elif high < TIE:
        outcome, said, advice = "no better", "no better than the baseline", f"use {_name(baseline)}"
    else:
        outcome, said = "cannot tell", "perhaps better than the baseline, perhaps not"
        advice = f"{more}, or use {_name(baseline)}"
    if low <= 0 <= high and outcome != "no better":
        said += f" (a gain of {max(shown, 0.01):.2f} would have been found four times of five)"
    return Answer(outcome, f"{said}: {numbers}", advice)


def _name(baseline: str) -> str:
    return baseline.split(":")[0]


def _plus_minus(answers: Answers, draws: Draws) -> str:
    value, low, high = answers.resampling.interval(draws)
    return f"{value:.2f} ± {(high - low) / 2:.2f}"


def _short(unit: str) -> str:
    """The name of a batch, or of the first of several that were held out together."""
    first, _, others = unit.partition(", ")
    first = textwrap.shorten(first, 24, placeholder="...")
    return f"{first} and {others.count(', ') + 1} more" if others else first


def _where(answers: Answers) -> str:
    splits = answers.splits
    n_test = f"{len(np.unique(np.concatenate([split.test for split in splits]))):,} test cells"
    if splits[0].held_out:
        together = "groups of batches" if any(len(split.batches) > 1 for split in splits) else "batches"
        held_out = "1 batch held out" if len(splits) == 1 else f"{len(splits)} {together} held out in turn"
        return f"{held_out}, {n_test}"
    n_parts = round((len(splits[0].train) + len(splits[0].test)) / len(splits[0].test))
    n_times = -(-len(splits) // n_parts)
    if len(splits) % n_parts:
        again = f", {n_times} times" if n_times > 1 else ""
        return f"{len(splits)} parts held out in turn, of cells divided into {n_parts}{again}, {n_test}"
    again = f", the cells divided {n_times} times" if n_times > 1 else ""
    return f"{n_parts} parts held out in turn{again}, {n_test}"


def _wrapped(text: str) -> str:
    """Lines of a page's width, an interval on one."""
    together = re.sub(r"\[([^\[\]]+), ([^\[\]]+)\]", "[\\1,\xa0\\2]", text.replace(" ± ", "\xa0±\xa0"))
    lines = [
        textwrap.fill(
            line, WIDTH, subsequent_indent="  " if line.startswith("- ") else "", break_on_hyphens=False
        )
        for line in together.split("\n")
    ]
    return "\n".join(lines).replace("\xa0", " ")
