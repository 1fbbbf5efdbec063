"""A guest's package plugs in by its entry point: every command works on it, from files to files.

The package (tests/guest) is put on the path of a process of its own, as an installed one is found;
nothing of the product names it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from domains.base import Task
from domains.metrics import psnr
from domains.testing import PATIENT, AdapterContract
from flows.store import Measurements

GUEST = Path(__file__).parents[1] / "guest"
SIGMA_Y = 0.3

sys.path.insert(0, str(GUEST))
from pages import page, save_pages  # noqa: E402
from sashiko_documents import baselines as _baselines  # noqa: E402, F401
from sashiko_documents.domain import Documents  # noqa: E402

sys.path.remove(str(GUEST))  # what it brings along is not for the other tests


class TestDocuments(AdapterContract):
    def make_domain(self):
        return Documents()

    def make_tasks(self):
        files = sorted((Documents.configs / "tasks").glob("*.yaml"))
        values = [yaml.safe_load(path.read_text()) for path in files]
        for task in values:
            task.pop("solver")
        return [Task(name=path.stem, **task) for path, task in zip(files, values, strict=True)]

    def make_files(self, folder):
        grey = [page(number, (48, 56)) for number in range(2)]
        red = Image.merge("RGB", [grey[0], grey[1], grey[1]])
        paths = [folder / name for name in (f"{PATIENT}.tif", "a.png", "b.png", "c.tiff")]
        pages = {"save_all": True, "append_images": grey[1:], "artist": PATIENT}
        grey[0].save(paths[0], dpi=(300, 200), compression="tiff_lzw", **pages)
        grey[0].convert("1").save(paths[1], dpi=(300, 300))
        red.save(paths[2])
        red.save(paths[3], description=PATIENT)
        return paths


def sashiko(*command_lines: Sequence[object], home: Path) -> list[dict]:
    """Run commands one after the other in a process that has the guest installed; JSON answers."""
    code = (
        "import contextlib, io, json, sys\n"
        "from flows import cli\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        code = cli.run(line)\n"
        "    print(json.dumps({'code': code, 'out': out.getvalue()}))\n"
    )
    lines = json.dumps([[str(word) for word in line] for line in command_lines])
    paths = [str(GUEST), *filter(None, [os.environ.get("PYTHONPATH")]), str(GUEST.parents[1])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "SASHIKO_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", code, lines], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [a["code"] for a in answers] == [0] * len(command_lines), done.stderr
    return answers


TRAINING = {
    "name": "pages",
    "conditions": {"document": 1.0},
    "network": {"widths": [16, 24], "depths": [1, 1], "num_features": 16},
    "patch_size": 32,
    "batch_size": 8,
    "num_steps": 150,
    "warmup_steps": 10,
    "dtype": "float32",
    "num_threads": 1,
    "compute": {"executor": "inline"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The guest's run from files to files: ingest, train, restore, evaluate."""
    root = tmp_path_factory.mktemp("guest")
    numbers = {"train": range(8), "validation": range(8, 11), "test": range(11, 13)}
    for split, pages in numbers.items():
        save_pages(root / split, pages)
    for path in sorted((root / "test").rglob("*.png")):
        clean = np.asarray(Image.open(path), np.float64)
        noise = np.random.default_rng(5).standard_normal(clean.shape) * SIGMA_Y * 127.5
        worn = root / "worn" / f"{path.parent.name}.png"
        worn.parent.mkdir(exist_ok=True)
        Image.fromarray(np.clip(np.rint(clean + noise), 0, 255).astype(np.uint8)).save(worn)
    config = {**TRAINING, "data": [f"{root}/{s}.zarr" for s in ("train", "validation")]}
    (root / "train.yaml").write_text(yaml.safe_dump({**config, "output": str(root / "runs")}))
    here = ("--no-prefect", "--json")
    computed = ("--model", root / "runs/pages/model", "--executor", "inline", "--no-prefect")
    ingests = [
        ("ingest", root / s, "--domain", "documents", "--split", s, "--to", root / f"{s}.zarr")
        for s in ("train", "validation")
    ]
    images = ("--domain", "documents", "--sigma-y", SIGMA_Y, "--input", root / "worn")
    tasks = ("--task", "document-noise", "--task", "document-stains")
    rows = ("--json", root / "rows.json", "--report", root / "report")
    sashiko(
        *[(*line, *here) for line in ingests],
        ("train", root / "train.yaml", *here),
        ("restore", *images, "--output", root / "out", *computed),
        ("evaluate", "--input", root / "test", *tasks, "--output", root / "eval", *rows, *computed),
        home=root / "home",
    )
    return root


def quality(clean: np.ndarray, image: np.ndarray) -> float:
    return psnr(clean / 255.0, np.clip(image / 255.0, 0, 1))


def test_restored_pages_beat_their_input_and_are_pages_again(folder):
    restored = sorted((folder / "out" / "files").glob("*.png"))
    assert [path.stem for path in restored] == ["report-11", "report-12"]
    for path, number in zip(restored, (11, 12), strict=True):
        clean = np.asarray(page(number))
        worn = np.asarray(Image.open(folder / "worn" / path.name))
        gain = quality(clean, np.asarray(Image.open(path))) - quality(clean, worn)
        assert gain > 1, f"{path.name}: {gain:.1f} dB"


def test_an_evaluation_of_the_guests_tasks_beats_what_was_measured(folder):
    rows = json.loads((folder / "rows.json").read_text())
    store = Measurements(folder / "eval" / "measurements.zarr")
    by_page = {quality_key(page(number)): np.asarray(page(number)) for number in (11, 12)}
    for entry in store.entries():
        measured = store.read(entry.item_id, entry.task)
        images = (measured.y[0, 0] + 1) * 127.5
        truth = next(clean for key, clean in by_page.items() if entry.truth_digest == key)
        of_item = [r for r in rows if (r["item"], r["task"]) == (entry.item_id, entry.task)]
        found = {row["method"]: row["psnr"] for row in of_item}
        assert found.keys() >= {"covprox", "kriging", "median", "tv"}
        assert found["covprox"] > quality(truth, images) + 1, entry.task
    assert "document-stains" in (folder / "report" / "index.html").read_text()


def quality_key(image: Image.Image) -> str:
    """The digest by which a measurement names its truth."""
    from domains.keyed import pixel_digest

    return pixel_digest(np.asarray(image)[None, None])
