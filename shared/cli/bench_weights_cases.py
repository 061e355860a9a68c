"""What `make bench-weights` measures: one case per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Place = Literal["store", "bus"]
"""Where the followers' first keyframe comes from: a shared directory, or chunks on the bus."""

LEARNING_RATES = (1e-6, 1e-5, 1e-3)
STEPS_PER_VERSION = (1, 4)
GB = 10**9


@dataclass(frozen=True, slots=True)
class Case:
    """One model and the kind of change between its versions."""

    name: str
    dtype: Literal["BF16", "F32"] = "BF16"
    """safetensors code of the published tensors."""
    lr: float | None = None
    """Of the training run whose versions are published; None: a synthetic model."""
    steps_per_version: int | None = None
    """K."""
    num_elements: int = 0
    """Of a synthetic model."""
    change_ratio: float = 0.0
    """Share of a synthetic model's elements that move by one unit in the last place, 0..1."""
    repetitions: int = 5
    """Of every timing of the codec; the median counts."""
    publications: int = 3
    """Timed per number of followers, and repetitions of the way through a local file."""
    joins: tuple[Place, ...] = ("store",)
    """Ways in which followers join. The first also gives the times."""

    @property
    def is_trained(self) -> bool:
        return self.lr is not None


@dataclass(frozen=True, slots=True)
class Training:
    """How the versions of the trained cases come about."""

    hidden: int = 512
    layers: int = 6
    vocab: int = 256
    warmup_steps: int = 300
    """At `warmup_lr`: from a random initialisation until the loss has levelled off, for a policy
    comes to RL pre-trained. It matters: at 1e-6, 1.3 % of the weights change per step after a
    warm-up of 100 steps, 1.0 % after one of 450."""
    warmup_lr: float = 1e-3
    settling_steps: int = 50
    """At the measured learning rate, before the first version."""
    versions: int = 5
    """Deltas per K."""


def full() -> list[Case]:
    """Return the cases of the real measurement."""
    trained = [trained_case(lr, steps) for lr in LEARNING_RATES for steps in STEPS_PER_VERSION]
    dense = trained_case(LEARNING_RATES[0], 1, dtype="F32")
    return [
        *trained,
        dense,
        Case("0.1gb-1pct", num_elements=GB // 20, change_ratio=0.01),
        Case("0.1gb-5pct", num_elements=GB // 20, change_ratio=0.05),
        Case("1gb-1pct", num_elements=GB // 2, change_ratio=0.01, publications=5),
        Case("1gb-5pct", num_elements=GB // 2, change_ratio=0.05, repetitions=3),
        Case("2gb-1pct", num_elements=GB, change_ratio=0.01, joins=("store", "bus")),
        Case("2gb-5pct", num_elements=GB, change_ratio=0.05, repetitions=3, publications=2),
    ]


def quick() -> tuple[Training, list[Case]]:
    """Return tiny cases that go through everything; their figures mean nothing."""
    training = Training(hidden=32, layers=1, vocab=32, warmup_steps=2, settling_steps=2, versions=2)
    both: tuple[Place, ...] = ("store", "bus")
    return training, [
        Case("quick-lr1e-3", lr=1e-3, steps_per_version=1, repetitions=1),
        Case("quick-1pct", num_elements=10**6, change_ratio=0.01, repetitions=1, joins=both),
    ]


def trained_case(lr: float, steps: int, dtype: Literal["BF16", "F32"] = "BF16") -> Case:
    """Return the case of K = `steps` optimizer steps per version."""
    mantissa, exponent = f"{lr:e}".split("e")
    name = f"lr{float(mantissa):g}e{int(exponent)}-k{steps}" + ("-fp32" if dtype == "F32" else "")
    return Case(name, dtype=dtype, lr=lr, steps_per_version=steps)
