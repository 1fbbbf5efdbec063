"""Objects by key under one root: the few storage primitives that the engine's promises rest on.

Everything the engine keeps goes through these calls, so that a store with other means needs this
one class again and nothing else (S3: s3_objects.py). What they promise on POSIX:

    put      an object under a key that one writer owns; torn if the writer dies in mid-write
    create   all of an object or nothing, and only if the key is free: one writer wins
    replace  all of an object or the one before, whoever reads meanwhile
    link     a second key for the same bytes, without copying them
    adopt    a whole folder appears under its final key at once
    now      the clock that the store stamps its objects with; nobody compares it with another
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR
from typing import TYPE_CHECKING

from diffusion_core.disk import sync
from flows.roots import Root, parse_root

if TYPE_CHECKING:
    from flows.engine.receipt import Objects

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK, errno.ENOSYS}

_ODD = {errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.ELOOP}

_FEW_FILES = 8


@dataclass(frozen=True)
class Usage:
    """What lies under a key: an object, or a folder with all that is in it.

    Attributes:
        num_objects: files.
        num_bytes: of them.
        modified_s: when the youngest of it was written (folders count), by the store's clock.
    """

    num_objects: int
    num_bytes: int
    modified_s: float


class StoreError(OSError):
    """The store does not answer, however often it is asked: nothing can go on without it."""


def is_odd(error: OSError) -> bool:
    """Whether it is the object that cannot be read: a bad sector, a folder, a loop of links."""
    return error.errno in _ODD


def open_objects(root: Root | str) -> Objects:
    """The objects under a root: a folder of this machine, or s3://BUCKET/PREFIX.

    Nothing is made or asked yet.

    Raises:
        BadInputError: if it is neither.
    """
    where = parse_root(root)
    if isinstance(where, Path):
        return LocalObjects(where)
    from flows.engine.s3_objects import S3Objects

    return S3Objects(where)


class LocalObjects:
    """Objects as files under a root folder; keys are relative POSIX paths."""

    at_once = 1

    def __init__(self, root: Path) -> None:
        self.root = Path(root).resolve()

    def path(self, key: str) -> Path:
        """The file of a key.

        Raises:
            ValueError: if the key is absolute or steps out of the root.
        """
        return Path(self._file(key))

    def _file(self, key: str) -> str:
        """The same as a string: a resumed run asks for hundreds of thousands."""
        parts = key.split("/")
        if key.startswith("/") or ".." in parts or not any(p not in ("", ".") for p in parts):
            raise ValueError(f"'{key}' is not a key under {self.root}")
        return f"{self.root}/{key}"

    def put(self, key: str, data: bytes) -> None:
        """Write an object under a key of the caller's own."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def create(self, key: str, data: bytes, *, durable: bool = True) -> bool:
        """Write an object if the key is free, whole or not at all.

        Args:
            key: of the object.
            data: all of it.
            durable: flush it to the disk. Without, a crash of the machine (not of the process) may
                leave it torn, which its reader must be able to tell.

        Returns:
            True if this call created it, False if the key was taken.

        Raises:
            StoreError: if the file system has no hard links: nothing else of POSIX is whole, and
                exclusive, and there to stay.
        """
        path = self.path(key)
        made = _make_folder(path.parent)
        draft = _draft(path, data, durable=durable)
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            raise StoreError(
                f"{self.root}: its file system has no hard links ({error.strerror}), without which "
                "two runs could both publish an item; choose an output on another one (a disk of "
                "this machine, NFS), or on S3"
            ) from error
        finally:
            draft.unlink(missing_ok=True)
        if durable:
            for folder in (path.parent, *made):
                sync(folder)
        return True

    def replace(self, key: str, data: bytes) -> None:
        """Write an object anew: readers find all of it, or all of the one before."""
        path = self.path(key)
        _make_folder(path.parent)
        draft = _draft(path, data, durable=False)
        try:
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    def require_links(self) -> None:
        """Find out whether objects can be created here; nothing is left of it.

        Raises:
            StoreError: if they cannot, naming the root.
        """
        try:
            self._require_folder()
            self._try_out()
        except StoreError:
            raise
        except OSError as error:
            reason = (error.strerror or type(error).__name__).lower()
            raise StoreError(
                f"{self.root}: nothing can be written there ({reason}); give a folder as output "
                "that can be written to"
            ) from error

    def _require_folder(self) -> None:
        standing = next(p for p in (self.root, *self.root.parents) if p.exists())
        if not standing.is_dir():
            what = "it is a file" if standing == self.root else f"{standing} is a file"
            raise StoreError(f"{self.root}: {what}; give a folder as output, old or new")

    def _try_out(self) -> None:
        probe = f".work/.probe.{uuid.uuid4().hex}.partial"
        missing = [folder for folder in self.path(probe).parents if not folder.exists()]
        try:
            self.create(probe, b"", durable=False)
        finally:
            with suppress(OSError):  # it was never made
                self.remove(probe)
            for folder in missing:
                with suppress(OSError):  # another run writes there by now
                    folder.rmdir()

    def get(self, key: str) -> bytes:
        """Read an object. Raises FileNotFoundError if there is none."""
        with open(self._file(key), "rb") as file:  # noqa: PTH123  # Path takes as long as the read
            return file.read()

    def size(self, key: str) -> int | None:
        """Size in bytes, or None if there is no such object."""
        try:
            return os.stat(self._file(key)).st_size  # noqa: PTH116
        except FileNotFoundError:
            return None

    def exists(self, key: str) -> bool:
        """Whether there is such an object or folder, or a link that leads nowhere."""
        return os.path.lexists(self._file(key))

    def names(self, prefix: str) -> list[str]:
        """Names directly under a prefix, sorted; drafts of unfinished creates are left out."""
        try:
            entries = list(os.scandir(self.path(prefix)))
        except FileNotFoundError:
            return []
        return sorted(e.name for e in entries if not e.name.startswith("."))

    def hidden(self, prefix: str) -> list[str]:
        """Keys below a prefix, at any depth, that `names` leaves out: drafts of creates, mostly."""
        found: list[str] = []
        for folder, folders, files in os.walk(self.path(prefix)):
            hidden = [name for name in (*folders, *files) if name.startswith(".")]
            found += [Path(folder, name).relative_to(self.root).as_posix() for name in hidden]
            folders[:] = [name for name in folders if not name.startswith(".")]
        return sorted(found)

    def now(self) -> float:
        """The store's own clock, in seconds: that of the file server, if there is one."""
        probe = self.root / ".work" / f".clock.{uuid.uuid4().hex}.partial"
        probe.parent.mkdir(parents=True, exist_ok=True)
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def usage(self, key: str) -> Usage | None:
        """What lies under a key; None if nothing does, or a link leads out of the root."""
        path = self.path(key)
        if path.parent.resolve() != path.parent:
            return None
        places = [*_tree(path)] if path.is_dir() and not path.is_symlink() else [path]
        stats = [stat for place in places if (stat := _stat(place)) is not None]
        if not stats:
            return None
        files = [stat.st_size for stat in stats if not S_ISDIR(stat.st_mode)]
        return Usage(len(files), sum(files), max(stat.st_mtime for stat in stats))

    def rename(self, key: str, new_key: str) -> bool:
        """Move one object; False if it was gone already (another process moved it)."""
        try:
            self.path(key).rename(self.path(new_key))
        except FileNotFoundError:
            return False
        return True

    def link(self, key: str, new_key: str) -> bool:
        """Give the bytes of `key` a second key; the first stays valid.

        Returns:
            True if they are the same bytes, False if they are a copy, which may have gone wrong.
        """
        target = self.path(new_key)
        target.parent.mkdir(parents=True, exist_ok=True)
        return _link(self.path(key), target)

    def assembly(self, draft: str, path: str) -> str:
        """Where to put together what will be adopted as `path`: in the draft, out of sight."""
        del path
        return draft

    def adopt(self, prefix: str, new_prefix: str) -> None:
        """Make a finished folder durable and let it appear under its final key at once.

        Raises:
            OSError: if something is there already.
        """
        source, target = self.path(prefix), self.path(new_prefix)
        _sync_all(list(_tree(source)))
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
        for folder in _parents(target, self.root):
            sync(folder)

    def remove(self, key: str) -> None:
        """Remove an object or a folder with all that is in it; it may be gone already."""
        path = self.path(key)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _draft(path: Path, data: bytes, *, durable: bool) -> Path:
    """A file beside a path, with all of its content to be; removed where it cannot be written."""
    draft = path.with_name(f".{uuid.uuid4().hex}.partial")  # short: a name may be at its limit
    try:
        with draft.open("xb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return draft


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder; returns those that have a new entry by that, which is to be flushed too."""
    if folder.is_dir():
        return []
    missing = [folder, *(p for p in folder.parents if not p.exists())]
    folder.mkdir(parents=True, exist_ok=True)
    return [new.parent for new in missing]


def _link(source: Path, target: Path) -> bool:
    """Link; or copy, with an exclusive create, a file that can have no more links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with target.open("xb") as file:
            file.write(source.read_bytes())
            file.flush()
            os.fsync(file.fileno())
        return False
    return True


def _stat(path: Path) -> os.stat_result | None:
    """Of the file, or of the link itself; None if it is gone."""
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _tree(root: Path) -> Iterator[Path]:
    """Files before the folders that hold them."""
    for folder, _, files in os.walk(root, topdown=False):
        yield from (Path(folder, name) for name in files)
        yield Path(folder)


def _parents(path: Path, root: Path) -> Iterable[Path]:
    return (p for p in path.parents if p == root or root in p.parents)


def _sync_all(paths: Sequence[Path]) -> None:
    """Flush many files and folders: all of their file system at once where that can be asked for.

    One commit of the journal takes as long for a thousand files as for one.
    """
    if len(paths) <= _FEW_FILES or not _sync_filesystem(paths[-1]):
        for path in paths:
            sync(path)


def _sync_filesystem(path: Path) -> bool:
    """Flush the file system that holds a path; False where the system cannot (it is Linux's)."""
    try:
        syncfs = ctypes.CDLL(None, use_errno=True).syncfs
    except (AttributeError, OSError, TypeError):
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if syncfs(descriptor) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
    finally:
        os.close(descriptor)
    return True
