"""A hospital of stock Flower: keys, a copy of the model as its update, shares."""

from __future__ import annotations

import os

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


def told(message: Message, **fields: bytes) -> Message:
    return Message(RecordDict({"config": ConfigRecord(dict(fields))}), reply_to=message)


@app.query("setup")
def setup(message: Message, context: Context) -> Message:
    del context
    return told(message, key=os.urandom(32))


@app.query("share_keys")
def share_keys(message: Message, context: Context) -> Message:
    del context
    return told(message, shares=os.urandom(256))


@app.train()
def train(message: Message, context: Context) -> Message:
    del context
    record = message.content["model"]
    update = ArrayRecord()
    step = np.float32(int.from_bytes(os.urandom(2), "big") / 65536)
    for name in list(record):
        part = record[name].numpy()
        update[name] = Array((part + step).astype(np.float32))
    return Message(RecordDict({"update": update}), reply_to=message)


@app.query("unmask")
def unmask(message: Message, context: Context) -> Message:
    del context
    return told(message, shares=os.urandom(256))
