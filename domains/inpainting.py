"""Filling missing pixels smoothly: the biharmonic equation, and its smoothing spline.

With L the Laplacian of the pixel grid (mirrored at the border), the fill minimises |L x|^2 with the
known pixels kept: L'L x = 0 at every missing pixel, a sparse positive definite system.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import sparse
from scipy.fft import dctn, idctn
from scipy.sparse.linalg import splu

from domains.base import Array


def biharmonic(image: Array, known: Array) -> Array:
    """Fill missing pixels by the biharmonic equation, clipped to the range of the known ones.

    The equations of scikit-image's `inpaint_biharmonic`, solved by one sparse factorisation for all
    channels: 1.5 s for 70% of 416 x 640 pixels.

    Args:
        image: (c h w); missing pixels may hold anything.
        known: (h w) boolean.
    Raises:
        ValueError: if no pixel is known.
    Source: Damelin & Hoang 2018, doi:10.1155/2018/3950312.
    """
    known = known.astype(bool)
    if not known.any():
        raise ValueError("no pixel is known: there is nothing to continue")
    out = image.astype(np.float64)
    if known.all():
        return out
    flat = out.reshape(len(image), -1)
    unknown = np.flatnonzero(~known)
    equations = _squared_laplacian(*known.shape)[unknown]
    right = -(equations[:, known.ravel()] @ flat[:, known.ravel()].T)
    system = equations[:, unknown].tocsc()
    # Symmetric and positive definite: no pivoting, and an ordering of A + A' fills in least.
    factors = splu(
        system,
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )
    flat[:, unknown] = factors.solve(right).T
    low, high = (f(flat[:, known.ravel()], axis=1)[:, None] for f in (np.min, np.max))
    return np.clip(flat, low, high).reshape(image.shape)


def smoothing_spline(
    image: Array, known: Array, smoothing: float, *, tolerance: float = 1e-3, max_steps: int = 300
) -> Array:
    """Minimise sum over known pixels |x - image|^2 + smoothing |L x|^2.

    The biharmonic fill of noisy pixels, to which it tends as smoothing -> 0. Conjugate gradients
    from that fill (a large hole would take them hundreds of steps), preconditioned by the same
    problem with a constant weight, which the cosine transform solves.

    Args:
        image: (c h w); missing pixels may hold anything.
        known: (h w) boolean.
        smoothing: > 0, pixels^4: frequencies above smoothing^(-1/4) rad/px are smoothed away.
        tolerance: of the residual, as a share of the right-hand side.
        max_steps: at most.
    """
    height, width = known.shape
    laplacian = _cosine_eigenvalues(height)[:, None] + _cosine_eigenvalues(width)[None]
    penalty = smoothing * laplacian**2
    weight = known.astype(np.float64)
    mean_weight = weight.mean()

    def cosine(symbol: Array) -> Callable[[Array], Array]:
        return lambda x: idctn(
            dctn(x, axes=(-2, -1), norm="ortho") * symbol, axes=(-2, -1), norm="ortho"
        )

    smooth, precondition = cosine(penalty), cosine(1 / (mean_weight + penalty))
    right = weight * image
    x = biharmonic(image, known)
    r = right - weight * x - smooth(x)
    s = precondition(r)
    direction, rs = s, _inner(r, s)
    for _ in range(max_steps):
        product = weight * direction + smooth(direction)
        alpha = rs / np.maximum(_inner(direction, product), np.finfo(np.float64).tiny)
        x = x + alpha * direction
        r = r - alpha * product
        if (_inner(r, r) <= tolerance**2 * _inner(right, right)).all():
            break
        s = precondition(r)
        rs, previous = _inner(r, s), rs
        direction = s + rs / np.maximum(previous, np.finfo(np.float64).tiny) * direction
    return x


def _squared_laplacian(height: int, width: int) -> sparse.csr_array:
    """L'L of the grid's Laplacian with mirrored borders, (h w, h w)."""
    rows, columns = _second_difference(height), _second_difference(width)
    laplacian = sparse.kron(rows, sparse.eye_array(width)) + sparse.kron(
        sparse.eye_array(height), columns
    )
    laplacian = sparse.csr_array(laplacian)
    return sparse.csr_array(laplacian @ laplacian)


def _second_difference(n: int) -> sparse.dia_array:
    """x[i-1] - 2 x[i] + x[i+1], mirrored at both ends; symmetric."""
    middle = np.full(n, -2.0)
    middle[0] += 1
    middle[-1] += 1
    beside = np.ones(n - 1)
    return sparse.diags_array([beside, middle, beside], offsets=[-1, 0, 1])


def _cosine_eigenvalues(n: int) -> Array:
    """Of minus the second difference, in the order of the DCT-II."""
    values: Array = 2 - 2 * np.cos(np.pi * np.arange(n) / n)
    return values


def _inner(a: Array, b: Array) -> Array:
    """Inner product of each channel, (c 1 1)."""
    product: Array = (a * b).sum(axis=(-2, -1), keepdims=True)
    return product
