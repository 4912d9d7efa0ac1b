"""Stand between the program and an S3 server, and break what passes as networks and servers do.

Everything goes through unchanged unless a fault is due. Objects are read whole before they are
passed on: the tests' objects are small. The program only ever sends GET.
"""

import functools
import http.client
import os
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from conftest import FAULTS


class Answer(NamedTuple):
    """Hold one answer; header names are in lower case."""

    status: int
    headers: "dict[str, str]"
    body: bytes


class Exchange(BaseHTTPRequestHandler):
    """Carry one request to the server and its answer back; faults act on it."""

    protocol_version = "HTTP/1.1"
    server: "FaultProxy"

    def fetch(self) -> Answer:
        """Ask the real server."""
        connection = http.client.HTTPConnection(self.server.upstream, timeout=30)
        connection.request("GET", self.path, headers=dict(self.headers))
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        answer = Answer(response.status, headers, response.read())
        connection.close()
        if answer.status == 200:
            self.server.whole[self.path] = answer
        return answer

    def send(self, answer: Answer, to: "int | None" = None) -> None:
        """Send an answer; cut off after `to` bytes of its body."""
        self.send_response_only(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body[:to])

    def do_GET(self) -> None:
        """Pass a request on, through the fault that is due for it."""
        listing = "list-type" in urllib.parse.urlsplit(self.path).query
        fault = self.server.note("listing" if listing else "object", self.headers)
        try:
            if fault:
                fault(self)
            else:
                self.send(self.fetch())
        except (OSError, http.client.HTTPException):  # either side went away
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


Fault = Callable[[Exchange], object]


class FaultProxy(ThreadingHTTPServer):
    """Run the proxy in a thread for as long as the `with` block lasts."""

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.upstream = urllib.parse.urlsplit(endpoint).netloc
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        # Set the faults of the next requests (None: no fault), and that of all later ones.
        self.on_object = functools.partial(self.plan, "object")
        self.on_listing = functools.partial(self.plan, "listing")
        self.whole: dict[str, Answer] = {}  # the last answer with all of an object, by path
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.reset()

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def reset(self) -> None:
        """Forget all faults and all requests."""
        self.requests: list[tuple[str, http.client.HTTPMessage]] = []
        self.plans: dict[str, tuple[list[Fault | None], Fault | None]] = {}

    def plan(self, kind: str, *faults: "Fault | None", always: "Fault | None" = None) -> None:
        self.plans[kind] = (list(faults), always)

    def note(self, kind: str, headers: http.client.HTTPMessage) -> "Fault | None":
        """Record a request and return the fault that is due for it."""
        with self.lock:
            self.requests.append((kind, headers))
            faults, always = self.plans.get(kind, ([], None))
            fault = faults.pop(0) if faults else always
            FAULTS["answers of the bucket cut, delayed, altered or refused"] += fault is not None
            return fault

    def asked(self, kind: str) -> "list[http.client.HTTPMessage]":
        """Return the headers of the requests of one kind so far."""
        return [headers for of_kind, headers in list(self.requests) if of_kind == kind]

    def handle_error(self, *_: object) -> None:
        """Keep quiet: a client that goes away is what the tests are about."""


# --- the faults


def cut(at: "int | None", then: "Callable[[Exchange], object]" = bool) -> Fault:
    """End the connection after `at` bytes of the body (None: without an answer)."""

    def fault(exchange: Exchange) -> None:
        exchange.close_connection = True
        if at is not None:
            exchange.send(exchange.fetch(), at)
        then(exchange)

    return fault


def reset(at: int) -> Fault:
    """Reset the connection (RST) after `at` bytes of the body."""

    def then(exchange: Exchange) -> None:
        time.sleep(0.05)  # a reset overtakes what is still on the way
        linger = struct.pack("ii", 1, 0)
        exchange.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        os.close(exchange.connection.detach())  # before anything says goodbye

    return cut(at, then)


def stall(at: "int | None") -> Fault:
    """Send `at` bytes of the body (None: no answer at all), then nothing more, and stay open."""
    return cut(at, lambda exchange: exchange.server.closing.wait(60))


def drip(size: int, pause: float) -> Fault:
    """Send the body `size` bytes at a time, with a pause before each piece."""

    def fault(exchange: Exchange) -> None:
        answer = exchange.fetch()
        exchange.send(answer, 0)
        for start in range(0, len(answer.body), size):
            exchange.server.closing.wait(pause)
            exchange.wfile.write(answer.body[start : start + size])

    return fault


def change(alter: "Callable[[Answer], Answer]") -> Fault:
    """Send the server's answer with something about it changed."""
    return lambda exchange: exchange.send(alter(exchange.fetch()))


def flip(at: int) -> Fault:
    """Flip one bit of the body's byte `at`."""
    flipped = lambda b: b[:at] + bytes([b[at] ^ 1]) + b[at + 1 :]  # noqa: E731
    return change(lambda answer: answer._replace(body=flipped(answer.body)))


def header(body: slice = slice(None), **headers: object) -> Fault:
    """Change headers of the answer (content_range="bytes 0-1/2"), and keep a part of the body."""
    changed = {name.replace("_", "-"): str(value) for name, value in headers.items()}
    return change(lambda a: Answer(a.status, {**a.headers, **changed}, a.body[body]))


def ignore_range() -> Fault:
    """Send the whole object, with status 200, where a part was asked for.

    It is from an earlier answer: without its Range, a request would not fit its signature.
    """
    return lambda exchange: exchange.send(exchange.server.whole[exchange.path])


def status(code: int, s3_code: str) -> Fault:
    """Answer with an S3 error."""
    return say(code, f"<Error><Code>{s3_code}</Code><Message>injected</Message></Error>")


def say(code: int, text: str = "") -> Fault:
    """Answer with this text in the server's place."""
    answer = Answer(code, {"content-length": str(len(text.encode()))}, text.encode())
    return lambda exchange: exchange.send(answer)


def after(action: "Callable[[], object]") -> Fault:
    """Do something (such as replacing the object) when the request arrives, then go on."""
    return lambda exchange: (action(), exchange.send(exchange.fetch()))
