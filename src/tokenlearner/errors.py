"""The one error the command line turns into a sentence and exit code 1."""


class InputError(ValueError):
    """What the user gave does not fit: the message says what was wrong, where, and what would be right."""
