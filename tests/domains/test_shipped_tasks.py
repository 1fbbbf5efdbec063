"""Every shipped task names things that exist, and measures what its methods can restore."""

import pytest
import torch

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.posterior.covariance import CovarianceTable
from diffusion_core.posterior.covprox import CovProx
from domains.ct.matrices import set_cache_dir
from domains.registry import load_domain
from flows.config import config_path, load_method, load_task, task_names
from tests.benchmarks.linear_convergence import picture

OPERATORS = {
    "ct": {"parallel-beam", "mask", "pool-rows"},
    "mri": {"fourier", "multi-coil", "identity", "pool", "mask", "pool-rows"},
    "city": {
        "identity",
        "mask",
        "blur",
        "varying-blur",
        "pool",
        "downsample",
        "mosaic",
        "jpeg-blocks",
    },
}


@pytest.mark.parametrize("name", task_names())
def test_a_task_names_an_operator_and_baselines_of_its_domain(name):
    task = load_task(name)
    assert task.operator in OPERATORS[task.domain]
    missing = set(task.baselines) - set(load_domain(task.domain).baselines())
    assert not missing
    assert load_method(name).num_levels >= 1


@pytest.mark.parametrize("name", ["ct", "mri", "city"])
def test_a_domain_declares_conditions_and_where_their_patches_come_from(name):
    domain = load_domain(name)
    assert domain.name == name
    assert set(domain.drawn_from) | set(domain.drawn_from.values()) <= set(domain.conditions)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    set_cache_dir(tmp_path_factory.mktemp("projectors"))
    yield
    set_cache_dir(None)


RESTORED = ("ct-lowdose", "kspace-x4-8coil", "deblur-motion", "deblur-lens", "sr-x4-bicubic")


@pytest.mark.parametrize("name", [*RESTORED, "demosaic"])
def test_solver_and_baselines_restore_what_a_task_measures(name):
    """On a small image, with a denoiser that takes 9/10 of the noise away.

    The error of CovProx, which has that help, is then below every classical method's.
    """
    task = load_task(name)
    domain, item = load_domain(task.domain), picture(task.domain, 64)
    measurement = domain.simulate(item, task, seed=0)
    problem, truth = domain.problem(measurement), domain.truth_signal(item, measurement)
    tables = config_path("models", "starter")
    table = CovarianceTable.load(tables / f"covariance-{problem.condition}.safetensors")
    draws, sigmas = KeyedDraws(0, name), torch.tensor([0.3, 0.1, 0.05])

    def denoise(x, sigma):
        return torch.lerp(truth, x, 0.1)

    solver = CovProx(table, **load_method(name).options)
    result = solver(denoise, problem.operator, problem.y, problem.noise, sigmas, draws)
    error = float((result.x - truth).square().mean())
    assert result.num_denoiser_calls == 3
    for method in task.baselines:
        image = domain.baselines()[method](measurement, problem, {})
        assert image.shape == truth.shape
        assert error < float((image - truth).square().mean()), method
