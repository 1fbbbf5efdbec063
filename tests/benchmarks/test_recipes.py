"""What the comparison of recipes and that with FFDNet rest on."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from diffusion_core.training.throughput import flop_per_pixel
from tests.benchmarks import peer_call
from tests.benchmarks.recipes import VARIANTS, network_of, settings_of, table_of

TABLE = yaml.safe_load(VARIANTS.read_text())


@pytest.mark.parametrize("name", TABLE["variants"])
def test_a_variant_is_a_setting_of_the_product_and_within_a_quarter_of_the_limit(name):
    settings = settings_of(TABLE["variants"][name], TABLE["base"], Path("data.zarr"))
    kind = TABLE["variants"][name].get("kind", "local-unet")
    assert flop_per_pixel(network_of(settings, kind)) < 101e3
    assert settings.init_from is None


def test_the_table_tells_differences_from_the_reference():
    facts = {"kflop_per_pixel": 1, "inference_megapixels_per_s": 1, "steps": 1}
    facts["megapixels_seen"] = 1
    first = {"ct/sigma-0.1": 30.0, "ct/sigma-0.2": 28.0, "city/sigma-0.2": 25.0}
    second = {key: value + 0.5 for key, value in first.items()}
    rows = [{"variant": "reference", "psnr": first, **facts}]
    rows += [{"variant": "other", "psnr": second, **facts}]
    rows += [{"variant": "ct-alone", "psnr": {"ct/sigma-0.1": 31.0, "ct/sigma-0.2": 27.5}, **facts}]
    lines = table_of(rows).splitlines()
    assert lines[2].endswith("| 29.00 | 25.00 | 27.67 | 25.00 |")
    assert lines[3].endswith("| +0.50 | +0.50 | +0.50 | +0.50 |")
    assert lines[4].endswith("| +0.25 |  |  |  |")


def test_another_environments_function_gets_arrays_and_options(tmp_path):
    np.save(tmp_path / "in.npy", np.arange(6.0).reshape(2, 3))
    job = {"input": str(tmp_path / "in.npy"), "output": str(tmp_path / "out.npy")}
    line = json.dumps({**job, "options": {"axis": 1}})
    command = [sys.executable, "-P", peer_call.__file__, "numpy", "flip"]
    answer = subprocess.run(command, input=line, capture_output=True, text=True, check=True)
    assert answer.stdout == "done\n"
    assert np.load(tmp_path / "out.npy").tolist() == [[2.0, 1.0, 0.0], [5.0, 4.0, 3.0]]
