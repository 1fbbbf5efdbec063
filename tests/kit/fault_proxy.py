"""A proxy on loopback that does to HTTP what bad days do, by a seeded plan.

503      the server is not asked
reset    neither
lost     it is asked, and the connection is reset before its answer comes
upload   it gets half of the request's body
cut      its answer breaks off half-way
short    its answer ends half-way as if that were all of it
"""

import random
import socket
import socketserver
import struct
import threading
from collections import Counter
from collections.abc import Sequence

KINDS = ("503", "reset", "lost", "upload", "cut", "short")

_SLOW_DOWN = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    b"Content-Length: 39\r\n\r\n<Error><Code>SlowDown</Code></Error>   "
)


class FaultProxy(socketserver.ThreadingTCPServer):
    """Stands before a server at `port`; `done` counts the faults by kind."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int, *, seed: int, rate: float, kinds: Sequence[str] = KINDS) -> None:
        super().__init__(("127.0.0.1", 0), _Relay)
        self.upstream = ("127.0.0.1", port)
        self.done: Counter[str] = Counter()
        self._chance, self._rate, self._kinds = random.Random(seed), rate, kinds
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def choose(self, method: bytes) -> str:
        """The fate of the next request: none, or a fault that can happen to it."""
        meant = {"upload": b"PUT", "cut": b"GET", "short": b"GET"}
        fits = [kind for kind in self._kinds if meant.get(kind, method) == method]
        with self._lock:
            kind = self._chance.choice(fits) if self._chance.random() < self._rate else ""
            self.done[kind] += 1
            return kind


class _Relay(socketserver.BaseRequestHandler):
    server: FaultProxy

    def handle(self) -> None:
        self.request.settimeout(30)
        head, body = _message(self.request)
        if not head:
            return
        method, _, _ = head.partition(b" ")
        fault = self.server.choose(method)
        if fault == "503":
            self.request.sendall(_SLOW_DOWN)
        elif fault == "reset":
            self._reset(self.request)
        elif fault == "upload":
            with socket.create_connection(self.server.upstream, 30) as upstream:
                upstream.sendall(head + body[: len(body) // 2])
            self._reset(self.request)
        else:
            self._answer(fault, self._ask(head + body))

    def _ask(self, request: bytes) -> bytes:
        with socket.create_connection(self.server.upstream, 30) as upstream:
            upstream.sendall(request)
            return b"".join(iter(lambda: upstream.recv(1 << 16), b""))

    def _answer(self, fault: str, answer: bytes) -> None:
        head, _, body = answer.partition(b"\r\n\r\n")
        half = body[: len(body) // 2]
        if fault == "lost":
            self._reset(self.request)
        elif fault == "cut" and body:
            self.request.sendall(head + b"\r\n\r\n" + half)
        elif fault == "short" and body:
            lines = [
                b"Content-Length: %d" % len(half) if _is_length(line) else line
                for line in head.split(b"\r\n")
            ]
            self.request.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + half)
        else:
            self.request.sendall(answer)

    def _reset(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


def _is_length(line: bytes) -> bool:
    return line.lower().startswith(b"content-length:")


def _message(connection: socket.socket) -> tuple[bytes, bytes]:
    """Head (asking for one answer a connection) and body of a request; empty if there is none."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(1 << 16)
        if not part:
            return b"", b""
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(x.split(b":")[1]) for x in head.split(b"\r\n") if _is_length(x)), 0)
    while len(body) < length:
        part = connection.recv(1 << 16)
        if not part:  # its sender was killed
            return b"", b""
        body += part
    return head + b"\r\nConnection: close\r\n\r\n", body
