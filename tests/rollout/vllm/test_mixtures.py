"""A mixture of experts on real vLLM: every part can change alone, and what the router chose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.rollout.engines import ids_of, make_prompt, make_spec, started
from tests.rollout.mixtures import Expected, make_mixture_state, write_mixture_dir
from tests.rollout.models import TOLERANCE
from tests.rollout.vllm.pool import DTYPES, Borrowed

EXPERT = "model.layers.2.mlp.experts.5."
PARTS = {
    "one matrix of one expert": lambda name: name == f"{EXPERT}up_proj.weight",
    "one expert": lambda name: name.startswith(EXPERT),
    "a router": lambda name: name == "model.layers.0.mlp.gate.weight",
    "a dense layer": lambda name: name.startswith("model.layers.1.mlp."),
    "everything": lambda name: True,
}


@pytest.fixture
def mixture_dir(tmp_path: Path) -> Path:
    return write_mixture_dir(tmp_path / "mixture")


@pytest.mark.parametrize("dtype", ["float32"])
async def test_every_part_of_a_mixture_can_change_alone_and_all_come_back(
    mixture_dir: Path, dtype: str
) -> None:
    first, other = (make_mixture_state(seed, DTYPES[dtype]) for seed in (0, 1))
    async with started(Borrowed(mixture_dir, dtype)) as engine:
        await engine.update(0, first, None)
        start = await engine.sample(make_spec("start", make_prompt(1, 40)))
        version, current = 0, dict(first)
        for what, chosen in PARTS.items():
            changed = {name for name in first if chosen(name)}
            current = current | {name: other[name] for name in changed}
            version += 1
            await engine.update(version, current, changed)
            spec = make_spec(f"r{version}", make_prompt(version, 40), new=12)
            result = await engine.sample(spec)
            expected = Expected(current, [*spec.token_ids, *ids_of(result)])
            error = np.abs(result.sampled.logprobs.numpy() - expected.logprobs[40:])
            assert error.max() <= TOLERANCE[DTYPES[dtype]], what
        await engine.update(version + 1, first, None)
        again = await engine.sample(make_spec("start", make_prompt(1, 40)))
        assert ids_of(again) == ids_of(start)
        assert np.array_equal(again.sampled.logprobs.numpy(), start.sampled.logprobs.numpy())
