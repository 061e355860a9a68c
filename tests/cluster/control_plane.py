"""A Kubernetes control plane on loopback: etcd, API server, controllers, scheduler."""

from __future__ import annotations

import base64
import secrets
import subprocess
import time
from pathlib import Path

import yaml

from shared.runtime.nats_server import free_port
from tests.charts.rendering import ROOT, tool

BINARIES = ROOT / ".tools" / "kubernetes"
"""As scripts/control_plane.sh builds them."""
START_S = 60


class ControlPlane:
    """Started whole; `close` ends all of it. Its state is in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.kubeconfig = folder / "kubeconfig"
        self._token = secrets.token_hex(16)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._port = free_port()
        try:
            self._start_etcd()
            self._start_api_server()
            self._start(
                "kube-controller-manager", "--leader-elect=false", "--port=0", "--secure-port=0",
                f"--kubeconfig={self.kubeconfig}", f"--root-ca-file={self._certificate}",
                f"--service-account-private-key-file={folder / 'accounts.key'}",
                # nobody renews the nodes' leases here
                "--node-monitor-grace-period=24h", "--horizontal-pod-autoscaler-sync-period=2s",
            )  # fmt: skip
            self._start(
                "kube-scheduler", "--leader-elect=false", "--port=0", "--secure-port=0",
                f"--kubeconfig={self.kubeconfig}",
            )  # fmt: skip
        except BaseException:
            self.close()
            raise

    def kubectl(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run kubectl as the cluster's administrator."""
        done = subprocess.run(
            [tool("kubectl"), "--kubeconfig", str(self.kubeconfig), *arguments],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0 or not check, done.stderr
        return done

    def close(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    # --- its parts
    def _start(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes.append(
                subprocess.Popen(
                    [BINARIES / name, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            )

    def _start_etcd(self) -> None:
        self._etcd = f"http://127.0.0.1:{free_port()}"
        peers = f"http://127.0.0.1:{free_port()}"
        self._start(
            "etcd", "--data-dir", str(self.folder / "etcd"), "--unsafe-no-fsync",
            "--listen-client-urls", self._etcd, "--advertise-client-urls", self._etcd,
            "--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers,
            "--initial-cluster", f"default={peers}",
        )  # fmt: skip

    def _start_api_server(self) -> None:
        accounts = self.folder / "accounts.key"
        subprocess.run(
            ["openssl", "genrsa", "-out", str(accounts), "2048"], check=True, capture_output=True
        )
        tokens = self.folder / "tokens.csv"
        tokens.write_text(f'{self._token},admin,admin,"system:masters"\n')
        self._start(
            "kube-apiserver", f"--etcd-servers={self._etcd}", "--bind-address=127.0.0.1",
            f"--secure-port={self._port}", f"--cert-dir={self.folder}", "--authorization-mode=RBAC",
            f"--token-auth-file={tokens}", "--endpoint-reconciler-type=none",
            "--service-cluster-ip-range=10.96.0.0/16", "--service-account-issuer=https://cluster",
            f"--service-account-key-file={accounts}",
            f"--service-account-signing-key-file={accounts}",
        )  # fmt: skip
        self._write_kubeconfig()
        deadline = time.monotonic() + START_S
        while self.kubectl("get", "--raw", "/readyz", check=False).stdout != "ok":
            process = self._processes[-1]
            assert process.poll() is None, self._tail("apiserver")
            assert time.monotonic() < deadline, self._tail("apiserver")
            time.sleep(0.3)

    @property
    def _certificate(self) -> Path:
        """The API server's own, signed by itself."""
        return self.folder / "apiserver.crt"

    def _write_kubeconfig(self) -> None:
        deadline = time.monotonic() + START_S
        while not self._certificate.exists():
            assert time.monotonic() < deadline, self._tail("apiserver")
            time.sleep(0.1)
        authority = base64.b64encode(self._certificate.read_bytes()).decode()
        cluster = {
            "server": f"https://127.0.0.1:{self._port}",
            "certificate-authority-data": authority,
        }
        written = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "local",
            "clusters": [{"name": "local", "cluster": cluster}],
            "users": [{"name": "admin", "user": {"token": self._token}}],
            "contexts": [{"name": "local", "context": {"cluster": "local", "user": "admin"}}],
        }
        self.kubeconfig.write_text(yaml.safe_dump(written))

    def _tail(self, name: str) -> str:
        return (self.folder / f"kube-{name}.log").read_text()[-2000:]
