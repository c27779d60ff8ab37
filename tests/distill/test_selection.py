"""PASER's choice: nothing is lost where nothing was compressed, budgets are exact, groups are found, the costly come last."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.distill.logit_kd import LogitKD
from compress.distill.selection import budgets, choose, clusters, efficiency, measure, select
from compress.train_pass import Batch


@pytest.fixture(scope="module")
def models(llama, run_stages, reload):
    return reload(run_stages(llama, ["magnitude:sparsity=0.5"])), reload(llama)


def test_an_uncompressed_model_has_lost_nothing(models, tokens):
    _, teacher = models
    scores, pooled, n_tokens = measure(teacher, teacher, tokens, None, 1)
    assert scores.tolist() == [0, 0] and n_tokens.tolist() == [39, 39] and pooled.shape == (2, 64)


def test_scores_are_means_over_the_predicted_tokens(models, tokens):
    student, teacher = models
    counted = torch.zeros(2, 40, dtype=torch.bool)
    counted[0, 5:9] = counted[1, 1:30] = True
    scores, pooled, n_tokens = measure(student, teacher, tokens, counted, 2)
    assert n_tokens.tolist() == [4, 29] and ((scores > 0) & (scores <= math.log(2))).all()
    with torch.no_grad():
        p, q = (model(tokens).logits[0, 4:8].double().softmax(-1) for model in (teacher, student))
        hidden = teacher.model(tokens).last_hidden_state[0, 4:8].mean(0)
    m = (p + q) / 2
    jsd = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    assert float(scores[0]) == pytest.approx(float(jsd.mean()), rel=1e-4)
    torch.testing.assert_close(pooled[0], hidden)


def test_a_window_without_anything_to_predict_is_worth_nothing(models, tokens):
    counted = torch.ones(2, 40, dtype=torch.bool)
    counted[1] = False
    scores, pooled, n_tokens = measure(*models, tokens, counted, 2)
    assert scores[1] == 0 and n_tokens[1] == 0 and pooled.isfinite().all()


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    share=st.floats(0, 1),
    zero=st.booleans(),
    seed=st.integers(0, 99),
)
def test_budgets_sum_exactly_and_fit(sizes, share, zero, seed):
    means = torch.rand(len(sizes), generator=torch.Generator().manual_seed(seed)) * (not zero)
    total = round(share * sum(sizes))
    counts = budgets(means, sizes, total)
    assert sum(counts) == total and all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))


def test_budgets_are_proportional_to_the_mean_score():
    assert budgets(torch.tensor([0.1, 0.2, 0.3]), [100, 100, 100], 60) == [10, 20, 30]
    assert budgets(torch.tensor([0.1, 0.2, 0.3]), [100, 100, 10], 60) == [17, 33, 10]  # what it lacks the others give
    assert budgets(torch.tensor([0.0, 1.0]), [100, 10], 30) == [20, 10]
    assert budgets(torch.zeros(2), [10, 30], 20) == [5, 15]
    with pytest.raises(ValueError, match="5 windows are to be chosen from 4"):
        budgets(torch.ones(2), [2, 2], 5)


def test_groups_that_lie_apart_are_found():
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(3, 8, generator=generator)
    truth = torch.arange(90) % 3
    labels = clusters(centres[truth] + torch.randn(90, 8, generator=generator), 3, seed=1)
    assert len(labels.unique()) == 3
    assert all(len(labels[truth == group].unique()) == 1 for group in range(3))


@pytest.mark.parametrize("n", [1, 2, 7])
def test_few_and_equal_points(n):
    assert clusters(torch.randn(n, 4), 10, 0).shape == (n,)
    assert clusters(torch.ones(n, 4), 10, 0).tolist() == [0] * n


def test_within_a_group_the_loss_for_its_cost_decides():
    scores, n_tokens = torch.tensor([0.3, 0.3, 0.2, 0.1]).double(), torch.tensor([100, 10, 10, 10])
    worth = efficiency(scores, n_tokens)
    assert worth.argsort(descending=True).tolist() == [1, 2, 0, 3]
    assert float(worth[1]) == pytest.approx(0.3 / math.log(100)) and efficiency(scores, torch.zeros(4)).isfinite().all()
    assert choose(scores, torch.zeros(4, dtype=torch.int64), n_tokens, 2).tolist() == [1, 2]
    assert choose(scores, torch.tensor([0, 0, 1, 1]), n_tokens, 3).tolist() == [0, 1, 2]


def test_the_whole_choice_can_be_repeated(models, tokens):
    windows = torch.randint(2, 256, (12, 16), generator=torch.Generator().manual_seed(5))
    first, second = (select(*models, windows, None, 5, n_clusters=3, batch_size=size) for size in (4, 4))
    assert first.equal(second) and len(first) == 5 == len(first.unique())
    assert select(*models, windows, None, 12).tolist() == list(range(12))


def test_a_pass_draws_more_windows_and_trains_on_those_where_most_was_lost(models):
    student, teacher = models
    step = LogitKD(select="paser", selected=0.25, steps=2, batch_size=4, hold_out=0)
    assert step.n_windows == 32
    tokens = torch.randint(32, (32, 10), generator=torch.Generator().manual_seed(0))
    picked = step.pick(student, teacher, Batch(tokens), seed=0)
    assert picked is not None and len(picked) == len(picked.unique()) == 8
    assert LogitKD(steps=2).pick(student, teacher, Batch(tokens), seed=0) is None
    with pytest.raises(ValueError, match="leave out cache"):
        LogitKD(select="paser", cache=4)
