"""Users, passwords and TLS: read from files, checked before a connection is tried."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from pydantic import ValidationError

from shared.runtime import nats_server as server_module
from shared.runtime.errors import BusUnavailable, ConfigError
from shared.runtime.logs import Log
from shared.runtime.nats_access import read_access
from shared.runtime.nats_bus import connect
from shared.runtime.sections import BusSection
from shared.wire.subjects import Subjects


def test_the_password_comes_from_its_file_and_nowhere_else(tmp_path: Path):
    path = tmp_path / "password"
    path.write_text("pSecret\n")
    section = BusSection(user="learner", password_file=str(path))
    assert read_access(section).options() == {"user": "learner", "password": "pSecret"}
    assert "pSecret" not in section.model_dump_json()


def test_nobody_is_the_default():
    assert read_access(BusSection()).options() == {}


@pytest.mark.parametrize(
    "given",
    [
        {"user": "learner"},
        {"password_file": "/p"},
        {"user": "a", "password_file": "/p", "credentials_file": "/c"},
        {"tls_cert_file": "/c"},
    ],
)
def test_half_an_identity_is_refused(given: dict[str, str]):
    with pytest.raises(ValidationError):
        BusSection(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("bus.password_file", {"user": "a", "password_file": "FILE"}),
        ("bus.credentials_file", {"credentials_file": "FILE"}),
        ("bus.tls_ca_file", {"tls_ca_file": "FILE"}),
        ("bus.tls_cert_file", {"tls_cert_file": "FILE", "tls_key_file": "FILE"}),
    ],
)
@pytest.mark.parametrize("content", [None, ""])
def test_a_missing_or_empty_file_is_named_with_its_key(
    key: str, given: dict[str, str], content: str | None, tmp_path: Path
):
    path = tmp_path / "file"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=key) as caught:
        read_access(BusSection(**{k: v.replace("FILE", str(path)) for k, v in given.items()}))  # type: ignore[arg-type]
    assert str(path) in str(caught.value)


def test_something_that_is_no_certificate_is_refused(tmp_path: Path):
    path = tmp_path / "ca.crt"
    path.write_text("not a certificate")
    with pytest.raises(ConfigError, match=r"bus\.tls_ca_file"):
        read_access(BusSection(tls_ca_file=str(path)))


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, which is its own CA."""
    openssl = shutil.which("openssl")
    assert openssl, "openssl is missing: apt-get install openssl"
    key, crt = folder / f"{name}.key", folder / f"{name}.crt"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=nats",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(crt)],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, crt


async def test_tls_is_verified_against_the_ca_that_was_given(tmp_path: Path, subjects: Subjects):
    key, crt = certificate(tmp_path, "server")
    _, stranger = certificate(tmp_path, "stranger")
    port = server_module.free_port()
    config = tmp_path / "nats.conf"
    tls = f'tls {{ cert_file: "{crt}", key_file: "{key}" }}'
    server_module.write_config(config, port=port, store_dir=tmp_path / "js", extra=tls)
    process = server_module.start(config, tmp_path / "log")
    try:
        server_module.wait_healthy(f"nats://127.0.0.1:{port}", 20, process)
        url = f"tls://127.0.0.1:{port}"
        trusting = BusSection(url=url, tls_ca_file=str(crt), connect_timeout_s=10)
        bus = await connect(trusting, subjects, "tls", Log("test"))
        await bus.create_streams()
        assert await bus.append(bus.subjects.journal, b"x") == 1
        await bus.close()
        wary = BusSection(url=url, tls_ca_file=str(stranger), connect_timeout_s=2)
        with pytest.raises(BusUnavailable):
            await connect(wary, subjects, "tls", Log("test"))
    finally:
        process.terminate()
        process.wait(timeout=10)
