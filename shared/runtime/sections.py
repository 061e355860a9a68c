"""Sections of `config:` that more than one service reads. Each service adds its own section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, cast, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from shared.algo.ewma_control import EwmaSettings
from shared.runtime.trackers_section import TrackersSection
from shared.wire.trajectory import SamplingParams


class Section(BaseModel):
    """A part of the configuration: strict, so that a typo fails at start."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RunSection(Section):
    """Which run this is."""

    name: str = "run"
    """Namespaces subjects, streams and buckets."""
    seed: int = 0
    dir: str = "runs/run"
    """Folder of checkpoints, archive and report; on a cluster a mounted volume."""
    archive: bool = True
    """Whether a recorder archives the run (`lagwise audit`, `explain` and `report` read it). The
    learner then purges only what is archived; otherwise whatever no checkpoint needs."""


class BusSection(Section):
    """How to reach NATS, and the bounds of every wait on it."""

    url: str = "nats://127.0.0.1:4222"
    user: str = ""
    """Empty: none. The password comes from `password_file`, never from the configuration."""
    password_file: str = ""
    credentials_file: str = ""
    """A `.creds` file (JWT and nkey) instead of user and password; needs the extra `nkeys`."""
    tls_ca_file: str = ""
    """CA that signed the server's certificate; given, the connection must be TLS."""
    tls_cert_file: str = ""
    """Our own certificate, for a server that verifies clients; with `tls_key_file`."""
    tls_key_file: str = ""
    connect_timeout_s: float = Field(default=20.0, gt=0)
    """At start: exit with code 2 when nothing answers for so long."""
    request_timeout_s: float = Field(default=3.0, gt=0)
    """One attempt of an append or a JetStream call."""
    retry_s: float = Field(default=60.0, gt=0)
    """How long an operation is retried before it fails the service."""
    max_stream_bytes: int = Field(default=4 * 1024**3, gt=0)
    """Per stream; a full stream is a fault, never back-pressure."""

    @model_validator(mode="after")
    def _one_identity(self) -> Self:
        if self.credentials_file and (self.user or self.password_file):
            raise ValueError("give either credentials_file or user and password_file, not both")
        if bool(self.user) != bool(self.password_file):
            raise ValueError("user and password_file go together: one of them is missing")
        if bool(self.tls_cert_file) != bool(self.tls_key_file):
            raise ValueError("tls_cert_file and tls_key_file go together: one of them is missing")
        return self


class LayoutSection(Section):
    """How the backend `megatron` lays a model over ranks; what is left over is data parallel."""

    tp: int = Field(default=1, ge=1)
    """Tensor parallel ranks."""
    pp: int = Field(default=1, ge=1)
    """Pipeline stages."""
    ep: int = Field(default=1, ge=1)
    """Expert parallel ranks, among the tensor- and data-parallel ones."""
    sp: bool = False
    """Sequence parallel norms and residuals; needs tp above 1."""


class ModelSection(Section):
    """The policy."""

    source: str = "examples/frozen_lake/base"
    """Hugging Face directory. On a cluster also `hf://org/name@revision`, which an init container
    fetches, and `pvc://claim/path`, which the chart mounts."""
    model_id: str = "policy"
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Of the published bytes and of the training forward."""
    recompute: bool = False
    """Learner: keep one activation per layer and compute the rest again in the backward pass. Less
    memory, a third more multiplications, the same bits."""
    compile: bool = False
    """Learner and oracle: torch.compile each layer. Other bits than without, so one setting for
    both."""
    routing: Literal["recompute", "replay"] = "recompute"
    """Of a mixture of experts. recompute: the router chooses in every forward, the sampler's, that
    of ℓ^old and that of ℓ. replay: rollouts record their choices, and ℓ^old and ℓ take those
    (docs/backends.md)."""
    backend: Literal["torch", "megatron"] = "torch"
    """Of learner and oracle (docs/backends.md). megatron needs the extra of that name."""
    layout: LayoutSection = LayoutSection()
    """Of learner and oracle, with the backend megatron; torch shards over all ranks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Of learner and oracle; auto: cuda where there is one, a device of its own for each rank."""
    rank_timeout_s: float = Field(default=300.0, gt=0)
    """Bound of every wait between the ranks of a learner or an oracle: a rank that is silent for
    so long is lost, and ends them all."""

    @model_validator(mode="after")
    def _has_layout(self) -> Self:
        given = [f"{n} {getattr(self.layout, n)}" for n in ("tp", "pp", "ep")
                 if getattr(self.layout, n) != 1] + ["sp true"] * self.layout.sp  # fmt: skip
        if given and self.backend == "torch":
            raise ValueError(
                f"layout {', '.join(given)}: the backend torch only shards over data-parallel "
                "ranks (learner.ranks): leave model.layout out, or set model.backend: megatron"
            )
        if self.layout.sp and self.layout.tp == 1:
            raise ValueError("layout sp true needs layout.tp above 1: leave sp out, or set tp")
        if self.backend == "megatron" and self.dtype == "float64":
            raise ValueError("dtype float64: the backend megatron has float32 and bfloat16")
        if self.backend == "megatron" and self.compile:
            raise ValueError("compile: the backend megatron does not compile layers; set false")
        return self

    def check_ranks(self, ranks: int, key: str) -> None:
        """Refuse a number of ranks that the layout does not divide, or whose stages ep does not.

        Raises:
            ValueError: names both.
        """
        stage = self.layout.tp * self.layout.pp
        if ranks % stage:
            raise ValueError(
                f"{key} {ranks} is no multiple of model.layout tp {self.layout.tp} x pp "
                f"{self.layout.pp}"
            )
        in_stage = ranks // self.layout.pp
        if in_stage % self.layout.ep:
            raise ValueError(
                f"model.layout ep {self.layout.ep} does not divide the {in_stage} ranks of a stage "
                f"({key} {ranks} / pp {self.layout.pp})"
            )


class TaskSection(Section):
    """What is played."""

    dataset: str = "frozen_lake"
    source: str = "services.learner.task_source:SeededTaskSource"
    """Import path of the TaskSource."""
    source_options: dict[str, Any] = {}
    """Handed to the task source as written."""
    environment: str = "services.env_agents.tasks.frozen_lake:FrozenLake"
    """Import path of the Environment: any class that satisfies the Protocol."""
    renderer: str = "services.env_agents.text_renderer:TextRenderer"
    """Import path of the Renderer."""
    renderer_options: dict[str, Any] = {}
    """Handed to the renderer as written."""
    options: dict[str, Any] = {}
    """Handed to the environment as written."""
    max_turns: int = Field(default=10, gt=0)


class SamplingSection(Section):
    """How tokens are drawn."""

    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    max_new_tokens: int = Field(default=8, gt=0)
    """Per turn."""
    context_tokens: int = Field(default=192, gt=0)
    """Longest prompt + answers of one sequence."""

    @model_validator(mode="after")
    def _no_truncation(self) -> Self:
        if self.top_p < 1 or self.top_k:
            raise ValueError(
                "truncated sampling (top_p, top_k) needs a recorded keep-set, which no engine "
                "here records yet: use top_p: 1.0 and top_k: 0"
            )
        return self

    def params(self, stop_ids: tuple[int, ...] = ()) -> SamplingParams:
        """Return the wire form."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=self.max_new_tokens,
            stop_ids=stop_ids,
        )


class AdmissionSection(Section):
    """How much is in flight and how old it may become (docs/staleness.md)."""

    groups_per_version: int = Field(default=16, gt=0)
    """P."""
    group_size: int = Field(default=8, gt=0)
    max_staleness: int = Field(default=4, ge=0)
    """η, in versions."""
    on_stale: Literal["hold", "mask", "drop"] = "hold"
    ticket_deadline_s: float = Field(default=60.0, gt=0)
    sync_slack: int = Field(default=2, ge=0)
    """Publication waits while no live rollout is within so many versions."""
    max_outstanding_groups: int | None = Field(default=None, gt=0)
    """A tighter bound on groups in flight than P·(η+1)."""

    @model_validator(mode="after")
    def _a_batch_fits(self) -> Self:
        bound = self.max_outstanding_groups
        if bound is not None and bound < self.groups_per_version:
            raise ValueError(
                f"max_outstanding_groups {bound} is below groups_per_version "
                f"{self.groups_per_version}: no batch could ever be complete"
            )
        return self


class WeightsSection(Section):
    """How versions of the policy travel (docs/weights.md)."""

    keyframe_every: int = Field(default=16, gt=0)
    """A full copy every so many versions, beside the deltas."""
    keyframe_store: str = ""
    """Folder that all services mount, or an fsspec URL (s3://bucket/run); empty: on the bus."""
    keyframe_store_options: dict[str, Any] = {}
    """For fsspec: endpoint_url and the like. Secrets belong into the environment."""
    chunk_bytes: int = Field(default=1 << 20, gt=0)
    """Upper bound of one chunk on the bus."""
    spool_bytes: int = Field(default=256 << 20, gt=0)
    """A delta up to this size is held in memory, a larger one in a temporary file."""
    threads: int = Field(default=0, ge=0)
    """For diffing and applying; 0: one per core, at most 8."""


RouteName = Literal[
    "oracle", "snapshot_old", "interrupt", "ewma_prox", "ppo_ewma_async",
    "interp_prox_loglinear", "interp_prox_linear", "current_recompute", "rollout",
]  # fmt: skip
EXACT_ROUTES = frozenset({"oracle", "snapshot_old", "interrupt"})
SHADOWS: tuple[str, ...] = tuple(n for n in get_args(RouteName) if n != "interrupt")
"""What can look on: a fence cannot, it stops everybody."""


class OldLogprobsSection(Section):
    """Where old log-probs come from."""

    route: RouteName = "oracle"
    """The first three are exact (docs/routes.md)."""
    layout: Literal["packed", "single"] = "packed"
    """How snapshot_old and interrupt forward: packed prefixes, or each whole sequence alone."""
    version_timeout_s: float = Field(default=60.0, gt=0)
    """How long snapshot_old asks for a version before the run fails."""
    fallback: Literal["", "current_recompute"] = ""
    """What replaces the old log-probs of a version that is gone for good: tagged and counted.
    Empty: the run fails, naming the version."""
    anchor: Literal["", "current_recompute", "ewma_prox", "ppo_ewma_async"] = ""
    """With learner.algo.objective four_policy: the policy that the clip lies around, beside the
    old one of `route`."""
    ewma: EwmaSettings | None = None
    """Of the two EWMA routes, as route or anchor; null: the route's own defaults."""
    score_timeout_s: float = Field(default=120.0, gt=0)
    """A trajectory unscored for so long, while an oracle lives, counts as failed."""
    fence_timeout_s: float = Field(default=30.0, gt=0)
    """How long interrupt waits for env agents to hand in what they sampled. What is missing then
    can never be scored: its tokens leave the loss, counted."""
    shadow: tuple[str, ...] = ()
    """Further routes that look on, never trained on: any but interrupt. Their error is measured
    against the exact one: the route itself, or else an exact shadow. By default current_recompute
    beside an exact route, none beside an approximate one, which has nothing to compare with."""
    shadow_share: float = Field(default=0.25, gt=0, le=1)
    """Share of the trajectories that shadows look at, fixed by run.seed and ticket id."""
    shadow_timeout_s: float = Field(default=5.0, gt=0)
    """How long a step waits for a version or score that an exact shadow lacks."""

    @model_validator(mode="before")
    @classmethod
    def _usual_shadow(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or "shadow" in data:
            return cast("Any", data)
        given = cast("Mapping[str, Any]", data)
        exact = given.get("route", "oracle") in EXACT_ROUTES
        return {**given, "shadow": ("current_recompute",) if exact else ()}

    @field_validator("shadow")
    @classmethod
    def _can_look_on(cls, shadow: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        route: str = info.data.get("route", "")
        for name in shadow:
            if why := _no_shadow(name, route):
                raise ValueError(why)
            if shadow.count(name) > 1:
                raise ValueError(f"{name} is listed twice: list it once")
        return shadow


def _no_shadow(name: str, route: str) -> str:
    """Return why a route cannot look on beside the trained one, and what to do; else nothing."""
    if name == "interrupt":
        return (
            "interrupt cannot be a shadow: it stops all sampling at every step; for an exact "
            "reference use snapshot_old or oracle"
        )
    if name not in SHADOWS:
        return f"{name!r} is none of {', '.join(SHADOWS)}"
    if name == route:
        return f"{name} is old_logprobs.route itself: take it out of old_logprobs.shadow"
    if name == "oracle" and route in EXACT_ROUTES:
        return (
            f"oracle cannot look on beside {route}, which stores the exact scores itself: take it "
            "out, every shadow is compared with the route"
        )
    return ""


class TelemetrySection(Section):
    """Metrics, probes, leases, logs."""

    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)
    """/metrics /healthz /readyz; 0 = any free port."""
    lease_interval_s: float = Field(default=2.0, gt=0)
    lease_expiry_s: float = Field(default=6.0, gt=0)
    drain_s: float = Field(default=15.0, gt=0)
    """From the stop signal to the end: what has not returned by then is cancelled."""
    stall_s: float = Field(default=30.0, gt=0)
    """/healthz turns 503 when the event loop has not run for so long."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"


class CommonConfig(Section):
    """What every service reads."""

    run: RunSection = RunSection()
    bus: BusSection = BusSection()
    model: ModelSection = ModelSection()
    task: TaskSection = TaskSection()
    sampling: SamplingSection = SamplingSection()
    admission: AdmissionSection = AdmissionSection()
    weights: WeightsSection = WeightsSection()
    old_logprobs: OldLogprobsSection = OldLogprobsSection()
    telemetry: TelemetrySection = TelemetrySection()
    trackers: TrackersSection = TrackersSection()

    @model_validator(mode="after")
    def _trackers_have_a_writer(self) -> Self:
        trackers = self.trackers
        if (trackers.tensorboard or trackers.wandb) and not self.run.archive:
            raise ValueError("trackers are written by the recorder: set run.archive to true")
        return self
