"""The contract of every engine, kept with a mixture of experts whose routing is recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from services.rollout.engine import SampleResult, SampleSpec
from services.rollout.torch_engine import TorchEngine
from tests.rollout import test_engine_contract as contract
from tests.rollout.engines import CONTEXT, EngineKind, Versions, ids_of
from tests.rollout.models import State
from tests.rollout.moe_models import make_moe_state, moe_reference, write_moe_dir

LEFT_OUT = {
    # They name tensors, or score, of the dense model.
    "test_a_state_that_does_not_fit_is_refused_and_the_old_weights_stay",
    "test_given_text_is_scored_as_the_reference_does_and_sampling_does_not_notice",
}
TESTS = {name: test for name, test in vars(contract).items() if name.startswith("test_")}
assert TESTS.keys() > LEFT_OUT
globals().update({name: test for name, test in TESTS.items() if name not in LEFT_OUT})


class MoeVersions(Versions):
    def __getitem__(self, version: int) -> State:
        if version not in self.states:
            self.states[version] = make_moe_state(version, self.dtype)
        return self.states[version]

    def expected(self, spec: SampleSpec, result: SampleResult, version: int) -> np.ndarray:
        ids, temperature = [*spec.token_ids, *ids_of(result)], spec.sampling.temperature
        logprobs, _ = moe_reference(self[version], ids, temperature=temperature)
        return logprobs[len(spec.token_ids) :]


@pytest.fixture
def kind() -> EngineKind:
    def make(model_dir: Path, **options: object) -> TorchEngine:
        defaults = {"context_tokens": CONTEXT, "max_running": 8, "kv_slots": 16}
        fields = defaults | {"record_routing": True} | options
        return TorchEngine(model_dir, dtype="float64", **fields)  # type: ignore[arg-type]

    return EngineKind(make, torch.float64)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return write_moe_dir(tmp_path / "moe")


@pytest.fixture
def untied_dir(model_dir: Path) -> Path:
    return model_dir


@pytest.fixture
def versions() -> Versions:
    return MoeVersions(tied=False, dtype=torch.float64)


@pytest.fixture
def untied_versions(versions: Versions) -> Versions:
    return versions
