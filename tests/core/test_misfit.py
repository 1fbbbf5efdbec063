"""The misfit ratio of one element does not depend on the others; windows of any size of data."""

import pytest
import torch

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.posterior.misfit import misfit_ratio


def normal(*shape, stream=0):
    return KeyedDraws(0, "misfit").normal(0, torch.empty(shape, dtype=torch.float64), stream)


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 200)])
@pytest.mark.parametrize("reach", ["plane", 2])
def test_an_exact_element_leaves_the_ratio_of_a_noisy_one_alone(shape, reach):
    residual, foreseen = normal(*shape), 0.5 * normal(*shape, stream=1)
    R = torch.tensor([0.0, 0.09], dtype=torch.float64).reshape(2, *(1,) * (len(shape) - 1))
    both = misfit_ratio(residual, foreseen, R, reach, (16, 16))
    for b in range(2):
        one = slice(b, b + 1)
        alone = misfit_ratio(residual[one], foreseen[one], R[one], reach, (16, 16))
        torch.testing.assert_close(both[one], alone, rtol=1e-12, atol=0)
    energies = [float(v[0].square().sum()) for v in (residual, foreseen)]
    if reach == "plane":
        assert float(both[0]) == pytest.approx(energies[0] / energies[1])


@pytest.mark.parametrize("size", [(16, 16), (17, 15), (8, 8), (31, 33)])
def test_windows_have_the_size_of_the_image(size):
    data = normal(1, 1, 16, 16)
    ratio = misfit_ratio(data, data, torch.tensor(0.0), 3, size)
    torch.testing.assert_close(ratio, torch.ones(1, 1, *size, dtype=torch.float64))
