"""The core on a GPU does what it does on the CPU; without one, the same paths run on the CPU."""

import numpy as np
import pytest
import torch
from dense import GaussianPrior
from scipy.sparse import random_array

from diffusion_core.networks.local_unet import LocalUNet
from diffusion_core.networks.precond import ConditionedDenoiser, Preconditioned
from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.likelihood import GaussianNoise
from diffusion_core.noise.streams import seeded_initialisation
from diffusion_core.operators import Blur, Fourier, Mask, Pool, Sparse
from diffusion_core.posterior.covprox import CovProx
from diffusion_core.training.loop import Callbacks, Recipe, train
from diffusion_core.training.patches import PatchSource, Volumes

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
SIZE = (16, 24)
SIGMAS = torch.tensor([0.5, 0.2, 0.05])


def draws(*shape, stream=0, device="cpu"):
    like = torch.empty(shape, dtype=torch.float64, device=device)
    return KeyedDraws(3, "devices").normal(0, like, stream)


def sparse():
    rng = np.random.default_rng(4)
    matrix = random_array((30, SIZE[0] * SIZE[1]), density=0.2, format="csr", rng=rng)
    return Sparse(matrix, matrix.T.tocsr(), SIZE, (5, 6))


OPERATORS = {
    "mask": (lambda: Mask(draws(1, 1, *SIZE, stream=5) > 0), 3),
    "blur": (lambda: Blur(draws(3, 3, stream=6).abs(), SIZE), 3),
    "pool": (lambda: Pool(4), 3),
    "fourier": (lambda: Fourier(draws(1, 1, 1, SIZE[1], stream=7) > 0, channels=2), 2),
    "sparse": (sparse, 1),
}


def restored(name, mode, device):
    """CovProx with a network that is not trained, but looks about."""
    make, channels = OPERATORS[name]
    network = small_network().double().to(device)
    operator = make()
    y = operator.A(draws(2, channels, *SIZE, stream=1)).to(device)
    if device != "cpu":
        operator = operator.to(device)
    table = GaussianPrior(SIZE, channels).table(SIGMAS)
    solver = CovProx(table, mode=mode, tolerance=1e-8, max_steps=300)
    denoise = ConditionedDenoiser(network, 0, channels)
    with torch.no_grad():
        noise = GaussianNoise(0.05)
        return solver(denoise, operator, y, noise, SIGMAS, KeyedDraws(0, "covprox")).x


def small_network():
    with seeded_initialisation(3):
        network = Preconditioned(LocalUNet(2, (16, 16), (1, 1), num_features=16))
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


@pytest.mark.parametrize("device", DEVICES)
def test_keyed_draws_are_equal_on_every_device(device):
    there = draws(2, 3, 33, 41, device=device)
    assert there.device.type == device
    torch.testing.assert_close(there.cpu(), draws(2, 3, 33, 41), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_denoiser_is_the_same_on_every_device(device, dtype):
    network = small_network()
    x, sigma = draws(2, 1, 20, 26).float(), torch.tensor([0.1, 0.5])
    here = ConditionedDenoiser(network, 1, 1)(x, sigma)
    network.to(device).network.to(dtype)
    there = ConditionedDenoiser(network, 1, 1)(x.to(device), sigma.to(device))
    assert (there.device.type, there.dtype) == (device, torch.float32)
    bound = 1e-4 if dtype == torch.float32 else 0.05
    assert (there.cpu() - here).abs().max() < bound * here.abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["mean", "sample"])
@pytest.mark.parametrize("name", OPERATORS)
def test_covprox_is_the_same_on_every_device(name, mode, device):
    there = restored(name, mode, device)
    assert there.device.type == device
    torch.testing.assert_close(there.cpu(), restored(name, mode, "cpu"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_training_follows_the_same_curve_on_every_device(device, tmp_path):
    def losses(on, folder):
        seen = []
        grey = np.cumsum(np.random.default_rng(0).normal(size=(1, 3, 48, 48)), axis=3) / 8
        items = {"grey": [Volumes([grey.astype(np.float32)])]}
        patches = PatchSource(items, {"grey": 1.0}, 16, 7, lambda _, p, __: p)
        recipe = Recipe(
            num_steps=3, batch_size=4, warmup_steps=2, bfloat16=False, log_every_steps=1
        )
        watch = Callbacks(lambda _step, metrics, _averaged: seen.append(metrics["loss"]))
        state = train(
            small_network(),
            patches,
            recipe,
            tmp_path / folder,
            watch,
            device=on,
        )
        assert next(state.ema.module.parameters()).device.type == on
        return seen

    np.testing.assert_allclose(losses(device, "there"), losses("cpu", "here"), rtol=1e-2)
