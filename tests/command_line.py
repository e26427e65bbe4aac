"""Runs a command as the console script does, in this process."""

import json
from typing import NamedTuple

from tokenlearner.cli import main


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)  # fails on anything beside the one document

    @property
    def sentence(self) -> str:
        """What bad input leaves: nothing on stdout, one line on stderr."""
        assert (self.code, self.out, self.err.count("\n")) == (1, "", 1), self
        assert self.err.startswith("tokenlearner: ")
        return self.err


def exit_code(*arguments: object) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
