"""DICOM in and out, against pydicom, nibabel's own reader, and a validator written by others."""

import shutil
import warnings
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from dicom_kit import CANARY, OWN, errors_of, header, real_files, series, stored_values, validator
from pydicom.uid import UID

from domains import dicom, dicom_series, medical
from domains.base import BadInputError
from domains.ct import reader as ct_reader
from domains.ct.domain import CT
from domains.dicom_derived import Provenance
from domains.dicom_writer import write_series
from domains.imaging import enlarged
from domains.mri.domain import MRI

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # nibabel says of its reader that it is experimental
    from nibabel.nicom.dicomwrappers import wrapper_from_file

MADE = Provenance("covprox", "0.1.0", "ab" * 32)


def boxes(pixels):
    return lambda z, y, x: pixels[:, z, y, x]


def write_back(item, stem, source, pixels=None, provenance=MADE):
    return write_series(
        item.record, boxes(item.pixels if pixels is None else pixels), stem, source, provenance
    )


def bytes_of(path):
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file.read_bytes() for file in files]


KEPT = (
    "PatientName", "StudyInstanceUID", "FrameOfReferenceUID", "RescaleSlope", "RescaleIntercept",
    "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "SliceThickness",
    "SOPClassUID", "SliceLocation", "BitsStored", "WindowCenter", "PixelPaddingValue",
)  # fmt: skip


# --- real files ------------------------------------------------------------------------------


SYNTAXES = {
    "ImplicitVRLittleEndian", "ExplicitVRLittleEndian", "ExplicitVRBigEndian",
    "DeflatedExplicitVRLittleEndian", "RLELossless", "JPEGExtended12Bit", "JPEGLosslessSV1",
    "JPEGLSLossless", "JPEG2000Lossless", "JPEG2000",
}  # fmt: skip


def test_every_real_grey_image_comes_back_as_it_was(tmp_path):
    """Pixels as pydicom decodes them, dtype, rescale, plane: bit for bit where nothing is done."""
    done, refused = {}, {}
    for number, path in enumerate(p for p in real_files() if dicom.is_dicom(p)):
        source = tmp_path / f"{number}" / "a.dcm"
        source.parent.mkdir()
        shutil.copy(path, source)
        try:
            item = dicom_series.read_series(source, "any", "HU", None)
        except BadInputError as error:
            refused[path.name] = str(error).removeprefix(f"{source}: ")
            continue
        out = write_back(item, source.with_name("b"), source)
        again = dicom_series.read_series(out, "any", "HU", None)
        np.testing.assert_array_equal(again.pixels, item.pixels)
        assert again.record.affine == item.record.affine
        assert again.record.spacing_mm == item.record.spacing_mm
        assert again.record.dtype == item.record.dtype
        with dicom.discreet():
            before, after = pydicom.dcmread(source), pydicom.dcmread(out)
            np.testing.assert_array_equal(after.pixel_array, before.pixel_array)
            for name in KEPT:
                assert after.get(name) == before.get(name), (path.name, name)
        done[path.name] = str(before.file_meta.TransferSyntaxUID)
        shutil.rmtree(source.parent)
    assert len(done) == 75
    assert {UID(uid).keyword for uid in done.values()} == SYNTAXES
    reasons = ("colour image", "no image", "too small", "not readable", "bits a pixel",
               "not a readable", "cannot be decoded", "compressed frame is of")  # fmt: skip
    for name, reason in refused.items():
        assert any(words in reason for words in reasons), (name, reason)


OF_MANY_KINDS = ("CT_small.dcm", "MR_small.dcm", "693_J2KI.dcm", "eCT_Supplemental.dcm",
                 "MR2_J2KR.dcm", "emri_small.dcm")  # fmt: skip


@pytest.mark.parametrize("name", OF_MANY_KINDS)
def test_a_validator_finds_no_error_that_the_source_had_not(tmp_path, name):
    validator()
    path = next(p for p in real_files() if p.name == name)
    source = tmp_path / "a.dcm"
    shutil.copy(path, source)
    item = dicom_series.read_series(source, "any", "HU", None)
    out = write_back(item, tmp_path / "b", source, item.pixels + np.int16(1))
    assert errors_of(out) <= errors_of(source)


def test_a_written_series_is_valid(tmp_path):
    validator()
    source = series(tmp_path / "in", stored_values())
    before = set().union(*(errors_of(f) for f in source.iterdir()))
    item = ct_reader.read(source)
    finer = enlarged(item.record, 2)
    pixels = np.repeat(np.repeat(item.pixels, 2, axis=2), 2, axis=3)
    for k, (record, values) in enumerate([(item.record, item.pixels), (finer, pixels)]):
        out = write_series(record, boxes(values), tmp_path / f"out{k}", source, MADE)
        assert not set().union(*(errors_of(f) for f in out.iterdir())) - before


# --- a series in -----------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [(1, 0, 0, 0, 1, 0), (0.8, 0.6, 0, -0.6, 0.8, 0),
                                  (0, 1, 0, 0, 0, -1), (1, 0, 0, 0, 0, -1)])  # fmt: skip
def test_a_series_lies_where_nibabel_says_each_slice_lies(tmp_path, axes):
    values = stored_values()
    normal = np.cross(axes[:3], axes[3:])

    def turn(k, ds):
        ds.ImageOrientationPatient = [float(v) for v in axes]
        ds.ImagePositionPatient = [round(float(v), 6) for v in (-20, -30, 7) + k * 2.5 * normal]

    folder = series(tmp_path / "in", values, change=turn)
    item = ct_reader.read(folder)
    inverse = np.linalg.inv(np.array(item.record.affine))
    for file in folder.iterdir():
        wrapped = wrapper_from_file(file)
        number = len(values) - int(wrapped.dcm_data.InstanceNumber)
        for row, column in ((0, 0), (19, 17), (4, 11)):
            world = np.diag([-1.0, -1, 1, 1]) @ wrapped.affine @ (row, column, 0, 1)
            x, y, z = np.rint((inverse @ world)[:3]).astype(int)
            np.testing.assert_allclose((inverse @ world)[:3], (x, y, z), atol=1e-4)
            assert item.pixels[0, z, y, x] == values[number, row, column] - 1024
    assert item.record.spacing_mm[0] == pytest.approx(2.5)


def test_a_file_of_a_series_stands_for_all_of_it(tmp_path):
    folder = series(tmp_path / "in", stored_values())
    files = sorted(folder.iterdir())
    assert all(CT().accepts(file) for file in files)
    assert CT().gather(files) == files[:1]
    assert sorted([files[0], *CT().companions(files[0])]) == files
    one, all_of_it = CT().read(files[3]), CT().read(folder)
    np.testing.assert_array_equal(one.pixels, all_of_it.pixels)
    assert one.record == all_of_it.record
    assert one.record.source_format == "dicom"
    assert one.record.dtype == "int16"


def test_directions_that_a_scanner_rounds_differently_are_one_series(tmp_path):
    def wavering(k, ds):
        sine = 0.105 + (-1) ** k * 4e-5  # on both sides of what two digits round to
        cosine = np.sqrt(1 - sine**2)
        ds.ImageOrientationPatient = [f"{v:.6f}" for v in (cosine, sine, 0, -sine, cosine, 0)]

    folder = series(tmp_path / "in", stored_values(), change=wavering)
    files = sorted(folder.iterdir())
    assert CT().gather(files) == files[:1]
    assert CT().read(files[0]).record.shape[1] == 5


def test_a_folder_of_two_series_is_two_items(tmp_path):
    a = series(tmp_path / "in", stored_values((3, 20, 18)))
    for file in list(a.iterdir()):
        file.rename(a / f"a-{file.name}")

    def other(k, ds):
        ds.SeriesInstanceUID = "1.2.9"

    series(a, stored_values((4, 20, 18), seed=1), change=other)
    leads = CT().gather(sorted(a.iterdir()))
    assert [CT().read(lead).record.shape[1] for lead in leads] == [4, 3]
    with pytest.raises(BadInputError, match="holds 2 DICOM series"):
        CT().read(a)


def test_two_acquisitions_on_the_same_places_are_two_items(tmp_path):
    values = stored_values((6, 20, 18))

    def twice(k, ds):
        ds.AcquisitionNumber = k // 3
        ds.ImagePositionPatient = [-20.0, -30.0, 7 + 2.5 * (k % 3)]

    folder = series(tmp_path / "in", values, change=twice)
    leads = CT().gather(sorted(folder.iterdir()))
    found = [CT().read(lead).pixels[0, :, 0, 0].tolist() for lead in leads]
    assert sorted(found) == sorted((values[i : i + 3, 0, 0] - 1024).tolist() for i in (0, 3))


def test_missing_slices_keep_their_places(tmp_path):
    values = stored_values((7, 20, 18))
    folder = series(tmp_path / "in", values, change=lambda k, ds: k not in (2, 3))
    item = ct_reader.read(folder)
    assert item.record.shape[1] == 7
    assert item.record.meta["missing_slices"] == [2, 3]
    assert item.record.meta["found"] == ["2 of 7 slices are missing: 3, 4"]
    there = [0, 1, 4, 5, 6]
    np.testing.assert_array_equal(item.pixels[0, there], values[there] - 1024)
    assert item.record.spacing_mm[0] == pytest.approx(2.5)


def test_slices_that_lie_twice_count_once_unless_they_differ(tmp_path):
    folder = series(tmp_path / "in", stored_values())
    first = min(folder.iterdir())
    copy = pydicom.dcmread(first)
    copy.SOPInstanceUID = "1.2.3.99"
    copy.save_as(folder / "copy")
    item = ct_reader.read(folder)
    assert item.record.shape[1] == 5
    assert item.record.meta["found"] == ["1 of its slices lie twice: counted once"]
    copy.PixelData = bytes(len(copy.PixelData))
    copy.save_as(folder / "copy")
    with pytest.raises(BadInputError, match="different images lie on the same place"):
        ct_reader.read(folder)


def test_a_tilted_gantry_is_a_shear_of_the_affine_and_is_told(tmp_path):
    tilt = np.radians(12.0)
    step = (0.0, 2.5 * np.sin(tilt), 2.5 * np.cos(tilt))
    item = ct_reader.read(series(tmp_path / "in", stored_values(), step=step))
    assert item.record.meta["found"] == ["gantry tilted by 12.0 degrees: the affine is sheared"]
    affine = np.array(item.record.affine)
    np.testing.assert_allclose(affine[:3, 2], (0, -step[1], step[2]), atol=1e-6)
    written = nibabel.load(CT().write(item, tmp_path / "b"))
    np.testing.assert_allclose(written.affine[:3, 2], affine[:3, 2], atol=1e-5)


def test_each_slice_has_its_own_rescale(tmp_path):
    values = stored_values()

    def rescale(k, ds):
        ds.RescaleSlope, ds.RescaleIntercept = 1 + 0.5 * k, -1000 + 3 * k

    folder = series(tmp_path / "in", values, change=rescale)
    item = ct_reader.read(folder)
    k = np.arange(5)[:, None, None]
    np.testing.assert_allclose(item.pixels[0], values * (1 + 0.5 * k) - 1000 + 3 * k)
    again = ct_reader.read(write_back(item, tmp_path / "out", folder))
    np.testing.assert_array_equal(again.pixels, item.pixels)


BAD_SERIES = {
    "uneven": (lambda k, ds: ds.update({"ImagePositionPatient": [0, 0, [0, 2, 4.9, 7, 10][k]]}),
               "no even grid"),
    "shifted": (lambda k, ds: ds.update({"ImagePositionPatient": [k * k, 0, 2.5 * k]}),
                "one straight line"),
    "nowhere": (lambda k, ds: ds.pop("ImagePositionPatient"), "order of the series is not known"),
    "spacing": (lambda k, ds: ds.update({"PixelSpacing": [0.8, 0.7 + 0.1 * k]}), "pixel spacing"),
    "mr": (lambda k, ds: ds.update({"Modality": "MR"}), "modality is MR, not CT"),
    "name": (lambda k, ds: ds.update({"Modality": "CANARY"}), "modality is another, not CT"),
    "scout": (lambda k, ds: ds.update({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}),
              "localizer"),
    "units": (lambda k, ds: ds.pop("RescaleIntercept"), "not known in HU"),
    "flat": (lambda k, ds: ds.update({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}), "damaged"),
    "slope": (lambda k, ds: ds.update({"RescaleSlope": 0}), "damaged"),
    "rows": (lambda k, ds: ds.update({"Rows": 60000, "Columns": 60000}), "over the limit"),
    "frames": (lambda k, ds: ds.update({"NumberOfFrames": 2**30}), "over the limit"),
    "bits": (lambda k, ds: ds.update({"BitsAllocated": 64, "BitsStored": 64}), "bits a pixel"),
    "cut": (lambda k, ds: ds.update({"PixelData": ds.PixelData[:100]}), "slice 1 of 5"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SERIES)
def test_an_unusable_series_gets_one_sentence_without_a_name(tmp_path, name):
    change, reason = BAD_SERIES[name]
    folder = series(
        tmp_path / "in", stored_values(), change=lambda k, ds: bool(change(k, ds)) or True
    )
    lead = CT().gather(sorted(folder.iterdir()))[0]
    with pytest.raises(BadInputError) as error:
        CT().read(lead)
    message = str(error.value)
    assert message.startswith(f"{lead}: ")
    assert reason in message
    assert "Kanarienvogel" not in message
    assert "canary" not in message.removeprefix(f"{lead}: ").lower()
    assert error.value.__cause__ is None  # pydicom's own words quote headers


def test_nothing_of_the_patient_is_in_the_record(tmp_path):
    item = ct_reader.read(series(tmp_path / "in", stored_values()))
    text = repr(item.record)
    assert "Kanarienvogel" not in text
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "PatientBirthDate"):
        value = str(header().get(name) or "-none-")
        assert value not in text


def test_a_syntax_that_cannot_be_decoded_is_one_sentence(tmp_path):
    dataset = header()
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # a film in MPEG-2
    dataset.PixelData = pydicom.encaps.encapsulate([b"\0" * 64])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.raises(BadInputError, match=r"its compression, MPEG2 .*, cannot be decoded here"):
        CT().read(tmp_path / "a.dcm")


def test_a_decoder_that_is_not_installed_is_named(tmp_path, monkeypatch):
    path = next(p for p in real_files() if p.name == "bad_sequence.dcm")
    from pydicom.pixels.decoders.base import Decoder

    monkeypatch.setattr(Decoder, "is_available", False)
    shutil.copy(path, tmp_path / "a.dcm")
    with pytest.raises(BadInputError, match="pip install pylibjpeg-libjpeg"):
        CT().read(tmp_path / "a.dcm")


def test_a_deflated_bomb_is_not_inflated(tmp_path, monkeypatch):
    dataset = header()
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert CT().read(tmp_path / "a.dcm").record.shape == (1, 1, 128, 128)
    data = (tmp_path / "a.dcm").read_bytes()
    start = dicom._dataset_start(tmp_path / "a.dcm")
    pack = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = pack.compress(bytes(4_000_000)) + pack.flush()
    (tmp_path / "b.dcm").write_bytes(data[:start] + bomb)
    monkeypatch.setattr(dicom, "MAX_INFLATED_BYTES", 2_000_000)
    with pytest.raises(BadInputError, match="inflates to more than 2000000 bytes"):
        CT().read(tmp_path / "b.dcm")


@pytest.mark.parametrize(
    "name", ["693_J2KR.dcm", "bad_sequence.dcm", "MR_small_jpeg_ls_lossless.dcm"]
)
def test_a_compressed_frame_of_another_size_is_not_decoded(tmp_path, name):
    path = next(p for p in real_files() if p.name == name)
    dataset = pydicom.dcmread(path)
    frame = next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1))
    assert dicom.codestream_size(frame) == (dataset.Rows, dataset.Columns)
    dataset.Rows = dataset.Rows // 2
    with pytest.raises(BadInputError, match="a compressed frame is of"):
        dicom.decode(tmp_path / "a.dcm", dataset)


def test_a_dicomdir_is_not_followed(tmp_path):
    shutil.copy(OWN / "CT_small.dcm", tmp_path / "DICOMDIR")
    assert not CT().accepts(tmp_path / "DICOMDIR")


def test_mri_reads_and_writes_dicom_too(tmp_path):
    shutil.copy(OWN / "MR_small.dcm", tmp_path / "a.dcm")
    item = MRI().read(tmp_path / "a.dcm")
    expected = pydicom.dcmread(OWN / "MR_small.dcm").pixel_array
    np.testing.assert_array_equal(np.sort(item.pixels, axis=None), np.sort(expected, axis=None))
    assert item.record.units == "intensity"
    facts = {"method": {"name": "tv"}, "model_digest": None}
    out = MRI().write_back(
        item.record, boxes(item.pixels), tmp_path / "b", tmp_path / "a.dcm", facts
    )
    assert "tv, no model" in pydicom.dcmread(out).DerivationDescription
    with pytest.raises(BadInputError, match="modality is MR, not CT"):
        CT().read(tmp_path / "a.dcm")


# --- a series out ----------------------------------------------------------------------------


def test_a_derived_series_says_what_it_is_and_of_what(tmp_path):
    source = series(tmp_path / "in", stored_values())
    item = ct_reader.read(source)
    out = write_back(item, tmp_path / "out", source)
    before = {str(d.ImagePositionPatient): d for d in map(pydicom.dcmread, source.iterdir())}
    series_uids, sop_uids = set(), set()
    for file in out.iterdir():
        data = file.read_bytes()
        assert data[:132] == bytes(128) + b"DICM"
        dataset = pydicom.dcmread(file)
        own = before[str(dataset.ImagePositionPatient)]
        for name in {*KEPT, "PatientID", "InstanceNumber"} - {"PixelPaddingValue", "WindowCenter"}:
            assert dataset[name].value == own[name].value
        np.testing.assert_array_equal(dataset.pixel_array, own.pixel_array)
        assert list(dataset.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"]
        assert dataset.SourceImageSequence[0].ReferencedSOPInstanceUID == own.SOPInstanceUID
        assert MADE.model_digest in dataset.DerivationDescription
        equipment = dataset.ContributingEquipmentSequence[-1]
        assert (equipment.Manufacturer, list(equipment.SoftwareVersions)) == (
            "Sashiko", ["0.1.0", MADE.model_digest])  # fmt: skip
        assert dataset.SOPInstanceUID == dataset.file_meta.MediaStorageSOPInstanceUID
        assert dataset.SOPInstanceUID != own.SOPInstanceUID
        assert UID(dataset.SOPInstanceUID).is_valid
        series_uids.add(dataset.SeriesInstanceUID)
        sop_uids.add(dataset.SOPInstanceUID)
    assert (len(series_uids), len(sop_uids)) == (1, 5)
    assert own.SeriesInstanceUID not in series_uids


def test_the_same_restoration_gives_the_same_bytes_and_another_model_others(tmp_path):
    source = series(tmp_path / "in", stored_values())
    item = ct_reader.read(source)
    first, second = (bytes_of(write_back(item, tmp_path / n, source)) for n in "ab")
    assert first == second
    other = Provenance("covprox", "0.1.0", "cd" * 32)
    uids = [
        {pydicom.dcmread(f).SOPInstanceUID for f in folder.iterdir()}
        for folder in (
            tmp_path / "a",
            write_back(item, tmp_path / "c", source, provenance=other),
            write_back(item, tmp_path / "d", source, item.pixels + np.int16(1)),
        )
    ]
    assert len(set.union(*uids)) == 15


@pytest.mark.parametrize("unsigned", [False, True])
def test_restored_values_go_through_the_rescale_and_padding_stays(tmp_path, unsigned):
    values = stored_values()
    values[:, :3] = -2000

    def padded(k, ds):
        ds.PixelPaddingValue = -2000
        ds["PixelPaddingValue"].VR = "SS"
        if unsigned:  # as some scanners state the value of signed pixels
            del ds.PixelPaddingValue
            ds.add_new("PixelPaddingValue", "US", 2**16 - 2000)
        ds.RescaleSlope, ds.RescaleIntercept = 2, -1024

    source = series(tmp_path / "in", values, change=padded)
    item = ct_reader.read(source)
    restored = item.pixels.astype(np.float32) + 6.9
    restored[0, :, 5, 5] = -2000 * 2 - 1024  # no padding may be made where none was
    restored[0, :, 6, 6] = 1e9
    out = write_back(item, tmp_path / "out", source, restored)
    stored = np.stack([pydicom.dcmread(f).pixel_array for f in sorted(out.iterdir())])
    assert (stored[:, :3] == -2000).all()
    assert (stored[:, 5, 5] == -1999).all()
    assert (stored[:, 6, 6] == 32767).all()
    np.testing.assert_array_equal(stored[:, 8:], values[:, 8:] + 3)


def test_slices_between_and_finer_pixels_get_planes_of_their_own(tmp_path):
    source = series(tmp_path / "in", stored_values(), change=lambda k, ds: k != 2)
    item = ct_reader.read(source)
    out = sorted(write_back(item, tmp_path / "out", source).iterdir())
    new = pydicom.dcmread(out[2])
    assert [float(v) for v in new.ImagePositionPatient] == [-20, -30, 12]
    assert float(new.SliceLocation) == 12
    assert {s.ReferencedSOPInstanceUID for s in new.SourceImageSequence} == {
        "1.2.3.4.2",
        "1.2.3.4.4",
    }
    assert [pydicom.dcmread(f).InstanceNumber for f in out] == [5, 4, 3, 2, 1]
    again = ct_reader.read(tmp_path / "out")
    np.testing.assert_array_equal(again.pixels, item.pixels)
    assert again.record.affine == item.record.affine
    finer = enlarged(item.record, 2)
    pixels = np.repeat(np.repeat(item.pixels, 2, axis=2), 2, axis=3)
    write_series(finer, boxes(pixels), tmp_path / "fine", source, MADE)
    fine = ct_reader.read(tmp_path / "fine")
    np.testing.assert_array_equal(fine.pixels, pixels)
    np.testing.assert_allclose(fine.record.affine, finer.affine, atol=1e-5)


def test_a_source_that_changed_is_refused(tmp_path):
    source = series(tmp_path / "in", stored_values())
    item = ct_reader.read(source)
    file = min(source.iterdir())
    dataset = pydicom.dcmread(file)
    dataset.WindowWidth = 77
    dataset.save_as(file)
    with pytest.raises(BadInputError, match="was changed since it was read"):
        write_back(item, tmp_path / "out", source)


def test_a_medical_volume_of_any_plane_reads_the_same_from_dicom_and_nifti(tmp_path):
    """The canonical turn is one: an isotropic sagittal series is cut axially like its NIfTI."""
    values = stored_values((20, 24, 22))

    def sagittal(k, ds):
        ds.ImageOrientationPatient, ds.PixelSpacing = [0, 1, 0, 0, 0, -1], [1.0, 1.0]
        ds.ImagePositionPatient = [-10.0 + k, -30.0, 40.0]
        ds.SliceThickness = 1.0

    folder = series(tmp_path / "in", values, change=sagittal)
    item = ct_reader.read(folder)
    affine = np.array([[-0.0, 0, -1, 10], [-1, 0, 0, 30], [0, -1, 0, 40], [0, 0, 0, 1.0]])
    image = nibabel.Nifti1Image((values - 1024).transpose(2, 1, 0).astype(np.int16), affine)
    nibabel.save(image, tmp_path / "a.nii.gz")
    other = medical.read_volume(tmp_path / "a.nii.gz", "ct", "HU")
    np.testing.assert_array_equal(item.pixels, other.pixels)
    np.testing.assert_allclose(item.record.affine, other.record.affine, atol=1e-6)
    out = write_back(item, tmp_path / "out", folder)
    np.testing.assert_array_equal(ct_reader.read(out).pixels, item.pixels)
    assert CANARY in {str(pydicom.dcmread(f).PatientName) for f in Path(out).iterdir()}
