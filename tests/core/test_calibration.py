"""On a Gaussian prior whose table is wrong by a known factor, calibration must find the factor."""

import math

import pytest
import torch
from dense import GaussianPrior

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.noise.likelihood import GaussianNoise
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.operators import Blur, Fourier, Mask
from diffusion_core.posterior.calibration import (
    NothingOpenError,
    RollOut,
    _least_error,
    fit_inflation,
    match_spread,
)
from diffusion_core.posterior.covariance import CovarianceTable
from diffusion_core.posterior.covprox import Chain, CovProx
from diffusion_core.posterior.linear.mask import MaskStep
from diffusion_core.uncertainty import Spread

SIZE = (24, 20)
SIGMA_Y = 0.1
PRIOR = GaussianPrior(SIZE)
FACTOR = 5.0
"""By which the table understates Sigma."""


@pytest.fixture(autouse=True)
def _periodic_masks(monkeypatch):
    monkeypatch.setattr(MaskStep, "padding", 0)  # the oracle's prior is periodic on the image


def normal(*shape, key="calibration", stream=0):
    return KeyedDraws(0, key).normal(0, torch.empty(shape, dtype=torch.float64), stream)


def understated(sigmas, factor=FACTOR):
    exact = PRIOR.table(sigmas)
    fields = {name: getattr(exact, name) for name in exact.__dataclass_fields__}
    fields["log_spectrum"] = exact.log_spectrum - math.log(factor)
    return CovarianceTable(**fields)


def image(number):
    """A draw of the prior."""
    root = PRIOR.grid_power().sqrt()
    xi = normal(1, 1, *SIZE, key=f"truth-{number}")
    return PRIOR.mean + torch.fft.irfft2(torch.fft.rfft2(xi) * root, s=SIZE)


def roll_out(number, sigmas, operator, num_chains=1, **options):
    truth = image(number)
    y = operator.A(truth) + SIGMA_Y * normal(*operator.A(truth).shape, key=f"noise-{number}")
    given = {"start": "noise", "local": False, "tolerance": 1e-8, "max_steps": 500, **options}
    chains = [
        Chain(
            CovProx(understated(sigmas), **given),
            PRIOR.denoise,
            operator,
            y,
            GaussianNoise(SIGMA_Y),
            sigmas,
            KeyedDraws(seed, f"chain-{number}"),
        )
        for seed in range(num_chains)
    ]
    return RollOut(chains, truth)


def mask():
    return Mask(normal(1, 1, *SIZE, key="mask") > 0.3)


def blur():
    taps = torch.tensor([1.0, 3.0, 1.0], dtype=torch.float64)
    return Blur(torch.outer(taps, taps) / 25.0, SIZE)


@pytest.mark.parametrize("operator", [mask, blur])
def test_mean_mode_finds_the_factor_where_the_state_is_a_fresh_one(operator):
    # x = x0 + sigma eps: there Sigma itself, so c = FACTOR, gives the least expected error.
    sigmas = torch.tensor([0.4], dtype=torch.float64)
    rollouts = [roll_out(k, sigmas, operator()) for k in range(12)]
    for k, rollout in enumerate(rollouts):
        (chain,) = rollout.chains
        chain.x = rollout.truth + 0.4 * normal(1, 1, *SIZE, key=f"fresh-{k}")
    (c,) = fit_inflation(rollouts)
    assert c == pytest.approx(FACTOR, rel=0.15)


@pytest.mark.parametrize(("start", "slope"), [(0.5, 1.0), (30.0, 0.4), (4.0, 2.5)])
def test_the_spread_is_matched_by_the_secant(start, slope):
    tried = []

    def spread_at(c):
        tried.append(c)
        return Spread((c / 7.0) ** slope, 1.0), len(tried)

    c, found = match_spread(spread_at, start)
    assert c == pytest.approx(7.0, rel=0.06)
    assert tried[found - 1] == c
    assert len(tried) <= 5


def test_of_trials_that_do_not_converge_the_best_is_kept():
    tried = []

    def spread_at(c):  # the variance falls as c grows: the secant runs the wrong way
        tried.append(c)
        return Spread(0.5 * c**-0.5, 1.0), c

    c, found = match_spread(spread_at, 1.0)
    assert c == found == tried[0] == 1.0
    assert max(tried) > 1.5


@pytest.mark.parametrize("start", [0.3, 1.0, 4.0, 7.0, 30.0])
@pytest.mark.parametrize("least_at", [0.7, 2.0, 9.0, 11.0])
def test_the_last_step_of_the_search_is_never_left_out(start, least_at):
    class Parabola:
        rollouts = (None,)

        def estimates(self, c):
            return [math.log(c)]

    class Loss:
        def log_error(self, ln_c):
            return (ln_c - math.log(least_at)) ** 2

    Parabola.rollouts = (Loss(),)
    c, estimates = _least_error(Parabola(), start)
    assert c == pytest.approx(least_at)
    assert estimates == [pytest.approx(math.log(least_at))]


def test_the_fitted_inflation_is_where_the_error_is_least():
    sigmas = power_sigmas(3, 0.6, 0.2, 3.0)
    found = fit_inflation([roll_out(k, sigmas, blur(), zeta=0.5) for k in range(4)])

    def loss(inflation):
        rollouts = [roll_out(k, sigmas, blur(), zeta=0.5) for k in range(4)]
        for r in rollouts:
            (chain,) = r.chains
            for level in range(3):
                mu = chain.denoise(level)
                chain.advance(level, chain.condition(level, mu, inflation[level]))
        return sum(r.log_error([r.chains[0].m]) for r in rollouts)

    at_best = loss(found)
    for factor in (0.6, 1.7):
        assert loss([*found[:2], found[2] * factor]) > at_best


@pytest.mark.parametrize("operator", [mask, blur])
def test_sample_mode_is_calibrated_at_the_last_level_and_finds_the_factor(operator):
    # With c = FACTOR every level of the chain from pure noise draws from the posterior.
    sigmas = power_sigmas(4, 20.0, 0.3, 3.0)
    rollouts = [
        roll_out(k, sigmas, operator(), num_chains=8, mode="sample", zeta=1.0) for k in range(6)
    ]
    found = fit_inflation(rollouts)
    pooled = sum((r.spread([c.m for c in r.chains]) for r in rollouts), Spread())
    assert pooled.ratio == pytest.approx(1.0, abs=0.03)
    assert found == pytest.approx([FACTOR] * 4, rel=0.25)


def at_a_fresh_state(number, operator, factor, **options):
    """(chain, mu) at x = x0 + sigma eps, where Sigma is `factor` times the table's."""
    sigmas = torch.tensor([0.4], dtype=torch.float64)
    rollout = roll_out(number, sigmas, operator, **options)
    (chain,) = rollout.chains
    chain.x = rollout.truth + 0.4 * normal(1, 1, *SIZE, key=f"fresh-{number}")
    return chain, chain.denoise(0)


def lines():
    """Every other line of k-space, complex."""
    measured = (torch.arange(SIZE[0]) % 2 == 0)[None, None, :, None]
    return Fourier(measured.expand(1, 1, *SIZE).contiguous(), 1)


@pytest.mark.parametrize("operator", [mask, blur, lines])
def test_the_misfit_of_the_data_tells_the_factor_without_the_truth(operator):
    # Doubt draws the factor towards 1, the more the fewer directions the data determine.
    found = []
    for number in range(30):
        chain, mu = at_a_fresh_state(number, operator(), FACTOR)
        A_mu = chain.calls.A(mu)
        covariance = chain.solver.prior.at(0.4).on(mu, local=False)
        R = torch.full_like(A_mu.real, SIGMA_Y**2)
        found.append(float(chain.misfit(A_mu, R, covariance, mu).mean()))
    assert 0.7 * FACTOR < sum(found) / 30 < 1.05 * FACTOR


def test_an_adapted_chain_multiplies_its_inflation_by_the_misfit():
    plain, mu = at_a_fresh_state(0, blur(), FACTOR)
    adapted, _ = at_a_fresh_state(0, blur(), FACTOR, adapt=True)
    A_mu = plain.calls.A(mu)
    covariance = plain.solver.prior.at(0.4).on(mu, local=False)
    factor = float(plain.misfit(A_mu, torch.full_like(A_mu, SIGMA_Y**2), covariance, mu))
    assert factor > 2
    expected = plain.condition(0, mu, 3.0 * factor)
    torch.testing.assert_close(adapted.condition(0, mu, 3.0), expected, rtol=1e-6, atol=1e-8)
    # ... and keeps the first level's misfit at the levels that follow.
    again = adapted.condition(0, mu + 1.0, 3.0)
    expected = plain.condition(0, mu + 1.0, 3.0 * factor)
    torch.testing.assert_close(again, expected, rtol=1e-6, atol=1e-8)


def test_each_image_of_a_batch_has_its_own_misfit():
    table = PRIOR.table([0.4], num_energies=5)
    operator, draws = blur(), KeyedDraws(0, "batch")
    mu = torch.cat([image(0), image(1)])
    y = operator.A(mu + torch.tensor([0.1, 1.0], dtype=torch.float64)[:, None, None, None])
    solver = CovProx(table, mode="mean", inflation=1.0, adapt=True, start="adjoint")
    sigmas = torch.tensor([0.4], dtype=torch.float64)
    noise = GaussianNoise(SIGMA_Y)
    chain = Chain(solver, PRIOR.denoise, operator, y, noise, sigmas, draws)
    covariance = table.at(0.4).on(mu)
    R = torch.full_like(y, SIGMA_Y**2)
    a, b = chain.misfit(operator.A(mu), R, covariance, mu).flatten().tolist()
    assert b > 5 * a
    m = chain.condition(0, mu)
    alone = Chain(solver, PRIOR.denoise, operator, y[1:], noise, sigmas, draws)
    alone._misfit = torch.full((1, 1, 1, 1), b, dtype=torch.float64)
    torch.testing.assert_close(m[1:], alone.condition(0, mu[1:]), rtol=1e-2, atol=1e-2)
    wrong = Chain(solver, PRIOR.denoise, operator, y[1:], noise, sigmas, draws)
    wrong._misfit = torch.full((1, 1, 1, 1), a, dtype=torch.float64)
    assert float((m[1:] - wrong.condition(0, mu[1:])).abs().max()) > 0.02


def test_the_denoiser_is_called_once_a_level():
    sigmas = power_sigmas(3, 0.6, 0.2, 3.0)
    rollouts = [roll_out(k, sigmas, blur()) for k in range(2)]
    fit_inflation(rollouts)
    assert [r.chains[0].calls.num_denoiser_calls for r in rollouts] == [3, 3]


def test_errors_count_in_the_units_of_the_view_and_where_it_is_unknown():
    sigmas = torch.tensor([0.4], dtype=torch.float64)
    rollout = roll_out(0, sigmas, blur())
    unknown = torch.zeros(1, 1, *SIZE, dtype=torch.bool)
    unknown[..., :3] = True
    seen = RollOut(rollout.chains, 10 * rollout.truth, lambda x: 10 * x, unknown)
    wrong = rollout.truth + 0.2
    wrong[..., 3:] += 7.0
    assert seen.log_error([wrong]) == pytest.approx(math.log(100 * 0.04))
    samples = [rollout.truth + s for s in (0.3, -0.1)]
    assert seen.spread(samples).ratio == pytest.approx(1.5 * 0.08 / 0.01)


def test_nothing_to_fit_on_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        fit_inflation([])


@pytest.mark.parametrize("mode", ["mean", "sample"])
def test_an_image_without_an_open_pixel_is_refused_by_its_number(mode):
    sigmas = torch.tensor([0.4], dtype=torch.float64)
    first, second = (roll_out(k, sigmas, blur(), num_chains=2, mode=mode) for k in range(2))
    closed = RollOut(second.chains, second.truth, unknown=second.truth > 9)
    with pytest.raises(NothingOpenError, match="nothing of image 2 open") as refused:
        fit_inflation([first, closed])
    assert refused.value.number == 1
    assert [r.chains[0].calls.num_denoiser_calls for r in (first, closed)] == [0, 0]


def test_samples_that_are_all_exact_are_refused():
    # V and B are both 0: exact data everywhere.
    sigmas = torch.tensor([0.4], dtype=torch.float64)
    rollout = roll_out(0, sigmas, blur(), num_chains=2, mode="sample")
    for chain in rollout.chains:
        chain.condition = lambda level, mu, c: rollout.truth
    with pytest.raises(NothingOpenError, match="image 1 open"):
        fit_inflation([rollout])


def test_a_spread_that_is_not_a_number_is_refused():
    with pytest.raises(NothingOpenError, match="leave nothing open that could be calibrated"):
        match_spread(lambda c: (Spread(), None), 1.0)
