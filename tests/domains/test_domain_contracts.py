"""The contract that every domain inherits, on small files of every kind that each of ours reads."""

from dataclasses import replace
from pathlib import Path

import cv2
import nibabel
import nrrd
import numpy as np
import pytest
import tifffile
from PIL import Image, PngImagePlugin
from scipy import ndimage

from domains.base import BadInputError, Item
from domains.city.domain import City
from domains.ct import matrices
from domains.ct.domain import CT
from domains.mri.domain import MRI
from domains.testing import PATIENT, AdapterContract
from flows.config import load_task

OBLIQUE = np.array(
    [[-0.9, 0.1, 0.0, 31.25], [0.1, -0.9, 0.3, -12.5], [0.0, 0.05, 2.5, 7.125], [0, 0, 0, 1.0]]
)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    matrices.set_cache_dir(tmp_path_factory.mktemp("projectors"))
    yield
    matrices.set_cache_dir(None)


def smooth(shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
    """A smooth random field over low..high, sharp where it crosses its middle."""
    field = np.random.default_rng(4).standard_normal(shape)
    field = ndimage.gaussian_filter(field, [2 if n > 8 else 0 for n in shape])
    field += 0.3 * field.std() * np.sign(field)
    return low + (field - field.min()) / np.ptp(field) * (high - low)


def write_nifti(path: Path, values: np.ndarray, affine: np.ndarray) -> Path:
    image = nibabel.Nifti1Image(values, affine)
    for name in ("descrip", "db_name", "aux_file", "intent_name"):
        image.header[name] = PATIENT.encode()
    text = nibabel.nifti1.Nifti1Extension("comment", f"patient {PATIENT}".encode())
    image.header.extensions.append(text)
    nibabel.save(image, path)
    return path


def write_nrrd(path: Path, values: np.ndarray, affine: np.ndarray) -> Path:
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    header = {
        "space": "left-posterior-superior",
        "space directions": lps[:3, :3].T,
        "space origin": lps[:3, 3],
        "content": PATIENT,
        "patient name": PATIENT,
    }
    nrrd.write(str(path), values, header)
    return path


class MedicalContract(AdapterContract):
    """Volumes of whole numbers, scaled and real ones, turned every way."""

    low: float
    high: float

    def make_files(self, folder):
        values = smooth((21, 25, 3), self.low, self.high)
        whole = np.rint(values).astype(np.int16)
        turned = OBLIQUE @ np.diag([-1.0, 1.0, -1.0, 1.0])
        paths = [
            write_nifti(folder / f"{PATIENT}.nii", whole, OBLIQUE),
            write_nifti(folder / f"{PATIENT}-2.nii.gz", whole[..., :2], turned),
            write_nrrd(folder / f"{PATIENT}-3.nrrd", whole, OBLIQUE),
        ]
        return [*paths, write_nifti(folder / "REAL.NII", values.astype(np.float32), turned)]


class TestCT(MedicalContract):
    # The scan is finer than A by design; on so few and coarse pixels that shows.
    chi2_bounds = (0.9, 4.0)
    zero_where_unseen = False
    low, high = -1000.0, 1400.0

    def make_domain(self):
        return CT()

    def make_tasks(self):
        return [load_task("ct-sparse20")]

    def make_files(self, folder):
        return super().make_files(folder)[:-1]  # CT values are whole HU


class TestMRI(MedicalContract):
    low, high = 0.0, 900.0

    def make_domain(self):
        return MRI()

    def make_tasks(self):
        return [load_task("kspace-x4"), load_task("kspace-x4-real")]


class TestCity(AdapterContract):
    def make_domain(self):
        return City()

    def make_item(self):
        with self._sources() as sources:
            item = City().read(sources[0])
        frames = np.concatenate([item.pixels, item.pixels[..., ::-1]], axis=1)
        return Item(frames, replace(item.record, shape=frames.shape))

    def make_tasks(self):
        return [load_task(name) for name in ("inpaint-random70", "sr-x4", "denoise-25")]

    def make_files(self, folder):
        colour = np.rint(smooth((24, 28, 3), 0, 255)).astype(np.uint8)
        deep = np.rint(smooth((24, 28), 0, 4000)).astype(np.uint16)
        bands = np.rint(smooth((4, 24, 28), 0, 2000)).astype(np.uint16)
        told = PngImagePlugin.PngInfo()
        told.add_text("Author", PATIENT)
        exif = Image.Exif()
        exif[0x013B] = PATIENT  # artist
        Image.fromarray(colour).save(folder / f"{PATIENT}.png", pnginfo=told, exif=exif)
        Image.fromarray(colour).save(folder / "a.jpg", quality=95, exif=exif)
        cv2.imwrite(str(folder / "deep.png"), deep)
        how = {"photometric": "minisblack", "planarconfig": "separate", "description": PATIENT}
        tifffile.imwrite(folder / "bands.tif", bands, software=PATIENT, **how)
        tifffile.imwrite(folder / "real.tiff", smooth((24, 28), 0, 1).astype(np.float32))
        return [folder / f"{PATIENT}.png", *sorted(folder.glob("[a-z]*"))]


def test_the_contract_catches_what_it_asks_for(tmp_path):
    """A domain with one fault fails the test that is there for it: none of them is vacuous."""

    class Leaks(City):
        def read(self, path):
            item = super().read(path)
            meta = {**item.record.meta, "file": PATIENT}
            return Item(item.pixels, replace(item.record, meta=meta))

    class Rounds(City):
        def write(self, item, stem):
            return super().write(Item(item.pixels // 2 * 2, item.record), stem)

    class Shrugs(City):
        def read(self, path):
            try:
                return super().read(path)
            except BadInputError as error:
                raise ValueError("no") from error

    class Rambles(City):
        def read(self, path):
            try:
                return super().read(path)
            except BadInputError as error:
                raise BadInputError(f"{path}: Dear sir, {PATIENT}") from error

    class Scribbles(City):
        def write(self, item, stem):
            (stem.parent / "log.txt").write_text("done")
            return super().write(item, stem)

    class Renames(City):
        def read(self, path):
            item = super().read(path)
            return Item(item.pixels, replace(item.record, item_id=path.stem.lower()))

    faults = {
        Leaks: "test_no_patient_data_leaves_the_domain",
        Rounds: "test_what_is_written_reads_back_exactly",
        Shrugs: "test_bad_files_are_refused_in_one_sentence",
        Rambles: "test_bad_files_are_refused_in_one_sentence",
        Scribbles: "test_what_is_written_reads_back_exactly",
        Renames: "test_reading_depends_on_the_bytes_alone_and_leaves_them",
    }
    for fault, name in faults.items():
        contract = TestCity()
        contract.make_domain = fault
        with pytest.raises((AssertionError, ValueError)):
            getattr(contract, name)()
