"""Where results and measurements are kept: a folder of this machine, or a prefix of an S3 bucket.

A root on S3 is no Path on purpose: whoever needs a folder is told so by the type checker, and
`Path("s3://bucket/x")`, which means a folder named "s3:", is refused wherever it is met.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from domains.base import BadInputError

_SCHEME = "s3://"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_KEY = re.compile(r"[A-Za-z0-9!_.'()@=+,-]+(/[A-Za-z0-9!_.'()@=+,-]+)*")


class S3Root:
    """A prefix of an S3 bucket; "s3://bucket/prefix" as text. Never changes.

    Attributes:
        bucket: its name.
        prefix: without slashes at its ends; "" for the whole bucket.
    """

    __slots__ = ("bucket", "prefix")

    def __init__(self, bucket: str, prefix: str = "") -> None:
        """Name a prefix.

        Raises:
            BadInputError: if it is no bucket, or the prefix has parts that a key cannot have.
        """
        if not _BUCKET.fullmatch(bucket):
            raise BadInputError(
                f"s3://{bucket}/{prefix}: '{bucket}' is no bucket's name; write s3://BUCKET/PREFIX"
            )
        if prefix and (not _KEY.fullmatch(prefix) or {".", ".."} & set(prefix.split("/"))):
            raise BadInputError(
                f"s3://{bucket}/{prefix}: '{prefix}' cannot be a prefix; use letters, digits, "
                "dashes, dots and single slashes"
            )
        self.bucket, self.prefix = bucket, prefix

    @property
    def name(self) -> str:
        """Last part of the prefix, or the bucket."""
        return PurePosixPath(self.prefix).name or self.bucket

    def __truediv__(self, key: str) -> S3Root:
        return S3Root(self.bucket, f"{self.prefix}/{key}".strip("/"))

    def __str__(self) -> str:
        return f"{_SCHEME}{self.bucket}/{self.prefix}".rstrip("/")

    def __repr__(self) -> str:
        return f"S3Root('{self}')"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3Root) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))


Root: TypeAlias = Path | S3Root


def parse_root(given: str | Path | S3Root) -> Root:
    """A root from what a user wrote: a path, or s3://BUCKET/PREFIX.

    Raises:
        BadInputError: if it is a URL of another kind, or one that was taken for a path.
    """
    if isinstance(given, S3Root):
        return given
    text = str(given)
    if text.startswith(_SCHEME):
        bucket, _, prefix = text.removeprefix(_SCHEME).partition("/")
        return S3Root(bucket, prefix.strip("/"))
    return require_local(given)


def absolute_root(given: str | Path | S3Root) -> Root:
    """The same root, wherever the process that uses it was started.

    Raises:
        BadInputError: as parse_root.
    """
    root = parse_root(given)
    return root.absolute() if isinstance(root, Path) else root


def require_local(given: str | Path | S3Root) -> Path:
    """A folder of this machine from what a user wrote.

    Raises:
        BadInputError: if it is a URL.
    """
    if _URL.match(str(given)):
        raise BadInputError(
            f"{given}: only a path can be used here; s3://BUCKET/PREFIX is for the --output of "
            "`sashiko restore`, measurements for its --input, and verify, gc and quarantine"
        )
    return Path(str(given))
