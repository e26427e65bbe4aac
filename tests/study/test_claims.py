"""When a difference counts: every branch of the rules, against numbers worked out by hand."""

import math

import pytest

from tokenlearner.study.claims import CLAIM_RULES, RULE, Claim, compare

# 97.5 % quantiles of Student's t from a printed table, by degrees of freedom.
STUDENT = {2: 4.302653, 3: 3.182446, 4: 2.776445}


def around(mean: float) -> list[float]:
    """Three scores of that mean and variance 1: the margin between two such is 2.776445·√(2/3) = 2.27."""
    return [mean - 1, mean, mean + 1]


@pytest.mark.parametrize(
    ("scores", "others", "pooled", "verdict"),
    [
        (around(5), around(2), 1, "better"),
        (around(2), around(5), 1, "worse"),
        (around(4), around(2), 1, "undecided"),
        ([1, 3], [5, 7, 9], (1 * 2 + 2 * 4) / 3, "undecided"),  # -5, and the margin is 5.30
        ([1, 3], [5.4, 7.4, 9.4], (1 * 2 + 2 * 4) / 3, "worse"),
        ([1, 1.5], [2, 2.5], 0.125, "undecided"),  # -1, and the margin of so few is 1.52
        ([2, 2], [2, 2], 0, "undecided"),
        ([3, 3], [2, 2], 0, "better"),
    ],
)
def test_a_difference_counts_beyond_its_margin(scores, others, pooled, verdict):
    n1, n2 = len(scores), len(others)
    error = math.sqrt(pooled * (1 / n1 + 1 / n2))
    found = compare(scores, others)
    assert found["difference"] == pytest.approx(sum(scores) / n1 - sum(others) / n2, abs=0.005)
    assert found["pooled_standard_error"] == pytest.approx(error, abs=0.0051)
    assert found["margin"] == pytest.approx(STUDENT[n1 + n2 - 2] * error, abs=0.0051)
    assert found["verdict"] == verdict


@pytest.mark.parametrize(("scores", "others"), [([2], [1, 1]), ([2, 2], [1]), ([2], [1])])
def test_one_run_decides_nothing(scores, others):
    assert compare(scores, others) == {
        "difference": 1,
        "pooled_standard_error": None,
        "margin": None,
        "verdict": None,
    }


@pytest.mark.parametrize(
    ("kind", "slack", "difference", "verdict", "outcome"),
    [  # the margin is 2.27
        ("better", 1, 3, "holds", "better"),
        ("better", 1, 2, "undecided", "undecided"),
        ("better", 9, 2, "undecided", "undecided"),  # slack is nothing to it
        ("better", 1, -2, "undecided", "undecided"),
        ("better", 1, -3, "does not", "worse"),
        ("at least", 1, 3, "holds", "better"),
        ("at least", 1, 1.5, "holds", "undecided"),  # from -0.77 on
        ("at least", 1, 1, "undecided", "undecided"),  # from -1.27 on
        ("at least", 3, -0.5, "holds", "undecided"),  # from -2.77 on
        ("at least", 3, -1, "undecided", "undecided"),
        ("at least", 1, -3, "does not", "worse"),
        ("at least", 10, -3, "does not", "worse"),  # surely worse, however little
        ("about", 3, 0.5, "holds", "undecided"),
        ("about", 3, -0.5, "holds", "undecided"),
        ("about", 6, 3, "holds", "better"),  # better, and within the slack
        ("about", 3, 1, "undecided", "undecided"),  # up to 3.27
        ("about", 3, -1, "undecided", "undecided"),
        ("about", 3, 4, "undecided", "better"),
        ("about", 3, 6, "does not", "better"),  # from 3.73 on
        ("about", 3, -6, "does not", "worse"),
    ],
)
def test_the_verdict_on_a_claim(kind, slack, difference, verdict, outcome):
    claim = Claim(1, "a claim", "one", "other", "1 and 0 %", kind, slack)
    found = claim.judge({"other": around(50), "one": around(50 + difference), "third": [0.0]})
    assert (found["verdict"], found["outcome"]) == (verdict, outcome)
    assert (found["difference"], found["margin"]) == (difference, 2.27)


def test_a_claim_about_what_was_not_run_has_no_verdict():
    claim = Claim(1, "a claim", "one", "other", "1 and 0 %")
    for scores in ({}, {"one": [1.0, 2.0]}, {"one": [1.0, 2.0], "other": []}):
        assert set(claim.judge(scores).values()) == {None}
    once = claim.judge({"one": [3.0], "other": [1.0]})
    assert (once["difference"], once["margin"], once["verdict"], once["outcome"]) == (2, None, None, None)


def test_the_rules_are_told_with_their_slack():
    assert set(CLAIM_RULES) == {"better", "at least", "about", "at most"}
    assert "minus 0.5;" in Claim(1, "", "a", "b", "", "at least", 0.5).rule
    assert "within 2 of zero" in Claim(1, "", "a", "b", "", "about", 2.0).rule
    assert "95 %" in RULE


def test_pairs_are_compared_by_their_differences():
    """Sequences that differ by far more than two models on the same one."""
    scores, others = [11.0, 52.0, 93.0], [10.0, 50.0, 90.0]
    assert compare(scores, others)["verdict"] == "undecided"
    found = compare(scores, others, paired=True)
    assert found["difference"] == 2.0
    assert found["margin"] == pytest.approx(STUDENT[2] / math.sqrt(3), abs=0.01)  # the differences are 1, 2 and 3
    assert compare([2.0, 2.1, 2.2], [1.0, 1.1, 1.2], paired=True)["verdict"] == "better"
    flat = compare([1.2, 1.3, 1.4], [1.0, 1.0, 1.0], paired=True)  # as against a constant
    assert flat["pooled_standard_error"] == pytest.approx(0.1 / 3**0.5, abs=0.01)
    with pytest.raises(ValueError, match="zip"):
        compare([1.0, 2.0], [1.0, 2.0, 3.0], paired=True)


@pytest.mark.parametrize(("slack", "verdict"), [(0.5, "holds"), (0.49, "does not")])
def test_what_has_no_spread_is_at_most_a_share(slack, verdict):
    claim = Claim(1, "", "a", "b", "", "at most", slack)
    assert claim.judge({"a": [5.0, 5.0], "b": [10.0, 10.0]})["verdict"] == verdict
