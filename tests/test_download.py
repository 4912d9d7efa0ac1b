"""Stage 2: whatever the network, the server and the cache do, right bytes or a clear error."""

import dataclasses
import errno
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Bucket, S3Server
from faultproxy import (
    Fault,
    FaultProxy,
    after,
    cut,
    drip,
    flip,
    header,
    ignore_range,
    reset,
    say,
    shorten,
    stall,
    stall_before_answer,
    status,
)

import unified_finetune as program
from unified_finetune import FineTuningConfig, FineTuningError

PREFIX = "training/"
SECRET = "b7" * 32
DATA = random.Random(1).randbytes(300_000)
NEWER = random.Random(2).randbytes(250_000)


class Store:
    """A bucket behind the fault proxy, and a cache folder that is checked when the test ends."""

    def __init__(self, bucket: Bucket, proxy: FaultProxy, cache: Path) -> None:
        self.bucket, self.proxy, self.cache = bucket, proxy, cache
        self.digests: set[str] = set()  # of all objects that were ever put

    def put(self, name: str, body: bytes = DATA, **arguments: Any) -> str:
        """Store an object under the prefix and return its ETag."""
        key = PREFIX + name
        self.digests.add(hashlib.sha256(body).hexdigest())
        answer = self.bucket.client.put_object(
            Bucket=self.bucket.name, Key=key, Body=body, **arguments
        )
        return answer["ETag"].strip('"')

    def put_parts(self, name: str, parts: "list[bytes]", **arguments: Any) -> bytes:
        """Store an object as a multipart upload and return its content."""
        where = {"Bucket": self.bucket.name, "Key": PREFIX + name}
        client = self.bucket.client
        upload = client.create_multipart_upload(**where, **arguments)["UploadId"]
        done = [
            {
                "PartNumber": n,
                "ETag": client.upload_part(**where, UploadId=upload, PartNumber=n, Body=part)[
                    "ETag"
                ],
            }
            for n, part in enumerate(parts, 1)
        ]
        client.complete_multipart_upload(**where, UploadId=upload, MultipartUpload={"Parts": done})
        body = b"".join(parts)
        self.digests.add(hashlib.sha256(body).hexdigest())
        return body

    def config(self, **settings: Any) -> FineTuningConfig:
        """Return a configuration for this bucket."""
        return FineTuningConfig(
            **{
                "r2_bucket_name": self.bucket.name,
                "r2_data_prefix": PREFIX,
                "cache_dir": str(self.cache),
                **settings,
            }
        )

    def fetch(self, **settings: Any) -> program.DatasetFile:
        """Run the stage."""
        return program.fetch_dataset(self.config(**settings))

    def published(self) -> "list[Path]":
        """Return the cached files that carry their final name."""
        names = self.cache.iterdir() if self.cache.exists() else ()
        return [p for p in names if p.suffix in (".json", ".jsonl") and not p.is_symlink()]

    def partials(self) -> "list[Path]":
        """Return the unfinished downloads."""
        return list(self.cache.glob("*.partial"))


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """Return one proxy for all tests."""
    with FaultProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def client(s3_server: S3Server) -> Any:
    """Return one client, past the proxy, that puts objects."""
    return s3_server.client()


CLIENTS: "dict[tuple[object, ...], program.Bucket]" = {}
open_bucket = program.open_bucket


def open_known_bucket(access: program.R2Access, config: FineTuningConfig) -> program.Bucket:
    """Return a client of an earlier test: botocore takes 0.2 s to make one."""
    key = (access, program.STALL_SECONDS)
    if key not in CLIENTS:
        CLIENTS[key] = open_bucket(access, config)
    return dataclasses.replace(CLIENTS[key], name=config.r2_bucket_name)


@pytest.fixture
def store(
    s3_server: S3Server,
    proxy: FaultProxy,
    client: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Store]:
    """Return a bucket behind the fault proxy; at the end no wrong byte may be in its cache."""
    monkeypatch.setattr(program, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(program, "STALL_SECONDS", 5.0)
    monkeypatch.setattr(program, "open_bucket", open_known_bucket)
    clear_r2(monkeypatch)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("R2_ENDPOINT_URL", proxy.url)
    proxy.reset()
    bucket = Bucket(f"bucket-{uuid.uuid4().hex[:12]}", s3_server, client)
    client.create_bucket(Bucket=bucket.name)
    store = Store(bucket, proxy, tmp_path / "cache")
    yield store
    for path in store.published():
        assert hashlib.sha256(path.read_bytes()).hexdigest() in store.digests, path


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the program take half a second without bytes for a stall."""
    monkeypatch.setattr(program, "STALL_SECONDS", 0.5)


def clear_r2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the developer's own R2 variables."""
    for name in list(os.environ):
        if name.startswith(("R2_", "AWS_")):
            monkeypatch.delenv(name)


def failure(call: "Callable[[], object]") -> FineTuningError:
    """Return the error that a call must end with."""
    with pytest.raises(FineTuningError) as caught:
        call()
    return caught.value


# --- the R2 variables


@pytest.fixture
def r2(monkeypatch: pytest.MonkeyPatch) -> "Callable[..., program.R2Access]":
    """Return a function that sets the R2 variables and reads them."""

    def read(**values: str) -> program.R2Access:
        clear_r2(monkeypatch)
        for name, value in values.items():
            monkeypatch.setenv("R2_" + name, value)
        return program.read_r2_access(FineTuningConfig(r2_bucket_name="the-bucket"))

    return read


GOOD = {
    "ACCOUNT_ID": "0123456789abcdef" * 2,
    "ACCESS_KEY_ID": "ab" * 16,
    "SECRET_ACCESS_KEY": SECRET,
}


def test_account_id_and_keys_give_the_endpoint(r2: Any) -> None:
    access = r2(**GOOD)
    assert access.endpoint_url == "https://" + "0123456789abcdef" * 2 + ".r2.cloudflarestorage.com"
    assert (access.access_key_id, access.secret_access_key) == ("ab" * 16, SECRET)


def test_quotes_and_spaces_around_values_do_no_harm(r2: Any) -> None:
    assert r2(**{name: f" '{value}' " for name, value in GOOD.items()}) == r2(**GOOD)


def test_an_endpoint_makes_the_account_id_unnecessary(r2: Any) -> None:
    keys = {"ACCESS_KEY_ID": "someone", "SECRET_ACCESS_KEY": "something-long"}
    assert r2(ENDPOINT_URL="http://127.0.0.1:9000/", **keys).endpoint_url == "http://127.0.0.1:9000"


def test_all_missing_variables_are_named_at_once(r2: Any) -> None:
    error = failure(r2)
    for name in ("R2_ACCOUNT_ID", "R2_ACCESS_KEY_ID", "R2_SECRET_ACCESS_KEY"):
        assert f"{name} is missing" in str(error)
    assert ".env" in error.hint and "--data_path" in error.hint


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ACCOUNT_ID": "my-account"}, "R2_ACCOUNT_ID must be the account's 32 hexadecimal digits"),
        ({"ACCOUNT_ID": SECRET, "SECRET_ACCESS_KEY": ""}, "its 64 characters are not"),
        ({"ENDPOINT_URL": SECRET, "SECRET_ACCESS_KEY": ""}, "R2_ENDPOINT_URL must be like"),
        ({"ENDPOINT_URL": "https://" + "a" * 64 + ".com"}, "must be like https://"),
        ({"ENDPOINT_URL": "https://host!/"}, "must be like https://"),
        ({"ENDPOINT_URL": "https://host.com/?x=1"}, "must end after the host"),
        ({"ACCESS_KEY_ID": "your_key_here"}, "R2_ACCESS_KEY_ID still holds a placeholder"),
        ({"SECRET_ACCESS_KEY": "<secret>"}, "R2_SECRET_ACCESS_KEY still holds a placeholder"),
        ({"SECRET_ACCESS_KEY": "two words"}, "R2_SECRET_ACCESS_KEY holds spaces"),
        ({"ACCESS_KEY_ID": "abc123"}, "R2_ACCESS_KEY_ID has 6 characters, and R2's have 32"),
        ({"ACCESS_KEY_ID": SECRET, "SECRET_ACCESS_KEY": "ab" * 16}, "look swapped"),
        ({"ENDPOINT_URL": "account.r2.cloudflarestorage.com"}, "must be like https://"),
        ({"ENDPOINT_URL": "ftp://host"}, "must be like https://"),
        ({"ENDPOINT_URL": "https://"}, "must be like https://"),
        ({"ENDPOINT_URL": "https://host:99999"}, "R2_ENDPOINT_URL is not an address"),
        ({"ENDPOINT_URL": "https://x.r2.cloudflarestorage.com/any"}, "must end after the host"),
        ({"ENDPOINT_URL": "https://host/the-bucket"}, "R2_BUCKET_NAME"),
        ({"ENDPOINT_URL": "https://user:password9@host"}, "must not hold a user name"),
    ],
)
def test_malformed_variables_are_explained(
    r2: Any, changes: "dict[str, str]", expected: str
) -> None:
    error = failure(lambda: r2(**{**GOOD, **changes}))
    assert expected in str(error)
    assert SECRET not in str(error) + error.hint and "password9" not in str(error) + error.hint


# --- a local file


def test_a_local_file_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(DATA)
    file = program.fetch_dataset(FineTuningConfig(data_path=str(path)))
    assert (file.path, file.size, file.etag) == (path, len(DATA), None)
    assert file.sha256 == hashlib.sha256(DATA).hexdigest()
    assert str(path) in file.source


def test_local_files_that_cannot_be_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.json").touch()
    (tmp_path / "alpaca.json").write_text("[]")
    os.mkfifo(tmp_path / "pipe.json")
    for name, expected, hint in [
        ("empty.json", "is empty (0 bytes)", "--data_path"),
        (".", "is a folder, not a file", "alpaca.json"),
        ("pipe.json", "is not a regular file", "--data_path"),
        ("alpca.json", "There is no file", f"Did you mean {tmp_path}/alpaca.json"),
        ("no/such.json", "There is no file", "--data_path"),
        ("alpaca.json/x.json", "cannot be read: Not a directory", "--data_path"),
        ("x" * 300, "cannot be read: File name too long", "--data_path"),
        ("\udcff.json", "\\udcff.json", "--data_path"),
    ]:
        path = str(tmp_path / name)
        error = failure(lambda path=path: program.fetch_dataset(FineTuningConfig(data_path=path)))
        assert expected in str(error) and hint in error.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_local_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(DATA)
    path.chmod(0)
    error = failure(lambda: program.fetch_dataset(FineTuningConfig(data_path=str(path))))
    assert "cannot be read: Permission denied" in str(error)


# --- which object


def test_alpaca_wins_then_the_newest_and_the_rest_is_told(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    store.put("old_ALPACA.json", b"[1]")
    store.put("")  # a folder marker
    time.sleep(1.1)  # times in listings are whole seconds
    store.put("sets/alpaca-new.jsonl", b"[2]")
    store.put("newest.json", b"[3]")
    store.put("alpaca.txt", b"[4]")
    store.put("alpaca_empty.json", b"")
    assert store.fetch().path.read_bytes() == b"[2]"
    assert "Chosen: training/sets/alpaca-new.jsonl, 3 B" in caplog.text
    for name, reason in [
        ("old_ALPACA.json", "older"),
        ("newest.json", "no 'alpaca' in its name"),
        ("alpaca.txt", "neither .json nor .jsonl"),
        ("alpaca_empty.json", "empty (0 bytes)"),
        ("", "a folder marker"),
    ]:
        assert re.search(rf"passed over: training/{name}, .*: {re.escape(reason)}", caplog.text)


def test_every_page_of_a_listing_is_read(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(program, "LISTING_PAGE", 5)
    for number in range(12):
        store.put(f"{number:02d}.json", b"[]")
    store.put("99_alpaca.json", b"[99]")
    assert store.fetch().path.read_bytes() == b"[99]"
    assert len(store.proxy.asked("listing")) == 3
    assert caplog.text.count("passed over: training/") == 10
    assert "passed over: 2 more" in caplog.text


def test_dataset_name_is_a_key_a_key_under_the_prefix_or_a_file_name(store: Store) -> None:
    store.put("a/one.json", b"[1]")
    store.put("b/two.json", b"[2]")
    store.put("b/one.json", b"[3]")
    store.put("alpaca.json", b"[4]")
    store.bucket.put("elsewhere/five.json", b"[5]")
    store.digests.add(hashlib.sha256(b"[5]").hexdigest())
    for name, content in [
        (PREFIX + "a/one.json", b"[1]"),
        ("b/one.json", b"[3]"),
        ("two.json", b"[2]"),
        ("elsewhere/five.json", b"[5]"),
    ]:
        assert store.fetch(dataset_name=name).path.read_bytes() == content
    ambiguous = failure(lambda: store.fetch(dataset_name="one.json"))
    assert "'training/a/one.json', 'training/b/one.json'" in str(ambiguous)
    misspelt = failure(lambda: store.fetch(dataset_name="twoo.json"))
    assert "no object 'twoo.json'" in str(misspelt)
    assert misspelt.hint == "Did you mean 'training/b/two.json'?"


# --- what cannot work: tried once, each with its own message


def test_wrong_key_secret_bucket_prefix_and_object_are_told_apart(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = {}
    errors["prefix"] = failure(store.fetch)
    store.put("empty.json", b"")
    errors["object"] = failure(store.fetch)
    errors["named object"] = failure(lambda: store.fetch(dataset_name="empty.json"))
    errors["bucket"] = failure(lambda: store.fetch(r2_bucket_name="no-such-bucket"))
    monkeypatch.setenv("R2_SECRET_ACCESS_KEY", "quite-another-secret")
    errors["secret"] = failure(store.fetch)
    store.proxy.on_listing(always=status(401, "Unauthorized"))  # as R2 answers
    errors["key"] = failure(store.fetch)
    expected = {
        "prefix": ("no object under the prefix 'training/'", "R2_BUCKET_NAME"),
        "object": ("is empty (0 bytes): 'training/empty.json'", "--data_path"),
        "named object": ("'training/empty.json' is empty (0 bytes)", "--dataset_name"),
        "bucket": ("no bucket 'no-such-bucket'", "R2_BUCKET_NAME"),
        "secret": ("secret access key does not belong", "R2_SECRET_ACCESS_KEY"),
        "key": ("does not know the access key ID", "R2_ACCESS_KEY_ID"),
    }
    for name, (message, hint) in expected.items():
        assert message in str(errors[name]) and hint in errors[name].hint, name
    assert len({str(error) for error in errors.values()}) == 6
    assert "quite-another-secret" not in repr([(str(e), e.hint) for e in errors.values()])


@pytest.mark.parametrize(
    ("fault", "message", "hint"),
    [
        (status(403, "InvalidAccessKeyId"), "does not know the access key ID", "R2_ACCESS_KEY_ID"),
        (status(403, "AccessDenied"), "denies the access", ".eu.r2.cloudflarestorage.com"),
        (
            status(403, "RequestTimeTooSkewed", date="Mon, 01 Jan 2001 00:00:00 GMT"),
            "this machine's clock is wrong (",
            "Set the clock",
        ),
        (status(404, "NoSuchBucket"), "There is no bucket", "R2_ACCOUNT_ID"),
        (status(301, "PermanentRedirect"), "does not answer like an S3 server", "R2_ENDPOINT_URL"),
        (say(200, "<html><p>Sign in</html>"), "not answer like an S3 server", "R2_ENDPOINT_URL"),
        (say(200, "<html><p>Sign in</p></html>"), "not answer like an S3", "R2_ENDPOINT_URL"),
        (say(200, ""), "does not answer like an S3 server", "R2_ENDPOINT_URL"),
        (say(200, "{}"), "does not answer like an S3 server", "R2_ENDPOINT_URL"),
        (say(404, "<html>Not found"), "does not answer like an S3 server", "R2_ENDPOINT_URL"),
        (status(400, "UnheardOf"), "400 UnheardOf injected", "R2_ENDPOINT_URL"),
    ],
)
def test_refusals_are_tried_once_and_name_the_setting(
    store: Store, fault: Fault, message: str, hint: str
) -> None:
    store.put("alpaca.json")
    store.proxy.on_listing(always=fault)
    error = failure(store.fetch)
    assert message in str(error) and hint in error.hint
    assert len(store.proxy.asked("listing")) == 1
    check = program.check_bucket(store.config())
    assert check.outcome == "failed" and message in check.detail and hint in check.hint
    assert not store.published()


def test_a_name_that_cannot_be_found(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R2_ENDPOINT_URL", "https://no-such-host.invalid")

    def resolve(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    error = failure(store.fetch)
    assert "no-such-host.invalid cannot be found" in str(error)
    assert "internet connection" in error.hint


def test_a_port_where_nobody_listens(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("R2_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    assert "refuses connections" in str(failure(store.fetch))
    monkeypatch.setenv("R2_ENDPOINT_URL", store.proxy.url)
    monkeypatch.setattr(program, "open_bucket", open_bucket)
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("NO_PROXY", "")
    error = failure(store.fetch)
    assert "The proxy on the way" in str(error) and "HTTPS_PROXY" in error.hint


def test_a_server_without_tls(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R2_ENDPOINT_URL", store.proxy.url.replace("http:", "https:"))
    error = failure(store.fetch)
    assert "No secure connection to 127.0.0.1" in str(error)
    assert "R2_ACCOUNT_ID" in error.hint and "AWS_CA_BUNDLE" in error.hint


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the command openssl")
def test_a_certificate_that_nobody_vouches_for(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1"
    make += " -addext subjectAltName=IP:127.0.0.1 -keyout"
    subprocess.run([*make.split(), key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with FaultProxy(store.bucket.server.endpoint) as proxy:
        proxy.server.socket = context.wrap_socket(proxy.server.socket, server_side=True)
        monkeypatch.setenv("R2_ENDPOINT_URL", proxy.url.replace("http:", "https:"))
        assert "No secure connection" in str(failure(store.fetch))
        assert not proxy.server.requests  # nothing was said to a stranger


def test_the_users_own_aws_settings_have_no_say(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "open_bucket", open_bucket)
    (tmp_path / "config").write_text(
        "[default]\nregion = mars\ns3 =\n  addressing_style = virtual\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-token-from-elsewhere")
    store.put("alpaca.json")
    assert store.fetch().path.read_bytes() == DATA


# --- what may work a little later


@pytest.mark.parametrize(
    "fault",
    [
        status(503, "SlowDown"),
        status(500, "InternalError"),
        say(502, "<html>Bad gateway"),
        say(520, ""),
        say(524, "<html>"),
        status(429, "TooManyRequests", retry_after="0"),
        status(408, "RequestTimeout"),
        cut(0),
        cut(40),
        reset(0),
        stall_before_answer(),
        stall(50),
    ],
)
def test_a_request_that_fails_twice_is_repeated(
    store: Store, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)
    store.put("alpaca.json")
    store.proxy.on_listing(fault, fault)
    store.proxy.on_head(status(503), status(503))
    store.proxy.on_object(fault, fault)
    assert store.fetch().path.read_bytes() == DATA
    for kind in ("listing", "head", "object"):
        assert len(store.proxy.asked(kind)) >= 3, kind


def test_four_failures_are_survived_and_five_are_not(store: Store) -> None:
    store.put("alpaca.json")
    fault = status(503, "SlowDown")
    store.proxy.on_object(fault, fault, fault, fault)
    assert store.fetch().path.read_bytes() == DATA
    store.put("alpaca.json", NEWER)
    store.proxy.on_object(fault, fault, fault, fault, fault)
    asked = len(store.proxy.asked("object"))
    error = failure(store.fetch)
    assert "answered 503 SlowDown" in str(error) and "later" in error.hint
    assert len(store.proxy.asked("object")) == asked + 5
    assert not store.partials()  # nothing came, so nothing is left behind


def test_the_wait_grows_and_retry_after_is_honoured_within_bounds(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(program, "BACKOFF_SECONDS", 1.0)
    monkeypatch.setattr(program.random, "uniform", lambda _low, high: high)
    monkeypatch.setattr(program.time, "sleep", waits.append)
    store.put("alpaca.json")
    store.proxy.on_listing(*[status(503)] * 4)
    store.proxy.on_object(
        status(429, "TooManyRequests", retry_after="7"),
        status(429, "TooManyRequests", retry_after="100000"),
        status(503, "SlowDown", retry_after="Mon, 01 Jan 2001 00:00:00 GMT"),
        status(503, "SlowDown", retry_after="nonsense"),
    )
    assert store.fetch().path.read_bytes() == DATA
    assert waits == [1, 2, 4, 8, 7, 120, 4, 8]
    error = program.BucketError("x", retry=True)
    waits.clear()
    program.back_off(error, 7, attempts=9)
    assert waits == [30]


# --- broken downloads


def test_a_download_cut_at_any_offset_goes_on_where_it_stopped(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("alpaca.json")
    pick = random.Random(20)
    offsets = [0, 1, len(DATA) - 1] + [pick.randrange(2, len(DATA) - 1) for _ in range(17)]
    for offset in offsets:
        shutil.rmtree(store.cache, ignore_errors=True)
        store.proxy.on_object(cut(offset))
        asked = len(store.proxy.asked("object"))
        assert store.fetch().path.read_bytes() == DATA
        first, second = store.proxy.asked("object")[asked:]
        assert "range" not in first.headers
        assert second.headers.get("range", "bytes=0-") == f"bytes={offset}-"
        assert second.headers["if-match"] == first.headers["if-match"]
        assert not store.partials()


def test_many_interruptions_are_no_failure_while_bytes_keep_coming(store: Store) -> None:
    store.put("alpaca.json")
    store.proxy.on_object(*[cut(20_000)] * 14)
    assert store.fetch().path.read_bytes() == DATA
    assert len(store.proxy.asked("object")) == 15


def test_resets_in_the_middle_are_survived(store: Store) -> None:
    store.put("alpaca.json")
    store.proxy.on_object(reset(150_000), reset(100_000), reset(1))
    assert store.fetch().path.read_bytes() == DATA


def test_a_slow_but_steady_download_is_left_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "STALL_SECONDS", 1.0)
    store.put("alpaca.json")
    store.proxy.on_object(drip(6_000, 0.03))  # longer than that as a whole
    assert store.fetch().path.read_bytes() == DATA
    assert len(store.proxy.asked("object")) == 1


def test_a_drip_that_gets_nowhere_is_a_stall(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch)
    store.put("alpaca.json")
    store.proxy.on_object(drip(10, 0.1))
    assert store.fetch().path.read_bytes() == DATA
    assert len(store.proxy.asked("object")) == 2


def test_a_stall_at_every_attempt_ends_with_a_clear_error(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)
    store.put("alpaca.json")
    store.proxy.on_object(stall(100_000), always=stall(0))
    error = failure(store.fetch)
    assert "nothing came for 0.5 s" in str(error)
    assert "goes on from here" in error.hint
    (partial,) = store.partials()
    assert 0 < partial.stat().st_size <= 100_000
    assert DATA.startswith(partial.read_bytes())


def test_a_flipped_bit_is_downloaded_anew(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.put("alpaca.json")
    store.proxy.on_object(flip(123_456))
    assert store.fetch().path.read_bytes() == DATA
    assert "What arrived is not the object" in caplog.text


def test_bits_flipped_every_time_are_never_cached(store: Store) -> None:
    store.put("alpaca.json")
    store.proxy.on_object(always=flip(123_456))
    error = failure(store.fetch)
    assert "does not match its hash" in str(error) and "another network" in error.hint
    assert not store.published() and not store.partials()
    assert len(store.proxy.asked("object")) == 2  # the same wrong bytes twice: no third time


def test_a_bit_flipped_in_the_resumed_part_is_found(store: Store) -> None:
    store.put("alpaca.json")
    store.proxy.on_object(cut(100_000), flip(5))
    assert store.fetch().path.read_bytes() == DATA


def test_a_short_body_with_a_matching_length_is_never_cached(store: Store) -> None:
    store.put("alpaca.json")
    store.proxy.on_object(shorten(200_000))
    assert store.fetch().path.read_bytes() == DATA
    store.put("alpaca.json", NEWER)
    store.proxy.on_object(always=shorten(200_000))
    error = failure(store.fetch)
    assert "offers 200000 bytes where the object has 250000" in str(error)


def test_a_server_that_lies_about_the_size_everywhere_is_caught(store: Store) -> None:
    store.put("alpaca.json")
    store.proxy.on_head(always=header(content_length="200000"))
    store.proxy.on_object(always=shorten(200_000))
    assert "300000 bytes listed, 200000 offered" in str(failure(store.fetch))


def test_a_server_without_ranges_sends_all_of_it_again(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    store.put("alpaca.json")
    store.proxy.on_object(cut(100_000), always=ignore_range())
    assert store.fetch().path.read_bytes() == DATA
    assert "starting from the beginning" in caplog.text


def test_a_refused_range_starts_over(store: Store) -> None:
    store.put("alpaca.json")
    store.proxy.on_object(cut(100_000), status(416, "InvalidRange"))
    assert store.fetch().path.read_bytes() == DATA
    assert "range" not in store.proxy.asked("object")[2].headers


def test_another_range_than_the_one_asked_for_starts_over(store: Store) -> None:
    store.put("alpaca.json")
    store.proxy.on_object(cut(100_000), header(content_range="bytes 99999-299998/300000"))
    assert store.fetch().path.read_bytes() == DATA
    assert "range" not in store.proxy.asked("object")[2].headers


def test_an_object_replaced_during_the_download_is_taken_anew(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    store.put("alpaca.json")
    replace = after(lambda: store.put("alpaca.json", NEWER))
    store.proxy.on_object(cut(100_000), replace)
    file = store.fetch()
    assert file.path.read_bytes() == NEWER
    assert file.sha256 == hashlib.sha256(NEWER).hexdigest()
    assert "replaced during the download; taking the new one" in caplog.text
    assert len(store.published()) == 1 and not store.partials()


def test_an_object_deleted_during_the_download_is_told(store: Store) -> None:
    store.put("alpaca.json")
    key = {"Bucket": store.bucket.name, "Key": PREFIX + "alpaca.json"}
    store.proxy.on_object(cut(100_000), after(lambda: store.bucket.client.delete_object(**key)))
    assert "no longer in the bucket" in str(failure(store.fetch))
    store.put("alpaca.json")
    store.proxy.on_head(after(lambda: store.bucket.client.delete_object(**key)))
    assert "no longer in the bucket" in str(failure(store.fetch))


def test_a_key_refused_during_the_download_stops_it_at_once(store: Store) -> None:
    store.put("alpaca.json")
    store.proxy.on_object(cut(100_000), always=status(401, "Unauthorized"))
    error = failure(store.fetch)
    assert "R2_ACCESS_KEY_ID" in error.hint
    assert len(store.proxy.asked("object")) == 2


# --- what the ETag proves


def test_a_multipart_etag_is_verified_with_the_part_size_worked_out(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    mib = 1024 * 1024
    for number, (size, parts) in enumerate([(5 * mib, 2), (6_000_000, 2), (6 * mib, 1)]):
        pieces = [random.Random(i).randbytes(size) for i in range(parts)] + [b"end"] * (parts > 1)
        body = store.put_parts(f"alpaca{number}.json", pieces)
        store.proxy.on_object(flip(3), cut(5_000_000))
        file = store.fetch(dataset_name=f"alpaca{number}.json")
        assert file.path.read_bytes() == body
        assert file.etag and file.etag.endswith(f"-{len(pieces)}")
        assert f"its multipart ETag ({size} bytes per part)" in caplog.text
    store.proxy.on_object()
    store.fetch(dataset_name="alpaca0.json")
    assert "Not modified" in caplog.text


def test_without_a_usable_etag_two_downloads_must_agree(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    pieces = [random.Random(i).randbytes(5 * 1024 * 1024 + i) for i in (0, 9)] + [b"end"]
    body = store.put_parts("alpaca.json", pieces)
    store.proxy.on_object(None, flip(7), None)
    assert store.fetch().path.read_bytes() == body
    assert "two downloads were equal" in caplog.text
    assert len(store.proxy.asked("object")) == 3


def test_the_etag_of_an_encrypted_object_is_not_taken_for_an_md5(store: Store) -> None:
    store.put("alpaca.json")
    store.proxy.on_head(header(x_amz_server_side_encryption="aws:kms"))
    assert store.fetch().path.read_bytes() == DATA
    assert len(store.proxy.asked("object")) == 2  # the second one to compare with


def test_without_a_usable_etag_a_stored_sha256_decides(store: Store) -> None:
    pieces = [random.Random(i).randbytes(5 * 1024 * 1024 + i) for i in (0, 9)] + [b"end"]
    sha256 = hashlib.sha256(b"".join(pieces)).hexdigest()
    body = store.put_parts("alpaca.json", pieces, Metadata={"sha256": sha256})
    store.proxy.on_object(flip(7), None)
    assert store.fetch().path.read_bytes() == body
    assert len(store.proxy.asked("object")) == 2


@pytest.mark.parametrize("size", [1, 5_242_880, 10_485_760, 52_428_801, 999_999_999])
def test_the_true_part_size_is_among_the_guesses(size: int) -> None:
    mib = 1024 * 1024
    for part in (5 * mib, 8 * mib, 15 * mib, 16 * mib, 64 * mib, 100 * mib, 5_000_000, 50_000_000):
        parts = max(1, -(-size // part))
        guesses = program.guess_part_sizes(size, parts)
        assert part in guesses or parts == 1
        assert all(-(-size // guess) == parts for guess in guesses)
        assert len(guesses) < 90


def test_a_compressed_object_is_kept_as_it_is(store: Store) -> None:
    body = gzip.compress(DATA)
    store.put("alpaca.json", body, ContentEncoding="gzip")
    assert store.fetch().path.read_bytes() == body


# --- the cache


def test_the_second_run_asks_whether_the_copy_is_current(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    etag = store.put("alpaca.json")
    first = store.fetch()
    assert first.etag == etag == hashlib.md5(DATA).hexdigest()
    second = store.fetch()
    assert (second.path, second.sha256) == (first.path, first.sha256)
    assert "Not modified" in caplog.text
    assert store.proxy.asked("head")[1].headers["if-none-match"] == f'"{etag}"'
    assert len(store.proxy.asked("object")) == 1
    info = json.loads(first.path.with_name(first.path.name + ".info").read_text())
    assert (info["key"], info["etag"], info["size"]) == (PREFIX + "alpaca.json", etag, len(DATA))
    assert info["sha256"] == hashlib.sha256(DATA).hexdigest()


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "info", "folder"])
def test_a_damaged_copy_is_told_and_downloaded_again(
    store: Store, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.put("alpaca.json")
    path = store.fetch().path
    if damage == "flip":
        path.write_bytes(bytes([DATA[0] ^ 1]) + DATA[1:])
    elif damage == "truncate":
        path.write_bytes(DATA[:-1])
    elif damage == "info":
        path.with_name(path.name + ".info").write_text('{"key": 1')
    else:
        path.unlink()
    assert store.fetch().path.read_bytes() == DATA
    assert re.search("damaged|cannot be read|cannot be used", caplog.text) or damage == "folder"
    assert len(store.proxy.asked("object")) == 2


def test_a_new_version_is_fetched_and_the_old_one_is_counted(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    store.put("alpaca.json")
    old = store.fetch()
    store.put("alpaca.json", NEWER)
    new = store.fetch()
    assert (old.path.read_bytes(), new.path.read_bytes()) == (DATA, NEWER)
    assert "Older versions of this object take 300." in caplog.text


def test_without_the_bucket_the_newest_verified_copy_is_used_and_said_so(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.put("alpaca.json")
    store.fetch()
    time.sleep(1.1)  # times of versions are whole seconds
    store.put("alpaca.json", NEWER)
    newest = store.fetch()
    store.proxy.on_listing(always=status(503))
    file = store.fetch()
    assert file.path == newest.path and file.sha256 == hashlib.sha256(NEWER).hexdigest()
    assert "not asked" in file.source
    assert "Going on with the verified copy" in caplog.text and "answered 503" in caplog.text
    check = program.check_bucket(store.config())
    assert check.outcome == "warning" and "will be used" in check.detail
    newest.path.write_bytes(b"damaged")
    assert store.fetch().path.read_bytes() == DATA
    newest.path.unlink()


def test_a_bucket_that_fails_after_the_listing_leaves_the_copy_it_named(store: Store) -> None:
    store.put("alpaca.json")
    store.fetch()
    store.proxy.on_head(always=status(503))
    assert store.fetch().path.read_bytes() == DATA
    store.put("alpaca.json", NEWER)
    assert "answered 503" in str(failure(store.fetch))


def test_without_the_bucket_only_what_was_asked_for_is_used(store: Store) -> None:
    store.put("alpaca.json")
    store.fetch()
    store.proxy.on_listing(always=say(503, ""))
    for settings in (
        {"dataset_name": "other.json"},
        {"r2_data_prefix": "elsewhere/"},
        {"r2_bucket_name": "another-bucket"},
    ):
        assert "answered 503" in str(failure(lambda s=settings: store.fetch(**s)))
        assert program.check_bucket(store.config(**settings)).outcome == "failed"
    assert store.fetch(dataset_name="alpaca.json").path.read_bytes() == DATA


def test_without_credentials_a_verified_copy_is_enough(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.put("alpaca.json")
    store.fetch()
    clear_r2(monkeypatch)
    assert store.fetch().path.read_bytes() == DATA
    assert "R2_ACCESS_KEY_ID is missing" in caplog.text
    assert program.check_bucket(store.config()).outcome == "warning"
    assert "is missing" in str(failure(lambda: store.fetch(dataset_name="other.json")))


def test_wrong_credentials_are_an_error_even_with_a_copy(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("alpaca.json")
    store.fetch()
    monkeypatch.setenv("R2_SECRET_ACCESS_KEY", "quite-another-secret")
    assert "does not belong" in str(failure(store.fetch))
    assert program.check_bucket(store.config()).outcome == "failed"


def test_the_check_sees_a_good_bucket_and_an_empty_prefix(store: Store) -> None:
    assert program.check_bucket(store.config()).outcome == "failed"
    store.put("alpaca.json")
    check = program.check_bucket(store.config())
    assert check.outcome == "ok" and store.bucket.name in check.detail


HOSTILE_NAMES = [
    "../../outside.json",
    "/absolute.json",
    "..",
    "..\\..\\windows.json",
    "nul\x00byte.json",
    "new\nline \x1b[31mred.json",
    "ünïcödé ‮txt.json",
    ".hidden.json",
    "-rf.json",
    "~root.json",
    "%2e%2e%2fquoted.json",
    "x" * 300 + ".json",
    "d/" * 150 + "deep.json",
    "a?b#c&d=e+f.json",
    "Alpaca.json",
    "alpaca.json",
    "ALPACA.JSON",
]


def test_no_key_places_a_file_outside_the_cache_or_onto_another(store: Store) -> None:
    remote = {
        name: program.RemoteObject(PREFIX + name, 1, "e", program.datetime.now(program.UTC))
        for name in HOSTILE_NAMES
    }
    bucket = program.Bucket(None, "bucket", "host")
    paths = {n: program.cache_path(store.cache, bucket, r) for n, r in remote.items()}
    assert len({str(path).lower() for path in paths.values()}) == len(HOSTILE_NAMES)
    for path in paths.values():
        assert path.parent == store.cache
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{1,120}", path.name)


@pytest.mark.parametrize("name", [n for n in HOSTILE_NAMES if "\0" not in n])
def test_hostile_keys_are_fetched_like_any_other(
    store: Store, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    store.put(name)
    before = set(tmp_path.rglob("*"))
    file = store.fetch(dataset_name=PREFIX + name)
    assert file.path.read_bytes() == DATA
    assert file.path.parent == store.cache
    assert all(store.cache in (p, p.parent) for p in set(tmp_path.rglob("*")) - before)
    assert "\x1b" not in caplog.text and "\x1b" not in file.source


def test_symlinks_in_the_cache_are_not_followed(store: Store, tmp_path: Path) -> None:
    store.put("alpaca.json")
    path = store.fetch().path
    victim = tmp_path / "victim"
    victim.write_bytes(DATA)  # the right bytes, in a wrong place
    path.unlink()
    path.symlink_to(victim)
    orphan = path.with_name(path.name + ".99999999-00aa.partial")
    orphan.symlink_to(victim)
    file = store.fetch()
    assert not file.path.is_symlink() and file.path.read_bytes() == DATA
    assert victim.read_bytes() == DATA and not orphan.exists()
    assert len(store.proxy.asked("object")) == 2
    info = path.with_name(path.name + ".info")
    shutil.copy(info, victim)
    info.unlink()
    info.symlink_to(victim)
    before = victim.read_bytes()
    assert store.fetch().path.read_bytes() == DATA
    assert victim.read_bytes() == before and not info.is_symlink()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"size": 1e999}',
        "[" * 100_000,
        '"\\ud800"',
        "\x00" * 9,
        "x" * 99_999,
    ]
    + [
        json.dumps({"key": 1, "size": "x", "etag": None, "last_modified": date, "sha256": 5})
        for date in ("0001-01-01", "2020-01-01T00:00:00", "x", 7)
    ],
)
def test_any_junk_in_place_of_an_info_file_is_harmless(store: Store, text: str) -> None:
    store.put("alpaca.json")
    path = store.fetch().path
    path.with_name(path.name + ".info").write_text(text, encoding="utf-8")
    (store.cache / ".info").write_text(text, encoding="utf-8")
    os.mkfifo(store.cache / "pipe.json.info")
    store.proxy.on_listing(always=status(503))
    assert "answered 503" in str(failure(store.fetch))
    store.proxy.on_listing()
    assert store.fetch().path.read_bytes() == DATA


def test_a_disk_without_room_is_refused_before_the_download(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("alpaca.json")
    usage = shutil.disk_usage("/")._replace(free=1_000_000)
    monkeypatch.setattr(program.shutil, "disk_usage", lambda _: usage)
    error = failure(store.fetch)
    assert "needs 300.0 kB" in str(error) and "1.0 MB free" in str(error)
    assert "--cache_dir" in error.hint and not store.proxy.asked("object")


def test_a_disk_that_fills_up_keeps_what_came(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("alpaca.json")
    original = program.write_data

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            if self.file.tell() > 100_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data[:1000])  # and short writes before that

    with monkeypatch.context() as patch:
        patch.setattr(program, "write_data", lambda f, data, n: original(Full(f), data, n))
        error = failure(store.fetch)
    assert "is full" in str(error) and "--cache_dir" in error.hint
    (partial,) = store.partials()
    size = partial.stat().st_size
    assert size > 100_000 and DATA.startswith(partial.read_bytes())
    assert store.fetch().path.read_bytes() == DATA
    assert store.proxy.asked("object")[-1].headers["range"] == f"bytes={size}-"
    assert not store.partials()


def test_a_damaged_partial_file_never_gets_into_the_result(store: Store) -> None:
    store.put("alpaca.json")
    store.proxy.on_object(cut(150_000), always=status(401, "Unauthorized"))
    failure(store.fetch)
    (partial,) = store.partials()
    partial.write_bytes(b"\0" * 150_000)  # as after a power cut
    store.proxy.on_object()
    assert store.fetch().path.read_bytes() == DATA


@pytest.mark.parametrize("kind", ["file", "readonly"])
def test_a_cache_that_cannot_be_written_is_told(store: Store, tmp_path: Path, kind: str) -> None:
    store.put("alpaca.json")
    if kind == "file":
        store.cache.write_text("no folder")
    elif os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    else:
        store.cache.mkdir(mode=0o500)
    error = failure(store.fetch)
    assert "cache folder cannot be written" in str(error) and "--cache_dir" in error.hint
    if kind == "file":
        store.cache.unlink()


# --- processes: the real program's `data` command, with the other stages left out

SCRIPT = """
import sys, types
sys.path.insert(0, {root!r})
import unified_finetune as program
program.BACKOFF_SECONDS = 0.01
program.run_preflight = lambda config: None
program.prepare_dataset = lambda file, config: print(file.sha256)
program.estimate_run = lambda data, report, config: None
{extra}
sys.exit(program.main(["data", *sys.argv[1:]]))
"""


def start(
    store: Store, environment: "dict[str, str]", extra: str = "", **settings: str
) -> "subprocess.Popen[str]":
    """Start the program in a process of its own."""
    settings = {
        "r2_bucket_name": store.bucket.name,
        "r2_data_prefix": PREFIX,
        "cache_dir": str(store.cache),
        "log_dir": str(store.cache.parent / "logs"),
        **settings,
    }
    flags = [text for name, value in settings.items() for text in ("--" + name, value)]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(root=str(ROOT), extra=extra), *flags],
        env={
            **environment,
            **store.bucket.server.environment(),
            "R2_ENDPOINT_URL": store.proxy.url,
        },
        cwd=store.cache.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: "Callable[[], object]") -> None:
    """Wait until something is true; fail when it does not become so."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_the_command_ends_with_code_12_and_shows_no_secret_anywhere(
    store: Store, cli_environment: "dict[str, str]", tmp_path: Path
) -> None:
    store.proxy.on_listing(always=status(403, "SignatureDoesNotMatch"))
    process = start(store, cli_environment)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 12 and out == ""
    assert "Traceback" not in err and "-> Check R2_SECRET_ACCESS_KEY" in err
    logs = "".join(p.read_text() for p in (tmp_path / "logs").iterdir())
    assert "SignatureDoesNotMatch" in logs and "Traceback" in logs
    server = store.bucket.server
    for secret in (server.secret_key, server.access_key):
        assert secret not in logs + err + out


def test_a_killed_download_is_continued_by_the_next_run(
    store: Store, cli_environment: "dict[str, str]"
) -> None:
    store.put("alpaca.json")
    store.proxy.on_object(stall(200_000))
    process = start(store, cli_environment)
    wait_for(lambda: [p for p in store.partials() if p.stat().st_size > 100_000])
    process.kill()
    process.communicate()
    size = store.partials()[0].stat().st_size
    assert store.fetch().path.read_bytes() == DATA
    assert store.proxy.asked("object")[-1].headers["range"] == f"bytes={size}-"
    assert not store.partials()


@pytest.mark.parametrize("locks", ["work", "do nothing", "fail"])
def test_two_runs_at_once_both_end_with_the_right_bytes(
    store: Store, cli_environment: "dict[str, str]", locks: str
) -> None:
    store.put("alpaca.json")
    slow = drip(20_000, 0.1)
    store.proxy.on_object(slow, flip(99), slow, slow)
    extra = {
        "work": "",
        "do nothing": "import fcntl; fcntl.flock = lambda *_: None",
        "fail": "import fcntl, os; fcntl.flock = lambda *_: os.stat('no such file')",
    }[locks]
    processes = [start(store, cli_environment, extra) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out.strip()) == (0, hashlib.sha256(DATA).hexdigest()), err
    assert len(store.published()) == 1 and not store.partials()
    if locks == "work":
        assert len(store.proxy.asked("object")) == 1


STUCK = {
    "name lookup": "import socket, time; socket.getaddrinfo = lambda *_, **__: time.sleep(99)",
    "backing off": "program.BACKOFF_SECONDS = 900; program.BACKOFF_CAP_SECONDS = 900; "
    "program.random.uniform = lambda low, high: high",
}


@pytest.mark.parametrize(
    "moment", ["name lookup", "listing", "head", "before", "middle", "drip", "backing off", "lock"]
)
def test_ctrl_c_and_sigterm_end_the_download_at_any_moment(
    store: Store, cli_environment: "dict[str, str]", moment: str
) -> None:
    number = signal.SIGTERM if moment == "middle" else signal.SIGINT
    store.put("alpaca.json")
    proxy, never = store.proxy, stall_before_answer()
    reached: Callable[[], object]
    if moment == "listing":
        proxy.on_listing(never)
        reached = lambda: proxy.asked("listing")  # noqa: E731
    elif moment == "head":
        proxy.on_head(never)
        reached = lambda: proxy.asked("head")  # noqa: E731
    elif moment == "backing off":
        proxy.on_object(status(503))
        reached = lambda: proxy.asked("object")  # noqa: E731
    else:
        proxy.on_object({"middle": stall(200_000), "drip": drip(1, 0.5)}.get(moment, never))
        reached = lambda: proxy.asked("object")  # noqa: E731
    other = start(store, cli_environment) if moment == "lock" else None
    if other:
        wait_for(reached)
    process = start(store, cli_environment, STUCK.get(moment, ""))
    assert process.stderr
    if moment in ("name lookup", "lock"):
        wanted = "waiting for it" if other else "[2/5]"
        lines = iter(process.stderr.readline, "")
        assert any(wanted in line for line in lines)
    else:
        wait_for(reached)
    time.sleep(0.2)  # let it get stuck
    process.send_signal(number)
    # Far below STALL_SECONDS: whoever waits for the network here does not make it.
    _, err = process.communicate(timeout=10)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "Traceback" not in err and "Run the same command again" in err
    if other:
        other.kill()
        other.communicate()
    proxy.on_listing()
    proxy.on_head()
    proxy.on_object()
    assert store.fetch().path.read_bytes() == DATA
