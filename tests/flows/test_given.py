"""Damaged images and what is wrong with them: whose fault is whose, and what is left behind."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_kit import kinds, recorder
from evaluation_kit import picture
from PIL import Image
from pydantic import ValidationError

from diffusion_core.model import Model
from domains.base import BadInputError
from flows import api_restore
from flows.api_data import ingest
from flows.api_restore import plan, prepare, restore
from flows.cli import run
from flows.config import (
    ComputeSettings,
    IngestSettings,
    MethodSettings,
    RestoreSettings,
    config_path,
)
from flows.engine.campaign import run_plan
from flows.engine.events import ignore
from flows.engine.executor import InlineExecutor
from flows.engine.memory import machine_bytes
from flows.engine.plan import PlanRefusedError
from flows.engine.restored import open_restored

TEXT = "by its first bytes it is plain text"
FILL = MethodSettings(name="telea", kind="baseline")
SHARPEN = MethodSettings(name="tv", kind="baseline")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SASHIKO_HOME", str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two equal photographs of 40 x 48, a and b, and masks: a box top left, a box bottom right."""
    for place in ("photos", "masks"):
        (tmp_path / place).mkdir()
    pixels = picture(0, (3, 1, 40, 48))[:, 0].transpose(1, 2, 0)
    for name, box in (("a", np.s_[2:9, 3:11]), ("b", np.s_[30:37, 36:44])):
        Image.fromarray(pixels).save(tmp_path / f"photos/{name}.png")
        mask = np.zeros((40, 48), np.uint8)
        mask[box] = 255
        Image.fromarray(mask).save(tmp_path / f"masks/{name}.png")
    return tmp_path


def settings(folder: Path, **changes) -> RestoreSettings:
    values = {
        "input": folder / "photos",
        "output": folder / "out",
        "domain": "city",
        "mask": str(folder / "masks"),
        "method": FILL,
        "compute": ComputeSettings(executor="inline"),
        **changes,
    }
    return RestoreSettings(**values)


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def changed(folder: Path, name: str) -> np.ndarray:
    return (pixels_of(folder / f"photos/{name}") != pixels_of(folder / f"out/files/{name}")).any(2)


# --- noise alone ---------------------------------------------------------------------------------


def test_noise_alone_is_taken_off_by_one_evaluation_at_its_level(folder):
    """Every pixel seen under white noise: the posterior mean is D(y; sigma_y), whatever sigma_y."""
    sigma_y = 0.08
    asked = settings(
        folder, mask=None, sigma_y=sigma_y, model="starter", method=None, dtype="float32"
    )
    restore(asked)
    model = Model.load(config_path("models", "starter"))
    y = torch.from_numpy(pixels_of(folder / "photos/a.png")).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        D_y = model.denoiser("city")(y.float(), torch.full((1,), sigma_y))
    expected = ((D_y[0].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).numpy()
    restored = pixels_of(folder / "out/files/a.png")
    assert np.abs(restored - expected).max() < 1.5
    assert np.abs(restored - pixels_of(folder / "photos/a.png")).max() > 10


# --- one image, two masks ------------------------------------------------------------------------


def test_equal_images_with_different_masks_are_restored_each_where_its_own_mask_is(folder):
    result = restore(settings(folder))
    assert {path.name for path in result.files} == {"a.png", "b.png"}
    assert len({entry.item_id for entry in result.published}) == 2
    for name in ("a.png", "b.png"):
        missing = pixels_of(folder / f"masks/{name}") > 0
        assert not changed(folder, name)[~missing].any(), "what was measured stays"
        assert changed(folder, name)[missing].mean() > 0.9


@pytest.mark.parametrize("first", [True, False])
def test_an_image_whose_mask_is_bad_does_not_take_its_equal_along(folder, first):
    bad, good = ("a.png", "b.png") if first else ("b.png", "a.png")
    (folder / "masks" / bad).write_text("not a picture")
    result = restore(settings(folder))
    assert [path.name for path in result.files] == [good]
    assert changed(folder, good).any()
    assert [(q.source.name, q.reason) for q in result.quarantined] == [
        (bad, f"its mask: not a readable PNG image ({TEXT}); export it again")
    ]
    (folder / "masks" / bad).unlink()
    result = restore(settings(folder))
    assert [q.source.name for q in result.quarantined] == [bad]
    assert result.num_reused == 1


def test_a_mask_that_is_corrected_makes_another_item_beside_the_first(folder):
    first = restore(settings(folder))
    mask = np.zeros((40, 48), np.uint8)
    mask[20:24, 5:9] = 255
    Image.fromarray(mask).save(folder / "masks/a.png")
    second = restore(settings(folder))
    assert (second.num_reused, len(open_restored(folder / "out").items())) == (1, 3)
    (new,) = set(second.files) - set(first.files)
    assert new.name.startswith("a--telea-")
    assert (pixels_of(new) != pixels_of(folder / "photos/a.png")).any(2)[mask == 0].sum() == 0


# --- faults of the request -----------------------------------------------------------------------


def kernel_file(folder: Path, kernel: np.ndarray) -> Path:
    np.save(folder / "k.npy", kernel)
    return folder / "k.npy"


BAD_KERNELS = {
    "2 numbers of the blur kernel are NaN or infinite": np.array([[1, np.nan], [np.inf, 1]]),
    "real numbers, not complex128": np.ones((3, 3), complex),
    "sum is -1": np.full((1, 1), -1.0),
    "sum is 0": np.zeros((3, 3)),
    "not 0 x 3": np.ones((0, 3)),
    "not 2 x 2 x 2": np.ones((2, 2, 2)),
    "1 x 1025 is too large": np.ones((1, 1025)),
}


@pytest.mark.parametrize("fault", BAD_KERNELS)
def test_a_kernel_that_is_none_is_told_once_by_its_own_name(folder, fault):
    events, handler = recorder()
    path = kernel_file(folder, BAD_KERNELS[fault])
    with pytest.raises(BadInputError, match=f"^{path}: .*{fault}") as caught:
        restore(settings(folder, mask=None, kernel=path, method=SHARPEN), handler)
    assert "photos" not in str(caught.value)
    assert events == []
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        ("nowhere", "there is no such mask file or folder"),
        ("empty", "holds no masks"),
        ("photos.txt", "not an image we read"),
        ("white.png", "marks every pixel as missing"),
    ],
)
def test_a_mask_of_all_images_that_is_none_is_told_once_by_its_own_name(folder, mask, sentence):
    (folder / "empty").mkdir()
    (folder / "photos.txt").write_text("no picture")
    Image.new("L", (48, 40), 255).save(folder / "white.png")
    events, handler = recorder()
    with pytest.raises(BadInputError, match=f"^{folder / mask}: .*{sentence}"):
        restore(settings(folder, mask=str(folder / mask)), handler)
    assert events == []
    assert not (folder / "out").exists()


def test_one_mask_serves_all_images_and_equal_ones_once(folder):
    result = restore(settings(folder, mask=str(folder / "masks/a.png")))
    assert (len(result.published), len(result.files)) == (1, 2)


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"scale": s}, "scale") for s in (0, 1, -2, 17, 1_000_000)]
    + [({"sigma_y": s}, "sigma_y") for s in (-0.1, float("nan"), float("inf"))],
)
def test_a_scale_or_noise_that_makes_no_sense_is_no_fault_of_the_images(folder, changes, name):
    with pytest.raises(ValidationError) as caught:
        settings(folder, mask=None, **changes)
    assert [fault["loc"] for fault in caught.value.errors()] == [(name,)]


def test_reasons_tell_neither_codes_nor_names_of_masks(folder):
    Image.new("L", (30, 30)).save(folder / "masks/a.png")
    (reason,) = [q.reason for q in restore(settings(folder)).quarantined]
    assert reason.startswith("its mask has 1 x 30 x 30 pixels, the image 40 x 48")


def test_a_method_mistyped_is_told_before_any_image_is_read_with_all_there_are(folder):
    events, handler = recorder()
    with pytest.raises(BadInputError, match="unknown method 'nonsense': choose one of") as caught:
        restore(settings(folder, method=MethodSettings(name="nonsense")), handler)
    for name in ("covprox", "diffpir", "dds", "kriging", "telea", "tv"):
        assert name in str(caught.value)
    assert events == []
    assert not (folder / "out").exists()


# --- files of unknown kind -----------------------------------------------------------------------


def test_files_of_unknown_kind_are_counted_and_said(folder, tmp_path):
    (folder / "photos/anim.gif").write_bytes(b"GIF89a")
    (folder / "photos/notes.TXT").write_text("of last spring")
    (folder / "photos/.DS_Store").write_text("")
    (folder / "masks").rename(folder / "photos/masks")
    (folder / "photos/masks/readme.md").write_text("white is missing")
    told = "2 files of unknown kind left out (.gif, .txt)"
    for out in ("out", "photos/out"):
        events, handler = recorder()
        asked = settings(folder, mask=str(folder / "photos/masks"), output=folder / out)
        for _ in range(2):  # what was restored into the input's own folder is no input
            result = restore(asked, handler)
            assert (result.num_unknown, len(result.files), result.quarantined) == (2, 2, ())
        assert [e.message for e in events if e.kind == "step"] == [told, told]
    events, handler = recorder()
    (folder / "photos/b.png").unlink()
    ingest(IngestSettings(source=folder / "photos", domain="city", output=tmp_path / "d"), handler)
    assert "of unknown kind left out" in events[0].message


# --- what is left behind -------------------------------------------------------------------------


def work_of(folder: Path) -> list[Path]:
    """Entries of the work area that hold files."""
    entries = sorted((folder / "out/.work").iterdir())
    return [path for path in entries if any(p.is_file() for p in path.rglob("*"))]


def test_a_finished_run_leaves_no_measurements_and_the_next_computes_nothing(folder):
    first = restore(settings(folder))
    assert work_of(folder) == []
    second = restore(settings(folder))
    assert (second.num_computed, second.num_reused, second.files) == (0, 2, first.files)
    assert work_of(folder) == []


def test_a_run_that_was_stopped_goes_on_with_the_measurements_it_made(folder, monkeypatch):
    class Stopping(InlineExecutor):
        def run(self, next_job):
            yield next(iter(super().run(next_job)))
            raise KeyboardInterrupt

    asked = settings(folder)
    monkeypatch.setattr(api_restore, "make_executor", lambda _: Stopping())
    with pytest.raises(KeyboardInterrupt):
        restore(asked)
    monkeypatch.undo()
    assert [p.name.startswith("given-") for p in work_of(folder)].count(True) == 1
    events, handler = recorder()
    monkeypatch.setenv("SASHIKO_HOME", str(folder / "home"))
    result = restore(asked, handler)
    assert (len(result.published), result.num_computed + result.num_reused) == (2, 2)
    assert result.num_reused == 1
    assert "file" not in kinds(events), "no image is read again"
    assert work_of(folder) == []


@pytest.mark.parametrize("one_for_all", [False, True])
def test_a_run_that_was_stopped_does_not_go_on_with_other_masks_or_noise(folder, one_for_all):
    mask = folder / ("masks/a.png" if one_for_all else "masks")
    first = prepare(settings(folder, mask=str(mask)), ignore)
    assert prepare(settings(folder, mask=str(mask)), ignore).plan == first.plan
    noisy = prepare(settings(folder, mask=str(mask), sigma_y=0.1), ignore)
    other = np.zeros((40, 48), np.uint8)
    other[20:24, 5:9] = 255
    Image.fromarray(other).save(folder / "masks/a.png")
    moved = prepare(settings(folder, mask=str(mask)), ignore)
    assert len({job.plan.campaign for job in (first, noisy, moved)}) == 3


def test_measurements_stay_while_an_item_of_theirs_is_not_restored(folder, monkeypatch):
    full = run_plan
    with monkeypatch.context() as patch:

        def half(window, *arguments, **options):
            part = replace(window, items=window.items[:1])
            return full(part, *arguments, **options)

        patch.setattr(api_restore, "run_plan", half)
        assert len(restore(settings(folder)).published) == 1
    assert len(work_of(folder)) == 1
    assert len(restore(settings(folder)).published) == 2
    assert work_of(folder) == []


@pytest.mark.parametrize("before", [False, True])
def test_a_refused_request_leaves_nothing_that_was_not_there(folder, before):
    for name in ("a", "b"):
        (folder / f"masks/{name}.png").write_text("not a picture")
    if before:
        (folder / "out").mkdir()
    with pytest.raises(BadInputError, match=r"a.png: its mask: not a readable .* 1 others"):
        restore(settings(folder))
    assert (folder / "out").exists() == before
    assert not (folder / "out/.work").exists()


def test_a_plan_beyond_the_memory_of_the_machine_is_refused_and_leaves_nothing(folder, monkeypatch):
    monkeypatch.setattr(api_restore, "machine_bytes", lambda: 10**8)
    for call in (restore, plan):
        with pytest.raises(PlanRefusedError, match=r"needs about .* this machine has 0\.1 GB"):
            call(settings(folder))
        assert not (folder / "out").exists()
    roomy = ComputeSettings(executor="inline", memory_limit_bytes=10**12)
    assert restore(settings(folder, compute=roomy)).quarantined == ()
    cluster = ComputeSettings(ray_address="auto")
    assert prepare(settings(folder, compute=cluster), ignore).plan.items


def test_the_memory_of_the_machine_is_the_systems_or_the_containers(tmp_path, monkeypatch):
    import psutil

    total = psutil.virtual_memory().total
    assert 0 < machine_bytes() <= total
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "less").write_text("123456789\n")
    for names, expected in ((("max", "none"), total), (("max", "less"), 123456789)):
        paths = tuple(tmp_path / name for name in names)
        monkeypatch.setattr("flows.engine.memory._CGROUP_LIMITS", paths)
        assert machine_bytes() == expected


def test_the_command_says_so_too(folder, capsys):
    common = ["restore", "--no-prefect", "--executor", "inline", "--domain", "city"]
    common += ["--input", str(folder / "photos"), "--output", str(folder / "out")]
    assert run([*common, "--scale", "1000000"]) == 2
    assert run([*common, "--sigma-y", "-0.1"]) == 2
    said = capsys.readouterr().err
    assert "--scale cannot be 1000000: give 16 or less" in said
    assert "--sigma-y cannot be -0.1: give 0.0 or more" in said
    asked = ["--mask", str(folder / "masks"), "--method", "telea", "--json"]
    (folder / "photos/anim.gif").write_bytes(b"GIF89a")
    assert run([*common, *asked]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["num_unknown"] == 1
    assert "1 file of unknown kind left out (.gif)" in err
