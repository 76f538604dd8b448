"""The hospital's part of `wardround doctor`: keys, disk, device, and the way to the coordinator.

The line itself is tried by `client.dial`, as the daemon does it, up to the coordinator's answer to
somebody who signs nothing: it shows the clock, the certificate, whether this hospital's connection
key is known there, and the coordinator's release.
"""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from client.config import SiteConfig
from client.enrol import Pinned, pinned, transport_keys
from client.link import LinkLimits, LinkWorld, chosen_proxy
from common.address import joined_address, split_address
from common.cli import VERSION
from common.config import beside, load
from common.doctor import Finding, clock, device, disk, keys
from common.errors import Code, ConfigError, StorageError
from common.keys import key_file
from common.skew import far_apart

if TYPE_CHECKING:
    from client.dial import Reply, Trouble

__all__ = ["findings"]

CONNECT_S: Final = 5.0
ANSWER_S: Final = 15.0
# As the coordinator judges a signed moment, in seconds: this machine's clock minus its own.
TAKEN: Final = (-300.0, 4.0)
NEAR: Final = (-60.0, 2.5)
PUBLIC_KEY_HEADER: Final = "flwr-public-key"
_PATH: Final = "/v1/fleet/pull-messages"
_MOST: Final = 64 * 1024


def findings(path: Path, *, online: bool) -> Iterator[Finding]:
    """Everything that is looked at at a hospital, in order. Raises ConfigError: site.yaml."""
    config = load(path, SiteConfig)
    state = config.state_folder(path)
    yield Finding("settings", "ok", f"site {config.site}")
    yield from disk(state)
    yield from _records(config, path)
    yield from _knowledge(config, path)
    yield device(config.device)
    yield from _switch(config, path)
    yield from clock()
    try:
        pin = pinned(state)
    except (ConfigError, StorageError) as error:
        yield Finding("enrolment", "fail", str(error), error.remedy)
        return
    if pin.site != config.site:
        detail = f"{pin.site} is at home in {state}, and site.yaml names {config.site}"
        yield Finding("enrolment", "fail", detail, Code.SITE_MISMATCH.remedy)
        return
    yield Finding("enrolment", "ok", f"{pin.site} in {pin.consortium}, at {pin.url}")
    looked = list(keys(_key_files(state)))
    yield from looked
    if online and not any(item.status == "fail" for item in looked):
        yield from _line(config, pin, state)


def _key_files(state: Path) -> list[Path]:
    named = [state / f"{kind}.key" for kind in ("identity", "transport", "vault")]
    return [*named, *sorted(set(state.glob("*.key")) - set(named))]


def _records(config: SiteConfig, path: Path) -> Iterator[Finding]:
    system = config.data.system
    if system is not None:
        if system.database is not None:
            yield _database(beside(path, system.database))
            return
        folder = beside(path, system.folder or "")
        if not (folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)):
            detail = f"{folder}: not a folder, or not readable by this user"
            fix = "Correct data.system in site.yaml, or its mode."
            yield Finding("records", "fail", detail, fix)
        else:
            yield Finding("records", "ok", f"a system read as {system.reader}")
        return
    files = [path.parent / Path(name).expanduser() for name in config.data.files]
    unreadable = [file for file in files if not (file.is_file() and os.access(file, os.R_OK))]
    for file in unreadable:
        detail = f"{file}: not there, or not readable by this user"
        yield Finding("records", "fail", detail, "Correct data.files in site.yaml, or its mode.")
    loose = [file for file in files if file not in unreadable and file.stat().st_mode & 0o004]
    for file in loose:
        detail = f"{file}: everybody on this machine may read it"
        yield Finding("records", "warn", detail, f"Type: chmod o-r {file}")
    if not unreadable and not loose:
        yield Finding("records", "ok", f"{len(files)} file(s)")


def _database(file: Path) -> Finding:
    try:
        key_file(file)
    except StorageError as error:
        return Finding("records", "fail", error.message, error.remedy)
    return Finding("records", "ok", "a database; the data check tries it")


def _knowledge(config: SiteConfig, path: Path) -> Iterator[Finding]:
    folder = config.knowledge_folder(path)
    if folder is not None and not folder.is_dir():
        fix = "Correct knowledge in site.yaml."
        yield Finding("knowledge", "fail", f"{folder}: is not a folder", fix)


def _switch(config: SiteConfig, path: Path) -> Iterator[Finding]:
    if config.kill_switch_file(path).exists():
        fix = "When the hospital may take part again: wardround client start"
        yield Finding("kill switch", "warn", "on: nothing is trained, nothing is sent", fix)


# ---------------------------------------------------------------------------- the line


def _line(config: SiteConfig, pin: Pinned, state: Path) -> Iterator[Finding]:
    host, port = split_address(pin.url)
    try:
        proxy = chosen_proxy(host, config.link.proxy)
    except ConfigError as error:
        yield Finding("proxy", "fail", error.message, error.remedy)
        return
    told = config.link.proxy is not None
    where = (host, port) if proxy is None else _address(proxy)
    why = _no_way(*where)
    if proxy is not None:
        source = "link.proxy" if told else "the environment"
        shown = f"{joined_address(*where)}, from {source}"
        if why:
            detail = f"{shown}: {why}"
            yield Finding("proxy", "fail", detail, _proxy_fix(host, told=told))
            return
    if why:
        yield Finding("coordinator", "fail", f"{pin.url}: {why}", _way_fix(pin, why))
        return
    answer = _best(pin, state, config.link.proxy)
    if proxy is not None:
        yield _judged_proxy(shown, host, answer, told=told)
    yield from _answered(pin, answer)


def _best(pin: Pinned, state: Path, proxy: str | None) -> Reply | Trouble:
    """The answer to the newest key that is known there: after a rotation it may be an older one."""
    answers = []
    for key in transport_keys(state):
        answers.append(_asked(pin, key, proxy))
        if getattr(answers[-1], "version", ""):
            return answers[-1]
    return answers[0]


def _address(proxy: str) -> tuple[str, int]:
    from urllib.parse import urlsplit

    parts = urlsplit(proxy)
    usual = 443 if parts.scheme == "https" else 80
    return parts.hostname or "", parts.port or usual


def _no_way(host: str, port: int) -> str:
    """Why no connection to there comes about; empty where one does."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except socket.gaierror:
        return "the name is not known here"
    except TimeoutError:
        return f"no answer within {CONNECT_S:g} s"
    except ConnectionRefusedError:
        return "the connection is refused"
    except OSError as error:
        return f"no connection ({error.strerror})"
    return ""


def _way_fix(pin: Pinned, why: str) -> str:
    if "name" in why:
        return "Ask the network team to resolve it, or the coordinator for an invite by address."
    if "refused" in why:
        return "Ask whether the coordinator runs; a firewall may also refuse outgoing HTTPS to it."
    return (
        f"Let the firewall pass outgoing TCP to {pin.url}; if this network has an HTTPS proxy, "
        "name it in link.proxy of site.yaml."
    )


def _proxy_fix(host: str, *, told: bool) -> str:
    if told:
        return "Correct link.proxy in site.yaml, or take it out to go without a proxy."
    return (
        f"Correct HTTPS_PROXY; where the coordinator is reached without it, set NO_PROXY={host}, "
        "for the service as well."
    )


def _asked(pin: Pinned, key: Path, proxy: str | None) -> Reply | Trouble:
    """What the coordinator answers to this connection key, of which only the public half goes."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    from client.dial import Dial, Meter, Seat, Trouble

    world = LinkWorld(proxy=proxy)
    try:
        seat = Seat.of(pin.url, pin.ca, key)
        dial = Dial(seat, world, LinkLimits(), Meter(world))
    except ConfigError as error:
        return Trouble(error.code, error.message)
    public = seat.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    headers = {
        "content-type": "application/protobuf",
        PUBLIC_KEY_HEADER: base64.b64encode(public).decode(),
    }
    try:
        return dial.exchange(_PATH, b"", headers, most=_MOST, timeout=ANSWER_S)
    except Trouble as trouble:
        return trouble
    finally:
        dial.close()


def _judged_proxy(shown: str, host: str, answer: Reply | Trouble, *, told: bool) -> Finding:
    if getattr(answer, "code", None) is Code.PROXY_REFUSED:
        fix = f"{Code.PROXY_REFUSED.remedy} {_proxy_fix(host, told=told)}"
        return Finding("proxy", "fail", f"{shown}: it does not pass the connection on", fix)
    return Finding("proxy", "ok", shown)


def _answered(pin: Pinned, answer: Reply | Trouble) -> Iterator[Finding]:
    """What the answer shows."""
    from client.dial import Trouble

    if isinstance(answer, Trouble):
        if answer.code is not Code.PROXY_REFUSED:  # the proxy's own line says so
            yield _troubled(pin, answer)
        return
    yield Finding("coordinator", "ok", f"{pin.url} answers, with a certificate of the pinned CA")
    if answer.clock_offset_s is not None:
        yield _clocks(answer.clock_offset_s)
    if not answer.version:
        unknown = Code.NOT_ADMITTED
        yield Finding("admission", "fail", f"{pin.url}: {unknown.meaning}", unknown.remedy)
        return
    yield Finding("admission", "ok", "the coordinator knows this hospital")
    detail = f"coordinator {answer.version}, here {VERSION}"
    if far_apart(VERSION, answer.version):
        fix = "Bring the older side up to date; one minor version apart is fine."
        yield Finding("versions", "warn", detail, fix)
    else:
        yield Finding("versions", "ok", detail)


def _troubled(pin: Pinned, trouble: Trouble) -> Finding:
    if trouble.code is not Code.SERVER_CERTIFICATE:
        name = "coordinator" if trouble.code is not Code.LINK_SETTINGS else "enrolment"
        return Finding(name, "fail", f"{pin.url}: {trouble.why}", trouble.code.remedy)
    fix = trouble.code.remedy
    why = trouble.why.lower()
    if "mismatch" in why:
        fix = "Ask the coordinator to list this address under `names` in coordinator.yaml."
    elif "not yet valid" in why or "expired" in why:
        fix = f"Set this machine's clock if it is wrong. Otherwise: {fix}"
    return Finding("certificate", "fail", f"{pin.url}: {trouble.why}", fix)


def _clocks(offset: float) -> Finding:
    side = "ahead of" if offset > 0 else "behind"
    detail = f"{abs(offset):.0f} s {side} the coordinator's"
    if not TAKEN[0] < offset < TAKEN[1]:
        return Finding("clock", "fail", detail, Code.CLOCK_OFF.remedy)
    if not NEAR[0] < offset < NEAR[1]:
        return Finding("clock", "warn", detail, Code.CLOCK_OFF.remedy)
    return Finding("clock", "ok", detail)
