"""The hospital's verbs of enrolment; heavy imports happen in `run`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from common.cli import Command, CommandError, emit_json, say
from common.errors import Code

if TYPE_CHECKING:
    from client.enrol import Joined
    from common.invite import Invite

DEFAULT_CONFIG: Final = Path("site.yaml")

_TEMPLATE: Final = """\
# What one hospital decides alone. No study and no coordinator can change a line of it.
format: wardround-site/1
# This hospital's id in the roster.
site: {site}

data:
  # PUT YOUR OWN FILES HERE. Relative to the folder of this file. CSV, Parquet or NDJSON.
  files: [data/records.csv]
  # Only where the hospital's column names differ from the study's, for example:
  # columns: {{patient: mrn, text: note, label: diagnosis}}

# Keys, journal, privacy ledger and audit log. One folder for each patient population, on a disk
# that no snapshot rolls back: an older ledger is noticed and the site stops.
state: state

# What all studies together may ever spend on one patient: the cap of the ledger.
budget: {{epsilon: 8, delta: 1e-5}}

# The most that one study may ask for. A study beyond them is refused, never trimmed.
ceilings:
  epsilon: 3
  delta: 1e-5
  rounds: 100
  minimum_sites: 3
  require_privacy: true
  accept_joint: true
  # Digests that somebody here has reviewed, or the word any. An empty list approves nothing.
  approved_studies: []
  approved_backbones: any
  approved_code: any

# auto: the GPU if there is one.
device: auto
# Only where the way to the coordinator needs it: an HTTPS proxy, a cap in megabits per second,
# and the local hours in which large transfers may run.
# link: {{proxy: "http://proxy:3128", megabits: 20, window: {{from: 19, to: 7}}}}
"""


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("invite", type=Path, help="the file that the coordinator sent")
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="default: site.yaml")
    parser.add_argument(
        "--out", type=Path, default=None, help="default: SITE.join, beside the invite"
    )


def _join(arguments: argparse.Namespace) -> int:
    from client.enrol import join
    from common.world import SystemEntropy

    invite, now = _opened(arguments)
    state, written = _state(arguments.config, invite)
    done = join(state, invite, now=now, entropy=SystemEntropy())
    return _told(arguments, invite, done, state=state, written=written)


def _rotate(arguments: argparse.Namespace) -> int:
    from client.enrol import rotate
    from common.world import SystemEntropy

    invite, now = _opened(arguments)
    if not arguments.config.exists():
        raise CommandError(
            Code.NOT_ENROLLED,
            f"{arguments.config}: there is no such file.",
            remedy="Name the site.yaml of the enrolled hospital with --config.",
        )
    state, _ = _state(arguments.config, invite)
    done = rotate(state, invite, now=now, entropy=SystemEntropy())
    return _told(arguments, invite, done, state=state, written=False)


def _opened(arguments: argparse.Namespace) -> tuple[Invite, int]:
    """The invite, verified before anything is written, and the time it was judged by."""
    from common.invite import Invite
    from common.world import unix_seconds

    now = unix_seconds()
    return Invite.load(arguments.invite).verified(now), now


def _state(path: Path, invite: Invite) -> tuple[Path, bool]:
    """The state folder that site.yaml names, and whether the file was written just now."""
    from client.config import SiteConfig
    from common.config import load, parse
    from common.errors import ConfigError
    from common.world import make_folder, write_durably

    written = not path.exists()
    if written:
        text = _TEMPLATE.format(site=_quoted(invite.site))
        parse(text, str(path), SiteConfig)
        make_folder(path.parent)
        write_durably(path, [text.encode()])
    config = load(path, SiteConfig)
    if config.site != invite.site:
        raise ConfigError(
            Code.SITE_MISMATCH, f"{path} is for {config.site}; the invite is for {invite.site}."
        )
    return config.state_folder(path), written


def _quoted(site: str) -> str:
    """A site id as YAML text: `12` or `1e5` would be numbers, `null` nothing."""
    plain = site[0].isalpha() and site not in {"null", "true", "false"}
    return site if plain else f'"{site}"'


def _told(
    arguments: argparse.Namespace, invite: Invite, done: Joined, *, state: Path, written: bool
) -> int:
    answer = done.answer
    out = arguments.out or arguments.invite.with_name(f"{answer.site}.join")
    answer.save(out)
    if arguments.json:
        emit_json(
            {
                "join": str(out),
                "site": answer.site,
                "name": answer.name,
                "consortium": invite.consortium,
                "url": invite.url,
                "version": answer.version,
                "keys_made": done.fresh,
                "state": str(state),
                "config": str(arguments.config),
                "config_written": written,
                "words": answer.words,
                "coordinator_words": invite.words,
            }
        )
        return 0
    say(f"consortium {invite.consortium}, coordinator at {invite.url}")
    say(f"the coordinator's own words: {invite.words}")
    say(f"{state}: keys {'made; they never leave this folder' if done.fresh else 'kept'}")
    say(f"{out}: send this file back to the coordinator; nothing in it is secret")
    say()
    say("Then telephone the coordinator, on a number that you knew before, and read aloud:")
    say(f"  {answer.words}")
    say()
    if written:
        say(f"next: put your own files and limits into {arguments.config}, then")
        say(f"      wardround check {arguments.config}")
    else:
        say("next: wait until the coordinator says that you are admitted")
    return 0


COMMANDS = [
    Command(
        "client join", "follow an invite: make keys, show the words to read", _configure, _join
    ),
    Command("client rotate", "make new keys for an enrolled hospital", _configure, _rotate),
]
