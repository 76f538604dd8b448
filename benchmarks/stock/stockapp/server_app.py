"""setup, share keys, train, unmask: four questions a round to every hospital."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


def ask(grid: Grid, nodes: list[int], kind: str, content: Any, timeout: float) -> dict[int, Any]:
    messages = [
        Message(content, dst_node_id=node, message_type=kind, ttl=timeout) for node in nodes
    ]
    replies = list(grid.send_and_receive(messages, timeout=timeout))
    for reply in replies:
        if reply.has_error():
            raise RuntimeError(f"a hospital failed: {reply.error}")
    return {reply.metadata.src_node_id: reply for reply in replies}


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    notes, timeout = Path(str(config["notes"])), float(config["timeout"])
    hospitals, dim, tensors = (int(config[key]) for key in ("hospitals", "dim", "tensors"))
    while len(nodes := sorted(grid.get_node_ids())) < hospitals:
        time.sleep(0.5)
    # No two arrays are equal: Flower sends equal ones once.
    stream = np.random.default_rng(1)
    model = [stream.standard_normal(dim // tensors, np.float32) for _ in range(tensors)]
    note(notes, 0)
    for number in range(1, int(config["rounds"]) + 1):
        hello = RecordDict({"config": ConfigRecord({"round": number})})
        replies = ask(grid, nodes, "query.setup", hello, timeout)
        keys = {str(node): reply.content["config"]["key"] for node, reply in replies.items()}
        ask(grid, nodes, "query.share_keys", RecordDict({"config": ConfigRecord(keys)}), timeout)
        arrays = ArrayRecord({f"t{at}": Array(part) for at, part in enumerate(model)})
        replies = ask(grid, nodes, "train", RecordDict({"model": arrays}), timeout)
        model = mean(replies, tensors)
        del arrays, replies
        alive = RecordDict({"config": ConfigRecord({"alive": nodes})})
        ask(grid, nodes, "query.unmask", alive, timeout)
        note(notes, number)


def mean(replies: dict[int, Any], tensors: int) -> list[Any]:
    """One hospital's arrays at a time."""
    total: list[Any] = []
    for node in list(replies):
        record = replies.pop(node).content["update"]
        for at in range(tensors):
            part = record[f"t{at}"].numpy()
            if len(total) <= at:
                total.append(part.copy())
            else:
                total[at] += part
        del record
    return total


def note(path: Path, number: int) -> None:
    with path.open("a") as file:
        file.write(json.dumps({"round": number, "at": time.monotonic()}) + "\n")
