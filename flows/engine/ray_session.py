"""A connection to Ray: to a cluster by address, or to one of our own for as long as it is used."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from domains.base import BadInputError

_LOG = logging.getLogger(__name__)
_OBJECT_STORE_BYTES = 100 * 2**20  # coordinates and receipts only: Ray's default is 30% of memory


ANSWER_S = 5.0
"""How long an address may take to answer at all; Ray itself would wait for minutes."""

_FOUND_BY_RAY = {"auto", "local"}

WORKER_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}
"""What workers are started with: one heap for all threads of a process. With heaps of their own a
worker held a quarter more, since what one thread has freed is of no use to the other."""


def require_cluster(address: str) -> None:
    """Find out whether anything answers at the address of a cluster; Ray is not imported.

    Raises:
        BadInputError: if nothing does.
    """
    if address in _FOUND_BY_RAY:
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdigit()):
        raise BadInputError(f"'{address}' is no address of a Ray cluster; write HOST:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInputError(
            f"no Ray cluster answers at {address} ({reason}); start one there with `ray start "
            "--head`, or mend --ray-address"
        ) from error


def _join(address: str, quiet: dict[str, Any]) -> None:
    """Connect to a running cluster.

    Raises:
        BadInputError: if it is none, or it refuses us.
    """
    import ray

    require_cluster(address)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ray.exceptions.RayError, RuntimeError) as error:
        ray.shutdown()
        first = str(error).strip().partition("\n")[0].rstrip(".")
        raise BadInputError(
            f"what answers at {address} does not let us in as a Ray cluster ({first}): see that it "
            "is one, of this version of Ray, and that RAY_AUTH_MODE and RAY_AUTH_TOKEN (or "
            "RAY_AUTH_TOKEN_PATH) are set here as they are there"
        ) from error


def connect(address: str | None, num_cpus: int) -> bool:
    """Connect to Ray unless this process already is.

    Args:
        address: of a cluster, or None to start Ray on this machine.
        num_cpus: that a Ray started here offers.

    Returns:
        True if the connection was made here, so that `ray.shutdown` is the caller's to call.

    Raises:
        BadInputError: if no cluster answers at the address, or it refuses us.
    """
    import ray

    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    with _own_sigterm():
        if address:
            _join(address, quiet)
        else:
            _start(num_cpus, quiet)
    return True


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep a handler of SIGTERM that was set before: Ray puts one that dumps the C++ stack."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _start(num_cpus: int, quiet: dict[str, Any]) -> None:
    """Start Ray here. On a busy machine it may miss its own deadline of 30 s: then twice more."""
    import ray

    for name, value in WORKER_ENVIRONMENT.items():  # inherited by all that Ray starts
        os.environ.setdefault(name, value)
    for last in (False, False, True):
        try:
            ray.init(
                address="local",  # by itself it would join whatever Ray runs on this machine
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                **quiet,
            )
        except Exception as error:
            ray.shutdown()
            if last or "timed out" not in str(error):
                raise
            _LOG.info("Ray did not start in time; trying again")
        else:
            return


@contextmanager
def ray_session(address: str | None, num_cpus: int) -> Iterator[None]:
    """Connected to Ray inside the block; a connection made here ends with it."""
    import ray

    started = connect(address, num_cpus)
    try:
        yield
    finally:
        if started:
            ray.shutdown()
