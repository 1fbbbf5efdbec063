"""What the commands answer, in words for people; --json has it for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flows.console import duration, size, table
from flows.plural import plural

if TYPE_CHECKING:
    from flows.api_inspect import Inspected, InspectResult
    from flows.api_learning_curve import Gain, LearningCurve
    from flows.api_restore import RestoreResult
    from flows.api_train import TrainResult
    from flows.api_upkeep import GcResult, GivenUp, VerifyResult
    from flows.api_view import Viewable
    from flows.engine.account import RunAccount
    from flows.engine.forecast import Forecast
    from flows.engine.plan import Plan
    from flows.registry import ModelRow
    from flows.training.plan import TrainPlan


MAX_ROWS = 60
"""Items that a plan lists one by one; --json has them all."""
MAX_LINES = 20
"""Of damages and notes on a terminal; --json has all."""


def verified_text(result: VerifyResult) -> str:
    """What is intact and what is damaged, for people."""
    rows = [
        [place, f.num_items, f.num_objects, size(f.num_bytes), f.num_staged_blocks, len(f.damages)]
        for place, f in result.outputs.items()
    ]
    names = ["output", "items", "objects", "bytes", "unpublished blocks", "damaged"]
    lines = [table(names, rows)]
    damages = [(place, d) for place, found in result.outputs.items() for d in found.damages]
    lines += [
        f"{place}/{d.file}: {d.fault}, of {d.item}: {d.next_step}"
        for place, d in damages[:MAX_LINES]
    ]
    if len(damages) > MAX_LINES:
        lines.append(f"... and {len(damages) - MAX_LINES} more; --json tells all")
    if result.hidden:
        lines.append(
            f"{len(result.hidden)} damaged items are hidden now; give the command again that "
            "restored them, and then `sashiko gc`"
        )
    uncovered = sum(found.num_uncovered for found in result.outputs.values())
    if uncovered:
        lines.append(f"not covered: {uncovered} metadata files, written by an older version")
    return "\n".join([*lines, "intact" if result.intact else f"{len(damages)} damaged"])


def collected_text(result: GcResult) -> str:
    """What was removed, for people."""
    rows = []
    for place, found in result.outputs.items():
        for kind in dict.fromkeys(g.kind for g in found.garbage):
            some = [g for g in found.garbage if g.kind == kind]
            rows.append([place, kind, len(some), size(sum(g.num_bytes for g in some))])
    lines = [table(["output", "what", "number", "bytes"], rows)] if rows else []
    every = result.outputs.values()
    lines += [note for found in every for note in found.notes][:MAX_LINES]
    lines += [f"cannot be removed: {key}" for found in every for key in found.stuck][:MAX_LINES]
    num_unfinished = sum(found.num_unfinished for found in every)
    if num_unfinished:
        held = size(sum(found.unfinished_bytes for found in every))
        lines.append(f"kept: {held} of {num_unfinished} unfinished items, for the next run of them")
    if any(found.num_living for found in every):
        lines.append("a run is under way: what is younger than it was left alone")
    done = "would be removed" if result.dry_run else "removed"
    total = size(sum(g.num_bytes for found in every for g in found.garbage))
    return "\n".join([*lines, f"{total} {done}" if rows else "nothing to remove"])


def quarantine_text(given_up: Sequence[GivenUp]) -> str:
    """What was given up, and why, for people."""
    if not given_up:
        return "nothing is in quarantine"
    names = ["output", "item", "task", "method", "when", "runs", "attempts", "input", "reason"]
    rows = [
        [g.output, e.item_id, e.task, e.method, e.when[:16], e.num_runs, e.attempts,
         e.input_digest[:12], e.reason]
        for g in given_up
        for e in (g.entry,)
    ]  # fmt: skip
    return table(names, rows)


def plan_text(plan: Plan, left: Forecast) -> str:
    """What a plan would do, for people."""
    shown = plan.items[:MAX_ROWS]
    rows = [[i.item_id, i.task, i.method.name, i.num_blocks, i.cost.seconds] for i in shown]
    lines = [table(["item", "task", "method", "blocks", "s a block"], rows)]
    if len(plan.items) > len(shown):
        rest = plural(len(plan.items) - len(shown), "item")
        lines.append(f"... and {rest} more, which take less a block")
    rest = ""
    if left.num_blocks:
        lines.append(
            f"done already: {plural(left.num_items, 'item')}, {plural(left.num_blocks, 'block')} "
            "(counted, not checked)"
        )
        rest = " for the rest"
    parts = {
        "pixels": left.pixel_bytes,
        "pyramids": left.pyramid_bytes,
        "copies on S3": left.copy_bytes,
        "files": left.file_bytes,
        "measurements, removed at the end": left.scratch_bytes,
    }
    lines += [
        f"{plural(len(plan.items), 'item')}, {plural(plan.num_blocks, 'block')}, "
        f"{plural(plan.num_workers, 'worker')}: about "
        f"{duration(left.seconds)}{rest}, {size(plan.predicted_peak_bytes)} of memory, "
        f"{size(left.num_bytes)} written",
        f"a worker: {duration(left.work_seconds / plan.num_workers)} of work, "
        f"{size(plan.worker_peak_bytes)}; the driver: {size(plan.driver_peak_bytes)}",
        "bytes, before compression: "
        + (", ".join(f"{name} {size(count)}" for name, count in parts.items() if count) or "none"),
    ]
    return "\n".join(lines)


def train_plan_text(plan: TrainPlan) -> str:
    """What a training would do and take, for people."""
    data = "the samples, which are not ingested yet"
    if plan.data_bytes is not None:
        where = "held in memory" if plan.data_in_memory else "read from Zarr as they are drawn"
        data = f"{plan.num_items} training items, {size(plan.data_bytes)} of views, {where}"
    gpu = f", {size(plan.gpu_bytes)} of the GPU's" if plan.gpu_bytes else ""
    done = f" ({plan.steps_done} done)" if plan.steps_done else ""
    scores = "" if plan.score_share is None else f", scores {plan.score_share:.1%} of it"
    rows = [
        ["steps", f"{plan.num_steps}{done}, {plan.megapixels:.0f} MP to come"],
        ["network", f"{plan.num_parameters / 1e6:.2f} M parameters, "
         f"{plan.flop_per_pixel / 1e3:.0f} kFLOP a pixel"],
        ["data", data],
        ["workers", f"{plan.num_workers} on {plan.device}, {plan.num_threads} threads each "
         "(num_threads)"],
        ["memory", f"{size(plan.worker_bytes)} a worker{gpu}; the machine has "
         f"{size(plan.machine_bytes)}"],
        ["disk", size(plan.disk_bytes)],
        ["speed", f"{plan.megapixels_per_s:.3g} MP/s, {plan.seconds_per_step:.3g} s a step, "
         f"{plan.peak_share:.0%} of the measured peak of "
         f"{plan.peak_flop_per_s / 1e12:.3g} TFLOP/s"],
        ["time", f"about {duration(plan.seconds)}{scores}; from {plan.measured}"],
    ]  # fmt: skip
    return "\n".join(f"{name:<8} {text}" for name, text in rows)


def trained_text(result: TrainResult) -> str:
    """Where a trained model is, and what is left to do before it is used, for people."""
    lines = [f"model: {result.model_path}  (digest {result.digest[:12]})"]
    lines += [
        f"registered: {name} version {version}; it is used once `sashiko review {name}` or "
        f"`sashiko promote {name} {version}` makes it champion"
        for name, version in result.versions.items()
    ]
    if not result.versions:
        lines.append("not registered (register_as is empty): name its directory with --model")
    return "\n".join(lines)


def curve_text(found: LearningCurve) -> str:
    """What each number of slices is worth, and the verdict, for people."""
    gains = {gain.more: gain for gain in found.gains}
    rows = [
        [
            point.slices or "before training",
            len(point.scores),
            f"{point.db:.2f}",
            _gained(gains[point.slices]) if point.slices in gains else "",
        ]
        for point in found.points
    ]
    names = ["slices", "draws", "score, dB", "gain on the number before"]
    return "\n".join([table(names, rows), found.verdict, f"figure: {found.path / 'curve.png'}"])


def _gained(gain: Gain) -> str:
    return f"{gain.db:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})"


def restored_text(result: RestoreResult) -> str:
    """What was restored and where it is, for people."""
    bad = [f"quarantined: {q.source or q.item_id}: {q.reason}" for q in result.quarantined]
    bad += [f"{path}: {remark}" for path, remark in result.remarks[:MAX_LINES]]
    before = f", {result.num_reused} of them before" if result.num_reused else ""
    files = f"; files in {result.output / 'files'}" if result.files else ""
    if result.published and not isinstance(result.output, Path):
        files = "; on S3 no files are written for other tools, items are read by their manifests"
    told = f"restored: {plural(len(result.published), 'item')}{before}, in {result.output}{files}"
    return "\n".join([*bad, *account_lines(result.account), told])


def account_lines(account: RunAccount) -> list[str]:
    """What a run took, a line a figure; nothing where it computed nothing."""
    if not account.num_computed and not account.retries:
        return []
    before = ", ".join(
        f"{plural(count, what)} done before"
        for count, what in ((account.num_receipted, "block"), (account.num_reused, "item"))
        if count
    )
    busy = account.device_seconds / account.seconds if account.seconds else 0.0
    rows = [
        ("computed", f"{plural(account.num_computed, 'block')}, {account.num_pixels / 1e6:.3g} MP"),
        ("reused", before),
        ("time", f"{duration(account.seconds)}, {account.megapixels_per_s:.3g} MP/s"),
        ("workers", f"{duration(account.device_seconds)} of work, {busy:.2f} busy on average, "
         f"{size(account.peak_bytes)} at most"),
        ("written", size(account.num_bytes)),
        ("retries", ", ".join(f"{n} {kind}" for kind, n in sorted(account.retries.items()))),
        ("quarantined", str(account.num_quarantined or "")),
        ("seams", _seams(account)),
        *([("mixed", _mixed(account))] if account.num_mixed else []),
    ]  # fmt: skip
    return [f"{name:<11} {text}" for name, text in rows if text]


def _mixed(account: RunAccount) -> str:
    verb = "has" if account.num_mixed == 1 else "have"
    return (
        f"{plural(account.num_mixed, 'item')} {verb} blocks of several environments (versions "
        "of libraries, kinds of processor), and not the bits of one; their manifests name them"
    )


def _seams(account: RunAccount) -> str:
    worst = account.worst_seam
    if worst is None:
        return ""
    return (
        f"{plural(account.num_cut, 'item')} cut; gradient across borders over that beside them: "
        f"{worst.ratio:.3f} +- {worst.standard_error:.3f} at worst ({worst.item_id})"
    )


def models_text(models: Sequence[ModelRow]) -> str:
    """The registered models as a table."""
    if not models:
        return "no model is registered yet"
    rows = [
        [m.name, m.version, " ".join(m.aliases), m.digest[:12], m.created, _figures(m.metrics)]
        for m in models
    ]
    return table(["name", "version", "alias", "digest", "created", "figures"], rows)


def _figures(metrics: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:.2f}" for name, value in metrics.items())


def inspected_text(result: InspectResult) -> str:
    """What inputs are and what looks damaged, a paragraph each, for people."""
    parts = ["\n".join(_inspected_lines(one)) for one in result.inputs[:MAX_LINES]]
    if len(result.inputs) > MAX_LINES:
        parts.append(f"... and {len(result.inputs) - MAX_LINES} more; --json tells all")
    if result.preview is not None:
        parts.append(f"preview: {result.preview}")
    return "\n\n".join(parts)


def _inspected_lines(one: Inspected) -> list[str]:
    if one.fault or one.record is None:
        return [one.place, f"  unusable  {one.fault}"]
    record, rows = one.record, [("format", _kind_words(one))]
    if one.measured is not None:
        rows += [(name, _plain_value(value)) for name, value in one.measured.items()]
    if one.value_range is not None:
        low, high = one.value_range
        bits = "" if one.bits is None else f" ({one.bits} bits in use)"
        rows.append(("values", f"{record.dtype}{bits}, {low:g} to {high:g} {record.units}"))
    if record.spacing_mm is not None:
        z, y, x = record.spacing_mm
        rows.append(("spacing", f"{z:.4g} x {y:.4g} x {x:.4g} mm (slice, row, column)"))
    if record.affine is not None:
        matrix = "; ".join(" ".join(f"{v:.4g}" for v in row) for row in record.affine[:3])
        rows.append(("affine", f"[{matrix}] (column, row, slice to mm)"))
    rows += [(name, _plain_value(v)) for name, v in record.meta.items() if name in _META]
    rows += list(_ground_rows(record.meta.get("geotiff")))
    rows += [("damaged", finding.words) for finding in one.findings]
    if one.measured is None and not one.findings:
        rows.append(("damaged", "nothing found"))
    return [one.place, *(f"  {name:<12} {text}" for name, text in rows)]


_META = ("orientation", "layout", "nodata", "value_range", "frames_per_second")
"""What of a record's `meta` is told to people; --json has it all."""


def _kind_words(one: Inspected) -> str:
    """Format, size and domain."""
    record = one.record
    if record is None:
        return ""
    c, z, h, w = record.shape
    depth = f"{z} slices or frames of " if z > 1 else ""
    bands = "" if c == 1 else f", {c} bands"
    also = f" (also read by {', '.join(one.others)}: --domain says which)" if one.others else ""
    return f"{record.source_format}, {depth}{h} x {w} pixels{bands}; domain {one.domain}{also}"


def _ground_rows(ground: object) -> Iterator[tuple[str, str]]:
    """What a GeoTIFF says of its place on the earth."""
    if isinstance(ground, Mapping):
        for name in ("crs", "transform"):
            if ground.get(name) is not None:
                text = _plain_value(ground[name])
                yield name, text if len(text) <= _WIDEST else f"{text[:_WIDEST]} ..."


_WIDEST = 120
"""Of a line about the reference system, in characters."""


def _plain_value(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain_value(v)}" for name, v in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " ".join(_plain_value(v) for v in value)
    return " ".join(str(value).split())


def view_text(found: Sequence[Viewable]) -> str:
    """How to open each result, for people; viewers that are not installed are told so."""
    from flows.api_view import installed

    lines = []
    for one in found[:MAX_ROWS]:
        task = " ".join([one.task, *_as_options(one.given)])
        lines.append(f"{one.item_id}, {task}, by {one.method}: {one.path}")
        for viewer, command in one.commands.items():
            here = "" if installed(command) else "   (not installed here)"
            lines.append(f"  {viewer:<10} {command}{here}")
    if len(found) > MAX_ROWS:
        lines.append(f"... and {len(found) - MAX_ROWS} more; --json tells all")
    return "\n".join(lines)


def _as_options(given: Mapping[str, object]) -> Iterator[str]:
    """Settings as they are typed: --scale 4."""
    for name, value in given.items():
        yield f"--{name.replace('_', '-')} {_plain_value(value)}"
