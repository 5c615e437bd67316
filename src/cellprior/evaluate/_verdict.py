"""From scores to words: whether an embedding helps, with the reason and the uncertainty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cellprior.evaluate._intervals import Draws, interval
from cellprior.evaluate._task import KNN, LINEAR, ON_GENES, Answers, Asked, Task

Outcome = Literal["helps", "no better", "worse", "cannot tell", "no signal", "no verdict"]

METRIC = "macro_f1"
TIE = 0.02  # a gain below this is none that one would change a method for
SURE = 0.999  # that a control is above chance; there are many controls, and an alarm ends everything


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an embedding helps on some data.

    The outcome of a question is ``"helps"`` if the paired 95 % interval of the difference in macro-F1 to the best
    baseline is above 0, ``"worse"`` if below; if it holds 0, ``"no better"`` when a gain of 0.02 or more is ruled out,
    and otherwise ``"cannot tell"``. ``"no signal"``: nothing tells the labels apart. ``"no verdict"``: a control that
    should know nothing beats chance, so that no number can be believed.
    """

    embedding: str
    neighbours: Outcome
    """Of the embedding as it is: names by 15 nearest neighbours, against the best baseline embedding."""
    naming: Outcome
    """Of labels learned from it: a linear probe, against the best of the same on baselines and on genes."""
    text: str
    """Both in words, with numbers."""

    def __str__(self) -> str:
        return self.text


def judge(
    task: Task, answers: Answers, scores: Mapping[Asked, Mapping[str, Draws]], embedding: str
) -> Verdict:
    """The verdict on one embedding, from the headline splits."""
    chance = float(np.mean([1 / len(np.unique(task.codes[split.test])) for split in answers.splits]))
    whole = {asked: of for asked, of in scores.items() if asked.n_per_class is None}
    if alarm := _above_chance(whole, chance):
        text = (
            f"{embedding}: no verdict, as a control beats chance: {alarm}. Something leaks from the training to the "
            "test cells, such as cells that are there twice; find it first."
        )
        return Verdict(embedding, "no verdict", "no verdict", text)
    if not _any_signal(whole, chance):
        text = (
            f"{embedding}: no signal. Neither it nor any baseline tells the labels apart better than chance "
            f"(balanced accuracy {chance:.2f}), so nothing can be said of pretraining. Are these the right labels?"
        )
        return Verdict(embedding, "no signal", "no signal", text)
    neighbours, first = _compare(whole, embedding, KNN, f"{KNN} macro-F1")
    naming, second = _compare(whole, embedding, LINEAR, "linear probe macro-F1")
    short = neighbours if neighbours == naming else f"{neighbours} as an embedding, {naming} to name cells"
    text = (
        f"{embedding}: {short}. As an embedding, {first}. To name cells, {second}. ({_where(answers)}; intervals of "
        "95 %.)"
    )
    return Verdict(embedding, neighbours, naming, text)


def _compare(
    scores: Mapping[Asked, Mapping[str, Draws]], embedding: str, reader: str, metric: str
) -> tuple[Outcome, str]:
    """Outcome of one question, and its sentence."""
    baselines = {
        asked.method: of[METRIC]
        for asked, of in scores.items()
        if asked.kind == "baseline" and (asked.reader == reader or (reader == LINEAR and not asked.reader))
    }
    best = max(baselines, key=lambda name: baselines[name][0])
    own = next(of[METRIC] for a, of in scores.items() if a.method == embedding and a.reader == reader)
    difference, low, high = interval(own - baselines[best])
    use = f"a linear probe on {best}" if reader == LINEAR and best != ON_GENES else best
    outcome: Outcome
    if low > 0:
        outcome, said, advice = "helps", f"better than {best}", ""
    elif high < 0:
        outcome, said, advice = "worse", f"worse than {best}", f"; use {use}"
    elif high < TIE:
        outcome, said, advice = "no better", f"no better than {best}", f"; use {use}"
    else:
        outcome, said, advice = (
            "cannot tell",
            f"perhaps better than {best}, perhaps not",
            "; label more cells",
        )
    numbers = f"{metric} {_plus_minus(own)} against {_plus_minus(baselines[best])}"
    return outcome, f"{said}: {numbers}, difference {difference:+.2f} [{low:+.2f}, {high:+.2f}]{advice}"


def _plus_minus(draws: Draws) -> str:
    value, low, high = interval(draws)
    return f"{value:.2f} ± {(high - low) / 2:.2f}"


def _where(answers: Answers) -> str:
    n_test = len(np.unique(np.concatenate([split.test for split in answers.splits])))
    held_out = answers.splits[0].held_out
    splits = f"{len(answers.splits)} {'batches held out in turn' if held_out else 'random splits'}"
    return f"{splits}, {n_test:,} test cells"


def _above_chance(scores: Mapping[Asked, Mapping[str, Draws]], chance: float) -> str:
    """The control that is surely above chance, in words, or "" if none is."""
    for asked, of in scores.items():
        draws = of["balanced_accuracy"]
        if asked.kind == "control" and np.quantile(draws[1:], 1 - SURE) > chance:
            return f"{asked.method}, {asked.reader}, balanced accuracy {draws[0]:.2f} where chance is {chance:.2f}"
    return ""


def _any_signal(scores: Mapping[Asked, Mapping[str, Draws]], chance: float) -> bool:
    return any(
        interval(of["balanced_accuracy"])[1] > chance
        for asked, of in scores.items()
        if asked.kind != "control"
    )
