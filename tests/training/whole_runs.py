"""What tests of whole runs have in common: a timing that takes no time, and a stop after the first checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from tokenlearner.inspection.speed import measure_speed
from tokenlearner.training import budget, checkpoint, side_by_side, train


def brief_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (train, budget, side_by_side):
        monkeypatch.setattr(module, "measure_speed", partial(measure_speed, seconds_per_round=0.001))


@contextmanager
def stopped_at_first_checkpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What runs inside must come so far, and stops as by Ctrl-C."""
    kept = checkpoint.WholeCheckpoints.save_checkpoint

    def stop_after(self, *args, **kwargs):
        kept(self, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.WholeCheckpoints, "save_checkpoint", stop_after)
        with pytest.raises(KeyboardInterrupt):
            yield
