"""Against packages that the default suite does not install; test-agents and test-trackers do."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

NEEDS = {
    "test_saved_datasets.py": "datasets",
    "test_pydantic_ai.py": "pydantic_ai",
    "test_trackers.py": "wandb",
}

collect_ignore = [
    str(Path(__file__).parent / name) for name, package in NEEDS.items() if not find_spec(package)
]
