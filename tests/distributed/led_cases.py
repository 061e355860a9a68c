"""What rank 0 does with backends that it leads, and the same on one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import TEMPERATURE, VOCAB, packs, random_experts
from safetensors.torch import save_file

from services.learner.config import LearnerSection
from services.learner.items import BatchItems, Item
from services.learner.trainer import StepOutcome, Trainer
from shared.algo.shadow import ShadowLosses, ShadowRoute
from shared.backends.adamw import AdamWSettings
from shared.backends.building import BackendSpec
from shared.backends.megatron.layout import Layout
from shared.backends.ranks import Ranks

LENGTHS = (23, 9, 40, 23, 31, 2, 38, 14, 17)
MICRO_TOKENS = 64
VERSION = 5


def spec(arguments: dict[str, Any]) -> BackendSpec:
    return BackendSpec(
        Path(arguments["model"]),
        kind=arguments.get("kind", "torch"),
        device="cpu",
        layout=Layout(**arguments.get("layout", {})),
        adamw=AdamWSettings(),
    )


def section(arguments: dict[str, Any]) -> LearnerSection:
    optimizer = {
        "lr": 2e-3,
        "schedule": "constant",
        "minibatches": arguments.get("minibatches", 2),
        "micro_batch_tokens": MICRO_TOKENS,
    }
    return LearnerSection.model_validate({"optimizer": optimizer})


def batch(seed: int, lengths: tuple[int, ...] = LENGTHS, routed: int = 0) -> BatchItems:
    """Sequences as a journalled batch would give them: several ages, masked tokens, two rewards.

    `routed`: layers with recorded experts; every third sequence has none.
    """
    rng = np.random.default_rng(seed)
    experts = np.random.default_rng([seed, 1])
    items: list[Item] = []
    for number, length in enumerate(lengths):
        mask = rng.random(length) < 0.6
        mask[0] = False
        mask[-1] = True
        old = np.where(mask, rng.uniform(-4, -1, length), 0.0)
        items.append(
            Item(
                token_ids=rng.integers(0, VOCAB, length).astype(np.int32),
                loss_mask=mask,
                sampled_mask=mask,
                versions=np.where(mask, VERSION - rng.integers(0, 4), -1),
                old_logprobs=old.astype(np.float32),
                sampler_logprobs=np.where(mask, old + rng.normal(0, 0.02, length), 0).astype(
                    np.float32
                ),
                advantages=np.full(length, rng.normal(), dtype=np.float32),
                reward=float(number % 2),
                trajectory=number,
                compared=bool(number % 3),
                routing=random_experts(experts, length, routed) if routed and number % 3 else None,
            )
        )
    tokens = sum(int(item.loss_mask.sum()) for item in items)
    ages = np.concatenate([VERSION - item.versions[item.loss_mask] for item in items])
    return BatchItems(tuple(items), tokens, tokens, tokens, ages)


def train(backend: Any, arguments: dict[str, Any], steps: range) -> list[StepOutcome]:
    config = section(arguments)
    trainer = Trainer(
        backend,
        config,
        temperature=TEMPERATURE,
        num_ages=5,
        shadows=ShadowLosses(
            config.algo.settings(),
            [ShadowRoute("current_recompute", "current"), ShadowRoute("rollout", "sampler")],
            trained="oracle",
            reference="oracle",
        ),
    )
    return [
        trainer.step(
            batch(seed, tuple(arguments.get("lengths", LENGTHS)), arguments.get("routed", 0)),
            version=VERSION,
            seed=seed,
            compare=True,
        )
        for seed in steps
    ]


def write_outcomes(out: Path, name: str, outcomes: list[StepOutcome]) -> None:
    shown = [
        {
            "scalars": o.scalars,
            "arrays": {k: np.asarray(v).tolist() for k, v in o.arrays.items()},
            "shadows": {k: dict(v) for k, v in o.shadows.items()},
            "failure": o.shadow_failure,
        }
        for o in outcomes
    ]
    (out / name).write_text(json.dumps(shown))


def write_state(out: Path, name: str, backend: Any) -> None:
    save_file({k: v.detach().clone().contiguous() for k, v in backend.state().items()}, out / name)


def services_life(arguments: dict[str, Any], ranks: Ranks) -> None:
    """What a learner does: score, train, save; a scorer beside it; resume; an export."""
    out = Path(arguments["out"])
    backend = ranks.build(spec(arguments))
    scorer = ranks.build(spec(arguments))
    pack = packs(0, 0, [[0, 1, 2, 3]], routed=arguments.get("routed", 0))[0]
    scores = {"before": backend.score(pack, temperature=TEMPERATURE)}
    backend.export_hf(out / "export")
    write_outcomes(out, "outcomes.json", train(backend, arguments, range(2)))
    (out / "checkpoint").mkdir()
    backend.save(out / "checkpoint")
    scorer.load_state(backend.state())
    scores["trained"] = backend.score(pack, temperature=TEMPERATURE)
    scores["scorer"] = scorer.score(pack, temperature=TEMPERATURE)
    write_state(out, "after2.safetensors", backend)
    train(backend, arguments, range(2, 3))
    write_state(out, "after3.safetensors", backend)
    again = ranks.build(spec(arguments))
    again.load(out / "checkpoint")
    train(again, arguments, range(2, 3))
    write_state(out, "resumed3.safetensors", again)
    save_file(scores, out / "scores.safetensors")


class MaskedAway:
    """A loss without gradient where a pack has no loss token."""

    def __call__(self, output: Any, batch: Any) -> torch.Tensor:
        if not batch.per_token["loss_mask"].any():
            return torch.zeros(())
        return -output.logprobs_T.sum()


def constant_loss(arguments: dict[str, Any], ranks: Ranks) -> None:
    backend = ranks.build(spec(arguments))
    [pack] = packs(0, 0, [[0, 2]])
    backend.forward_backward(pack, MaskedAway(), temperature=TEMPERATURE, with_entropy=False)
    norm = backend.step(1e-3, max_grad_norm=1.0)
    (Path(arguments["out"]) / "norm.json").write_text(json.dumps(norm))


def refusals(arguments: dict[str, Any], ranks: Ranks) -> None:
    """What all ranks refuse leaves them of use; a model that is absent, a state that is another."""
    out, said = Path(arguments["out"]), []
    backend = ranks.build(spec(arguments))
    for work in (
        lambda: ranks.build(spec({**arguments, "model": str(out / "absent")})),
        lambda: backend.load_state({"model.norm.weight": torch.zeros(3)}),
        lambda: backend.load(out / "absent"),
    ):
        try:
            work()
        except (ValueError, OSError) as error:
            said.append(str(error))
    write_state(out, "after.safetensors", backend)
    (out / "said.json").write_text(json.dumps([*said, ranks.reason]))
