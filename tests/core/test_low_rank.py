"""Low-rank corrections: nothing at first, little afterwards, and plain weights at the end."""

import pytest
import torch

from diffusion_core.networks.local_unet import LocalUNet
from diffusion_core.networks.low_rank import LowRankUpdate, add_low_rank, merged
from diffusion_core.networks.precond import Preconditioned
from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.streams import seeded_initialisation, training_noise
from diffusion_core.training.checkpoint import latest_checkpoint
from diffusion_core.training.loop import Callbacks, Recipe, train
from diffusion_core.training.patches import Batch

RANK = 3


def perturbed(module, amount, only=lambda _name: True):
    """Weights that are off by keyed noise: a new network is the identity, and hides much."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if only(name):
                parameter.add_(amount * KeyedDraws(0, name).normal(0, parameter[None])[0])
    return module


def plain_network():
    with seeded_initialisation(3):
        return perturbed(Preconditioned(LocalUNet(2, (8, 12), (1, 1), num_features=8)), 0.2)


def corrected_network():
    module = plain_network()
    with seeded_initialisation(5):
        add_low_rank(module, RANK)
    return module


def images():
    x = training_noise(1, 0, torch.empty(2, 3, 16, 16))
    return x, torch.tensor([0.1, 0.6]), torch.tensor([0, 1])


class Textures:
    """Smooth random images."""

    conditions = ("grey",)

    def batch(self, first, count):
        drawn = [training_noise(9, first + i, torch.empty(3, 16, 16)) for i in range(count)]
        x0 = torch.stack(drawn).cumsum(dim=3) / 8
        return Batch(x0, torch.zeros(count, dtype=torch.long), torch.ones(count, 3))


def trained(module, folder, num_steps=6, **callbacks):
    recipe = Recipe(
        num_steps, batch_size=4, warmup_steps=1, bfloat16=False, checkpoint_every_s=0.0,
        score_every_steps=2, learning_rate=2e-2, log_every_steps=1,
    )  # fmt: skip
    return train(module, Textures(), recipe, folder, Callbacks(**callbacks))


def test_before_the_first_step_the_network_is_the_untouched_one_bit_by_bit():
    with torch.no_grad():
        assert torch.equal(corrected_network()(*images()), plain_network()(*images()))


def test_merged_weights_are_plain_and_give_the_same_image():
    module = perturbed(corrected_network(), 0.3, lambda name: name.endswith(("up", "down")))
    plain = merged(module)
    with torch.no_grad():
        corrected, same, before = (m(*images()) for m in (module, plain, plain_network()))
    torch.testing.assert_close(same, corrected, rtol=1e-5, atol=1e-5)
    assert (corrected - before).abs().max() > 0.1
    assert set(plain.state_dict()) == set(plain_network().state_dict())
    assert any("up" in name for name in module.state_dict()), "the original is left as it was"


def test_only_the_corrections_and_the_uncertainty_have_gradients():
    module = perturbed(corrected_network(), 0.1, lambda name: name.endswith("up"))
    x, sigma, condition = images()
    loss = module(x, sigma, condition).square().sum() + module.uncertainty(sigma, condition).sum()
    loss.backward()
    learning = {name for name, p in module.named_parameters() if p.grad is not None}
    assert all(p.grad.abs().max() > 0 for p in module.parameters() if p.grad is not None)
    told = {name.rsplit(".", 1)[-1] for name in learning if not name.startswith("log_variance")}
    assert told == {"up", "down"}
    convolutions = [m for m in module.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(learning) == 2 * len(convolutions) + 2


def test_a_correction_has_the_rank_that_was_asked_for():
    weight = training_noise(0, 0, torch.empty(10, 4, 3, 3))
    with seeded_initialisation(0):
        update = perturbed(LowRankUpdate(weight, RANK), 1.0)
        whole = LowRankUpdate(weight, 1000)
    delta = (update(weight) - weight).detach().flatten(1)
    assert torch.linalg.matrix_rank(delta, rtol=1e-4) == RANK
    expected = update.up.double() @ update.down.double() / RANK**0.5
    torch.testing.assert_close(delta.double(), expected, atol=1e-6, rtol=1e-5)
    assert whole.down.shape == (10, 36)


def test_the_same_correction_under_bfloat16_as_merged():
    weight = training_noise(0, 0, torch.empty(10, 4, 3, 3))
    with seeded_initialisation(0):
        update = perturbed(LowRankUpdate(weight, RANK), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = update(weight)
    assert torch.equal(lowered, update(weight))


def test_training_moves_the_corrections_and_no_frozen_weight(tmp_path):
    state = trained(corrected_network(), tmp_path)
    before, after = corrected_network().state_dict(), state.module.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    told = {name.rsplit(".", 1)[-1] for name in moved if not name.startswith("log_variance")}
    assert told == {"up", "down"}
    merged_average = merged(state.ema.module).state_dict()
    assert set(merged_average) == set(plain_network().state_dict())


def test_a_killed_low_rank_run_goes_on_to_the_same_weights(tmp_path):
    class Killed(Exception):
        pass

    def kill(step, _path):
        if step == 3:
            raise Killed

    whole = trained(corrected_network(), tmp_path / "a")
    with pytest.raises(Killed):
        trained(corrected_network(), tmp_path / "b", on_checkpoint=kill)
    resumed = trained(corrected_network(), tmp_path / "b")
    pairs = zip(whole.module.parameters(), resumed.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_score_can_end_the_training_and_its_last_step_is_kept(tmp_path):
    told = []
    state = trained(
        plain_network(), tmp_path, on_score=lambda step, _: step == 4,
        on_checkpoint=lambda step, _: told.append(step),
    )  # fmt: skip
    assert state.step == 4
    assert told == [1, 2, 3, 4]
    assert latest_checkpoint(tmp_path).name == "step-000000004"


def test_all_workers_end_when_the_first_one_s_score_says_so(tmp_path):
    """Only rank 0 scores: what `average` makes of its word must reach the others."""
    flags = []

    def from_rank_0(tensors):
        tensors = list(tensors)
        if len(tensors) == 1:  # gradients come with others
            flags.append(tensors[0].item())
            tensors[0].fill_(0.5)  # the mean of a worker that ends and one that knows nothing

    module = plain_network()
    recipe = Recipe(6, batch_size=4, score_every_steps=2, bfloat16=False, warmup_steps=1)
    told = Callbacks(average=from_rank_0)
    state = train(module, Textures(), recipe, tmp_path, told, rank=1, num_workers=2)
    assert (state.step, flags) == (2, [0.0])
