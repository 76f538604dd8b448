"""The coordinator's verbs of enrolment; heavy imports happen in `run`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from common.cli import Command, CommandError, emit_json, say, table, warn
from common.errors import Code

if TYPE_CHECKING:
    from common.invite import Join
    from server.config import CoordinatorConfig

DEFAULT_CONFIG: Final = Path("coordinator.yaml")
_DAYS: Final = 14

_TEMPLATE: Final = """\
# Where the coordinator keeps its state and where hospitals reach it. It has no say in rounds,
# quorum, deadlines or privacy: those are signed by the hospitals.
format: wardround-coordinator/1
# Keys, admitted sites, journals, models, audit logs. Back it up; nothing secret is in this file.
state: coordinator
# What hospitals read in an invite.
consortium: {consortium}

# Host names and addresses that hospitals dial; the certificate is made for exactly these.
# After a change: `wardround server renew`. The first one goes into invites.
names: {names}
# The one port that hospitals dial (TLS 1.3). Open it in the firewall, and nothing else.
listen: {{host: {host}, port: {port}}}
# The operator's port: status and metrics, behind a token, on this machine only.
admin: {{host: 127.0.0.1, port: {admin}, health: {health}}}

log_level: info
"""


def _config_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, default=DEFAULT_CONFIG, help="coordinator.yaml (default: here)"
    )


def _opened(arguments: argparse.Namespace) -> tuple[CoordinatorConfig, Path]:
    """The configuration and the state folder."""
    from common.config import load
    from server.config import CoordinatorConfig

    if not arguments.config.exists():
        raise CommandError(
            Code.NOT_INITIALISED,
            f"{arguments.config}: there is no such file.",
            remedy="Run `wardround server init`, or name the file with --config.",
        )
    config = load(arguments.config, CoordinatorConfig)
    return config, config.state_folder(arguments.config)


def _now() -> int:
    from common.world import unix_seconds

    return unix_seconds()


def _day(moment: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d")


# --------------------------------------------------------------------------------- init


def _configure_init(parser: argparse.ArgumentParser) -> None:
    _config_argument(parser)
    parser.add_argument("--name", default=None, help="what hospitals call the consortium")
    parser.add_argument("--host", default=None, help="interface to listen on (default: 0.0.0.0)")
    parser.add_argument("--port", type=int, default=None, help="port to listen on (default: 8443)")
    parser.add_argument(
        "--dns",
        action="append",
        default=None,
        metavar="NAME",
        help="a host name or address that hospitals dial; may be repeated",
    )


def _init(arguments: argparse.Namespace) -> int:
    from common.config import load
    from common.words import coordinator_words
    from common.world import SystemEntropy
    from server.config import CoordinatorConfig
    from server.enrol import initialise

    path = arguments.config
    written = not path.exists()
    if written:
        _write_config(arguments)
    config = load(path, CoordinatorConfig)
    if not written:
        _refuse_changes(arguments, config)
    state = config.state_folder(path)
    found = initialise(config, state, now=_now(), entropy=SystemEntropy())
    words = coordinator_words(found.public)
    if arguments.json:
        emit_json(
            {
                "config": str(path),
                "config_written": written,
                "state": str(state),
                "made": list(found.made),
                "key": found.public.hex(),
                "words": words,
                "url": config.url,
                "certificate_until": found.certificate.expires,
            }
        )
        return 0
    say(f"{path}: {'written; read it once' if written else 'kept as it is'}")
    say(f"{state}: {'made ' + ', '.join(found.made) if found.made else 'nothing was missing'}")
    say(
        f"hospitals dial {config.url}; the certificate is good until "
        f"{_day(found.certificate.expires)} and renews itself"
    )
    say(f"this coordinator's words: {words}")
    say(f"back up {state}; whoever reads it can pose as the coordinator")
    say('next: wardround server invite "NAME OF A HOSPITAL"')
    return 0


def _write_config(arguments: argparse.Namespace) -> None:
    from common.config import parse
    from common.world import make_folder, write_durably
    from server.config import PUBLIC_PORT, CoordinatorConfig

    port = PUBLIC_PORT if arguments.port is None else arguments.port
    # JSON text is YAML: nothing that was typed can say more than a value.
    text = _TEMPLATE.format(
        consortium=json.dumps(arguments.name or "consortium", ensure_ascii=False),
        names=json.dumps(arguments.dns or ["localhost", "127.0.0.1"], ensure_ascii=False),
        host=json.dumps(arguments.host or "0.0.0.0", ensure_ascii=False),  # noqa: S104
        port=port,
        admin=port + 1,
        health=port + 2,
    )
    parse(text, str(arguments.config), CoordinatorConfig)
    make_folder(arguments.config.parent)
    write_durably(arguments.config, [text.encode()])


def _refuse_changes(arguments: argparse.Namespace, config: CoordinatorConfig) -> None:
    """Options describe a file that is not there yet; they never change one that is."""
    asked = {
        "--name": (arguments.name, config.consortium),
        "--host": (arguments.host, config.listen.host),
        "--port": (arguments.port, config.listen.port),
        "--dns": (None if arguments.dns is None else tuple(arguments.dns), config.names),
    }
    other = [option for option, (typed, set_) in asked.items() if typed not in {None, set_}]
    if other:
        raise CommandError(
            Code.USAGE,
            f"{arguments.config} exists and says otherwise than {', '.join(other)}.",
            remedy=f"Edit {arguments.config}, then run `wardround server init` without options.",
        )


# ------------------------------------------------------------------------------- invite


def _configure_invite(parser: argparse.ArgumentParser) -> None:
    _config_argument(parser)
    parser.add_argument("name", help="what people call the hospital")
    parser.add_argument("--site", default=None, help="its id (default: from the name)")
    parser.add_argument("--url", default=None, help="host:port to dial (default: from names)")
    parser.add_argument("--days", type=int, default=_DAYS, help="how long it is good (default: 14)")
    parser.add_argument("--out", type=Path, default=None, help="default: SITE.invite, here")


def _invite(arguments: argparse.Namespace) -> int:
    from common.world import SystemEntropy
    from server.enrol import invite, site_id

    config, state = _opened(arguments)
    site = arguments.site or site_id(arguments.name)
    issued = invite(
        state,
        config,
        name=arguments.name,
        site=site,
        url=arguments.url or config.url,
        days=arguments.days,
        now=_now(),
        entropy=SystemEntropy(),
    )
    out = arguments.out or Path(f"{site}.invite")
    issued.save(out)
    rotates = issued.version > 1
    if arguments.json:
        emit_json(
            {
                "invite": str(out),
                "site": site,
                "name": issued.name,
                "url": issued.url,
                "version": issued.version,
                "rotates": rotates,
                "expires": issued.expires,
                "words": issued.words,
            }
        )
        return 0
    verb = "rotate" if rotates else "join"
    what = "asks for new keys of" if rotates else "invites"
    say(f"{out}: {what} {issued.name} ({site}) until {_day(issued.expires)}, to dial {issued.url}")
    say("It holds a token that works once: send it to the hospital's IT and to nobody else.")
    say(f"There they type: wardround client {verb} {out.name}")
    say(f"It will show this coordinator's words: {issued.words}")
    say(f"next, when {site}.join has come back: wardround server admit {site}.join")
    return 0


# -------------------------------------------------------------------------------- admit


def _configure_admit(parser: argparse.ArgumentParser) -> None:
    _config_argument(parser)
    parser.add_argument("join", type=Path, help="the file that the hospital sent back")
    parser.add_argument(
        "--words", default=None, help="the eight words that the hospital read aloud"
    )


def _admit(arguments: argparse.Namespace) -> int:
    from common.invite import Join
    from server.enrol import admit, examine

    _, state = _opened(arguments)
    join = Join.load(arguments.join)
    rotates = examine(state, join, _now())
    said = arguments.words if arguments.words is not None else _heard(join, rotates=rotates)
    site = admit(state, join, _now(), said=said)
    if arguments.json:
        emit_json(
            {
                "site": site.site,
                "name": site.name,
                "version": site.version,
                "roster": site.since,
                "rotated": rotates,
                "words": join.words,
            }
        )
        return 0
    say(
        f"{site.name} ({site.site}) is admitted{' with new keys' if rotates else ''}; "
        f"the roster has version {site.since}"
    )
    say("next: invite the other hospitals, or wardround server publish BUNDLE")
    return 0


def _heard(join: Join, *, rotates: bool) -> str:
    """The words, once somebody at a terminal has said that the hospital read the same."""
    if not sys.stdin.isatty():
        raise CommandError(
            Code.WORDS_UNCONFIRMED, "Without a terminal the words heard are given with --words."
        )
    warn(f"{join.name} ({join.site}){' has made new keys' if rotates else ' asks to join'}.")
    warn("Telephone the hospital, on a number that you knew before, and let them read to you.")
    warn(f"  {join.words}")
    sys.stderr.write("Did they read exactly these eight words? Type yes or no: ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() != "yes":
        raise CommandError(
            Code.WORDS_UNCONFIRMED, f"Nothing was changed; {join.site} is not admitted."
        )
    return join.words


# ------------------------------------------------------------------------ roster, revoke


def _roster(arguments: argparse.Namespace) -> int:
    from common.crypto.identity import fingerprint
    from server.enrol import admitted, coordinator_key, invited

    _, state = _opened(arguments)
    coordinator_key(state)
    sites, waiting, now = admitted(state), invited(state), _now()
    version = max((site.since for site in sites), default=0)
    if arguments.json:
        emit_json(
            {
                "version": version,
                "sites": [
                    {
                        "site": site.site,
                        "name": site.name,
                        "fingerprint": fingerprint(site.identity),
                        "key": site.identity.hex(),
                        "keys_version": site.version,
                        "since": site.admitted,
                        "status": "revoked" if site.revoked else "admitted",
                    }
                    for site in sites
                ],
                "invited": [
                    {"site": site, "name": name, "expires": expires, "expired": now >= expires}
                    for site, name, expires in waiting
                ],
            }
        )
        return 0
    rows = [
        [
            site.site,
            site.name,
            fingerprint(site.identity),
            _day(site.admitted),
            "revoked" if site.revoked else "admitted",
        ]
        for site in sites
    ]
    for site, name, expires in waiting:
        state_of = "expired" if now >= expires else f"until {_day(expires)}"
        rows.append([site, name, "-", "-", f"invited, {state_of}"])
    if rows:
        table(["site", "name", "fingerprint", "since", "status"], rows)
        say(f"roster version {version}")
    else:
        say('nobody is admitted or invited; next: wardround server invite "NAME OF A HOSPITAL"')
    return 0


def _configure_revoke(parser: argparse.ArgumentParser) -> None:
    _config_argument(parser)
    parser.add_argument("site", help="the id of the hospital to put out")


def _revoke(arguments: argparse.Namespace) -> int:
    from server.enrol import revoke

    _, state = _opened(arguments)
    site = revoke(state, arguments.site)
    if arguments.json:
        emit_json({"site": site.site, "name": site.name, "roster": site.since})
        return 0
    say(f"{site.name} ({site.site}) is revoked; the roster has version {site.since}")
    say("A running coordinator lets go of it within a round.")
    say("next: build and publish new studies without it")
    return 0


# ----------------------------------------------------------------------- publish, renew


def _configure_publish(parser: argparse.ArgumentParser) -> None:
    _config_argument(parser)
    parser.add_argument("bundle", type=Path, help="the folder that `wardround study build` wrote")


def _publish(arguments: argparse.Namespace) -> int:
    from server.enrol import publish

    _, state = _opened(arguments)
    done = publish(state, arguments.bundle)
    told: dict[str, Any] = {
        "bundle": str(arguments.bundle),
        "study": done.study.hex(),
        "roster": done.roster.hex(),
        "roster_version": done.version,
        "sites": list(done.sites),
    }
    if arguments.json:
        emit_json(told)
        return 0
    say(f"study digest {told['study']}")
    say(f"roster version {done.version}, digest {told['roster']}")
    say(
        f"next: give the folder {arguments.bundle} to every hospital ({', '.join(done.sites)}); "
        "there: wardround client review FOLDER"
    )
    return 0


def _renew(arguments: argparse.Namespace) -> int:
    from server.enrol import coordinator_key
    from server.pki import ensure_certificate

    config, state = _opened(arguments)
    coordinator_key(state)
    made = ensure_certificate(state, config, _now(), force=True)
    if arguments.json:
        emit_json({"certificate_until": made.expires, "names": list(made.names)})
        return 0
    say(f"{made.cert}: good until {_day(made.expires)}, for {', '.join(made.names)}")
    say("A running coordinator uses it from its next start on; the CA and every invite stay good.")
    return 0


COMMANDS = [
    Command("server init", "make a coordinator: keys, certificates, token", _configure_init, _init),
    Command(
        "server invite", "invite a hospital, or ask it for new keys", _configure_invite, _invite
    ),
    Command("server admit", "admit a hospital after the telephone call", _configure_admit, _admit),
    Command("server roster", "who is admitted, invited and revoked", _config_argument, _roster),
    Command("server revoke", "put a hospital out", _configure_revoke, _revoke),
    Command(
        "server publish", "sign a study bundle for the hospitals", _configure_publish, _publish
    ),
    Command("server renew", "make a new TLS certificate", _config_argument, _renew),
]
