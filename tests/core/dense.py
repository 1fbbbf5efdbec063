"""Dense oracles for the solver tests: operators and covariances as matrices, Gaussian posteriors.

Everything here is built from matrices and numpy-style linear algebra, independent of the solvers.
"""

from dataclasses import dataclass

import numpy as np
import torch

from diffusion_core.posterior.covariance import CovarianceTable, LevelCovariance
from diffusion_core.posterior.spectra import opponent_basis, radial_frequency


def flat(v):
    """(b *m) real or complex -> (b n) real, Re<.,.> preserved."""
    v = v.flatten(1)
    return torch.cat([v.real, v.imag], dim=1) if v.is_complex() else v


def matrix_of(function, shape):
    """The matrix of a linear map on single signals (c h w): columns are images of unit vectors."""
    n = int(np.prod(shape))
    return flat(function(torch.eye(n, dtype=torch.float64).reshape(n, *shape))).T


def dense_gain(A, Sigma, R, residual):
    """Sigma A' (A Sigma A' + R)^-1 residual (n k); the pseudo-inverse if the matrix is singular."""
    seen = A.abs().sum(dim=1) > 0
    A, R, residual = A[seen], R[seen], residual[seen]
    G = A @ Sigma @ A.T + torch.diag(R)
    solved = (
        torch.linalg.solve(G, residual)
        if bool((R > 0).all())
        else (torch.linalg.pinv(G, rtol=1e-13, hermitian=True) @ residual)
    )
    return Sigma @ A.T @ solved


def radial_knots(height, width):
    """Every radial frequency of the grid once: a table at these knots is exact on the grid."""
    log_f = radial_frequency(height, width).clamp_min(1e-9).log().flatten()
    knots = log_f.unique()
    return knots[torch.cat([torch.ones(1, dtype=torch.bool), knots.diff() > 1e-9])]


@dataclass
class GaussianPrior:
    """x0 ~ N(mean, P), P stationary with a radial spectrum: D and Sigma are known exactly."""

    size: tuple[int, int]
    channels: int = 1
    mean: float = 0.3

    def power(self, log_f):
        """Spectrum of P at log frequencies; a different one for each opponent channel."""
        f = log_f.exp()
        rows = [0.5 / (1.0 + (f / 0.1) ** 2) + 0.02 / (k + 1.0) for k in range(self.channels)]
        if self.channels == 2:
            rows[1] = rows[0]
        return torch.stack(rows)

    def grid_power(self):
        return self.power(radial_frequency(*self.size).clamp_min(1e-9).log())

    def denoise(self, x, sigma):
        """E[x0 | x] = mean + P (P + sigma^2)^-1 (x - mean)."""
        basis = opponent_basis(self.channels)
        P = self.grid_power()
        gain = P / (P + sigma.double().view(-1, 1, 1, 1) ** 2)
        opponent = torch.einsum("kc,bchw->bkhw", basis, x.double() - self.mean)
        filtered = torch.fft.irfft2(torch.fft.rfft2(opponent) * gain, s=self.size)
        return (self.mean + torch.einsum("kc,bkhw->bchw", basis, filtered)).to(x.dtype)

    def matrix(self):
        """P as a matrix."""
        basis = opponent_basis(self.channels)

        def apply(x):
            opponent = torch.einsum("kc,bchw->bkhw", basis, x)
            filtered = torch.fft.irfft2(torch.fft.rfft2(opponent) * self.grid_power(), s=self.size)
            return torch.einsum("kc,bkhw->bchw", basis, filtered)

        return matrix_of(apply, (self.channels, *self.size))

    def table(self, sigmas, num_energies=0):
        """The exact covariance table at the levels of a run: Sigma = P sigma^2 / (P + sigma^2)."""
        levels = sorted(float(s) for s in sigmas)
        knots = radial_knots(*self.size)
        P = self.power(knots)
        rows = [(P * s**2 / (P + s**2)).log() for s in levels]
        none = torch.zeros(len(levels), num_energies, dtype=torch.float64)
        return CovarianceTable(
            ln_sigmas=torch.tensor(levels, dtype=torch.float64).log(),
            basis=opponent_basis(self.channels),
            log_frequencies=knots,
            log_spectrum=torch.stack(rows),
            log_energy=none,
            log_variance=none,
            prior_mean=torch.full((self.channels,), self.mean, dtype=torch.float64),
            prior_log_spectrum=P.log(),
        )

    def posterior(self, operator, y, R):
        """Mean (b c h w) and covariance matrix given y, by the textbook formula."""
        shape = (self.channels, *self.size)
        A, P = matrix_of(operator.A, shape), self.matrix()
        mean = torch.full((P.shape[0], 1), self.mean, dtype=torch.float64)
        mean = mean + dense_gain(A, P, R, flat(y).T - A @ mean)
        return mean.T.reshape(-1, *shape), P - dense_gain(A, P, R, A @ P)


def level_covariance(size, channels, *, local):
    """A covariance with a steep spectrum, and S that varies a hundredfold in S^2 if `local`."""
    knots = radial_knots(*size)
    rows = [0.3 / (1.0 + (knots.exp() / 0.05) ** 2) + 1e-3 * (k + 1) for k in range(channels)]
    if channels == 2:
        rows[1] = rows[0]
    energies = torch.linspace(-9.0, -2.0, 5 if local else 0, dtype=torch.float64)
    return LevelCovariance(
        basis=opponent_basis(channels),
        log_frequencies=knots,
        log_spectrum=torch.stack(rows).log(),
        log_energy=energies,
        log_variance=0.65 * (energies + 5.5),
    )
