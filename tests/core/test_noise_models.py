"""Levels of noise that do not fit the data, or are none, are refused."""

import pytest
import torch

from diffusion_core.noise.likelihood import GaussianNoise


@pytest.mark.parametrize(
    ("levels", "data", "shape"),
    [
        ((), (2, 3, 4, 5), ()),
        ((1,), (2, 3, 4, 5), (1, 1, 1, 1)),
        ((2,), (2, 3, 4, 5), (2, 1, 1, 1)),
        ((2,), (2, 7), (2, 1)),
        ((4, 5), (2, 3, 4, 5), (1, 1, 4, 5)),
        ((2, 7), (2, 7), (2, 7)),
    ],
)
def test_the_variance_has_the_axes_of_the_data(levels, data, shape):
    variance = GaussianNoise(torch.full(levels, 0.5)).variance(torch.zeros(data))
    assert variance.shape == shape
    assert bool((variance == 0.25).all())


@pytest.mark.parametrize(("levels", "data"), [(3, (1, 1, 4, 4)), (7, (2, 7)), (2, (1, 1, 4, 2))])
def test_levels_that_fit_neither_batch_nor_data_are_refused(levels, data):
    with pytest.raises(
        ValueError, match=f"{levels} levels sigma_y do not fit a batch of {data[0]}"
    ):
        GaussianNoise(torch.full((levels,), 0.5)).variance(torch.zeros(data))


@pytest.mark.parametrize("bad", [-0.1, float("nan"), torch.tensor([0.1, float("nan")])])
def test_what_is_no_level_is_refused(bad):
    with pytest.raises(ValueError, match="sigma_y must be >= 0"):
        GaussianNoise(bad)
