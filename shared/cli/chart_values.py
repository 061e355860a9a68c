"""Everything a values file may say beside `config:`; strict, so that a typo fails `helm lint`.

Names are written as Kubernetes writes them. `shared/cli/values_schema.py` turns the models into the
chart's schema; `charts/lagwise/values.yaml` holds the defaults and the comments for users.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Tag = Annotated[str, Field(json_schema_extra={"not": {"enum": ["latest"]}})]
"""`latest` is refused: two pods of one Deployment could run two programs."""
Digest = Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$")]
ClaimName = Annotated[str, Field(pattern=r"^([a-z0-9]([a-z0-9.-]*[a-z0-9])?)?$")]
Objects = list[dict[str, Any]]


class ChartSection(BaseModel):
    """A part of the values."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ImageValues(ChartSection):
    """Where images come from; `<registry>/<prefix>-<role>:<tag>`."""

    registry: str = Field(default="", min_length=1)
    """Required: where `make images push REGISTRY=...` put them."""
    prefix: str = Field(default="lagwise", min_length=1)
    tag: Tag = ""
    """Empty: the chart's appVersion."""
    pullPolicy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    pullSecrets: list[str] = []


class RoleImage(ChartSection):
    """Overrides the image of one role."""

    repository: str = ""
    """Whole repository, registry included, e.g. of an image built FROM ours."""
    tag: Tag = ""
    digest: Digest = ""
    """Wins over the tag."""


class GpuValues(ChartSection):
    """Accelerators per pod."""

    count: int = Field(default=0, ge=0)
    resource: str = "nvidia.com/gpu"


class BudgetValues(ChartSection):
    """A PodDisruptionBudget that always lets a drain go on."""

    enabled: bool = True
    maxUnavailable: (
        Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=r"^([1-9][0-9]?|100)%$")]
    ) = 1


class AccountValues(ChartSection):
    """The role's ServiceAccount; it carries no API token."""

    annotations: dict[str, str] = {}


class PodValues(ChartSection):
    """What every pod of the chart can be told."""

    image: RoleImage = RoleImage()
    resources: dict[str, Any] = {}
    nodeSelector: dict[str, str] = {}
    tolerations: Objects = []
    affinity: dict[str, Any] = {}
    topologySpreadConstraints: Objects = []
    priorityClassName: str = ""
    podLabels: dict[str, str] = {}
    podAnnotations: dict[str, str] = {}
    extraEnv: Objects = []
    extraVolumes: Objects = []
    extraVolumeMounts: Objects = []
    podSpecExtra: dict[str, Any] = {}
    """Merged over the pod spec: everything rarer. Lists replace ours."""


class RoleValues(PodValues):
    """One of the four services."""

    replicas: Annotated[int, Field(ge=0)] | None = None
    """Fixed number of pods; only with autoscaling.mode none."""
    gpu: GpuValues = GpuValues()
    runtimeClassName: str = ""
    shmSize: Quantity | Literal[""] = ""
    """Of /dev/shm, out of the pod's memory; empty: the container runtime's 64 MiB."""
    startupSeconds: int = Field(default=900, ge=30)
    """From the container's start until it has been ready once; the kubelet then restarts it."""
    terminationGracePeriodSeconds: Annotated[int, Field(ge=10)] | None = None
    """Default: config.telemetry.drain_s plus 15 s; 45 s where a recorder ends after the learner."""
    modelFiles: Literal["all", "config"] = "all"
    """What an hf:// source brings into the pod: `config` leaves the weights out."""
    podDisruptionBudget: BudgetValues = BudgetValues()
    serviceAccount: AccountValues = AccountValues()


class StorageValues(ChartSection):
    """A volume claim of a StatefulSet."""

    size: Quantity = "50Gi"
    className: str = ""
    """Empty: the cluster's default."""


class LearnerStorage(StorageValues):
    """Checkpoints and archive."""

    existingClaim: ClaimName = ""


class LearnerValues(RoleValues):
    """The learner: one process; a second one would be fenced."""

    replicas: Literal[1] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    nodes: int = Field(default=1, ge=1)
    """Above 1: a LeaderWorkerSet (the operator of that name) instead of a StatefulSet."""
    storage: LearnerStorage = LearnerStorage()


class RangeValues(ChartSection):
    """Bounds of an autoscaler."""

    min: int = Field(default=1, ge=1)
    max: int = Field(default=8, ge=1)


class AutoscalingValues(ChartSection):
    """Who decides how many pods there are."""

    mode: Literal["none", "external", "hpa", "keda"] = "none"
    rollout: RangeValues = RangeValues()
    env_agents: RangeValues = RangeValues()
    logit_oracle: RangeValues = RangeValues()
    scaleDownStabilizationSeconds: int = Field(default=300, ge=0, le=3600)
    prometheusAddress: str = ""
    """For keda: URL of the Prometheus that has the recording rules."""


class TokenSecret(ChartSection):
    """A key of a Secret."""

    name: ClaimName = ""
    key: str = "token"


class HubValues(ChartSection):
    """The Hugging Face hub, for hf:// sources."""

    tokenSecret: TokenSecret = TokenSecret()
    endpoint: str = ""
    """A mirror; empty: the public hub."""
    offline: bool = False
    """Only what the model cache already holds."""


class CacheValues(ChartSection):
    """Where fetched models lie."""

    claim: ClaimName = ""
    """A ReadWriteMany claim shared by all pods; empty: an emptyDir per pod."""
    sizeLimit: Quantity = "200Gi"
    """Of the emptyDir."""


class NatsImage(ChartSection):
    """The official image."""

    repository: str = Field(default="docker.io/library/nats", min_length=1)
    tag: Annotated[str, Field(min_length=1, json_schema_extra={"not": {"enum": ["latest"]}})] = "x"
    digest: Digest = ""
    pullPolicy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"


class NatsTls(ChartSection):
    """TLS between services and NATS."""

    secretName: ClaimName = ""
    """Secret with tls.crt, tls.key and ca.crt; empty: plain TCP inside the cluster."""


class NatsAuth(ChartSection):
    """Passwords of the accounts of our own server."""

    existingSecret: ClaimName = ""
    """Secret with one key per account (letters and digits, a letter first); empty: made once."""


class ExternalNats(ChartSection):
    """A NATS that somebody else runs."""

    url: Annotated[str, Field(pattern=r"^((nats|tls)://\S+)?$")] = ""
    auth: Literal["none", "password", "creds"] = "password"
    """password: keys named as the accounts; creds: keys `<account>.creds`."""
    secretName: ClaimName = ""
    userPrefix: str = ""
    """Put before the account's name to get the user's."""


class NatsValues(PodValues):
    """NATS with JetStream: one replica of our own, or somebody else's."""

    image: NatsImage = NatsImage()  # pyright: ignore[reportIncompatibleVariableOverride]
    enabled: bool = True
    external: ExternalNats = ExternalNats()
    auth: NatsAuth = NatsAuth()
    tls: NatsTls = NatsTls()
    storage: StorageValues = StorageValues()
    syncInterval: Annotated[str, Field(pattern=r"^(always|[0-9]+(ms|s|m))$")] = "1s"
    """How much a power loss may take; `always` costs 2-12x."""
    maxPayload: Annotated[str, Field(pattern=r"^[1-9][0-9]*(KB|MB)$")] = "8MB"
    podDisruptionBudget: BudgetValues = BudgetValues()


class MonitorValues(ChartSection):
    """An object for the Prometheus operator."""

    enabled: bool = False
    labels: dict[str, str] = {}
    """What your Prometheus selects by."""


class PodMonitorValues(MonitorValues):
    """Scraping."""

    interval: Annotated[str, Field(pattern=r"^[1-9][0-9]*s$")] = "10s"


class DashboardValues(MonitorValues):
    """ConfigMaps for Grafana's sidecar."""

    labels: dict[str, str] = {"grafana_dashboard": "1"}
    annotations: dict[str, str] = {}


class MonitoringValues(ChartSection):
    """Prometheus and Grafana."""

    podMonitor: PodMonitorValues = PodMonitorValues()
    prometheusRule: MonitorValues = MonitorValues()
    dashboards: DashboardValues = DashboardValues()


class EgressValues(ChartSection):
    """Further egress rules of NetworkPolicies, by role."""

    learner: Objects = []
    rollout: Objects = []
    env_agents: Objects = []
    logit_oracle: Objects = []
    operator: Objects = []


class NetworkPolicyValues(ChartSection):
    """Who may talk to whom: everything else is denied."""

    enabled: bool = True
    metricsFrom: Objects = [{"namespaceSelector": {}}]
    """Peers that may scrape; default: every namespace."""
    natsFrom: Objects = []
    """Further clients of our NATS."""
    extraEgress: EgressValues = EgressValues()


class DeletionCostValues(PodValues):
    """Annotates rollout pods with their work in flight, so that scale-in takes the idlest."""

    enabled: bool = False
    intervalSeconds: int = Field(default=5, ge=1)


class ChartValues(ChartSection):
    """A values file, `config:` apart."""

    nameOverride: str = ""
    fullnameOverride: str = ""
    commonLabels: dict[str, str] = {}
    image: ImageValues = ImageValues()
    learner: LearnerValues = LearnerValues()
    rollout: RoleValues = RoleValues()
    env_agents: RoleValues = RoleValues()
    logit_oracle: RoleValues = RoleValues()
    autoscaling: AutoscalingValues = AutoscalingValues()
    huggingface: HubValues = HubValues()
    modelCache: CacheValues = CacheValues()
    nats: NatsValues = NatsValues()
    monitoring: MonitoringValues = MonitoringValues()
    networkPolicy: NetworkPolicyValues = NetworkPolicyValues()
    deletionCost: DeletionCostValues = DeletionCostValues()
    runAsUser: Annotated[int, Field(ge=1)] | None = 10001
    """null: let the cluster choose (OpenShift)."""
