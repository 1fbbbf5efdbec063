"""Small tables made on the CPU follow the device of the argument; see test_operators too."""

import pytest
import torch

from diffusion_core.noise.densities import Histogram
from diffusion_core.posterior.covariance import fit_covariance
from diffusion_core.posterior.spectra import radial_mean

DEVICES = [
    "meta",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
def test_ring_means_stay_on_the_device(device):
    modes = torch.rand(16, 9, dtype=torch.float64)
    there = radial_mean(modes.to(device), 16)
    assert there.device.type == device
    if device == "cuda":
        torch.testing.assert_close(there.cpu(), radial_mean(modes, 16))


@pytest.mark.parametrize("device", DEVICES)
def test_densities_of_levels_answer_on_the_device(device):
    density = Histogram(torch.linspace(-3, 1, 9).double(), torch.full((8,), 0.125).double())
    u = torch.linspace(0.1, 0.9, 5)
    for ask, at in ((density.quantile, u), (density.log_density, 4 * u - 3)):
        there = ask(at.to(device))
        assert (there.device.type, there.dtype) == (device, at.dtype)
        if device == "cuda":
            torch.testing.assert_close(there.cpu(), ask(at))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_covariance_is_measured_on_the_device():
    images = [torch.linspace(-1, 1, 32 * 32).sin().reshape(1, 1, 32, 32)]

    def table(device):
        return fit_covariance(lambda x, s: 0.5 * x, [x0.to(device) for x0 in images], None, (0.2,))

    there, here = table("cuda"), table("cpu")
    for name, values in vars(here).items():
        torch.testing.assert_close(getattr(there, name), values, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_density_is_learned_from_losses_on_the_device():
    losses = torch.linspace(-2, 0, 50, device="cuda")
    density = Histogram.of_integrand(losses, losses.exp(), (-2.0, 0.0))
    assert density.mass.device.type == "cpu"
