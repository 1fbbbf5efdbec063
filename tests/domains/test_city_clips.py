"""Clips: frames in, the same frames out, and a mask that moves over them."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image
from sample_kit import sample_path

from domains.base import BadInputError
from domains.city import reader, writer
from domains.city.degradations import moving_strokes
from domains.files import select
from domains.registry import load_domain
from flows.api_restore import restore
from flows.config import ComputeSettings, MethodSettings, RestoreSettings, load_task

RATE = 30000 / 1001


@pytest.fixture
def clip(tmp_path):
    """Six frames of 36 x 50, lossless, by OpenCV: a square that moves over a ramp."""
    frames = np.zeros((6, 36, 50, 3), np.uint8) + np.arange(50, dtype=np.uint8)[:, None]
    for n, frame in enumerate(frames):
        frame[10:20, 5 * n : 5 * n + 9] = (30, 90, 200)
    (tmp_path / "clips").mkdir()
    path = tmp_path / "clips" / "a.avi"
    file = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"HFYU"), RATE, (50, 36))
    for frame in frames:
        file.write(frame[..., ::-1])
    file.release()
    return frames, path


def frames_of(path):
    """What OpenCV reads, and the rate."""
    file = cv2.VideoCapture(str(path))
    frames = []
    while True:
        found, frame = file.read()
        if not found:
            break
        frames.append(frame[..., ::-1])
    rate = file.get(cv2.CAP_PROP_FPS)
    file.release()
    return np.stack(frames), rate


def test_a_clip_comes_back_frame_by_frame_at_its_rate(tmp_path, clip):
    frames, path = clip
    item = load_domain("city").read(path)
    np.testing.assert_array_equal(item.pixels.transpose(1, 2, 3, 0), frames)
    for written in (
        writer.write(item, tmp_path / "b"),
        writer.write_large(item.record, lambda z, y, x: item.pixels[:, z, y, x], tmp_path / "c"),
    ):
        again, rate = frames_of(written)
        np.testing.assert_array_equal(again, frames)
        assert rate == pytest.approx(RATE, rel=1e-5)
        assert reader.read(written).record.meta == item.record.meta


@pytest.mark.samples
def test_a_real_clip_comes_back_as_it_was_decoded(tmp_path):
    path = sample_path("bikes-1")
    part = select(reader.read(path), slices=range(200, 204))
    frames, rate = frames_of(writer.write(part, tmp_path / "b"))
    whole, expected_rate = frames_of(path)
    np.testing.assert_array_equal(frames, whole[200:204])
    assert rate == expected_rate == 25.0


def test_one_mask_moves_over_the_frames_and_parts_have_the_masks_of_the_whole(clip):
    item = reader.read(clip[1])
    missing = moving_strokes(item, 0.2, seed=3)
    assert missing.shape == (6, 1, 36, 50)
    assert (missing.sum(axis=(1, 2, 3)) == missing[0].sum()).all()
    assert missing[0].mean() >= 0.2
    steps = [(dy, dx) for dy in range(-4, 5) for dx in range(-4, 5) if dy and dx]
    matching = [
        step for step in steps
        if all(
            np.array_equal(np.roll(missing[0, 0], (n * step[0], n * step[1]), (0, 1)), frame[0])
            for n, frame in enumerate(missing)
        )
    ]  # fmt: skip
    assert len(matching) == 1
    part = select(item, slices=[2, 5])
    np.testing.assert_array_equal(moving_strokes(part, 0.2, seed=3), missing[[2, 5]])
    assert not np.array_equal(moving_strokes(item, 0.2, seed=4), missing)
    task = load_task("video-strokes")
    measured = load_domain("city").simulate(item, task, seed=3).arrays["mask"]
    np.testing.assert_array_equal(measured, ~missing)


def test_a_mask_of_other_frames_than_the_clip_has_is_told_by_their_numbers(clip):
    city = load_domain("city")
    item = city.read(clip[1])
    mask = np.zeros((4, 36, 50), bool)
    mask[0] = True
    with pytest.raises(BadInputError, match="4 x 36 x 50 pixels, the image 6 x 36 x 50"):
        city.given(item, mask=mask, kernel=None, scale=None, sigma_y=0.0)


def test_a_damaged_clip_is_restored_to_a_clip(tmp_path, clip, monkeypatch):
    monkeypatch.setenv("SASHIKO_HOME", str(tmp_path / "home"))
    frames, path = clip
    mask = np.zeros((36, 50), np.uint8)
    mask[25:30, 10:40] = 255
    Image.fromarray(mask).save(tmp_path / "logo.png")
    result = restore(
        RestoreSettings(
            input=path.parent, output=tmp_path / "out", domain="city",
            mask=str(tmp_path / "logo.png"), compute=ComputeSettings(executor="inline"),
            method=MethodSettings(name="biharmonic", kind="baseline"),
        )
    )  # fmt: skip
    assert [p.name for p in result.files] == ["a.avi"]
    again, rate = frames_of(result.files[0])
    assert rate == pytest.approx(RATE, rel=1e-5)
    np.testing.assert_array_equal(again[:, mask == 0], frames[:, mask == 0])
    assert np.abs(again[:, mask > 0].astype(int) - frames[:, mask > 0]).max() <= 1


def test_missing_frames_come_back_between_their_neighbours(tmp_path, clip, monkeypatch):
    monkeypatch.setenv("SASHIKO_HOME", str(tmp_path / "home"))
    frames, path = clip
    mask = np.zeros((6, 36, 50), np.uint8)
    mask[[1, 4]] = 255
    tifffile.imwrite(tmp_path / "gone.tif", mask)
    result = restore(
        RestoreSettings(
            input=path.parent, output=tmp_path / "out", domain="city",
            mask=str(tmp_path / "gone.tif"), compute=ComputeSettings(executor="inline"),
            method=MethodSettings(name="linear-z", kind="baseline"),
        )
    )  # fmt: skip
    again, rate = frames_of(result.files[0])
    assert rate == pytest.approx(RATE, rel=1e-5)
    kept = [0, 2, 3, 5]
    np.testing.assert_array_equal(again[kept], frames[kept])
    middle = (frames[0].astype(float) + frames[2]) / 2
    assert abs(again[1] - middle).max() <= 1
    assert abs(again[4] - (frames[3].astype(float) + frames[5]) / 2).max() <= 1


def test_the_task_of_missing_frames_is_scored_against_the_clip_cut_along_y(clip):
    domain, item = load_domain("city"), reader.read(clip[1])
    measured = domain.simulate(item, load_task("video-missing"), 0)
    assert measured.record.shape == (3, 36, 6, 50)
    gone = ~measured.arrays["mask"][0, 0].any(axis=1)
    assert np.flatnonzero(gone).tolist() == [1, 3]
    truth = domain.as_measured(item, measured.record)
    np.testing.assert_array_equal(truth.pixels[:, 7, 2], item.pixels[:, 2, 7])
    problem = domain.problem(measured)
    signal = domain.truth_signal(item, measured)
    assert tuple(signal.shape) == problem.shape
    seen = problem.operator.A(signal)
    np.testing.assert_allclose(seen.numpy(), problem.y.numpy(), atol=1e-6)
    written = domain.write(replace(truth, record=measured.record), clip[1].parent / "back")
    np.testing.assert_array_equal(frames_of(written)[0], clip[0])
