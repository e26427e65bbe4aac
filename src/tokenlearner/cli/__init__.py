"""The command line: parse, call, print. Everything it calls can be called from Python.

Exit codes: 0, 1 for bad input (one sentence on stderr), 2 for bad usage.
"""

import os
import sys
from collections.abc import Sequence

from cyclopts import CycloptsError

from tokenlearner.cli import (  # noqa: F401 - they add their commands to app
    looking,
    measuring,
    scoring,
    streaming,
    studying,
    training,
)
from tokenlearner.cli.options import app
from tokenlearner.errors import InputError
from tokenlearner.training.recipe_files import config_reader


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script; exits with 0, 1 or 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        read_recipe_file(arguments)
        app(arguments, exit_on_error=False, result_action="return_none")
    except CycloptsError:
        sys.exit(2)  # cyclopts has printed what was wrong
    except (
        InputError,
        FileExistsError,
        FileNotFoundError,
        PermissionError,
        IsADirectoryError,
        NotADirectoryError,
    ) as error:
        if os.environ.get("RANK", "0") == "0":  # torchrun's other processes would say the same
            print(f"tokenlearner: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output (head, say) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        print("tokenlearner: stopped", file=sys.stderr)
        sys.exit(130)


def read_recipe_file(arguments: Sequence[str]) -> None:
    """Hands `--recipe FILE` to cyclopts as configuration before it parses the rest."""
    app.config = None
    for i, argument in enumerate(arguments):
        if argument == "--recipe" and i + 1 < len(arguments):
            app.config = [config_reader(arguments[i + 1])]
        elif argument.startswith("--recipe="):
            app.config = [config_reader(argument.split("=", 1)[1])]
