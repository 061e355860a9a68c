"""Combinations by the field's names, as entries of the `algo` section. No torch.

Every one is a published recipe's correction and objective; sources in `docs/algorithms.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # IcePop on D, PPO on S: the reference semantics with exact old logits (arXiv 2605.12070)
    "decoupled_icepop": {
        "corrections": [{"kind": "icepop"}, {"kind": "veto"}],
        "objective": {"kind": "ppo"},
    },
    # truncated importance sampling on D, PPO on S (verl rollout_is=token, slime --tis-clip)
    "decoupled_tis": {
        "corrections": [{"kind": "tis", "high": 2.0}],
        "objective": {"kind": "ppo"},
    },
    # geometric sequence mask and veto with token weights (NeMo-RL seq-mask-tis)
    "seq_mask_tis": {
        "corrections": [
            {"kind": "importance"},
            {"kind": "seq_geo_mask", "low": 0.999, "high": 1.002},
            {"kind": "veto"},
        ],
        "objective": {"kind": "ppo"},
    },
    # no old logits at all: PPO on the total ratio (verl bypass)
    "bypass": {"corrections": [], "objective": {"kind": "ppo"}},
    # sequence-level ratio and clip (arXiv 2507.18071)
    "gspo": {
        "corrections": [{"kind": "icepop"}, {"kind": "veto"}],
        "objective": {"kind": "gspo"},
        "aggregation": "seq_mean_token_mean",
    },
    # clipped weights, gradient everywhere (MiniMax-M1, arXiv 2506.13585)
    "cispo": {
        "corrections": [{"kind": "icepop"}, {"kind": "veto"}],
        "objective": {"kind": "cispo"},
    },
}
