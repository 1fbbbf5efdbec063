"""The report: one whole page that fetches nothing and says what the rows say."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from evaluation_kit import (
    TASKS,
    picture,
    settings,
)
from PIL import Image
from report_kit import HARM, photo, scan, synthetic_page

from domains.base import Item, ItemRecord, Measurement
from domains.between_slices import turned_record
from domains.city.domain import City
from domains.registry import load_domain
from flows.api_evaluate import evaluate
from flows.config import load_task, task_names
from flows.report import figure_strip, write_report
from flows.report.cases import choose, view_of
from flows.report.describe import measurement_words, task_title
from flows.report.page import MISSING, render
from flows.report.pictures import (
    ErrorScale,
    absolute_error,
    as_it_lies,
    busiest_window,
    encode,
    error_scale,
    round_up,
    windows_for,
)
from flows.report.rows import summarise

VOID = {"meta", "img", "input", "br", "hr", "link"}


class Outline(HTMLParser):
    """Checks that tags nest, and keeps attributes and the text of cells."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.cells, self.headings = [], [], [], []
        self._cell = None
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in {"td", "th"}:
            self._cell = []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in {"td", "th"}:
            self.cells[-1].append("".join(self._cell).strip())
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def html():
    return render(synthetic_page())


@pytest.fixture(scope="module")
def outline(html):
    return Outline(html)


def test_the_page_is_well_formed_and_its_references_hold(outline):
    ids = [attrs["id"] for _, attrs in outline.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = [a["href"] for a in outline.all("a")] + [
        f"#{attrs['aria-labelledby']}" for _, attrs in outline.tags if "aria-labelledby" in attrs
    ]
    assert {t.removeprefix("#") for t in targets} <= set(ids)
    assert all(image["alt"] is not None for image in outline.all("img"))
    assert [attrs["lang"] for attrs in outline.all("html")] == ["en"]


def test_the_page_fetches_nothing(html, outline):
    assert re.findall(r"https?:|//cdn|@import|url\((?!data:)", html) == []
    named = [v for _, attrs in outline.tags for k, v in attrs.items() if k in {"src", "srcset"}]
    assert named
    assert all(v.startswith("data:image/webp;base64,") for v in named)
    assert outline.all("link") == []
    policy = next(m["content"] for m in outline.all("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'")


def test_what_comes_from_outside_is_text(html):
    assert HARM not in html
    assert html.count("&lt;script&gt;document") == 2
    assert 'href="y.png"' not in html


def test_every_row_stands_in_the_table_with_its_figures(outline):
    for story in synthetic_page().stories:
        for row in story.rows:
            figures = [f"{row['psnr']:.2f}", "0.900", "0.0100", "1", "30", "1.2", "1280"]
            line = [row["item"], str(row["slice"]), row["method"]]
            found = [cells for cells in outline.cells if cells[:3] == line]
            assert len(found) == 1
            assert set(figures) <= set(found[0])


def test_means_gains_and_the_best_stand_in_the_figures(outline):
    for story in synthetic_page().stories:
        metric = "psnr_hole" if story.task.region == "hole" else "psnr"
        means = {}
        for row in story.rows:
            means.setdefault(row["method"], []).append(row[metric])
        means = {method: np.mean(values) for method, values in means.items()}
        bar = max(means["tv"], means["kriging"])
        gain = f"{means['covprox'] - bar:+.2f}"
        (line,) = [c for c in outline.cells if c[0].startswith("CovProx") and gain in c]
        assert line[1].startswith(f"{means['covprox']:.2f} ±")
    bold = [attrs for attrs in outline.all("td") if "best" in attrs.get("class", "").split()]
    assert len(bold) >= 4


def test_a_student_s_figures_are_ours_too():
    rows = synthetic_page().stories[0].rows
    [other] = summarise(rows)
    names = {"covprox": "distilled"}
    students = [{**r, "method": names.get(r["method"], r["method"])} for r in rows]
    [summary] = summarise(students)
    assert (summary.ours.method, summary.ours.gain_db) == ("distilled", other.ours.gain_db)
    better = [{**r, "psnr": r["psnr"] + 1} for r in students if r["method"] == "distilled"]
    [best] = summarise([*rows, *better])
    assert best.ours.method == "distilled"


def test_a_loss_is_shown_as_a_loss():
    rows = synthetic_page().stories[0].rows
    worse = [{**r, "psnr": r["psnr"] - 40 * (r["method"] == "covprox")} for r in rows]
    (summary,) = summarise(worse)
    assert summary.ours.gain_db < -10
    assert summary.best["psnr"] == {"diffpir"}
    assert summary.best_classical.method == "tv"


def test_equal_figures_share_the_honour():
    rows = [{**r, "ssim": 0.90001 if r["method"] == "tv" else 0.9} for r in
            synthetic_page().stories[0].rows]  # fmt: skip
    (summary,) = summarise(rows)
    assert summary.best["ssim"] == {"covprox", "diffpir", "kriging", "tv", "fbp"}


def test_less_edge_error_is_better():
    rows = [
        {**r, "edge_error": 0.001 if r["method"] == "fbp" else 0.01}
        for r in synthetic_page().stories[0].rows
    ]
    assert summarise(rows)[0].best["edge_error"] == {"fbp"}


def test_the_images_shown_are_those_of_least_median_and_greatest_gain():
    story = synthetic_page().stories[0]
    by = {(r["method"], r["slice"]): r["psnr"] for r in story.rows}
    gains = sorted((by["covprox", z] - by["tv", z], z) for z in range(5))
    chosen = choose(story.summary, story.rows)
    assert [z for (_, z), _ in chosen] == [gains[0][1], gains[2][1], gains[4][1]]
    assert [why.split(",")[0] for _, why in chosen] == [
        "smallest gain", "median gain", "largest gain",
    ]  # fmt: skip
    few = [row for row in story.rows if row["slice"] < 4]
    assert [z for (_, z), _ in choose(summarise(few)[0], few)] == [0, 1, 2, 3]


def test_hounsfield_units_are_shown_in_the_two_windows_named():
    record = ItemRecord("scan", "ct", (1, 1, 48, 48), "int16", "HU", "00", "nrrd")
    lung, soft = windows_for(scan(0), record, (-1000.0, 1 / 3000))
    ramp = np.array([-1350.0, -600.0, 150.0, 3000.0]).reshape(1, 1, 4)
    assert lung.show(ramp).tolist() == [[0, 128, 255, 255]]
    assert soft.show(ramp).tolist() == [[0, 0, 198, 255]]
    assert "\N{MINUS SIGN}600 ± 750 HU" in lung.label


def test_a_dim_picture_is_stretched_and_says_so():
    record = ItemRecord("scene", "city", (1, 1, 40, 64), "uint16", "counts", "00", "tiff")
    dim = photo(0)[:1] * 4
    (window,) = windows_for(dim, record, (0.0, 1 / 65535))
    assert window.label.startswith("stretched to")
    assert np.ptp(window.show(dim)) > 240
    (whole,) = windows_for(dim * 60, record, (0.0, 1 / 65535))
    assert (whole.low, whole.high) == (0.0, 65535.0)


def test_a_scan_with_a_rim_beside_its_coils_is_shown_by_its_median():
    magnitude = np.full((64, 64), 0.001)
    magnitude[8:56, 8:56], magnitude[8:10] = 2.0, 16.0
    phase = np.full((64, 64), 100.0)
    item = ItemRecord("scan", "mri", (2, 1, 64, 64), "float32", "intensity", "00", "bart")
    scale = load_domain("mri").unit_scale(np.stack([magnitude, phase])[:, None], item)
    assert 1 / scale[1] == pytest.approx(16.0)
    (window,) = windows_for(np.stack([magnitude, phase]), item, scale)
    assert (window.low, window.high) == (0.0, 5.0)
    assert window.label.startswith("0 to 5, 2.5 times the median of what is no background")
    assert window.show(np.stack([magnitude, phase]))[30, 30] == 102
    (plain,) = windows_for(magnitude[None], replace(item, source_format="nifti"), scale)
    assert plain.high == pytest.approx(16.0)


def test_error_maps_are_black_without_error_and_bright_at_full_scale():
    truth = photo(0)
    scale = ErrorScale(0.1)
    assert scale.show(truth, truth, 1 / 255).max() == 4
    assert scale.show(truth, truth + 25.5, 1 / 255)[0, 0].tolist() == [252, 255, 164]
    assert scale.end_label(1 / 3000, "HU") == "10% of the range = 300 HU"
    assert scale.gain == pytest.approx(10)


def test_the_error_scale_is_round_and_holds_ninety_nine_hundredths():
    errors = [np.linspace(0, 0.031, 1000)]
    assert error_scale(errors).full == 0.05
    assert [round_up(v) for v in (0.001, 0.0011, 2.0, 4.9, 51.0)] == [0.001, 0.002, 2, 5, 100]
    assert error_scale([np.zeros(5)]).full == 1.0
    assert absolute_error(np.zeros((2, 1, 1)), np.array([[[1.0]], [[np.nan]]])) == 0.5


def test_grey_pictures_are_encoded_without_loss():
    picture = np.random.default_rng(0).integers(0, 255, (20, 30), dtype=np.uint8)
    data = base64.b64decode(encode(picture, None).partition(",")[2])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data)).convert("L")), picture)


def test_a_strip_has_names_pictures_and_a_detail():
    grey, colour = np.full((50, 80), 90, np.uint8), np.full((50, 80, 3), 40, np.uint8)
    colour[25:35, 50:60] = np.random.default_rng(0).integers(0, 255, (10, 10, 3))
    detail = busiest_window(colour)
    assert detail[2] == 11
    assert detail[:2] == pytest.approx((25, 50), abs=2)
    strip = figure_strip([("One", "a", grey), ("Two", "b", colour)], tile_width=160, detail=detail)
    assert strip.shape == (12 + 44 + 100 + 12 + 160 + 12, 12 + 2 * 172, 3)
    assert strip[12 + 44 + 5, 12 + 5].tolist() == [90, 90, 90]
    assert strip[:50].min() < 100


def test_a_scan_seen_from_the_side_has_square_pixels_and_stands_on_its_feet():
    picture = np.arange(6, dtype=np.uint8).reshape(3, 2)
    affine = np.diag([-1.0, -1.0, 5.0, 1.0])
    volume = ItemRecord(
        "scan",
        "ct",
        (1, 3, 4, 2),
        "int16",
        "HU",
        "00",
        "nrrd",
        spacing_mm=(5.0, 1.2, 1.2),
        affine=affine.tolist(),
    )
    side = as_it_lies(picture, turned_record(volume))
    assert side.shape == (12, 2)
    assert side[:, 0].tolist() == [4] * 4 + [2] * 4 + [0] * 4
    hanging = replace(volume, affine=(affine * [1, 1, -1, 1]).tolist())
    assert as_it_lies(picture, turned_record(hanging))[0].tolist() == [0, 1]
    wide = replace(volume, spacing_mm=(5.0, 1.0, 2.1))
    assert as_it_lies(picture, wide).tolist() == picture.repeat(2, axis=1).tolist()
    still = replace(volume, spacing_mm=None, affine=None)
    assert as_it_lies(picture, still).tolist() == picture.tolist()


def test_a_sinogram_is_no_picture_though_it_has_two_axes():
    record = ItemRecord("scan", "ct", (1, 1, 64, 64), "int16", "HU", "00", "nrrd")
    sinogram = np.zeros((1, 1, 64, 64), np.float32)
    measured = Measurement(record, "ct-sparse60", "parallel-beam", {}, {}, sinogram)
    direct = np.full((1, 64, 64), 7.0)
    view = view_of(City(), measured, direct, "fbp")
    assert (view.label, view.missing) == ("FBP", None)
    assert view.pixels is direct


def test_fewer_pixels_are_shown_as_they_are_enlarged():
    pixels = picture(0, (3, 1, 32, 48))
    record = ItemRecord("still", "city", pixels.shape, "uint8", "intensity", "00" * 32, "png")
    measured = City().simulate(Item(pixels, record), load_task("sr-x4"), 0)
    view = view_of(City(), measured, None, None)
    assert view.label == "as measured"
    assert view.pixels.shape == (3, 32, 48)
    means = pixels[:, 0].reshape(3, 8, 4, 12, 4).mean(axis=(2, 4))
    # The noise has std 0.05 of 2 network units: 6.4 of 255.
    assert np.abs(view.pixels[:, ::4, ::4] - means).mean() < 7
    assert np.array_equal(view.pixels[:, 1::4, 3::4], view.pixels[:, ::4, ::4])


@pytest.fixture(scope="module")
def evaluation(clean_site):
    return evaluate(settings(clean_site, methods=["covprox", "kriging", "telea", "tv"]))


def test_a_report_of_an_evaluation_is_whole(evaluation, tmp_path):
    page = write_report(evaluation, tmp_path / "report", title="Trial")
    text = page.read_text()
    outline = Outline(text)
    assert page == tmp_path / "report" / "index.html"
    rows = [cells[:3] for cells in outline.cells]
    for row in evaluation.rows:
        assert [row["item"], str(row["slice"]), row["method"]] in rows
    assert evaluation.model.digest in text
    assert "A &lt;b&gt;test&lt;/b&gt; model." in text
    assert evaluation.facts["Dataset"] in text
    assert str(tmp_path.parent) not in text
    assert "https:" not in text
    pictures = tmp_path / "report" / "pictures"
    strips = sorted(pictures.glob("*.png"))
    assert [p.name for p in strips] == [f"{task}.png" for task in sorted(TASKS)]
    with Image.open(strips[0]) as strip:
        assert strip.width == 12 + 4 * 332
    for task in TASKS:
        with Image.open(pictures / f"{task}.webp") as film:
            assert film.n_frames == len({row["slice"] for row in evaluation.rows})
    assert len(list(pictures.iterdir())) == 2 * len(TASKS)


def test_the_measurement_is_shown_with_its_missing_pixels_marked(evaluation):
    from flows.report.page import show_view
    from flows.report.write import stories_of

    story = next(s for s in stories_of(evaluation) if s.task.name == "inpaint-strokes")
    for case in story.cases:
        (window,) = windows_for(case.truth, case.record, case.scale)
        shown, truth = show_view(case, window), window.show(case.truth)
        marked = (shown == MISSING).all(axis=-1)
        assert 0.1 < marked.mean() < 0.35
        known = truth if truth.ndim == 3 else np.stack([truth] * 3, axis=-1)
        assert np.abs(shown[~marked].astype(int) - known[~marked]).max() <= 1


def test_a_page_over_its_limit_is_compressed_harder(evaluation, tmp_path):
    fine = write_report(evaluation, tmp_path / "a").stat().st_size
    coarse = write_report(evaluation, tmp_path / "b", max_bytes=fine - 1).stat().st_size
    assert coarse < fine


def test_several_evaluations_make_one_page_and_name_the_model_once(evaluation, tmp_path):
    text = write_report([evaluation, evaluation], tmp_path / "both").read_text()
    assert text.count(f'Digest <code class="digest">{evaluation.model.digest}') == 1
    assert text.count(evaluation.facts["Dataset"]) == 1


@pytest.mark.parametrize("name", task_names())
def test_every_task_is_told_in_plain_words(name: str):
    task = load_task(name)
    assert task_title(task) != name
    words = measurement_words(task)
    assert not words.startswith("Operator")
    assert "{" not in words
