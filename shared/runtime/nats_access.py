"""Who we are to a NATS server, and how we know that it is the right one."""

from __future__ import annotations

import importlib.util
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.runtime.errors import ConfigError
from shared.runtime.sections import BusSection


@dataclass(frozen=True, slots=True)
class Access:
    """What a connection presents; the default is nobody over plain TCP."""

    user: str = ""
    password: str = ""
    credentials_file: str = ""
    tls: ssl.SSLContext | None = None

    def options(self) -> dict[str, Any]:
        """Return the client library's arguments."""
        options: dict[str, Any] = {}
        if self.user:
            options |= {"user": self.user, "password": self.password}
        if self.credentials_file:
            options["user_credentials"] = self.credentials_file
        if self.tls is not None:
            options["tls"] = self.tls
        return options


def read_access(bus: BusSection) -> Access:
    """Read the files that the configuration names.

    Raises:
        ConfigError: a file is missing, unreadable, empty or no certificate, with its key named.
    """
    password = _read("bus.password_file", bus.password_file) if bus.password_file else ""
    if bus.credentials_file:
        _read("bus.credentials_file", bus.credentials_file)
        if importlib.util.find_spec("nkeys") is None:
            raise ConfigError(
                "bus.credentials_file needs the package nkeys: pip install 'lagwise[nkeys]'"
            )
    return Access(bus.user, password, bus.credentials_file, _context(bus))


def _context(bus: BusSection) -> ssl.SSLContext | None:
    """Return what TLS checks; None for plain TCP, or for TLS by the URL alone (system's CAs)."""
    if not (bus.tls_ca_file or bus.tls_cert_file):
        return None
    if bus.tls_ca_file:
        _read("bus.tls_ca_file", bus.tls_ca_file)
    try:
        context = ssl.create_default_context(cafile=bus.tls_ca_file or None)
    except ssl.SSLError as error:
        raise ConfigError(f"bus.tls_ca_file {bus.tls_ca_file}: no certificate: {error}") from error
    if bus.tls_cert_file:
        try:
            context.load_cert_chain(bus.tls_cert_file, bus.tls_key_file)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(
                f"bus.tls_cert_file {bus.tls_cert_file} with bus.tls_key_file: {error}"
            ) from error
    return context


def _read(key: str, path: str) -> str:
    try:
        text = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key} {path}: {error}") from error
    if not text:
        raise ConfigError(f"{key} {path}: is empty")
    return text
