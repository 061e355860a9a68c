"""One control plane, with nodes, for the session."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.charts.rendering import ROOT, tool
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubelet import Kubelet
from tests.cluster.older_chart import older_chart

NODES = {"node-a": 0, "node-b": 4}
"""GPUs by node."""
VOLUMES = 12
FLAGS = ("--server-side=false", "--disable-openapi-validation")
"""What Helm 4 needs on an API server as old as this: no server-side apply, no schema of its own."""


@dataclass
class Cluster:
    """A control plane, its nodes, and the chart that fits it."""

    plane: ControlPlane
    kubelet: Kubelet
    chart: Path

    def helm(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [tool("helm"), "--kubeconfig", str(self.plane.kubeconfig), *arguments],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done

    def run(self, *command: str, bound_s: float, **environment: str) -> str:
        """Run a command as somebody who has this cluster's kubeconfig; return what it printed."""
        log = self.plane.folder / "command.log"
        with log.open("w") as out:
            code = subprocess.call(
                command, cwd=ROOT, stdout=out, stderr=out, timeout=bound_s,
                env={**os.environ, "KUBECONFIG": str(self.plane.kubeconfig), **environment},
            )  # fmt: skip
        assert code == 0, f"{log.read_text()}\n{self.kubelet.problem}"
        return log.read_text()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    plane = ControlPlane(folder / "plane")
    try:
        kubelet = Kubelet(plane.kubeconfig, folder / "pods", nodes=NODES, sidecars=["recorder"])
        try:
            _offer_volumes(plane, folder)
            yield Cluster(plane, kubelet, older_chart(folder))
        finally:
            kubelet.close()
    finally:
        plane.close()


def _offer_volumes(plane: ControlPlane, folder: Path) -> None:
    """What a storage class would make on demand."""
    volumes = folder / "volumes.yaml"
    volumes.write_text(
        "---\n".join(
            f"""apiVersion: v1
kind: PersistentVolume
metadata:
  name: volume-{number}
spec:
  capacity: {{storage: 1Ti}}
  accessModes: [ReadWriteOnce, ReadWriteMany]
  persistentVolumeReclaimPolicy: Retain
  hostPath: {{path: {folder / "claims"}}}
"""
            for number in range(VOLUMES)
        )
    )
    plane.kubectl("apply", "-f", str(volumes))
