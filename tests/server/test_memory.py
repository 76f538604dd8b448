"""How much memory the coordinator takes at once, counted in models (float32)."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from world import TRACER_EXPONENT, Events, Port, World

from common.ports import Tensors
from common.protocol.effects import PutBlob
from common.tensors import FiledTensors, Layout, TensorSpec, filed
from common.world import FileJournal
from server.driver import CoordinatorDriver
from server.round.effects import SendEach
from server.round.machine import CoordinatorRound

SIZE, TENSORS = 1 << 20, 16


def large_world() -> World:
    """Three hospitals and a model in many tensors."""
    world = World(3, rounds=2)
    specs = tuple(TensorSpec(f"t{at:02}", (SIZE // TENSORS,)) for at in range(TENSORS))
    world.terms = replace(
        world.terms,
        layout=Layout(specs),
        initial={spec.name: np.zeros(spec.shape, np.float32) for spec in specs},
        exponents=(TRACER_EXPONENT,) * TENSORS,
    )
    return world


def coordinate(world: World, folder: Path, keep: Callable[[Tensors], Tensors]) -> CoordinatorDriver:
    journal = FileJournal(folder)
    machine = CoordinatorRound(
        world.terms,
        world.deadlines,
        world.entropy["coordinator"],
        patience=world.patience,
        record=None,
        blob=journal.get_blob,
        keep=keep,
    )
    return CoordinatorDriver(
        machine,
        journal=journal,
        transport=Port(world, world.coordinator),
        clock=world.clock,
        evidence=Events("coordinator", world.events),
        observer=world,
    )


def most_models(world: World, driver: CoordinatorDriver) -> float:
    """The most that one call of the coordinator adds to what was there before it."""
    most = 0

    def receive(site: str, payload: bytes) -> None:
        nonlocal most
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        driver.receive(site, payload)
        most = max(most, tracemalloc.get_traced_memory()[1] - before)

    world.coordinator.driver, world.coordinator.up = driver, True
    world.coordinator.receive = receive
    for party in world.parties.values():
        party.start()
    tracemalloc.start()
    try:
        driver.start()
        world.run()
    finally:
        tracemalloc.stop()
    return most / (4 * SIZE)


def test_a_round_adds_one_model_to_a_coordinator_that_keeps_models_in_files(tmp_path):
    filing, holding = large_world(), large_world()
    keep = partial(filed, folder=tmp_path)
    driver = coordinate(filing, tmp_path / "filing", keep)
    assert most_models(filing, driver) < 1.4
    assert isinstance(driver.machine.chain.state, FiledTensors)
    assert driver.machine.state.sums == []
    # The control: what is held in memory counts.
    other = coordinate(holding, tmp_path / "holding", lambda state: state)
    assert most_models(holding, other) > 1.8
    assert [chain.state_digest for chain in filing.chains] == [
        chain.state_digest for chain in holding.chains
    ]
    assert len(filing.chains) == 3


def test_what_an_effect_held_is_gone_before_the_next_is_carried_out(tmp_path):
    driver = coordinate(large_world(), tmp_path, lambda state: state)
    seen: list[int] = []

    def parts():
        tracemalloc.reset_peak()
        yield bytes(1 << 22)

    def messages():
        seen.append(tracemalloc.get_traced_memory()[0])
        return ()

    effects = [PutBlob("large", [bytes(1 << 22)]), PutBlob("made", parts()), SendEach(messages)]
    tracemalloc.start()
    try:
        effects[0] = PutBlob("large", [bytes(1 << 22)])
        driver._execute(effects)
    finally:
        tracemalloc.stop()
    assert effects == []
    assert seen[0] < 1 << 20
