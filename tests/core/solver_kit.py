"""What tests of solvers share: priors with a D in closed form, operators, draws."""

from dataclasses import dataclass

import torch

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.operators import Blur, Fourier, Identity, Mask, Pool
from diffusion_core.posterior import make_solver

SIZE = (12, 10)
DRAWS = KeyedDraws(0, "solver-kit")


def normal(*shape, stream=0):
    return DRAWS.normal(0, torch.empty(shape, dtype=torch.float64), stream)


class Dense:
    """A random matrix, with nothing but the two methods of a linear operator."""

    def __init__(self, size=SIZE, num_data=40, scale=0.2):
        self.size = size
        self.matrix = scale * normal(num_data, size[0] * size[1], stream=3)

    def A(self, x):
        return x.flatten(1) @ self.matrix.T

    def A_adjoint(self, y):
        return (y @ self.matrix).reshape(-1, 1, *self.size)


def kernel():
    taps = torch.tensor([1.0, 3.0, 1.0], dtype=torch.float64)
    skewed = torch.outer(taps, torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64))
    return skewed / skewed.sum()


def lines(size=SIZE):
    return (torch.arange(size[0]) % 3 == 0)[None, None, :, None].expand(1, 1, *size).contiguous()


def pixels(share=0.4):
    return normal(1, 1, *SIZE, stream=9) > torch.distributions.Normal(0.0, 1.0).icdf(
        torch.tensor(share, dtype=torch.float64)
    )


OPERATORS = {
    "identity": (Identity, 3),
    "mask": (lambda: Mask(pixels()), 3),
    "blur": (lambda: Blur(kernel(), SIZE), 1),
    "pool": (lambda: Pool(2), 1),
    "fourier": (lambda: Fourier(lines(), 1), 1),
    "fourier-complex": (lambda: Fourier(lines(), 2), 2),
    "dense": (Dense, 1),
}


@dataclass
class WhitePrior:
    """x0 ~ N(mean, std^2 I): diagonal in every basis."""

    mean: float = 0.3
    std: float = 0.5

    def denoise(self, x, sigma):
        gain = self.std**2 / (self.std**2 + sigma.to(x).view(-1, 1, 1, 1) ** 2)
        return self.mean + gain * (x - self.mean)


def run(name, denoise, operator, y, noise, sigmas, draws=DRAWS, prior=None, **options):
    solver = make_solver(name, prior, {"start": "noise"} | options)
    return solver(denoise, operator, y, noise, sigmas, draws)
