"""Places for objects, and what is in them as an outsider sees it: pathlib, or boto3."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.roots import Root, S3Root

BUCKET = "sashiko-tests"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "not-a-secret-of-anybody",
    "AWS_REGION": "us-east-1",
}


@contextmanager
def s3_server() -> Iterator[int]:
    """An S3 server with one bucket; its port."""
    script = [sys.executable, str(Path(__file__).with_name("s3_server.py"))]
    with subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        port = int(process.stdout.readline())
        boto(port).create_bucket(Bucket=BUCKET)
        yield port
        process.stdin.close()


def boto(port: int):
    """A client that is not ours."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        region_name=CREDENTIALS["AWS_REGION"],
    )


class LocalPlace:
    """A folder, seen by pathlib."""

    def __init__(self, root: Path) -> None:
        self.root: Root = root
        self._folder = root

    def names(self, prefix: str = "") -> list[str]:
        """Keys of all objects under a prefix, sorted."""
        found = (p for p in self._folder.rglob("*") if p.is_file())
        names = sorted(p.relative_to(self._folder).as_posix() for p in found)
        return [name for name in names if name.startswith(prefix)]

    def read(self, key: str) -> bytes:
        return (self._folder / key).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        (self._folder / key).write_bytes(data)

    def delete(self, key: str) -> None:
        (self._folder / key).unlink()


class S3Place:
    """A prefix of its own in the server's bucket, seen by boto3 past any proxy."""

    def __init__(self, port: int) -> None:
        self._prefix = f"{uuid.uuid4().hex[:8]}/out"
        self.root: Root = S3Root(BUCKET, self._prefix)
        self._client = boto(port)

    def names(self, prefix: str = "") -> list[str]:
        """Keys of all objects under a prefix, sorted."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=BUCKET, Prefix=f"{self._prefix}/{prefix}"
        )
        found = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return sorted(key.removeprefix(f"{self._prefix}/") for key in found)

    def read(self, key: str) -> bytes:
        return self._client.get_object(Bucket=BUCKET, Key=f"{self._prefix}/{key}")["Body"].read()

    def write(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=f"{self._prefix}/{key}", Body=data)

    def delete(self, key: str) -> None:
        self._client.delete_object(Bucket=BUCKET, Key=f"{self._prefix}/{key}")

    def upload(self, folder: Path) -> None:
        """Copy a folder there, file by file."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.write(path.relative_to(folder).as_posix(), path.read_bytes())


Place = LocalPlace | S3Place


def use_endpoint(monkeypatch, url: str) -> None:
    """Let the environment say how S3 is reached, as a user's would."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": url}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("flows.engine.s3_objects.FIRST_WAIT_S", 0.001)
