"""A real coordinator's listeners, hospitals' lines and thieves, for the security table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization

from client.flower import FleetLink
from client.link import LinkWorld
from server.flower import FlowerCoordinator, Wire
from tests.flower_node import public_line, transport_key
from tests.server.test_flower import make_tls

TOKEN = "a-token-of-the-operator"
WIRE = Wire(hold_s=1.0, body_s=1.0, most_answer=4 << 20)


@dataclass
class Up:
    """A coordinator that serves, and the file of its authority."""

    flower: FlowerCoordinator
    ca: Path
    folder: Path


@contextmanager
def real_coordinator(folder: Path, wire: Wire = WIRE) -> Iterator[Up]:
    """Both listeners on loopback, over TLS and with a token."""
    tls, ca = make_tls(folder / "tls")
    made = FlowerCoordinator(
        folder / "flower",
        listen=("127.0.0.1", 0),
        admin=("127.0.0.1", 0),
        tls=tls,
        admin_token=TOKEN,
        wire=wire,
    )
    made.start()
    try:
        yield Up(made, ca, folder / "flower")
    finally:
        made.stop()


def key_path(folder: Path, name: str, key: Any) -> Path:
    """A transport key as a hospital keeps it."""
    path = folder / f"{name}.key"
    path.touch(mode=0o600)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    return path


def hospital_link(
    up: Up, folder: Path, site: str, app: Any, world: LinkWorld | None = None
) -> FleetLink:
    """A registered hospital's line."""
    key = transport_key()
    up.flower.register(site, public_line(key))
    return FleetLink(
        f"127.0.0.1:{up.flower.public_port}",
        up.ca,
        key_path(folder, site, key),
        app,
        {},
        state=folder / site,
        world=world,
    )
