"""The report in a real browser: every picture decodes, every control moves, nothing is fetched.

Chromium runs headless on the page with a script added that works its controls and leaves what it
saw in the document, which `--dump-dom` prints.
"""

from __future__ import annotations

import html as html_text
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_kit import synthetic_page

from flows.report.page import render

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]

HELPERS = """
const errors = [], refused = [];
addEventListener("error", (event) => errors.push(String(event.message)));
document.addEventListener("securitypolicyviolation", (event) => refused.push(event.blockedURI));
const $ = (selector, within = document) => within.querySelector(selector);
const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];
const seen = (element) => element.offsetParent !== null;
const turn = (control, value, kind = "input") => {
  control.value = value;
  control.dispatchEvent(new Event(kind, { bubbles: true }));
};
const press = (key) => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
"""


def in_browser(page: str, check: str, folder: Path, *options: str) -> dict:
    """What `check`, an async function body, returns in the page; with the page's own troubles."""
    script = f"""<script id="helper">{HELPERS}
addEventListener("load", async () => {{
  let found;
  try {{
    found = await (async () => {{ {check} }})();
  }} catch (error) {{
    found = {{ failed: String(error) }};
  }}
  document.documentElement.dataset.found = JSON.stringify({{ ...found, errors, refused }});
}});</script></head>"""
    path = folder / "page.html"
    path.write_text(page.replace("</head>", script, 1))
    text = chromium(path, folder, "--dump-dom", *options)
    found = re.search(r'data-found="([^"]*)"', text)
    assert found, "the check did not come to an end"
    result = json.loads(html_text.unescape(found[1]))
    assert "failed" not in result, result["failed"]
    assert result["errors"] == []
    return result


def chromium(path: Path, folder: Path, *options: str) -> str:
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}",
        "--window-size=1280,900", "--virtual-time-budget=4000", *options, path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def page():
    return render(synthetic_page())


def test_every_picture_decodes_and_nothing_is_fetched(page, tmp_path):
    check = """
    const images = $$(".tile img");
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const varied = (image) => {  // drawing decodes, whether the picture is shown now or hidden
      canvas.drawImage(image, 0, 0, 32, 32);
      return new Set(canvas.getImageData(0, 0, 32, 32).data).size > 3;
    };
    const decoded = images.filter((image) => image.complete && varied(image)).length;
    const loaded = performance.getEntriesByType("resource").map((entry) => entry.name);
    const fetched = loaded.filter((name) => !name.startsWith("data:"));
    const stray = new Image();
    stray.src = "http://127.0.0.1:9/stray.png";
    document.body.append(stray);
    await new Promise((resolve) => setTimeout(resolve, 200));
    return { images: images.length, decoded, fetched };"""
    found = in_browser(page, check, tmp_path)
    # CT: three images of 4 pictures in two windows and 2 error maps; photographs: two of 6.
    assert found["images"] == found["decoded"] == 3 * 10 + 2 * 6
    assert found["fetched"] == []
    assert found["refused"] == ["http://127.0.0.1:9/stray.png"]


def test_slice_window_and_slider_answer_their_controls(page, tmp_path):
    check = """
    const task = $("#ct-sparse60"), box = () => $(".case.shown", task);
    const cases = () => $$(".case", task).filter(seen).map((one) => one.dataset.case);
    const before = cases();
    const second = $$(".pick input", task)[1];
    second.checked = true;
    second.dispatchEvent(new Event("change", { bubbles: true }));
    const after = cases();
    const stage = $(".stage", box()), range = $("input[type=range]", stage);
    const edge = () => getComputedStyle($(".before", stage)).clipPath;
    const source = (side) => $(side, stage).src.length && $(side, stage).src;
    const at50 = edge();
    turn(range, 20);
    const at20 = edge(), said = range.getAttribute("aria-valuetext");
    const tile = (role, index) => $$(`.tile-${role} img`, box())[index].src;
    const left = source(".before") === tile("view", 0);
    const right = source(".after") === tile("ours", 0);
    const soft = $$(".window input", task)[1];
    soft.checked = true;
    soft.dispatchEvent(new Event("change", { bubbles: true }));
    const softLeft = source(".before") === tile("view", 1);
    const truths = $$(".tile-truth img", box()).filter(seen);
    const shownWindows = truths.map((image) => image.dataset.window);
    turn($("select.left", box()), "truth");
    return { before, after, at50, at20, said, left, right, softLeft, shownWindows,
      truth: source(".before") === tile("truth", 1), focusable: range.tabIndex };"""
    found = in_browser(page, check, tmp_path)
    assert (found["before"], found["after"]) == (["0"], ["1"])
    assert "50%" in found["at50"]
    assert "80%" in found["at20"]
    assert found["said"] == "20% Measured: FBP, the rest CovProx (ours)"
    assert found["left"]
    assert found["right"]
    assert found["softLeft"]
    assert found["shownWindows"] == ["1"]
    assert found["truth"]
    assert found["focusable"] == 0


def test_the_viewer_zooms_and_pans_all_pictures_together(page, tmp_path):
    check = """
    const wait = () => new Promise((resolve) => setTimeout(resolve, 50));
    const state = () => $$(".pane").filter(seen).map((pane) => $("img", pane).style.transform);
    const dialog = $("#viewer"), first = $(".case.shown .tile-truth .open");
    first.focus();
    first.click();
    await wait();
    const opened = dialog.open, panes = state().length, fit = state();
    const pane = $(".pane"), area = pane.getBoundingClientRect();
    const corner = { clientX: area.left + 10, clientY: area.top + 10, cancelable: true };
    pane.dispatchEvent(new WheelEvent("wheel", { ...corner, deltaY: -800 }));
    const zoomed = state(), label = $("#viewer-zoom").textContent;
    const crisp = pane.classList.contains("crisp");
    const point = { ...corner, pointerId: 1, isPrimary: true };
    pane.setPointerCapture = () => {};
    pane.dispatchEvent(new PointerEvent("pointerdown", point));
    pane.dispatchEvent(new PointerEvent("pointermove", { ...point, clientX: point.clientX - 25 }));
    pane.dispatchEvent(new PointerEvent("pointerup", point));
    const dragged = state();
    press("0");
    const back = state();
    press("+"); press("ArrowRight");
    const keyed = state();
    press("4");
    const solo = $$(".pane").filter(seen).map((one) => $("b", one).textContent);
    $("[data-do=solo]").click();
    const together = state().length;
    $("[data-do=close]").click();
    await wait();
    return { opened, panes, fit, zoomed, label, crisp, dragged, back, keyed, solo, together,
      closed: !dialog.open, focus: document.activeElement === first };"""
    found = in_browser(page, check, tmp_path)
    assert found["opened"]
    assert found["panes"] == found["together"] == 6
    for name in ("fit", "zoomed", "dragged", "back", "keyed"):
        assert len(set(found[name])) == 1, name
    assert found["label"] == "4.2\N{MULTIPLICATION SIGN}"
    assert found["crisp"]
    assert offset(found["zoomed"]) != offset(found["fit"])
    assert offset(found["dragged"])[0] == pytest.approx(offset(found["zoomed"])[0] - 25, abs=0.1)
    assert found["back"] == found["fit"]
    assert offset(found["keyed"])[0] < offset(found["fit"])[0]
    assert found["solo"] == ["CovProx (ours)"]
    assert found["closed"]
    assert found["focus"]


def offset(transforms):
    return [float(n) for n in re.findall(r"(-?[\d.]+)px", transforms[0])]


def test_what_lies_under_the_pointer_stays_there(page, tmp_path):
    check = """
    $(".case.shown .tile-ours .open").click();
    await new Promise((resolve) => setTimeout(resolve, 50));
    const pane = $(".pane"), area = pane.getBoundingClientRect(), image = $("img", pane);
    const at = { x: area.left + area.width * 0.6, y: area.top + area.height * 0.4 };
    const under = () => {
      const box = image.getBoundingClientRect();
      return [(at.x - box.left) / box.width, (at.y - box.top) / box.height];
    };
    const turn = { clientX: at.x, clientY: at.y, deltaY: -600, cancelable: true };
    const before = under();
    pane.dispatchEvent(new WheelEvent("wheel", turn));
    const near = under();
    pane.dispatchEvent(new WheelEvent("wheel", turn));
    return { before, near, nearer: under() };"""
    found = in_browser(page, check, tmp_path)
    assert found["near"] == pytest.approx(found["before"], abs=2e-3)
    assert found["nearer"] == pytest.approx(found["before"], abs=2e-3)


def test_light_and_dark_can_be_chosen_and_both_can_be_read(page, tmp_path):
    check = """
    const colours = () => {
      const style = getComputedStyle(document.body);
      return [style.color, style.backgroundColor];
    };
    const button = $("#theme"), first = [colours(), button.getAttribute("aria-label")];
    button.click();
    return { first, second: [colours(), button.getAttribute("aria-label")] };"""
    found = in_browser(page, check, tmp_path)
    assert found["first"][1] != found["second"][1]
    for colours, _ in (found["first"], found["second"]):
        assert contrast(*colours) > 7
    assert found["first"][0] != found["second"][0]


def contrast(ink, paper):
    """Of two rgb() colours, as WCAG 2 defines it."""

    def luminance(colour):
        parts = np.array([int(n) for n in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    high, low = sorted((luminance(ink), luminance(paper)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_no_width_makes_the_page_scroll_sideways(page, tmp_path):
    # A window has a least width; a frame has none. Each frame holds the page itself.
    check = """
    $("#helper").remove();
    const whole = document.documentElement.outerHTML, widths = {};
    for (const width of [340, 700, 1000, 1600]) {
      const frame = document.createElement("iframe");
      frame.style.cssText = `width:${width}px;height:600px`;
      document.body.replaceChildren(frame);
      await new Promise((resolve) => {
        frame.addEventListener("load", resolve);
        frame.srcdoc = whole;
      });
      const page = frame.contentDocument.documentElement;
      widths[width] = [page.clientWidth, page.scrollWidth, $$(".card", page).length];
    }
    return { widths };"""
    found = in_browser(page, check, tmp_path)
    for width, (given, needed, cards) in found["widths"].items():
        assert given == needed <= int(width)
        assert cards == 2


def test_without_its_script_the_page_shows_every_image(page, tmp_path):
    bare = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    check = """
    return { cases: $$(".case").filter(seen).length, names: $$(".case-name").filter(seen).length,
      dead: $$(".compare, .controls, #theme").filter(seen).length };"""
    found = in_browser(bare, check, tmp_path)
    assert (found["cases"], found["names"], found["dead"]) == (5, 5, 0)


def test_a_screenshot_shows_cloth_cards_and_text(page, tmp_path):
    path, shot = tmp_path / "index.html", tmp_path / "shot.png"
    path.write_text(page)
    chromium(path, tmp_path, f"--screenshot={shot}")
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape[:2] == (900, 1280)
    indigo = np.abs(pixels - (39, 52, 107)).sum(axis=-1) < 12
    assert indigo[:150].mean() > 0.6
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200
