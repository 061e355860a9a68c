"""One process of the torch backend against plain transformers: forward, three steps, export.

The same bounds as those of the layouts of several ranks in `tests/distributed`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.backends.adamw import AdamWSettings
from shared.backends.torch_backend import TorchBackend
from tests.distributed.comparing import MAX_ERROR, MAX_LOGPROB_ERROR, MAX_SHARE, differences, same
from tests.distributed.models import (
    BETAS,
    EPS,
    LR,
    MAX_NORM,
    MODELS,
    STEPS,
    TEMPERATURE,
    Loss,
    packs,
    plain_logprobs,
    train_plainly,
    write_model,
)

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module", params=[(k, s) for k in MODELS for s in SEEDS], ids=str)
def world(request, tmp_path_factory) -> tuple[Path, int]:
    kind, seed = request.param
    return write_model(tmp_path_factory.mktemp("model") / kind, kind, seed), seed


def opened(path: Path) -> TorchBackend:
    backend = TorchBackend(optimizer=AdamWSettings(betas=BETAS, eps=EPS))
    backend.load_hf(path)
    return backend


def test_log_probs_are_those_of_the_plain_forward(world):
    path, seed = world
    batch = packs(seed, 0, [[0, 1, 2, 3]])[0]
    del batch.per_token["loss_mask"]
    got = opened(path).score(batch, temperature=TEMPERATURE)
    want = plain_logprobs(path, batch)
    assert got.abs().max() > 1
    assert (got - want).abs().max() <= MAX_LOGPROB_ERROR


def test_parameters_after_three_steps_are_those_of_plain_training(world):
    path, seed = world
    assert LR >= 1e-3
    backend = opened(path)
    for step in range(STEPS):
        backend.accumulate(
            packs(seed, step, [[0, 1, 2], [3, 4], [5, 6, 7]]),
            Loss(seed, step),
            temperature=TEMPERATURE,
            with_entropy=True,
        )
        backend.step(LR, max_grad_norm=MAX_NORM)
    before, want = train_plainly(path, seed)
    error, share = differences(before, want, dict(backend.state()))
    assert error <= MAX_ERROR
    assert share <= MAX_SHARE


def test_an_export_is_the_loaded_directory_bit_for_bit(world, tmp_path):
    path, _ = world
    opened(path).export_hf(tmp_path / "export")
    exported, loaded = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "export", path)
    )
    assert same(exported, loaded)
    assert {t.dtype for t in exported.values()} == {torch.float32}
