"""Readers and writers against files made by nibabel, pynrrd, tifffile, Pillow and OpenCV."""

import bz2
import gzip
import itertools
from dataclasses import replace

import cv2
import nibabel
import nrrd
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from domains.base import BadInputError, Item
from domains.city import reader as city_reader
from domains.city import writer as city_writer
from domains.ct import reader as ct_reader
from domains.ct import writer as ct_writer
from domains.files import select, with_site_key
from domains.mri import reader as mri_reader
from domains.mri import writer as mri_writer

RNG = np.random.default_rng(7)
ORIENTATIONS = [
    "".join(codes)
    for axes in itertools.permutations(["LR", "AP", "IS"])
    for codes in itertools.product(*axes)
]


def nifti(path, values, affine=None):
    """Write by nibabel alone."""
    image = nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine)
    nibabel.save(image, path)
    return path


def affine_of(codes, spacing=(1.0, 1.1, 1.2), shape=(18, 20, 22)):
    """An oblique affine whose nearest orientation is `codes`."""
    target = nibabel.orientations.axcodes2ornt(codes)
    turn = nibabel.eulerangles.euler2mat(0.1, -0.05, 0.07)
    matrix = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(target):
        matrix[int(world), axis] = sign * spacing[axis]
    affine = np.eye(4)
    affine[:3, :3] = turn @ matrix
    affine[:3, 3] = (-11.0, 7.5, 30.25)
    return affine


def world_values(item, points):
    """The item's values at world points, through its own affine."""
    inverse = np.linalg.inv(np.array(item.record.affine))
    x, y, z = np.rint((inverse @ np.c_[points, np.ones(len(points))].T)[:3]).astype(int)
    return item.pixels[0, z, y, x]


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_every_orientation_lands_in_lps_and_returns_to_its_own(tmp_path, codes):
    values = RNG.integers(-1000, 2000, (18, 20, 22)).astype(np.int16)
    affine = affine_of(codes)
    path = nifti(tmp_path / "a.nii.gz", values, affine)
    item = ct_reader.read(path)
    assert nibabel.aff2axcodes(np.array(item.record.affine)) == ("L", "P", "S")
    assert item.pixels.dtype == np.int16
    voxels = np.stack([RNG.integers(0, n, 50) for n in values.shape], axis=1)
    points = (affine @ np.c_[voxels, np.ones(50)].T)[:3].T
    np.testing.assert_array_equal(world_values(item, points), values[tuple(voxels.T)])
    written = nibabel.load(ct_writer.write(item, tmp_path / "b"))
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), values)
    np.testing.assert_array_equal(written.affine, nibabel.load(path).affine)
    assert written.get_data_dtype() == np.int16


@pytest.mark.parametrize(
    ("codes", "thick", "plane"),
    [("RAS", 1, "LIP"), ("PIR", 2, "PIL"), ("IPR", 0, "LPS"), ("RAS", None, "LPS")],
)
def test_thick_slices_stay_slices(tmp_path, codes, thick, plane):
    spacing = [5.0 if axis == thick else 1.0 for axis in range(3)]
    shape = [8 if axis == thick else 20 for axis in range(3)]
    values = RNG.integers(0, 99, shape).astype(np.uint8)
    path = nifti(tmp_path / "a.nii", values, affine_of(codes, spacing))
    item = mri_reader.read(path)
    assert "".join(nibabel.aff2axcodes(np.array(item.record.affine))) == plane
    assert item.record.spacing_mm[0] == pytest.approx(1.0 if thick is None else 5.0)
    written = nibabel.load(mri_writer.write(item, tmp_path / "b"))
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), values)


@pytest.mark.parametrize(
    ("space", "signs"),
    [
        ("left-posterior-superior", (-1, -1, 1)), ("LPS", (-1, -1, 1)), (None, (-1, -1, 1)),
        ("right-anterior-superior", (1, 1, 1)), ("RAS", (1, 1, 1)),
        ("left-anterior-superior", (-1, 1, 1)), ("LAS", (-1, 1, 1)),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("unit", "mm"), [(None, 1.0), ("mm", 1.0), ("um", 1e-3), ("cm", 10.0)])
def test_an_nrrd_lies_where_its_space_and_units_say(tmp_path, space, signs, unit, mm):
    values = RNG.integers(-1000, 2000, (18, 20, 22)).astype(np.int16)
    own = affine_of("RAS")
    header = {"space directions": own[:3, :3].T / mm, "space origin": own[:3, 3] / mm}
    header |= {"space dimension": 3} if space is None else {"space": space}
    nrrd.write(
        str(tmp_path / "a.nrrd"), values, header | ({"space units": [unit] * 3} if unit else {})
    )
    item = mri_reader.read(tmp_path / "a.nrrd")
    written = nibabel.load(mri_writer.write(item, tmp_path / "b"))
    np.testing.assert_allclose(written.affine, np.diag([*signs, 1]) @ own, atol=1e-5)
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), values)


@pytest.mark.parametrize("header", [{"space": "scanner-xyz"}, {"space units": ["px"] * 3}])
def test_an_nrrd_that_does_not_say_which_side_is_left_is_refused(tmp_path, header):
    header = {"space": "LPS", "space directions": np.eye(3), "space origin": [0, 0, 0]} | header
    nrrd.write(str(tmp_path / "a.nrrd"), np.zeros((18, 20, 22), np.int16), header)
    with pytest.raises(BadInputError, match="save it"):
        mri_reader.read(tmp_path / "a.nrrd")


@pytest.mark.parametrize(("unit", "mm"), [("meter", 1e3), ("micron", 1e-3), ("unknown", 1.0)])
def test_a_nifti_in_other_units_of_length_is_in_millimetres(tmp_path, unit, mm):
    values = RNG.integers(-1000, 2000, (18, 20, 22)).astype(np.int16)
    sform = affine_of("RAS")
    qform = np.diag([-1.0, -1.0, 1.0, 1.0]) @ sform
    qform[:3, 3] += 5
    image = nibabel.Nifti1Image(values, None)
    to_unit = np.diag([1 / mm, 1 / mm, 1 / mm, 1.0])
    image.set_sform(to_unit @ sform, 2)
    image.set_qform(to_unit @ qform, 1)
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "a.nii.gz")
    item = ct_reader.read(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(item.record.spacing_mm, (1.2, 1.1, 1.0), rtol=1e-5)
    written = nibabel.load(ct_writer.write(item, tmp_path / "b"))
    assert written.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(written.get_sform(), sform, atol=1e-4)
    np.testing.assert_allclose(written.get_qform(), qform, atol=1e-4)


@pytest.mark.parametrize(("kind", "value"), [(np.uint16, 40000), (np.int32, -40000)])
def test_a_ct_volume_beyond_what_hounsfield_units_are_is_refused(tmp_path, kind, value):
    path = nifti(tmp_path / "a.nii.gz", np.full((18, 20, 22), value, kind))
    with pytest.raises(BadInputError, match="no Hounsfield units"):
        ct_reader.read(path)


def test_nrrd_in_left_posterior_superior_becomes_the_same_item_as_nifti_in_ras(tmp_path):
    values = RNG.integers(0, 3000, (20, 21, 6)).astype(np.int16)
    directions = np.diag([0.8, -0.8, 6.5])
    header = {
        "space": "left-posterior-superior",
        "space directions": directions,
        "space origin": [-99.0, 99.0, -78.0],
    }
    nrrd.write(str(tmp_path / "a.nrrd"), values, header)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.block(
        [[directions, np.array([[-99.0], [99.0], [-78.0]])], [np.zeros((1, 3)), np.ones((1, 1))]]
    )
    nifti(tmp_path / "b.nii.gz", values, affine)
    a, b = mri_reader.read(tmp_path / "a.nrrd"), mri_reader.read(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(a.pixels, b.pixels)
    np.testing.assert_allclose(a.record.affine, b.record.affine, rtol=1e-6)
    assert a.record.spacing_mm == pytest.approx((6.5, 0.8, 0.8))
    assert (a.record.source_format, a.pixels.dtype) == ("nrrd", np.int16)
    again = mri_reader.read(mri_writer.write(a, tmp_path / "c"))
    np.testing.assert_array_equal(again.pixels, a.pixels)


@pytest.mark.parametrize("kind", ["u1", "i1", "i2", "u2", "i4", "f4"])
def test_mri_keeps_the_dtype_through_reading_and_writing(tmp_path, kind):
    values = RNG.integers(0, 120, (16, 17, 3)).astype(kind)
    item = mri_reader.read(nifti(tmp_path / "a.nii", values, affine_of("LPS")))
    again = mri_reader.read(mri_writer.write(item, tmp_path / "b"))
    assert item.pixels.dtype == again.pixels.dtype == np.dtype(kind)
    np.testing.assert_array_equal(again.pixels, item.pixels)
    assert again.record.affine == item.record.affine


@pytest.mark.parametrize(("slope", "intercept"), [(2.0157, 0.0), (1.0, 300.0), (2.0157, 3.0)])
def test_scaled_integers_are_read_with_their_scale(tmp_path, slope, intercept):
    values = RNG.integers(0, 255, (16, 16, 4)).astype(np.uint8)
    path = tmp_path / "a.nii.gz"
    image = nibabel.Nifti1Image(values, affine_of("LPS"))
    image.header.set_slope_inter(slope, intercept)
    nibabel.save(image, path)
    item = mri_reader.read(path)
    expected = np.asanyarray(nibabel.load(path).dataobj)
    assert expected.max() > 255
    np.testing.assert_allclose(item.pixels[0].transpose(2, 1, 0), expected, rtol=1e-6)
    again = mri_reader.read(mri_writer.write(item, tmp_path / "b"))
    np.testing.assert_array_equal(again.pixels, item.pixels)


def test_whole_hounsfield_units_become_int16_whatever_holds_them(tmp_path):
    values = RNG.integers(-1024, 3000, (16, 16, 3))
    for kind in ("i4", "f4", "f8"):
        item = ct_reader.read(nifti(tmp_path / "a.nii", values.astype(kind)))
        assert item.pixels.dtype == np.int16
        assert item.record.dtype == "int16"
    fraction = ct_reader.read(nifti(tmp_path / "b.nii", values.astype("f4") + 0.25))
    assert fraction.pixels.dtype == np.float32


def test_restored_ct_is_written_in_whole_units_within_int16(tmp_path):
    item = ct_reader.read(nifti(tmp_path / "a.nii", np.zeros((16, 16, 2), np.int16)))
    restored = np.zeros(item.pixels.shape, np.float32)
    restored[0, 0, 0, :4] = (-10.6, 10.4, 1e6, -1e6)
    written = ct_writer.write(Item(restored, item.record), tmp_path / "b")
    again = ct_reader.read(written).pixels
    assert again[0, 0, 0, :4].tolist() == [-11, 10, 32767, -32768]


def test_a_last_dimension_of_one_and_a_single_plane_are_accepted(tmp_path):
    plane = RNG.integers(0, 99, (20, 30)).astype(np.uint8)
    for shape in [(20, 30), (20, 30, 1), (20, 30, 1, 1)]:
        item = mri_reader.read(nifti(tmp_path / "a.nii", plane.reshape(shape)))
        assert item.record.shape == (1, 1, 30, 20)


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 1), (20, 30, 4), (20, 30, 2, 1)])
@pytest.mark.parametrize("codes", ["LPS", "ARI"])
def test_a_volume_comes_back_with_the_dimensions_of_its_file(tmp_path, shape, codes):
    values = RNG.integers(0, 99, shape).astype(np.uint8)
    item = mri_reader.read(nifti(tmp_path / "a.nii", values, affine_of(codes)))
    again = nibabel.load(mri_writer.write(item, tmp_path / "b"))
    assert again.shape == shape
    np.testing.assert_array_equal(np.asanyarray(again.dataobj), values)
    np.testing.assert_allclose(again.affine, affine_of(codes), atol=1e-5)


@pytest.mark.parametrize("sform_code", [0, 1, 2, 4])
@pytest.mark.parametrize("qform_code", [0, 1, 3])
def test_the_worlds_of_a_nifti_file_stay_what_they_were(tmp_path, sform_code, qform_code):
    """Both affines under their codes; the atlas of one is not the scanner of the other."""
    image = nibabel.Nifti1Image(np.zeros((18, 20, 4), np.int16), np.eye(4))
    scanner, atlas = affine_of("LAS"), np.diag([-1.0, 1.1, 1.2, 1.0])
    atlas[:3, 3] = (90.0, -126.0, -72.0)
    image.set_qform(scanner, code=qform_code)
    image.set_sform(atlas, code=sform_code)
    nibabel.save(image, tmp_path / "a.nii")
    before = nibabel.load(tmp_path / "a.nii")
    item = ct_reader.read(tmp_path / "a.nii")
    after = nibabel.load(ct_writer.write(item, tmp_path / "b"))
    for name in ("sform_code", "qform_code"):
        assert after.header[name] == before.header[name]
    np.testing.assert_allclose(after.affine, before.affine, atol=1e-4)
    if qform_code:
        np.testing.assert_allclose(after.get_qform(), before.get_qform(), atol=1e-4)
    part = nibabel.load(ct_writer.write(item.slices(1, 3), tmp_path / "c"))
    np.testing.assert_allclose(part.affine[:3, 3], before.affine[:3] @ (0, 0, 1, 1), atol=1e-4)
    if qform_code:
        moved = before.get_qform()[:3] @ (0, 0, 1, 1)
        np.testing.assert_allclose(part.get_qform()[:3, 3], moved, atol=1e-4)


def test_the_record_names_nobody(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((16, 16, 2), np.int16), np.eye(4))
    image.header["descrip"] = b"Kanarienvogel"
    path = tmp_path / "Kanarienvogel.nii"
    nibabel.save(image, path)
    item = ct_reader.read(path)
    assert "Kanarienvogel" not in repr(item.record)
    keyed = with_site_key(item, b"key").record.item_id
    assert keyed.startswith("ct-")
    assert keyed != with_site_key(item, b"other").record.item_id
    assert keyed == with_site_key(ct_reader.read(path), b"key").record.item_id


def absurd_nifti(path):
    header = nibabel.Nifti1Header()
    header.set_data_shape((30000, 30000, 30000))
    header["magic"], header["vox_offset"] = b"n+1", 352
    path.write_bytes(header.binaryblock + bytes(4))


def flat_nifti(path):
    """Its affine maps z to nothing."""
    image = nibabel.Nifti1Image(np.zeros((16, 16, 2), np.int16), None)
    image.header["sform_code"] = 1
    image.header["srow_x"][0] = image.header["srow_y"][1] = 1
    nibabel.save(image, path)


def rewrite_nrrd(path, old, new):
    nrrd.write(str(path), np.zeros((16, 16, 4), np.int16), {"space directions": np.eye(3)})
    path.write_bytes(path.read_bytes().replace(old, new))


def bomb_nrrd(path, pack, encoding):
    header = (
        "NRRD0004\ntype: short\ndimension: 3\nsizes: 16 16 4\nspace dimension: 3\n"
        "space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\n"
        f"endian: little\nencoding: {encoding}\n\n"
    )
    path.write_bytes(header.encode() + pack(bytes(50_000_000)))


BAD_MEDICAL = {
    "text.nii.gz": (
        lambda p: p.write_text("this is not an image"),
        "not a readable NIfTI file (by its first bytes it is plain text); export",
    ),
    "text.nrrd": (lambda p: p.write_text("this is not an image"), "not a readable NRRD"),
    "line.nrrd": (lambda p: rewrite_nrrd(p, b"encoding", b"Kanarienvogel"), "not a readable NRRD"),
    "empty.nii.gz": (lambda p: p.touch(), "empty"),
    "one.nii": (lambda p: nifti(p, np.zeros((1, 1, 1), np.int16)), "too small"),
    "thin.nii": (lambda p: nifti(p, np.zeros((40, 15, 40), np.int16)), "too small"),
    "nan.nii": (lambda p: nifti(p, np.full((16, 16, 2), np.nan, "f4")), "512 pixels are NaN"),
    "inf.nii": (lambda p: nifti(p, np.full((16, 16, 2), np.inf, "f4")), "NaN or infinite"),
    "wide.nii": (lambda p: nifti(p, np.full((16, 16, 2), 1e300, "f8")), "NaN or infinite"),
    "series.nii": (lambda p: nifti(p, np.zeros((16, 16, 3, 5), np.int16)), "one volume per file"),
    "complex.nii": (lambda p: nifti(p, np.zeros((16, 16, 2), np.complex64)), "complex64"),
    "huge.nii": (absurd_nifti, "over the limit"),
    "flat.nii": (flat_nifti, "affine"),
    "elsewhere.nrrd": (
        lambda p: rewrite_nrrd(p, b"encoding:", b"data file: /etc/passwd\nencoding:"),
        "another file",
    ),
    "nowhere.nrrd": (lambda p: rewrite_nrrd(p, b"space directions:", b"#"), "space dir"),
    "large.nrrd": (lambda p: rewrite_nrrd(p, b"sizes: 16 16 4", b"sizes: 99999 99999 99999"),
                   "over the limit"),
    "negative.nrrd": (lambda p: rewrite_nrrd(p, b"sizes: 16 16 4", b"sizes: -16 -16 4"),
                      "too small"),
    "gzip.nrrd": (lambda p: bomb_nrrd(p, gzip.compress, "gzip"), "size that the header states"),
    "bzip2.nrrd": (lambda p: bomb_nrrd(p, bz2.compress, "bzip2"), "size that the header states"),
    "slices.dcm": (lambda p: p.write_bytes(b"DICM" * 99), "no image, or damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_MEDICAL)
@pytest.mark.parametrize("read", [ct_reader.read, mri_reader.read])
def test_an_unusable_volume_gets_one_sentence(tmp_path, name, read):
    make, reason = BAD_MEDICAL[name]
    path = tmp_path / name
    make(path)
    with pytest.raises(BadInputError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert "\n" not in message
    assert "Kanarienvogel" not in message


def test_a_cut_volume_gets_a_sentence_at_any_length(tmp_path):
    whole = nifti(tmp_path / "a.nii.gz", RNG.integers(0, 999, (16, 16, 9)).astype(np.int16))
    data = whole.read_bytes()
    for share in (0.02, 0.3, 0.6, 0.99):
        path = tmp_path / "cut.nii.gz"
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(BadInputError):
            mri_reader.read(path)


def test_an_absent_file_gets_a_sentence(tmp_path):
    with pytest.raises(BadInputError, match="no such file"):
        city_reader.read(tmp_path / "a.png")


# --- city -----------------------------------------------------------------------------------


def image_of(shape, kind):
    top = np.iinfo(kind).max
    return RNG.integers(0, top, shape, endpoint=True).astype(kind)


@pytest.mark.parametrize("kind", ["u1", "u2"])
@pytest.mark.parametrize("bands", [1, 3])
def test_png_of_8_and_16_bits_round_trips(tmp_path, kind, bands):
    image = image_of((20, 30, bands), kind)
    bgr = image[..., ::-1] if bands == 3 else image
    cv2.imwrite(str(tmp_path / "a.png"), bgr)
    item = city_reader.read(tmp_path / "a.png")
    np.testing.assert_array_equal(item.pixels[:, 0], image.transpose(2, 0, 1))
    assert item.record.dtype == np.dtype(kind).name
    written = city_writer.write(item, tmp_path / "b")
    assert written.suffix == ".png"
    again = city_reader.read(written)
    np.testing.assert_array_equal(again.pixels, item.pixels)
    assert again.record.meta == item.record.meta


def test_jpeg_is_what_pillow_shows_upright_and_comes_back_as_png(tmp_path):
    image = image_of((24, 40, 3), "u1")
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate to see it upright"
    Image.fromarray(image).save(tmp_path / "a.jpg", exif=exif)
    item = city_reader.read(tmp_path / "a.jpg")
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")))
    np.testing.assert_array_equal(item.pixels[:, 0], expected.transpose(2, 0, 1))
    written = city_writer.write(item, tmp_path / "b")
    np.testing.assert_array_equal(np.asarray(Image.open(written)), expected)


@pytest.mark.parametrize(
    ("shape", "kind", "options", "layout"),
    [
        ((20, 30), "u2", {}, "interleaved"),
        ((20, 30, 3), "u1", {"photometric": "rgb"}, "interleaved"),
        ((20, 30, 4), "u2", {"planarconfig": "contig"}, "interleaved"),
        ((5, 20, 30), "u2", {"planarconfig": "separate"}, "planar"),
        ((4, 20, 30), "u1", {"planarconfig": "separate"}, "planar"),
        ((3, 20, 30), "u1", {"photometric": "rgb", "planarconfig": "separate"}, "planar"),
        ((20, 30, 8), "f4", {"planarconfig": "contig"}, "interleaved"),
        ((20, 30, 4), "f8", {"planarconfig": "contig"}, "interleaved"),
        ((20, 30), "i2", {}, "interleaved"),
    ],
)
def test_tiff_of_any_bands_round_trips(tmp_path, shape, kind, options, layout):
    values = RNG.integers(0, 2000, shape)
    image = (values % 256 if kind == "u1" else values).astype(kind)
    options = {"photometric": "minisblack", **options}
    tifffile.imwrite(tmp_path / "a.tif", image, metadata=None, **options)
    item = city_reader.read(tmp_path / "a.tif")
    bands_first = image if layout == "planar" else np.moveaxis(np.atleast_3d(image), -1, 0)
    np.testing.assert_array_equal(item.pixels[:, 0], bands_first)
    assert item.record.meta["layout"] == layout
    written = city_writer.write(item, tmp_path / "b")
    assert written.suffix == ".tif"
    with tifffile.TiffFile(written) as tiff:
        np.testing.assert_array_equal(tiff.asarray(), image)
        assert tiff.pages[0].dtype == np.dtype(kind)
    again = city_reader.read(written)
    np.testing.assert_array_equal(again.pixels, item.pixels)
    assert again.record.meta == item.record.meta


@pytest.mark.parametrize(
    ("text", "expected"),
    [("-9999", -9999.0), ("-9999.0 ", -9999.0), ("0", None), ("nan", None), ("none", None)],
)
def test_the_no_data_value_that_a_tiff_names_is_kept_and_not_counted(tmp_path, text, expected):
    image = image_of((20, 30), "u1").astype("f4") / 255
    image[3:6, 4] = -9999.0 if expected else 0.0
    tag = [(42113, "s", 0, text, True)]
    tifffile.imwrite(tmp_path / "a.tif", image, metadata=None, extratags=tag)
    meta = city_reader.read(tmp_path / "a.tif").record.meta
    assert meta.get("nodata") == expected
    assert meta["value_range"] == [0.0, 1.0]


def test_an_image_of_nothing_but_no_data_is_read(tmp_path):
    tag = [(42113, "s", 0, "7", True)]
    tifffile.imwrite(tmp_path / "a.tif", np.full((20, 20), 7, "u2"), extratags=tag)
    assert city_reader.read(tmp_path / "a.tif").record.meta["value_range"] == [0.0, 255.0]


def test_pages_of_a_tiff_are_frames(tmp_path):
    pages = image_of((4, 20, 30), "u1")
    tifffile.imwrite(tmp_path / "a.tif", pages, photometric="minisblack", metadata=None)
    item = city_reader.read(tmp_path / "a.tif")
    np.testing.assert_array_equal(item.pixels[0], pages)
    again = city_reader.read(city_writer.write(item, tmp_path / "b"))
    np.testing.assert_array_equal(again.pixels, item.pixels)


@pytest.mark.parametrize("bands", [1, 3, 4])
def test_lzw_tiff_which_tifffile_alone_cannot_decode_is_read(tmp_path, bands):
    image = image_of((20, 30, bands), "u2")
    bgr = image if bands == 1 else image[..., [2, 1, 0, 3][:bands]]
    cv2.imwrite(str(tmp_path / "a.tif"), bgr, [cv2.IMWRITE_TIFF_COMPRESSION, 5])
    item = city_reader.read(tmp_path / "a.tif")
    np.testing.assert_array_equal(item.pixels[:, 0], image.transpose(2, 0, 1))


def test_an_opaque_alpha_channel_is_dropped_and_put_back(tmp_path):
    image = image_of((20, 30, 4), "u1")
    image[..., 3] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    item = city_reader.read(tmp_path / "a.png")
    assert item.record.shape == (3, 1, 20, 30)
    written = city_writer.write(item, tmp_path / "b")
    np.testing.assert_array_equal(np.asarray(Image.open(written)), image)


@pytest.mark.parametrize("mode", ["LA", "1", "L"])
def test_pictures_of_one_band_come_back_in_their_mode(tmp_path, mode):
    grey = image_of((20, 30), "u1") // 128 * 255 if mode == "1" else image_of((20, 30), "u1")
    picture = Image.fromarray(grey)
    if mode == "LA":
        picture.putalpha(255)
    picture.convert(mode).save(tmp_path / "a.png")
    item = city_reader.read(tmp_path / "a.png")
    with Image.open(city_writer.write(item, tmp_path / "b")) as again:
        assert again.mode == mode
        np.testing.assert_array_equal(np.asarray(again.convert("L")), grey)
    item.pixels[0, 0, 3, 4] = 99  # a grey that black and white cannot hold
    with Image.open(city_writer.write(item, tmp_path / "c")) as restored:
        assert restored.mode == ("L" if mode == "1" else mode)
        assert np.asarray(restored.convert("L"))[3, 4] == 99


def test_palettes_and_bilevel_pictures_are_read_as_colours_and_greys(tmp_path):
    image = np.zeros((20, 30, 3), np.uint8)
    image[5:, 10:] = (200, 10, 90)
    Image.fromarray(image).quantize(4).save(tmp_path / "a.png")
    np.testing.assert_array_equal(
        city_reader.read(tmp_path / "a.png").pixels[:, 0], image.transpose(2, 0, 1)
    )
    Image.fromarray(image[..., 0] > 0).save(tmp_path / "b.png")
    grey = city_reader.read(tmp_path / "b.png")
    assert (grey.record.shape, grey.pixels.max()) == ((1, 1, 20, 30), 255)


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([0, 3], "u1", [0, 255]),
        ([1, 2047], "u2", [0, 2047]),
        ([1, 2048], "u2", [0, 4095]),
        ([0, 9], "u2", [0, 255]),
        ([0, 65535], "u2", [0, 65535]),
        ([1, 2046], "f8", [0, 2047]),
        ([0.1, 0.9], "f4", [0, 1]),
        ([-300, 40], "i2", [-511, 511]),
        ([-32768, 40], "i2", [-65535, 65535]),
    ],
)
def test_the_range_of_values_is_that_of_the_sensor(values, kind, expected):
    assert city_reader.value_range(np.array(values, kind)) == expected


def test_restored_photographs_are_rounded_and_bounded_by_their_dtype(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((16, 16), np.uint8))
    item = city_reader.read(tmp_path / "a.png")
    restored = np.zeros(item.pixels.shape, np.float32)
    restored[0, 0, 0, :3] = (-3.0, 254.6, 300.0)
    written = city_writer.write(Item(restored, item.record), tmp_path / "b")
    assert cv2.imread(str(written), cv2.IMREAD_UNCHANGED)[0, :3].tolist() == [0, 255, 255]


def test_frames_of_a_video_are_slices(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "a.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for level in (0, 100, 200):
        writer.write(np.dstack([np.full((48, 64), v, np.uint8) for v in (0, 0, level)]))
    writer.release()
    item = city_reader.read(tmp_path / "a.avi")
    assert item.record.shape == (3, 3, 48, 64)
    red = item.pixels[0].mean(axis=(1, 2))
    np.testing.assert_allclose(red, [0, 100, 200], atol=3)
    assert item.pixels[2].mean() < 3


def png(path, shape, kind="u1"):
    cv2.imwrite(str(path), np.zeros(shape, kind))


def transparent(path):
    Image.fromarray(np.zeros((16, 16, 4), np.uint8)).save(path)


def colour_key(path):
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(path, transparency=0)


def png_header_of(width, height):
    """A PNG that states a size and holds nothing of it."""
    import struct
    import zlib

    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(100))
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c))
              for c in (head, data)]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


BAD_CITY = {
    "text.png": (lambda p: p.write_text("not an image"), "not a readable PNG"),
    "text.tif": (lambda p: p.write_text("not an image"), "not a readable TIFF"),
    "text.mp4": (lambda p: p.write_text("not a video"), "not a readable video"),
    "empty.jpg": (lambda p: p.touch(), "empty"),
    "one.png": (lambda p: png(p, (1, 1)), "too small"),
    "low.png": (lambda p: png(p, (15, 400)), "too small"),
    "bomb.png": (lambda p: p.write_bytes(png_header_of(60000, 60000)), "over the limit"),
    "alpha.png": (transparent, "transparent"),
    "key.png": (colour_key, "transparen"),
    "cmyk.jpg": (lambda p: Image.new("CMYK", (20, 20)).save(p), "CMYK"),
    "nan.tif": (
        lambda p: tifffile.imwrite(p, np.full((20, 20), np.nan, "f4")),
        "mark them in a mask",
    ),
    "complex.tif": (lambda p: tifffile.imwrite(p, np.zeros((20, 20), "c8")), "complex64"),
    "notes.txt": (lambda p: p.write_text("notes"), "not an image we read"),
}


@pytest.mark.parametrize("name", BAD_CITY)
def test_an_unusable_image_gets_one_sentence(tmp_path, name):
    make, reason = BAD_CITY[name]
    path = tmp_path / name
    make(path)
    with pytest.raises(BadInputError) as error:
        city_reader.read(path)
    assert str(error.value).startswith(f"{path}: ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tiff_that_states_an_absurd_size_is_refused_before_decoding(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((16, 16), np.uint8))
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags["ImageWidth"].overwrite(2**31 - 1)
        tiff.pages[0].tags["ImageLength"].overwrite(2**31 - 1)
    with pytest.raises(BadInputError, match="over the limit"):
        city_reader.read(path)


# --- parts of items ---------------------------------------------------------------------------


def test_a_part_lies_where_it_lay(tmp_path):
    values = RNG.integers(0, 999, (30, 28, 12)).astype(np.int16)
    item = ct_reader.read(nifti(tmp_path / "a.nii", values, affine_of("RAS")))
    part = select(item, slices=[2, 5, 8], crop=(3, 4, 17, 18))
    assert part.record.shape == part.pixels.shape == (1, 3, 17, 18)
    voxels = np.stack([RNG.integers(0, n, 40) for n in (18, 17, 3)], axis=1)
    points = (np.array(part.record.affine) @ np.c_[voxels, np.ones(40)].T)[:3].T
    x, y, z = voxels.T
    np.testing.assert_array_equal(world_values(item, points), part.pixels[0, z, y, x])
    assert part.record.meta["slices"] == [2, 5, 8]
    assert part.record.spacing_mm[0] == pytest.approx(3 * item.record.spacing_mm[0])
    inner = select(part, slices=[1, 2], crop=(1, 2, 16, 16))
    assert inner.record.meta["slices"] == [5, 8]
    assert inner.record.meta["crop"] == [4, 6, 16, 16]
    run = item.slices(5, 9)
    same = select(item, slices=range(5, 9))
    np.testing.assert_array_equal(run.pixels, same.pixels)
    np.testing.assert_allclose(run.record.affine, same.record.affine)
    assert replace(run.record, affine=None) == replace(same.record, affine=None)


@pytest.mark.parametrize(
    ("slices", "crop"),
    [([], None), ([5, 2], None), ([2, 2], None), ([12], None), ([-1], None),
     (None, (0, 0, 31, 5)), (None, (-1, 0, 5, 5)), (None, (0, 0, 0, 5))],
)  # fmt: skip
def test_a_part_that_is_not_there_is_refused(tmp_path, slices, crop):
    values = np.zeros((30, 28, 12), np.int16)
    item = ct_reader.read(nifti(tmp_path / "a.nii", values, affine_of("RAS")))
    with pytest.raises(BadInputError, match="choose others"):
        select(item, slices=slices, crop=crop)
