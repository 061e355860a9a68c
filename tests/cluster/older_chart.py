"""The chart for an API server older than it supports: other versions of two kinds, nothing else.

Debian's Kubernetes is 1.20. It knows PodDisruptionBudget and HorizontalPodAutoscaler under their
earlier names, with the same fields, and no native sidecars (see `kubelet.Kubelet`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.charts.rendering import CHART

RENAMED = {
    "apiVersion: policy/v1\n": "apiVersion: policy/v1beta1\n",
    "apiVersion: autoscaling/v2\n": "apiVersion: autoscaling/v2beta2\n",
    'kubeVersion: ">=1.29.0-0"\n': 'kubeVersion: ">=1.20.0-0"\n',
}


def older_chart(folder: Path) -> Path:
    """Write the copy and return where it is."""
    copy = folder / CHART.name
    shutil.copytree(CHART, copy)
    used: set[str] = set()
    for path in [copy / "Chart.yaml", *copy.glob("templates/**/*.*")]:
        text = path.read_text()
        for new, old in RENAMED.items():
            if new in text:
                used.add(new)
                text = text.replace(new, old)
        path.write_text(text)
    assert used == set(RENAMED), f"no longer in the chart: {set(RENAMED) - used}"
    return copy
