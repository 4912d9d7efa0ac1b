"""Stand between the program and an S3 server, and break what passes as networks and servers do.

    with FaultProxy(server.endpoint) as proxy:
        proxy.on_object(cut(1000), reset(2000))   # the 1st and the 2nd GET of an object break
        proxy.on_object(..., always=flip(7))      # ... and every later one
        proxy.on_listing(status(503))

Everything goes through unchanged unless a fault is due. `proxy.requests` holds what was asked.
Objects are read whole before they are passed on: the tests' objects are small.
"""

import http.client
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from conftest import FAULTS

RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Request:
    """Hold one request; header names are in lower case."""

    method: str
    path: str
    headers: "dict[str, str]"
    body: bytes = b""

    @property
    def kind(self) -> str:
        """Return "listing", "head", "object", or the method's name."""
        if self.method == "GET":
            query = urllib.parse.urlsplit(self.path).query
            return "listing" if "list-type" in query else "object"
        return self.method.lower()


@dataclass(frozen=True)
class Answer:
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
        connection.putrequest(
            request.method, request.path, skip_host=True, skip_accept_encoding=True
        )
        for name, value in request.headers.items():
            connection.putheader(name, value)
        connection.endheaders(request.body or None)
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        answer = Answer(response.status, headers, response.read())
        connection.close()
        if request.kind == "object" and answer.status == 200:
            self.server.whole[request.path] = answer
        return answer

    def send_head(self, answer: Answer) -> None:
        """Send status line and headers."""
        self.send_response_only(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, answer: Answer) -> None:
        """Send a whole answer."""
        self.send_head(answer)
        self.wfile.write(answer.body)

    def hang_up(self) -> None:
        """End the connection after this request, as if the line was cut."""
        self.close_connection = True

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


@dataclass
class Plan:
    """Hold the faults that wait for one kind of request."""

    faults: "list[Fault | None]" = field(default_factory=list)
    always: "Fault | None" = None


class ProxyServer(ThreadingHTTPServer):
    """Hold what the exchanges share."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.upstream = upstream
        self.requests: list[Request] = []
        self.plans: dict[str, Plan] = {}
        self.whole: dict[str, Answer] = {}  # the last answer to a GET of all of an object, by path
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def note(self, request: Request) -> "Fault | None":
        """Record a request and return the fault that is due for it."""
        with self.lock:
            self.requests.append(request)
            plan = self.plans.get(request.kind, Plan())
            fault = plan.faults.pop(0) if plan.faults else plan.always
            FAULTS["answers of the bucket cut, delayed, altered or refused"] += fault is not None
            return fault

    def shutdown_request(self, request: "socket.socket | tuple[bytes, socket.socket]") -> None:
        """Close a connection; one that is to be reset must not say goodbye first."""
        assert isinstance(request, socket.socket)
        if (
            request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, len(RESET_ON_CLOSE))
            == RESET_ON_CLOSE
        ):
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

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def on_object(self, *faults: "Fault | None", always: "Fault | None" = None) -> None:
        """Set the faults of the next GETs of an object (None: no fault), and of all later ones."""
        self.server.plans["object"] = Plan(list(faults), always)

    def on_head(self, *faults: "Fault | None", always: "Fault | None" = None) -> None:
        """Set the faults of HEAD."""
        self.server.plans["head"] = Plan(list(faults), always)

    def on_listing(self, *faults: "Fault | None", always: "Fault | None" = None) -> None:
        """Set the faults of the listings."""
        self.server.plans["listing"] = Plan(list(faults), always)

    def reset(self) -> None:
        """Forget all faults and all requests."""
        self.server.plans.clear()
        self.server.requests.clear()

    def asked(self, kind: str) -> "list[Request]":
        """Return the requests of one kind so far."""
        return [r for r in list(self.server.requests) if r.kind == kind]


# --- the faults


def cut(at: int) -> Fault:
    """End the connection after `at` bytes of the body."""

    def fault(exchange: Exchange, request: Request) -> None:
        answer = exchange.fetch(request)
        exchange.send_head(answer)
        exchange.wfile.write(answer.body[:at])
        exchange.hang_up()

    return fault


def reset(at: int) -> Fault:
    """Reset the connection (RST) after `at` bytes of the body."""

    def fault(exchange: Exchange, request: Request) -> None:
        cut(at)(exchange, request)
        time.sleep(0.05)  # a reset overtakes what is still on the way
        exchange.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)

    return fault


def stall(at: int) -> Fault:
    """Send `at` bytes of the body, then nothing more, with the connection open."""

    def fault(exchange: Exchange, request: Request) -> None:
        cut(at)(exchange, request)
        exchange.wfile.flush()
        exchange.server.closing.wait(60)

    return fault


def stall_before_answer() -> Fault:
    """Take the request and never answer."""

    def fault(exchange: Exchange, request: Request) -> None:
        exchange.hang_up()
        exchange.server.closing.wait(60)

    return fault


def drip(size: int, pause: float) -> Fault:
    """Send the body `size` bytes at a time, with a pause after each piece."""

    def fault(exchange: Exchange, request: Request) -> None:
        answer = exchange.fetch(request)
        exchange.send_head(answer)
        for start in range(0, len(answer.body), size):
            exchange.wfile.write(answer.body[start : start + size])
            if exchange.server.closing.wait(pause):
                break

    return fault


def change(alter: "Callable[[Answer], Answer]") -> Fault:
    """Send the server's answer with something about it changed."""

    def fault(exchange: Exchange, request: Request) -> None:
        exchange.send(alter(exchange.fetch(request)))

    return fault


def flip(at: int) -> Fault:
    """Flip one bit of the body's byte `at`."""

    def alter(answer: Answer) -> Answer:
        body = bytearray(answer.body)
        body[at % len(body)] ^= 1
        return replace(answer, body=bytes(body))

    return change(alter)


def shorten(to: int) -> Fault:
    """Send only the first `to` bytes of the body, with a Content-Length that agrees."""
    return change(
        lambda answer: Answer(
            answer.status, {**answer.headers, "content-length": str(to)}, answer.body[:to]
        )
    )


def header(**headers: str) -> Fault:
    """Change headers of the answer (content_range="bytes 0-1/2")."""
    changed = {name.replace("_", "-"): value for name, value in headers.items()}
    return change(lambda answer: replace(answer, headers={**answer.headers, **changed}))


def ignore_range() -> Fault:
    """Send the whole object, with status 200, where a part was asked for."""

    def fault(exchange: Exchange, request: Request) -> None:
        # From an earlier answer: without its Range, a request would not fit its signature.
        exchange.send(exchange.server.whole[request.path])

    return fault


def status(code: int, s3_code: str = "", **headers: str) -> Fault:
    """Answer with an S3 error."""
    body = f"<Error><Code>{s3_code}</Code><Message>injected</Message></Error>" if s3_code else ""
    return say(code, body, **headers)


def say(code: int, text: str, **headers: str) -> Fault:
    """Answer with this text in the server's place."""

    def fault(exchange: Exchange, request: Request) -> None:
        body = b"" if request.method == "HEAD" else text.encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        exchange.send(Answer(code, {"content-length": str(len(body)), **named}, body))

    return fault


def after(action: "Callable[[], object]", fault: "Fault | None" = None) -> Fault:
    """Do something (such as replacing the object) when the request arrives, then go on."""

    def both(exchange: Exchange, request: Request) -> None:
        action()
        if fault:
            fault(exchange, request)
        else:
            exchange.send(exchange.fetch(request))

    return both
