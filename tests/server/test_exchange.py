"""The exchange over Flower's public Grid: one signed question a site, and who may answer it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict

import server.app as shell
from common.crypto.identity import SiteKey
from common.errors import AbortedRound, Code
from common.protocol.envelope import COORDINATOR, check_envelope, sign_envelope
from common.protocol.wire import BurnRequest, HandshakeOpen, RunKeys, pack
from common.world import ManualClock
from server.app import Exchange, Pace
from tests.flower_grid import InProcessGrid
from tests.flower_node import error, question, records, reply

STUDY = b"S" * 32
COORDINATOR_KEY = SiteKey.from_seed(b"c" * 32)
KEYS = {
    site: SiteKey.from_seed(site.encode().ljust(32, b".")) for site in ("ash", "birch", "cedar")
}
ROSTER = {site: key.public for site, key in KEYS.items()}
PLAIN = pack(RunKeys(1, ()))


def burn(number: int = 1) -> bytes:
    return pack(BurnRequest(STUDY, b"r" * 32, number))


def opening(number: int = 1) -> bytes:
    return pack(HandshakeOpen(STUDY, b"r" * 32, number, ("ash", "birch")))


class Watch:
    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def arrived(self, site: str) -> None:
        self.seen.append(("arrived", site))

    def left(self, site: str) -> None:
        self.seen.append(("left", site))

    def answered(self, site: str, size: int, seconds: float, code: str) -> None:
        self.seen.append(("answered", site, size, code))

    def refused(self, site: str, code: Code) -> None:
        self.seen.append(("refused", site, code))

    def lost(self, site: str, code: str) -> None:
        self.seen.append(("lost", site, code))


@dataclasses.dataclass
class Machine:
    next_wakeup: float = math.inf


class Driver:
    """Remembers what reached it."""

    def __init__(self) -> None:
        self.machine = Machine()
        self.got: list[tuple[str, bytes]] = []
        self.ticks = 0
        self.started = 0
        self.fault: Exception | None = None

    def start(self) -> None:
        self.started += 1

    def receive(self, site: str, payload: bytes) -> None:
        if self.fault is not None:
            raise self.fault
        self.got.append((site, payload))

    def tick(self) -> None:
        self.ticks += 1
        self.machine.next_wakeup = math.inf


class Scene:
    def __init__(self, **pace: float) -> None:
        self.grid, self.clock, self.watch = InProcessGrid(), ManualClock(), Watch()
        self.driver = Driver()
        self.names: dict[int, str] = {}
        self.exchange = Exchange(
            self.grid,
            COORDINATOR_KEY,
            STUDY,
            ROSTER,
            self.clock,
            registered=self.names.get,
            watch=self.watch,
            pace=Pace(look_s=0.0, **pace),
            pause=lambda seconds: self.clock.skip_to(self.clock.now() + seconds),
        )

    def step(self) -> None:
        self.exchange.step(self.driver)

    def answer(self, node: int, site: str, *payloads: bytes, code: str = "") -> None:
        asked = self.grid.last(node)
        self.grid.answer(asked, reply(asked, KEYS[site], site, payloads, code))
        self.step()

    def arrive(self, node: int, site: str) -> None:
        self.grid.come(node)
        self.step()
        self.answer(node, site, b"hello")


@pytest.fixture
def scene() -> Scene:
    return Scene()


@pytest.fixture
def ash(scene: Scene) -> Scene:
    scene.arrive(7, "ash")
    return scene


# ---------------------------------------------------------------------------- hello
def test_a_new_node_is_asked_who_it_is(scene: Scene):
    scene.grid.come(7)
    scene.step()
    asked = scene.grid.last(7)
    envelope, payloads = question(asked)
    assert asked.metadata.message_type == "query.hello"
    assert (envelope.recipient, payloads) == ("", ())
    check_envelope(
        envelope,
        payloads,
        public=COORDINATOR_KEY.public,
        study=STUDY,
        sender=COORDINATOR,
        recipient="",
        nonce=envelope.nonce,
    )


def test_a_signed_hello_makes_the_node_the_site(ash: Scene):
    assert ash.driver.got == [("ash", b"hello")]
    present = ash.exchange.presence()
    assert present["ash"].online
    assert not present["birch"].online
    assert ("arrived", "ash") in ash.watch.seen


def test_every_question_has_its_own_nonce_and_a_term(scene: Scene):
    for node in range(5):
        scene.grid.come(node)
    scene.step()
    nonces = {question(asked)[0].nonce for asked in scene.grid.pushed}
    assert len(nonces) == 5
    assert {asked.metadata.ttl for asked in scene.grid.pushed} == {Pace().question_s}


def test_an_answer_without_a_payload_tells_why(scene: Scene):
    scene.grid.come(7)
    scene.step()
    scene.answer(7, "ash", code=Code.NOT_PUBLISHED.label)
    assert scene.driver.got == []
    assert scene.exchange.presence()["ash"].code == Code.NOT_PUBLISHED.label


# ---------------------------------------------------------------------------- refused answers
def altered(scene: Scene, **changes: Any) -> None:
    """Answer the hello of node 7 with a well-signed envelope that is then changed."""
    scene.grid.come(7)
    scene.step()
    asked = scene.grid.last(7)
    told = question(asked)[0]
    envelope = sign_envelope(
        KEYS["ash"],
        study=told.study,
        sender="ash",
        recipient=COORDINATOR,
        nonce=told.nonce,
        payloads=(b"hello",),
    )
    payloads = changes.pop("payloads", (b"hello",))
    scene.grid.answer(asked, records(dataclasses.replace(envelope, **changes), payloads))
    scene.step()


def refusals(scene: Scene) -> list[Code]:
    return [seen[2] for seen in scene.watch.seen if seen[0] == "refused"]


def test_an_unaltered_answer_passes(scene: Scene):
    altered(scene)
    assert scene.driver.got == [("ash", b"hello")]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"payloads": (b"hellO",)}, Code.MESSAGE_SIGNATURE),
        ({"payloads": (b"hello", b"more")}, Code.MESSAGE_SIGNATURE),
        ({"payloads": ()}, Code.MESSAGE_SIGNATURE),
        ({"sender": "birch"}, Code.MESSAGE_SIGNATURE),
        ({"sender": "nobody"}, Code.SIGNER_UNKNOWN),
        ({"sender": "No Site"}, Code.MALFORMED),
        ({"study": b"T" * 32}, Code.MESSAGE_SIGNATURE),
        ({"study": b"T"}, Code.MALFORMED),
        ({"recipient": "ash"}, Code.MESSAGE_SIGNATURE),
        ({"nonce": b"n" * 16}, Code.MESSAGE_SIGNATURE),
        ({"nonce": b""}, Code.MALFORMED),
        ({"code": Code.USAGE.label}, Code.MESSAGE_SIGNATURE),
        ({"signature": bytes(64)}, Code.MESSAGE_SIGNATURE),
        ({"signature": b""}, Code.MALFORMED),
    ],
)
def test_an_altered_answer_changes_nothing(scene: Scene, changes: dict[str, Any], code: Code):
    altered(scene, **changes)
    assert refusals(scene) == [code]
    assert scene.driver.got == []
    assert not scene.exchange.presence()["ash"].online


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({}),
        RecordDict({"envelope": ConfigRecord({})}),
        RecordDict({"envelope": ArrayRecord({})}),
        RecordDict({"envelope": ConfigRecord({"study": b"", "extra": 1})}),
    ],
)
def test_an_answer_of_another_form_is_refused(scene: Scene, content: RecordDict):
    scene.grid.come(7)
    scene.step()
    scene.grid.answer(scene.grid.last(7), content)
    scene.step()
    assert refusals(scene) == [Code.MALFORMED]


@pytest.mark.parametrize(
    "array",
    [
        Array(dtype="int8", shape=(5,), stype="wardround.bytes", data=b"hello"),
        Array(dtype="uint8", shape=(6,), stype="wardround.bytes", data=b"hello"),
        Array(dtype="uint8", shape=(5,), stype="numpy.ndarray", data=b"hello"),
    ],
)
def test_a_payload_that_is_not_plain_bytes_is_refused(scene: Scene, array: Array):
    scene.grid.come(7)
    scene.step()
    asked = scene.grid.last(7)
    answer = reply(asked, KEYS["ash"], "ash", (b"hello",))
    answer.content["payload-0"] = ArrayRecord({"data": array})
    scene.grid.answer(asked, answer)
    scene.step()
    assert refusals(scene) == [Code.MALFORMED]


def test_an_answer_above_the_bound_is_refused():
    scene = Scene(most_answer=4)
    altered(scene)
    assert refusals(scene) == [Code.OVERSIZED]


def test_too_many_payloads_are_refused(scene: Scene):
    scene.grid.come(7)
    scene.step()
    asked = scene.grid.last(7)
    answer = reply(asked, KEYS["ash"], "ash", ())
    answer.content["envelope"]["payloads"] = 65
    scene.grid.answer(asked, answer)
    scene.step()
    assert refusals(scene) == [Code.OVERSIZED]


def test_an_answer_to_an_earlier_question_is_not_one_to_this(ash: Scene):
    ash.exchange.send("ash", burn(1))
    ash.step()
    kept = reply(ash.grid.last(7), KEYS["ash"], "ash", (b"first",))
    ash.grid.answer(ash.grid.last(7), kept)
    ash.step()
    ash.exchange.send("ash", burn(2))
    ash.step()
    ash.grid.answer(ash.grid.last(7), kept.content)
    ash.step()
    assert ash.driver.got[1:] == [("ash", b"first")]
    assert refusals(ash) == [Code.MESSAGE_SIGNATURE]


def test_a_node_registered_as_another_site_is_refused(scene: Scene):
    scene.names[7] = "birch"
    altered(scene)
    assert refusals(scene) == [Code.SIGNER_UNKNOWN]
    assert ("refused", "birch", Code.SIGNER_UNKNOWN) in scene.watch.seen


def test_a_site_may_not_answer_in_the_name_of_another(ash: Scene):
    ash.exchange.send("ash", burn())
    ash.step()
    asked = ash.grid.last(7)
    ash.grid.answer(asked, reply(asked, KEYS["birch"], "birch", (b"x",)))
    ash.step()
    assert refusals(ash) == [Code.MESSAGE_SIGNATURE]


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, True),
        ({"sender": "birch"}, False),
        ({"study": b"T" * 32}, False),
        ({"recipient": "ash"}, False),
    ],
)
def test_what_a_site_signs_itself_must_be_about_this_question(
    ash: Scene, changes: dict[str, Any], passes: bool
):
    ash.exchange.send("ash", burn())
    ash.step()
    asked = ash.grid.last(7)
    told: dict[str, Any] = {"study": STUDY, "sender": "ash", "recipient": COORDINATOR, **changes}
    envelope = sign_envelope(
        KEYS["ash"], nonce=question(asked)[0].nonce, payloads=(b"mine",), **told
    )
    ash.grid.answer(asked, records(envelope, (b"mine",)))
    ash.step()
    assert (("ash", b"mine") in ash.driver.got) == passes
    assert refusals(ash) == ([] if passes else [Code.MESSAGE_SIGNATURE])


def test_a_node_of_no_site_of_the_study_is_not_asked(scene: Scene):
    scene.names[7] = "elm"
    scene.grid.come(7)
    scene.step()
    assert scene.grid.pushed == []


def test_after_a_refusal_the_node_is_asked_again_but_not_in_a_storm(scene: Scene):
    altered(scene, signature=bytes(64))
    for _ in range(10):
        scene.step()
    assert scene.grid.count(7) == 1
    scene.clock.skip_to(31.0)
    scene.step()
    assert scene.grid.count(7) == 2


# ---------------------------------------------------------------------------- questions
def test_what_is_sent_while_a_question_is_out_waits_and_goes_in_order(ash: Scene):
    for payload in (PLAIN, b"two", b"three"):
        ash.exchange.send("ash", payload)
        ash.step()
    assert ash.grid.count(7) == 2
    ash.answer(7, "ash", b"done")
    assert question(ash.grid.last(7))[1] == (b"two", b"three")


@pytest.mark.parametrize("fresh", [burn(), opening()])
def test_a_new_beginning_supersedes_what_waits(ash: Scene, fresh: bytes):
    ash.exchange.send("ash", PLAIN)
    ash.step()
    ash.exchange.send("ash", b"stale")
    ash.exchange.send("ash", fresh)
    ash.exchange.send("ash", b"after")
    ash.answer(7, "ash")
    assert question(ash.grid.last(7))[1] == (fresh, b"after")


def test_an_identical_message_is_not_queued_twice(ash: Scene):
    ash.exchange.send("ash", burn())
    ash.step()
    ash.exchange.send("ash", bytes(burn()))
    ash.exchange.send("ash", b"other")
    ash.exchange.send("ash", b"other")
    ash.answer(7, "ash")
    assert question(ash.grid.last(7))[1] == (b"other",)
    ash.answer(7, "ash")
    ash.exchange.send("ash", burn())  # answered meanwhile: asked again
    ash.step()
    assert question(ash.grid.last(7))[1] == (burn(),)


def test_more_messages_than_one_question_carries_go_in_two(ash: Scene):
    ash.exchange.send("ash", PLAIN)
    ash.step()
    many = [b"%d" % i for i in range(70)]
    for payload in many:
        ash.exchange.send("ash", payload)
    ash.answer(7, "ash")
    first = question(ash.grid.last(7))[1]
    ash.answer(7, "ash")
    assert [*first, *question(ash.grid.last(7))[1]] == many


def test_a_message_for_a_site_that_is_not_here_goes_nowhere(scene: Scene):
    scene.exchange.send("ash", burn())
    scene.exchange.send("nobody", burn())
    scene.arrive(7, "ash")
    assert scene.grid.count(7) == 1


def test_a_round_start_is_labelled_as_training(ash: Scene, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shell, "RoundStart", BurnRequest)
    ash.exchange.send("ash", burn())
    ash.step()
    assert ash.grid.last(7).metadata.message_type == "train.step"
    ash.answer(7, "ash")
    ash.exchange.send("ash", PLAIN)
    ash.step()
    assert ash.grid.last(7).metadata.message_type == "query.step"


# ---------------------------------------------------------------------------- coming and going
def test_a_node_that_comes_back_is_asked_anew_and_its_old_answer_is_dropped(ash: Scene):
    ash.exchange.send("ash", burn())
    ash.step()
    old = ash.grid.last(7)
    ash.grid.come(7, "t1")
    ash.step()
    assert ash.grid.last(7).metadata.message_type == "query.hello"
    assert ("left", "ash") in ash.watch.seen
    ash.grid.answer(old, reply(old, KEYS["ash"], "ash", (b"late",)))
    ash.step()
    assert ("ash", b"late") not in ash.driver.got
    ash.answer(7, "ash", b"hello again")
    assert ash.driver.got[-1] == ("ash", b"hello again")


def test_a_node_that_goes_takes_its_question_and_outbox_along(ash: Scene):
    ash.exchange.send("ash", burn())
    ash.step()
    ash.exchange.send("ash", b"waiting")
    ash.grid.go(7)
    ash.step()
    present = ash.exchange.presence()["ash"]
    assert not present.online
    assert not present.asked
    assert ash.exchange.quiet
    ash.arrive(8, "ash")
    assert ash.grid.count(8) == 1


def test_a_site_has_one_node_the_one_that_answered_last(ash: Scene):
    ash.arrive(8, "ash")
    ash.exchange.send("ash", burn())
    ash.step()
    assert (ash.grid.count(7), ash.grid.count(8)) == (1, 2)


def test_flowers_own_error_is_of_the_question_not_of_the_node_it_names(ash: Scene):
    ash.arrive(8, "birch")
    ash.exchange.send("birch", burn())
    ash.step()
    ash.grid.superlink_error(ash.grid.last(8), 5)
    ash.step()
    assert ("lost", "birch", "flower-5") in ash.watch.seen
    assert ash.exchange.presence()["ash"].online
    ash.clock.skip_to(3.0)
    ash.step()
    assert ash.grid.last(8).metadata.message_type == "query.hello"


def test_after_an_error_the_hello_goes_before_what_waits(ash: Scene):
    ash.exchange.send("ash", burn())
    ash.step()
    ash.exchange.send("ash", b"waiting")
    ash.grid.superlink_error(ash.grid.last(7), 3)
    ash.step()
    assert ash.grid.count(7) == 2
    ash.clock.skip_to(3.0)
    ash.step()
    assert ash.grid.last(7).metadata.message_type == "query.hello"
    ash.answer(7, "ash", b"hello")
    assert question(ash.grid.last(7))[1] == (b"waiting",)


def test_a_code_told_without_a_signature_is_shown_and_nothing_else(ash: Scene):
    ash.exchange.send("ash", burn())
    ash.step()
    asked = ash.grid.last(7)
    ash.grid.answer(asked, error(asked, Code.MESSAGE_SIGNATURE.label))
    ash.step()
    assert ash.exchange.presence()["ash"].code == Code.MESSAGE_SIGNATURE.label
    assert len(ash.driver.got) == 1


def test_text_in_an_error_of_a_hospital_is_not_passed_on(ash: Scene):
    ash.exchange.send("ash", burn())
    ash.step()
    asked = ash.grid.last(7)
    ash.grid.answer(asked, error(asked, "patient 4711 has no diagnosis"))
    ash.step()
    assert not any("4711" in str(seen) for seen in ash.watch.seen)


def test_a_silent_site_is_asked_who_it_is(ash: Scene):
    ash.step()
    assert ash.grid.count(7) == 1
    ash.clock.skip_to(30.0)
    ash.step()
    assert ash.grid.last(7).metadata.message_type == "query.hello"
    assert ash.grid.count(7) == 2


def test_a_site_at_work_is_left_alone(ash: Scene):
    ash.exchange.send("ash", burn())
    ash.step()
    ash.clock.skip_to(36000.0)
    ash.step()
    assert ash.grid.count(7) == 2


def test_a_push_that_fails_is_tried_again_with_a_hello(ash: Scene):
    ash.grid.refuses = True
    ash.exchange.send("ash", burn())
    ash.step()
    ash.grid.refuses = False
    ash.clock.skip_to(3.0)
    ash.step()
    assert ash.grid.last(7).metadata.message_type == "query.hello"
    ash.answer(7, "ash", b"hello")
    assert question(ash.grid.last(7))[1] == (burn(),)


def test_a_site_that_is_forgotten_is_not_asked_and_not_heard(ash: Scene):
    ash.exchange.send("ash", burn())
    ash.step()
    asked = ash.grid.last(7)
    ash.exchange.forget("ash")
    ash.grid.answer(asked, reply(asked, KEYS["ash"], "ash", (b"late",)))
    ash.step()
    ash.exchange.send("ash", burn(2))
    ash.clock.skip_to(100.0)
    ash.step()
    assert ("ash", b"late") not in ash.driver.got
    assert ash.grid.count(7) == 2
    assert not ash.exchange.presence()["ash"].online


def test_a_forgotten_site_that_comes_back_on_another_node_is_refused(ash: Scene):
    ash.exchange.forget("ash")
    ash.grid.come(9)
    ash.step()
    ash.answer(9, "ash", b"hello")
    assert refusals(ash) == [Code.SIGNER_UNKNOWN]


# ---------------------------------------------------------------------------- figures, loop
def test_presence_counts_payload_bytes_and_times(ash: Scene):
    ash.clock.skip_to(5.0)
    ash.exchange.send("ash", burn())
    ash.step()
    assert ash.exchange.presence()["ash"].asked
    ash.clock.skip_to(9.0)
    ash.answer(7, "ash", b"four", b"five!")
    present = ash.exchange.presence()["ash"]
    assert (present.last_sent, present.last_heard) == (5.0, 9.0)
    assert (present.bytes_up, present.bytes_down) == (len("hello") + 9, len(burn()))


def test_a_site_that_is_not_heard_of_at_all_is_shown_as_offline(ash: Scene):
    ash.exchange._silence = {"ash": 36.0}.get
    assert not ash.exchange.presence()["ash"].online
    ash.exchange._silence = {"ash": 34.0}.get
    assert ash.exchange.presence()["ash"].online


def test_the_machine_is_woken_at_its_time(scene: Scene):
    scene.driver.machine.next_wakeup = 2.0
    scene.step()
    assert scene.driver.ticks == 0
    scene.clock.skip_to(2.0)
    scene.step()
    assert scene.driver.ticks == 1


def test_serve_begins_ends_and_tells_everybody_who_is_here(ash: Scene):
    ash.exchange.send("ash", burn())
    taken: list[int] = []

    def over() -> bool:
        if ash.exchange.presence()["ash"].asked and len(taken) < 5:
            taken.append(1)
        if len(taken) == 5:
            asked = ash.grid.last(7)
            ash.grid.answer(asked, reply(asked, KEYS["ash"], "ash", ()))
        return True

    ash.exchange.serve(ash.driver, over)
    assert ash.driver.started == 1
    assert ash.exchange.quiet
    assert ash.clock.now() < Pace().linger_s


def test_serve_does_not_wait_for_ever_for_one_that_does_not_answer(ash: Scene):
    ash.exchange.send("ash", burn())
    ash.exchange.serve(ash.driver, lambda: True)
    assert ash.clock.now() >= Pace().linger_s
    assert not ash.exchange.quiet


def test_the_drivers_faults_end_the_loop(ash: Scene):
    ash.driver.fault = AbortedRound(Code.QUORUM_LOST, "Too few.")
    ash.exchange.send("ash", burn())
    ash.step()
    with pytest.raises(AbortedRound):
        ash.answer(7, "ash", b"x")


# ---------------------------------------------------------------------------- the app
def test_the_server_app_serves_the_bound_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shell, "_BOUND", [])
    served: list[object] = []
    grid = InProcessGrid()
    context = Context(1, 1, {}, RecordDict(), {})
    with pytest.raises(RuntimeError, match="no run is bound"):
        shell.app(grid, context)
    shell.bind(served.append)
    shell.app(grid, context)
    assert served == [grid]
