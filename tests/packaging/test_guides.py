"""The four guides are followed to the letter by four readers, in one federation of real processes.

Every line of a `sh` block is a command; the scenario runs each of them, as it is written, in the
folder of the person who reads. Only what differs between two readers is exchanged: the folder of
the state, ports, a hospital's name, digests. A command that no reader types fails the test, and so
does a reader who types what the guide does not say. `yaml` blocks are the readers' files. `text`
blocks need root or the network; what they name is checked, and they are not run.
"""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from client.config import SiteConfig
from common import cli
from common.bundle import Bundle
from common.config import parse
from common.errors import Code
from common.study import Study
from server.config import CoordinatorConfig

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "docs" / "guides"
NAMES = ("hospital-it", "data-steward", "coordinator", "data-scientist")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
STATE = "/var/lib/wardround"
SITES = {"st-mary": "St. Mary", "lakeside": "Lakeside", "riverside": "Riverside"}
PATIENCE_S = 120


def blocks(text: str, language: str) -> list[str]:
    return [body for found, body in BLOCK.findall(text) if found == language]


def lines_of(text: str, language: str) -> list[str]:
    """Every line of the blocks in a language, continued lines joined."""
    joined = "".join(blocks(text, language)).replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip()]


@cache
def guide(name: str) -> str:
    return (GUIDES / f"{name}.md").read_text(encoding="utf-8")


def file_of(name: str, title: str) -> str:
    """The `yaml` block whose first line is `# TITLE`."""
    (found,) = (b for b in blocks(guide(name), "yaml") if b.splitlines()[0] == f"# {title}")
    return found


# ------------------------------------------------------------------- what the pages say


def understood(line: str) -> None:
    """Take a line apart as the program does. Raises CommandError."""
    command, rest = cli._find(shlex.split(line)[1:])
    cli._parser(command).parse_args(rest)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_of_a_guide_is_understood(name):
    found = [line for line in lines_of(guide(name), "sh") if line.startswith("wardround ")]
    assert len(found) >= 8
    for line in found:
        understood(line)
    mentioned = re.findall(r"`wardround ([a-z]+ ?[a-z]*)", guide(name))
    verbs = {word for verb in cli.commands() for word in (verb, verb.split()[0])}
    assert {
        m for m in map(str.strip, mentioned) if m not in verbs and m.split()[0] not in verbs
    } == set()


@pytest.mark.parametrize("line", ["wardround server runs x", "wardround client run --fast"])
def test_control_a_verb_or_an_option_that_there_is_not_is_noticed(line):
    with pytest.raises(cli.CommandError):
        understood(line)


@pytest.mark.parametrize("name", NAMES)
def test_a_guide_is_one_page_with_fenced_commands_only(name):
    text = guide(name)
    assert len(text.splitlines()) <= 200
    assert {language for language, _ in BLOCK.findall(text)} <= {"sh", "yaml", "text"}
    assert text.count("```") == 2 * len(BLOCK.findall(text))


@pytest.mark.parametrize("name", NAMES)
def test_every_code_of_a_guide_exists(name):
    named = set(re.findall(r"WR-\d{4}", guide(name)))
    assert len(named) >= 6
    assert named <= {code.label for code in Code}


def unknown_paths(text: str) -> set[str]:
    """Files of the project that a guide names and that are not there."""
    named = set(re.findall(r"\b(?:docker|configs|requirements|docs)/[\w./-]*\w", text))
    built = {path for path in named if path.startswith("docker/wheel.py ")}
    return {path for path in named - built if not (ROOT / path).exists()}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_guide_names_of_the_project_is_there(name):
    text = guide(name)
    assert unknown_paths(text) == set()
    for linked in re.findall(r"\]\(([\w-]+\.md)\)", text):
        assert (GUIDES / linked).is_file(), linked
    for unit in re.findall(r"wardround-(?:hospital|coordinator)\b", text):
        assert (ROOT / "docker" / "systemd" / f"{unit}.service").is_file()


def test_control_a_file_that_is_not_there_is_noticed():
    text = "cp docker/systemd/wardround-hospital.service and docker/systemd/gone.service"
    assert unknown_paths(text) == {"docker/systemd/gone.service"}


@pytest.mark.parametrize(
    ("name", "role"), [("hospital-it", "hospital"), ("coordinator", "coordinator")]
)
def test_the_service_runs_the_command_of_the_guide_on_the_guides_folders(name, role):
    unit = (ROOT / "docker" / "systemd" / f"wardround-{role}.service").read_text()
    (started,) = re.findall(r"^ExecStart=/opt/wardround/bin/(.*)$", unit, re.MULTILINE)
    line, _, config = started.partition(" --config ")
    assert line in lines_of(guide(name), "sh")
    assert config == f"/etc/wardround/{'site' if role == 'hospital' else role}.yaml"
    assert f"ReadWritePaths={STATE}\n" in unit


def test_the_files_that_are_shown_are_right():
    site = [file_of("hospital-it", "site.yaml"), file_of("data-steward", "site.yaml, your part")]
    link = file_of("hospital-it", "site.yaml, where the line needs it")
    parse(site[0] + link, "site.yaml", SiteConfig)
    parse(stewarded(*site), "site.yaml", SiteConfig)
    parse(file_of("coordinator", "coordinator.yaml"), "coordinator.yaml", CoordinatorConfig)
    parse(file_of("data-scientist", "study.yaml"), "study.yaml", Study)


def stewarded(written: str, own: str) -> str:
    """IT's file with the data steward's part in its place."""
    kept = [x for x in written.splitlines() if not x.startswith(("budget:", "ceilings:"))]
    return "\n".join(kept) + "\n" + own


# ------------------------------------------------------------------------- the readers


@dataclass
class Reader:
    """A person with a guide, a folder, and what reads differently here than on the page."""

    name: str
    folder: Path
    programs: Path
    differs: Mapping[str, str] = field(default_factory=dict)
    typed: set[str] = field(default_factory=set)

    def words(self, line: str) -> str:
        """A line of the guide as it is typed here."""
        known = lines_of(guide(self.name), "sh")
        assert line in known, f"the guide {self.name} does not say: {line}"
        self.typed.add(line)
        for written, here in {STATE: str(self.folder / "state"), **self.differs}.items():
            line = line.replace(written, here)
        return line

    def _started(self, line: str, **more: object) -> subprocess.Popen[str]:
        path = f"{self.programs}:{os.environ['PATH']}"
        # As at a prompt: the command itself is what a signal ends, and no shell above it.
        return subprocess.Popen(
            ["sh", "-c", f"exec {self.words(line)}"],
            cwd=self.folder,
            env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
            # A test runner in the background passes on that Ctrl-C is ignored; a prompt does not.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
            text=True,
            **more,  # type: ignore[call-overload]
        )

    def types(self, line: str, sees: str = "", *, status: int = 0) -> str:
        """Type a line of the guide, wait for its end, and look for what must be seen."""
        process = self._started(
            line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        told, warned = process.communicate(timeout=PATIENCE_S)
        assert "Traceback" not in warned, warned
        assert process.returncode == status, (line, told, warned)
        assert sees in told, (line, told)
        return told

    def answers(self, line: str, said: str) -> str:
        """Type a line at a terminal that asks something, and answer it."""
        master, slave = pty.openpty()
        try:
            process = self._started(
                line, stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            os.write(master, f"{said}\n".encode())
            told, asked = process.communicate(timeout=PATIENCE_S)
        finally:
            os.close(master)
            os.close(slave)
        assert process.returncode == 0, asked
        assert said not in told
        return asked + told

    @contextmanager
    def leaves_running(self, line: str, *, ends_with: int = 0) -> Iterator[Running]:
        """Type a line that goes on; Ctrl-C in the end, unless it ended by itself."""
        with (self.folder / f"{len(self.typed)}.out").open("w+") as out:
            process = self._started(
                line, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )
            running = Running(process, Path(out.name))
            try:
                yield running
                running.interrupt()
                assert process.wait(PATIENCE_S) == ends_with, running.told()
                assert "Traceback" not in running.told()
            finally:
                with_group(process, signal.SIGKILL)
                process.wait()


@dataclass
class Running:
    """A command that goes on."""

    process: subprocess.Popen[str]
    out: Path

    def told(self) -> str:
        return self.out.read_text()

    def interrupt(self) -> None:
        if self.process.poll() is None:
            with_group(self.process, signal.SIGINT)

    def ended(self) -> str:
        """Wait until it ends by itself; what it said."""
        assert self.process.wait(PATIENCE_S) == 0, self.told()
        return self.told()


def with_group(process: subprocess.Popen[str], number: int) -> None:
    """What a terminal does at Ctrl-C: the signal goes to everything that was started there."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def until(true: Callable[[], bool], what: str) -> None:
    """Wait for something that happens in another process."""
    ends = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < ends, f"it never happened: {what}"
        threading.Event().wait(0.05)


def told_in(path: Path) -> dict[str, object]:
    """A status file as it is now; empty while there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


@dataclass
class Federation:
    """The folders of everybody."""

    root: Path
    programs: Path
    coordinator: Reader
    scientist: Reader
    hospitals: dict[str, tuple[Reader, Reader]]

    @property
    def status(self) -> dict[str, object]:
        return told_in(self.coordinator.folder / "state" / "status.json")

    def everywhere(self, work: Callable[[Reader], object]) -> None:
        """Every data steward does the same, at the same time."""
        with ThreadPoolExecutor(len(SITES)) as pool:
            for done in [pool.submit(work, steward) for _, steward in self.hospitals.values()]:
                done.result()


@pytest.fixture
def federation(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    wardround = programs / "wardround"
    python, tree = shlex.quote(sys.executable), shlex.quote(str(ROOT))
    wardround.write_text(f'#!/bin/sh\nPYTHONPATH={tree} exec {python} -P -m common.cli "$@"\n')
    wardround.chmod(0o755)

    def reader(name: str, where: str, differs: Mapping[str, str] | None = None) -> Reader:
        folder = tmp_path / where
        (folder / "state").mkdir(parents=True, exist_ok=True, mode=0o700)
        return Reader(name, folder, programs, differs or {})

    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = dict(zip(("8443", "8444", "8445"), (s.getsockname()[1] for s in taken), strict=True))
    for listener in taken:
        listener.close()
    differs = {written: str(port) for written, port in ports.items()}
    made = Federation(
        tmp_path,
        programs,
        reader("coordinator", "coordinator", differs),
        reader("data-scientist", "desk"),
        {},
    )
    write_files(made, differs)
    for site, name in SITES.items():
        own = {"St. Mary": name, "st-mary": site}
        made.hospitals[site] = (
            reader("hospital-it", site, own),
            reader("data-steward", site, own),
        )
        text = file_of("hospital-it", "site.yaml").replace("st-mary", site)
        (tmp_path / site / "site.yaml").write_text(text.replace(STATE, "state"))
    share_records(tmp_path)
    return made


def write_files(made: Federation, ports: Mapping[str, str]) -> None:
    text = file_of("coordinator", "coordinator.yaml").replace("federation.example.org", "localhost")
    text = text.replace(STATE, "state").replace("0.0.0.0", "127.0.0.1")  # noqa: S104
    for written, here in ports.items():
        text = text.replace(written, here)
    (made.coordinator.folder / "coordinator.yaml").write_text(text)
    (made.scientist.folder / "study.yaml").write_text(file_of("data-scientist", "study.yaml"))
    shutil.copytree(ROOT / "configs", made.scientist.folder / "configs")


def share_records(root: Path) -> None:
    """Every hospital gets patients of its own."""
    with (ROOT / "configs" / "data" / "synthetic-labs.csv").open(newline="") as source:
        rows = list(csv.DictReader(source))
    columns = [name for name in rows[0] if name != "hospital"]
    patients = sorted({row["patient"] for row in rows})
    for number, site in enumerate(SITES):
        mine = set(patients[number :: len(SITES)])
        with (root / site / "records.csv").open("w", newline="") as target:
            writer = csv.DictWriter(target, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for row in rows if row["patient"] in mine)


# ------------------------------------------------------------------------ the scenario


def test_every_command_of_every_guide_works_for_those_who_follow_it(federation):
    with ThreadPoolExecutor(1) as pool:
        study = pool.submit(make_a_study, federation.scientist)
        enrol(federation)
        study.result()
    digest = publish(federation)
    run_the_study(federation, digest)
    look_at_the_evidence(federation, digest)
    leave_and_renew(federation)
    readers = [federation.coordinator, federation.scientist, *federation.hospitals["st-mary"]]
    assert {reader.name: untyped(guide(reader.name), reader) for reader in readers} == {
        name: set() for name in NAMES
    }


def untyped(text: str, reader: Reader) -> set[str]:
    """The commands of a guide that its reader has not typed."""
    return set(lines_of(text, "sh")) - reader.typed


def test_control_a_new_command_of_a_guide_is_missed_until_somebody_types_it(federation):
    text = guide("coordinator") + "\n```sh\nwardround server forget everything\n```\n"
    reader = federation.coordinator
    reader.typed.update(lines_of(guide("coordinator"), "sh"))
    assert untyped(text, reader) == {"wardround server forget everything"}


def test_control_a_command_that_the_guide_does_not_say_is_not_typed(federation):
    with pytest.raises(AssertionError, match="does not say"):
        federation.coordinator.types("wardround server init --name x")
    assert federation.coordinator.typed == set()


def make_a_study(scientist: Reader) -> None:
    scientist.types(
        "wardround simulate configs/tabular.yaml --out rehearsal --no-alone",
        "verdict: nobody's update was readable, the audit logs verify, every privacy budget held",
    )
    scientist.types("wardround privacy rehearsal", "east")
    scientist.types("wardround audit verify rehearsal", "audit verified")
    scientist.types(
        "wardround predict rehearsal/model configs/data/synthetic-labs.csv --out predictions.csv",
        "283 predictions",
    )
    scientist.types("wardround check study.yaml", "study.yaml: ok")
    scientist.types("wardround plan study.yaml", "warning: no hospital may drop out")
    scientist.types("wardround study build study.yaml --out sepsis", "study digest")
    scientist.types("wardround plan sepsis", "0.3 or less is comfortable")


def enrol(federation: Federation) -> None:
    coordinator = federation.coordinator
    coordinator.types("wardround check coordinator.yaml", "ok")
    own_words = coordinator.types("wardround server init", "this coordinator's words: ")
    own_words = own_words.split("this coordinator's words: ")[1].splitlines()[0]
    for site, (it, _) in federation.hospitals.items():
        at_desk = Reader(
            "coordinator",
            coordinator.folder,
            federation.programs,
            it.differs,
            coordinator.typed,
        )
        at_desk.types('wardround server invite "St. Mary"', own_words)
        shutil.copy(coordinator.folder / f"{site}.invite", it.folder)
        words = joined(it, "wardround client join st-mary.invite", own_words)
        shutil.copy(it.folder / f"{site}.join", coordinator.folder)
        assert words in at_desk.answers("wardround server admit st-mary.join", "yes")
    assert coordinator.types("wardround server roster").count("admitted") == len(SITES)
    coordinator.types("wardround doctor --config coordinator.yaml", "Ready")


def joined(it: Reader, line: str, coordinator_words: str) -> str:
    """Follow an invite; the words to read aloud."""
    told = it.types(line, f"the coordinator's own words: {coordinator_words}")
    return told.split("read aloud:\n")[1].splitlines()[0].strip()


def publish(federation: Federation) -> str:
    coordinator = federation.coordinator
    study = coordinator.folder / "state" / "study"
    shutil.copytree(federation.scientist.folder / "sepsis", study)
    coordinator.types(f"wardround plan {STATE}/study", "Plan of study sepsis")
    digest = Bundle.load(study).digest.hex()
    coordinator.types(f"wardround server publish {STATE}/study", f"study digest {digest}")
    for it, steward in federation.hospitals.values():
        shutil.copytree(study, it.folder / "sepsis")
        own = file_of("data-steward", "site.yaml, your part")
        path = steward.folder / "site.yaml"
        path.write_text(stewarded(path.read_text(), own))
    return digest


def run_the_study(federation: Federation, digest: str) -> None:
    first, *others = (it for it, _ in federation.hospitals.values())
    serve = f"wardround server run {STATE}/study"
    first.types(f"wardround doctor --folder {STATE}", "Ready")
    first.types("wardround check site.yaml", "ok")
    with first.leaves_running("wardround client run"):
        wait_in_vain(first)
        with (
            others[0].leaves_running("wardround client run"),
            others[1].leaves_running("wardround client run"),
        ):
            with federation.coordinator.leaves_running(serve) as server:
                until(lambda: waiting(federation) == set(SITES), "all wait for an approval")
                look_around(federation)
                federation.everywhere(approve)
                until(lambda: federation.status.get("phase") == "ready", "a round is open")
            assert "stopped; everything is kept" in server.told()
            with federation.coordinator.leaves_running("wardround server resume") as server:
                told = server.ended()
            assert "rounds: 2 completed, 0 aborted" in told
            assert "0 readable" in told
            assert "verdict: nobody's update was readable, the audit logs verify" in told
            assert federation.coordinator.types("wardround server report") in told
            first.types("wardround client status", "finished")
    until(lambda: not told_in(first.folder / "state" / "status.json")["running"], "the end")
    assert digest[:16] in first.types("wardround client status")


def wait_in_vain(it: Reader) -> None:
    """No coordinator is up yet: that is said, and nobody gives up."""
    told = it.folder / "state" / "status.json"
    until(lambda: "WR-8101" in json.dumps(told_in(told)), "the hospital waits")
    it.types("wardround client status", "waiting: WR-8101")
    it.types("wardround errors WR-8101", "WR-8101")


def waiting(federation: Federation) -> set[str]:
    """The hospitals that have told that they did not approve."""
    sites = federation.status.get("sites", ())
    return {site["site"] for site in sites if site["code"] == Code.APPROVAL_STUDY.label}


def look_around(federation: Federation) -> None:
    coordinator, (it, _) = federation.coordinator, federation.hospitals["st-mary"]
    assert coordinator.types("wardround server status", "st-mary").count("WR-3102") == len(SITES)
    coordinator.types("wardround server status --watch", "quorum 3 of 3")
    coordinator.types("wardround server health")
    for path, seen in (("metrics", 'wardround_site_online{site="st-mary"} 1.0'), ("status", "WR-")):
        (line,) = (x for x in lines_of(guide("coordinator"), "sh") if x.endswith(f"8444/{path}"))
        coordinator.types(line, seen)
    it.types("wardround doctor --config site.yaml", "Ready")
    it.types("wardround client health", "heartbeat")
    it.types("wardround client logs --lines 20", "link.active")
    with it.leaves_running("wardround client logs --follow", ends_with=130) as follow:
        until(lambda: "daemon.started" in follow.told(), "the log is shown")


def approve(steward: Reader) -> None:
    if steward.folder.name == "st-mary":
        steward.types("wardround check site.yaml", "ok")
        told = steward.types("wardround client review sepsis", "80 qualify")
        assert "to refuse" not in told
    steward.types('wardround client approve sepsis --by "Dr. A. Vogel"', "approved by Dr. A. Vogel")


def look_at_the_evidence(federation: Federation, digest: str) -> None:
    coordinator, scientist = federation.coordinator, federation.scientist
    coordinator.differs = {**coordinator.differs, "01234567": digest[:8]}
    coordinator.types(f"wardround audit verify {STATE}/runs/sepsis-01234567", "audit verified")
    _, steward = federation.hospitals["st-mary"]
    steward.differs = {**steward.differs, "0123456789abcdef": digest[:16]}
    steward.types(f"wardround privacy {STATE}", "epsilon")
    folder = f"{STATE}/studies/0123456789abcdef"
    steward.types(f"wardround audit verify {folder}", "audit verified")
    steward.types("wardround client stop", "stopped")
    assert (steward.folder / "state" / "stop").is_file()
    steward.types("wardround client status", "the kill switch is on")
    steward.types("wardround client start", "off")
    statement = told_in(steward.folder / "state/studies" / digest[:16] / "privacy.json")
    assert statement["epsilon_agreed"] == 3
    steward.types("wardround client withdraw sepsis", "taken back")
    assert "no study is approved here" in steward.types("wardround client status")
    # The scientist's line is typed at a hospital: there are the model and the patients.
    shutil.copy(steward.folder / "records.csv", steward.folder / "new-patients.csv")
    here = Reader(
        scientist.name, steward.folder, federation.programs, steward.differs, scientist.typed
    )
    here.types(f"wardround predict {folder}/model new-patients.csv", "predictions")


def leave_and_renew(federation: Federation) -> None:
    coordinator, (it, _) = federation.coordinator, federation.hospitals["st-mary"]
    told = coordinator.types('wardround server invite "St. Mary"', "client rotate")
    own_words = told.split("this coordinator's words: ")[1].splitlines()[0]
    shutil.copy(coordinator.folder / "st-mary.invite", it.folder)
    words = joined(it, "wardround client rotate st-mary.invite", own_words)
    shutil.copy(it.folder / "st-mary.join", coordinator.folder)
    assert words in coordinator.answers("wardround server admit st-mary.join", "yes")
    coordinator.types("wardround server revoke riverside", "revoked")
    assert "revoked" in coordinator.types("wardround server roster")
    coordinator.types("wardround server renew", "good until")
