"""Objects in an S3 bucket, with the promises of objects.LocalObjects by the means of S3.

    put, create   one request each: an object is there whole or not at all, also if its writer dies
    create        a conditional put (If-None-Match: *): S3 lets one writer win
    link          a copy that the server makes; so does rename, which then deletes
    adopt         nothing: folders are put together where they stay, seen only through manifests

The network is not trusted. Every request is repeated on 5xx, resets and cut bodies, by obstore and
once more around it. Each object carries the sha256 of its bytes and the name of its writer: a body
that arrives short is read again, and a writer whose answer was lost finds that it was the one who
won. Endpoint, region and credentials come from the environment, as AWS's own tools name them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from flows.engine.objects import StoreError, Usage
from flows.roots import S3Root

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import RetryConfig, S3Config, S3Store

T = TypeVar("T")

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
RETRIES = 8
"""Of one request by obstore: waits of .1 s that grow by half on average, some seconds in all."""

FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 30.0

ROUNDS = 6
"""Of requests with all their retries; waits between them grow fourfold: an outage of a minute."""

READS = 3
"""Of a body that is not what its writer said."""

REQUEST_TIMEOUT_S = 60

_SHA256, _WRITER = "sashiko-sha256", "sashiko-writer"


class S3Objects:
    """Objects under a prefix of a bucket; keys are relative POSIX paths."""

    at_once = 16

    def __init__(self, root: S3Root, rounds: int = ROUNDS) -> None:
        """Objects of a root; `rounds` of requests before the store counts as gone."""
        self.root, self._rounds = root, rounds
        self._store = open_bucket(root)

    def put(self, key: str, data: bytes) -> None:
        """Write an object under a key of the caller's own."""
        facts, name = {_SHA256: _digest(data)}, _checked(self.root, key)
        # Never in parts: what a killed writer leaves of them costs money and is not listed.
        self._ask(key, lambda: self._store.put(name, data, attributes=facts, use_multipart=False))

    def create(self, key: str, data: bytes, *, durable: bool = True) -> bool:
        """Write an object if the key is free, whole or not at all.

        Args:
            key: of the object.
            data: all of it.
            durable: what S3 has acknowledged is durable either way.

        Returns:
            True if this call created it, False if the key was taken.
        """
        from obstore.exceptions import AlreadyExistsError

        del durable
        name, writer = _checked(self.root, key), uuid.uuid4().hex
        facts = {_SHA256: _digest(data), _WRITER: writer}

        def attempt() -> bool:
            try:
                self._store.put(name, data, attributes=facts, mode="create", use_multipart=False)
            except AlreadyExistsError:
                # By another, or by an earlier request of this very call, whose answer was lost.
                there = self._store.get(name, options={"head": True})
                return there.attributes.get(_WRITER) == writer
            return True

        for _ in range(READS):
            try:
                return self._ask(key, attempt)
            except FileNotFoundError:  # it was there and is gone: moved out of the way meanwhile
                continue
        raise StoreError(f"{self.root}/{key}: it comes and goes; does another program write there?")

    def replace(self, key: str, data: bytes) -> None:
        """Write an object anew: readers find all of it, or all of the one before."""
        self.put(key, data)

    def get(self, key: str) -> bytes:
        """Read an object. Raises FileNotFoundError if there is none."""
        name = _checked(self.root, key)

        def attempt() -> tuple[bytes, bool]:
            found = self._store.get(name)
            data = bytes(found.bytes())
            return data, is_whole(data, found.attributes)

        for _ in range(READS):
            data, whole = self._ask(key, attempt)
            if whole:
                break
        return data  # if it is the object that is damaged, its reader finds out and knows why

    def size(self, key: str) -> int | None:
        """Size in bytes, or None if there is no such object."""
        name = _checked(self.root, key)
        try:
            return self._ask(key, lambda: self._store.head(name)["size"])
        except FileNotFoundError:
            return None

    def exists(self, key: str) -> bool:
        """Whether there is such an object or folder."""
        return self.size(key) is not None or bool(self.names(key))

    def names(self, prefix: str) -> list[str]:
        """Names directly under a prefix ("" for the root), sorted, hidden ones left out."""
        name = _checked(self.root, prefix) if prefix else None
        found = self._ask(prefix, lambda: self._store.list_with_delimiter(name))
        paths = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        names = {PurePosixPath(path).name for path in paths}
        return sorted(n for n in names if not n.startswith("."))

    def hidden(self, prefix: str) -> list[str]:
        """Keys below a prefix, at any depth, that `names` leaves out."""
        found = set()
        start = len(PurePosixPath(prefix).parts)
        for entry in self._below(prefix):
            parts = PurePosixPath(entry["path"]).parts
            ends = [i + 1 for i, part in enumerate(parts) if i >= start and part.startswith(".")]
            found |= {"/".join(parts[:end]) for end in ends[:1]}
        return sorted(found)

    def now(self) -> float:
        """The store's own clock, in whole seconds: that by which it stamps a probe."""
        probe = f".work/.clock.{uuid.uuid4().hex}.partial"
        self.put(probe, b"")
        usage = self.usage(probe)
        self._delete(probe, [_checked(self.root, probe)])
        if usage is None:
            raise StoreError(f"{self.root}/{probe}: gone at once; does another program remove it?")
        return usage.modified_s

    def usage(self, key: str) -> Usage | None:
        """What lies under a key; None if nothing does."""
        name = _checked(self.root, key)
        found = self._below(key)
        with suppress(FileNotFoundError):
            found.append(self._ask(key, lambda: self._store.head(name)))
        if not found:
            return None
        youngest = max(entry["last_modified"].timestamp() for entry in found)
        return Usage(len(found), sum(entry["size"] for entry in found), youngest)

    def rename(self, key: str, new_key: str) -> bool:
        """Move one object; False if it was gone already. A writer that dies leaves it in both."""
        try:
            self.link(key, new_key)
        except FileNotFoundError:
            return False
        self._delete(key, [_checked(self.root, key)])
        return True

    def link(self, key: str, new_key: str) -> bool:
        """Give the bytes of `key` a second key, the caller's own; the first stays valid.

        Returns:
            False: it is a copy, which is to be looked at.
        """
        source, target = _checked(self.root, key), _checked(self.root, new_key)
        self._ask(key, lambda: self._store.copy(source, target))
        return False

    def assembly(self, draft: str, path: str) -> str:
        """Where to put together what will be adopted as `path`: there, for nobody looks there."""
        del draft
        return path

    def adopt(self, prefix: str, new_prefix: str) -> None:
        """Let a finished folder appear under its final key: one manifest will do that.

        Raises:
            OSError: if the folder is somewhere else: S3 moves nothing at once.
        """
        if prefix != new_prefix:
            raise OSError(errno.EXDEV, "S3 cannot move a folder", f"{self.root}/{new_prefix}")

    def remove(self, key: str) -> None:
        """Remove an object or a folder with all that is in it; it may be gone already."""
        names = [entry["path"] for entry in self._below(key)]
        self._delete(key, [_checked(self.root, key), *names])

    def _below(self, key: str) -> list[ObjectMeta]:
        """All objects of a folder."""
        name = _checked(self.root, key)
        pages = self._ask(key, lambda: list(self._store.list(name)))
        return [entry for page in pages for entry in page]

    def _delete(self, key: str, names: list[str]) -> None:
        self._ask(key, lambda: self._store.delete(names))

    def _ask(self, key: str, request: Callable[[], T]) -> T:
        """Make a request until it is answered; the errors of obstore become those of files."""
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        place = f"{self.root}/{key}".rstrip("/")
        for number in range(self._rounds):
            try:
                return request()
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise _no_bucket(self.root) from error
                raise FileNotFoundError(errno.ENOENT, "no such object", place) from error
            except (PermissionDeniedError, UnauthenticatedError) as error:
                reason = "the store refuses these credentials (AWS_ACCESS_KEY_ID, a role)"
                raise PermissionError(errno.EACCES, reason, place) from error
            except BaseError as error:
                if "NoSuchBucket" in str(error):
                    raise _no_bucket(self.root) from error
                if number == self._rounds - 1:
                    raise StoreError(
                        f"{place}: the object store does not answer ({_reason(error)}); "
                        "check AWS_ENDPOINT_URL, AWS_REGION, the credentials and the network"
                    ) from error
                time.sleep(min(FIRST_WAIT_S * 4**number, LONGEST_WAIT_S))
        raise AssertionError("the last round returns or raises")


def is_whole(data: bytes, told: Mapping[str, str]) -> bool:
    """Whether the bytes that came are those that were written, as far as their writer said."""
    return told.get(_SHA256) in (None, _digest(data))


def open_bucket(root: S3Root) -> S3Store:
    """The client of a prefix, as the environment says how to reach it; kept for the next caller."""
    endpoint = next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), None)
    identity = tuple(os.environ.get(n) for n in ("AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN"))
    return _client(root, endpoint, identity)


@lru_cache(maxsize=32)
def _client(root: S3Root, endpoint: str | None, identity: tuple[str | None, ...]) -> S3Store:
    """One client, with its pool of connections, for all who ask for the same."""
    from obstore.store import S3Store

    del identity  # it is obstore that reads the environment; this tells clients apart
    where: S3Config = {"endpoint": endpoint} if endpoint else {}
    return S3Store(
        root.bucket,
        prefix=root.prefix or None,
        config=where,
        client_options={
            "allow_http": (endpoint or "").startswith("http://"),
            "timeout": timedelta(seconds=REQUEST_TIMEOUT_S),
        },
        retry_config=_retries(),
    )


def _retries() -> RetryConfig:
    return {
        "max_retries": RETRIES,
        "backoff": {
            "init_backoff": timedelta(seconds=FIRST_WAIT_S),
            "max_backoff": timedelta(seconds=LONGEST_WAIT_S),
            "base": 3,
        },
        "retry_timeout": timedelta(minutes=3),
    }


def _checked(root: S3Root, key: str) -> str:
    """A key that stays under the root.

    Raises:
        ValueError: if it does not.
    """
    parts = PurePosixPath(key)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise ValueError(f"'{key}' is not a key under {root}")
    return str(parts)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _no_bucket(root: S3Root) -> StoreError:
    return StoreError(f"{root}: there is no bucket '{root.bucket}'; make it, or mend the name")


def _reason(error: BaseException) -> str:
    """What obstore says was wrong in the end, without its account of the request."""
    line = str(error).partition("\n")[0].partition(": <?xml")[0]
    return line.rpartition(" - ")[2].removeprefix("Generic S3 error: ").strip()
