"""Builders are plain functions; tests reach them through one fixture."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.learner.crash_world import save_model


@pytest.fixture(scope="session")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "learner_make", Path(__file__).with_name("make.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["learner_make"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model of `crash_world`; files with a model of their own override it."""
    return save_model(tmp_path_factory.mktemp("model"))
