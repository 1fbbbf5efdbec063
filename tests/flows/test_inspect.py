"""`sashiko inspect` and `sashiko view`: what an input is and its damage; how results open."""

import ast
import json
import shlex
from importlib.resources import files
from pathlib import Path

import dicom_kit
import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image

from domains.base import BadInputError, Item, ItemRecord
from domains.findings import find_damage
from flows import cli, quiet
from flows.api_inspect import chosen_slices
from flows.api_view import commands_for, view
from flows.roots import S3Root
from flows.store import DatasetWriter

CAMERA = files("skimage") / "data" / "camera.png"
ANATOMICAL = Path(str(files("nibabel") / "tests" / "data" / "anatomical.nii"))


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("SASHIKO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(quiet, "hush", lambda: None)


def item(pixels: np.ndarray, **meta: object) -> Item:
    record = ItemRecord(
        item_id="x", domain="city", shape=pixels.shape, dtype=pixels.dtype.name,
        units="intensity", source_digest="0" * 64, source_format="png", meta=meta,
    )  # fmt: skip
    return Item(pixels, record)


def noise(z: int = 1, c: int = 1) -> np.ndarray:
    return np.random.default_rng(2).integers(10, 200, (c, z, 40, 50), dtype=np.uint8)


def kinds(pixels: np.ndarray, **meta: object) -> dict[str, tuple[float, tuple[int, ...]]]:
    return {f.kind: (f.share, f.slices) for f, _ in find_damage(item(pixels, **meta))}


def run(capsys, *words: object) -> tuple[int, str, str]:
    code = cli.run([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def test_what_is_whole_has_nothing_damaged():
    assert kinds(noise(3, 3)) == {}
    camera = np.asarray(Image.open(str(CAMERA)))[None, None]
    assert kinds(camera) == {}
    body = np.zeros(
        (1, 2, 40, 50), np.uint8
    )  # a body in air: flat lines at the border are no fault
    body[:, :, 8:30, 10:40] = noise(2)[:, :, 8:30, 10:40]
    assert kinds(body) == {}


def test_dead_rows_and_columns_are_counted_where_they_are():
    pixels = noise(2, 3)
    pixels[:, 1, 7] = 99
    pixels[:, 1, :, 20:22] = 0
    pixels[:, 1, 7, 20:22] = 99  # the row is dead all along
    ((found, marks),) = find_damage(item(pixels))
    assert (found.kind, found.slices) == ("dead lines", (1,))
    assert found.words.startswith("1 dead rows or columns")  # the columns are broken by the row
    assert marks[1, 7].all()
    assert marks.sum() == 50
    pixels[:, 1, 7] = noise(2, 3)[:, 1, 7]
    pixels[:, 1, :, 20:22] = 0
    ((found, marks),) = find_damage(item(pixels))
    assert found.share == pytest.approx(80 / 4000)
    assert not kinds(noise(1, 3) * np.uint8([[[[1]]], [[[1]]], [[[0]]]]))  # one band empty is none


def test_a_line_dead_in_one_band_only_is_not_dead():
    pixels = noise(1, 3)
    pixels[0, 0, 9] = 50
    assert kinds(pixels) == {}


def test_blank_and_repeated_and_missing_slices_are_told_apart():
    pixels = noise(6)
    pixels[:, 1], pixels[:, 3], pixels[:, 5] = 0, pixels[:, 2], 7
    assert kinds(pixels, missing_slices=[5]) == {
        "missing slices": (pytest.approx(1 / 6), (5,)),
        "blank slices": (pytest.approx(1 / 6), (1,)),
        "repeated slices": (pytest.approx(1 / 6), (3,)),
    }
    assert kinds(np.full((1, 1, 20, 20), 3, np.uint8)) == {}  # one plain picture is no blank slice


def test_pixels_that_pile_up_at_the_top_are_saturated():
    pixels = noise()
    assert kinds(pixels) == {}
    pixels[0, 0, :4, :25] = 255
    assert kinds(pixels) == {"saturated": (pytest.approx(0.05), (0,))}
    clipped = np.minimum(np.random.default_rng(0).normal(0, 1, (1, 1, 64, 64)), 1.5)
    assert kinds(clipped.astype(np.float32))["saturated"][0] == pytest.approx(0.067, abs=0.01)


def test_no_data_is_what_the_file_names_as_such(tmp_path, capsys):
    pixels = noise()[0, 0].astype(np.uint16) * 9
    pixels[:10] = 65535
    path = tmp_path / "scene.tif"
    tifffile.imwrite(path, pixels, extratags=[(42113, "s", 0, "65535", True)])
    code, out, _ = run(capsys, "inspect", path, "--json")
    (told,) = json.loads(out)["inputs"]
    assert code == 0
    assert [(f["kind"], f["share"]) for f in told["findings"]] == [("no data", 0.25)]
    assert told["bits"] == 16


def test_a_folder_is_told_file_by_file_and_a_bad_one_makes_it_3(tmp_path, capsys):
    Image.open(str(CAMERA)).crop((0, 0, 64, 48)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("Dear sir")
    volume = nibabel.load(ANATOMICAL)
    nibabel.save(volume, tmp_path / "c.nii.gz")
    (tmp_path / "notes.txt").write_text("not ours")
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    code, out, _ = run(capsys, "inspect", tmp_path)
    assert code == 3
    paragraphs = out.strip().split("\n\n")
    assert [Path(p.splitlines()[0]).name for p in paragraphs] == ["a.png", "b.png", "c.nii.gz"]
    assert "48 x 64 pixels; domain city" in paragraphs[0]
    assert "uint8 (8 bits in use)" in paragraphs[0]
    assert "unusable  not a readable PNG image (by its first bytes it is plain text)" in out
    assert "25 slices or frames of 41 x 33 pixels" in paragraphs[2]
    assert "also read by mri: --domain says which" in paragraphs[2]
    assert "2 x 2 x 2 mm" in paragraphs[2]
    assert "nothing found" in paragraphs[2]
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_the_domain_that_is_asked_for_reads_it(capsys):
    code, out, _ = run(capsys, "inspect", ANATOMICAL, "--domain", "mri", "--json")
    (told,) = json.loads(out)["inputs"]
    assert (code, told["domain"], told["record"]["units"]) == (0, "mri", "intensity")
    image = nibabel.load(ANATOMICAL)
    assert told["value_range"] == [np.min(image.dataobj), np.max(image.dataobj)]
    # The affine is of the turned volume: the same corner of the world.
    corner = np.array(told["record"]["affine"]) @ [0, 0, 0, 1]
    ends = [image.affine @ [x, y, z, 1] for x in (0, 32) for y in (0, 40) for z in (0, 24)]
    assert min(np.abs(corner - end).max() for end in ends) < 1e-4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{}/none"], "no such file or folder"),
        (["{}/letter.txt"], ") reads what is there; give "),
        (["{}/empty"], "empty: the folder is empty; give one that holds images"),
        (["{}/letter.txt", "--domain", "zoo"], "unknown domain 'zoo'"),
        (["{}/bad.png"], "not a readable PNG"),
        (["{}"], "not a readable PNG"),
        (["{}/good.png", "--preview", "{}/look.jpg"], "a preview is a PNG"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path, capsys, words, said):
    place = tmp_path / "in"
    place.mkdir()
    (place / "empty").mkdir()
    (place / "letter.txt").write_text("Dear sir")
    (place / "bad.png").write_text("Dear sir")
    if "good.png" in words[0]:
        Image.open(str(CAMERA)).save(place / "good.png")
    code, out, err = run(capsys, "inspect", *(word.format(place) for word in words))
    assert (code, out) == (2, "")
    assert said.replace("city, ct, mri", "city, ct, mri") in err
    assert err.strip().splitlines()[-1].startswith("sashiko: ")


def test_a_preview_marks_what_is_damaged_in_red(tmp_path, capsys):
    values = np.asarray(nibabel.load(ANATOMICAL).dataobj).copy()
    values[:, :, 20] = 0
    path = tmp_path / "kanarienvogel.nii.gz"
    nibabel.save(nibabel.Nifti1Image(values, np.diag([-2.0, -2, 2, 1])), path)
    code, out, _ = run(capsys, "inspect", path, "--preview", tmp_path / "deep" / "look.png")
    assert code == 0
    assert "1 slice of one value, in slice 20 (from 0)" in out
    picture = np.asarray(Image.open(tmp_path / "deep" / "look.png").convert("RGB")).astype(int)
    red = (picture[..., 0] > 150) & (picture[..., 1:].max(axis=2) < 60)
    assert 0.03 < red.mean() < 0.3
    assert not red[: len(red) // 2].any()  # above are the slices as they are


def test_slices_of_a_preview_are_the_worst_and_some_between():
    damaged = np.zeros((40, 4, 4), bool)
    damaged[[3, 17]] = True
    chosen = chosen_slices(damaged)
    assert {3, 17} <= set(chosen)
    assert chosen == sorted(chosen)
    assert len(chosen) == 6
    assert chosen_slices(damaged[:2]) == [0, 1]


def test_a_dicom_series_tells_of_the_slice_that_lacks(tmp_path, capsys):
    dicom_kit.series(
        tmp_path / "series", dicom_kit.stored_values(), change=lambda k, ds: k != 2 and None
    )
    code, out, _ = run(capsys, "inspect", tmp_path / "series", "--domain", "ct")
    assert code == 0
    assert "dicom, 5 slices or frames of 20 x 18 pixels; domain ct" in out
    assert "1 slice missing, in slice 2 (from 0)" in out
    assert dicom_kit.CANARY not in out


def test_raw_measurements_tell_their_operator(tmp_path, capsys):
    rng = np.random.default_rng(0)
    kspace = (rng.standard_normal((4, 24, 20)) + 1j).astype(np.complex64)
    np.save(tmp_path / "scan.npy", kspace)
    code, out, err = run(capsys, "inspect", tmp_path / "scan.npy", "--domain", "mri")
    assert code == 0, err
    assert "operator" in out
    assert "data" in out


def test_stores_are_told_item_by_item(tmp_path, capsys):
    pixels = noise(3)
    pixels[:, 1] = 0
    with DatasetWriter(tmp_path / "ds.zarr") as writer:
        writer.add(item(pixels))
    code, out, _ = run(capsys, "inspect", tmp_path / "ds.zarr")
    assert (code, out.splitlines()[0]) == (0, "x")
    assert "1 slice of one value, in slice 1" in out
    tasks = ["--task", "denoise-25", "--to", tmp_path / "meas.zarr"]
    assert run(capsys, "simulate", tmp_path / "ds.zarr", *tasks)[0] == 0
    code, out, _ = run(capsys, "inspect", tmp_path / "meas.zarr")
    assert (code, out.splitlines()[0]) == (0, "x/denoise-25")
    assert "kind gaussian" in out


@pytest.fixture
def output(tmp_path, capsys) -> Path:
    """A photograph and a scan, restored."""
    photos, out = tmp_path / "photo's", tmp_path / "out put"
    photos.mkdir()
    Image.open(str(CAMERA)).crop((0, 0, 64, 48)).save(photos / "a b.png")
    how = ["--sigma-y", "0.1", "--method", "nlm", "--executor", "inline", "--no-prefect"]
    words = ["--domain", "city", "--input", photos, "--output", out, *how]
    assert run(capsys, "restore", *words)[0] == 0
    return out


def test_each_result_is_told_with_commands_that_name_what_is_there(output, capsys):
    code, out, _ = run(capsys, "view", output, "--json")
    assert code == 0
    told = json.loads(out)
    assert [Path(one["path"]).suffix for one in told] == [".zarr", ".png"]
    for one in told:
        for command in one["commands"].values():
            assert Path(shlex.split(command)[-1]).exists()
    assert told[0]["commands"]["napari"].startswith("napari --plugin napari-ome-zarr ")
    code, out, _ = run(capsys, "view", output)
    assert out.count("napari ") >= 2
    assert "given --sigma-y 0.1, by nlm" in out


def test_results_of_one_image_are_told_apart_by_what_was_given(output, capsys):
    Image.new("L", (64, 48)).save(output.parent / "Mr_Smith.png")
    how = ["--executor", "inline", "--no-prefect", "--mask", output.parent / "Mr_Smith.png"]
    words = ["--domain", "city", "--input", output.parent / "photo's", "--output", output, *how]
    assert run(capsys, "restore", *words, "--method", "telea")[0] == 0
    told = json.loads(run(capsys, "view", output, "--json")[1])
    given = {Path(one["path"]).suffix: [] for one in told}
    for one in told:
        given[Path(one["path"]).suffix].append(one["given"])
    assert given[".png"] == given[".zarr"]
    assert sorted(map(json.dumps, given[".png"])) == [
        '{"mask": "Mr_Smith.png"}',
        '{"sigma_y": 0.1}',
    ]
    for manifest in (output / "manifests").iterdir():
        assert "Smith" not in manifest.read_text(), "names of files may tell of people"


@pytest.mark.parametrize(
    ("name", "meta", "viewers"),
    [
        ("scan.nii.gz", {}, ["3D Slicer", "ITK-SNAP"]),
        ("scene.tif", {"geotiff": {"crs": "EPSG:4326"}}, ["QGIS", "napari"]),
        ("photo.tif", {}, ["napari"]),
        ("clip.mp4", {}, ["FFmpeg"]),
    ],
)
def test_files_open_in_the_tools_of_their_field(tmp_path, name, meta, viewers):
    path = tmp_path / "it's here" / name
    path.parent.mkdir()
    path.write_bytes(b"x" * 200)
    commands = commands_for(path, meta)
    assert list(commands) == viewers
    for command in commands.values():
        assert str(path) in shlex.split(command)[-1].replace('"', "").replace("\\", "")


def test_a_dicom_series_opens_by_its_first_file(tmp_path):
    dicom_kit.series(tmp_path / "series", dicom_kit.stored_values())
    first = min((tmp_path / "series").iterdir())
    commands = commands_for(tmp_path / "series", {})
    assert shlex.split(commands["ITK-SNAP"]) == ["itksnap", "-g", str(first)]
    assert repr(str(first)) in shlex.split(commands["3D Slicer"])[-1]


def test_magnitude_and_phase_open_together(tmp_path):
    folder = tmp_path / "it's a scan"
    folder.mkdir()
    for name in ("phase.nii.gz", "magnitude.nii.gz"):
        (folder / name).write_bytes(b"x" * 200)
    first, second = str(folder / "magnitude.nii.gz"), str(folder / "phase.nii.gz")
    commands = commands_for(folder, {})
    assert shlex.split(commands["ITK-SNAP"]) == ["itksnap", "-g", first, "-o", second]
    told = shlex.split(commands["3D Slicer"])[-1]
    calls = [ast.unparse(node) for node in ast.walk(ast.parse(told)) if isinstance(node, ast.Call)]
    assert calls == [
        f"slicer.util.loadVolume({ast.unparse(ast.Constant(v))})" for v in (first, second)
    ]


def test_what_cannot_be_viewed_is_said_with_the_next_step(tmp_path, capsys):
    with DatasetWriter(tmp_path / "ds.zarr") as writer:
        writer.add(item(noise()))
    with pytest.raises(BadInputError, match=r"not of results; `sashiko inspect .* --preview"):
        view(tmp_path / "ds.zarr")
    with pytest.raises(BadInputError, match="aws s3 sync"):
        view(S3Root("bucket", "prefix"))
    code, _, err = run(capsys, "view", tmp_path / "none")
    assert code == 2
    assert "no output of ours" in err


def test_a_geotiff_tells_of_its_ground_and_of_pixels_without_data(tmp_path, capsys):
    import rasterio

    pixels = noise()[0].astype(np.float32)
    pixels[0, :, :10] = np.nan
    how = {
        "crs": "EPSG:32631",
        "transform": rasterio.Affine(2, 0, 5e5, 0, -2, 5.7e6),
        "nodata": np.nan,
    }
    _, h, w = pixels.shape
    path = tmp_path / "scene.tif"
    with rasterio.open(
        path, "w", driver="GTiff", height=h, width=w, count=1, dtype="float32", **how
    ) as file:
        file.write(pixels)
    code, out, err = run(capsys, "inspect", path)
    assert code == 0, err
    assert "20% of the pixels hold no data" in out
    assert "WGS 84 / UTM zone 31N" in out or "32631" in out
    assert "transform" in out
