"""What every solver owes: counted calls, batches apart, foreign operators, names in sentences."""

import pytest
import torch
from dense import GaussianPrior
from solver_kit import DRAWS, OPERATORS, SIZE, Dense, normal

from diffusion_core.noise.likelihood import GaussianNoise, PoissonTransmission
from diffusion_core.noise.schedules import power_sigmas
from diffusion_core.posterior import SOLVERS, STANDARD, make_solver
from diffusion_core.posterior.linear import Accuracy, data_step
from diffusion_core.posterior.run import Counted, initial_estimate
from diffusion_core.protocols import UnsuitedError

SIGMAS = power_sigmas(3, 0.5, 0.05, 3.0)
MATRIX_FREE = ["covprox", "diffpir", "dds", "kriging", "pigdm", "dps", "red-diff", "daps"]
MATRIX_FREE += ["split-gibbs"]
SPECTRAL_ONLY = {"ddrm", "ddnm"}


def suits(solver, operator):
    if solver == "repaint":
        return operator == "mask"
    return solver not in SPECTRAL_ONLY or operator != "dense"


PAIRS = [(s, o) for s in SOLVERS for o in ("dense", "mask", "blur") if suits(s, o)]
NFE = {"kriging": 0, "pigdm": 9, "dps": 9, "daps": 15, "split-gibbs": 30, "repaint": 15}


class Tally:
    """An operator and a denoiser that count from outside; a product with a Jacobian counts 2."""

    def __init__(self, operator, denoise, monkeypatch):
        self.operator_calls = self.denoiser_calls = 0
        self._denoise = denoise
        for name in ("A", "A_adjoint"):
            original = getattr(type(operator), name)

            def counted(operator, v, original=original):
                self.operator_calls += 1
                return original(operator, v)

            monkeypatch.setattr(type(operator), name, counted)

    def denoise(self, x, sigma):
        self.denoiser_calls += 1
        D_x = self._denoise(x, sigma)
        if D_x.requires_grad:
            D_x.register_hook(self._backward)
        return D_x

    def _backward(self, gradient):
        self.denoiser_calls += 2


@pytest.mark.parametrize(("solver", "name"), PAIRS)
def test_calls_are_counted(solver, name, monkeypatch):
    make, channels = OPERATORS[name]
    operator, prior = make(), GaussianPrior(SIZE, channels)
    y = operator.A(normal(2, channels, *SIZE))
    tally = Tally(operator, prior.denoise, monkeypatch)
    made = make_solver(solver, prior.table(SIGMAS), {})
    with torch.no_grad():  # as the engine calls solvers
        result = made(tally.denoise, operator, y, GaussianNoise(0.1), SIGMAS, DRAWS)
    assert result.num_denoiser_calls == tally.denoiser_calls == NFE.get(solver, 3)
    assert result.num_operator_calls == tally.operator_calls > 0
    assert result.x.shape == (2, channels, *SIZE)
    assert not result.x.requires_grad


@pytest.mark.parametrize(("solver", "name"), [*PAIRS, ("daps-langevin", "dense")])
def test_batch_elements_do_not_influence_each_other(solver, name):
    make, channels = OPERATORS[name]
    operator, prior = make(), GaussianPrior(SIZE, channels)
    y = operator.A(prior.mean + 0.5 * normal(2, channels, *SIZE))
    y[1] *= 50.0  # another system altogether: it would take more steps, and larger ones
    options = {"data_draw": "langevin"} if solver.endswith("langevin") else {}
    made = make_solver(solver.removesuffix("-langevin"), prior.table(SIGMAS), options)

    def solve(data):
        return made(prior.denoise, operator, data, GaussianNoise(0.1), SIGMAS, DRAWS).x

    torch.testing.assert_close(solve(y)[:1], solve(y[:1]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", ["covprox", "dds", "pigdm", "dps", "red-diff", "daps"])
def test_batch_elements_stay_apart_under_poisson_noise(solver):
    operator, prior = Dense(), GaussianPrior(SIZE)
    y = operator.A(prior.mean + 0.3 * normal(2, 1, *SIZE)).abs()
    y[1] += 4.0  # few photons: its R is fifty times the other's
    made, noise = make_solver(solver, prior.table(SIGMAS), {}), PoissonTransmission(1e3)

    def solve(data):
        return made(prior.denoise, operator, data, noise, SIGMAS, DRAWS).x

    both = solve(y)
    assert bool(both.isfinite().all())
    torch.testing.assert_close(both[:1], solve(y[:1]), rtol=1e-9, atol=1e-9)


class Physics(torch.nn.Module):
    """An operator as deepinv's LinearPhysics has it: keyword options, a call that adds noise."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator
        self.noise_model = lambda y: y

    def A(self, x, **kwargs):
        return self.operator.A(x)

    def A_adjoint(self, y, **kwargs):
        return self.operator.A_adjoint(y)

    def A_dagger(self, y, **kwargs):
        raise AssertionError("solvers use A and A_adjoint only")

    def forward(self, x, **kwargs):
        return self.noise_model(self.A(x, **kwargs))


@pytest.mark.parametrize("name", ["mask", "blur", "pool", "fourier", "dense"])
@pytest.mark.parametrize("solver", MATRIX_FREE)
def test_an_operator_with_deepinvs_two_methods_gives_what_ours_gives(solver, name):
    make, channels = OPERATORS[name]
    operator, prior = make(), GaussianPrior(SIZE, channels)
    y = operator.A(prior.mean + 0.5 * normal(2, channels, *SIZE))
    options = {} if solver in {"red-diff", "dps", "dds"} else {"tolerance": 1e-9, "max_steps": 999}
    options |= {"start": "adjoint"} if solver != "kriging" else {}
    made = make_solver(solver, prior.table(SIGMAS), options)
    ours, theirs = (
        made(prior.denoise, op, y, GaussianNoise(0.1), SIGMAS, DRAWS).x
        for op in (operator, Physics(operator))
    )
    # Masks of ours see a canvas that does not wrap round; foreign ones cannot.
    wraps = name == "mask" and solver in {"covprox", "kriging"}
    if wraps:
        assert float((theirs - ours).square().mean().sqrt()) < 0.1
    else:
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mask", "blur", "pool", "fourier", "dense"])
@pytest.mark.parametrize("variance", [0.0, 0.05**2])
def test_the_matrix_free_solve_converges_within_the_default_steps(name, variance):
    if name in {"blur", "dense"} and variance == 0.0:
        variance = 0.01**2  # exact data of these are ill-posed
    make, channels = OPERATORS[name]
    operator, prior = make(), GaussianPrior(SIZE, channels)
    residual = operator.A(normal(2, channels, *SIZE))
    covariance = prior.table([0.3]).at(0.3).on(residual.new_zeros(2, channels, *SIZE).real, 4.0)
    R = torch.tensor(variance, dtype=torch.float64)
    step = data_step(Physics(operator))
    exactly = step(covariance, R, residual, Accuracy(1e-12, 4000)).delta
    update = step(covariance, R, residual, Accuracy(1e-2, 40))
    assert update.relative_residual <= 1e-2
    assert float((update.delta - exactly).norm() / exactly.norm()) < 0.03


@pytest.mark.parametrize(
    "bad",
    [[0.1, 0.2], [0.2, 0.2], [0.2, -0.1], [0.0], [], [1.0, float("nan"), 0.1], [float("inf"), 0.1]],
)
def test_levels_that_do_not_decrease_are_refused(bad):
    make, channels = OPERATORS["mask"]
    operator, prior = make(), GaussianPrior(SIZE, channels)
    y = operator.A(normal(1, channels, *SIZE))
    for name in set(SOLVERS) - {"kriging"}:
        solver = make_solver(name, prior.table([0.1]), {})
        with pytest.raises(ValueError, match="level"):
            solver(prior.denoise, operator, y, GaussianNoise(0.1), torch.tensor(bad), DRAWS)


def test_a_last_level_of_zero_costs_nothing():
    make, channels = OPERATORS["mask"]
    operator, prior = make(), GaussianPrior(SIZE, channels)
    y = operator.A(normal(1, channels, *SIZE))
    with_zero = torch.cat([SIGMAS, torch.zeros(1, dtype=torch.float64)])
    for name in SOLVERS:
        solver = make_solver(name, prior.table(SIGMAS), {})
        a, b = (
            solver(prior.denoise, operator, y, GaussianNoise(0.1), levels, DRAWS)
            for levels in (SIGMAS, with_zero)
        )
        assert torch.equal(a.x, b.x), name
        assert a.num_denoiser_calls == b.num_denoiser_calls


@pytest.mark.parametrize("solver", sorted(set(SOLVERS) - {"kriging"}))
def test_a_solver_does_not_return_its_start(solver):
    # From noise and from kriging alike; and other draws give another result.
    make, channels = OPERATORS["mask"]
    operator, prior = make(), GaussianPrior(SIZE, channels)
    y = operator.A(prior.mean + 0.5 * normal(1, channels, *SIZE))
    noise = GaussianNoise(0.1)
    kriging = make_solver("kriging", prior.table(SIGMAS), {})
    start = kriging(prior.denoise, operator, y, noise, SIGMAS, DRAWS).x
    made = make_solver(solver, prior.table(SIGMAS), {})
    x = made(prior.denoise, operator, y, noise, SIGMAS, DRAWS).x
    assert float((x - start).abs().max()) > 1e-3
    other = made(prior.denoise, operator, y, noise, SIGMAS, type(DRAWS)(1, "other")).x
    assert not torch.equal(x, other)


def test_names_and_options():
    table = GaussianPrior(SIZE).table([0.1])
    assert set(STANDARD) < set(SOLVERS)
    for name in SOLVERS:
        make_solver(name, table, {})
        with pytest.raises(ValueError, match=f"solver {name} has no option 'colour'"):
            make_solver(name, table, {"colour": 1})
    for name in set(SOLVERS) - {"covprox", "kriging"}:
        make_solver(name, None, {})
    for bad in ({"data_draw": "guess"}, {"langevin_step": 2.0}, {"langevin_steps": 0}):
        with pytest.raises(ValueError, match=r"langevin|Langevin"):
            make_solver("daps", None, bad)
    with pytest.raises(ValueError, match="goes down at least once"):
        make_solver("repaint", None, {"num_resamples": 0})


class OneWay:
    """A map without an adjoint, and without anything to start from."""

    def A(self, x):
        return x**2


@pytest.mark.parametrize("solver", sorted(set(SOLVERS) - {"repaint"}))
def test_an_operator_that_offers_too_little_is_refused_in_a_sentence(solver):
    made = make_solver(solver, GaussianPrior(SIZE).table(SIGMAS), {})
    y = normal(1, 1, *SIZE).abs()
    with pytest.raises(UnsuitedError, match=r"OneWay (has no adjoint|needs A)"):
        made(GaussianPrior(SIZE).denoise, OneWay(), y, GaussianNoise(0.1), SIGMAS, DRAWS)


@pytest.mark.parametrize("solver", SOLVERS)
def test_data_that_are_not_numbers_are_refused_where_they_were_measured(solver):
    make, channels = OPERATORS["mask"]
    operator, prior = make(), GaussianPrior(SIZE, channels)
    y = operator.A(prior.mean + 0.5 * normal(2, channels, *SIZE))
    made = make_solver(solver, prior.table(SIGMAS), {})

    def solve(data):
        with torch.no_grad():
            return made(prior.denoise, operator, data, GaussianNoise(0.1), SIGMAS, DRAWS).x

    measured = operator.mask.expand_as(y)
    nodata = y.masked_fill(~measured, float("nan"))  # as files mark what is missing
    assert torch.equal(solve(nodata), solve(y))
    for bad in (float("nan"), float("inf")):
        broken = y.clone()
        broken[tuple(measured.nonzero()[0])] = bad
        with pytest.raises(ValueError, match="NaN or infinite values where something was measured"):
            solve(broken)


@pytest.mark.parametrize("solver", sorted(set(SOLVERS) - {"repaint"}))
@pytest.mark.parametrize("name", ["mask", "pool"])
def test_exact_and_noisy_elements_stand_in_one_batch(solver, name):
    make, channels = OPERATORS[name]
    operator, prior = make(), GaussianPrior(SIZE, channels)
    y = operator.A(prior.mean + 0.5 * normal(2, channels, *SIZE))
    options = {"adapt": True} if solver == "covprox" else {}
    made = make_solver(solver, prior.table(SIGMAS), options)

    def solve(data, sigma_y):
        noise = GaussianNoise(torch.tensor(sigma_y, dtype=torch.float64))
        with torch.no_grad():
            return made(prior.denoise, operator, data, noise, SIGMAS, DRAWS).x

    both = solve(y, [0.0, 0.1])
    torch.testing.assert_close(both[:1], solve(y[:1], 0.0), rtol=1e-6, atol=1e-7)
    assert bool(both.isfinite().all())
    # The draws of an element depend on its place: the noisy one comes first for the comparison.
    swapped = solve(y.flip(0), [0.1, 0.0])
    torch.testing.assert_close(swapped[:1], solve(y[1:], 0.1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("solver", ["covprox", "diffpir", "dds", "kriging", "pigdm"])
def test_exact_and_noisy_data_stand_in_one_image(solver):
    make, channels = OPERATORS["identity"]
    operator, prior = make(), GaussianPrior(SIZE, channels)
    truth = prior.mean + 0.5 * normal(1, channels, *SIZE)
    sigma_y = torch.full((1, 1, *SIZE), 0.2, dtype=torch.float64)
    sigma_y[..., :5] = 0.0
    y = truth + sigma_y * normal(1, channels, *SIZE, stream=6)
    made = make_solver(solver, prior.table(SIGMAS), {})
    x = made(prior.denoise, operator, y, GaussianNoise(sigma_y), SIGMAS, DRAWS).x
    assert float((x - truth)[..., :5].abs().max()) < 0.06
    assert 0.05 < float((x - y)[..., 5:].square().mean().sqrt()) < 0.7


def test_a_level_for_every_datum_of_one_value_is_one_level():
    make, channels = OPERATORS["blur"]
    operator, prior = make(), GaussianPrior(SIZE, channels)
    y = operator.A(prior.mean + 0.5 * normal(2, channels, *SIZE))
    for solver in sorted(SPECTRAL_ONLY):
        made = make_solver(solver, None, {"start": "noise"})
        each, one = (
            made(prior.denoise, operator, y, GaussianNoise(s), SIGMAS, DRAWS).x
            for s in (torch.full(y.shape, 0.1, dtype=torch.float64), 0.1)
        )
        assert torch.equal(each, one)


REFUSED = [
    ("diffpir", {"lam": 0.0}),
    ("diffpir", {"zeta": 1.5}),
    ("dds", {"gamma": 0.0}),
    ("dds", {"eta": 1.2}),
    ("dds", {"num_cg_steps": 0}),
    ("pigdm", {"eta": 2.0}),
    ("ddrm", {"eta": 1.5}),
    ("ddrm", {"eta_b": -0.1}),
    ("red-diff", {"beta1": 1.0}),
    ("red-diff", {"learning_rate": 0.0}),
    ("daps", {"spread": "postrior"}),
    ("daps", {"num_ode_steps": 0}),
    ("split-gibbs", {"num_prior_steps": 0}),
    ("covprox", {"inflation": float("nan")}),
    ("covprox", {"inflation": (1.0, float("nan"))}),
    ("covprox", {"zeta": float("nan")}),
]


@pytest.mark.parametrize(("solver", "options"), REFUSED)
def test_options_out_of_range_are_refused_in_a_sentence(solver, options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"{solver}.*{name}|{name} must"):
        make_solver(solver, GaussianPrior(SIZE).table([0.1]), options)


def test_solves_of_no_steps_or_a_negative_tolerance_are_refused():
    for bad in ({"max_steps": 0}, {"tolerance": -0.1}, {"tolerance": float("nan")}):
        with pytest.raises(ValueError, match="a solve takes a step at least"):
            Accuracy(**bad)


def test_the_scaled_adjoint_explains_the_data_best():
    make, channels = OPERATORS["blur"]
    operator, prior = make(), GaussianPrior(SIZE, channels)
    y = operator.A(prior.mean + 0.5 * normal(2, channels, *SIZE))

    class Louder:
        """The same measurement in other units: data, and their adjoint, 30 times as large."""

        def A(self, x):
            return 30.0 * operator.A(x)

        def A_adjoint(self, y):
            return 30.0 * operator.A_adjoint(y)

    def start(op, data, name):
        calls = Counted(prior.denoise, op)
        noise = GaussianNoise(0.1)
        return initial_estimate(name, None, calls, calls.data_step(), data, noise, Accuracy())

    scaled = start(operator, y, "scaled-adjoint")
    torch.testing.assert_close(start(Louder(), 30.0 * y, "scaled-adjoint"), scaled)
    assert torch.equal(start(operator, y, "kriging"), scaled)  # without a table
    assert torch.equal(start(operator, y, "adjoint"), operator.A_adjoint(y))
    for b in range(2):  # <A x, y - A x> = 0: no multiple comes nearer
        Ax = operator.A(scaled)[b]
        assert float((Ax * (y[b] - Ax)).sum()) == pytest.approx(0.0, abs=1e-10)
    with pytest.raises(ValueError, match="starts from kriging"):
        start(operator, y, "krigging")
