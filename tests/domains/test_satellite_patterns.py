"""What satellites miss: Landsat-7's wedges, and clouds."""

import numpy as np
import pytest
from scipy import ndimage
from test_city_physics import picture

from diffusion_core.testing import DomainContract
from domains.city import patterns
from domains.city.domain import City
from domains.strokes import find_strokes
from flows.config import load_task

SIZE = (330, 600)
SEEDS = range(6)


def wedges(seed, share=0.22):
    return patterns.slc_off(*SIZE, share, np.random.default_rng(seed))


@pytest.mark.parametrize("share", [0.1, 0.22, 0.3])
def test_wedges_take_about_the_share(share):
    assert np.mean([wedges(s, share).mean() for s in SEEDS]) == pytest.approx(share, rel=0.05)


def test_the_middle_of_the_swath_is_whole_and_the_gaps_widen_outwards():
    """To some 15 lines of 33 at the edge, as in a Landsat-7 scene (Storey et al. 2005)."""
    for seed in SEEDS:
        missing = wedges(seed)
        tilt = SIZE[0] / 2 * np.tan(np.radians(patterns.HEADING_DEGREES[1]))
        half = int(300 * patterns.WHOLE * 0.9 - tilt)
        assert half < 0 or not missing[:, 300 - half : 300 + half].any()
        assert not missing[SIZE[0] // 2, 300 - 30 : 300 + 30].any()
        shares = missing[:, :300].mean(axis=0)
        assert shares[:60].mean() > 1.8 * shares[120:180].mean()
    runs = _runs(wedges(0)[:, 3])
    assert 13 <= max(runs) <= 17


def _runs(column):
    edges = np.flatnonzero(np.diff(np.r_[0, column.astype(int), 0]))
    return edges[1::2] - edges[::2]


def test_gaps_lie_at_either_edge_in_turn():
    """Each edge has a gap every 33 lines, half a period out of step with the other's."""
    missing = patterns.slc_off(330, 600, 0.22, np.random.default_rng(3))
    for column in (0, 599):
        labels, count = ndimage.label(missing[:, column])
        centres = [float(c[0]) for c in ndimage.center_of_mass(labels > 0, labels, range(1, count))]
        assert np.median(np.diff(centres)) == pytest.approx(patterns.PERIOD_PX, rel=0.05)


def test_wedges_are_found_in_a_picture_that_is_black_there():
    item = picture(3, depth=1, size=SIZE)
    missing = wedges(0)
    item.pixels[:, 0] = np.where(missing, 0, np.maximum(item.pixels[:, 0], 60))
    found = find_strokes(item)[0]
    assert found[missing].mean() > 0.85
    assert found[~missing].mean() < 0.05


def test_clouds_cover_exactly_the_share_in_large_pieces():
    for seed in SEEDS:
        missing = patterns.clouds(200, 300, 0.25, np.random.default_rng(seed))
        assert missing.sum() == 15000
        labels, _ = ndimage.label(missing)
        largest = np.bincount(labels.ravel())[1:].max()
        assert largest > 0.25 * missing.sum()
        inside = ndimage.distance_transform_edt(np.pad(missing, 1))
        assert inside.max() > 10


def test_the_power_of_their_fields_falls_as_it_should():
    rng, power = np.random.default_rng(0), np.zeros((128, 192))
    for _ in range(20):
        power += np.abs(np.fft.fft2(patterns.fractal_field((128, 192), rng))) ** 2
    fy, fx = np.fft.fftfreq(128)[:, None], np.fft.fftfreq(192)
    frequency = np.hypot(fy, fx)
    ring = (frequency > 0.03) & (frequency < 0.4)
    slope = np.polyfit(np.log(frequency[ring]), np.log(power[ring]), 1)[0]
    assert slope == pytest.approx(-8 / 3, abs=0.03)
    assert power[0, 0] < 1e-12 * power.max()


class TestSatellitePatterns(DomainContract):
    def make_domain(self):
        return City()

    def make_item(self):
        return picture(4, dtype="uint16")

    def make_tasks(self):
        return [load_task("destripe-slc"), load_task("inpaint-clouds")]
