"""`sashiko train CONFIG --curve 2,4,8,16`: would more data help?

A training for every number of slices and every draw of them, each a run of its own that a killed
command goes on with. All are scored by the same validation images, none of which any of them
learned from or was ended by: those of the data, or slices set aside before the others are drawn.

runs/NAME-curve/
  curve.json     the points, the gains, the verdict
  curve.png      the figure
runs/NAME-4-1/   the training of 4 slices, draw 1 ...
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from domains.base import BadInputError
from flows.api_train import learned_from, new_network, resolved, train, training_data
from flows.config import FewSettings, Home, TrainSettings
from flows.engine.events import Event
from flows.training.data import records_of
from flows.training.score import Score, restoration_score

CURVE, PICTURE = "curve.json", "curve.png"
NUM_IMAGES = 8
"""That the points are scored by, where there are as many."""
WORTH_DB = 0.1
"""A gain below it is not worth the work of doubling the data."""
LEVEL = 0.9
"""Of the two-sided intervals."""
_HELD_OUT_SHARE = 0.25

OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class Point:
    """What a number of slices is worth.

    Attributes:
        slices: learned from and held out; 0 is the network that the training begins with.
        scores: restoration PSNR in dB, a row a draw, a column a validation image.
    """

    slices: int
    scores: list[list[float]]

    @property
    def db(self) -> float:
        """The mean."""
        return _mean([_mean(row) for row in self.scores])


@dataclass(frozen=True)
class Gain:
    """What the larger of two numbers of slices is above the smaller, in dB.

    Attributes:
        fewer: slices.
        more: slices.
        db: mean over draws and validation images.
        low: end of the interval of LEVEL.
        high: the other end.
    """

    fewer: int
    more: int
    db: float
    low: float
    high: float


@dataclass(frozen=True)
class LearningCurve:
    """What `sashiko train --curve` found.

    Attributes:
        points: by number of slices.
        gains: from each to the next.
        verdict: in words.
        path: folder of curve.json and curve.png.
    """

    points: list[Point]
    gains: list[Gain]
    verdict: str
    path: Path


def learning_curve(
    settings: TrainSettings,
    sizes: Sequence[int],
    *,
    draws: int = 2,
    set_aside: int = 4,
    on_event: OnEvent | None = None,
) -> LearningCurve:
    """Train on so many slices each, and say whether more would help.

    Args:
        settings: of the trainings; of `few` only the share that is held out counts.
        sizes: numbers of slices, two at least.
        draws: choices of the slices for each number.
        set_aside: slices to score by, if the data have no validation items.
        on_event: told of progress.

    Raises:
        BadInputError: if the settings or the data cannot be used, or hold too few slices.
    """
    report = on_event or (lambda _event: None)
    sizes = sorted(set(sizes))
    if len(sizes) < 2 or sizes[0] < 2 or draws < 1:
        raise BadInputError(
            "a curve needs two numbers of slices at least, each of 2 or more (one of them is held "
            "out), and a draw of each: write --curve 2,4,8 --draws 2"
        )
    settings = resolved(settings)
    common = _common_data(settings, set_aside, report)
    require_slices(common, max(sizes))
    points = []
    if settings.init_from is not None:
        points.append(Point(0, [_by_image(_score(common, None))]))
    for size in sizes:
        rows: list[list[float]] = []
        for draw in range(draws):
            run = _run_of(common, size, draw)
            report(Event("curve", len(rows), draws, f"{size} slices, draw {draw}", {}))
            rows.append(_by_image(_score(common, train(run, report).model_path)))
        points.append(Point(size, rows))
    gains = [gain_of(a, b) for a, b in pairwise(points) if a.slices]
    path = (settings.output / f"{settings.name}-curve").resolve()
    found = LearningCurve(points, gains, verdict_on(gains), path)
    _write(found)
    return found


def require_slices(settings: TrainSettings, wanted: int) -> None:
    """Refuse a curve that asks for more than the training items hold.

    Raises:
        BadInputError: if so, before anything is trained.
    """
    held = sum(record.shape[1] for _, record in records_of(settings, "train"))
    if held < wanted:
        raise BadInputError(
            f"the training items hold {held} slices beside those set aside: a curve cannot go up "
            f"to {wanted}"
        )


def _common_data(settings: TrainSettings, set_aside: int, report: OnEvent) -> TrainSettings:
    """The settings with the data that all points share: to draw from, and to be scored by."""
    settings = settings.model_copy(update={"few": None, "data": training_data(settings, report)})
    if any(True for _ in records_of(settings, "validation")):
        return settings
    apart = settings.model_copy(update={"few": FewSettings(slices=0, held_out=set_aside, draw=0)})
    common = learned_from(apart, settings.data, Home().home / "datasets")
    return common.model_copy(update={"few": None})


def _run_of(common: TrainSettings, size: int, draw: int) -> TrainSettings:
    held_out = max(1, round(size * _HELD_OUT_SHARE))
    few = FewSettings(slices=size, held_out=held_out, draw=draw)
    named = {"few": few, "name": f"{common.name}-{size}-{draw}", "register_as": []}
    return common.model_copy(update=named)


def _score(common: TrainSettings, model: Path | None) -> Score:
    """Of a model, or of the network before its first step, by the common validation images."""
    from diffusion_core.model import Model
    from diffusion_core.networks.low_rank import merged

    many = common.score.model_copy(update={"num_images": NUM_IMAGES})
    asked = common.model_copy(update={"score": many})
    module = merged(new_network(asked)) if model is None else Model.load(model).module
    return restoration_score(asked, module.eval())


def _by_image(score: Score) -> list[float]:
    """Mean over conditions and operators for each image; conditions have as many images."""
    return [_mean(list(column)) for column in zip(*score.images.values(), strict=False)]


def gain_of(fewer: Point, more: Point) -> Gain:
    """The gain of one point on another, paired by image and by draw.

    Its variance adds the chance of the images and that of the draws; with one draw the latter is
    not known and left out.

    Source: Satterthwaite 1946, for the degrees of freedom of a sum of variances.
    """
    pairs = zip(fewer.scores, more.scores, strict=False)
    rows = [[b - a for a, b in zip(one, other, strict=True)] for one, other in pairs]
    by_draw = [_mean(row) for row in rows]
    by_image = [_mean(list(column)) for column in zip(*rows, strict=True)]
    parts = [(_variance_of_mean(found), len(found) - 1) for found in (by_draw, by_image)]
    variance = sum(part for part, _ in parts)
    spread = sum(part**2 / freedom for part, freedom in parts if freedom)
    half = _quantile(variance**2 / spread) * math.sqrt(variance) if spread else math.inf
    mean = _mean(by_draw)
    return Gain(fewer.slices, more.slices, mean, mean - half, mean + half)


def verdict_on(gains: Sequence[Gain]) -> str:
    """Whether more data would help, by the last gain and its interval."""
    last = gains[-1]
    told = (
        f"from {last.fewer} to {last.more} slices {last.db:+.2f} dB "
        f"({LEVEL:.0%}: {last.low:+.2f} to {last.high:+.2f})"
    )
    if last.low > WORTH_DB:
        return f"{told}: more data would help{_expected(gains)}"
    if last.high < WORTH_DB:
        return f"{told}: more data of this kind would bring less than {WORTH_DB:g} dB"
    return (
        f"{told}: it cannot be told yet whether more data would help; more validation images or "
        "more draws (--draws) narrow this down"
    )


def _expected(gains: Sequence[Gain]) -> str:
    """What the next step might bring if gains go on to shrink as the last two did."""
    if len(gains) < 2 or gains[-2].db <= 0:
        return ""
    last, before = gains[-1], gains[-2]
    ratio = min(1.0, last.db / before.db)
    larger = last.more * last.more // last.fewer
    return f", {larger} slices by about {ratio * last.db:+.2f} dB if gains shrink on as they did"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _variance_of_mean(values: Sequence[float]) -> float:
    count = len(values)
    if count < 2:
        return 0.0
    mean = _mean(values)
    return sum((v - mean) ** 2 for v in values) / (count - 1) / count


def _quantile(freedom: float) -> float:
    """Of Student's t, two-sided."""
    from scipy.stats import t as student

    return float(student.ppf(0.5 + LEVEL / 2, freedom))


def _write(found: LearningCurve) -> None:
    from flows.report.write import write_whole

    values = {
        "points": [{**asdict(point), "db": point.db} for point in found.points],
        "gains": [asdict(gain) for gain in found.gains],
        "verdict": found.verdict,
    }
    found.path.mkdir(parents=True, exist_ok=True)
    write_whole(found.path / CURVE, (json.dumps(values, indent=1) + "\n").encode())
    write_whole(found.path / PICTURE, picture(found))


def picture(found: LearningCurve) -> bytes:
    """The figure as PNG: the mean of each number of slices, its draws, and the network before."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    learned = [point for point in found.points if point.slices]
    axes.plot([p.slices for p in learned], [p.db for p in learned], "o-", label="mean")
    draws = [(p.slices, sum(row) / len(row)) for p in learned for row in p.scores]
    axes.plot(*zip(*draws, strict=True), "k.", markersize=4, label="a draw")
    for point in found.points:
        if not point.slices:
            axes.axhline(point.db, linestyle="--", color="grey", label="before training")
    axes.set_xscale("log", base=2)
    axes.set_xticks([p.slices for p in learned], [str(p.slices) for p in learned])
    axes.set_xlabel("slices (a quarter of them held out)")
    axes.set_ylabel("restoration score, dB")
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
