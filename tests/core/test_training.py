"""Training: the same curve however it was interrupted or split, and a loss that finds the mean."""

import numpy as np
import pytest
import torch

from diffusion_core.networks.local_unet import LocalUNet
from diffusion_core.networks.precond import ConditionedDenoiser, Preconditioned
from diffusion_core.noise.streams import seeded_initialisation, training_noise
from diffusion_core.training.checkpoint import latest_checkpoint
from diffusion_core.training.loop import Callbacks, Recipe, train
from diffusion_core.training.loss import SigmaDensity, denoising_loss, levels_of
from diffusion_core.training.muon import orthogonalise
from diffusion_core.training.patches import Batch, PatchSource, Volumes


def small_network() -> Preconditioned:
    with seeded_initialisation(3):
        return Preconditioned(LocalUNet(2, (16, 16), (1, 1), num_features=16))


def patches() -> PatchSource:
    rng = np.random.default_rng(0)
    grey = np.cumsum(rng.normal(size=(1, 3, 48, 48)), axis=3).astype(np.float32) / 8
    colour = np.cumsum(rng.normal(size=(3, 1, 48, 48)), axis=2).astype(np.float32) / 8
    shares = {"grey": 1.0, "colour": 1.0}
    items = {"grey": [Volumes([grey])], "colour": [Volumes([colour])]}
    return PatchSource(items, shares, 16, 7, lambda _, p, __: p)


class Killed(Exception):
    pass


def run(folder, *, kill_at=None, num_steps=8, log_every_steps=1, callbacks=None, **changes):
    losses = {}

    def on_log(step, metrics, _averaged):
        losses[step] = metrics["loss"]

    def on_checkpoint(step, _path):
        if step == kill_at:
            raise Killed

    recipe = Recipe(
        num_steps=num_steps, batch_size=4, warmup_steps=2, bfloat16=False, seed=5,
        log_every_steps=log_every_steps, checkpoint_every_s=0.0, **changes,
    )  # fmt: skip
    told = Callbacks(on_log, on_checkpoint, **(callbacks or {}))
    state = train(small_network(), patches(), recipe, folder, told)
    return losses, state


def test_a_killed_run_goes_on_to_the_same_curve_and_weights(tmp_path):
    undisturbed, state = run(tmp_path / "a")
    with pytest.raises(Killed):
        run(tmp_path / "b", kill_at=3)
    resumed, resumed_state = run(tmp_path / "b")

    assert list(resumed) == [4, 5, 6, 7, 8]
    assert all(resumed[step] == undisturbed[step] for step in resumed)
    pairs = zip(state.ema.module.parameters(), resumed_state.ema.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def weights(state):
    return torch.cat([p.detach().flatten() for p in state.module.parameters()])


def test_small_batches_whose_gradients_are_added_take_the_step_of_the_large_one(tmp_path):
    whole, state = run(tmp_path / "a", num_steps=3)
    # 3 of 4 at a time: parts of unequal size weigh by their samples.
    parts, accumulated = run(tmp_path / "b", num_steps=3, micro_batch=3)
    assert parts == pytest.approx(whole, rel=1e-5)
    # Muon's bfloat16 iteration turns a gradient's last bits into 1e-2 of an update.
    start = torch.cat([p.detach().flatten() for p in small_network().parameters()])
    moved = (weights(state) - start).norm()
    assert (weights(accumulated) - weights(state)).norm() < 2e-2 * moved


def test_two_threads_draw_the_batches_of_one(tmp_path):
    one, _ = run(tmp_path / "a", num_steps=4)
    two, _ = run(tmp_path / "b", num_steps=4, prefetch_threads=3)
    assert one == two


def test_readings_over_several_steps_are_the_same_after_a_kill_between_them(tmp_path):
    undisturbed, _ = run(tmp_path / "a", log_every_steps=4)
    with pytest.raises(Killed):
        run(tmp_path / "b", log_every_steps=4, kill_at=6)
    resumed, _ = run(tmp_path / "b", log_every_steps=4)
    assert resumed == pytest.approx({8: undisturbed[8]}, rel=1e-12)


def test_a_killed_run_leaves_the_averages_and_snapshots_of_an_undisturbed_one(tmp_path):
    scored = []
    told = {"on_score": lambda step, _model: scored.append(step)}
    run(tmp_path / "a" / "steps", num_snapshots=3, score_every_steps=3, callbacks=told)
    assert scored == [3, 6]
    with pytest.raises(Killed):
        run(tmp_path / "b" / "steps", num_snapshots=3, kill_at=4)
    run(tmp_path / "b" / "steps", num_snapshots=3)
    files = [sorted((tmp_path / x).rglob("average-*.safetensors")) for x in "ab"]
    assert len(files[0]) == 2 * (3 + 2)  # snapshots and the two newest checkpoints
    for one, other in zip(*files, strict=True):
        assert one.relative_to(tmp_path / "a") == other.relative_to(tmp_path / "b")
        assert one.read_bytes() == other.read_bytes()


def test_a_torn_checkpoint_is_not_taken_for_a_whole_one(tmp_path):
    run(tmp_path, num_steps=2)
    (tmp_path / ".step-000000009.123.partial").mkdir()
    assert latest_checkpoint(tmp_path).name == "step-000000002"


def test_two_workers_average_to_the_gradient_of_one():
    model, source = small_network(), patches()
    recipe = Recipe(num_steps=1, batch_size=4)

    def gradient(first, count):
        batch = source.batch(first, count)
        sigma = levels_of(first, count, recipe.density)
        eps = torch.stack([training_noise(5, first + i, batch.x0[i]) for i in range(count)])
        model.zero_grad()
        denoising_loss(model, batch, sigma, eps)[0].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradient(0, 4)
    halves = (gradient(0, 2) + gradient(2, 2)) / 2
    assert torch.allclose(whole, halves, rtol=1e-4, atol=1e-6)


def test_workers_that_do_not_divide_the_batch_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not divide"):
        train(small_network(), patches(), Recipe(1, batch_size=4), tmp_path, num_workers=3)


def test_the_patch_sequence_does_not_depend_on_how_it_is_drawn():
    source = patches()
    whole = source.batch(10, 6)
    parts = [source.batch(10, 2), source.batch(12, 4)]
    assert torch.equal(whole.x0, torch.cat([p.x0 for p in parts]))
    assert torch.equal(whole.condition, torch.cat([p.condition for p in parts]))


def test_conditions_come_in_their_shares_and_channels_say_what_is_in_use():
    batch = patches().batch(0, 200)
    assert abs(batch.condition.float().mean().item() - 0.5) < 0.02
    assert torch.equal(batch.channels.sum(dim=1), torch.where(batch.condition == 0, 1.0, 3.0))
    unused = batch.x0 * (1 - batch.channels[:, :, None, None])
    assert unused.abs().max() == 0


def test_a_condition_without_images_is_named():
    with pytest.raises(ValueError, match="no training image for colour"):
        PatchSource({"colour": []}, {"colour": 1.0}, 16, 0, lambda _, p, __: p)


def test_noise_levels_follow_the_stated_density():
    density = SigmaDensity(mean=-1.0, std=0.5, uniform_share=0.0, low=1e-3, high=50.0)
    ln_sigma = levels_of(0, 20_000, density).double().log()
    assert abs(ln_sigma.mean().item() + 1.0) < 0.01
    assert abs(ln_sigma.std().item() - 0.5) < 0.01
    uniform = levels_of(0, 20_000, SigmaDensity(uniform_share=1.0, low=0.01, high=4.0)).log()
    width = np.log(400)
    assert abs(uniform.std().item() - width / np.sqrt(12)) < 0.01 * width


def test_muon_steps_are_nearly_orthogonal():
    matrix = training_noise(0, 0, torch.empty(24, 90))
    singular = torch.linalg.svdvals(orthogonalise(matrix))
    assert singular.min() > 0.6
    assert singular.max() < 1.3


def test_training_on_gaussian_white_noise_finds_the_wiener_denoiser(tmp_path):
    """For x0 ~ N(0, s^2) pixel by pixel, E[x0 | x] = x s^2 / (s^2 + sigma^2)."""
    s = 0.7

    class White:
        conditions = ("grey",)

        def batch(self, first, count):
            x0 = torch.stack([training_noise(9, first + i, torch.empty(3, 16, 16)) * s
                              for i in range(count)])  # fmt: skip
            return Batch(x0, torch.zeros(count, dtype=torch.long), torch.ones(count, 3))

    with seeded_initialisation(0):
        model = Preconditioned(LocalUNet(1, (16,), (1,), num_features=16))
    recipe = Recipe(
        num_steps=250, batch_size=8, warmup_steps=10, bfloat16=False, checkpoint_every_s=1e9,
        ema_decay=0.98, learning_rate=5e-3, density=SigmaDensity(-0.7, 0.7, 0.0),
    )  # fmt: skip
    state = train(model, White(), recipe, tmp_path)

    denoise = ConditionedDenoiser(state.ema.module, 0, 3)
    x0 = s * training_noise(1, 0, torch.empty(4, 3, 32, 32))
    sigma = 0.5
    x = x0 + sigma * training_noise(2, 0, x0)
    with torch.no_grad():
        D_x = denoise(x, torch.full((4,), sigma))
    optimal = x * s**2 / (s**2 + sigma**2)
    error = (D_x - optimal).square().mean() / optimal.square().mean()
    assert error < 0.01
