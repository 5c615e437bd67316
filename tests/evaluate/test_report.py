import pickle
import re
from collections.abc import Iterator

import anndata as ad
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from anndata import AnnData

import cellprior as cp
from cellprior.cli import main
from cellprior.evaluate import _methods
from cellprior.evaluate._ask import KNN, LINEAR, Answers, Asked
from cellprior.evaluate._expression import log_normalised
from cellprior.evaluate._neighbors import Chosen
from cellprior.evaluate._splits import batch_splits, random_folds
from cellprior.evaluate._task import CHOSEN, make_task
from cellprior.evaluate._verdict import _short, _where, compare, judge

from .test_protocols import told

QUICK = {"seeds": 3, "n_per_class": (5,), "progress": False}


@pytest.fixture(autouse=True, scope="module")
def little_structure() -> Iterator[None]:
    """Less of what takes longest and no verdict depends on; tests of the protocols do all of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cellprior.evaluate._structure.N_SUBSAMPLES", 2)
        patch.setattr("cellprior.evaluate._structure._scores", lambda *_: ({"silhouette": 0.5}, None))
        patch.setattr("cellprior.evaluate._structure._clusters", lambda *_: {"ari": 0.5, "nmi": 0.5})
        yield


def spread(adata: AnnData, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((adata.n_obs, 5))


def test_labels_plus_noise_win(cells):
    adata = cells(signal=0.15)
    report = cp.evaluate.report(adata, {"told": told(adata)}, "type", **QUICK)
    verdict = report.verdicts[0]
    assert (verdict.neighbours, verdict.naming) == ("helps", "helps")
    assert report.verdict.startswith(
        "told: helps, unless it was made with these labels.\n- As an embedding: better than the baseline: macro-F1"
    )
    assert "It is an array: if it was made with these labels, this proves nothing." in report.verdict
    assert max(map(len, report.verdict.split("\n"))) <= 100


def test_an_embedding_of_nothing_loses(cells):
    adata = cells()
    report = cp.evaluate.report(adata, {"nothing": spread(adata)}, "type", **QUICK)
    assert report.verdicts[0].neighbours == report.verdicts[0].naming == "worse"
    assert "made with these labels" not in report.verdict
    assert "as labels and noise would" not in report.verdict
    assert re.search("Next: use (PCA|HVG)", report.verdict)


def test_a_report_is_the_same_on_any_number_of_cores(cells, monkeypatch):
    adata = cells()
    found = []
    for n_jobs in (1, 2):
        monkeypatch.setattr(cp.settings, "_n_jobs", n_jobs)
        found.append(cp.evaluate.report(adata, {"told": told(adata)}, "type", **QUICK))
    one, two = found
    assert one.verdict == two.verdict
    for first, second in zip(one.tables().values(), two.tables().values(), strict=True):
        without = [table.drop(columns="seconds", errors="ignore") for table in (first, second)]
        assert without[0].equals(without[1])


def test_where_nothing_is_chosen_a_pca_has_fifty_components_and_an_embedding_all_it_has():
    latent = np.zeros((3, 100))
    assert _methods.Space("all genes", latent, (100, 50, 30, 20, 10)).usual.shape == (3, 50)
    assert _methods.Space("", latent, (100,)).usual.shape == (3, 100)


def test_shuffled_labels_are_no_signal_and_all_scores_at_chance(cells):
    adata = cells()
    adata.obs["shuffled"] = np.random.default_rng(0).permutation(adata.obs["type"])
    report = cp.evaluate.report(adata, {"told": told(adata)}, "shuffled", **QUICK)
    assert report.verdicts[0].neighbours == "no signal"
    assert "no signal" in report.verdict
    for table in (report.zero_shot, report.linear_probe):
        scores = table.loc[table["metric"] == "balanced_accuracy", "value"]
        assert ((scores - 1 / 3).abs() < 0.12).all()


def answered(reader: str, **right: float) -> Answers:
    """Of 400 cells each method names such a share right; "chosen" is the chosen baseline."""
    codes, rng = np.tile([0, 1], 200), np.random.default_rng(0)
    answers = Answers(random_folds(codes, seeds=5), np.arange(400))
    for name, share in right.items():
        said = np.where(rng.random(400) < share, codes, 1 - codes)
        kind = "embedding" if name == "mine" else "baseline"
        asked = Asked(CHOSEN if name == "chosen" else name, kind, reader)
        for split in answers.splits:
            answers.add(asked, Chosen(said[split.test], 0.5, "PCA" if name == "chosen" else ""))
    return answers


def scores(answers: Answers) -> dict[Asked, np.ndarray]:
    return {asked: of["macro_f1"] for asked, of in answers.scores(np.tile([0, 1], 200)).items()}


def test_what_is_behind_one_of_the_baselines_does_not_help():
    """The one that is chosen within the training cells may be worse than another, which the table shows."""
    answers = answered(KNN, mine=0.8, chosen=0.6, HVG=0.9)
    found = compare(answers, scores(answers), "mine", KNN)
    assert found.outcome == "cannot tell" and "and not than HVG" in found.words
    assert found.advice == "label more cells, or use HVG"
    answers = answered(KNN, mine=0.8, chosen=0.6)
    assert compare(answers, scores(answers), "mine", KNN).outcome == "helps"


def test_what_to_do_next_says_for_which_of_two_uses(cells):
    adata = cells()
    task = make_task(adata, {"mine": told(adata)}, labels_key="type")
    for naming, after in (
        (0.4, "Next: as an embedding, use it; to name cells, use PCA."),
        (0.8, "Next: use it."),
    ):
        answers = answered(KNN, mine=0.8, chosen=0.6)
        answers.take(answered(LINEAR, mine=naming, chosen=0.6))
        verdict = judge(task, answers, answers.scores(np.tile([0, 1], 200)), "mine")
        assert verdict.text.split("\n")[-1] == after


def test_a_gain_on_cells_that_the_weights_were_trained_on_proves_nothing(cells):
    adata = cells()
    task = make_task(adata, {"mine": told(adata)}, labels_key="type")
    task.n_trained_on["mine"] = 200
    task.methods[0] = _methods.fixed("mine", told(adata), seen=task.seen_by("mine"))
    for mine, headline, after in (
        (
            0.8,
            "mine: helps, on cells that it was trained on.",
            "Next: ask about cells that it was not trained on.",
        ),
        (0.4, "mine: worse.", "Next: use PCA."),
    ):
        answers = answered(KNN, mine=mine, chosen=0.6)
        answers.take(answered(LINEAR, mine=mine, chosen=0.6))
        lines = judge(task, answers, answers.scores(np.tile([0, 1], 200)), "mine").text.split("\n")
        assert lines[0] == headline and lines[-1] == after
        proves = ", so this proves nothing" if mine == 0.8 else ""
        assert f"- It was trained on at least 200 of these 240 cells{proves}." in lines
    task.n_trained_on["mine"] = 60
    answers = answered(KNN, mine=0.8, chosen=0.6)
    answers.take(answered(LINEAR, mine=0.8, chosen=0.6))
    text = judge(task, answers, answers.scores(np.tile([0, 1], 200)), "mine").text
    assert "at least 60 of these 240 cells, so this proves little." in text
    del task.n_trained_on["mine"]
    task.methods[0] = _methods.fixed("mine", told(adata), seen=task.seen_by("mine"))
    text = judge(task, answers, answers.scores(np.tile([0, 1], 200)), "mine").text
    assert text.startswith("mine: helps, unless it was trained on these cells.")
    assert (
        "- It is not known which cells its weights were trained on: if on these, this proves nothing." in text
    )
    task.n_trained_on["mine"] = 2
    assert task.seen_by("mine") == "no cell"  # by chance, or a control


def test_a_verdict_says_how_often_the_cells_were_divided():
    codes = np.tile([0, 1], 100)
    for n, words in (
        (5, "5 parts held out in turn, 200 test cells"),
        (15, "5 parts held out in turn, the cells divided 3 times, 200 test cells"),
        (12, "12 parts held out in turn, of cells divided into 5, 3 times, 200 test cells"),
        (3, "3 parts held out in turn, of cells divided into 5, 120 test cells"),
    ):
        assert _where(Answers(random_folds(codes, seeds=n), np.arange(200))) == words
    many = batch_splits(codes, [f"donor {i % 18:02}" for i in range(200)])
    assert _where(Answers(many, np.arange(200))) == "10 groups of batches held out in turn, 200 test cells"
    short = [_short(split.held_out) for split in many]
    assert all(re.fullmatch(r"donor \d\d( and 1 more)?", unit) for unit in short) and len(set(short)) == 10
    assert sum(unit.endswith("more") for unit in short) == 8
    two = batch_splits(codes, ["a"] * 150 + ["b"] * 50, least_asked=60)
    assert _where(Answers(two, np.arange(200))) == "1 batch held out, 150 test cells"


def test_every_cell_twice_is_no_gain(cells):
    """Noise that is the same for both copies would name one by the other."""
    adata = cells()
    adata.obs["type"] = np.random.default_rng(0).permutation(adata.obs["type"])
    twice = ad.concat([adata, adata], index_unique="-")
    report = cp.evaluate.report(twice, {"own": np.tile(spread(adata), (2, 1))}, "type", **QUICK)
    assert report.verdicts[0].neighbours == report.verdicts[0].naming == "no signal"
    assert any("240 cells have the same counts" in note for note in report.notes)


def test_one_split_gives_no_verdict(cells):
    adata = cells()
    report = cp.evaluate.report(adata, {"told": told(adata)}, "type", **{**QUICK, "seeds": 1})
    assert report.verdicts[0].neighbours == report.verdicts[0].naming == "no verdict"


def test_equals_are_no_better_and_few_cells_cannot_tell(cells):
    adata = cells(n_cells=900, signal=0.35)
    log = log_normalised(adata.X)
    same = _methods.pca("", _methods.Genes(log)).fit()[0].values[:, :10]
    outcomes = {}
    for n in (60, 900):
        report = cp.evaluate.report(adata[:n].copy(), {"same": same[:n]}, "type", **{**QUICK, "seeds": 5})
        outcomes[n] = report.verdicts[0].neighbours
    assert outcomes == {60: "cannot tell", 900: "no better"}


def test_a_helper_is_told_from_its_best_baseline_by_the_paired_difference(cells):
    """The words follow the table: the interval of the difference, and the best baseline."""
    adata = cells(signal=0.15)
    report = cp.evaluate.report(adata, {"told": told(adata, 0.5)}, "type", **QUICK)
    table = report.zero_shot
    row = table[(table["method"] == "told") & (table["metric"] == "macro_f1")].iloc[0]
    assert (row["difference_low"] > 0) == (report.verdicts[0].neighbours == "helps")
    assert f"{row['value']:.2f} ± " in report.verdict
    assert f"[{row['difference_low']:+.2f}, {row['difference_high']:+.2f}]" in report.verdict
    rival = table[(table["method"] == row["versus"]) & (table["metric"] == "macro_f1")].iloc[0]
    assert f"against {rival['value']:.2f} ± " in report.verdict.replace("\n  ", " ")


@pytest.fixture(scope="module")
def report(cells) -> cp.evaluate.Report:
    adata = cells()
    embeddings = {"told": told(adata), "nothing": spread(adata)}
    return cp.evaluate.report(adata, embeddings, "type", "donor", **QUICK)


def test_a_report_shows_itself(report):
    markdown, page = report.to_markdown(), report._repr_html_()
    assert [v.embedding for v in report.verdicts] == ["told", "nothing"]
    for text in (markdown, page):
        assert "3 batches held out in turn" in text
        for title in report.tables():
            assert title in text
        assert "| nan" not in text and ">nan<" not in text.lower()
    first = next(iter(report.tables().values())).iloc[0]
    assert f"| {' | '.join(first)} |" in markdown
    assert report.provenance["cells"] == 240
    pickle.loads(pickle.dumps(report))


def test_three_donors_speak_for_themselves_only(report):
    nothing = report.verdicts[1]
    assert nothing.neighbours == nothing.naming == "worse on these donors"
    each = "; " + ", ".join(rf"donor {i} -[\d.]+" for i in range(3))
    assert len(re.findall(each, nothing.text)) == 2


def test_each_label_has_its_f1_the_largest_first(report):
    assert report.per_label["cells"].is_monotonic_decreasing
    assert report.per_label["told, nearest neighbours"].between(0.8, 1).all()
    assert not any("chosen" in column for column in report.per_label)


def test_the_figure_draws_every_table(report):
    matplotlib.use("agg")
    figure = cp.pl.report(report)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == [
        "nearest neighbours, held-out batches",
        "linear probe, held-out batches",
        "few labelled cells, linear probe",
        "each label, nearest neighbours (cells)",
        "clusters and neighbourhoods, all cells",
    ]
    title = figure.get_suptitle().split("\n")
    assert title[0].startswith("told: ") and title[1].startswith("- As an embedding: ")
    assert " ".join(line.strip() for line in title) == " ".join(report.verdict.split())
    plt.close(figure)


def test_the_few_shot_curve_can_be_left_out(cells):
    adata = cells()
    report = cp.evaluate.report(adata, {"told": told(adata)}, "type", seeds=2, n_per_class=(), progress=False)
    assert report.few_shot.empty
    assert "Few labelled cells" not in report.to_markdown()
    plt.close(cp.pl.report(report))


def test_the_command_line_writes_the_report(cells, tmp_path, capsys):
    adata = cells()
    adata.obsm["X_told"] = told(adata)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    out = tmp_path / "report"
    arguments = ["--labels", "type", "--batch-key", "donor", "--seeds", "1", "--out", str(out)]
    assert main(["evaluate", str(tmp_path / "cells.h5ad"), "--embedding", "X_told", *arguments]) == 0
    printed = capsys.readouterr().out
    assert re.search("X_told: (helps on these donors|no better|cannot tell)", printed)
    assert (out / "report.md").read_text() in printed
    assert (out / "report.png").stat().st_size > 10_000
    assert not plt.get_fignums()


def test_the_command_line_wants_something_to_evaluate(cells, tmp_path, capsys):
    cells().write_h5ad(tmp_path / "cells.h5ad")
    assert main(["evaluate", str(tmp_path / "cells.h5ad"), "--labels", "type"]) == 1
    assert "--weights" in capsys.readouterr().err


def test_the_report_of_backed_cells_is_that_of_cells_in_memory(cells, tmp_path):
    adata = cells()
    adata.obsm["X_told"] = told(adata)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    quick = {**QUICK, "seeds": 2}
    first, second = (cp.evaluate.report(data, "X_told", "type", **quick).verdict for data in (adata, backed))
    assert first == second
