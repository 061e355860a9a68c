"""The rendered configuration with TLS, in a real server: accounts over the release's CA only."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.runtime.errors import BusUnavailable, Denied
from shared.runtime.logs import Log
from shared.runtime.nats_bus import connect
from shared.wire.subjects import Subjects
from tests.charts.conftest import RUN, Guarded, serve
from tests.charts.rendering import of_kind, pod_spec, render

pytestmark = pytest.mark.chart

VALUES = {
    "config": {"run": {"name": RUN}},
    "nats": {"tls": {"secretName": "nats-tls"}, "auth": {"existingSecret": "mine"}},
}
ACCOUNTS = ("learner", "rollout", "env_agents", "logit_oracle", "recorder", "operator")


def secret(folder: Path) -> dict[str, Path]:
    """What cert-manager would put into the Secret; self-signed, for this machine's address."""
    openssl = shutil.which("openssl")
    assert openssl, "openssl is missing: apt-get install openssl"
    folder.mkdir()
    files = {name: folder / name for name in ("tls.crt", "tls.key", "ca.crt")}
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=nats", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(files["tls.key"]),
         "-out", str(files["tls.crt"])],
        check=True, capture_output=True,
    )  # fmt: skip
    shutil.copy(files["tls.crt"], files["ca.crt"])
    return files


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Guarded, Path]]:
    objects = render(VALUES)
    folder = tmp_path_factory.mktemp("tls")
    files = secret(folder / "secret")
    conf = of_kind(objects, "ConfigMap", "nats")[0]["data"]["nats.conf"]
    for path in re.findall(r'"(/etc/nats-tls/[^"]+)"', conf):
        conf = conf.replace(path, str(files[Path(path).name]))
    server, process = serve(conf, {user: f"p{user.replace('_', '')}" for user in ACCOUNTS}, folder)
    yield server, files["ca.crt"]
    process.terminate()
    process.wait(timeout=10)


async def test_services_connect_with_the_url_and_ca_they_are_given(tls_server: Any):
    server, ca = tls_server
    text = of_kind(render(VALUES), "ConfigMap", "config")[0]["data"]["values.yaml"]
    bus = json.loads(text)["config"]["bus"]
    assert bus["url"].startswith("tls://")
    assert bus["tls_ca_file"] == "/etc/lagwise-tls/ca.crt"
    access = server.access("rollout").model_copy(
        update={"url": server.url.replace("nats://", "tls://"), "tls_ca_file": str(ca)}
    )
    link = await connect(access, Subjects(RUN), "rollout", Log("test"))
    with pytest.raises((Denied, BusUnavailable)):
        await link.append(link.subjects.manifest, b"weights")
    assert link.counters["denied"], "refused by the account, not for want of a connection"
    await link.close()


async def test_a_client_that_does_not_trust_the_ca_is_not_connected(
    tls_server: Any, tmp_path: Path
):
    server, _ = tls_server
    stranger = secret(tmp_path / "stranger")["ca.crt"]
    access = server.access("rollout").model_copy(
        update={"url": server.url.replace("nats://", "tls://"), "tls_ca_file": str(stranger),
                "connect_timeout_s": 1.5}
    )  # fmt: skip
    with pytest.raises(BusUnavailable):
        await connect(access, Subjects(RUN), "rollout", Log("test"))


def test_every_file_that_the_configuration_names_is_mounted_and_only_in_its_place():
    objects = render(VALUES)
    pods = [*of_kind(objects, "Deployment"), *of_kind(objects, "StatefulSet")]
    for item in pods:
        spec = pod_spec(item)
        mounts = {m["mountPath"] for m in spec["containers"][0]["volumeMounts"]}
        nats = item["metadata"]["name"].endswith("-nats")
        assert ("/etc/nats-tls" in mounts) is nats
        assert ("/etc/lagwise-tls" in mounts) is not nats
        for volume in spec["volumes"]:
            if volume["name"] == "bus-ca":
                # the private key stays with the server
                assert [i["key"] for i in volume["secret"]["items"]] == ["ca.crt"]
