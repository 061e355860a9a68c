"""How many optimizer steps in a row may be skipped because their gradient is not finite. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shared.runtime.errors import Fatal


@dataclass
class SkipBound:
    """Counts over steps; a restarted learner goes on counting from its checkpoint."""

    limit: int
    """So many in a row are tolerated."""
    in_a_row: int = 0

    def observe(self, version: int, grad_norms: Sequence[float]) -> None:
        """Take in the gradient norms of the optimizer steps that leave `version`, in order.

        Raises:
            Fatal: more than `limit` in a row were skipped; nothing of this step is published.
        """
        for norm in grad_norms:
            self.in_a_row = 0 if math.isfinite(norm) else self.in_a_row + 1
            if self.in_a_row > self.limit:
                raise Fatal(
                    f"{self.in_a_row} optimizer steps in a row had a loss or gradient that is not "
                    f"finite, the last one in the step from version {version}: none was applied, "
                    "the published policy is intact; look at the batch and at learner.algo, or "
                    "raise learner.max_skipped_steps"
                )
