"""A mistake in a request is told before anything is started."""

from pathlib import Path

import pytest
from PIL import Image

from flows import cli, launch, quiet


@pytest.fixture(autouse=True)
def no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with one photograph and one mask; to start a server is an error."""
    monkeypatch.setenv("SASHIKO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(quiet, "hush", lambda: None)
    monkeypatch.setattr(launch, "start_prefect", None)
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "masks", "empty"):
        Path(folder).mkdir()
    Image.new("RGB", (32, 32)).save("photos/a.png")
    Image.new("L", (32, 32)).save("masks/a.png")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("ingest nope --domain ct --to o.zarr", "nope: there is no such file or folder"),
        ("ingest photos --domain xx --to o.zarr", "unknown domain 'xx': choose one of city, ct"),
        ("ingest empty --domain city --to o.zarr", "no city files"),
        ("ingest photos --domain city --to masks", "masks: it exists already"),
        ("evaluate --input nope --task inpaint-box", "nope: there is no such file or folder"),
        ("evaluate --input nope.zarr --task inpaint-box", "nope.zarr: not a store of ours"),
        (
            "evaluate --input photos --task inpaint-bx",
            "unknown task 'inpaint-bx': did you mean 'inpaint-box'?",
        ),
        ("evaluate --input photos --task inpaint-box --method tw", "unknown method 'tw'"),
        (
            "evaluate --input photos --task inpaint-box --method covproxx",
            "unknown method 'covproxx': did you mean 'covprox'? choose one of",
        ),
        (
            "evaluate --input photos --task inpaint-box --domain cty",
            "unknown domain 'cty': did you mean 'city'?",
        ),
        ("evaluate --input photos --task inpaint-box --model nope", "no model at nope"),
        ("restore --input nope --domain city --output o", "nope: there is no such file or folder"),
        (
            "restore --input photos --domain cty --output o",
            "unknown domain 'cty': did you mean 'city'? choose one of city",
        ),
        ("restore --input photos --mask masks --output o", "photos: images need --domain"),
        ("restore --input photos --domain cty --output o --plan", "unknown domain 'cty': did you"),
        ("restore --input photos --output o --no-prefect", "photos: images need --domain"),
        ("restore --input photos --domain city --output o", "say what is wrong with the images"),
        ("restore --input photos --domain city --mask x --output o", "x: there is no such mask"),
        (
            "restore --input photos --domain city --mask masks --output photos/a.png",
            "photos/a.png: it is a file; give a folder as output",
        ),
        (
            "restore --input photos --domain city --mask masks --output photos/a.png/o",
            "photos/a.png is a file; give a folder as output",
        ),
        (
            "restore --input photos --domain city --mask masks --output /proc/o",
            "/proc/o: nothing can be written there (no such file or directory); give a folder",
        ),
        ("explain --input photos --domain city --mask masks --output /proc/o", "sashiko: /proc/o:"),
        ("nightly --inbox nope --output o", "nope: there is no such folder"),
        ("review sashiko-ct --task ct-spars --yes", "unknown task 'ct-spars'"),
        ("review sashiko-ct --input nope --yes", "nope: there is no such dataset"),
        ("train train-tiny.yaml --set data=[nope.zarr]", "nope.zarr: not a store of ours"),
        ("train train-tiny.yaml --set conditions={cat: 1}", "no domain knows the condition 'cat'"),
    ],
)
def test_it_is_told_before_a_server_starts(command, words, capsys):
    arguments = command.replace(": 1", ":_1").split()
    assert cli.run([a.replace("_", " ") for a in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize("answer", [["--yes"], []])
def test_a_review_of_no_model_is_told_before_a_server_starts(answer, registry_home, capsys):
    assert cli.run(["review", "nope", "--candidate", "2", *answer]) == 2
    assert "no model is registered as nope" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "ingest photos --domain city --to o.zarr",
        "evaluate --input photos --task inpaint-box",
        "restore --input photos --domain city --mask masks --output o",
        "nightly --inbox photos --output o",
    ],
)
def test_what_can_be_done_goes_on_to_the_server(command, monkeypatch):
    started = []
    monkeypatch.setattr(launch, "start_prefect", lambda: lambda: started.append(True))
    monkeypatch.setattr(launch, "_run_flow", lambda *_: None)
    cli.run(command.split())
    assert started == [True]
