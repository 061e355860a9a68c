"""`interrupt`: the learner scores what its version sampled before it leaves that version (exact).

No oracle and no history of weights; the price is a pause of everybody at every step. The fence
that makes it exact is `services/learner/fence.py`; what it scored is stored like an oracle's.
"""

from __future__ import annotations

from services.learner.routes.oracle import OracleRoute


class Interrupt(OracleRoute):
    """Joins what the fence stored."""

    name = "interrupt"
    needs_fence = True
