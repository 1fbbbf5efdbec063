"""Every shipped task names things that exist."""

import pytest

from domains.registry import load_domain
from flows.config import load_method, load_task, task_names

OPERATORS = {
    "ct": {"parallel-beam"},
    "mri": {"fourier", "multi-coil"},
    "city": {"identity", "mask", "blur", "varying-blur", "pool", "downsample", "mosaic"},
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
