"""Stage 2: whatever the network, the server and the cache do, right bytes or a clear error."""

import gzip
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import ANY, Mock

import faultproxy as net
import pytest
from conftest import ROOT, Bucket, S3Server

import unified_finetune as program
from unified_finetune import FineTuningConfig, FineTuningError, check_data, fetch_dataset

PREFIX = "training/"
SECRET = "b7" * 32
DATA, NEWER = random.Random(1).randbytes(300_000), random.Random(2).randbytes(250_000)
MIB = 1024 * 1024
SHORTER = net.header(slice(200_000), content_length=200_000)
sleep = time.sleep  # the real one


class Store:
    """A bucket behind the fault proxy, and a cache folder that is checked when the test ends."""

    def __init__(self, bucket: Bucket, proxy: net.FaultProxy, cache: Path) -> None:
        self.server, self.client, self.bucket = bucket.server, bucket.client, bucket.name
        self.proxy, self.cache = proxy, cache
        self.digests: set[str] = set()  # of all objects that were ever put

    def put(self, name: str, body: bytes = DATA, prefix: str = PREFIX, **arguments: Any) -> str:
        """Store an object and return its ETag."""
        self.digests.add(hashlib.sha256(body).hexdigest())
        where = {"Bucket": self.bucket, "Key": prefix + name}
        return self.client.put_object(**where, Body=body, **arguments)["ETag"].strip('"')

    def fetch(self, **settings: Any) -> program.DatasetFile:
        """Run the stage."""
        own = {"r2_bucket_name": self.bucket, "r2_data_prefix": PREFIX}
        return fetch_dataset(FineTuningConfig(**{**own, "cache_dir": str(self.cache), **settings}))

    def check(self, *names: str, bucket: str = "", prefix: str = PREFIX) -> program.Check:
        """Run preflight's check of the data."""
        return check_data((), names, bucket or self.bucket, prefix, self.cache)

    def published(self) -> "list[Path]":
        """Return the cached files that carry their final name."""
        found = self.cache.glob("*-*.[jcp]*") if self.cache.is_dir() else ()
        return [p for p in found if p.is_file() and p.suffix not in (".info", ".lock")]

    def partials(self) -> "list[Path]":
        """Return the unfinished downloads."""
        return [p for p in self.cache.glob("*.partial/*") if p.suffix != ".info"]

    def asked(self, kind: str = "object") -> int:
        """Return how many times something was asked for."""
        return len(self.proxy.asked(kind))


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[net.FaultProxy]:
    """Return one proxy for all tests."""
    with net.FaultProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def store(bucket, proxy, tmp_path, monkeypatch) -> Iterator[Store]:
    """Return a bucket behind the fault proxy; at the end no wrong byte may be in its cache."""
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    set_r2(monkeypatch, **{**bucket.server.environment(), "R2_ENDPOINT_URL": proxy.url})
    proxy.reset()
    # The user's own settings have no say.
    config = "[default]\nregion = mars\ns3 =\n  addressing_style = virtual\n"
    (tmp_path / "aws").write_text(config)
    own = {"CONFIG_FILE": tmp_path / "aws", "PROFILE": "none-such", "SESSION_TOKEN": "elsewhere"}
    for name, value in own.items():
        monkeypatch.setenv(f"AWS_{name}", str(value))
    store = Store(bucket, proxy, tmp_path / "cache")
    yield store
    for path in store.published():
        assert hashlib.sha256(path.read_bytes()).hexdigest() in store.digests, path


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every socket that would wait 30 s for a byte wait half a second."""
    original = socket.socket.settimeout
    shorter = lambda self, value: original(self, 0.5 if value == 30 else value)  # noqa: E731
    monkeypatch.setattr(socket.socket, "settimeout", shorter)


def set_r2(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    """Set these variables, and no others of R2, AWS or a proxy."""
    for name in list(os.environ):
        if name.startswith(("R2_", "AWS_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def failure(
    call: "Callable[..., object]", message: str = "", hint: str = "", **settings: Any
) -> FineTuningError:
    """Return the error that a call must end with, and check its words."""
    with pytest.raises(FineTuningError) as caught:
        call(**settings)
    assert message in str(caught.value) and hint in caught.value.hint
    return caught.value


# --- the R2 variables

ACCOUNT = "0123456789abcdef" * 2
GOOD = {"R2_ACCOUNT_ID": ACCOUNT, "R2_ACCESS_KEY_ID": "ab" * 16, "R2_SECRET_ACCESS_KEY": SECRET}


@pytest.mark.parametrize(("changes", "expected"), [
    ({}, f"The name {ACCOUNT}.r2.cloudflarestorage.com"),
    ({n: f" '{v}' " for n, v in GOOD.items()}, f"The name {ACCOUNT}.r2.cloudflarestorage.com"),
    ({"R2_ENDPOINT_URL": "https://a.eu.r2.cloudflarestorage.com/"}, "The name a.eu.r2.cloudf"),
    ({"R2_ENDPOINT_URL": "http://x.example:9000", "R2_ACCESS_KEY_ID": "me"},
     "The name x.example:9000"),
    ({"R2_ENDPOINT_URL": "https://x.supabase.co/storage/v1/s3"}, "The name x.supabase.co"),
    ({"R2_ENDPOINT_URL": "https://a.b-c.example./the-bucket/"}, "The name a.b-c.example."),
    ({"R2_ACCOUNT_ID": "my-account"}, "R2_ACCOUNT_ID must be the account's 32 hexadecimal"),
    ({"R2_ENDPOINT_URL": SECRET, "R2_SECRET_ACCESS_KEY": ""}, "R2_ENDPOINT_URL must be like"),
    ({"R2_SECRET_ACCESS_KEY": "two words"}, "R2_SECRET_ACCESS_KEY must be one word"),
    ({"R2_ACCESS_KEY_ID": f"{SECRET} {SECRET}"}, "R2_ACCESS_KEY_ID must be one word"),
    ({"HTTPS_PROXY": "socks5://me:s0cret@host:1080"}, "HTTPS_PROXY and HTTP_PROXY (like http"),
    ({"https_proxy": "http://me:s0cret@host:99999"}, "HTTPS_PROXY and HTTP_PROXY (like http://"),
    ({"bucket": "two words"}, "R2_BUCKET_NAME must be a bucket's name"),
    (dict.fromkeys(GOOD, ""), "R2_ACCOUNT_ID is missing; R2_ACCESS_KEY_ID is missing; R2_SEC"),
    (dict.fromkeys(GOOD, ""), "into .env (see .env.example), or use --data_path FILE."),
    *(
        ({"R2_ENDPOINT_URL": url}, "R2_ENDPOINT_URL must be like https://<account id>.r2.")
        for url in (
            f"https://{'a' * 64}.com", "https://[", "https://host.com/?x=1", "ftp://host", "https://a..b",
            "account.r2.cloudflarestorage.com", "https://a_b.example", "https://-a.example",
            "https://user:password9@host", "https://bücher.example",
        )
    ),
])  # fmt: skip
def test_the_variables_name_the_server_or_are_explained_all_at_once(
    monkeypatch, tmp_path, changes, expected
):
    values = {**GOOD, **changes}
    bucket = values.pop("bucket", "the-bucket")
    set_r2(monkeypatch, **values)
    unknown = Mock(side_effect=socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    error = failure(partial(check_data, (), (), bucket, PREFIX, tmp_path))
    told = f"{error} {error.hint}"
    assert expected in told
    assert not [secret for secret in (SECRET, "password9", "s0cret") if secret in told]
    if expected.startswith("The name"):
        assert "cannot be found" in told and "internet connection" in told


# --- local files


def test_local_files_are_taken_as_they_are_one_or_several(tmp_path):
    one, two = tmp_path / "mine.json", tmp_path / "more.csv"
    one.write_bytes(DATA)
    two.write_bytes(NEWER)
    file = fetch_dataset(FineTuningConfig(data_path=str(one)))
    assert (file.path, file.size, file.etag, file.parts) == (one, len(DATA), None, ())
    assert file.sha256 == hashlib.sha256(DATA).hexdigest() and str(one) in file.source
    both = fetch_dataset(FineTuningConfig(data_path=(str(one), str(two))))
    assert [part.path for part in both.files] == [one, two] and both.parts[0] == file
    assert (both.path, both.size) == (one, len(DATA) + len(NEWER))
    digests = file.sha256 + hashlib.sha256(NEWER).hexdigest()
    assert both.sha256 == hashlib.sha256(digests.encode()).hexdigest()
    check = check_data((str(one), str(two)), (), "b", "", tmp_path)
    assert check.outcome == "ok" and "550.0 kB" in check.detail


def test_local_files_that_cannot_be_data_are_refused_in_stage_1_and_in_stage_2(tmp_path):
    (tmp_path / "empty.json").touch()
    (tmp_path / "alpaca.json").write_text("[]")
    os.mkfifo(tmp_path / "pipe.json")
    for name, message in [
        ("empty.json", "it is empty (0 bytes)"), (".", "it is not a file"),
        ("pipe.json", "it is not a file"), ("alpaca.json/x.json", "Not a directory"),
        ("alpca.json", f"No such file or directory, did you mean '{tmp_path}/alpaca.json'?"),
        ("x" * 300, "File name too long"), ("\udcff.json", "\\udcff.json cannot be read: "),
    ]:  # fmt: skip
        path = str(tmp_path / name)
        config = FineTuningConfig(data_path=path)
        error = failure(partial(fetch_dataset, config), message, "--data_path")
        assert str(failure(partial(check_data, (path,), (), "b", "", tmp_path))) == str(error)
    both = (str(tmp_path / "none.json"), str(tmp_path / "empty.json"))
    told = str(failure(partial(check_data, both, (), "b", "", tmp_path)))
    assert "none.json cannot be read: No such" in told and "empty.json cannot be read: it" in told


# --- which object


def test_alpaca_wins_then_the_newest(store, caplog):
    caplog.set_level("INFO")
    store.put("old_ALPACA.json", b"[1]")
    store.put("")  # a folder marker
    sleep(1.1)  # times in listings are whole seconds
    store.put("sets/alpaca-new.parquet", b"[2]")
    store.put("newest.csv", b"[3]")
    store.put("alpaca.txt", b"[4]")
    store.put("alpaca_empty.json", b"")
    assert "sets/alpaca-new.parquet" in store.check().detail
    assert store.fetch().path.read_bytes() == b"[2]"
    assert f"Chosen in {store.bucket}: training/sets/alpaca-new.parquet, 3 B" in caplog.text
    assert "with 'alpaca' in its name, of 6 objects" in caplog.text
    assert store.published()[0].suffix == ".parquet"


def test_a_name_is_a_key_or_its_end_and_may_be_several(store):
    for number, name in enumerate(["a/one.json", "b/two.json", "b/one.json", "alpaca.json"]):
        store.put(name, b"[%d]" % number)
    store.put("empty.json", b"")
    store.put("one.json", b"[4]", prefix="elsewhere/")
    for name, content in [
        (PREFIX + "a/one.json", b"[0]"), ("b/one.json", b"[2]"), ("two.json", b"[1]"),
        ("elsewhere/one.json", b"[4]"),
    ]:  # fmt: skip
        assert store.fetch(dataset_name=name).path.read_bytes() == content
    both = store.fetch(dataset_name=("two.json", "alpaca.json"))
    assert [part.path.read_bytes() for part in both.files] == [b"[1]", b"[3]"]
    assert "two.json" in both.source and "alpaca.json" in both.source and both.size == 6
    for name, message, hint in [
        ("one.json", "fits 2 of", "training/a/one.json"),
        ("twoo.json", "'twoo.json' fits 0 of the 4 objects", "Choose 'training/b/two.json'"),
        ("empty.json", "'empty.json' fits 0", "Choose"),
        (("two.json", "nothing-like"), "'nothing-like' fits 0 of", "Choose"),
    ]:
        failure(store.fetch, message, hint, dataset_name=name)
    store.proxy.on_listing(always=net.say(503))  # the copy from elsewhere is one, too
    assert store.fetch(dataset_name="elsewhere/one.json").path.read_bytes() == b"[4]"


# --- what cannot work: tried once, each with its own message


def test_wrong_secret_bucket_prefix_and_object_are_told_apart(store, monkeypatch):
    failure(store.fetch, "under 'training/', which holds nothing", "R2_BUCKET_NAME")
    store.put("empty.json", b"")
    failure(store.fetch, "which holds training/empty.json, 0 B", "--data_path")
    other = {"r2_bucket_name": "no-such-bucket"}
    failure(store.fetch, "no bucket 'no-such-bucket'", "R2_BUCKET_NAME", **other)
    monkeypatch.setenv("R2_SECRET_ACCESS_KEY", "quite-another-secret")
    error = failure(store.fetch, "secret access key does not belong", "R2_SECRET_ACCESS_KEY")
    assert "quite-another-secret" not in str(error) + error.hint


@pytest.mark.parametrize(("fault", "message", "hint"), [
    (net.status(401, "Unauthorized"), "does not know the access key ID", "R2_ACCESS_KEY_ID"),
    (net.status(403, "AccessDenied"), "denies the access", ".eu.r2.cloudflarestorage.com"),
    (net.status(403, "RequestTimeTooSkewed"), "this machine's clock is wrong", "Set the clock"),
    (net.status(301, "PermanentRedirect"), "like an S3 server: 301", "R2_ENDPOINT_URL"),
    (net.say(404, "<html>Not found"), "not answer like an S3 server: 404", "login page"),
    (net.status(400, "InvalidArgument"), "400 InvalidArgument injected", "R2_ENDPOINT_URL"),
])  # fmt: skip
def test_refusals_are_tried_once_and_name_the_setting(store, fault, message, hint):
    store.put("alpaca.json")
    store.proxy.on_listing(always=fault)
    error, told = failure(store.fetch, message, hint), failure(store.check)
    assert (str(told), told.hint) == (str(error), error.hint)
    assert store.asked("listing") == 2 and not store.published()


def test_a_port_or_a_proxy_where_nobody_listens_and_no_tls_are_told(store, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = f"127.0.0.1:{server.getsockname()[1]}"
    for url, through, message, hint in [
        (f"http://{nobody}", "", f"{nobody} refuses connections", ""),
        (f"http://{nobody}/x", f"http://{nobody}", "The proxy on the way", "HTTPS_PROXY"),
        ("http://127.0.0.1:99999", f"http://{nobody}", "127.0.0.1:99999", ""),
        (store.proxy.url.replace("http:", "https:"), "", "No secure connection to 127.0", "AWS_CA"),
    ]:
        monkeypatch.setenv("R2_ENDPOINT_URL", url)
        monkeypatch.setenv("HTTP_PROXY", through)
        error = failure(store.fetch, message, hint)
    assert "R2_ACCOUNT_ID" in error.hint


# --- what may work a little later


@pytest.mark.parametrize("fault", [
    net.status(503, "SlowDown"), net.status(500, "InternalError"), net.say(502, "<html>Bad"),
    net.say(520), net.say(524, "<html>"), net.status(429, "TooManyRequests"),
    net.say(200, "{}"), net.say(200, "<html><p>Sign in</p></html>"),
    net.status(408, "RequestTimeout"), net.cut(0), net.cut(40), net.reset(0),
    net.stall(None), net.stall(50),
])  # fmt: skip
def test_a_request_that_fails_twice_is_repeated(store, impatient, fault):
    store.put("alpaca.json")
    store.proxy.on_listing(fault, fault)
    store.proxy.on_object(fault, fault)
    assert store.fetch().path.read_bytes() == DATA
    assert store.asked("listing") >= 3 and store.asked() == 3


def test_four_failures_are_survived_and_five_are_not(store, monkeypatch):
    longest: list[float] = []
    monkeypatch.setattr(random, "uniform", lambda _low, high: longest.append(high) or 0)
    store.put("alpaca.json")
    fault = net.status(503, "SlowDown")
    store.proxy.on_object(fault, fault, fault, fault)
    assert store.fetch().path.read_bytes() == DATA
    assert longest == [1, 2, 4, 8] and store.asked() == 5
    store.put("alpaca.json", NEWER)  # what the bucket has now, not the older copy
    store.proxy.on_object(fault, fault, fault, fault, fault)
    failure(store.fetch, "answered 503 SlowDown", "later")
    assert store.asked() == 10 and not store.partials()  # nothing came, nothing is left behind


# --- broken downloads


@pytest.mark.parametrize(("faults", "starts"), [
    *(([net.cut(offset)], [0, offset]) for offset in (0, 1, 77_777, 196_608, len(DATA) - 1)),
    ([net.cut(20_000)] * 14, list(range(0, 300_000, 20_000))),  # no failure while bytes keep coming
    ([net.reset(150_000), net.reset(100_000), net.reset(1)], [0, ANY, ANY, ANY]),
    ([net.flip(123_456)], [0, 0]),
    ([net.cut(100_000), net.flip(5)], [0, 100_000, 0]),
    ([SHORTER], [0, 0]),
    ([net.cut(100_000), net.ignore_range()], [0, 100_000, 0]),
    ([net.cut(100_000), net.header(content_range="bytes 99999-299998/300000")], [0, 100_000, 0]),
    ([net.cut(100_000), net.status(416, "InvalidRange")], [0, 100_000, 0]),
])  # fmt: skip
def test_a_broken_download_goes_on_where_it_stopped_or_anew_and_ends_right(store, faults, starts):
    store.put("alpaca.json")
    store.proxy.on_object(*faults)
    assert store.fetch().path.read_bytes() == DATA
    asked = store.proxy.asked("object")
    assert [int(headers.get("range", "bytes=0-")[6:-1]) for headers in asked] == starts
    assert len({headers["if-match"] for headers in asked}) == 1
    assert not list(store.cache.glob("*.partial"))


def test_a_slow_download_is_left_alone_and_a_stall_at_every_attempt_is_told(store, impatient):
    store.put("alpaca.json")
    store.proxy.on_object(net.drip(15_000, 0.05))  # longer than the patience as a whole
    assert store.fetch().path.read_bytes() == DATA and store.asked() == 1
    shutil.rmtree(store.cache)
    store.proxy.on_object(net.stall(100_000), always=net.stall(0))
    failure(store.fetch, "nothing came for 30 s", "goes on from here")
    (unfinished,) = store.partials()
    assert 0 < len(unfinished.read_bytes()) <= 100_000 and DATA.startswith(unfinished.read_bytes())


def test_wrong_bytes_every_time_are_never_cached(store):
    store.put("alpaca.json")
    store.proxy.on_object(always=net.flip(123_456))
    failure(store.fetch, "does not match its ETag", "another network")
    assert store.asked() == 2  # the same wrong bytes twice: no third time
    store.proxy.on_object(always=SHORTER)
    failure(store.fetch, "offers 200000 bytes where the object has 300000")
    assert not store.published() and not store.partials()


def test_an_object_replaced_during_the_download_is_taken_anew(store, caplog):
    caplog.set_level("INFO")
    store.put("alpaca.json")
    store.proxy.on_object(net.cut(100_000), net.after(lambda: store.put("alpaca.json", NEWER)))
    file = store.fetch()
    assert file.path.read_bytes() == NEWER and store.published() == [file.path]
    assert file.sha256 == hashlib.sha256(NEWER).hexdigest()
    assert file.etag == hashlib.md5(NEWER).hexdigest()
    assert "it was replaced meanwhile. Attempt 1 of 5 failed." in caplog.text
    assert len(list(store.cache.iterdir())) == 4  # file, record, lock; the first one's lock
    shutil.rmtree(store.cache)
    number = iter(range(99))
    always = net.after(lambda: store.put("alpaca.json", DATA + b"%d" % next(number)))
    store.proxy.on_object(always=always)
    failure(store.fetch, "it was replaced meanwhile")
    assert next(number) == 5


# --- what the ETag proves


@pytest.mark.parametrize(("size", "parts", "proof"), [
    (5 * MIB, 2, "multipart ETag (5242880 bytes"),
    (6 * MIB, 1, "multipart ETag (8388608 bytes"),
    (6_000_000, 2, "two equal downloads"),
])  # fmt: skip
def test_a_multipart_etag_proves_the_content_or_two_downloads_do(store, size, parts, proof, caplog):
    caplog.set_level("INFO")
    pieces = [random.Random(i).randbytes(size) for i in range(parts)] + [b"end"] * (parts > 1)
    where = {"Bucket": store.bucket, "Key": PREFIX + "alpaca.json"}
    where["UploadId"] = store.client.create_multipart_upload(**where)["UploadId"]
    tags = [store.client.upload_part(**where, PartNumber=number, Body=piece)["ETag"]
            for number, piece in enumerate(pieces, 1)]  # fmt: skip
    done = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
    store.client.complete_multipart_upload(**where, MultipartUpload={"Parts": done})
    store.digests.add(hashlib.sha256(b"".join(pieces)).hexdigest())
    store.proxy.on_object(net.flip(3), net.cut(5_000_000))
    file = store.fetch()
    assert file.path.read_bytes() == b"".join(pieces)
    assert file.etag and file.etag.endswith(f"-{len(pieces)}")
    assert proof in caplog.text
    asked = store.asked()
    assert store.fetch() == file and store.asked() == asked


# --- the cache


def test_the_second_run_takes_the_verified_copy(store, caplog):
    caplog.set_level("INFO")
    etag = store.put("alpaca.json")
    first = store.fetch()
    assert first.etag == etag == hashlib.md5(DATA).hexdigest()
    assert store.fetch() == first and store.asked() == 1
    assert "cached copy is current and intact" in caplog.text
    assert first.sha256 == hashlib.sha256(DATA).hexdigest()
    packed = gzip.compress(NEWER)  # is kept as it is
    store.put("alpaca.json", packed, ContentEncoding="gzip")
    assert (store.fetch().path.read_bytes(), first.path.read_bytes()) == (packed, DATA)


@pytest.mark.parametrize("damage", ["flip", "truncate", "gone", "link"])
def test_a_damaged_copy_is_told_and_downloaded_again(store, damage, tmp_path, caplog):
    store.put("alpaca.json")
    path, victim = store.fetch().path, tmp_path / "victim"
    victim.write_bytes(b"somebody's own")
    if damage in ("gone", "link"):
        path.unlink()
    else:
        path.write_bytes(bytes([DATA[0] ^ 1]) + DATA[1:] if damage == "flip" else DATA[:-1])
    if damage == "link":
        path.symlink_to(victim)
    assert store.fetch().path.read_bytes() == DATA
    assert "is damaged" in caplog.text and store.asked() == 2
    assert victim.read_bytes() == b"somebody's own" and not path.is_symlink()


def test_without_the_bucket_the_newest_verified_copy_is_used(store, caplog, monkeypatch):
    store.put("alpaca.json")
    store.fetch()
    sleep(1.1)  # times of versions are whole seconds
    store.put("alpaca.json", NEWER)
    newest = store.fetch()
    store.proxy.on_listing(always=net.say(503))
    file = store.fetch()
    assert (file.path, file.sha256) == (newest.path, newest.sha256)
    assert "not asked" in file.source
    check = store.check()
    assert check.outcome == "warning" and check.detail in caplog.text
    assert "answered 503" in check.detail and "are used: training/alpaca.json" in check.detail
    newest.path.write_bytes(b"damaged")
    assert store.fetch().path.read_bytes() == DATA
    newest.path.unlink()
    # Only what was asked for is used.
    for names, prefix, bucket in [
        (["other.json"], PREFIX, store.bucket), ([], "elsewhere/", store.bucket),
        ([], PREFIX, "another-bucket"), (["alpaca.json", "other.json"], PREFIX, store.bucket),
    ]:  # fmt: skip
        failure(partial(store.check, *names, bucket=bucket, prefix=prefix), "answered 503")
    assert store.fetch(dataset_name="alpaca.json").path.read_bytes() == DATA
    monkeypatch.setenv("R2_ENDPOINT_URL", "http://127.0.0.1:9")  # another server
    failure(store.fetch, "127.0.0.1:9 refuses connections")
    # Without credentials it serves, too; with wrong ones it does not.
    store.proxy.on_listing()
    monkeypatch.setenv("R2_ENDPOINT_URL", store.proxy.url)
    monkeypatch.setenv("R2_SECRET_ACCESS_KEY", "quite-another-secret")
    failure(store.fetch, "does not belong")
    failure(store.check, "does not belong")
    set_r2(monkeypatch)
    assert store.fetch().path.read_bytes() == DATA
    assert "R2_ACCESS_KEY_ID is missing" in caplog.text and store.check().outcome == "warning"
    failure(store.fetch, "is missing", dataset_name="other.json")


HOSTILE_NAMES = [
    "../../outside.json", "/absolute.json", "..", "..\\..\\windows.json", "a?b#c&d=e+f.json",
    "new\nline \x1b[31mred.json", "ünïcödé \u202etxt.json", "-rf.json", "%2e%2e%2fquoted.json",
    "x" * 300 + ".json", "d/" * 150 + "deep.json", "alpaca.json", "ALPACA.JSON",
]  # fmt: skip


def test_hostile_keys_get_a_file_of_their_own_in_the_cache(store, tmp_path, caplog):
    caplog.set_level("INFO")
    for name in HOSTILE_NAMES:
        store.put(name)
    before, paths = set(tmp_path.rglob("*")), set()
    for name in HOSTILE_NAMES:
        file = store.fetch(dataset_name=PREFIX + name)
        assert file.path.read_bytes() == DATA and file.path.parent == store.cache
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{1,120}", file.path.name)
        assert "\x1b" not in caplog.text and "\x1b" not in file.source
        paths.add(str(file.path).lower())
    assert len(paths) == len(HOSTILE_NAMES)
    assert all(store.cache in (p, p.parent) for p in set(tmp_path.rglob("*")) - before)


def test_any_junk_in_place_of_an_info_file_is_harmless(store):
    store.put("alpaca.json")
    path = store.fetch().path
    true = json.loads(path.with_name(path.name + ".info").read_text())
    junk = ["", '{"key": 1', "[]", "null", "{}", '"\\ud800"', "\0" * 9, "[" * 10**5, "x" * 10**5]
    changes = {"sha256": 5, "size": 1e999, "key": None, "host": ["x"], "etag": "another"}
    junk += [json.dumps({**true, name: value}) for name, value in changes.items()]
    for text in junk:
        path.with_name(path.name + ".info").write_text(text, encoding="utf-8")
        (store.cache / ".info").write_text(text, encoding="utf-8")
        store.proxy.on_listing(always=net.status(401, "Unauthorized"))
        failure(store.fetch, "does not know")
    store.proxy.on_listing()
    assert store.fetch().path.read_bytes() == DATA


def test_a_disk_without_room_is_told_before_the_download_or_keeps_what_came(store, monkeypatch):
    store.put("alpaca.json")
    usage = shutil.disk_usage("/")._replace(free=1_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        failure(store.fetch, "1.0 MB are free")
    shutil.rmtree(store.cache)
    store.cache.write_text("no folder")
    failure(store.fetch, f"{store.cache} cannot be written", "--cache_dir")
    assert not store.asked()
    store.cache.unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        failure(store.fetch, "cannot be written: File too large", "--cache_dir")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.read_bytes() for path in store.partials()] == [DATA[:200_000]]
    assert store.fetch().path.read_bytes() == DATA
    assert store.proxy.asked("object")[-1]["range"] == "bytes=200000-"


@pytest.mark.parametrize("length", [150_000, len(DATA), len(DATA) + 9])
def test_a_damaged_partial_file_never_gets_into_the_result(store, length):
    store.put("alpaca.json")
    store.proxy.on_object(net.cut(150_000), always=net.status(401, "Unauthorized"))
    failure(store.fetch)
    (unfinished,) = store.partials()
    unfinished.write_bytes(b"\0" * length)  # as after a power cut
    store.proxy.on_object()
    assert store.fetch().path.read_bytes() == DATA


# --- processes of their own

SCRIPT = """
import random, sys
sys.path.insert(0, {root!r})
import unified_finetune as program
program.stop.install()
program.start_logging(program.Path("logs"), verbose=False)
random.uniform = lambda low, high: 900
try:
    print(program.fetch_dataset(program.FineTuningConfig(**{settings})).sha256)
except KeyboardInterrupt:
    sys.exit(128 + program.stop.number)
"""


def start(store: Store, environment: "dict[str, str]") -> Any:
    """Start the stage in a process of its own; it waits for minutes between attempts."""
    settings = {"r2_bucket_name": store.bucket, "r2_data_prefix": PREFIX, "cache_dir": "cache"}
    script = SCRIPT.format(root=str(ROOT), settings=settings)
    own = {**environment, **store.server.environment(), "R2_ENDPOINT_URL": store.proxy.url}
    options: Any = {"env": own, "cwd": store.cache.parent, "text": True}
    options |= dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", script], **options)


def wait_for(condition: "Callable[[], object]") -> None:
    """Wait until something is true; fail when it does not become so."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        sleep(0.02)


def test_two_runs_at_once_download_once(store, cli_environment):
    store.put("alpaca.json")
    store.proxy.on_object(net.drip(10_000, 0.1))
    processes = [start(store, cli_environment) for _ in range(2)]
    ends = [process.communicate(timeout=60) for process in processes]
    assert [out.strip() for out, _ in ends] == [hashlib.sha256(DATA).hexdigest()] * 2, ends
    assert len(store.published()) == 1 and store.asked() == 1
    assert sum("waiting for it" in err for _, err in ends) == 1


@pytest.mark.parametrize(("moment", "number"), [
    ("listing", signal.SIGINT), ("middle", signal.SIGTERM), ("backing off", signal.SIGINT),
    ("middle", signal.SIGKILL),
])  # fmt: skip
def test_a_signal_ends_a_download_at_any_moment_and_the_next_run_goes_on(
    store, cli_environment, tmp_path, moment, number
):
    store.put("alpaca.json")
    store.proxy.on_listing(net.stall(None) if moment == "listing" else None)
    store.proxy.on_object(net.say(503) if moment == "backing off" else net.stall(200_000))
    process = start(store, cli_environment)
    wait_for(lambda: store.asked("listing" if moment == "listing" else "object"))
    if moment == "middle":
        wait_for(lambda: [p for p in store.partials() if p.stat().st_size > 100_000])
    sleep(0.3)  # let it get stuck
    process.send_signal(number)
    # Far below the 30 s of a stall: whoever waits for the network here does not make it.
    _, err = process.communicate(timeout=10)
    killed = number == signal.SIGKILL
    assert process.returncode == (-9 if killed else 128 + number) and "Traceback" not in err
    logs = "".join(path.read_text() for path in (tmp_path / "logs").iterdir())
    assert not [
        key for key in (store.server.secret_key, store.server.access_key) if key in err + logs
    ]
    failed = "Attempt 1 of 5 failed" in err and "Traceback" in logs  # the log has the details
    assert failed is (moment == "backing off")
    size = sum(path.stat().st_size for path in store.partials())
    store.proxy.on_object()
    assert store.fetch().path.read_bytes() == DATA
    assert (size > 0) is (moment == "middle")
    assert store.proxy.asked("object")[-1].get("range", "bytes=0-") == f"bytes={size}-"
    assert not list(store.cache.glob("*.partial"))
