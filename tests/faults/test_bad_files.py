"""Fault 12: bad files through `sashiko restore`: each is told why, the others finish."""

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from engine_kit import published
from PIL import Image

from flows import cli, quiet


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SASHIKO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(quiet, "hush", lambda: None)


def pixels(height: int = 24, width: int = 32) -> np.ndarray:
    return np.random.default_rng(1).integers(1, 255, (height, width, 3), dtype=np.uint8)


def png(path: Path) -> None:
    Image.fromarray(pixels()).save(path)


def truncated(path: Path) -> None:
    png(path)
    path.write_bytes(path.read_bytes()[:-200])


def one_pixel(path: Path) -> None:
    Image.fromarray(pixels(1, 1)).save(path)


def bomb(path: Path) -> None:
    """A PNG of a few bytes that says it has 10 thousand million pixels."""

    def part(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    parts = part(b"IHDR", header) + part(b"IDAT", zlib.compress(b"\0" * 1000)) + part(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def tiff(values: np.ndarray) -> Callable[[Path], None]:
    return lambda path: tifffile.imwrite(path, values)


def with_a(value: float) -> np.ndarray:
    image = np.linspace(0, 1, 24 * 32, dtype=np.float32).reshape(24, 32)
    image[3, 4] = value
    return image


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty.png": (lambda path: path.write_bytes(b""), "empty"),
    "text.png": (lambda path: path.write_text("Dear sir"), "not a readable PNG"),
    "cut.png": (truncated, "not a readable PNG"),
    "dot.png": (one_pixel, "too small"),
    "bomb.png": (bomb, "pixels"),
    "nan.tif": (tiff(with_a(np.nan)), "NaN"),
    "inf.tif": (tiff(with_a(np.inf)), "infinite"),
    "complex.tif": (tiff(with_a(1).astype(np.complex64)), "complex64"),
    "picture.tif": (lambda path: path.write_bytes(_png_bytes()), "not a readable TIFF"),
    "dicom.jpg": (lambda path: path.write_bytes(bytes(128) + b"DICM" + bytes(500)), "JPEG"),
}


def _png_bytes() -> bytes:
    import io

    buffer = io.BytesIO()
    Image.fromarray(pixels()).save(buffer, "PNG")
    return buffer.getvalue()


def restore(folder: Path, output: Path) -> int:
    mask = folder.with_name("mask.png")
    hole = np.zeros(pixels().shape[:2], np.uint8)
    hole[5:8, 5:9] = 255
    Image.fromarray(hole).save(mask)
    arguments = ["restore", "--domain", "city", "--input", folder, "--output", output, "--mask"]
    how = [mask, "--method", "telea", "--executor", "inline", "--no-prefect", "--json"]
    return cli.run([str(a) for a in (*arguments, *how)])


def test_every_bad_file_is_quarantined_with_its_reason_and_the_good_ones_finish(tmp_path, capsys):
    images, output = tmp_path / "in", tmp_path / "out"
    images.mkdir()
    for name in ("one.png", "two.png"):
        values = pixels()
        values[5:8, 5:9] = 0
        values[0, 0] = len(name) + ord(name[0])
        Image.fromarray(values).save(images / name)
    for name, (make, _) in BAD.items():
        make(images / name)
    assert restore(images, output) == 3
    answer = json.loads(capsys.readouterr().out)
    told = {Path(entry["source"]).name: entry["reason"] for entry in answer["quarantined"]}
    assert told.keys() == BAD.keys()
    for name, (_, word) in BAD.items():
        assert word in told[name], name
        assert "Traceback" not in told[name]
    assert len(published(output)) == 2
    assert sorted(p.name for p in (output / "files").glob("*.png")) == ["one.png", "two.png"]
    # What was given up is listed, by codes, with the digest of the file.
    assert cli.run(["quarantine", "list", str(output), "--json"]) == 0
    listed = [g["entry"] for g in json.loads(capsys.readouterr().out)]
    assert sorted(e["reason"] for e in listed) == sorted(told.values())
    assert all(len(e["input_digest"]) == 64 and e["when"] for e in listed)
    assert not any(name in json.dumps(listed) for name in BAD)


def test_what_was_given_up_is_released_by_its_code_or_all_together(tmp_path, capsys):
    images, output = tmp_path / "in", tmp_path / "out"
    images.mkdir()
    values = pixels()
    values[5:8, 5:9] = 0
    Image.fromarray(values).save(images / "good.png")
    (images / "empty.png").write_bytes(b"")
    (images / "text.png").write_text("Dear sir")
    assert restore(images, output) == 3
    capsys.readouterr()
    cli.run(["quarantine", "list", str(output), "--json"])
    code = json.loads(capsys.readouterr().out)[0]["entry"]["item_id"]
    assert cli.run(["quarantine", "retry", str(output), code]) == 0
    assert capsys.readouterr().out.startswith("1 released")
    assert cli.run(["quarantine", "retry", str(output), code]) == 2
    assert f"'{code}' is not in quarantine" in capsys.readouterr().err
    assert cli.run(["quarantine", "retry", str(output)]) == 0
    assert capsys.readouterr().out.startswith("1 released")
    cli.run(["quarantine", "list", str(output)])
    assert capsys.readouterr().out == "nothing is in quarantine\n"
    assert restore(images, output) == 3
