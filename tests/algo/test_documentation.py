import importlib
import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "algorithms.md"
MODULES = (
    "advantages", "corrections", "diagnostics", "logprobs", "losses", "policy_loss", "ratios",
    "version_scoring",
)  # fmt: skip


def test_every_callable_the_document_names_exists():
    named = re.findall(rf"`({'|'.join(MODULES)})\.(\w+)`", DOCUMENT.read_text())
    assert len(named) > 30
    for module, name in named:
        assert callable(getattr(importlib.import_module(f"shared.algo.{module}"), name)), name
