"""The command line: starts fast, says one clear sentence, exits with the code that is promised."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from domains.base import BadInputError
from flows import cli, quiet
from flows.api_train import TrainResult
from flows.config import TrainSettings, config_path, read_settings

HEAVY = ("torch", "ray", "prefect", "mlflow", "monai", "zarr", "pydantic", "matplotlib", "numpy")


@pytest.fixture(autouse=True)
def quiet_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home of the test's own; warnings stay errors here."""
    monkeypatch.setenv("SASHIKO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(quiet, "hush", lambda: None)


def sashiko(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run a command line in this process: (exit code, stdout, stderr)."""
    code = cli.run([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def assert_one_sentence(err: str, *words: str) -> None:
    (line,) = err.strip().splitlines()
    assert line.startswith("sashiko: ")
    assert "Traceback" not in err
    for word in words:
        assert word in line


def test_the_command_imports_nothing_that_takes_time():
    code = f"import sys, flows.cli; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_answers_in_half_a_second():
    command = [sys.executable, "-c", "import flows.cli; flows.cli.main(['--help'])"]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
        assert done.stdout.startswith("Usage: sashiko")
    assert min(times) < 0.5


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]):
    for name in cli.cli.commands:
        code, out, _ = sashiko(capsys, name, "--help")
        assert code == 0
        assert f"sashiko {name}" in out


def test_importing_any_flow_module_switches_telemetry_off():
    code = "import os, json, flows.config; print(json.dumps(dict(os.environ)))"
    clean = {k: v for k, v in os.environ.items() if k not in quiet.TELEMETRY_OFF}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean
    )
    seen = json.loads(done.stdout)
    assert {k: seen.get(k) for k in quiet.TELEMETRY_OFF} == quiet.TELEMETRY_OFF


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (BadInputError("a.png: it is empty; export it again"), 2, ["a.png: it is empty"]),
        (RuntimeError("the disk\nis full"), 1, ["RuntimeError: the disk is full", "SASHIKO_DEBUG"]),
    ],
)
def test_errors_are_one_sentence(
    raised: Exception,
    code: int,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def fail() -> None:
        raise raised

    monkeypatch.setattr("flows.registry.models", fail)
    got, out, err = sashiko(capsys, "models")
    assert (got, out) == (code, "")
    assert_one_sentence(err, *words)


def test_debugging_shows_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def fail() -> None:
        raise BadInputError("a.png: it is empty")

    monkeypatch.setattr("flows.registry.models", fail)
    monkeypatch.setenv("SASHIKO_DEBUG", "1")
    code, _, err = sashiko(capsys, "models")
    assert code == 2
    assert "Traceback" in err


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, click.Abort])
@pytest.mark.parametrize(
    ("command", "function", "goes_on"),
    [
        ("restore --input x --output o", "flows.launch.run", True),
        ("generate --domain ct --output o", "flows.launch.run", False),
        ("inspect x", "flows.api_inspect.inspect", False),
        ("models", "flows.registry.models", False),
    ],
)
def test_an_interruption_exits_130_and_says_how_to_go_on_where_that_is_so(
    command: str,
    function: str,
    goes_on: bool,
    interruption: type[BaseException],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def stop(*given: object, **options: object) -> None:
        raise interruption

    monkeypatch.setattr(function, stop)
    code, _, err = sashiko(capsys, *command.split())
    assert code == 130
    assert_one_sentence(err, "interrupted")
    assert ("the same command goes on" in err) == goes_on


def test_an_interruption_of_ray_s_waiting_is_one_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def stop() -> None:
        raise SystemError("returned a result with an exception set") from KeyboardInterrupt()

    monkeypatch.setattr("flows.registry.models", stop)
    assert sashiko(capsys, "models")[0] == 130


def test_a_text_file_named_nifti_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bad = tmp_path / "scan.nii.gz"
    bad.write_text("Dear doctor, this is not an image.\n")
    arguments = ("ingest", bad, "--domain", "ct", "--to", tmp_path / "ds.zarr", "--no-prefect")
    code, _, err = sashiko(capsys, *arguments)
    assert code == 2
    assert "Traceback" not in err
    assert "scan.nii.gz" in err.splitlines()[-1]
    assert not (tmp_path / "ds.zarr").exists()


def test_an_empty_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "in").mkdir()
    out = tmp_path / "ds.zarr"
    code, _, err = sashiko(
        capsys, "ingest", tmp_path / "in", "--domain", "city", "--to", out, "--no-prefect"
    )
    assert code == 2
    assert_one_sentence(err, str(tmp_path / "in"))


def test_a_one_pixel_image_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Image.fromarray(np.zeros((1, 1, 3), np.uint8)).save(tmp_path / "dot.png")
    out = tmp_path / "ds.zarr"
    arguments = ("ingest", tmp_path / "dot.png", "--domain", "city", "--to", out, "--no-prefect")
    code, _, err = sashiko(capsys, *arguments)
    assert code == 2
    assert "Traceback" not in err
    assert "dot.png" in err.splitlines()[-1]


def test_an_unknown_domain_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, _, err = sashiko(
        capsys, "ingest", tmp_path, "--domain", "xray", "--to", tmp_path / "o", "--no-prefect"
    )
    assert code == 2
    assert_one_sentence(err, "xray", "ct", "city")


def test_an_unknown_task_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(tmp_path / "a.png")
    data = tmp_path / "ds.zarr"
    sashiko(capsys, "ingest", tmp_path / "a.png", "--domain", "city", "--to", data, "--no-prefect")
    code, _, err = sashiko(
        capsys, "simulate", data, "--task", "ct-sparse99", "--to", tmp_path / "m.zarr"
    )
    assert code == 2
    assert_one_sentence(err, "ct-sparse99", "ct-sparse60")


def test_a_missing_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pixels = np.full((32, 32, 3), 90, np.uint8)
    pixels[8:12] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    arguments = ("restore", "--input", tmp_path / "a.png", "--domain", "city", "--mask", "auto")
    code, _, err = sashiko(
        capsys,
        *arguments,
        *("--output", tmp_path / "out", "--model", tmp_path / "no-model", "--no-prefect"),
    )
    assert code == 2
    assert "Traceback" not in err
    assert "no model at" in err.splitlines()[-1]


def test_a_setting_that_does_not_exist_is_named(capsys: pytest.CaptureFixture[str]):
    code, _, err = sashiko(capsys, "train", "train-tiny.yaml", "--set", "num_stepz=3")
    assert code == 2
    assert_one_sentence(err, "--set num_stepz=3: ", "did you mean 'num_steps'?")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("num_stepz: 3", "typed.yaml: there is no setting 'num_stepz': did you mean 'num_steps'?"),
        ("num_workers: 1", "did you mean 'compute.num_workers'?"),
        ("score: {every_step: 3}", "'score.every_step': did you mean 'score.every_steps'?"),
        ("xyzzy: 3", "there is no setting 'xyzzy'; there are name, data, "),
        ("num_steps: 0", "typed.yaml: the setting 'num_steps' cannot be 0: give 1 or more"),
    ],
)
def test_a_mistyped_key_of_a_file_is_told_with_the_file_and_the_nearest(line, words, tmp_path):
    key = line.partition(":")[0]
    shipped = config_path("train-tiny.yaml").read_text().splitlines()
    kept = [text for text in shipped if not text.startswith(f"{key}:")]
    (tmp_path / "typed.yaml").write_text("\n".join([*kept, line]))
    with pytest.raises(BadInputError) as caught:
        read_settings(TrainSettings, tmp_path / "typed.yaml", ["seed=3"])
    assert words in str(caught.value)


def test_set_reaches_into_nested_settings_and_reads_yaml():
    changes = ["network.num_features=8", "conditions={ct: 1.0}", "seed=5", "dtype=float32"]
    settings = read_settings(TrainSettings, Path("train-tiny.yaml"), changes)
    assert settings.network["num_features"] == 8
    assert settings.network["widths"] == [32, 48, 64]
    assert settings.conditions == {"ct": 1.0}
    assert (settings.seed, settings.dtype) == (5, "float32")


@pytest.mark.parametrize("change", ["seed", "=3", "a..b=1", "name.x=1", "seed=[1"])
def test_a_malformed_set_is_refused(change: str):
    with pytest.raises(BadInputError):
        read_settings(TrainSettings, Path("train-tiny.yaml"), [change])


def test_review_without_anyone_to_ask_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("flows.checks.check", lambda settings: None)  # there is such a model
    code, _, err = sashiko(capsys, "review", "sashiko-ct")
    assert code == 2
    assert "--yes or --no" in err


def test_an_empty_registry_is_said_and_json_is_json(
    capsys: pytest.CaptureFixture[str], registry_home: Path
):
    assert sashiko(capsys, "models")[:2] == (0, "no model is registered yet\n")
    code, out, _ = sashiko(capsys, "models", "--json")
    assert (code, json.loads(out)) == (0, [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["restore", "--input", "x", "--output", "o", "--levels", "0"], "be 0: give 1 or more"),
        (["restore", "--input", "x", "--output", "o", "--workers", "-1"], "be -1: give 0 or more"),
        (["restore", "--input", "x", "--output", "o", "--memory-limit-gb", "0"],
         "be 0: give a number above 0"),
        (["restore", "--input", "x", "--output", "o", "--scale", "99"], "be 99: give 16 or less"),
        (["restore", "--input", "x", "--output", "o", "--damage", "hase"],
         "be hase: did you mean 'haze'? choose one of jpeg, haze, low-light"),
        (["restore", "--input", "x", "--output", "o", "--noise", "gray"],
         "be gray: choose one of gaussian, rician"),
        (["serve", "--cron", "nonsense"], "be used: "),
        (["serve", "--timezone", "Mars/Olympus"], "be used: "),
    ],
)  # fmt: skip
def test_values_out_of_range_are_told_before_anything_starts(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr("flows.launch.run", None)
    monkeypatch.setattr("flows.serve.start", None)
    assert cli.run(arguments) == 2
    assert f"{arguments[-2]} cannot {words}" in capsys.readouterr().err


@pytest.mark.parametrize("version", ["-1", "champion", "1.0"])
def test_a_version_that_is_no_number_is_told(version, registry_home, capsys):
    code, _, err = sashiko(capsys, "promote", "sashiko-ct", "--", version)
    assert code == 2
    assert_one_sentence(err, f"'{version}' is no version of sashiko-ct: versions are numbers")


def test_an_output_that_is_a_file_is_a_mistake_of_the_user(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SASHIKO_HOME", str(tmp_path / "home"))
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "photos/a.png")
    (tmp_path / "taken").write_text("")
    asked = ["ingest", str(tmp_path / "photos"), "--domain", "city", "--no-prefect", "--to"]
    assert cli.run([*asked, str(tmp_path / "taken/x.zarr")]) == 2
    assert "taken" in capsys.readouterr().err


def test_computing_options_reach_the_settings(monkeypatch):
    asked = []

    def note(command, settings, **more):
        asked.append(settings)
        raise BadInputError("enough")

    monkeypatch.setattr("flows.launch.run", note)
    given = "--gpus-per-worker 0.5 --memory-limit-gb 4 --ray-address auto --workers 3"
    cli.run(["restore", "--input", "x", "--output", "o", *given.split()])
    compute = asked[0].compute
    assert (compute.num_gpus_per_worker, compute.memory_limit_bytes) == (0.5, 4_000_000_000)
    assert (compute.ray_address, compute.num_workers) == ("auto", 3)


def test_sigterm_ends_a_command_in_order(tmp_path):
    code = (
        "import sys, time, flows.launch as launch\n"
        "from flows import cli\n"
        "def wait(*a, **k):\n"
        "    print('waiting', flush=True)\n"
        "    time.sleep(600)\n"
        "launch.run = wait\n"
        "sys.exit(cli.run(['restore', '--input', 'x', '--output', 'o']))"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with command:
        assert command.stdout is not None
        assert command.stdout.readline() == "waiting\n"
        command.terminate()
        _, err = command.communicate(timeout=60)
    assert command.returncode == 130
    assert "goes on where it stopped" in err


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"sashiko-ct": "2"}, "registered: sashiko-ct version 2; it is used once `sashiko review"),
        ({}, "not registered (register_as is empty)"),
    ],
)
def test_training_says_what_is_left_to_do(versions, words, tmp_path, capsys, monkeypatch):
    done = TrainResult(tmp_path, "0" * 64, 3, {}, versions)
    monkeypatch.setattr("flows.launch.run", lambda *_, **__: done)
    _, out, _ = sashiko(capsys, "train", "train-tiny.yaml")
    assert words in out.splitlines()[1]
