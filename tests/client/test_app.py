"""The hospital's shell: whose questions it answers, and what may leave in an answer."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict

import client.app
from client.app import Answer, bind, opened, sealed, shell
from common.crypto.identity import SiteKey
from common.errors import (
    Code,
    ConfigError,
    DataError,
    ProtocolError,
    RefusedError,
    StorageError,
)
from common.protocol.envelope import COORDINATOR, check_envelope, sign_envelope
from tests.fleet_double import (
    COORDINATOR_KEY,
    SITE_KEY,
    STUDY,
    FakeHospital,
    FleetDouble,
    Running,
    make_pki,
    question,
    raw_question,
)

PATIENT = "Erika Mustermann, born 12.08.1964, HIV positive"


def asked(hospital, message):
    context = Context(run_id=1, node_id=7, node_config={}, state=RecordDict(), run_config={})
    return shell(lambda: hospital)(message, context)


def code_of(reply):
    """The code of a reply, signed or not."""
    return reply.error.reason if reply.has_error() else opened(reply.content)[0].code


def checked(reply, nonce=b"n" * 16):
    envelope, payloads = opened(reply.content)
    check_envelope(
        envelope,
        payloads,
        public=SITE_KEY.public,
        study=STUDY,
        sender="north",
        recipient=COORDINATOR,
        nonce=nonce,
    )
    return payloads


# ---------------------------------------------------------------------------- answers
@pytest.mark.parametrize("kind", ["query.step", "train.step"])
def test_an_answer_is_signed_over_the_nonce_of_its_question(kind):
    hospital = FakeHospital()
    reply = asked(hospital, question((b"abc", b"", b"x" * 100), kind=kind))
    assert checked(reply) == (b"cba", b"", b"x" * 100)
    assert hospital.asked == [(STUDY, (b"abc", b"", b"x" * 100), False)]
    with pytest.raises(ProtocolError):  # control: under another nonce the same answer is refused
        checked(reply, nonce=b"m" * 16)


@pytest.mark.parametrize("recipient", ["", "north"])
def test_a_hello_question_may_leave_open_who_is_asked(recipient):
    hospital = FakeHospital()
    reply = asked(hospital, question(kind="query.hello", recipient=recipient))
    assert checked(reply) == (b"hello",)
    assert hospital.asked == [(STUDY, (), True)]


def test_the_same_question_again_gets_the_very_same_answer():
    hospital = FakeHospital()
    first, second = (asked(hospital, question((b"abc",))) for _ in range(2))
    assert opened(first.content) == opened(second.content)


def test_payloads_are_not_copied_on_the_way_out_or_in():
    payload = os.urandom(1 << 20)
    hospital = FakeHospital(Answer)
    reply = asked(hospital, question((payload,)))
    assert hospital.asked[0][1][0] is payload
    assert opened(reply.content)[1][0] is payload


def test_the_bound_hospital_answers_for_the_module_and_none_is_no_text():
    message = question((b"abc",))
    context = Context(run_id=1, node_id=7, node_config={}, state=RecordDict(), run_config={})
    with mock.patch.object(client.app, "_BOUND", []):
        assert code_of(client.app.app(message, context)) == Code.RESIDENT_SETTING.label
        bind(FakeHospital())
        assert checked(client.app.app(message, context)) == (b"cba",)


# ---------------------------------------------------------------------------- rogue coordinator
OTHER = SiteKey.from_seed(b"R" * 32)


def forged(**changes):
    """A genuine question with its envelope changed afterwards."""
    envelope = sign_envelope(
        COORDINATOR_KEY,
        study=STUDY,
        sender=COORDINATOR,
        recipient="north",
        nonce=b"n" * 16,
        payloads=[b"abc"],
    )
    payloads = changes.pop("payloads", (b"abc",))
    return raw_question(sealed(replace(envelope, **changes), payloads))


ROGUE = {
    "unsigned": lambda: forged(signature=bytes(64)),
    "signed by another key": lambda: question((b"abc",), key=OTHER),
    "signed by the site itself": lambda: question((b"abc",), key=SITE_KEY),
    "for another site": lambda: question((b"abc",), recipient="south"),
    "for nobody": lambda: question((b"abc",), recipient=""),
    "another study put in": lambda: forged(study=bytes(32)),
    "another nonce put in": lambda: forged(nonce=b"m" * 16),
    "a code put in": lambda: forged(code=Code.MALFORMED.label),
    "a payload changed": lambda: forged(payloads=(b"abd",)),
    "a payload added": lambda: forged(payloads=(b"abc", b"d")),
    "a payload left out": lambda: forged(payloads=()),
    "payloads swapped": lambda: raw_question(
        sealed(opened(question((b"a", b"b")).content)[0], (b"b", b"a"))
    ),
    "sent by a hospital": lambda: forged(sender="south"),
    "a hello for another site": lambda: question(kind="query.hello", recipient="south"),
    "a hello by another key": lambda: question(kind="query.hello", recipient="", key=OTHER),
}


@pytest.mark.parametrize("attack", ROGUE)
def test_a_question_the_pinned_coordinator_did_not_sign_for_this_site_is_not_asked(attack):
    hospital = FakeHospital()
    reply = asked(hospital, ROGUE[attack]())
    assert hospital.asked == []
    assert reply.has_error()  # and nothing is signed over it either
    assert reply.error.reason == Code.MESSAGE_SIGNATURE.label


def test_the_coordinators_own_question_is_asked():  # control of the table above
    hospital = FakeHospital()
    assert checked(asked(hospital, forged())) == (b"cba",)
    assert len(hospital.asked) == 1


def envelope_with(**changes):
    fields = dict(question((b"abc",)).content["envelope"])
    for name, value in changes.items():
        fields.pop(name) if value is None else fields.update({name: value})
    return ConfigRecord(fields)


def array(data=b"abc", dtype="uint8", shape=None, stype="wardround.bytes"):
    return Array(dtype=dtype, shape=shape or (len(data),), stype=stype, data=data)


MALFORMED = {
    "nothing": {},
    "no envelope": {"payload-0": ArrayRecord({"data": array()})},
    "a metric for an envelope": {"envelope": MetricRecord({"a": 1})},
    "a field missing": {"envelope": envelope_with(code=None)},
    "a field too many": {"envelope": envelope_with(more=1)},
    "a field of another type": {"envelope": envelope_with(study="text")},
    "a truth value for a number": {"envelope": envelope_with(payloads=True)},
    "a short study": {"envelope": envelope_with(study=b"short", payloads=0)},
    "a long nonce": {"envelope": envelope_with(nonce=bytes(17), payloads=0)},
    "a sender that is no name": {"envelope": envelope_with(sender="../x", payloads=0)},
    "a code without end": {"envelope": envelope_with(code="x" * 1000, payloads=0)},
    "too many payloads": {"envelope": envelope_with(payloads=65)},
    "fewer than none": {"envelope": envelope_with(payloads=-1)},
    "a payload missing": {"envelope": envelope_with()},
    "a payload too many": {
        "envelope": envelope_with(),
        "payload-0": ArrayRecord({"data": array()}),
        "payload-1": ArrayRecord({"data": array()}),
    },
    "another kind of payload": {
        "envelope": envelope_with(),
        "payload-0": MetricRecord({"data": 1.0}),
    },
    "two arrays in a payload": {
        "envelope": envelope_with(),
        "payload-0": ArrayRecord({"data": array(), "more": array()}),
    },
    "numbers for bytes": {
        "envelope": envelope_with(),
        "payload-0": ArrayRecord({"data": array(dtype="float32")}),
    },
    "numpy's own format": {
        "envelope": envelope_with(),
        "payload-0": ArrayRecord({"data": array(stype="numpy.ndarray")}),
    },
    "another shape": {
        "envelope": envelope_with(),
        "payload-0": ArrayRecord({"data": array(shape=(4,))}),
    },
}


@pytest.mark.parametrize("shape", MALFORMED)
def test_records_of_another_form_are_refused_before_anything_is_asked(shape):
    hospital = FakeHospital()
    reply = asked(hospital, raw_question(RecordDict(MALFORMED[shape])))
    assert reply.has_error()
    assert reply.error.reason in {Code.MALFORMED.label, Code.OVERSIZED.label}
    assert hospital.asked == []


def test_a_hello_with_a_payload_is_refused():
    reply = asked(FakeHospital(), question((b"x",), kind="query.hello", recipient="north"))
    assert reply.error.reason == Code.MALFORMED.label


# ---------------------------------------------------------------------------- what leaves
def leaving(error):
    def ask(_):
        raise error

    return asked(FakeHospital(ask), question((b"abc",)))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RefusedError(Code.APPROVAL_STUDY, PATIENT), Code.APPROVAL_STUDY),
        (StorageError(Code.JOURNAL_WRITE, PATIENT), Code.JOURNAL_WRITE),
        (ConfigError(Code.CONFIG_INVALID, PATIENT), Code.CONFIG_INVALID),
        # What is wrong with the records never leaves, even as a code.
        (DataError(Code.DATA_VALUE, PATIENT), Code.DATA_DECLINED),
        (ValueError(PATIENT), Code.INTERNAL_FAULT),
        (MemoryError(PATIENT), Code.INTERNAL_FAULT),
        (RecursionError(PATIENT), Code.INTERNAL_FAULT),
    ],
)
def test_an_exception_leaves_as_a_signed_code_and_never_as_text(error, code):
    reply = leaving(error)
    assert checked(reply) == ()
    assert code_of(reply) == code.label
    assert b"Mustermann" not in wire(reply)


def wire(message):
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    return b"".join(part.deflate() for part in get_all_nested_objects(message).values())


def test_stock_flower_would_send_the_text(monkeypatch):
    """The control: Flower's own runner of ClientApps, around an app that raises."""
    from flwr.supernode.runtime import run_clientapp as stock

    def failing(message, context):
        raise ValueError(PATIENT)

    sent = []
    message = question((b"abc",))
    for name in ("HeartbeatSender", "make_task_heartbeat_fn_http", "register_signal_handlers"):
        monkeypatch.setattr(stock, name, mock.Mock())
    monkeypatch.setattr(stock.RuntimeHttpClient, "from_server_address", mock.Mock())
    given = (message, mock.Mock(), mock.Mock(), mock.Mock())
    monkeypatch.setattr(stock, "pull_task_input", lambda _client: given)
    for name in ("install_from_fab", "get_project_dir", "flwr_exit", "event", "log"):
        monkeypatch.setattr(stock, name, mock.Mock())
    monkeypatch.setattr(stock, "get_load_client_app_fn", lambda **_: lambda *_args: failing)
    monkeypatch.setattr(stock, "push_message", lambda _c, reply, _x: sent.append(reply))
    stock.run_clientapp("localhost:1", "token", insecure=True, runtime_dependency_install=False)
    assert "Mustermann" in sent[0].error.reason
    assert b"Mustermann" in wire(sent[0])


def test_the_hospitals_log_names_kind_and_place_of_a_fault_but_quotes_no_record(caplog):
    with caplog.at_level(logging.INFO):
        leaving(ValueError(PATIENT))
    assert "ValueError" in caplog.text
    assert "test_app.py" in caplog.text
    assert "Mustermann" not in caplog.text


def test_a_code_of_the_hospital_leaves_signed():
    hospital = FakeHospital(lambda _: Answer((), Code.APPROVAL_STUDY))
    reply = asked(hospital, question((b"abc",), study=bytes(32)))
    envelope, payloads = opened(reply.content)
    assert (envelope.code, payloads) == (Code.APPROVAL_STUDY.label, ())
    assert envelope.study == bytes(32)


# ---------------------------------------------------------------------------- no foreign code
FAB_FILES = {
    "pyproject.toml": b"""
[project]
name = "rogue"
version = "1.0.0"
dependencies = []
[tool.flwr.app]
publisher = "rogue"
[tool.flwr.app.components]
serverapp = "rogue_app.client:app"
clientapp = "rogue_app.client:app"
""",
    "rogue_app/__init__.py": b"",
    "rogue_app/client.py": b"""
import os, pathlib
pathlib.Path(os.environ["PLANTED"]).write_text("ran")
from flwr.clientapp import ClientApp
app = ClientApp()
""",
    "README.md": b"",
    "LICENSE": b"",
}
STOCK_LOADER = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from flwr.cli.install import install_from_fab
from flwr.clientapp.utils import get_load_client_app_fn
content = Path(sys.argv[1]).read_bytes()
install_from_fab(content, skip_prompt=True)
import hashlib
load = get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
load("rogue/rogue", "1.0.0", hashlib.sha256(content).hexdigest())
"""


def test_not_one_line_of_an_offered_app_runs(tmp_path, monkeypatch):
    from flwr.cli.build import build_fab_from_files
    from flwr.proto import fab_pb2, run_pb2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Flower's own, about pathspec
        fab, _ = build_fab_from_files(FAB_FILES)
    planted = tmp_path / "planted"
    monkeypatch.setenv("PLANTED", str(planted))
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    pki = make_pki(tmp_path / "pki")

    class Rogue(FleetDouble):
        """Offers the app on every way that Flower has: GetRun, GetFab, and inside a question."""

        def _get_run(self, _request):
            run = run_pb2.Run(run_id=41, fab_id="rogue/rogue", fab_version="1.0.0")
            return run_pb2.GetRunResponse(run=run)

        def _get_fab(self, _request):
            return fab_pb2.GetFabResponse(fab=fab_pb2.Fab(content=fab))

    with closing(Rogue(pki)) as double, Running(pki, double.address, tmp_path / "state"):
        for message in (
            question((fab,)),
            raw_question(
                RecordDict({"fab": ConfigRecord({"content": fab, "fab_id": "rogue/rogue"})})
            ),
            question((b"x",), kind="query.hello", recipient="north"),
            raw_question(RecordDict({}), kind="query.install"),
        ):
            double.reply_to(double.put(message))
        assert not {"get-run", "get-fab"} & set(double.calls)
    assert not planted.exists()
    assert not (tmp_path / "home").exists()
    assert "rogue_app" not in str(sys.modules)

    # The control: the same bytes, by the loader that a stock SuperNode uses.
    archive = tmp_path / "rogue.fab"
    archive.write_bytes(fab)
    subprocess.run(
        [sys.executable, "-c", STOCK_LOADER, str(archive)],
        check=True,
        capture_output=True,
        env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"},
        cwd=tmp_path,
        timeout=120,
    )
    assert planted.read_text() == "ran"


def test_telemetry_is_off_before_flower_is_loaded():
    """Whatever the environment says; asked of a fresh process."""
    code = (
        "import warnings, json, os; warnings.simplefilter('ignore'); import client.MODULE;"
        "from flwr.supercore import telemetry as t; print(json.dumps([os.environ['FLWR_TELEMETRY_ENABLED'],"
        "t.FLWR_TELEMETRY_ENABLED]))"
    )
    for module in ("app", "flower"):
        made = subprocess.run(
            [sys.executable, "-c", code.replace("MODULE", module)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "FLWR_TELEMETRY_ENABLED": "1", "PYTHONPATH": str(Path.cwd())},
            timeout=120,
        )
        assert json.loads(made.stdout) == ["0", "0"]
