"""A TCP line between a hospital and its coordinator that can be cut, stalled and made thin."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

SLICE = 1 << 14


class Line:
    """Forwards 127.0.0.1:`port` to 127.0.0.1:`target`.

    Attributes:
        rate: bytes per second each way; None: as fast as it goes.
        up, down: bytes carried so far.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._pairs: set[socket.socket] = set()
        self._open = threading.Event()
        self._open.set()
        self._flows = threading.Event()
        self._flows.set()
        self._closed = False
        self._left: int | None = None
        self.rate: float | None = None
        self.up = self.down = self.cuts = 0
        self._free = {True: 0.0, False: 0.0}
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break every connection and refuse new ones."""
        self._open.clear()
        self._break()

    def mend(self) -> None:
        """Work again."""
        self._open.set()
        self._flows.set()

    def stall(self) -> None:
        """Carry nothing more, without breaking anything: a firewall that forgot."""
        self._flows.clear()

    def break_after(self, count: int) -> None:
        """Break the connections once `count` more bytes have gone either way, in mid-transfer."""
        with self._lock:
            self._left = count

    def close(self) -> None:
        self._closed = True
        self._listener.close()
        self._flows.set()
        self._break()

    def _break(self) -> None:
        self.cuts += 1
        with self._lock:
            pairs, self._pairs = self._pairs, set()
        for one in pairs:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if not self._open.is_set():
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target), 2)
                far.settimeout(None)
            except OSError:
                near.close()
                continue
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._pairs |= {near, far}
            for one, other, up in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pump, args=(one, other, up), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        try:
            while data := source.recv(SLICE):
                self._flows.wait()
                self._pace(len(data), up)
                sink.sendall(data)
                with self._lock:
                    if up:
                        self.up += len(data)
                    else:
                        self.down += len(data)
                    if self._left is not None:
                        self._left -= len(data)
                    over = self._left is not None and self._left <= 0
                    if over:
                        self._left = None
                if over:
                    self._break()
        except OSError:
            pass
        for one in (source, sink):
            with self._lock:
                self._pairs.discard(one)
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _pace(self, count: int, up: bool) -> None:
        if self.rate is None:
            return
        with self._lock:
            start = max(time.monotonic(), self._free[up])
            self._free[up] = start + count / self.rate
        time.sleep(max(0.0, start - time.monotonic()))
