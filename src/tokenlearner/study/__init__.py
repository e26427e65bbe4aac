"""Studies: a question, variants that answer it, a row a run, and a verdict by a stated rule.

A study is a file that names a :class:`Study` ``STUDY``; those of the paper's claims are in ``studies/`` of the
repository, and ``tokenlearner study`` runs them, or one's own.
"""

from tokenlearner.study.claims import RULE, Claim, compare
from tokenlearner.study.rows import read_rows, write_rows
from tokenlearner.study.study import Job, Study, open_study, run_study

__all__ = [
    "RULE",
    "Claim",
    "Job",
    "Study",
    "compare",
    "open_study",
    "read_rows",
    "run_study",
    "write_rows",
]
