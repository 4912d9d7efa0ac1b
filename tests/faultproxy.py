"""Stand between the program and an S3 server, and break what passes as networks and servers do.

Everything goes through unchanged unless a fault is due. Objects are read whole before they are
passed on: the tests' objects are small.
"""

import functools
import http.client
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from conftest import FAULTS

RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Request(NamedTuple):
    """Hold one request; header names are in lower case."""

    method: str
    path: str
    headers: "dict[str, str]"
    body: bytes

    @property
    def kind(self) -> str:
        """Return "listing", "object" or, where it is no GET, the method."""
        listing = "list-type" in urllib.parse.urlsplit(self.path).query
        return self.method if self.method != "GET" else "listing" if listing else "object"


class Answer(NamedTuple):
    """Hold one answer; header names are in lower case."""

    status: int
    headers: "dict[str, str]"
    body: bytes


class Exchange(BaseHTTPRequestHandler):
    """Carry one request to the server and its answer back; faults act on it."""

    protocol_version = "HTTP/1.1"
    server: "ProxyServer"

    def fetch(self, request: Request) -> Answer:
        """Ask the real server."""
        connection = http.client.HTTPConnection(self.server.upstream, timeout=30)
        connection.request(request.method, request.path, request.body or None, request.headers)
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        answer = Answer(response.status, headers, response.read())
        connection.close()
        if request.kind == "object" and answer.status == 200:
            self.server.whole[request.path] = answer
        return answer

    def send(self, answer: Answer, to: "int | None" = None) -> None:
        """Send an answer; cut off after `to` bytes of its body."""
        self.send_response_only(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body[:to])

    def handle_request(self) -> None:
        """Pass a request on, through the fault that is due for it."""
        size = int(self.headers.get("content-length") or 0)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, self.rfile.read(size))
        fault = self.server.note(request)
        try:
            if fault:
                fault(self, request)
            else:
                self.send(self.fetch(request))
        except (OSError, http.client.HTTPException):  # either side went away
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


Fault = Callable[[Exchange, Request], None]


class ProxyServer(ThreadingHTTPServer):
    """Hold what the exchanges share."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.upstream = upstream
        self.requests: list[Request] = []
        # By kind of request: the faults of the next ones, and that of all later ones.
        self.plans: dict[str, tuple[list[Fault | None], Fault | None]] = {}
        self.whole: dict[str, Answer] = {}  # the last answer to a GET of all of an object, by path
        self.lock, self.closing = threading.Lock(), threading.Event()

    def note(self, request: Request) -> "Fault | None":
        """Record a request and return the fault that is due for it."""
        with self.lock:
            self.requests.append(request)
            faults, always = self.plans.get(request.kind, ([], None))
            fault = faults.pop(0) if faults else always
            FAULTS["answers of the bucket cut, delayed, altered or refused"] += fault is not None
            return fault

    def shutdown_request(self, request: socket.socket) -> None:
        """Close a connection; one that is to be reset must not say goodbye first."""
        linger = request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, len(RESET_ON_CLOSE))
        if linger == RESET_ON_CLOSE:
            self.close_request(request)
        else:
            super().shutdown_request(request)

    def handle_error(self, *_: object) -> None:
        """Keep quiet: a client that goes away is what the tests are about."""


class FaultProxy:
    """Run the proxy in a thread for as long as the `with` block lasts."""

    def __init__(self, endpoint: str) -> None:
        self.server = ProxyServer(urllib.parse.urlsplit(endpoint).netloc)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        # Set the faults of the next GETs (None: no fault), and that of all later ones.
        self.on_object = functools.partial(self.plan, "object")
        self.on_listing = functools.partial(self.plan, "listing")

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def plan(self, kind: str, *faults: "Fault | None", always: "Fault | None" = None) -> None:
        self.server.plans[kind] = (list(faults), always)

    def reset(self) -> None:
        """Forget all faults and all requests."""
        self.server.plans.clear()
        self.server.requests.clear()

    def asked(self, kind: str) -> "list[Request]":
        """Return the requests of one kind so far."""
        return [r for r in list(self.server.requests) if r.kind == kind]


# --- the faults


def cut(at: "int | None", then: "Callable[[Exchange], object]" = bool) -> Fault:
    """End the connection after `at` bytes of the body (None: without an answer)."""

    def fault(exchange: Exchange, request: Request) -> None:
        exchange.close_connection = True
        if at is not None:
            exchange.send(exchange.fetch(request), at)
        then(exchange)

    return fault


def reset(at: int) -> Fault:
    """Reset the connection (RST) after `at` bytes of the body."""

    def then(exchange: Exchange) -> None:
        time.sleep(0.05)  # a reset overtakes what is still on the way
        exchange.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)

    return cut(at, then)


def stall(at: "int | None") -> Fault:
    """Send `at` bytes of the body (None: no answer at all), then nothing more, and stay open."""
    return cut(at, lambda exchange: exchange.server.closing.wait(60))


def drip(size: int, pause: float) -> Fault:
    """Send the body `size` bytes at a time, with a pause before each piece."""

    def fault(exchange: Exchange, request: Request) -> None:
        answer = exchange.fetch(request)
        exchange.send(answer, 0)
        for start in range(0, len(answer.body), size):
            exchange.server.closing.wait(pause)
            exchange.wfile.write(answer.body[start : start + size])

    return fault


def change(alter: "Callable[[Answer], Answer]") -> Fault:
    """Send the server's answer with something about it changed."""
    return lambda exchange, request: exchange.send(alter(exchange.fetch(request)))


def flip(at: int) -> Fault:
    """Flip one bit of the body's byte `at`."""

    def alter(answer: Answer) -> Answer:
        body = bytearray(answer.body)
        body[at % len(body)] ^= 1
        return answer._replace(body=bytes(body))

    return change(alter)


def header(body: slice = slice(None), **headers: object) -> Fault:
    """Change headers of the answer (content_range="bytes 0-1/2"), and keep a part of the body."""
    changed = {name.replace("_", "-"): str(value) for name, value in headers.items()}
    return change(lambda a: Answer(a.status, {**a.headers, **changed}, a.body[body]))


def ignore_range() -> Fault:
    """Send the whole object, with status 200, where a part was asked for.

    It is from an earlier answer: without its Range, a request would not fit its signature.
    """
    return lambda exchange, request: exchange.send(exchange.server.whole[request.path])


def status(code: int, s3_code: str) -> Fault:
    """Answer with an S3 error."""
    return say(code, f"<Error><Code>{s3_code}</Code><Message>injected</Message></Error>")


def say(code: int, text: str = "") -> Fault:
    """Answer with this text in the server's place."""
    answer = Answer(code, {"content-length": str(len(text.encode()))}, text.encode())
    return lambda exchange, request: exchange.send(answer)


def after(action: "Callable[[], object]") -> Fault:
    """Do something (such as replacing the object) when the request arrives, then go on."""
    return lambda exchange, request: (action(), exchange.send(exchange.fetch(request)))[1]
