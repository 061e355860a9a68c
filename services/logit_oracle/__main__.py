"""`python -m services.logit_oracle --config FILE [--set a.b=c]`."""

from __future__ import annotations

import sys

from shared.runtime.service import launch

from services.logit_oracle.config import LogitOracleConfig

if __name__ == "__main__":
    from services.logit_oracle.service import serve  # torch and transformers: only to run

    sys.exit(launch("logit_oracle", LogitOracleConfig, serve))
