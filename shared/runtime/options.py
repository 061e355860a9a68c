"""The command line every service takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

from shared.runtime import config as configuration
from shared.runtime.metrics import lagwise_version
from shared.runtime.sections import CommonConfig

C = TypeVar("C", bound=CommonConfig)


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for."""

    config: Path | None
    overrides: tuple[str, ...]
    pod: str
    """Empty: choose one."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def parse_options(role: str, argv: Sequence[str]) -> Options:
    """Parse; exits with code 2 and one line on a mistake."""
    parser = _Parser(
        prog=f"lagwise {role}",
        description=f"The {role} service of Lagwise.",
        epilog="Any key can also be set by environment: LAGWISE_BUS__URL=nats://...",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="values file with `config:`")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override one key of the configuration, e.g. bus.url=nats://host:4222; repeatable",
    )
    parser.add_argument("--pod", default="", metavar="NAME", help="unique among live processes")
    parser.add_argument("--version", action="version", version=f"lagwise {lagwise_version()}")
    given = parser.parse_args(argv)
    return Options(given.config, tuple(given.overrides), given.pod)


def read_config(options: Options, model: type[C]) -> C:
    """Resolve file, environment and overrides into a service's configuration.

    Raises:
        ConfigError: one line that names the offender.
    """
    tree = {} if options.config is None else configuration.read_values(options.config)["config"]
    resolved = configuration.resolve(tree, options.overrides)
    origin = "config" if options.config is None else f"config file {options.config}"
    return configuration.load(model, resolved, origin=origin)
