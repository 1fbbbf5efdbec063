"""Samples in an evaluation: other seeds, the rows of one and of their mean, V/B as defined."""

from pathlib import Path

import numpy as np
import pytest
from evaluation_kit import INLINE, make_dataset, make_model, settings

from domains.base import BadInputError
from domains.metrics import psnr
from flows.api_evaluate import EvaluateResult, evaluate
from flows.engine.restored import open_restored
from flows.sampling import pooled, pooled_text
from flows.store import Dataset, Measurements

TASK = "inpaint-random70"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sampling")
    make_dataset(root / "clean.zarr")
    make_model(root / "model")
    return root


@pytest.fixture(scope="module")
def told() -> list[str]:
    """What the evaluation below said while it ran."""
    return []


@pytest.fixture(scope="module")
def result(root, told) -> EvaluateResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SASHIKO_HOME", str(root / "home"))
        return evaluate(
            settings(root, tasks=[TASK], methods=["covprox"], items=["still"], num_samples=3),
            lambda event: told.append(event.message),
        )


def row_of(result, method):
    (row,) = [row for row in result.rows if row["method"] == method]
    return row


def sampled_pixels(result):
    entries = open_restored(result.output).items()
    samples = [e for e in entries if e.key not in result.keys]
    return np.stack([open_restored(result.output).read(e)[:, 0] for e in samples]) / 255.0


def test_one_sample_the_mean_of_samples_and_the_mean_mode_are_rows_of_their_own(result):
    assert {row["method"] for row in result.rows} == {
        "covprox",
        "covprox-sample",
        "covprox-samples",
    }
    pixels = sampled_pixels(result)
    assert len(pixels) == 3
    assert not np.array_equal(pixels[0], pixels[1])
    truth = Dataset(result.dataset).read("still").pixels[:, 0] / 255.0
    mean = np.clip(pixels.mean(axis=0), 0, 1)
    one, many = row_of(result, "covprox-sample"), row_of(result, "covprox-samples")
    assert many["psnr"] == pytest.approx(psnr(truth, mean), abs=0.05)
    alone = [psnr(truth, np.clip(sample, 0, 1)) for sample in pixels]
    assert min(abs(one["psnr"] - value) for value in alone) < 1e-3
    assert many["nfe"] == 3 * one["nfe"] == 3 * row_of(result, "covprox")["nfe"]
    assert many["residual"] is None
    assert one["residual"] > 0


def test_the_sample_that_is_drawn_is_told(result, told):
    steps = [message for message in told if "restoring: 1 item," in message]
    assert steps[0].startswith("restoring")
    assert [s.partition(": ")[0] for s in steps[1:]] == [f"sample {k} of 3" for k in (1, 2, 3)]


def test_v_over_b_is_that_of_the_definition_on_the_hole(result):
    pixels = sampled_pixels(result)
    truth = Dataset(result.dataset).read("still").pixels[:, 0] / 255.0
    measurement = Measurements(result.measurements).read("still", TASK)
    hole = ~measurement.arrays["mask"][0].astype(bool)
    variance = (1 + 1 / 3) * pixels.var(axis=0, ddof=1)[hole].sum()
    error = ((truth - pixels.mean(axis=0)) ** 2)[hole].sum()
    row = row_of(result, "covprox-samples")
    assert row["v_over_b"] == pytest.approx(variance / error, rel=1e-4)
    assert row["sample_variance"] == pytest.approx(variance, rel=1e-4)
    assert row["num_samples"] == 3
    assert f"{TASK}: V/B {row['v_over_b']:.2f}" in result.table()


def test_pooling_weighs_slices_by_their_error():
    common = {"method": "covprox-samples", "task": "t"}
    rows = [
        common | {"sample_variance": 1.0, "sample_error": 2.0, "v_over_b": 0.5},
        common | {"sample_variance": 3.0, "sample_error": 2.0, "v_over_b": 1.5},
        {"method": "covprox", "task": "t"},
    ]
    rows[0]["log_correlation"], rows[1]["log_correlation"] = 0.8, None
    assert pooled(rows) == {"t": {"v_over_b": 1.0, "v_over_b_std": 0.5, "log_correlation": 0.8}}
    told = "t: V/B 1.00 (over slices +-0.50): the samples' spread matches their error; log-corr"
    assert pooled_text(rows).startswith(told)
    assert pooled_text(rows[2:]) == ""


@pytest.mark.parametrize(
    ("variance", "words"),
    [
        (0.79, "closer together than they are wrong"),
        (0.81, "spread matches their error"),
        (1.24, "spread matches their error"),
        (1.26, "further apart than they are wrong"),
    ],
)
def test_the_ratio_is_put_into_words_and_one_slice_has_no_deviation(variance, words):
    row = {"method": "covprox-samples", "task": "t", "sample_variance": variance}
    row |= {"sample_error": 1.0, "v_over_b": variance, "log_correlation": None}
    text = pooled_text([row])
    assert text.startswith(f"t: V/B {variance:.2f}: ")
    assert text.endswith(words)


def test_one_sample_is_refused(root):
    with pytest.raises(BadInputError, match="two or more"):
        evaluate(settings(root, compute=INLINE, num_samples=1))
