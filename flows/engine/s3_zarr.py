"""A zarr store over a prefix on S3, for reading: zarr's own over obstore, but strict."""

from __future__ import annotations

from collections.abc import Callable

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from flows.engine.objects import StoreError
from flows.engine.s3_objects import READS, is_whole, open_bucket
from flows.roots import S3Root


class StrictS3Store(ObjectStore):  # type: ignore[type-arg]  # generic only in newer zarrs
    """Zarr's store on S3, in which an absent chunk is an error: to zarr it is a chunk of zeros.

    Attributes:
        check: told of each chunk that is read; raises if it is not the one that was written.
    """

    check: Callable[[str, memoryview], None] | None = None

    async def get(
        self,
        key: str,
        prototype: BufferPrototype,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """Read a key as zarr asks for it.

        Raises:
            FileNotFoundError: if it is a chunk and not there.
            StoreError: if the store does not answer.
        """
        if byte_range is not None:
            return await super().get(key, prototype, byte_range)
        data = await self._whole(key)
        if data is None and "/c/" in f"/{key}":
            raise FileNotFoundError(key)
        if data is not None and self.check is not None:
            self.check(key, memoryview(data))
        return None if data is None else prototype.buffer.from_bytes(data)

    async def _whole(self, key: str) -> bytes | None:
        """All of an object, read again while it is not what its writer said; None if absent."""
        from obstore import get_async
        from obstore.exceptions import BaseError

        for rounds_left in reversed(range(READS)):
            try:
                found = await get_async(self.store, key)
                data = bytes(await found.bytes_async())
            except FileNotFoundError:
                return None
            except BaseError as error:
                if not rounds_left:
                    raise StoreError(f"{key}: the object store does not answer") from error
                continue
            if not rounds_left or is_whole(data, found.attributes):
                return data
        raise AssertionError("the last round returns or raises")


def open_strict(
    root: S3Root, check: Callable[[str, memoryview], None] | None = None
) -> StrictS3Store:
    """The store of a prefix, whose chunks are checked when they are read."""
    store = StrictS3Store(open_bucket(root), read_only=True)
    store.check = check
    return store
