"""The phase-retrieval baseline: it solves what it can, and scores forgive what no data can tell."""

import torch

from diffusion_core.noise.draws import KeyedDraws
from diffusion_core.operators import PhaseRetrieval
from tests.benchmarks.phase import best_by_data, hybrid_input_output, onto

DRAWS = KeyedDraws(0, "phase")


def blob(size=16):
    """Dark but for a lopsided patch off the middle: its shifts and its half turn fit alike."""
    x = -torch.ones(1, 1, size, size, dtype=torch.float64)
    patch = DRAWS.normal(0, torch.zeros(1, 1, 6, 5, dtype=torch.float64)).clamp(-0.9, 0.9)
    x[..., 4:10, 5:10] = patch
    return x


def test_turned_and_shifted_images_come_back_onto_the_truth():
    x = blob()
    for moved in (x, x.flip((-2, -1)), x.roll((3, -2), (-2, -1)), x.flip((-2, -1)).roll(2, -2)):
        torch.testing.assert_close(onto(moved, x), x)
    mirrored = x.flip(-1)  # has another modulus: not forgiven
    assert float((onto(mirrored, x) - x).square().mean()) > 1e-3


def test_hybrid_input_output_finds_an_image_from_exact_moduli_and_data_choose_the_run():
    x, operator = blob(), PhaseRetrieval((16, 16))
    y = operator.A(x)
    runs = hybrid_input_output(operator, y.expand(4, -1, -1, -1).contiguous(), DRAWS, 400)
    best = best_by_data(operator, y, runs)
    misfit = (operator.A(runs) - y).square().mean(dim=(1, 2, 3))
    assert float((operator.A(best) - y).square().mean()) == float(misfit.min())
    start = operator.initial(y)
    gap = float((onto(best, x) - x).square().mean())
    assert gap < 0.05 * float((onto(start, x) - x).square().mean())
