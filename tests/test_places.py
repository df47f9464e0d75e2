"""Buckets, web servers and URLs: what is asked of them, what they may answer, and what no message repeats."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hdcache.durable import stored_object
from hdcache.errors import StoreCorrupt, StoreMismatch, Unreachable, UsageError
from hdcache.sharing import objects, places
from hdcache.sharing.folder import Folder
from hdcache.sharing.objects import Conflict, Found, Place, RangeIgnored, Trouble
from hdcache.sharing.places import Cloud, open_place
from travelling import SECRET, FaultyServer, bucket_server, web_server

DATA = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "WAITS", (0.01,) * 5)


@pytest.fixture(scope="module")
def _endpoint() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, bucket_server(patch) as url:
        yield url


@pytest.fixture
def bucket(_endpoint: str, request: pytest.FixtureRequest) -> Cloud:
    """A folder of its own in a bucket of an S3 server."""
    place = open_place(f"s3://team/{request.node.name}")
    assert isinstance(place, Cloud)
    return place


@pytest.fixture
def web(tmp_path: Path) -> Iterator[FaultyServer]:
    pytest.importorskip("obstore")
    (tmp_path / "www/a").mkdir(parents=True)
    (tmp_path / "www/a/b@1.c 2").write_bytes(DATA)
    (tmp_path / "www/a/b").write_bytes(DATA)
    with web_server(tmp_path / "www") as server:
        yield server


# URLs


def test_paths_and_file_urls_are_folders(tmp_path: Path) -> None:
    for where in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        place = open_place(where)
        assert isinstance(place, Folder)
        assert place.path == tmp_path


@pytest.mark.parametrize(
    "url",
    [f"s3://me:{SECRET}@bucket/x", f"https://host/x?token={SECRET}", f"http://{SECRET}@h/x", f"gs://b/x#{SECRET}"],
)
def test_urls_with_credentials_are_refused_without_repeating_them(url: str) -> None:
    with pytest.raises(UsageError, match="give the URL without user, password, query or fragment") as error:
        open_place(url)
    assert SECRET not in str(error.value)
    with pytest.raises(UsageError) as error:
        open_place("s3://bucket/x", endpoint_url=url)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("url", ["ftp://host/x", "s3://", "hf://a/b", "memory://x"])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match="not a place that hdcache knows; choose a folder, s3://BUCKET/PATH"):
        open_place(url)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(UsageError, match=r"s3://b/x: needs the extra 'cloud': pip install 'hdcache\[cloud\]'"):
        open_place("s3://b/x")


def test_an_azure_url_without_an_account_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(UsageError, match="az://c/x: cannot be opened as it stands; set AZURE_STORAGE_ACCOUNT_NAME"):
        open_place("az://c/x")


def test_buckets_of_three_kinds_open_without_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "me")
    for url in ("s3://b/x/", "gs://b/x", "az://c/x", "https://h/x"):
        place = open_place(url, anonymous=True)
        assert place.url == url.rstrip("/")
        assert place.listable == (not url.startswith("http"))


# Web servers


def test_a_web_server_is_read(web: FaultyServer) -> None:
    place = open_place(web.url)
    assert b"".join(place.parts("a/b", stored_object(DATA))) == DATA
    assert place.read("a/b", 1 << 20) == DATA
    assert place.read("a/none", 1 << 20) is None
    assert (place.size("a/b"), place.size("a/none")) == (len(DATA), None)
    for refused in (place.listing, place.names, lambda: place.write("x", stored_object(b""), lambda: iter(()))):
        with pytest.raises(
            UsageError, match="a web server has no listing and takes no objects; choose a folder or a bucket"
        ):
            refused()


@pytest.mark.parametrize(
    "faults", [["503"], ["429", "500", "502"], ["cut"], ["cut", "norange"], ["html"], ["408", "slow"]]
)
def test_passing_faults_are_waited_out(web: FaultyServer, faults: list[str]) -> None:
    web.faults["a/b"] = list(faults)
    assert b"".join(open_place(web.url).parts("a/b", stored_object(DATA))) == DATA
    assert web.faults["a/b"] == []


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("404", StoreCorrupt, "missing, expected 10240 bytes"),
        ("403", Unreachable, r"not allowed \(403\); ask whoever runs the server"),
        ("401", Unreachable, r"credentials are missing or not accepted \(401\); ask whoever runs the server"),
        ("429", Unreachable, r"the server is busy or broken \(429\) \(6 attempts\); run the same command again"),
        ("503", Unreachable, r"the server is busy or broken \(503\) \(6 attempts\); run the same command again"),
        ("418", Unreachable, r"refused \(418\); check the URL"),
        ("301", Unreachable, r"it lies elsewhere; check the URL"),
        ("cut", Unreachable, r"the connection was cut \(\d+ attempts\)"),
        (
            "html",
            Unreachable,
            r"a page of HTML came instead of data \(6 attempts\); check the URL, and any proxy or login",
        ),
        ("short", StoreCorrupt, "10239 bytes, expected 10240; it is not what the store lists"),
        ("long", StoreCorrupt, "1058816 bytes, expected 10240"),
        ("flip", StoreCorrupt, r"sha256 \w{12}\.\.\., expected \w{12}\.\.\.; it is not what the store lists"),
        ("nolength", Unreachable, "the server does not say how long it is; use a server that sends Content-Length"),
    ],
)
def test_lasting_faults_are_one_clear_error(web: FaultyServer, fault: str, kind: type[Exception], message: str) -> None:
    web.faults["a/b"] = [fault] * 99
    with pytest.raises(kind, match=message) as error:
        list(open_place(web.url).parts("a/b", stored_object(DATA)))
    assert str(error.value).startswith(f"{web.url}/a/b: ")
    assert "\n" not in str(error.value)


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    monkeypatch.setattr(objects, "WAITS", (0.01,))
    with pytest.raises(
        Unreachable, match=r"http://127.0.0.1:9/x/a: cannot be read: no connection \(2 attempts\); check the URL"
    ):
        open_place("http://127.0.0.1:9/x").read("a", 10)


# Buckets


def _write(place: Place, key: str, data: bytes, **how: bool) -> None:
    place.write(key, stored_object(data), lambda: iter((data,)), **how)


def test_a_bucket_keeps_what_it_has(bucket: Cloud) -> None:
    _write(bucket, "a/b@1.c", DATA)
    _write(bucket, "a/b@1.c", DATA, read_back=True)
    _write(bucket, "empty", b"")
    with pytest.raises(StoreMismatch, match=r"s3://team/.*/a/b@1.c: is there already with other content"):
        _write(bucket, "a/b@1.c", DATA[:-1] + b"x")
    assert bucket.read("a/b@1.c", 1 << 20) == DATA
    assert {key: found.size for key, found in bucket.listing().items()} == {"a/b@1.c": len(DATA), "empty": 0}
    assert [*bucket.listing("a")] == ["a/b@1.c"]
    assert (bucket.names(), bucket.names("a")) == (["a", "empty"], ["b@1.c"])
    assert b"".join(bucket.parts("empty", stored_object(b""))) == b""


def test_an_answer_that_was_lost_is_no_conflict(bucket: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    put, lost = bucket._put, []

    def lossy(*given: Any) -> str | None:
        found = put(*given)
        if not lost:
            lost.append(found)
            raise Trouble("no answer in time", again=True)
        return found

    monkeypatch.setattr(bucket, "_put", lossy)
    _write(bucket, "a", DATA)
    assert lost
    assert bucket.read("a", 1 << 20) == DATA


def test_large_objects_go_in_parts_and_are_read_back(bucket: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "WHOLE", 1000)
    monkeypatch.setattr(Cloud, "_part_size", staticmethod(lambda size: 5 << 20))
    large = DATA * 1000
    read: list[str] = []
    parts = bucket.parts
    monkeypatch.setattr(bucket, "parts", lambda key, listed: read.append(key) or parts(key, listed))
    bucket.write("a", stored_object(large), lambda: (large[n : n + 99_999] for n in range(0, len(large), 99_999)))
    assert read == ["a"]
    _write(bucket, "a", large)
    with pytest.raises(StoreMismatch, match="is there already with other content"):
        _write(bucket, "a", large[:-1] + b"x")
    assert bucket.size("a") == len(large)


def test_a_poisoned_source_never_becomes_a_large_object(bucket: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "WHOLE", 1000)

    def poisoned() -> Iterator[bytes]:
        yield DATA
        raise StoreCorrupt("poisoned")

    with pytest.raises(StoreCorrupt, match="poisoned"):
        bucket.write("a", stored_object(DATA), poisoned)
    assert bucket.size("a") is None


def test_servers_without_conditions_are_asked_before(bucket: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    put = bucket._put

    def plain(key: str, data: Any, mode: Any, part: int | None = None) -> str | None:
        if mode is not None:
            raise NotImplementedError
        return put(key, data, mode, part)

    monkeypatch.setattr(bucket, "_put", plain)
    _write(bucket, "a", DATA)
    _write(bucket, "a", DATA)
    with pytest.raises(StoreMismatch, match="is there already with other content"):
        _write(bucket, "a", b"x")
    bucket.replace("note", lambda old: (old or b"") + b"1", 100)
    bucket.replace("note", lambda old: (old or b"") + b"1", 100)
    assert bucket.read("note", 100) == b"11"


def test_what_arrived_is_proven_by_its_md5_or_read_back(bucket: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = stored_object(DATA)
    _write(bucket, "a", DATA)
    found = bucket.listing()["a"]
    monkeypatch.setattr(bucket, "parts", lambda *_: pytest.fail("read back"))
    md5 = (found.etag or "").strip('"')
    assert bucket.proves("a", listed, found, lambda: md5)
    assert not bucket.proves("a", listed, Found(1, found.etag), lambda: md5)
    monkeypatch.undo()
    assert bucket.proves("a", listed, Found(len(DATA), '"0123-2"'), lambda: pytest.fail("no md5"))
    assert not bucket.proves("a", stored_object(DATA[:-1] + b"x"), found, lambda: "0" * 32)


def test_two_who_change_a_note_lose_nothing(bucket: Cloud) -> None:
    others = iter("bcd")

    def change(old: bytes | None) -> bytes:
        if (other := next(others, None)) is not None:
            bucket._put("note", (old or b"") + other.encode(), None)
        return (old or b"") + b"a"

    bucket.replace("note", change, 100)
    assert bucket.read("note", 100) == b"bcda"
    bucket.replace("note", lambda old: old, 100)
    bucket.replace("note", lambda old: None, 100)
    bucket.replace("note", lambda old: None, 100)
    assert bucket.read("note", 100) is None


def test_a_bucket_that_is_not_there(bucket: Cloud) -> None:
    place = open_place("s3://nowhere/x")
    for action in (place.listing, place.names, lambda: place.read("a", 10), lambda: _write(place, "a", DATA)):
        with pytest.raises(Unreachable, match="there is no such bucket; make it first, or check the URL"):
            action()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "status code: 403 Forbidden: x-amz-credential=" + SECRET,
            r"not allowed \(403\), or there is no such object: S3 says so",
        ),
        ("status code: 401 Unauthorized", "credentials are missing or not accepted"),
        ("Error performing PUT http://169.254.169.254/latest/api/token", "no credentials were found"),
        ("status code: 301 Moved", "it lies elsewhere"),
        ("Received redirect without LOCATION", "it lies elsewhere"),
        ("status code: 400 Bad Request: " + SECRET, r"refused \(400\)"),
        ("invalid peer certificate: UnknownIssuer", "its certificate is not trusted"),
        ("HttpError { kind: Timeout, source: TimedOut }", "no answer in time"),
        ("request or response body error", "the connection was cut"),
        ("status code: 404 Not Found: <Code>NoSuchBucket</Code>", "there is no such bucket"),
        ("status code: 507", r"the server is busy or broken \(507\)"),
    ],
)
def test_errors_of_the_library_are_told_without_its_words(text: str, expected: str) -> None:
    found = Cloud("s3://b/x", None, None)._failure(RuntimeError(f"Generic S3 error: {text}?sig={SECRET}"))
    assert isinstance(found, Trouble)
    assert SECRET not in f"{found.reason} {found.advice}"
    with pytest.raises(Trouble, match=expected):
        raise found


def test_conditions_and_ranges_of_the_library_are_known() -> None:
    exceptions = pytest.importorskip("obstore.exceptions")
    place = Cloud("s3://b/x", None, None)
    assert isinstance(place._failure(exceptions.AlreadyExistsError("there")), Conflict)
    assert isinstance(place._failure(exceptions.PreconditionError("changed")), Conflict)
    assert isinstance(place._failure(exceptions.NotSupportedError("Range request not supported by a")), RangeIgnored)
    assert isinstance(place._failure(RuntimeError("status code: 501 Not Implemented")), NotImplementedError)


def test_without_credentials_it_says_which(bucket: Cloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    profile = tmp_path / "credentials"
    profile.write_text(f"[team]\naws_access_key_id = AKIAPROFILE\naws_secret_access_key = {SECRET}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_PROFILE", "team")
    pytest.importorskip("boto3")
    _write(open_place(bucket.url), "a", DATA)
    with pytest.raises(Unreachable, match=r"not allowed \(403\), or there is no such object.*; set AWS_PROFILE, or"):
        open_place(bucket.url, anonymous=True).read("a", 1 << 20)
    monkeypatch.setenv("AWS_PROFILE", "gone")
    with pytest.raises(UsageError, match=r"AWS credentials: ProfileNotFound; check AWS_PROFILE and ~/.aws"):
        open_place(bucket.url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://KEY:SEC/RET@bucket/x", "s3://bucket/x"),
        ("https://user:p/w@127.0.0.1:9/x", "https://127.0.0.1:9/x"),
        ("https://user:pa#ss@host", "https://host"),
        ("https://user:pa?ss@host", "https://host"),
        ("https://user@host/x", "https://host/x"),
    ],
)
def test_a_secret_in_a_url_is_not_repeated(url: str, shown: str) -> None:
    with pytest.raises(UsageError, match=rf"^{re.escape(shown)}: give the URL without user, password") as raised:
        open_place(url)
    assert not {"SEC", "RET", "pa", "ss", "p/w"} & set(re.split(r"[^A-Za-z/]+", str(raised.value).split(": ")[0]))


def test_what_is_no_url_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^http://\.\.\.: not a URL; check the host's name"):
        open_place("http://[::1/x")
