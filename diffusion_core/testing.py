"""Contract tests that authors of operators and domains inherit.

    class TestMyOperator(LinearOperatorContract):
        def make(self, dtype):
            return MyOperator(...), (2, 1, 17, 23)

pytest then runs every `test_*` method below on it. The contracts need no pytest themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_core.operators.base import inner
from diffusion_core.protocols import Data, LinearOperator, Signal

ADJOINT_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def _normal(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Standard normal test data, real or complex, the same for the same seed."""
    rng = np.random.default_rng(seed)
    real = torch.from_numpy(rng.standard_normal(tuple(shape)))
    if dtype.is_complex:
        real = torch.complex(real, torch.from_numpy(rng.standard_normal(tuple(shape))))
    return real.to(dtype)


def _norm(values: Tensor) -> Tensor:
    """Euclidean norm of each batch element."""
    return inner(values, values).sqrt()


def adjoint_gap(operator: LinearOperator, u: Signal, v: Data) -> float:
    """max over the batch of |<A u, v> - <u, A' v>| / (|A u| |v|); the sums run in float64."""
    Au = operator.A(u)
    forward = inner(_double(Au), _double(v))
    backward = inner(_double(u), _double(operator.A_adjoint(v)))
    scale = _norm(_double(Au)) * _norm(_double(v))
    return float(((forward - backward).abs() / scale.clamp_min(1e-300)).max())


def _double(values: Tensor) -> Tensor:
    return values.to(torch.complex128 if values.is_complex() else torch.float64)


@dataclass(frozen=True)
class Sabotaged:
    """An operator with a deliberately wrong adjoint, to show that a test can fail.

    Attributes:
        operator: the right one.
        fault: "scale" (1% too much), "shift" (a pixel off) or "sign".
    """

    operator: LinearOperator
    fault: str

    def A(self, x: Signal) -> Data:
        """The right forward map."""
        return self.operator.A(x)

    def A_adjoint(self, y: Data) -> Signal:
        """The adjoint with the fault in it."""
        image = self.operator.A_adjoint(y)
        faults = {"scale": 1.01 * image, "shift": image.roll(1, dims=-1), "sign": -image}
        return faults[self.fault]


class LinearOperatorContract(ABC):
    """What every LinearOperator promises: adjointness, linearity, batch elements kept apart."""

    @abstractmethod
    def make(self, dtype: torch.dtype) -> tuple[LinearOperator, tuple[int, int, int, int]]:
        """An operator for signals of `dtype`, and a signal's shape; take odd sizes, b >= 2."""

    def _pair(self, dtype: torch.dtype) -> tuple[LinearOperator, Signal, Data]:
        operator, shape = self.make(dtype)
        u = _normal(shape, dtype, seed=1)
        y = operator.A(u)
        return operator, u, _normal(y.shape, y.dtype, seed=2)

    def test_adjoint_is_the_adjoint_in_float32(self) -> None:
        """|<A u, v> - <u, A' v>| <= 1e-5 |A u| |v|."""
        assert adjoint_gap(*self._pair(torch.float32)) <= ADJOINT_TOLERANCE[torch.float32]

    def test_adjoint_is_the_adjoint_in_float64(self) -> None:
        """|<A u, v> - <u, A' v>| <= 1e-12 |A u| |v|."""
        assert adjoint_gap(*self._pair(torch.float64)) <= ADJOINT_TOLERANCE[torch.float64]

    def test_a_wrong_adjoint_is_caught(self) -> None:
        """The adjoint test is not vacuous: three faults exceed its tolerance a hundredfold."""
        operator, u, _ = self._pair(torch.float64)
        v = operator.A(u)  # not random: <A u, v> = |A u| |v|, so that a fault shows in full
        for fault in ("scale", "shift", "sign"):
            gap = adjoint_gap(Sabotaged(operator, fault), u, v)
            assert gap > 100 * ADJOINT_TOLERANCE[torch.float32], f"fault '{fault}' not caught"

    def test_precision_and_shape_are_kept(self) -> None:
        """A and A' compute in the precision of their argument; A' gives back the signal's shape."""
        for dtype in (torch.float32, torch.float64):
            operator, u, v = self._pair(dtype)
            assert operator.A(u).real.dtype == dtype
            image = operator.A_adjoint(v)
            assert (image.shape, image.dtype) == (u.shape, dtype)

    def test_it_is_real_linear(self) -> None:
        """A(a u + b w) = a A u + b A w."""
        operator, u, _ = self._pair(torch.float64)
        w = _normal(u.shape, u.dtype, seed=3)
        together = operator.A(0.7 * u - 1.9 * w)
        apart = 0.7 * operator.A(u) - 1.9 * operator.A(w)
        assert bool((_norm(together - apart) <= 1e-12 * _norm(apart)).all())

    def test_batch_elements_do_not_mix(self) -> None:
        """Changing one batch element leaves the data, and the adjoint, of the others alone."""
        operator, u, v = self._pair(torch.float64)
        for apply, values in ((operator.A, u), (operator.A_adjoint, v)):
            before = apply(values)
            changed = values.clone()
            changed[0] = 3.0 - 2.0 * changed[0]
            after = apply(changed)
            assert after.shape[0] >= 2, "make a signal of two batch elements or more"
            assert bool((_norm(after[1:] - before[1:]) <= 1e-13 * _norm(before[1:])).all())
            assert not torch.allclose(after[0], before[0])

    def test_arguments_are_not_modified(self) -> None:
        """A and A' leave their argument as it was."""
        operator, u, v = self._pair(torch.float32)
        u_before, v_before = u.clone(), v.clone()
        operator.A(u)
        operator.A_adjoint(v)
        assert torch.equal(u, u_before)
        assert torch.equal(v, v_before)


class DomainContract(ABC):
    """What every Domain promises about its physics, on an item and some tasks of the author's.

    The domain has, beside what `domains.base.Domain` asks for, `truth_signal(item, measurement)`:
    the clean item in the network units of that measurement, (b c h w).
    """

    chi2_bounds: tuple[float, float] = (0.9, 1.1)
    """Allowed range of |R^{-1/2}(y - A truth)|^2 / number of real measurements."""
    exact_tolerance: float = 1e-5
    """Allowed max |y - A truth| where the noise is 0, network units."""
    zero_where_unseen: bool = True
    """Whether data that A does not reach are zeros (not so for rays that pass the image by)."""
    round_trip_tolerance: float = 1e-5
    """Allowed max |to_source(truth) - pixels|, relative to the range of the pixels."""

    @abstractmethod
    def make_domain(self) -> Any:
        """A Domain."""

    @abstractmethod
    def make_item(self) -> Any:
        """A clean Item of a few small slices (two or more), of content that resembles the field."""

    @abstractmethod
    def make_tasks(self) -> Sequence[Any]:
        """The Tasks to be tried."""

    def _cases(self) -> list[tuple[Any, Any, Any, Any]]:
        domain, item = self.make_domain(), self.make_item()
        return [(domain, item, t, domain.simulate(item, t, seed=7)) for t in self.make_tasks()]

    def test_operator_of_the_problem_has_its_adjoint(self) -> None:
        """The operator that a measurement builds passes the adjoint test in float32."""
        for domain, _, task, measurement in self._cases():
            problem = domain.problem(measurement)
            u = _normal(problem.shape, torch.float32, seed=1)
            v = _normal(problem.y.shape, problem.y.dtype, seed=2)
            gap = adjoint_gap(problem.operator, u, v)
            assert gap <= ADJOINT_TOLERANCE[torch.float32], task.name

    def test_units_go_there_and_back(self) -> None:
        """Source -> network -> source gives the pixels back; units, spacing and dtype are kept."""
        for domain, item, task, measurement in self._cases():
            problem = domain.problem(measurement)
            truth = domain.truth_signal(item, measurement)
            assert tuple(truth.shape) == problem.shape, task.name
            back = problem.to_source(truth).numpy()
            pixels = np.moveaxis(np.asarray(item.pixels, dtype=np.float64), 0, 1)
            assert back.shape == pixels.shape, task.name
            gap = np.abs(back - pixels).max() / np.ptp(pixels)
            assert gap <= self.round_trip_tolerance, f"{task.name}: {gap:.2e}"
            for name in ("units", "dtype", "spacing_mm", "affine", "source_digest", "shape"):
                assert getattr(measurement.record, name) == getattr(item.record, name), name

    def test_data_are_the_operator_on_the_truth_plus_the_stated_noise(self) -> None:
        """chi^2 of y - A truth per real datum is within bounds; exact data are met exactly."""
        for domain, item, task, measurement in self._cases():
            problem = domain.problem(measurement)
            Ax = problem.operator.A(domain.truth_signal(item, measurement))
            residual = problem.y - Ax
            seen = problem.operator.A(_normal(problem.shape, torch.float32, seed=3)).abs() > 0
            variance = problem.noise.variance(Ax).expand(residual.shape)
            if not bool(variance.any()):
                assert float(residual.abs().max()) <= self.exact_tolerance, task.name
                continue
            parts = 2 if residual.is_complex() else 1
            chi2 = float((residual[seen].abs() ** 2 / variance[seen]).mean()) / parts
            low, high = self.chi2_bounds
            assert low <= chi2 <= high, f"{task.name}: chi^2 {chi2:.3f}"
            if self.zero_where_unseen:
                assert not bool(residual[~seen].abs().any()), f"{task.name}: data of nothing"

    def test_simulation_is_keyed_by_digest_and_seed(self) -> None:
        """Same digest and seed: the same bytes. Another of either: other data."""
        for domain, item, task, measurement in self._cases():
            again = domain.simulate(item, task, seed=7)
            assert _same(measurement, again), task.name
            other_record = replace(item.record, source_digest="f" * 64)
            other = domain.simulate(replace(item, record=other_record), task, seed=7)
            assert not _same(measurement, other), task.name
            assert not _same(measurement, domain.simulate(item, task, seed=8)), task.name

    def test_slices_are_measured_apart(self) -> None:
        """The problem of one slice is that slice of the whole problem, so blocks can be cut."""
        for domain, _, task, measurement in self._cases():
            whole = domain.problem(measurement)
            part = domain.problem(measurement.slices(1, 2))
            per_slice = whole.shape[0] // measurement.record.shape[1]
            rows = slice(per_slice, 2 * per_slice)
            assert torch.equal(part.y, whole.y[rows]), task.name
            probe = _normal(whole.shape, torch.float32, seed=4)
            expected = whole.operator.A(probe)[rows]
            gap = _norm(part.operator.A(probe[rows]) - expected) / _norm(expected)
            assert float(gap.max()) <= 1e-6, task.name

    def test_measurements_do_not_hold_the_truth(self) -> None:
        """A measurement of several slices names the truth by digest only, and says its seed."""
        for _, item, task, measurement in self._cases():
            assert measurement.truth_digest, task.name
            assert measurement.seed == 7, task.name
            for name, values in measurement.arrays.items():
                same_size = values.size == item.pixels.size and values.dtype != np.bool_
                assert not same_size, f"{task.name}: array '{name}' has the truth's size"


def _same(a: Any, b: Any) -> bool:
    """Whether two measurements hold the same bytes."""
    arrays = a.arrays.keys() == b.arrays.keys() and all(
        np.array_equal(a.arrays[k], b.arrays[k]) for k in a.arrays
    )
    return arrays and np.array_equal(a.y, b.y)
