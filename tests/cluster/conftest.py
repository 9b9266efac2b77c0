"""The cluster folder, read as the tools read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"


def documents(name: str) -> list[dict[str, Any]]:
    """The YAML documents of the file ``name`` in the cluster folder."""
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))
