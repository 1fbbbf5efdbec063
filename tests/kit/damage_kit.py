"""Damage to files, and whether anything was touched."""

import hashlib
from pathlib import Path


def flip_a_bit(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def content_of(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file below a folder: time of its last change, and sha256."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def visible(output: Path) -> dict[str, tuple[int, str]]:
    """Every file that belongs to what readers can see: manifests, and the folders they name."""
    from flows.engine.restored import open_restored

    if not (output / "manifests").is_dir():
        return {}
    found = {f"manifest {k}": v for k, v in content_of(output / "manifests").items()}
    for entry in open_restored(output).items():
        found |= {f"{entry.key} {k}": v for k, v in content_of(entry.path).items()}
    return found
