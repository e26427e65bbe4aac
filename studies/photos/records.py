"""What train.py keeps of its runs and report.py reads: tables, settings, the commit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recipes import Settings

REPOSITORY = Path(__file__).parents[2]


def read_settings(path: Path) -> tuple[dict[str, Any], Settings]:
    """What a settings.json says: data set and scoring, and the recipe. The first ones had the recipe only."""
    values = {"dataset": "cifar10", "tune": False, "limit": None} | json.loads(path.read_text())
    return {key: values.pop(key) for key in ("dataset", "tune", "limit")}, Settings(**values)
