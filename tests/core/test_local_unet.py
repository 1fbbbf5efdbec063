"""The network is local: what lies outside its reach cannot change a pixel."""

import pytest
import torch

from diffusion_core.networks.local_unet import LocalUNet
from diffusion_core.networks.precond import ConditionedDenoiser, Preconditioned
from diffusion_core.noise.streams import seeded_initialisation, training_noise


def random_network(widths=(8, 8, 8), depths=(1, 1, 1)) -> Preconditioned:
    """A small network none of whose weights are zero, in float64."""
    with seeded_initialisation(0):
        model = Preconditioned(LocalUNet(2, widths, depths, num_features=16)).double()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(requires_grad=False)


def denoise(model, x):
    sigma = torch.full((len(x),), 0.3, dtype=x.dtype)
    return model(x, sigma, torch.zeros(len(x), dtype=torch.long))


@pytest.mark.parametrize("phase", range(8))
def test_a_pixel_changes_nothing_outside_the_stated_reach(phase):
    model = random_network()
    reach, size = model.network.reach, 160
    x = training_noise(0, 0, torch.empty(1, 3, size, size)).double()
    centre = size // 2 + phase
    moved = x.clone()
    moved[0, :, centre, centre] += 1.0

    changed = (denoise(model, moved) - denoise(model, x)).abs().amax(dim=(0, 1)) > 0
    rows = changed.any(dim=1).nonzero().flatten()

    assert changed[centre, centre]
    assert rows.min() >= centre - reach
    assert rows.max() <= centre + reach
    # The bound is not idle: the change does go more than half that far.
    assert rows.max() - rows.min() > reach


def test_a_tile_with_a_halo_equals_the_whole():
    model = random_network()
    halo = -(-model.network.reach // 8) * 8
    x = training_noise(0, 1, torch.empty(1, 3, 2 * halo + 64, 2 * halo + 64)).double()
    whole = denoise(model, x)
    tile = denoise(model, x[:, :, 8:, 8:])
    inside = slice(halo, halo + 16)

    assert torch.allclose(whole[:, :, 8:, 8:][:, :, inside, inside], tile[:, :, inside, inside])
    # An origin off the stride changes the result: the test above would notice.
    off = denoise(model, x[:, :, 7:-1, 7:-1])
    shifted = whole[:, :, 7:-1, 7:-1][:, :, inside, inside]
    assert not torch.allclose(shifted, off[:, :, inside, inside], atol=1e-3)


def test_the_denoiser_takes_any_size_and_keeps_unused_channels_out():
    model = random_network()
    grey = ConditionedDenoiser(model, 0, 1)
    x = training_noise(0, 2, torch.empty(2, 1, 37, 50)).double()
    sigma = torch.tensor([0.1, 0.5], dtype=torch.float64)

    assert grey(x, sigma).shape == x.shape
    with pytest.raises(ValueError, match="1 channels, x has 3"):
        grey(x.expand(2, 3, 37, 50), sigma)


def test_each_batch_element_stands_alone():
    model = random_network()
    colour = ConditionedDenoiser(model, 1, 3)
    x = training_noise(0, 3, torch.empty(3, 3, 40, 40)).double()
    sigma = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    together = colour(x, sigma)
    alone = torch.cat([colour(x[i : i + 1], sigma[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, rtol=1e-6, atol=1e-6)


def test_at_no_noise_the_denoiser_returns_its_input_and_at_much_noise_forgets_it():
    model = random_network()
    x = training_noise(0, 4, torch.empty(1, 3, 32, 32)).double()
    sigma = torch.tensor([1e-9], dtype=torch.float64)
    condition = torch.zeros(1, dtype=torch.long)
    assert torch.allclose(model(x, sigma, condition), x, atol=1e-3)
    # EDM's c_skip at sigma >> sigma_data is (sigma_data / sigma)^2.
    zero = Preconditioned(LocalUNet(1, (8,), (1,), 8)).double()
    big = torch.tensor([50.0], dtype=torch.float64)
    assert torch.allclose(zero(x, big, condition), x * 0.25 / (2500 + 0.25))
