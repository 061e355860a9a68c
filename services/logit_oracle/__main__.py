"""`python -m services.logit_oracle --config FILE [--set a.b=c]`."""

from __future__ import annotations

from services.logit_oracle.config import LogitOracleConfig
from shared.runtime.context import Context
from shared.runtime.service import launch


async def _serve(context: Context, config: LogitOracleConfig) -> None:
    from services.logit_oracle.service import serve  # seconds of torch: after the config is read

    await serve(context, config)


def _follow(config: LogitOracleConfig) -> None:
    from services.logit_oracle.service import follow

    follow(config)


if __name__ == "__main__":
    launch("logit_oracle", LogitOracleConfig, _serve, follow=_follow)
