"""City files as they came: by rasterio, rio-cogeo, tifffile and Pillow, on real and made files."""

import io
import struct

import numpy as np
import pytest
import rasterio
import tifffile
from PIL import Image, ImageCms, ImageOps
from rasterio.enums import ColorInterp
from sample_kit import sample_path

from domains.base import BadInputError, Item
from domains.city import large, reader, writer
from domains.city.domain import City
from domains.city.exif import corrected, nameless
from domains.files import select
from flows.damage import nodata_pixels

RNG = np.random.default_rng(11)
UTM = rasterio.crs.CRS.from_epsg(32633)
PLACE = rasterio.Affine(0.5, 0, 400000.25, 0, -0.5, 5800000.75)


def facts(path):
    """All that rasterio finds beside the pixels."""
    with rasterio.open(path) as file:
        return {
            "crs": file.crs,
            "transform": file.transform,
            "nodata": file.nodata,
            "dtypes": file.dtypes,
            "shape": (file.count, file.height, file.width),
            "colours": file.colorinterp,
            "descriptions": file.descriptions,
            "units": file.units,
            "scales": (file.scales, file.offsets),
            "tags": (file.tags(), file.tags(1), file.tags(ns="SENSOR")),
            "predictor": file.tags(ns="IMAGE_STRUCTURE").get("PREDICTOR"),
            "interleave": file.interleaving if file.count > 1 else None,
        }


def centre(transform, row, column):
    """Where the centre of a pixel lies in the world."""
    a, b, c, d, e, f = list(transform)[:6]
    x, y = column + 0.5, row + 0.5
    return (a * x + b * y + c, d * x + e * y + f)


def pixels_of(path):
    with rasterio.open(path) as file:
        return file.read()


def scene(path, values, *, colours=None, mask=None, **options):
    """A GeoTIFF of many facts, written by rasterio."""
    profile = {"crs": UTM, "transform": PLACE, "count": len(values), "dtype": values.dtype}
    h, w = values.shape[1:]
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", driver="GTiff", height=h, width=w, **profile | options) as file,
    ):
        if colours:
            file.colorinterp = colours
        file.write(values)
        if mask is not None:
            file.write_mask(mask)
        file.update_tags(TIFFTAG_DATETIME="2024:05:06 07:08:09", flown="at noon")
        file.update_tags(ns="SENSOR", name="made up")
        file.update_tags(1, wavelength="490", STATISTICS_MEAN="7")
        file.descriptions = tuple(f"band {n}" for n in range(1, file.count + 1))
        file.units = ("reflectance",) * file.count
        file.scales, file.offsets = (0.0001,) * file.count, (-0.25,) * file.count
    return path


@pytest.mark.samples
@pytest.mark.parametrize(
    "label", ["ms1", "ms2", "ms3", "pan1", "pan2", "pan3", "las-vegas", "sample-geotiff"]
)
def test_real_scenes_come_back_as_they_were(tmp_path, label):
    path = sample_path(label)
    item = reader.read(path)
    with tifffile.TiffFile(path) as file:
        image = np.atleast_3d(file.asarray())
    np.testing.assert_array_equal(item.pixels[:, 0], np.moveaxis(image, -1, 0))
    written = writer.write(item, tmp_path / "b")
    assert facts(written) == facts(path)
    np.testing.assert_array_equal(pixels_of(written), pixels_of(path))
    with tifffile.TiffFile(path) as theirs, tifffile.TiffFile(written) as ours:
        for key in ("ModelPixelScale", "ModelTiepoint", "ProjectedCSTypeGeoKey"):
            assert ours.geotiff_metadata.get(key) == theirs.geotiff_metadata.get(key)


@pytest.mark.parametrize("interleave", ["pixel", "band"])
@pytest.mark.parametrize(("kind", "bands"), [("uint8", 3), ("int16", 5), ("uint16", 2)])
def test_what_a_geotiff_says_is_kept(tmp_path, kind, bands, interleave):
    values = RNG.integers(1, 120, (bands, 40, 50)).astype(kind)
    values[:, 3:9, 4:8] = 0
    packed = {"compress": "zstd", "predictor": 2}
    path = scene(tmp_path / "a.tif", values, nodata=0, interleave=interleave, **packed)
    assert facts(path)["predictor"] == "2"
    item = reader.read(path)
    np.testing.assert_array_equal(item.pixels[:, 0], values)
    written = writer.write(item, tmp_path / "b")
    expected = facts(path)
    expected["tags"][1].pop("STATISTICS_MEAN")  # of pixels that may be others now
    assert facts(written) == expected
    with rasterio.open(written) as file:
        assert file.compression.name == "zstd"
    np.testing.assert_array_equal(pixels_of(written), values)
    assert not list(tmp_path.glob("*.xml"))


def test_classes_and_half_transparent_pixels_are_refused(tmp_path):
    path = scene(tmp_path / "a.tif", np.ones((1, 20, 20), "u1"), photometric="palette")
    with rasterio.open(path, "r+") as file:
        file.write_colormap(1, {0: (1, 2, 3, 255), 1: (200, 1, 1, 255)})
    with pytest.raises(BadInputError, match="palette"):
        reader.read(path)
    values = np.full((4, 20, 20), 128, "u1")
    rgba = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha)
    with pytest.raises(BadInputError, match="half-transparent"):
        reader.read(scene(tmp_path / "b.tif", values, colours=rgba, photometric="RGB", ALPHA="YES"))


def cog(path, values, **options):
    source = scene(path.with_suffix(".src.tif"), values, **options)
    rasterio.shutil.copy(source, path, driver="COG", BLOCKSIZE=128, COMPRESS="DEFLATE")
    return path


def test_a_cog_comes_back_as_a_cog(tmp_path):
    rio_cogeo = pytest.importorskip(
        "rio_cogeo", reason="rio-cogeo, the validator, is not installed"
    )
    path = cog(tmp_path / "a.tif", RNG.integers(1, 4000, (4, 300, 280)).astype("u2"), nodata=0)
    item = reader.read(path)
    for written in (
        writer.write(item, tmp_path / "b"),
        writer.write_large(item.record, lambda z, y, x: item.pixels[:, z, y, x], tmp_path / "c"),
    ):
        assert rio_cogeo.cog_validate(written, strict=True) == (True, [], [])
        ours, theirs = facts(written), facts(path)
        assert ours == {**theirs, "tags": ours["tags"]}
        assert ours["tags"][0]["flown"] == "at noon"
        np.testing.assert_array_equal(pixels_of(written), pixels_of(path))
        with rasterio.open(written) as file:
            assert file.overviews(1) == [2, 4]
            assert file.block_shapes[0] == (128, 128)
    assert not list(tmp_path.glob("*draft*"))


def test_a_finer_image_lies_where_the_coarse_one_lay(tmp_path):
    values = RNG.integers(1, 4000, (3, 48, 64)).astype("u2")
    values[:, :5, :7] = 0
    points = [rasterio.control.GroundControlPoint(row=4, col=8, x=12.5, y=50.0, z=0)]
    path = scene(tmp_path / "a.tif", values, nodata=0)
    part = select(reader.read(path), crop=(0, 6, 40, 50))
    given = City().given(part, mask=None, kernel=None, scale=4, sigma_y=0.0)
    fine = Item(part.pixels.repeat(4, 2).repeat(4, 3) + np.float32(0.3), given.record)
    with rasterio.open(writer.write(fine, tmp_path / "b")) as file:
        with rasterio.open(path) as coarse:
            corners = [(-0.5, -0.5), (39.5, 49.5), (11.0, 3.0)]
            for row, column in corners:
                seen = centre(file.transform, 4 * row + 1.5, 4 * column + 1.5)
                place = centre(coarse.transform, row, column + 6)
                assert seen == pytest.approx(place, abs=1e-9)
        assert file.shape == (160, 200)
        lost = file.read(1) == 0
    np.testing.assert_array_equal(lost, np.pad(np.ones((20, 4), bool), ((0, 140), (0, 196))))
    path = scene(tmp_path / "d.tif", values, transform=None, crs=UTM, gcps=points)
    with rasterio.open(writer.write(reader.read(path), tmp_path / "c")) as file:
        assert [(p.row, p.col, p.x) for p in file.gcps[0]] == [(4.0, 8.0, 12.5)]


def test_polynomials_of_a_sensor_follow_the_grid(tmp_path):
    values = RNG.integers(1, 99, (1, 40, 40)).astype("u1")
    coefficients = [1.0, *[0.0] * 19]
    rpc = rasterio.rpc.RPC(
        height_off=10.0, height_scale=100.0, lat_off=50.0, lat_scale=0.1, long_off=12.0,
        long_scale=0.1, line_off=19.5, line_scale=20.0, samp_off=9.5, samp_scale=20.0,
        line_num_coeff=coefficients, line_den_coeff=coefficients, samp_num_coeff=coefficients,
        samp_den_coeff=coefficients, err_bias=0.5, err_rand=0.25,
    )  # fmt: skip
    path = tmp_path / "a.tif"
    scene(path, values, transform=None, crs=None, rpcs=rpc)
    item = reader.read(path)
    with rasterio.open(writer.write(item, tmp_path / "b")) as file:
        assert file.rpcs == rpc
    part = select(item, crop=(10, 4, 20, 30))
    record = City().given(part, mask=None, kernel=None, scale=2, sigma_y=0.0).record
    with rasterio.open(writer.write(Item(np.zeros(record.shape), record), tmp_path / "c")) as file:
        # Line 10 of the source is line 0 of the part: its centre lies at line .5 of the fine grid.
        assert (file.rpcs.line_off, file.rpcs.line_scale) == ((19.5 - 10) * 2 + 0.5, 40.0)
        assert file.rpcs.samp_off == (9.5 - 4) * 2 + 0.5


@pytest.mark.parametrize("kind", ["alpha", "mask", "nan"])
def test_pixels_without_data_stay_so_until_they_are_asked_for(tmp_path, kind):
    dtype = "f4" if kind == "nan" else "u1"
    values = RNG.integers(50, 90, (4 if kind == "alpha" else 3, 30, 40)).astype(dtype)
    lost = np.zeros((30, 40), bool)
    lost[:6, 10:] = lost[20, 3] = True
    values[:, lost] = 0
    options = {"nodata": np.nan} if kind == "nan" else {}
    rgb = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
    if kind == "alpha":
        values[3] = np.where(lost, 0, 255)
        options = {"colours": (*rgb, ColorInterp.alpha), "photometric": "RGB", "ALPHA": "YES"}
    elif kind == "mask":
        options = {"colours": rgb, "photometric": "RGB", "mask": ~lost}
    else:
        values[:, lost] = np.nan
    path = scene(tmp_path / "a.tif", values, **options)
    item = reader.read(path)
    assert item.record.shape == (3, 1, 30, 40)
    assert np.isfinite(item.pixels).all()
    np.testing.assert_array_equal(nodata_pixels(item), lost[None])
    written = writer.write(item, tmp_path / "b")
    np.testing.assert_array_equal(pixels_of(written), values)
    denoised = City().given(item, mask=None, kernel=None, scale=None, sigma_y=0.1)
    seen = City().problem(denoised).to_source(City().problem(denoised).y)
    assert 49.99 <= float(seen.min()) <= float(seen.max()) <= 90  # nothing of what is no light
    with rasterio.open(written) as a, rasterio.open(writer.write(
        Item(seen.numpy().swapaxes(0, 1), denoised.record), tmp_path / "c")
    ) as b:  # fmt: skip
        np.testing.assert_array_equal(a.dataset_mask() == 0, lost)
        np.testing.assert_array_equal(b.dataset_mask() == 0, lost)
    filled = City().given(item, mask=nodata_pixels(item), kernel=None, scale=None, sigma_y=0.0)
    with rasterio.open(writer.write(Item(item.pixels, filled.record), tmp_path / "d")) as file:
        assert file.dataset_mask().all()


def test_a_restored_pixel_is_never_taken_for_no_data(tmp_path):
    values = RNG.integers(1, 9, (1, 20, 20)).astype("u1")
    values[0, 4:8, 4:8] = 0
    item = reader.read(scene(tmp_path / "a.tif", values, nodata=0))
    missing = np.zeros((20, 20), bool)
    missing[4:6] = values[0, 4:6] == 0
    record = City().given(item, mask=missing, kernel=None, scale=None, sigma_y=0.0).record
    restored = pixels_of(writer.write(Item(np.zeros(record.shape), record), tmp_path / "b"))
    np.testing.assert_array_equal(restored[0] == 0, (values[0] == 0) & ~missing)
    assert (restored[0] == 1).sum() == 400 - 8


@pytest.mark.parametrize(("kind", "value"), [("i2", -9999), ("u2", 65535), ("f4", 1e20)])
def test_a_no_data_value_that_is_no_light_counts_in_each_band_alone(tmp_path, kind, value):
    values = RNG.integers(1, 120, (3, 30, 40)).astype(kind)
    values[0, :, :5], values[2, :6] = value, value
    lost = values == np.dtype(kind).type(value)
    path = scene(tmp_path / "a.tif", values, nodata=value)
    item = reader.read(path)
    np.testing.assert_array_equal(nodata_pixels(item)[:, 0], lost)
    denoised = City().given(item, mask=None, kernel=None, scale=None, sigma_y=0.1)
    assert np.abs(denoised.y).max() <= 1  # what is no light does not reach the network
    restored = np.full((3, 1, 30, 40), 50, kind)
    kept = pixels_of(writer.write(Item(restored, denoised.record), tmp_path / "b"))
    np.testing.assert_array_equal(kept, np.where(lost, values, 50))
    record = (
        City().given(item, mask=nodata_pixels(item), kernel=None, scale=None, sigma_y=0.0).record
    )
    filled = pixels_of(writer.write(Item(np.full_like(restored, value), record), tmp_path / "c"))
    assert (filled != np.dtype(kind).type(value)).all()  # restored pixels are never no data


@pytest.mark.parametrize("value", [0, 255])
def test_a_byte_that_may_be_light_is_data_where_other_bands_hold_some(tmp_path, value):
    values = RNG.integers(1, 120, (3, 30, 40)).astype("u1")
    values[0, :, :5] = value
    item = reader.read(scene(tmp_path / "a.tif", values, nodata=value))
    with pytest.raises(BadInputError, match="no-data value"):
        nodata_pixels(item)


# --- photographs ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["?", "u1", "u2"])
def test_a_tiff_whose_white_is_0_is_read_as_viewers_show_it(tmp_path, kind):
    image = RNG.integers(0, 2 if kind == "?" else 200, (20, 30)).astype(kind)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="miniswhite", metadata=None)
    item = reader.read(tmp_path / "a.tif")
    white = {"?": 255, "u1": 255, "u2": 65535}[kind]
    seen = white - image.astype(item.pixels.dtype) * (255 if kind == "?" else 1)
    np.testing.assert_array_equal(item.pixels[0, 0], seen)
    if kind != "u2":  # Pillow shows 16 bits as they are stored
        with Image.open(tmp_path / "a.tif") as shown:
            np.testing.assert_array_equal(np.asarray(shown.convert("L")), seen)
    again = reader.read(writer.write(item, tmp_path / "b"))
    np.testing.assert_array_equal(again.pixels, item.pixels)


def test_a_tiff_whose_white_is_0_is_read_the_same_when_opencv_decodes_it(tmp_path):
    light = RNG.integers(0, 255, (20, 30)).astype("u1")
    Image.fromarray(light).save(tmp_path / "a.tif", compression="tiff_lzw", tiffinfo={262: 0})
    np.testing.assert_array_equal(reader.read(tmp_path / "a.tif").pixels[0, 0], light)


@pytest.mark.parametrize("mode", ["P", "CMYK", "LAB"])
def test_a_tiff_of_values_that_are_no_light_is_refused(tmp_path, mode):
    image = Image.fromarray(RNG.integers(0, 255, (20, 30, 3)).astype("u1"))
    image.convert(mode).save(tmp_path / "a.tif")
    with pytest.raises(BadInputError, match="convert it to RGB"):
        reader.read(tmp_path / "a.tif")


def test_the_alpha_of_a_plain_tiff_is_no_colour_and_its_author_is_not_kept(tmp_path):
    image = RNG.integers(0, 255, (20, 30, 4)).astype("u1")
    image[..., 3] = 255
    image[2:5, :7, 3] = 0
    Image.fromarray(image).save(tmp_path / "a.tif", tiffinfo={315: "Jo Doe", 270: "of Jo Doe"})
    item = reader.read(tmp_path / "a.tif")
    assert item.record.shape == (3, 1, 20, 30)
    np.testing.assert_array_equal(nodata_pixels(item)[0], image[..., 3] == 0)
    assert "Doe" not in str(item.record.meta)
    with Image.open(writer.write(item, tmp_path / "b")) as written:
        np.testing.assert_array_equal(np.asarray(written), image)


def thumbnail_exif(orientation):
    """EXIF with a camera, a place and a thumbnail, as Pillow and a JPEG make it."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x013B] = "Camera & Sons", orientation, "Jo Doe"
    inner = exif.get_ifd(0x8769)
    inner[0xA430], inner[0x9003], inner[0xA002], inner[0xA003] = (
        "Jo Doe",
        "2024:05:06 07:08:09",
        40,
        24,
    )
    exif.get_ifd(0x8825)[1] = "N"
    block = bytearray(exif.tobytes())[6:]
    small = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(small, "JPEG")
    order = "<" if block[:2] == b"II" else ">"
    first = struct.unpack_from(order + "I", block, 4)[0]
    count = struct.unpack_from(order + "H", block, first)[0]
    struct.pack_into(order + "I", block, first + 2 + 12 * count, len(block))
    start = len(block) + 2 + 24 + 4
    block += struct.pack(order + "H", 2)
    block += struct.pack(order + "HHII", 0x0201, 4, 1, start)
    block += struct.pack(order + "HHII", 0x0202, 4, 1, len(small.getvalue()))
    block += struct.pack(order + "I", 0)
    return bytes(block) + small.getvalue(), small.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_upright_once_and_keeps_its_exif_and_profile(tmp_path, orientation):
    block, thumbnail = thumbnail_exif(orientation)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    image = RNG.integers(0, 255, (24, 40, 3)).astype("u1")
    path = tmp_path / "a.jpg"
    options = {"exif": b"Exif\0\0" + block, "icc_profile": profile, "dpi": (300, 150)}
    Image.fromarray(image).save(path, **options, quality=95)
    with Image.open(path) as picture:
        shown = np.asarray(ImageOps.exif_transpose(picture))
    item = reader.read(path)
    np.testing.assert_array_equal(item.pixels[:, 0], shown.transpose(2, 0, 1))
    written = writer.write(item, tmp_path / "b")
    assert thumbnail not in written.read_bytes()
    assert b"Jo Doe" not in written.read_bytes()
    with Image.open(written) as again:
        found = again.getexif()
        np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(again)), shown)
        assert (found[0x010F], found[0x0112]) == ("Camera & Sons", 1)
        inner = found.get_ifd(0x8769)
        assert inner[0x9003] == "2024:05:06 07:08:09"
        assert (inner[0xA003], inner[0xA002]) == shown.shape[:2]
        assert found.get_ifd(0x8825)[1] == "N"
        assert not found.get_ifd(0x0201)
        assert again.info["icc_profile"] == profile
        assert again.info["dpi"] == pytest.approx((300, 150), abs=0.02)
    large_path = large.write_png(
        item.record, np.dtype("u1"), lambda z, y, x: item.pixels[:, z, y, x], tmp_path / "c",
        opaque=False,
    )  # fmt: skip
    with Image.open(written) as one, Image.open(large_path) as other:
        assert one.info == other.info
    assert reader.read(written).record.meta["kept"].keys() == item.record.meta["kept"].keys()


@pytest.mark.parametrize("kind", ["u1", "u2"])
def test_photographs_in_png_and_tiff_keep_their_profile(tmp_path, kind):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = RNG.integers(0, np.iinfo(kind).max, (20, 30, 3)).astype(kind)
    options = {"photometric": "rgb", "metadata": None, "resolution": (300, 300)}
    tag = [(274, "H", 1, 8, True)]
    tifffile.imwrite(
        tmp_path / "a.tif", image, iccprofile=profile, resolutionunit=2, extratags=tag, **options
    )
    item = reader.read(tmp_path / "a.tif")
    upright = np.rot90(image)
    np.testing.assert_array_equal(item.pixels[:, 0], upright.transpose(2, 0, 1))
    with tifffile.TiffFile(writer.write(item, tmp_path / "b")) as file:
        np.testing.assert_array_equal(file.asarray(), upright)
        page = file.pages[0]
        assert page.tags[34675].value == profile
        assert page.resolution == (300, 300)
        assert page.tags.get(274) is None or page.tags[274].value == 1
    grey = Image.fromarray(image[..., 0])
    grey.save(tmp_path / "a.png", icc_profile=profile, dpi=(72, 72))
    item = reader.read(tmp_path / "a.png")
    with Image.open(writer.write(item, tmp_path / "c")) as again:
        assert again.info["icc_profile"] == profile
        np.testing.assert_array_equal(np.asarray(again), image[..., 0])


@pytest.mark.parametrize("cut", [1, 9, 14, 30, 60, -20])
def test_damaged_exif_harms_nobody(cut):
    block, _ = thumbnail_exif(6)
    assert isinstance(corrected(block[:cut], 24, 40), bytes)
    assert isinstance(nameless(block[:cut]), bytes)
    assert corrected(b"\xff" * 40, 24, 40) == nameless(b"\xff" * 40) == b""
