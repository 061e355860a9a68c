"""The report's table of evaluations: avg@k and pass@k by version, with intervals."""

from __future__ import annotations

from markupsafe import Markup

from shared.algo.pass_at_k import AtK, Figure, at_k
from shared.cli.records import RunRecords
from shared.cli.summary import Lift, paired_lift, passes_lift
from shared.wire.journal import Evaluated


def rows(records: RunRecords) -> list[tuple[Evaluated, AtK]]:
    """Return every evaluation with its figures, in journal order.

    k is the run's `learner.eval.samples`, a success its `learner.eval.success_reward`.
    """
    samples = int(records.setting("learner.eval.samples", 1))
    success = float(records.setting("learner.eval.success_reward", 1.0))
    found: list[tuple[Evaluated, AtK]] = []
    for _, body in records.journal:
        if isinstance(body, Evaluated):
            figures = at_k(body.task_indices, body.rewards, samples, success)
            if figures is not None:
                found.append((body, figures))
    return found


def table(records: RunRecords) -> Markup | None:
    """Return the table as HTML, None where nothing was evaluated."""
    shown = rows(records)
    if not shown:
        return None
    k = shown[0][1].samples
    heads = ("evaluation", "version", "tasks", f"avg@{k}", f"pass@{k}", f"pass^{k}", "failed")
    head = Markup("").join(Markup("<th>{}</th>").format(name) for name in heads)
    lines = [
        (
            body.name,
            f"v{body.version}",
            f"{figures.num_tasks:,}",
            _written(figures.avg),
            _written(figures.passes),
            _written(figures.all_pass),
            f"{body.num_failed:,}",
        )
        for body, figures in shown
    ]
    bodies = [body for _, body in records.journal]
    lift = paired_lift(bodies)
    if lift is not None:
        success = float(records.setting("learner.eval.success_reward", 1.0))
        passes = lift if k == 1 else passes_lift(bodies, k, success)
        tasks = f"{lift.episodes:,}"
        lines.append(("lift, paired", "", tasks, _lift(lift), _lift(passes), "", ""))
    body = Markup("").join(
        Markup("<tr>{}</tr>").format(
            Markup("").join(Markup("<td>{}</td>").format(cell) for cell in line)
        )
        for line in lines
    )
    return Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(head, body)


def _written(figure: Figure) -> str:
    return f"{figure.mean:.3f} [{figure.low:.3f}, {figure.high:.3f}]"


def _lift(lift: Lift | None) -> str:
    return "-" if lift is None else f"{lift.lift:+.3f} [{lift.low:+.3f}, {lift.high:+.3f}]"
