"""Training on images that lack pixels: unbiased, and blind to what was never measured."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion_core.networks.local_unet import FILLED_STD, LocalUNet, filled
from diffusion_core.networks.low_rank import merged
from diffusion_core.networks.precond import Preconditioned
from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.streams import seeded_initialisation, training_noise
from diffusion_core.training.loop import Callbacks, Recipe, train
from diffusion_core.training.loss import denoising_loss
from diffusion_core.training.patches import Batch, PatchSource, Volumes, further_mask

SIZE = 4
SIGMA = 0.6


class LinearDenoiser(torch.nn.Module):
    """D(x) = W x of a masked 4 x 4 image, one matrix for one mask; no uncertainty."""

    sigma_data = 0.5

    def __init__(self, matrix):
        super().__init__()
        self.matrix = torch.nn.Parameter(matrix.clone())

    def forward(self, x, _sigma, _condition, **_shown):
        flat = x[:, 0].reshape(len(x), -1) @ self.matrix.T
        image = flat.reshape(len(x), 1, SIZE, SIZE)
        return torch.cat([image, torch.zeros_like(image), torch.zeros_like(image)], dim=1)

    def uncertainty(self, sigma, _condition):
        return torch.zeros_like(sigma)


def covariance():
    """Of a smooth random 4 x 4 image."""
    y, x = np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing="ij")
    at = np.stack([y.ravel(), x.ravel()], axis=1)
    distance = np.linalg.norm(at[:, None] - at[None], axis=2)
    return torch.from_numpy(0.7 * np.exp(-distance / 2.0)).double()


def gaussian_batch(count, shown_mask):
    """x0 ~ N(0, P); the one mask that the network sees is part of a larger one, drawn by chance."""
    root = torch.linalg.cholesky(covariance())
    normal = training_noise(0, 0, torch.empty(count, SIZE * SIZE)).double()
    x0 = (normal @ root.T).reshape(count, 1, SIZE, SIZE)
    x0 = torch.cat([x0, torch.zeros(count, 2, SIZE, SIZE)], dim=1).double()
    rng = np.random.default_rng(1)
    more = torch.from_numpy(rng.random((count, 1, SIZE, SIZE)) < 0.6)
    shown = shown_mask.reshape(1, 1, SIZE, SIZE).expand(count, 3, -1, -1).double()
    measured = torch.maximum(shown, more.double())
    channels = torch.tensor([[1.0, 0.0, 0.0]]).expand(count, 3).double()
    poison = torch.full_like(x0, 1e3)
    return Batch(
        torch.where(measured > 0, x0, poison), torch.zeros(count, dtype=torch.long), channels,
        measured=measured, shown=shown,
    )  # fmt: skip


def test_the_loss_is_least_at_the_conditional_mean_given_what_is_shown():
    """x0 Gaussian: E[x0 | shown pixels of x] = P M' (M (P + s^2) M')^-1, also where it is hidden.

    The gradient of a large batch's loss there is zero within its Monte Carlo error, though no
    image was whole.
    """
    shown = torch.from_numpy(np.random.default_rng(5).random(SIZE * SIZE) < 0.55)
    P, kept = covariance(), torch.nonzero(shown)[:, 0]
    inner = P[kept][:, kept] + SIGMA**2 * torch.eye(len(kept), dtype=torch.float64)
    best = torch.zeros(SIZE * SIZE, SIZE * SIZE, dtype=torch.float64)
    best[:, kept] = P[:, kept] @ torch.linalg.inv(inner)

    count = 40_000
    batch = gaussian_batch(count, shown.double())
    eps = training_noise(3, 0, torch.empty(count, 3, SIZE, SIZE)).double()
    sigma = torch.full((count,), SIGMA, dtype=torch.float64)

    def gradient(matrix):
        model = LinearDenoiser(matrix)
        denoising_loss(model, batch, sigma, eps)[0].backward()
        return model.matrix.grad

    at_best = gradient(best).abs().max()
    assert at_best < 0.02
    for wrong in (1.1 * best, torch.diag(best.diagonal()), 0 * best):
        assert gradient(wrong).abs().max() > 5 * at_best
    hidden = torch.nonzero(~shown)[:, 0]
    assert gradient(0 * best)[hidden].abs().max() > 5 * at_best, "hidden pixels are learned too"


def holed(number=0, poison=np.nan):
    """A grey image of which three pixels in ten were never measured."""
    rng = np.random.default_rng(number)
    image = np.cumsum(rng.normal(size=(1, 2, 48, 48)), axis=3).astype(np.float32) / 8
    image[rng.random(image.shape) < 0.3] = poison
    return image


def source(images, further=0.1):
    items = {"grey": [Volumes([image]) for image in images]}
    return PatchSource(items, {"grey": 1.0}, 16, 7, lambda _, p, __: p, further=further)


def network(sees_missing=True):
    with seeded_initialisation(3):
        net = LocalUNet(1, (8, 12), (1, 1), num_features=8, sees_missing=sees_missing)
        module = Preconditioned(net)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.add_(0.2 * KeyedDraws(0, name).normal(0, parameter[None])[0])
    return module


def test_what_was_not_measured_is_neither_in_x0_nor_shown():
    batch = source([holed()]).batch(0, 64)
    assert batch.x0.isfinite().all()
    hidden = batch.measured[:, :1] == 0
    assert (batch.x0[:, :1][hidden] == 0).all()
    assert 0.25 < hidden.float().mean() < 0.35
    assert (batch.shown <= batch.measured).all()
    further = 1 - batch.shown[:, 0].sum(dim=(1, 2)) / batch.measured[:, 0].sum(dim=(1, 2))
    assert 0.07 < further.mean() < 0.13
    assert further.min() < 0.04
    assert further.max() > 0.15


def test_hiding_more_is_by_number_and_leaves_the_patches_as_they_are():
    clean = np.nan_to_num(holed())
    plain = PatchSource({"grey": [Volumes([clean])]}, {"grey": 1.0}, 16, 7, lambda _, p, __: p)
    more, whole = source([clean]).batch(3, 4), plain.batch(3, 4)
    assert torch.equal(more.x0, whole.x0)
    assert whole.measured is None
    assert np.array_equal(further_mask(7, 5, 0.2, (8, 8)), further_mask(7, 5, 0.2, (8, 8)))
    assert not np.array_equal(further_mask(7, 5, 0.2, (8, 8)), further_mask(7, 6, 0.2, (8, 8)))
    parts = [source([clean]).batch(n, 1).shown for n in range(3, 7)]
    assert torch.equal(torch.cat(parts), more.shown)


def test_no_gradient_depends_on_a_pixel_that_was_not_measured():
    batch = source([holed()]).batch(0, 6)
    eps = training_noise(1, 0, batch.x0)
    sigma = torch.linspace(0.05, 1.0, 6)

    def gradients(x0):
        module = network()
        changed = replace(batch, x0=x0)
        denoising_loss(module, changed, sigma, eps)[0].backward()
        return torch.cat([p.grad.flatten() for p in module.parameters()])

    poisoned = torch.where(batch.measured > 0, batch.x0, torch.full_like(batch.x0, 50.0))
    assert torch.equal(gradients(batch.x0), gradients(poisoned))
    hidden = (batch.measured > 0) & (batch.shown == 0)
    known = torch.where(hidden, batch.x0 + 1.0, batch.x0)
    assert not torch.equal(gradients(batch.x0), gradients(known)), "these are learned from"


def test_a_pixel_that_is_not_shown_is_not_seen_and_those_around_stand_in_for_it():
    module, x = network(), training_noise(0, 0, torch.empty(1, 3, 16, 16))
    missing = torch.zeros_like(x)
    missing[0, 0, 5, 7] = 1
    at, condition = torch.tensor([0.3]), torch.tensor([0])
    other = x.clone()
    other[0, 0, 5, 7] = 9.0
    with torch.no_grad():
        assert torch.equal(
            module(x, at, condition, missing=missing), module(other, at, condition, missing=missing)
        )
        told, plain = module(x, at, condition, missing=missing), module(x, at, condition)
    assert (told - plain).abs().max() > 1e-3
    around = x[0, 0, 4:7, 6:9].sum() - x[0, 0, 5, 7]
    assert filled(x, missing)[0, 0, 5, 7] == pytest.approx(around.item() / 8, rel=1e-5)
    missing[0, 0, 4:7, 6:9] = 1
    further = x[0, 0, 3:8, 5:10].sum() - x[0, 0, 4:7, 6:9].sum()
    assert filled(x, missing)[0, 0, 5, 7] == pytest.approx(further.item() / 16, rel=1e-5)
    assert filled(x, torch.ones_like(x)).abs().max() == 0


def test_a_missing_pixel_is_as_uncertain_as_what_stands_in_for_it_however_little_noise_there_is():
    """With F = 1 and x = 0 D is c_out: of sigma where a pixel is known, of FILLED_STD else."""
    module, x = network(), torch.zeros(1, 3, 16, 16)
    module.network.forward = lambda *_: torch.ones_like(x)
    missing = torch.zeros_like(x)
    missing[..., 3, 4] = 1
    at, sd = torch.tensor([0.001]), module.sigma_data
    with torch.no_grad():
        D_x = module(x, at, torch.tensor([0]), missing=missing)
    known, lacking = D_x[0, 0, 0, 0].item(), D_x[0, 0, 3, 4].item()
    assert known == pytest.approx(0.001, rel=1e-3)
    assert lacking == pytest.approx(FILLED_STD * sd / np.hypot(FILLED_STD, sd), rel=1e-3)


def test_an_error_counts_in_units_of_what_a_pixel_can_err():
    """The same relative error of measured pixels, shown or not, is the same loss."""
    x0 = torch.zeros(1, 3, 8, 8)
    shown = torch.ones_like(x0)
    shown[..., 2:5, 1:7] = 0
    batch = Batch(
        x0, torch.tensor([0]), torch.ones(1, 3), measured=torch.ones_like(x0), shown=shown
    )
    sigma, sd = torch.tensor([0.01]), LinearDenoiser.sigma_data

    def weighted(error):
        model = LinearDenoiser(torch.eye(1))
        model.forward = lambda *_, **__: error * torch.ones_like(x0)
        return denoising_loss(model, batch, sigma, torch.zeros_like(x0))[1].item()

    def scale(s):
        return s * sd / np.hypot(s, sd)

    hidden = scale(np.hypot(0.01, FILLED_STD))
    assert weighted((1 - shown) * hidden) == pytest.approx(18 / 64, rel=1e-4)
    assert weighted(shown * scale(0.01)) == pytest.approx(46 / 64, rel=1e-4)


def test_plain_weights_are_left_that_give_the_same_where_nothing_is_missing():
    module, x = network(), training_noise(0, 0, torch.empty(2, 3, 16, 16))
    at, condition = torch.tensor([0.1, 0.5]), torch.tensor([0, 0])
    plain = merged(module)
    with torch.no_grad():
        same = module(x, at, condition, missing=torch.zeros_like(x))
        torch.testing.assert_close(plain(x, at, condition), same, rtol=1e-5, atol=1e-5)
    assert set(plain.network.config) == {"num_conditions", "widths", "depths", "num_features"}
    assert plain.network.stem.weight.shape == (8, 24, 3, 3)

    begun = network()
    begun.begin_from(network(sees_missing=False), [0])
    with torch.no_grad():
        before = network(sees_missing=False)(x, at, condition)
        torch.testing.assert_close(begun(x, at, condition), before)


def test_a_killed_run_on_corrupted_images_goes_on_to_the_same_weights(tmp_path):
    class Killed(Exception):
        pass

    def kill(step, _path):
        if step == 3:
            raise Killed

    recipe = Recipe(6, batch_size=4, warmup_steps=1, bfloat16=False, checkpoint_every_s=0.0)
    images = source([holed(0), holed(1)])
    whole = train(network(), images, recipe, tmp_path / "a")
    with pytest.raises(Killed):
        train(network(), images, recipe, tmp_path / "b", Callbacks(on_checkpoint=kill))
    resumed = train(network(), images, recipe, tmp_path / "b")
    pairs = zip(whole.module.parameters(), resumed.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
