"""Denoiser calls of several lanes, run together in batches of one fixed shape.

    lane 1   D(x; sigma) of 3 windows --+
    lane 2   D(x; sigma) of 4 windows --+--> | 3 | 4 | 4 | 1 | 4 copies | --> the device
    lane 3   D(x; sigma) of 5 windows --+      a batch of 16, and every lane gets its own back

A device that is fed one block's few slices at a time is idle for the most part. So the windows that
all lanes of a worker ask for are gathered by model, condition and shape, whatever block or item
they are of, and filled up to a batch whose shape is part of the plan. In a batch of fixed shape no
sample's result depends on its place or its neighbours (infra/decisions/0016 has what was measured),
so who else was there, and when, cannot change a bit.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusion_core.protocols import Denoiser, Sigma, Signal
from flows.engine.grid import MAX_BATCH

BATCH_SIZES = (1, 4, 8, MAX_BATCH)
"""Windows in a batch. Never 2 or 3: matrix products of so few rows round by the row's place."""


def batch_size(window_px: int, batch_px: int) -> int:
    """Windows in the batches of one shape: as many as make no more than `batch_px` pixels."""
    return max(n for n in BATCH_SIZES if n == 1 or n * window_px <= batch_px)


@dataclass(eq=False)
class _Call:
    """One call of a lane: its windows' results, as they come."""

    results: list[Tensor | None]
    error: BaseException | None = None
    left: int = 0


@dataclass(frozen=True, eq=False)
class _Window:
    """One image of a call."""

    x: Tensor
    sigma: Tensor
    call: _Call
    place: int


@dataclass(eq=False)
class _Group:
    """Windows that fit one batch, oldest first."""

    denoise: Denoiser
    size: int
    windows: deque[_Window] = field(default_factory=deque)
    batch_s: float = 0.0

    def take(self) -> list[_Window]:
        """The oldest windows, a batch of them at the most."""
        return [self.windows.popleft() for _ in range(min(self.size, len(self.windows)))]


class Batcher:
    """Gathers the denoiser calls of the lanes of a worker, which are threads.

    A batch is run by the lane that completes it: when it is full; when no lane is left that could
    add to it; or when the others have been waited for as long as a batch takes.

    Args:
        patience_s: seconds to wait for other lanes; None: what the last batch of the kind took.
    """

    def __init__(self, patience_s: float | None = None) -> None:
        self._changed = threading.Condition()
        self._groups: dict[Hashable, _Group] = {}
        self._patience_s = patience_s
        self._num_lanes = self._num_waiting = 0
        self._running = False
        self.num_batches = 0
        """Run so far."""

    @contextmanager
    def lane(self) -> Iterator[None]:
        """Count the caller among those who may yet add to a batch."""
        with self._changed:
            self._num_lanes += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_lanes -= 1
                self._changed.notify_all()

    def denoiser(self, key: Hashable, denoise: Denoiser, batch_px: int) -> Denoiser:
        """D(x; sigma), called in batches.

        Args:
            key: equal for denoisers that are the same function.
            denoise: D(x; sigma).
            batch_px: pixels of a batch, at least one window.

        Returns:
            A denoiser without gradients, to be called by one lane at a time.
        """

        def batched(x: Signal, sigma: Sigma) -> Signal:
            shape = tuple(x.shape[1:])
            size = batch_size(math.prod(shape[1:]), batch_px)
            call = _Call([None] * len(x), left=len(x))
            with self._changed:
                group = self._groups.setdefault((key, shape, x.dtype), _Group(denoise, size))
                parts = enumerate(zip(x, sigma, strict=True))
                group.windows.extend(_Window(image, s, call, i) for i, (image, s) in parts)
                self._num_waiting += 1
                self._changed.notify_all()
            while (due := self._due(call, group)) is not None:
                self._run(*due)
            if call.error is not None:
                raise call.error
            return torch.stack([result for result in call.results if result is not None])

        return batched

    def _due(self, call: _Call, own: _Group) -> tuple[_Group, list[_Window]] | None:
        """Wait until there is a batch for the caller to run, or its call is done (None)."""
        with self._changed:
            start = time.monotonic()
            while call.left:
                patience = own.batch_s if self._patience_s is None else self._patience_s
                left = start + patience - time.monotonic()
                group = None if self._running else self._ripe(own if left <= 0 else None)
                if group is not None:
                    self._running = True
                    return group, group.take()
                # While a batch runs its end is waited for; patience counts from then on.
                start = time.monotonic() if self._running else start
                self._changed.wait(None if self._running or math.isinf(left) else left)
            return None

    def _ripe(self, impatient: _Group | None) -> _Group | None:
        """The group whose batch is to be run now, if there is one."""
        waiting = [group for group in self._groups.values() if group.windows]
        full = (group for group in waiting if len(group.windows) >= group.size)
        if self._num_waiting >= self._num_lanes:
            impatient = max(waiting, key=lambda group: len(group.windows), default=None)
        return next(full, impatient if impatient and impatient.windows else None)

    def _run(self, group: _Group, windows: list[_Window]) -> None:
        """Run one batch, and hand every window its result, or the error."""
        start = time.monotonic()
        error: BaseException | None = None
        results: list[Tensor] = []
        try:
            filled = [*windows, *[windows[-1]] * (group.size - len(windows))]
            with torch.no_grad():
                D_x = group.denoise(
                    torch.stack([window.x for window in filled]),
                    torch.stack([window.sigma for window in filled]),
                )
            results = list(D_x[: len(windows)])
        except BaseException as caught:
            error = caught
        with self._changed:
            self._running = False
            self.num_batches += 1
            group.batch_s = time.monotonic() - start
            for number, window in enumerate(windows):
                self._settle(window, None if error else results[number], error)
            self._changed.notify_all()

    def _settle(self, window: _Window, result: Tensor | None, error: BaseException | None) -> None:
        """Give a call the result of one of its windows; an error ends it."""
        call = window.call
        if not call.left:
            return
        call.results[window.place] = result
        call.left = 0 if error else call.left - 1
        call.error = error
        if error:
            for group in self._groups.values():
                group.windows = deque(w for w in group.windows if w.call is not call)
        self._num_waiting -= not call.left
