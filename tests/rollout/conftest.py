from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.rollout.engines import ENGINES, VLLM, EngineKind, Versions
from tests.rollout.models import write_model_dir

collect_ignore = [] if VLLM else ["vllm"]

if VLLM:

    @pytest.fixture(scope="session", autouse=True)
    async def engines_of_the_session() -> AsyncIterator[None]:
        from tests.rollout.vllm.pool import POOL

        yield
        await POOL.close()


@pytest.fixture(params=sorted(ENGINES))
def kind(request: pytest.FixtureRequest) -> EngineKind:
    return ENGINES[request.param]


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def model_dir(tmp_path: Path, tied: bool) -> Path:
    return write_model_dir(tmp_path / "model", tied=tied)


@pytest.fixture
def untied_dir(tmp_path: Path) -> Path:
    return write_model_dir(tmp_path / "untied", tied=False)


@pytest.fixture
def versions(kind: EngineKind, tied: bool) -> Versions:
    return Versions(tied=tied, dtype=kind.dtype)


@pytest.fixture
def untied_versions(kind: EngineKind) -> Versions:
    return Versions(tied=False, dtype=kind.dtype)
