"""Measurements of training patches: what is drawn, how noisy data are, in whose units."""

import numpy as np
import pytest
import torch

from diffusion_core.operators import Blur, Fourier, Mask, Pool
from domains.base import BadInputError, Item, ItemRecord, Task
from domains.registry import load_domain

CITY, CT, MRI = (load_domain(name) for name in ("city", "ct", "mri"))
SIZE = 48
PARAMS = {
    "mask": {"missing_share": [0.5, 0.8], "sigma_y": 0.05},
    "fourier": {"acceleration": [3, 6], "centre_share": 0.08, "sigma_y": [0.01, 0.05]},
    "pool": {"factor": [2, 4], "sigma_y": 0.03},
    "blur": {"std_px": [1.0, 3.0], "sigma_y": 0.03},
    "parallel-beam": {"num_views": [6, 9], "pixel_mm": [0.6, 1.2], "counts_per_ray": [1e4, 1e5]},
}
KINDS = {"mask": Mask, "fourier": Fourier, "pool": Pool, "blur": Blur}


def patch(channels=1, size=SIZE):
    rows, columns = np.mgrid[:size, :size] / 9.0
    waves = [np.sin(rows + c) * np.cos(columns) * 0.6 - 0.3 for c in range(channels)]
    return torch.tensor(np.stack(waves)[None], dtype=torch.float32)


def measured(kind, seed=0, domain=CITY, x0=None, **changes):
    domain = CT if kind == "parallel-beam" else domain
    x0 = patch() if x0 is None else x0
    params = {**PARAMS[kind], **changes}
    return domain.measure_patch(x0, kind, params, np.random.default_rng(seed))


@pytest.mark.parametrize("kind", PARAMS)
def test_data_are_what_the_operator_sees_with_noise_as_strong_as_is_said(kind):
    scores = []
    for seed in range(12):
        operator, y, noise = measured(kind, seed)
        clean = operator.A(patch())
        std = noise.variance(clean).sqrt().expand(clean.shape)
        seen = clean != 0 if kind in {"mask", "fourier"} else torch.ones_like(std, dtype=torch.bool)
        z = (y - clean)[seen]
        z = torch.cat([z.real, z.imag]) if z.is_complex() else z
        std = std[seen].repeat(2) if y.is_complex() else std[seen]
        scores.append(z / std)
        if kind in {"mask", "fourier"}:
            assert (y[~seen] == 0).all(), "what is not measured is 0"
    z = torch.cat(scores)
    assert float(z.mean()) == pytest.approx(0.0, abs=4 / len(z) ** 0.5)
    assert float(z.std()) == pytest.approx(1.0, abs=4 / (2 * len(z)) ** 0.5)


@pytest.mark.parametrize("kind", PARAMS)
def test_the_same_draw_gives_the_same_bits_and_another_one_others(kind):
    (_, first, _), (_, again, _), (_, other, _) = (measured(kind, s) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_the_operator_of_its_name_in_all_channels(kind):
    channels = 2 if kind == "fourier" else 3
    operator, y, _ = measured(kind, x0=patch(channels))
    assert isinstance(operator, KINDS[kind])
    assert y.shape == operator.A(patch(channels)).shape


def test_parameters_lie_where_they_are_drawn_from():
    masks = [measured("mask", seed)[0].mask for seed in range(40)]
    shares = [1 - float(mask.float().mean()) for mask in masks]
    assert 0.45 < min(shares) < 0.56 < 0.7 < max(shares) < 0.85
    factors = {measured("pool", seed)[0].factor for seed in range(20)}
    assert factors == {2, 4}
    lines = [measured("fourier", seed)[0].mask[0, 0, 0] for seed in range(20)]
    counts = [int(mask.sum()) for mask in lines]
    assert min(counts) >= SIZE // 6
    assert max(counts) <= SIZE // 3
    assert len(set(counts)) > 3
    for mask in lines:  # the centre block, zero frequency first
        assert mask[[0, 1, -1]].all()
    assert any(mask[5:-5].any() for mask in lines)


def test_a_scan_of_a_patch_is_in_the_units_of_a_scan_of_an_image():
    """The same geometry through the domain's own problem: one operator, one likelihood."""
    x0 = patch()
    record = ItemRecord(
        item_id="patch", domain="ct", shape=(1, 1, SIZE, SIZE), dtype="float32", units="HU",
        source_digest="0" * 64, source_format="nifti", spacing_mm=(1.0, 0.8, 0.8),
    )  # fmt: skip
    hu = (x0[0][:, None].numpy() + 1) * 1500 - 1000
    task = Task(
        name="ct-sparse60", domain="ct", operator="parallel-beam",
        operator_params={"num_views": 9, "arc_degrees": 180.0},
        noise={"kind": "poisson", "counts_per_ray": 3e4},
    )  # fmt: skip
    problem = CT.problem(CT.simulate(Item(hu, record), task, 0))
    operator, _, noise = measured(
        "parallel-beam", num_views=9, pixel_mm=0.8, counts_per_ray=3e4, x0=x0
    )
    clean = operator.A(x0)
    assert torch.allclose(clean, problem.operator.A(x0), rtol=1e-4, atol=1e-4)
    assert torch.allclose(noise.variance(clean), problem.noise.variance(clean), rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("mask", {"missing_share": None}, "'missing_share' must be a number"),
        ("mask", {"sigma_y": [0.2, 0.1]}, "'sigma_y' must be a number"),
        ("mask", {"sigma_y": -1.0}, "'sigma_y' must be a number"),
        ("pool", {"factor": [0]}, "'factor' must be a whole number"),
        ("pool", {"factor": 5}, "do not divide by the factor 5"),
        ("parallel-beam", {"num_views": 6.5}, "'num_views' must be a whole number"),
    ],
)
def test_parameters_that_make_no_operator_are_refused(kind, changes, words):
    with pytest.raises(BadInputError, match=words):
        measured(kind, **changes)


def test_a_kind_that_the_domain_does_not_have_is_refused_with_those_that_there_are():
    with pytest.raises(BadInputError, match=r"no operator 'parallel-beam'.*mask, fourier"):
        MRI.measure_patch(patch(), "parallel-beam", {}, np.random.default_rng(0))
