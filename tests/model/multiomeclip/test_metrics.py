from __future__ import annotations

import numpy as np
import pytest
import torch

from cellprior.model.multiomeclip._metrics import (
    depth_scores,
    foscttm,
    latent_metrics,
    matching_metrics,
    matching_score,
    modality_gap,
    recall_at,
)


@pytest.fixture
def scores() -> torch.Tensor:
    return torch.randn(30, 30, generator=torch.Generator().manual_seed(0)) + 1.5 * torch.eye(30)


def test_foscttm_is_the_share_of_the_other_cells_that_are_closer_than_the_partner(scores):
    s = scores.tolist()
    closer = [sum(s[i][j] > s[i][i] for j in range(30) if j != i) / 29 for i in range(30)]
    assert foscttm(scores) == pytest.approx(np.mean(closer))
    closer = [sum(s[j][i] > s[i][i] for j in range(30) if j != i) / 29 for i in range(30)]
    assert foscttm(scores.T) == pytest.approx(np.mean(closer))
    assert foscttm(scores) != foscttm(scores.T)


def test_recall_counts_partners_among_the_most_similar(scores):
    s = scores.numpy()
    for k in (1, 5, 30):
        hits = [i in np.argsort(-s[i])[:k] for i in range(30)]
        assert recall_at(scores, k) == pytest.approx(np.mean(hits))


def test_a_collapsed_embedding_is_chance_and_not_perfect():
    same = torch.ones(20, 8)
    found = latent_metrics(same, same)
    assert found["foscttm"] == 0.5
    assert found["recall_at_1"] == pytest.approx(1 / 20)
    assert found["recall_at_10"] == pytest.approx(10 / 20)


def test_what_is_not_a_number_is_no_match_and_not_a_perfect_one(scores):
    nothing = latent_metrics(torch.full((9, 4), torch.nan), torch.full((9, 4), torch.nan))
    assert all(np.isnan(value) for value in nothing.values())
    scores[0, 1] = torch.nan
    assert np.isnan(foscttm(scores)) and np.isnan(recall_at(scores, 1))


def test_perfect_and_inverted_matches():
    assert foscttm(torch.eye(9)) == 0.0 and recall_at(torch.eye(9), 1) == 1.0
    assert foscttm(-torch.eye(9)) == 1.0


def test_the_matching_score_is_the_mean_probability_of_the_partner(scores):
    s = np.exp(scores.double().numpy())
    assert matching_score(scores) == pytest.approx(np.mean(np.diag(s) / s.sum(axis=1)), rel=1e-5)


def test_the_gap_is_the_distance_of_the_means():
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert modality_gap(first, first) == 0
    assert modality_gap(first, -first) == pytest.approx(2**0.5)


def test_the_metrics_of_both_directions_are_averaged(scores):
    found = matching_metrics(scores)
    assert found["foscttm"] == (found["foscttm_atac_to_rna"] + found["foscttm_rna_to_atac"]) / 2
    assert found["foscttm_atac_to_rna"] == foscttm(scores)
    assert found["recall_at_10"] == (recall_at(scores, 10) + recall_at(scores.T, 10)) / 2


def test_the_depth_control_matches_cells_by_rank_and_gains_nothing_from_ties():
    depth = np.array([5.0, 1.0, 9.0, 3.0])
    assert foscttm(depth_scores(depth, depth**2)) == 0.0
    assert foscttm(depth_scores(np.ones(50), np.ones(50))) == 0.5
    rng = np.random.default_rng(0)
    assert foscttm(depth_scores(rng.random(2000), rng.random(2000))) == pytest.approx(0.5, abs=0.02)
