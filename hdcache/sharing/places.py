"""Where a store may lie: a folder, an object store (s3://, gs://, az://) or a web server (http://, https://).

What is written is written once: an object that is there is never overwritten, and an equal one counts as written, since the
answer to a request that succeeded may be lost. Credentials are those of the environment and of the usual files; no URL, message
or record holds them. The only file that imports obstore, the extra ``cloud``.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from hdcache.errors import HdcacheError, UsageError
from hdcache.resources import memory_budget
from hdcache.schema import StoredObject
from hdcache.sharing.folder import Folder
from hdcache.sharing.objects import PART, Conflict, Found, Parts, Place, RangeIgnored, T, Trouble, checked_key

WHOLE = 256 << 20
"""Larger objects are uploaded in parts, which object stores cannot be told to create only; they are looked for before."""
_SCHEMES = {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore", "http": "HTTPStore", "https": "HTTPStore"}
_ENDPOINT = {"s3": "endpoint", "gs": "base_url", "az": "endpoint"}
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_ENDPOINT", "AZURE_STORAGE_ENDPOINT"),
}
_CONNECT, _SILENCE, _BODY, _WRITE = (timedelta(seconds=count) for count in (10, 60, 86400, 1800))
_CREDENTIALS = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or say --anonymous where anybody may read",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or log in with gcloud, or say --anonymous where anybody may read",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and a key, token or login of it, or say --anonymous where anybody may read",
}


def open_place(where: str | Path, *, endpoint_url: str | None = None, anonymous: bool = False) -> Place:
    """The place of a folder's path or a URL; connects to nothing yet.

    Raises
    ------
    UsageError
        for a URL that holds credentials or a query, of an unknown scheme, or when the extra ``cloud`` is not installed.
    """
    text = str(where)
    if isinstance(where, Path) or "://" not in text:
        return Folder(Path(where).expanduser())
    parts = _plain(text)
    scheme, url = parts.scheme.lower(), f"{parts.scheme.lower()}://{parts.netloc}{parts.path}".rstrip("/")
    if scheme == "file" and not parts.netloc:
        return Folder(Path(unquote(parts.path)))
    if scheme not in _SCHEMES or not parts.netloc:
        raise UsageError(
            f"{url}: not a place that hdcache knows; choose a folder, s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH, "
            "http://HOST/PATH or https://HOST/PATH"
        )
    if endpoint_url is not None:
        _plain(endpoint_url)
    try:
        import obstore.store as stores
    except ImportError:
        raise UsageError(f"{url}: needs the extra 'cloud': pip install 'hdcache[cloud]'") from None
    environment = [os.environ.get(name) for name in _ENDPOINTS.get(scheme, ())]
    endpoint = endpoint_url or next(filter(None, environment), "")
    config: dict[str, Any] = {}
    if scheme in _ENDPOINT:
        config |= {_ENDPOINT[scheme]: endpoint_url} if endpoint_url else {}
        config |= {"skip_signature": True} if anonymous else {}
        if scheme == "s3" and not anonymous and (provider := _aws_provider()) is not None:
            config["credential_provider"] = provider

    def make(**client: Any) -> Any:
        options = {"allow_http": (endpoint or url).lower().startswith("http://"), "connect_timeout": _CONNECT, **client}
        retry = {"max_retries": 0}  # all attempts are counted in one place: hdcache.sharing.objects
        return getattr(stores, _SCHEMES[scheme]).from_url(url, client_options=options, retry_config=retry, **config)

    try:
        # An upload is silent until it is done.
        return Cloud(url, make(timeout=_BODY, read_timeout=_SILENCE), make(timeout=_WRITE))
    except Exception as error:
        raise UsageError(
            f"{url}: cannot be opened as it stands; {_CREDENTIALS.get(scheme, 'check the URL')}"
        ) from error


def _plain(url: str) -> Any:
    """The parts of a URL without user, password, query and fragment: they would end in logs and histories of commands."""
    scheme, _, rest = url.partition("://")
    # A password may hold what ends a host's name, and is then anywhere before the last @.
    secret = "@" in rest and re.match(r"[^/?#@]*:(?!\d+(/|$))|[^/?#]*@", rest) is not None
    try:
        parts = urlsplit(url)
    except ValueError:
        raise UsageError(f"{scheme}://...: not a URL; check the host's name") from None
    if secret or parts.query or parts.fragment:
        shown = f"{scheme}://{rest.rpartition('@')[2] if secret else parts.netloc + parts.path}"
        raise UsageError(
            f"{shown}: give the URL without user, password, query or fragment; credentials are taken from the environment "
            "and the usual files (AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME ...)"
        )
    return parts


def _aws_provider() -> Any:
    """What reads profiles, where the environment has no keys: obstore alone does not read ``~/.aws``."""
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return None
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider

        return Boto3CredentialProvider()
    except (ImportError, ValueError):
        return None  # what is asked next, the machine's own role, says so if there is none
    except Exception as error:
        raise UsageError(f"AWS credentials: {type(error).__name__}; check AWS_PROFILE and ~/.aws") from None


class Cloud(Place):
    """An object store, or a web server, which is only read."""

    def __init__(self, url: str, reader: Any, writer: Any) -> None:
        self.url, self._reader, self._writer = url, reader, writer
        self.listable = not url.startswith("http")
        self._creates = True
        self._memory = _Memory(memory_budget())

    def find(self, key: str) -> Found | None:
        def attempt() -> Found | None:
            try:
                meta = self._call(lambda: self._reader.head(checked_key(key, self.url)))
            except Trouble as trouble:
                if trouble.missing:
                    return None
                raise
            return Found(meta["size"], meta["e_tag"], meta["version"])

        return self._tried("read", key, attempt)

    def listing(self, folder: str = "") -> dict[str, Found]:
        def attempt() -> dict[str, Found]:
            pages = self._call(lambda: list(self._reader.list(folder or None)))
            return {meta["path"]: Found(meta["size"], meta["e_tag"]) for page in pages for meta in page}

        self._must_list()
        return self._tried("listed", folder, attempt)

    def names(self, folder: str = "") -> list[str]:
        return self._below(folder, True)

    def folders(self, folder: str = "") -> list[str]:
        return self._below(folder, False)

    def _below(self, folder: str, files: bool) -> list[str]:
        self._must_list()
        found = self._tried(
            "listed", folder, lambda: self._call(lambda: self._reader.list_with_delimiter(folder or None))
        )
        paths = [*found["common_prefixes"], *(meta["path"] for meta in found["objects"] if files)]
        # Web consoles of buckets mark a folder by an empty object of its name.
        names = {path.rstrip("/").rpartition("/")[2] for path in paths if path.rstrip("/") != folder.rstrip("/")}
        return sorted(names - {""})

    def _must_list(self) -> None:
        if not self.listable:
            raise UsageError(
                f"{self.url}: a web server has no listing and takes no objects; choose a folder or a bucket"
            )

    def write(self, key: str, listed: StoredObject, parts: Parts, *, read_back: bool = False) -> None:
        self._must_list()
        checked_key(key, self.url)
        md5 = ""
        try:
            if listed.size > WHOLE:
                self._absent(key)
                etag = self._tried("written", key, lambda: self._put(key, parts(), None, self._part_size(listed.size)))
            else:
                with self._memory.taken(listed.size):
                    data = b"".join(parts())
                    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
                    etag = self._tried("written", key, lambda: self._create(key, data))
        except Conflict:
            there = self.find(key)
            if there is None or not self.proves(key, listed, there, lambda: md5):
                raise self.occupied(key) from None
            return
        if read_back or (etag or "").strip('"') != (md5 or None):
            for _ in self.parts(key, listed):
                pass

    def _create(self, key: str, data: bytes) -> str | None:
        if self._creates:
            try:
                return self._put(key, data, "create")
            except NotImplementedError:
                self._creates = False
            except Conflict:
                if self.find(key) is None:
                    raise Trouble("another process is writing it", again=True) from None
                raise
        self._absent(key)
        return self._put(key, data, None)

    def _absent(self, key: str) -> None:
        if self.find(key) is not None:
            raise Conflict

    @staticmethod
    def _part_size(size: int) -> int:
        return max(32 << 20, -(-size // 10_000))  # 10,000 parts is the most that S3 takes

    def _put(self, key: str, data: Any, mode: Any, part: int | None = None) -> str | None:
        many = {"use_multipart": True, "chunk_size": part, "max_concurrency": 2} if part else {"use_multipart": False}
        done = self._call(lambda: self._writer.put(key, data, mode=mode, **many))
        return done["e_tag"]  # type: ignore[no-any-return]

    def replace(self, key: str, change: Callable[[bytes | None], bytes | None], limit: int) -> None:
        self._must_list()

        def attempt() -> None:
            before = self.find(key)
            old = None if before is None else self.read(key, limit)
            wanted = change(old)
            if wanted == old:
                return
            if wanted is None:
                self._call(lambda: self._writer.delete(key))
                return
            mode: Any = "create"
            if before is not None:
                told = {"e_tag": before.etag, "version": before.version}
                mode = {name: value for name, value in told.items() if value is not None}
            try:
                self._put(key, wanted, mode if self._creates else None)
            except NotImplementedError:
                self._creates = False
                self._put(key, wanted, None)
            except Conflict:
                raise Trouble("others change it all the time", again=True) from None
            except Trouble as trouble:
                if trouble.missing:  # what was to be replaced is gone
                    raise Trouble("others change it all the time", again=True) from None
                raise

        self._tried("written", key, attempt)

    def _open(self, key: str, offset: int) -> tuple[int, Iterator[bytes]]:
        options: Any = {"range": {"offset": offset}} if offset else None
        found = self._call(lambda: self._reader.get(checked_key(key, self.url), options=options))
        if "text/html" in str(found.attributes.get("Content-Type", "")):
            raise Trouble(
                "a page of HTML came instead of data",
                again=True,
                advice="check the URL, and any proxy or login before it",
            )

        def read() -> Iterator[bytes]:
            stream = iter(found.stream(min_chunk_size=PART))
            while (part := self._call(lambda: next(stream, None))) is not None:
                yield bytes(part)

        return found.meta["size"], read()

    def _call(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except HdcacheError:
            raise
        except Exception as error:
            if not isinstance(error, OSError) and not type(error).__module__.startswith("obstore"):
                raise
            raise self._failure(error) from None

    def _failure(self, error: Exception) -> Exception:
        """What an error of obstore means. Its text holds whole URLs and bodies, so that none of it is repeated."""
        kind, text = type(error).__name__, str(error)
        found = re.search(r"status code: (\d{3})", text)
        status = int(found[1]) if found else 0
        scheme = self.url.partition(":")[0]
        advice = _CREDENTIALS.get(scheme, "ask whoever runs the server")
        if kind in ("AlreadyExistsError", "PreconditionError", "NotModifiedError") or status in (409, 412):
            return Conflict()
        if kind == "NotSupportedError" and "ange request" in text:
            return RangeIgnored()
        if status == 501 or kind in ("NotSupportedError", "NotImplementedError"):
            return NotImplementedError()
        if "NoSuchBucket" in text or "ContainerNotFound" in text or (status == 404 and "list request" in text):
            return Trouble("there is no such bucket", advice="make it first, or check the URL")
        if isinstance(error, FileNotFoundError):
            return Trouble("not found (404)", missing=True)
        if "169.254." in text or "metadata.google" in text or (not status and "redential" in text):
            return Trouble("no credentials were found", advice=advice)
        if kind == "UnauthenticatedError" or status == 401:
            return Trouble("credentials are missing or not accepted (401)", advice=advice)
        if kind == "PermissionDeniedError" or status == 403:
            hidden = (
                ", or there is no such object: S3 says so to whom may not list the bucket" if scheme == "s3" else ""
            )
            return Trouble(f"not allowed (403){hidden}", denied=True, advice=advice)
        if status in (408, 425, 429) or status >= 500:
            return Trouble(f"the server is busy or broken ({status})", again=True)
        if "redirect" in text.lower() or 300 <= status < 400:
            return Trouble("it lies elsewhere", advice="check the URL; of S3, set AWS_REGION to the bucket's region")
        if status:
            return Trouble(f"refused ({status})", advice="check the URL and the endpoint")
        if "Content-Length" in text:
            return Trouble(
                "the server does not say how long it is", advice="use a server that sends Content-Length and no gzip"
            )
        if "ertificate" in text:
            return Trouble("its certificate is not trusted", advice="check the URL, or the machine's root certificates")
        if "kind: Timeout" in text or "TimedOut" in text:
            return Trouble("no answer in time", again=True)
        if "body error" in text or "Interrupted" in text or "IncompleteBody" in text:
            return Trouble("the connection was cut", again=True)
        return Trouble("no connection", again=True, advice="check the URL, the endpoint and the network")


class _Memory:
    """Lets threads hold so many bytes together; one of them may hold more when it is alone."""

    def __init__(self, budget: int) -> None:
        self._budget, self._held, self._changed = budget, 0, threading.Condition()

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + count <= self._budget)
            self._held += count
        try:
            yield
        finally:
            with self._changed:
                self._held -= count
                self._changed.notify_all()
