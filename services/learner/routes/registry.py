"""Routes by the name in `old_logprobs.route`. A further one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from services.learner.routes.anchored import EwmaProx, PpoEwmaAsync
from services.learner.routes.base import OldLogprobRoute, RouteContext
from services.learner.routes.current import CurrentRecompute
from services.learner.routes.interpolated import InterpLinear, InterpLoglinear
from services.learner.routes.interrupt import Interrupt
from services.learner.routes.oracle import OracleRoute
from services.learner.routes.sampler import Rollout
from services.learner.routes.snapshots import SnapshotOld

ROUTES: Mapping[str, Callable[[RouteContext], OldLogprobRoute]] = {
    "oracle": OracleRoute,
    "snapshot_old": SnapshotOld,
    "interrupt": Interrupt,
    "ewma_prox": EwmaProx,
    "ppo_ewma_async": PpoEwmaAsync,
    "interp_prox_loglinear": InterpLoglinear,
    "interp_prox_linear": InterpLinear,
    "current_recompute": CurrentRecompute,
    "rollout": Rollout,
}
