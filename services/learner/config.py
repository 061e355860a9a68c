"""The learner's section of the configuration."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from services.learner import guards
from shared.runtime.algo_section import AlgoSection
from shared.runtime.sections import CommonConfig, Section


class OptimizerSection(Section):
    """AdamW and its schedule, counted in versions."""

    lr: float = Field(default=1e-6, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """linear, cosine: from lr to lr·final_ratio at the last version."""
    final_ratio: float = Field(default=0.1, ge=0, le=1)
    warmup_versions: int = Field(default=0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    minibatches: int = Field(default=1, gt=0)
    """Optimizer steps per version."""
    micro_batch_tokens: int = Field(default=16384, gt=0)


class EvalSection(Section):
    """Held-out evaluation, outside admission."""

    episodes: int = Field(default=512, ge=0)
    """At the first and the last version, all samples together; 0 = none."""
    samples: int = Field(default=1, gt=0)
    """Episodes per task: k of avg@k and pass@k. `episodes` is a multiple of it."""
    success_reward: float = 1.0
    """A reward from here on counts as a success in pass@k."""
    deadline_s: float = Field(default=600.0, gt=0)
    """Of each evaluation ticket: the whole round is queued at once."""
    progress_episodes: int = Field(default=0, ge=0)
    progress_every: int = Field(default=20, gt=0)
    """Versions between evaluations during training."""
    pin: bool = True
    """Training waits for an evaluation during training, so that all of it is played at the version
    it is for; false: it goes on, and late tokens of the evaluation are of later versions."""

    @model_validator(mode="after")
    def _whole_tasks(self) -> Self:
        for name in ("episodes", "progress_episodes"):
            if getattr(self, name) % self.samples:
                raise ValueError(
                    f"{name} {getattr(self, name)} is no multiple of samples {self.samples}"
                )
        return self


class CheckpointSection(Section):
    """What a restart can go back to. Written beside training, one at a time."""

    every_versions: int = Field(default=5, gt=0)
    """While one is still being written, the next waits for the step after it."""
    keep: int = Field(default=2, gt=0)
    """A damaged newest one is skipped, and the one before it used: 1 leaves nothing to go to."""


class LearnerSection(Section):
    """Training."""

    versions: int = Field(default=100, gt=0)
    """The run ends when this version is published."""
    optimizer: OptimizerSection = OptimizerSection()
    algo: AlgoSection = AlgoSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    at_end: Literal["exit", "wait"] = "exit"
    """After the last version: end the process, or stay until told to stop (a cluster would start
    it again for ever)."""
    max_skipped_steps: int = Field(default=10, ge=0)
    """A loss or gradient that is not finite skips its optimizer step; more than so many in a row
    stop the run."""
    ranks: int = Field(default=1, gt=0)
    """Processes that train together, started by torchrun; the first one owns the bus. `lagwise up`
    and the chart start them."""
    sync_wait_s: float = Field(default=30.0, gt=0)
    """Longest delay of a publication for rollouts that are behind."""
    shadow_every: int = Field(default=1, gt=0)
    """Versions between comparisons of the shadow routes."""
    allow_degenerate: tuple[Literal["dead_mask", "dead_clip", "degenerate_objective"], ...] = ()
    """Guards of the start that a baseline runs into on purpose: warnings instead of refusals."""


class LearnerConfig(CommonConfig):
    """What the learner reads."""

    learner: LearnerSection = LearnerSection()

    @model_validator(mode="after")
    def _can_act(self) -> Self:
        self.model.check_ranks(self.learner.ranks, "learner.ranks")
        anchor, kind = self.old_logprobs.anchor, self.learner.algo.objective.kind
        if self.learner.algo.objective.needs_prox != bool(anchor):
            raise ValueError(
                f"old_logprobs.anchor {anchor!r} with learner.algo.objective {kind}: four_policy "
                "needs an anchor (current_recompute, ewma_prox or ppo_ewma_async), and nothing "
                "else takes one"
            )
        if anchor and anchor == self.old_logprobs.route:
            raise ValueError(
                f"old_logprobs.anchor {anchor} is the route itself, so that S1 = 1: take objective "
                "ppo, or another anchor"
            )
        if refused := guards.refused(self):
            raise ValueError("; ".join(one.line for one in refused))
        return self
