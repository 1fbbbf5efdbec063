"""Operations counted against a closed form, and a roof that the same product cannot pass twice."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffusion_core.networks.local_unet import LocalUNet
from diffusion_core.networks.precond import Preconditioned
from diffusion_core.training.throughput import flop_per_pixel, measured_peak


class OneConvolution(nn.Module):
    network = SimpleNamespace(stride=8)

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, stride=2)

    def forward(self, x, sigma, condition):
        return self.conv(x)


@pytest.mark.parametrize("side", [64, 60])
def test_a_convolution_s_operations_are_those_of_its_formula(side):
    """2 x 9 taps x 3 x 8 channels, at every fourth pixel."""
    assert flop_per_pixel(OneConvolution(), side) == pytest.approx(2 * 9 * 3 * 8 / 4)


def test_the_measured_peak_is_of_the_order_of_one_s_own_timing():
    peak = measured_peak("cpu", bfloat16=False)
    a = torch.ones(512, 512)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    own = 2 * 512**3 / min(times)
    assert 0.3 * own < peak < 30 * own


def test_operations_a_pixel_are_those_of_the_convolutions_counted_by_hand():
    model = Preconditioned(LocalUNet(2, widths=[8, 16], depths=[1, 2], num_features=4))
    half = 24 * 8 * 9 + 2 * (2 * 8 * 8 * 9) + 8 * 12 * 9  # stem, one block down and up, head
    quarter = 8 * 16 * 4 + 16 * 4 * 8 + 2 * 2 * 16 * 16 * 9  # shrink, grow, two blocks
    assert flop_per_pixel(model) == pytest.approx(2 * (half / 4 + quarter / 16), rel=1e-6)
