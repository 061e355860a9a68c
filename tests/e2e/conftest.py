import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness import Run


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Start `lagwise` with arguments; whatever is left of it is killed at the end."""
    runs: list[Run] = []

    def begin(*arguments: str, name: str = "run") -> Run:
        runs.append(Run(tmp_path / name, *arguments))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()
