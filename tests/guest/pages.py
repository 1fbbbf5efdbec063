"""Pages as a reader of the financial news has them: headlines, columns of figures, a chart."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def page(number: int, size: tuple[int, int] = (96, 128)) -> Image.Image:
    """A page of dark ink on grey paper, different for every number; size is (h, w)."""
    rng = np.random.default_rng(number)
    height, width = size
    image = Image.new("L", (width, height), 235)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    draw.text((4, 2), f"Markets {rng.integers(1000, 9999)}", fill=20, font=font)
    for row in range(18, height // 2, 11):
        draw.text((4, row), f"{rng.integers(100, 999)}.{rng.integers(10, 99)}", 60, font=font)
    left, top = width // 2, 18
    draw.rectangle((left, top, width - 5, height - 8), outline=90)
    heights = height - 10 - np.cumsum(rng.uniform(-3, 6, 12)).clip(0, height - 32)
    steps = np.linspace(left + 2, width - 7, 12)
    draw.line([(float(x), float(y)) for x, y in zip(steps, heights, strict=True)], 30, width=2)
    for bar, x in enumerate(range(6, left - 8, 9)):
        draw.rectangle((x, height - 8 - 3 * ((bar * 7 + number) % 9), x + 5, height - 6), fill=120)
    return image


def save_pages(folder: Path, numbers: range) -> list[Path]:
    """Each number's page as a PNG in a folder of its own."""
    paths = [folder / f"report-{number}" / "page.png" for number in numbers]
    for path, number in zip(paths, numbers, strict=True):
        path.parent.mkdir(parents=True)
        page(number).save(path, dpi=(300, 300))
    return paths
