import importlib
import re
from pathlib import Path
from typing import Any

import torch

from shared.algo.advantages import GroupMember
from shared.algo.layout import Layout
from shared.algo.presets import PRESETS

DOCUMENT = Path(__file__).parents[2] / "docs" / "algorithms.md"
MODULES = (
    "advantages", "composition", "corrections", "diagnostics", "divergence_objectives", "ewma",
    "ewma_control", "four_policy", "kl", "logprobs", "losses", "objective_terms", "old_logprobs",
    "policy_loss",
    "proximal", "ratios", "route_health", "segments", "sequence_objectives",
    "staleness_objectives", "turn_credit", "version_scoring",
)  # fmt: skip


def test_every_callable_the_document_names_exists():
    named = re.findall(rf"`({'|'.join(MODULES)})\.(\w+)`", DOCUMENT.read_text())
    assert len(named) > 30
    for module, name in named:
        assert callable(getattr(importlib.import_module(f"shared.algo.{module}"), name)), name


VECTORS = (
    "ratios", "split_invariance", "four_policy", "tis_token", "seq_tis", "icepop",
    "token_mask_0.5_2", "seq_mask", "veto", "tis_batch_norm", "decoupled_ppo_*", "gspo", "cispo",
    "topr", "sapo", "dppo_tv", "dppo_kl", "prime_rl_default", "vespo", "opsm", "m2po",
    "rollout_anchored_double_sided", "prox_interp", "interp_reparameterised_bounds",
    "ewma_beta_*", "ewma_reset", "ewma_age_tracking", "ewma_fixed_beta_as_lambda",
    "diag_discrepancy", "diag_staleness", "diag_total", "staleness_histogram", "per_age_k3",
    "fractions_by_cause", "adv_*", "adv_partial_group", "oracle_segmentwise",
)  # fmt: skip


def _given() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float) -> torch.Tensor:
        return scale * torch.randn(12, generator=generator, dtype=torch.float64)

    inf = -0.1 - draw(1.0).abs()
    old = inf + draw(0.05)
    mask = torch.tensor([0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1]).bool()
    return {
        "torch": torch, "Layout": Layout, "GroupMember": GroupMember,
        "l_T": (old + draw(0.1)).requires_grad_(), "l_old_T": old, "l_inf_T": inf,
        "l_prox_T": old + draw(0.02), "adv_T": draw(1.0), "score_T": draw(1.0).round(),
        "m_T": mask, "versions_T": torch.where(mask, 3 + torch.arange(12) // 4, -1),
        "seq_T": torch.arange(12) // 7, "num_sequences": 2, "version_now": 6,
        "token_ids_T": torch.arange(12) % 5,
        "forward": lambda version, ids: torch.eye(5, dtype=torch.float64)[ids] * version,
        **{name: importlib.import_module(f"shared.algo.{name}") for name in MODULES},
    }  # fmt: skip


def test_the_calls_of_the_document_run_and_name_every_vector():
    text = DOCUMENT.read_text()
    [block] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    given = _given()
    exec(compile(block, str(DOCUMENT), "exec"), given)
    comments = " ".join(re.findall(r"# (.*)", block))
    assert [name for name in VECTORS if name not in comments] == []
    assert [name for name in VECTORS if f"`{name}`" not in text] == []
    # what the block calls split_invariance: -ρA on loss tokens, whatever ℓ^old
    rho_T = (given["l_T"] - given["l_inf_T"]).detach().exp()
    want_T = torch.where(given["m_T"], -rho_T * given["adv_T"], 0.0)
    torch.testing.assert_close(given["l_T"].grad, want_T, rtol=1e-12, atol=1e-15)


def test_the_document_says_of_every_preset_what_it_is():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", DOCUMENT.read_text(), re.MULTILINE))
    for name, preset in PRESETS.items():
        corrections, objective, source = rows[name].split(" | ")
        for entry in preset["corrections"]:
            assert f"`{entry['kind']}`" in corrections
        assert f"`{preset['objective']['kind']}`" in objective
        assert len(source) > 20
    assert len(PRESETS) == 6
