"""Guides: what is not given has no influence, what is given is used as Bayes' rule would."""

import numpy as np
import pytest
import torch

from diffusion_core.networks.local_unet import LocalUNet
from diffusion_core.networks.precond import (
    CarryingDenoiser,
    ConditionedDenoiser,
    Preconditioned,
    guided,
)
from diffusion_core.noise.streams import seeded_initialisation, training_noise
from diffusion_core.posterior.covariance import fit_covariance
from diffusion_core.tiles import tiled_denoiser
from diffusion_core.training.loop import Recipe, train
from diffusion_core.training.loss import SigmaDensity
from diffusion_core.training.patches import Batch, PatchSource, Volumes

PRIOR_STD, CORRELATION = 0.7, 0.9
SIGMA = 0.5


def network(num_guides=0, *, zero=True, widths=(8, 8, 8), depths=(1, 1, 1)) -> Preconditioned:
    """A small network none of whose weights are zero, but for the guides' if they are new."""
    with seeded_initialisation(0):
        model = Preconditioned(LocalUNet(2, widths, depths, 16, num_guides))
        for name, parameter in model.named_parameters():
            if "guide" not in name or not zero:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(requires_grad=False)


def noisy(number, shape=(2, 1, 37, 50)):
    return training_noise(0, number, torch.empty(shape)), torch.tensor([0.1, 0.5])


def test_a_network_that_learned_no_guide_is_the_same_bytes_with_one_given():
    plain, new = network(), network(num_guides=2)
    new.begin_from(plain, [0, 1])
    (x, sigma), guide = noisy(0), noisy(1, (2, 2, 37, 50))[0]
    expected = ConditionedDenoiser(plain, 1, 1)(x, sigma)
    carrying = CarryingDenoiser(new, 1, 1)
    nothing = torch.full_like(guide, torch.nan)
    assert torch.equal(ConditionedDenoiser(new, 1, 1)(x, sigma), expected)
    assert torch.equal(guided(carrying, guide)(x, sigma), expected)
    assert torch.equal(guided(carrying, nothing)(x, sigma), expected)
    assert {k for k in new.state_dict() if k not in plain.state_dict()} == {
        "network.guide_stem.weight"
    }


def test_what_is_not_given_counts_for_nothing_and_what_is_given_counts():
    """Of two guides the second is not given, nor the first in the left half."""
    model = network(num_guides=2, zero=False)
    carrying = CarryingDenoiser(model, 0, 1)
    (x, sigma), guide = noisy(2), noisy(3, (2, 2, 37, 50))[0]
    plain = ConditionedDenoiser(model, 0, 1)(x, sigma)
    nothing = torch.full_like(guide, torch.nan)
    assert torch.equal(guided(carrying, nothing)(x, sigma), plain)
    partly = guide.clone()
    partly[:, 1], partly[:, 0, :, :25] = torch.nan, torch.inf
    shown = guided(carrying, partly)(x, sigma)
    assert shown.isfinite().all()
    assert not torch.allclose(shown, plain, atol=1e-2)
    # A guide of 0 is a grey, and not the same as none.
    assert not torch.allclose(guided(carrying, torch.zeros_like(guide))(x, sigma), plain, atol=1e-2)


def test_a_guide_is_cut_with_the_image_into_tiles():
    model = network(num_guides=1, zero=False)
    reach = -(-model.network.reach // 8) * 8
    x, sigma = training_noise(0, 4, torch.empty(1, 1, 80, 2 * reach + 88)), torch.tensor([0.3])
    guide = training_noise(0, 5, torch.empty_like(x))
    carrying = CarryingDenoiser(model, 0, 1)
    whole = guided(carrying, guide)(x, sigma)
    tiled = guided(tiled_denoiser(carrying, 40, reach, 8, 2), guide)(x, sigma)
    assert torch.allclose(whole, tiled, atol=1e-5)
    moved = guided(tiled_denoiser(carrying, 40, reach, 8, 2), guide.roll(8, -1))(x, sigma)
    assert not torch.allclose(whole, moved, atol=1e-2)


def source(drop_share, guide=None, num_guides=1):
    """Patches of one image whose guide is the image itself, or another."""
    rng = np.random.default_rng(0)
    image = np.cumsum(rng.normal(size=(1, 3, 48, 48)), axis=3).astype(np.float32) / 8
    guide = image if guide is None else np.broadcast_to(np.float32(guide), image.shape)
    joined = np.concatenate([image, *[guide] * num_guides])

    def augment(_, patch, generator):
        return patch * np.float32(generator.uniform(0.5, 2.0))

    items = {"grey": [Volumes([joined])]}
    return PatchSource(items, {"grey": 1.0}, 16, 7, augment, num_guides, drop_share)


def test_image_and_guide_are_cut_turned_and_flipped_alike():
    batch = source(0.0).batch(0, 40)
    image, shown = batch.x0[:, :1].flatten(2), batch.guide.flatten(2) + 1
    # Both are the same crop but for a gain each, and the guide's offset of 1.
    centred = [part - part.mean(dim=2, keepdim=True) for part in (image, shown)]
    norms = centred[0].norm(dim=2) * centred[1].norm(dim=2)
    alike = (centred[0] * centred[1]).sum(dim=2) / norms
    assert alike.min() > 0.99999
    assert batch.x0[:, 1:].abs().max() == 0
    assert batch.channels[:, 0].all()


def test_guides_are_dropped_in_their_share_each_by_itself():
    batch = source(0.4, num_guides=2).batch(0, 2000)
    dropped = batch.guide.isnan().all(dim=(2, 3))
    assert torch.equal(dropped, batch.guide.isnan().any(dim=(2, 3)))
    assert dropped.float().mean(dim=0) == pytest.approx([0.4, 0.4], abs=0.03)
    assert (dropped[:, 0] & dropped[:, 1]).float().mean() == pytest.approx(0.16, abs=0.03)


def test_what_a_dropped_guide_holds_changes_no_weight(tmp_path):
    """Poisoned with infinities and huge numbers: the run is that of the harmless one."""

    def weights(name, guide):
        recipe = Recipe(num_steps=3, batch_size=4, bfloat16=False, checkpoint_every_s=1e9)
        with seeded_initialisation(1):
            model = Preconditioned(LocalUNet(1, (8,), (1,), 8, 1))
        state = train(model, source(1.0, guide), recipe, tmp_path / name)
        return state.module.state_dict()

    one, other, plain = (weights(str(g), g) for g in (1e30, np.inf, 0.0))
    assert all(torch.equal(one[k], plain[k]) and torch.equal(other[k], plain[k]) for k in plain)
    assert one["network.guide_stem.weight"].abs().max() == 0


class Pairs:
    """x0 ~ N(0, s^2) pixel by pixel, g = (x0 / s + noise) of unit variance, correlation rho."""

    conditions = ("grey",)

    def batch(self, first, count):
        parts = [pair(first + i) for i in range(count)]
        x0, guide = (torch.stack(part) for part in zip(*parts, strict=True))
        guide[[(first + i) % 2 == 1 for i in range(count)]] = torch.nan
        return Batch(x0, torch.zeros(count, dtype=torch.long), torch.ones(count, 3), guide)


def pair(number, size=16):
    """(x0, g) of a number; of three channels each."""
    z, w = (training_noise(seed, number, torch.empty(3, size, size)) for seed in (11, 12))
    return PRIOR_STD * z, CORRELATION * z + np.sqrt(1 - CORRELATION**2) * w


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small network that saw the guide in every second sample."""
    with seeded_initialisation(0):
        model = Preconditioned(LocalUNet(1, (24,), (1,), 16, 3))
    recipe = Recipe(
        num_steps=1000, batch_size=16, warmup_steps=10, bfloat16=False, checkpoint_every_s=1e9,
        ema_decay=0.98, learning_rate=5e-3, density=SigmaDensity(-0.7, 0.7, 0.0),
    )  # fmt: skip
    state = train(model, Pairs(), recipe, tmp_path_factory.mktemp("pairs"))
    return state.ema.module.eval().requires_grad_(requires_grad=False)


def test_the_trained_network_nears_the_posterior_mean_with_the_guide_and_without(trained):
    """E[x0 | g] = s rho g with variance v = s^2 (1 - rho^2); then the usual mean with x."""
    drawn = [pair(10_000 + i, 32) for i in range(4)]
    x0, guide = (torch.stack(part) for part in zip(*drawn, strict=True))
    x = x0 + SIGMA * training_noise(2, 0, x0)
    sigma = torch.full((4,), SIGMA)
    v, s2, n2 = PRIOR_STD**2 * (1 - CORRELATION**2), PRIOR_STD**2, SIGMA**2
    with_guide = (x * v + PRIOR_STD * CORRELATION * guide * n2) / (v + n2)
    without = x * s2 / (s2 + n2)

    def apart(a, b):
        return ((a - b).square().mean() / b.square().mean()).item()

    carrying = CarryingDenoiser(trained, 0, 3)
    shown = guided(carrying, guide)(x, sigma)
    withheld = ConditionedDenoiser(trained, 0, 3)(x, sigma)
    assert apart(shown, with_guide) < 0.02
    assert apart(withheld, without) < 0.02
    # The two means are far apart: the test could not pass by either for both.
    assert apart(without, with_guide) > 0.2


def test_the_covariance_measured_with_guides_is_that_of_the_posterior(trained):
    """White residuals of variance 1 / (1 / v + 1 / sigma^2)."""
    drawn = [pair(20_000 + i, 32) for i in range(4)]
    carrying = CarryingDenoiser(trained, 0, 3)
    denoisers = [guided(carrying, guide[None]) for _, guide in drawn]
    images = [x0[None] for x0, _ in drawn]
    table = fit_covariance(denoisers, images, sigmas=(SIGMA, 2 * SIGMA))
    v = PRIOR_STD**2 * (1 - CORRELATION**2)
    expected = 1 / (1 / v + 1 / SIGMA**2)
    found = table.at(SIGMA).spectrum(32, 32).mean().item()
    assert found == pytest.approx(expected, rel=0.1)
    plain = fit_covariance(ConditionedDenoiser(trained, 0, 3), images, sigmas=(SIGMA, 2 * SIGMA))
    assert plain.at(SIGMA).spectrum(32, 32).mean().item() > 1.5 * found
    with pytest.raises(ValueError, match="zip"):
        fit_covariance(denoisers[:3], images, sigmas=(SIGMA,))
