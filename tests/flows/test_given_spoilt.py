"""Pictures that JPEG, haze or little light spoilt, restored from the user's files alone."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image
from skimage import data

from domains.base import BadInputError
from flows.answers import restored_text
from flows.api_nightly import nightly
from flows.api_restore import plan, restore
from flows.config import ComputeSettings, MethodSettings, NightlySettings, RestoreSettings
from flows.engine.restored import open_restored

SCENE = data.astronaut()[40:168, 160:304]
"""128 x 144 pixels of a clean photograph."""


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SASHIKO_HOME", str(tmp_path / "home"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def settings(photos: Path, damage: str | None, **changes) -> RestoreSettings:
    return RestoreSettings(
        input=photos,
        output=photos.parent / "out",
        domain="city",
        damage=damage,
        model="starter",
        dtype="float32",
        compute=ComputeSettings(executor="inline"),
        **changes,
    )


def psnr(image: np.ndarray, truth: np.ndarray = SCENE) -> float:
    error = ((image.astype(float) - truth) ** 2).mean()
    return float(10 * np.log10(255**2 / error))


def restored(result) -> np.ndarray:
    (file,) = result.files
    assert file.suffix == ".png"
    return np.asarray(Image.open(file))


@pytest.mark.parametrize("quality", [10, 30])
def test_a_jpeg_is_nearer_to_what_it_was_made_of_and_still_explains_the_file(photos, quality):
    path = photos / "a.jpg"
    Image.fromarray(SCENE).save(path, quality=quality)
    result = restore(settings(photos, "jpeg"))
    image = restored(result)
    assert psnr(image) > psnr(np.asarray(Image.open(path))) + 0.4
    again = photos / "again.jpg"
    Image.fromarray(image).save(again, quality=quality)
    recoded = np.asarray(Image.open(again)).astype(float)
    assert np.abs(recoded - np.asarray(Image.open(path))).mean() < 3
    (entry,) = open_restored(photos.parent / "out").items()
    assert entry.nfe == 2
    assert entry.residual < 1


def test_a_turned_jpeg_is_restored_upright(photos):
    exif = Image.Exif()
    exif[274] = 6
    stored = np.rot90(SCENE).copy()
    Image.fromarray(stored).save(photos / "a.jpg", quality=10, exif=exif)
    image = restored(restore(settings(photos, "jpeg")))
    assert image.shape == SCENE.shape
    assert psnr(image) > 25


def test_a_dark_photograph_comes_back_bright_and_with_less_noise(photos):
    rng = np.random.default_rng(0)
    dark = rng.poisson(SCENE / 255 * 0.2 * 2000) / 2000 * 65535
    path = photos / "a.tif"
    tifffile.imwrite(path, np.clip(dark, 0, 65535).astype(np.uint16), photometric="rgb")
    (file,) = restore(settings(photos, "low-light", exposure=0.2)).files
    image = tifffile.imread(file) / 257.0
    assert psnr(image) > psnr(np.clip(dark / 0.2 / 257, 0, 255)) + 3


def test_of_a_bright_photograph_it_is_said_that_nothing_is_made_brighter(photos):
    bright, dark = np.clip(SCENE.astype(int) + 100, 0, 255), SCENE // 8
    Image.fromarray(bright.astype(np.uint8)).save(photos / "bright.png")
    Image.fromarray(dark).save(photos / "dark.png")
    fast = MethodSettings(name="clahe", kind="baseline")
    result = restore(settings(photos, "low-light", method=fast))
    assert [path.name for path, _ in result.remarks] == ["bright.png"]
    assert "bright.png: exposure 1: it is as bright as it should be" in restored_text(result)


def test_haze_is_taken_off_where_it_is_thick(photos):
    depth = np.linspace(1, 0, len(SCENE))[:, None, None]
    t = np.exp(-1.6 * depth)
    saturated = np.where(np.arange(144)[None, :, None] // 9 % 3 == np.arange(3), 20, SCENE)
    hazy = saturated * t + 230 * (1 - t)
    Image.fromarray(np.rint(hazy).astype(np.uint8)).save(photos / "a.png")
    image = restored(restore(settings(photos, "haze")))
    assert psnr(image, saturated) > psnr(hazy, saturated) + 3


def test_plans_and_runs_that_go_on_know_the_damage(photos):
    Image.fromarray(SCENE).save(photos / "a.jpg", quality=10)
    method = MethodSettings(name="decoded", kind="baseline")
    assert len(plan(settings(photos, "jpeg")).items) == 1
    first = restore(settings(photos, "jpeg", method=method))
    again = restore(settings(photos, "jpeg", method=method))
    assert (first.num_computed, again.num_computed, again.num_reused) == (1, 0, 1)
    hazy = restore(
        settings(photos, "haze", method=MethodSettings(name="inversion", kind="baseline"))
    )
    assert hazy.num_computed == 1


@pytest.mark.parametrize(
    ("damage", "changes", "words"),
    [
        ("jpeg", {"sigma_y": 0.1}, "--damage jpeg says all that is wrong"),
        ("haze", {"scale": 2}, "--damage haze says all that is wrong"),
        ("low-light", {"mask": "auto"}, "--damage low-light says all that is wrong"),
        (None, {"exposure": 0.5, "sigma_y": 0.1}, "--exposure is of dark images"),
        ("haze", {"exposure": 0.5}, "--exposure is of dark images"),
    ],
)
def test_what_cannot_be_said_together_is_told(photos, damage, changes, words):
    Image.fromarray(SCENE).save(photos / "a.png")
    with pytest.raises(BadInputError, match=words):
        restore(settings(photos, damage, **changes))


def test_a_png_has_no_steps_and_is_quarantined_beside_a_jpeg(photos):
    Image.fromarray(SCENE).save(photos / "a.jpg", quality=10)
    Image.fromarray(SCENE).save(photos / "b.png")
    method = MethodSettings(name="decoded", kind="baseline")
    result = restore(settings(photos, "jpeg", method=method))
    assert len(result.files) == 1
    assert [q.reason for q in result.quarantined] == [
        "it is no JPEG file: which steps it was coded with cannot be read; give the JPEG itself, "
        "or --sigma-y"
    ]


def test_ct_knows_no_haze(photos):
    path = photos / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.ones((32, 32, 2), np.int16), np.eye(4)), path)
    asked = settings(photos, "haze").model_copy(update={"domain": "ct"})
    with pytest.raises(BadInputError, match="know no damage 'haze'"):
        restore(asked)


def test_a_job_of_the_night_names_the_damage(tmp_path):
    inbox = tmp_path / "inbox"
    (inbox / "phones").mkdir(parents=True)
    Image.fromarray(SCENE).save(inbox / "phones/a.jpg", quality=10)
    (inbox / "phones/job.yaml").write_text("domain: city\ndamage: jpeg\n")
    asked = NightlySettings(
        inbox=inbox, output=tmp_path / "out", settle_s=0, model="starter",
        compute=ComputeSettings(executor="inline"),
    )  # fmt: skip
    night = nightly(asked)
    (job,) = night.jobs
    assert job.status == "restored"
    (file,) = (tmp_path / "out").rglob("files/a.png")
    assert psnr(np.asarray(Image.open(file))) > psnr(np.asarray(Image.open(inbox / "phones/a.jpg")))
