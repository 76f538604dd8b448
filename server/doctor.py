"""The coordinator's part of `wardround doctor`: keys, certificate, ports, names, hospitals."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from common.address import is_ip, joined_address
from common.config import load
from common.doctor import Finding, clock, disk, keys
from common.errors import WardroundError
from common.world import unix_seconds
from server.config import CoordinatorConfig
from server.enrol import admin_token, admitted, coordinator_key
from server.pki import present_certificate, tls_folder

__all__ = ["findings"]

CONNECT_S: Final = 5.0
LEAST_SITES: Final = 3
_DAY: Final = 24 * 3600


def findings(path: Path, *, online: bool) -> Iterator[Finding]:
    """Everything that is looked at at a coordinator. Raises ConfigError: coordinator.yaml."""
    config = load(path, CoordinatorConfig)
    state = config.state_folder(path)
    yield Finding("settings", "ok", f"{config.consortium}, hospitals dial {config.url}")
    yield from disk(state)
    yield from clock()
    named = [state / "identity.key", state / "admin.token"]
    named += [tls_folder(state) / "ca.key", tls_folder(state) / "server.key"]
    present = [file for file in named if file.exists()]
    looked = list(keys(present))
    yield from looked
    if any(item.status == "fail" for item in looked):
        return
    try:
        coordinator_key(state)
        admin_token(state)
        yield from _certificate(state, config)
        yield from _hospitals(state)
    except WardroundError as error:
        yield Finding("initialised", "fail", str(error), error.remedy)
        return
    running = _running(state / "flower" / "lock")
    if running:
        yield Finding("ports", "ok", "the coordinator is running")
    else:
        yield from _ports(config)
    if online:
        yield from _names(config, state, running=running)


def _certificate(state: Path, config: CoordinatorConfig) -> Iterator[Finding]:
    found = present_certificate(state, config, unix_seconds())
    if found is None:
        detail = "none for these names that is good for 30 days more"
        fix = "Type: wardround server renew; a start makes it as well."
        yield Finding("certificate", "warn", detail, fix)
    else:
        days = (found.expires - unix_seconds()) // _DAY
        yield Finding("certificate", "ok", f"{days} days left, for {', '.join(found.names)}")


def _hospitals(state: Path) -> Iterator[Finding]:
    here = [site for site in admitted(state) if not site.revoked]
    if len(here) >= LEAST_SITES:
        yield Finding("hospitals", "ok", f"{len(here)} admitted")
    else:
        fix = 'Invite them: wardround server invite "NAME"'
        yield Finding("hospitals", "warn", f"{len(here)} of at least {LEAST_SITES} admitted", fix)


def _running(lock: Path) -> bool:
    try:
        handle = os.open(lock, os.O_WRONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _ports(config: CoordinatorConfig) -> Iterator[Finding]:
    wanted = (
        ("listen.port", config.listen.host, config.listen.port),
        ("admin.port", config.admin.host, config.admin.port),
        ("admin.health", "127.0.0.1", config.admin.health),
    )
    good = True
    for key, host, port in wanted:
        why, fix = _not_free(host, port)
        if why:
            good = False
            detail = f"{key}: {joined_address(host, port)}: {why}"
            yield Finding("ports", "fail", detail, fix.format(key=key, port=port))
    if good:
        yield Finding("ports", "ok", ", ".join(str(port) for _, _, port in wanted) + " are free")


def _not_free(host: str, port: int) -> tuple[str, str]:
    """Why nothing can listen there, and what to do; empty where it can."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            fix = "See who listens there (ss -ltnp 'sport = :{port}') and stop it, or change {key}."
            return "another process has it", fix
        if error.errno in {errno.EACCES, errno.EPERM}:
            return "this user may not", "Take a port above 1023 for {key}, or let the service."
        return f"cannot be had ({error.strerror})", "Correct {key} or the host beside it."
    return "", ""


def _names(config: CoordinatorConfig, state: Path, *, running: bool) -> Iterator[Finding]:
    """Whether the names that hospitals dial lead here."""
    for name in config.names:
        shown = joined_address(name, config.listen.port)
        if not is_ip(name):
            try:
                socket.getaddrinfo(name, config.listen.port, type=socket.SOCK_STREAM)
            except socket.gaierror:
                fix = "Have it put into the DNS, or take it out of `names` in coordinator.yaml."
                yield Finding("names", "fail", f"{name}: the name is not known here", fix)
                continue
        why = _no_answer(name, config.listen.port, tls_folder(state) / "ca.crt") if running else ""
        if not running:
            yield Finding("names", "ok", f"{name} resolves; not tried: nothing runs")
        elif why:
            fix = (
                "Let the firewall pass incoming TCP to this port, and forward it to this machine; "
                "then try `wardround doctor --config site.yaml` at a hospital."
            )
            yield Finding("names", "fail", f"{shown}: {why}", fix)
        else:
            yield Finding("names", "ok", f"{shown} answers with our certificate")


def _no_answer(name: str, port: int, ca: Path) -> str:
    """Why a hospital that dials this would not get through; empty where it would."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cafile=str(ca))
    try:
        with (
            socket.create_connection((name, port), timeout=CONNECT_S) as plain,
            context.wrap_socket(plain, server_hostname=name),
        ):
            return ""
    except ssl.SSLCertVerificationError as error:
        return f"something answers with another certificate ({error.verify_message})"
    except TimeoutError:
        return f"no answer within {CONNECT_S:g} s"
    except OSError as error:
        return f"no connection ({error.strerror or 'TLS'})"
