"""The contract of a domain: one class of tests that every plug-in inherits, and so do ours.

    class TestMine(AdapterContract):
        def make_domain(self):
            return Mine()

        def make_files(self, folder):
            ...  # write a few real files, with PATIENT planted wherever the format has room
            return [folder / "one.xyz"]

        def make_tasks(self):
            return [Task(...)]

pytest then runs every `test_*` method on it: what diffusion_core.testing.DomainContract asks of the
physics, and here what is asked of files, units, bad input and secrecy. No pytest is needed.
"""

from __future__ import annotations

import json
import re
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from diffusion_core.testing import DomainContract
from domains.base import BadInputError, Domain, Item, ItemRecord, Task
from domains.files import MIN_SIDE

PATIENT = "Kanarienvogel"
"""A name that no record, error or file of ours may hold; plant it in the files of make_files."""

ITEM_ID = re.compile(r"[a-z0-9][a-z0-9-]*")
_DICOM_MAGIC = slice(128, 132)
_MOST_WORDS = 60


class AdapterContract(DomainContract):
    """What every Domain promises: physics, exact files, units, clear refusals, no patient data."""

    affine_tolerance: float = 1e-6
    """Allowed difference of an affine that was written and read, relative to its largest entry."""

    @abstractmethod
    def make_domain(self) -> Domain:
        """A Domain."""

    @abstractmethod
    def make_files(self, folder: Path) -> Sequence[Path]:
        """Write sources (files, or folders of one series) of every kind that the domain reads.

        PATIENT is planted in their names and headers wherever the format has room for it.
        """

    @abstractmethod
    def make_tasks(self) -> Sequence[Task]:
        """Tasks to be tried, cheap ones."""

    def make_item(self) -> Item:
        """A clean Item of two small slices or more: the first of the files."""
        with self._sources() as sources:
            return self.make_domain().read(sources[0])

    @contextmanager
    def _sources(self) -> Iterator[Sequence[Path]]:
        with TemporaryDirectory() as name:
            folder = Path(name) / "sources"
            folder.mkdir()
            yield self.make_files(folder)

    @contextmanager
    def _items(self) -> Iterator[list[tuple[Path, Item]]]:
        domain = self.make_domain()
        with self._sources() as sources:
            yield [(path, domain.read(path)) for path in sources]

    def test_files_are_found_by_their_suffix(self) -> None:
        """Suffixes are lower-case with a dot, and each source has one of them or is a folder."""
        suffixes = self.make_domain().suffixes
        assert all(re.fullmatch(r"\.[a-z0-9.]+", suffix) for suffix in suffixes), suffixes
        with self._sources() as sources:
            assert sources, "make_files made none"
            for path in sources:
                assert path.is_dir() or path.name.lower().endswith(suffixes), path.suffix

    def test_records_describe_the_pixels_in_json(self) -> None:
        """Axes, dtype, size and digest are the pixels' own; the whole record goes through JSON."""
        domain = self.make_domain()
        with self._items() as items:
            for path, item in items:
                record = item.record
                assert item.pixels.shape == tuple(record.shape), path.suffix
                assert item.pixels.dtype.name == record.dtype, path.suffix
                assert min(record.shape[2:]) >= MIN_SIDE, path.suffix
                assert record.domain == domain.name, path.suffix
                assert record.units, path.suffix
                assert ITEM_ID.fullmatch(record.item_id), record.item_id
                assert re.fullmatch(r"[0-9a-f]{64}", record.source_digest), path.suffix
                assert json.loads(json.dumps(asdict(record))) is not None
                assert np.isfinite(item.pixels).all(), path.suffix

    def test_reading_depends_on_the_bytes_alone_and_leaves_them(self) -> None:
        """A second reading, and one under another name, give the same item; no file changes."""
        domain = self.make_domain()
        with self._items() as items:
            for path, item in items:
                before = _contents(path.parent)
                for again in (domain.read(path), self._read_elsewhere(domain, path)):
                    assert again.record == item.record, path.suffix
                    assert np.array_equal(again.pixels, item.pixels), path.suffix
                assert _contents(path.parent) == before, path.suffix

    def test_what_is_written_reads_back_exactly(self) -> None:
        """Pixels to the last bit, units, spacing, affine; nothing is written elsewhere."""
        domain = self.make_domain()
        with self._items() as items:
            for path, item in items:
                back, written = self._written(domain, item)
                assert back.pixels.dtype == item.pixels.dtype, path.suffix
                assert np.array_equal(back.pixels, item.pixels), path.suffix
                self._require_same_place(back.record, item.record, path.suffix)
                assert len(written) >= 1, path.suffix

    def test_a_restored_item_is_written_to_half_a_step_of_its_values(self) -> None:
        """Computed pixels (float32) come back rounded to the source's whole numbers at most."""
        domain = self.make_domain()
        with self._items() as items:
            for path, item in items:
                low, high = float(item.pixels.min()), float(item.pixels.max())
                noise = np.random.default_rng(0).uniform(-0.5, 0.5, item.pixels.shape)
                values = np.clip(item.pixels + noise * (high - low) / 50, low, high)
                computed = values.astype(np.float32)
                back, _ = self._written(domain, Item(computed, item.record))
                whole = item.pixels.dtype.kind in "iu"
                gap = np.abs(back.pixels.astype(np.float64) - computed).max()
                assert gap <= (0.5 if whole else 0) + 1e-6 * max(abs(low), abs(high)), path.suffix
                self._require_same_place(back.record, item.record, path.suffix)

    def test_a_damaged_image_keeps_its_units_and_its_place(self) -> None:
        """Taken with a mask its record is the image's; made finer, its extent stays."""
        domain = self.make_domain()
        with self._items() as items:
            for path, item in items:
                mask = np.zeros(item.pixels.shape[1:], bool)
                mask[:, 3:6, 4:9] = True
                taken = domain.given(item, mask=mask, kernel=None, scale=None, sigma_y=0.0)
                assert taken.record == item.record, path.suffix
                assert taken.truth_digest is None, path.suffix
                finer = domain.given(item, mask=None, kernel=None, scale=2, sigma_y=0.0).record
                c, z, h, w = item.record.shape
                assert finer.shape == (c, z, 2 * h, 2 * w), path.suffix
                assert finer.units == item.record.units, path.suffix
                if item.record.spacing_mm is not None and finer.spacing_mm is not None:
                    halved = np.array(item.record.spacing_mm) / (1, 2, 2)
                    assert np.allclose(finer.spacing_mm, halved), path.suffix

    def test_networks_get_what_the_conditions_say(self) -> None:
        """Problems and training views have their condition's channels; so has what is drawn."""
        domain = self.make_domain()
        for _, _, task, measurement in self._cases():
            problem = domain.problem(measurement)
            assert problem.shape[1] == domain.conditions[problem.condition], task.name
            assert set(task.baselines) <= set(domain.baselines()), task.name
        rng = np.random.default_rng(0)
        for condition, views in domain.training_windows(self.make_item()).items():
            for view in views:
                assert view.shape[0] == domain.conditions[condition], condition
                assert view.dtype == np.float32, condition
                assert np.abs(view).max() < 10, f"{condition}: network units are about [-1, 1]"
            drawn = [c for c, source in domain.drawn_from.items() if source == condition]
            for wanted in (condition, *drawn):
                patch = domain.augment(wanted, views[0][:, 0, :16, :16], rng)
                assert patch.shape == (domain.conditions[wanted], 16, 16), wanted
                assert patch.dtype == np.float32, wanted

    def test_a_guide_is_seen_as_its_item_is(self) -> None:
        """A domain that learns with guides cuts and turns them view by view as the pixels."""
        domain, item = self.make_domain(), self.make_item()
        _, z, _, _ = item.record.shape
        try:
            seen = domain.guide_views(item.record, item.pixels[:1].astype(np.float32))
        except BadInputError as error:
            assert "learns with no guides" in str(error)  # noqa: PT017  # either will do
            return
        for condition, views in domain.training_windows(item).items():
            assert [v.shape[1:] for v in seen] == [v.shape[1:] for v in views], condition
            for view, guide in zip(views, seen, strict=True):
                pair = view[0].ravel(), guide[0].ravel()
                if guide.shape[1] == z:  # of several bands as images the first is the guide's own
                    pair = view[0, :z].ravel(), guide[0, :z].ravel()
                assert np.corrcoef(*pair)[0, 1] > 0.8, condition

    def test_bad_files_are_refused_in_one_sentence(self) -> None:
        """BadInputError alone, whatever is wrong: file, reason and next step, no header's words."""
        domain = self.make_domain()
        with self._sources() as sources:
            for path in (p for p in sources if p.is_file()):
                for fault, spoil in _SPOILERS.items():
                    bad = _beside(path, f"bad{_suffix_of(path, domain)}", spoil)
                    said = _refusal(domain, bad)
                    assert said is not None, f"{path.suffix} {fault}: was read"
                    _require_sentence(said, bad, f"{path.suffix} {fault}")
                for fault, spoil in _WOUNDS.items():  # may be read, may be refused
                    bad = _beside(path, f"bad{_suffix_of(path, domain)}", spoil)
                    said = _refusal(domain, bad)
                    if said is not None:
                        _require_sentence(said, bad, f"{path.suffix} {fault}")
            absent = sources[0].with_name(f"absent{_suffix_of(sources[0], domain)}")
            assert _refusal(domain, absent) is not None, "a file that is not there was read"

    def test_no_patient_data_leaves_the_domain(self) -> None:
        """PATIENT is in no record, measurement or file written, DICOM alone excepted."""
        domain = self.make_domain()
        with self._items() as items:
            for path, item in items:
                told = [item.record, *(domain.simulate(item, t, 0) for t in self._fitting(item))]
                mask = np.zeros(item.pixels.shape[1:], bool)
                mask[:, 2, 2] = True
                told.append(domain.given(item, mask=mask, kernel=None, scale=None, sigma_y=0.1))
                assert not any(PATIENT.lower() in repr(one).lower() for one in told), path.suffix
                _, written = self._written(domain, item)
                for name, data in written.items():
                    if data[_DICOM_MAGIC] != b"DICM":
                        assert PATIENT.encode() not in data, f"{path.suffix}: {name}"

    def _read_elsewhere(self, domain: Domain, path: Path) -> Item:
        """The item of a copy in a folder of its own, under another name where it stands alone."""
        with TemporaryDirectory() as name:
            if path.is_dir():
                return domain.read(Path(shutil.copytree(path, Path(name) / "another")))
            others = domain.companions(path)
            for other in others:
                shutil.copy(other, name)
            copy = path.name if others else f"another{_suffix_of(path, domain)}"
            return domain.read(Path(shutil.copy(path, Path(name) / copy)))

    def _fitting(self, item: Item) -> Sequence[Task]:
        """The tasks that this item can be measured for."""
        domain = self.make_domain()
        fitting = []
        for task in self.make_tasks():
            try:
                domain.simulate(item, task, 0)
            except BadInputError:
                continue
            fitting.append(task)
        return fitting

    def _written(self, domain: Domain, item: Item) -> tuple[Item, dict[str, bytes]]:
        """The item written and read back, and all files that the writing left, by name."""
        with TemporaryDirectory() as name:
            stem = Path(name) / "restored.one"  # a name with a dot keeps it
            path = domain.write(item, stem)
            assert path.parent == stem.parent, "written beside the stem's folder"
            assert path.name.startswith(stem.name), path.name
            files = {p: p.read_bytes() for p in Path(name).rglob("*") if p.is_file()}
            within = [p for p in files if p != path and path not in p.parents]
            assert not within, "files beside the one that write() names"
            return domain.read(path), {p.name: data for p, data in files.items()}

    def _require_same_place(self, back: ItemRecord, record: ItemRecord, what: str) -> None:
        """Units, spacing and affine of what was read back are those of the source."""
        assert back.units == record.units, what
        assert (back.spacing_mm is None) == (record.spacing_mm is None), what
        if record.spacing_mm is not None:
            spacing, read = np.array(record.spacing_mm), np.array(back.spacing_mm)
            assert np.abs(read - spacing).max() <= self.affine_tolerance * spacing.max(), what
        if record.affine is not None:
            affine, read = np.array(record.affine), np.array(back.affine, dtype=np.float64)
            assert np.abs(read - affine).max() <= self.affine_tolerance * np.abs(affine).max(), what


Spoil = Callable[[bytes], bytes]


def _only(data: bytes) -> Spoil:
    """Bytes in the place of whatever a file held."""
    return lambda _: data


_SPOILERS: dict[str, Spoil] = {
    "empty": _only(b""),
    "text": _only(f"Dear sir, {PATIENT} sends no image.\n".encode()),
    "zeros": lambda data: bytes(len(data)),
    "noise": _only(np.random.default_rng(1).bytes(4096)),
    "a few bytes": lambda data: data[:10],
    "another format": lambda data: b"%PDF-1.7\n" + data[9:64],
}
"""What no reader can take for an image."""

_WOUNDS: dict[str, Spoil] = {
    "cut in half": lambda data: data[: len(data) // 2],
    "cut at the end": lambda data: data[:-7],
    "a flipped byte": lambda data: data[:40] + bytes([data[40] ^ 0xFF]) + data[41:],
    "longer": lambda data: data + b"and more",
}
"""What a reader may survive; if not, it says why."""


def _suffix_of(path: Path, domain: Domain) -> str:
    """The longest suffix of the domain that a name ends with."""
    fitting = [s for s in domain.suffixes if path.name.lower().endswith(s)]
    return max(fitting, key=len, default=path.suffix)


def _beside(path: Path, name: str, spoil: Spoil) -> Path:
    bad = path.parent / "bad" / name
    bad.parent.mkdir(exist_ok=True)
    bad.write_bytes(spoil(path.read_bytes()))
    return bad


def _refusal(domain: Domain, path: Path) -> str | None:
    """What the domain says of a file that it refuses; None if it reads it."""
    try:
        domain.read(path)
    except BadInputError as error:
        return str(error)
    return None


def _require_sentence(said: str, path: Path, what: str) -> None:
    """One sentence for a person: it begins with the file, and quotes nothing of its content."""
    assert said.startswith(str(path)), f"{what}: {said}"
    reason = said.removeprefix(str(path))
    assert PATIENT.lower() not in reason.lower(), f"{what}: {said}"
    assert "\n" not in reason, f"{what}: {said}"
    assert "Error" not in reason, f"{what}: {said}"
    assert "Traceback" not in reason, f"{what}: {said}"
    assert 3 <= len(reason.split()) <= _MOST_WORDS, f"{what}: {said}"


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
