"""When a difference between two sets of runs counts, and what it says about a claim."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

RULE = (
    "better or worse: the means differ by more than the 95 % margin (Student's t, n1 + n2 - 2 degrees of freedom, "
    "times the pooled standard error); undecided: they do not"
)
PAIRED = (
    "where a seed is the same clips or the same rounds of timing for all variants, as a section says, the margin is "
    "that of the mean of the differences seed by seed (n - 1 degrees of freedom)"
)
CLAIM_RULES = {
    "better": "holds where the first is better by the rule above, does not where it is worse",
    "at least": "holds where the first is better, or the margin around the difference lies above minus {slack}; does "
    "not where it is worse",
    "about": "holds where the margin around the difference lies within {slack} of zero; does not where it lies outside",
    "at most": "holds where the mean of the first is at most {slack} times that of the second, for what has no spread",
}


def compare(scores: Sequence[float], others: Sequence[float], *, paired: bool = False) -> dict[str, Any]:
    """The difference of the means, its 95 % margin and the verdict on ``scores``; no verdict without two of each.

    ``paired``: the i-th of both have something in common, and there are as many.
    """
    difference, n1, n2 = statistics.mean(scores) - statistics.mean(others), len(scores), len(others)
    if min(n1, n2) < 2:
        return {"difference": round(difference, 2), "pooled_standard_error": None, "margin": None, "verdict": None}
    from scipy.stats import t as student

    if paired:
        freedom = n1 - 1
        error = statistics.stdev(a - b for a, b in zip(scores, others, strict=True)) / math.sqrt(n1)
    else:
        freedom = n1 + n2 - 2
        pooled = ((n1 - 1) * statistics.variance(scores) + (n2 - 1) * statistics.variance(others)) / freedom
        error = math.sqrt(pooled * (1 / n1 + 1 / n2))
    margin = float(student.ppf(0.975, freedom)) * error
    verdict = "better" if difference > margin else "worse" if difference < -margin else "undecided"
    return {
        "difference": round(difference, 2),
        "pooled_standard_error": round(error, 2),
        "margin": round(margin, 2),
        "verdict": verdict,
    }


@dataclass(frozen=True)
class Claim:
    """That variant ``first`` beats, reaches or equals variant ``second``.

    ``number`` is that of the list in ``docs/results.md``; ``paper`` what the paper prints for it, with its unit.
    ``slack`` is in the unit of the scores that are compared, or of "at most" a factor; ``score`` the column they are
    in, the study's if empty. What ``decides`` is what the numbered claim says; the rest is about it too.
    """

    number: int
    text: str
    first: str
    second: str
    paper: str
    kind: Literal["better", "at least", "about", "at most"] = "better"
    slack: float = 1.0
    score: str = ""
    decides: bool = True

    @property
    def rule(self) -> str:
        return CLAIM_RULES[self.kind].format(slack=f"{self.slack:g}")

    def judge(self, scores: Mapping[str, Sequence[float]], *, paired: bool = False) -> dict[str, Any]:
        """The comparison of both variants' ``scores``, its own verdict as ``outcome``, with the ``verdict`` "holds",
        "does not", "undecided", or None where a variant has less than two runs."""
        if not scores.get(self.first) or not scores.get(self.second):
            return dict.fromkeys(("difference", "pooled_standard_error", "margin", "verdict", "outcome"))
        first, second = scores[self.first], scores[self.second]
        found = compare(first, second, paired=paired)
        found["outcome"] = found["verdict"]
        if found["verdict"] is None:
            return found
        low, high = found["difference"] - found["margin"], found["difference"] + found["margin"]
        if self.kind == "at most":
            verdict = "holds" if statistics.mean(first) <= self.slack * statistics.mean(second) else "does not"
        elif self.kind == "about":
            inside, outside = -self.slack <= low and high <= self.slack, low > self.slack or high < -self.slack
            verdict = "holds" if inside else "does not" if outside else "undecided"
        elif found["verdict"] == "worse":
            verdict = "does not"
        else:
            reached = self.kind == "at least" and low > -self.slack
            verdict = "holds" if found["verdict"] == "better" or reached else "undecided"
        return {**found, "verdict": verdict}

    def judged(self, scores: Mapping[str, Sequence[float]], *, paired: bool = False) -> dict[str, Any]:
        """All there is to say about it: itself, its rule, the scores of both variants and what :meth:`judge` finds."""
        sides = [[round(score, 4) for score in scores.get(variant, ())] for variant in (self.first, self.second)]
        return {**asdict(self), "rule": self.rule, "scores": sides, **self.judge(scores, paired=paired)}
