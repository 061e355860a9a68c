"""`python -m services.learner --config FILE`."""

from __future__ import annotations

from shared.runtime.service import launch


def main() -> None:
    """Start the process; heavy imports come after the arguments are read."""
    from services.learner.config import LearnerConfig
    from services.learner.following import follow
    from services.learner.service import serve

    launch("learner", LearnerConfig, serve, follow=follow)


if __name__ == "__main__":
    main()
