"""The `lagwise` command."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Protocol

from shared.runtime.errors import BusUnavailable, ConfigError, Fatal


class _Commands(Protocol):
    """What `add_subparsers` returns; argparse keeps its type private."""

    def add_parser(self, name: str, *, help: str) -> argparse.ArgumentParser: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0, 1 (a verdict), 2 (no answer), 130 (Ctrl-C)."""
    arguments = _parser().parse_args(argv)
    if arguments.run is None:
        _parser().print_help()
        return 2
    logging.getLogger().addHandler(logging.NullHandler())  # errors are said once, below
    try:
        return int(arguments.run(arguments))
    except (ConfigError, BusUnavailable, Fatal) as error:
        sys.stderr.write(f"lagwise: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1


# --- commands; imports inside keep `lagwise --help` instant
def _up(arguments: argparse.Namespace) -> int:
    from shared.cli.config_cmd import read
    from shared.cli.demo import conclude, resume_hint
    from shared.cli.session import Request, run_session

    values = read(arguments.config, _overrides(arguments))
    if arguments.rollouts is not None:
        values = values.with_replicas("rollout", arguments.rollouts)
    run_dir = arguments.run_dir or Path("runs") / values.common().run.name
    exists = (run_dir / "run.json").exists()
    if arguments.resume == "must" and not exists:
        raise ConfigError(f"--resume: {run_dir} is no run folder; leave the flag out to start one")
    if arguments.resume == "never" and exists:
        raise ConfigError(
            f"--resume never: {run_dir} has a run; go on with --resume auto, keep it aside with "
            "--fresh, or choose another --run-dir"
        )
    request = Request(
        values=values,
        run_dir=run_dir,
        title=f"lagwise up {arguments.config}",
        command=["lagwise", *sys.argv[1:]],
        fresh=arguments.fresh or not exists,
        nats_url=arguments.nats,
        nats_port=arguments.nats_port,
    )
    finished, facts = asyncio.run(run_session(request, sys.stdout))
    if finished.code == 130:
        sys.stderr.write(resume_hint(finished, run_dir, arguments.config) + "\n")
    elif finished.code:
        sys.stderr.write(f"lagwise: the run stopped: {finished.reason}\n")
    else:
        summary = conclude(run_dir, facts, audited_tokens=arguments.audit, out=sys.stdout)
        return 0 if summary["sound"] else 1
    return finished.code


def _demo(arguments: argparse.Namespace) -> int:
    from shared.cli.demo import run_demo

    return run_demo(
        config=arguments.config,
        overrides=["run.name=demo", *_overrides(arguments)],
        run_dir=arguments.run_dir,
        kill=not arguments.no_kill,
        as_json=arguments.json,
        command=["lagwise", *sys.argv[1:]],
    )


def _status(arguments: argparse.Namespace) -> int:
    from shared.cli import status

    if arguments.release:
        from shared.cli import cluster
        from shared.runtime.kube import Kube

        found_pods = cluster.pods(Kube(arguments.namespace), arguments.release)
        if arguments.json:
            print(json.dumps(cluster.as_dicts(found_pods), indent=2))
        else:
            print(cluster.table(found_pods))
        return 0
    url, run = status.address(arguments.run_dir, arguments.nats, arguments.run_name)
    access = status.access(url, arguments.bus_user, arguments.bus_password_file)
    found = asyncio.run(status.ask(access, run, listen_s=arguments.listen, timeout_s=5.0))
    print(json.dumps(status.as_dict(found), indent=2) if arguments.json else status.table(found))
    return 0


def _scale(arguments: argparse.Namespace) -> int:
    from shared.cli import cluster
    from shared.runtime.kube import Kube

    kube = Kube(arguments.namespace)
    print(cluster.scale(kube, arguments.release, arguments.role, arguments.replicas))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from shared.cli import report, summary

    _require_run(arguments.run_dir)
    summary.write(arguments.run_dir)
    print(report.write(arguments.run_dir))
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    from shared.cli import audit

    _require_run(arguments.run_dir)
    result = audit.run(arguments.run_dir, tokens=arguments.tokens, seed=arguments.seed)
    audit.save(result, arguments.run_dir)
    print(json.dumps(result.as_dict(), indent=2) if arguments.json else audit.table(result))
    return 0 if result.ok else 1


def _replay(arguments: argparse.Namespace) -> int:
    from shared.cli.processes import QUIET_ENVIRONMENT

    for name, value in QUIET_ENVIRONMENT.items():  # before torch: the threads of the run's learner
        os.environ.setdefault(name, value)
    from shared.cli import replay

    _require_run(arguments.run_dir)
    result = replay.run(
        arguments.run_dir,
        versions=arguments.versions,
        start=arguments.start,
        overrides=arguments.set,
        progress=_tell_version if sys.stderr.isatty() else lambda version: None,
    )
    print(replay.line(result))
    return 1 if result.problem else 0


def _tell_version(version: int) -> None:
    sys.stderr.write(f"\rversion {version}\r")


def _explain(arguments: argparse.Namespace) -> int:
    from shared.cli import explain

    _require_run(arguments.run_dir)
    explained = explain.run(arguments.run_dir, arguments.trajectory)
    if arguments.json:
        print(json.dumps(explained.as_dict(), indent=2, allow_nan=False))
    else:
        columns = shutil.get_terminal_size(fallback=(200, 24)).columns
        print(explain.table(explained, columns))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from shared.cli import export

    _require_run(arguments.run_dir)
    version, source = arguments.version_number, arguments.source
    print(export.run(arguments.run_dir, arguments.out, version=version, source=source))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from shared.cli.config_cmd import read, validate

    validate(read(arguments.file, arguments.set).with_ranks_of_gpus())
    print(f"{arguments.file}: ok")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    import yaml

    from shared.cli.config_cmd import effective, read

    values = read(arguments.file, arguments.set).with_ranks_of_gpus()
    counts = values.replicas
    shown = {**{role: {"replicas": n} for role, n in counts.items()}, "config": effective(values)}
    if arguments.json:
        print(json.dumps(shown, indent=2))
    else:
        print(yaml.safe_dump(shown, sort_keys=False), end="")
    return 0


# --- arguments
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lagwise", description="Asynchronous RL for LLM agents, with exact old log-probs."
    )
    parser.add_argument("--version", action="version", version=f"lagwise {_version()}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(metavar="COMMAND")
    _add_runs(commands)
    _add_looks(commands)
    return parser


def _add_runs(commands: _Commands) -> None:
    up = commands.add_parser("up", help="run a configuration on this machine")
    up.set_defaults(run=_up)
    up.add_argument("--config", type=Path, required=True, help="values file")
    up.add_argument("--rollouts", type=_count, help="number of rollout processes")
    up.add_argument("--nats", metavar="URL", help="use this NATS instead of starting one")
    up.add_argument("--nats-port", type=int, metavar="PORT", help="port of the one we start")
    up.add_argument("--run-dir", type=Path, help="default: runs/<run.name>")
    up.add_argument("--audit", type=_count, default=0, metavar="TOKENS", help="audit at the end")
    which = up.add_mutually_exclusive_group()
    which.add_argument("--resume", nargs="?", const="must", default="auto",
                       choices=("auto", "never", "must"),
                       help="auto: go on with the folder's run, or start one; never: refuse a "
                       "folder with a run; must (or no word): refuse one without")  # fmt: skip
    which.add_argument("--fresh", action="store_true", help="keep an existing run aside")
    _add_settings(up)

    demo = commands.add_parser("demo", help="a policy learns, a rollout dies, an audit counts")
    demo.set_defaults(run=_demo)
    demo.add_argument("--config", type=Path, default=Path("examples/frozen_lake/values.yaml"))
    demo.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    demo.add_argument("--no-kill", action="store_true", help="kill nothing")
    demo.add_argument("--json", action="store_true", help="summary as JSON, progress to stderr")
    _add_settings(demo)


def _add_looks(commands: _Commands) -> None:
    status = commands.add_parser("status", help="what a live run says about itself")
    status.set_defaults(run=_status)
    status.add_argument("--run-dir", type=Path, help="default: the newest under runs/")
    status.add_argument("--nats", metavar="URL")
    status.add_argument("--run", dest="run_name", metavar="NAME")
    status.add_argument("--bus-user", default="", metavar="NAME", help="with a password file")
    status.add_argument("--bus-password-file", default="", metavar="FILE")
    status.add_argument("--listen", type=float, default=2.5, metavar="S", help="to leases")
    status.add_argument("--json", action="store_true")
    _add_cluster(status, required=False)

    scale = commands.add_parser("scale", help="set the number of pods of a role on a cluster")
    scale.set_defaults(run=_scale)
    scale.add_argument("role", help="rollout, env_agents or logit_oracle")
    scale.add_argument("replicas", type=_count)
    _add_cluster(scale, required=True)

    report = commands.add_parser("report", help="write summary.json and report.html of a run")
    report.set_defaults(run=_report)
    report.add_argument("run_dir", type=Path)

    audit = commands.add_parser("audit", help="count every ticket, rescore random trained tokens")
    audit.set_defaults(run=_audit)
    audit.add_argument("run_dir", type=Path)
    audit.add_argument("--tokens", type=_count, default=2400)
    audit.add_argument("--seed", type=int, default=0, help="of the choice of tokens")
    audit.add_argument("--json", action="store_true")

    replay = commands.add_parser("replay", help="train again from the archive, compare digests")
    replay.set_defaults(run=_replay)
    replay.add_argument("run_dir", type=Path)
    replay.add_argument("--versions", type=_count, metavar="N", help="up to this one")
    replay.add_argument("--from", dest="start", type=_count, default=0, metavar="N",
                        help="begin with the run's checkpoint of this version")  # fmt: skip
    replay.add_argument("--set", action="append", default=[], metavar="A.B=C",
                        help="override a setting, such as where model.source is now")  # fmt: skip

    explain = commands.add_parser("explain", help="one trajectory, token by token")
    explain.set_defaults(run=_explain)
    explain.add_argument("trajectory", metavar="ID", help="ticket id, or attempt id")
    explain.add_argument("run_dir", type=Path, nargs="?", default=Path("runs/demo"),
                         help="default: runs/demo")  # fmt: skip
    explain.add_argument("--json", action="store_true", help="every token, see docs/explain.md")

    export = commands.add_parser("export", help="a published version as a Hugging Face directory")
    export.set_defaults(run=_export)
    export.add_argument("run_dir", type=Path)
    export.add_argument("out", type=Path, help="a new directory")
    export.add_argument("--version", dest="version_number", type=_count, metavar="N",
                        help="default: the newest")  # fmt: skip
    export.add_argument("--source", type=Path, help="default: the run's model.source")

    config = commands.add_parser("config", help="check or show a values file")
    parts = config.add_subparsers(metavar="check|show", required=True)
    for name, run, text in (
        ("check", _check, "validate every service's section"),
        ("show", _show, "print it with overrides and defaults filled in"),
    ):
        part = parts.add_parser(name, help=text)
        part.set_defaults(run=run)
        part.add_argument("file", type=Path)
        part.add_argument("--set", action="append", default=[], metavar="A.B=C")
        if name == "show":
            part.add_argument("--json", action="store_true")


def _add_cluster(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument("--release", required=required, default="", help="Helm release")
    parser.add_argument("--namespace", default="default", help="of the release")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, help="same as --set run.seed=N")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="override a setting"
    )


def _overrides(arguments: argparse.Namespace) -> list[str]:
    seed = [] if arguments.seed is None else [f"run.seed={arguments.seed}"]
    return [*seed, *arguments.set]


def _require_run(run_dir: Path) -> None:
    if not (run_dir / "archive").is_dir():
        raise ConfigError(f"{run_dir} is no run folder: it has no archive/")


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must be >= 0")
    return number


def _version() -> str:
    try:
        return metadata.version("lagwise")
    except metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
