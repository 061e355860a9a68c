import importlib
import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "algorithms.md"
MODULES = (
    "advantages", "composition", "corrections", "diagnostics", "divergence_objectives", "ewma",
    "ewma_control", "four_policy", "kl", "logprobs", "losses", "objective_terms", "policy_loss",
    "proximal", "ratios", "route_health", "segments", "sequence_objectives",
    "staleness_objectives", "turn_credit", "version_scoring",
)  # fmt: skip


def test_every_callable_the_document_names_exists():
    named = re.findall(rf"`({'|'.join(MODULES)})\.(\w+)`", DOCUMENT.read_text())
    assert len(named) > 30
    for module, name in named:
        assert callable(getattr(importlib.import_module(f"shared.algo.{module}"), name)), name
