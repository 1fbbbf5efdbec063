"""Plain words for tasks, methods and figures: what a reader who knows none of our names sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from domains.base import Task

TIMES, MINUS = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"

DOMAINS = {
    "ct": "Computed tomography",
    "mri": "Magnetic resonance",
    "city": "City and aerial pictures",
}

# name -> (short label, what it is)
METHODS = {
    "covprox": ("CovProx", "network and covariance-weighted data step"),
    "distilled": ("Distilled", "a student network that knows the operator, a data step after each"),
    "covprox-sample": ("CovProx, one sample", "one draw of the posterior"),
    "covprox-samples": ("CovProx, mean of samples", "mean of several draws of the posterior"),
    "diffpir": ("DiffPIR", "plug-and-play diffusion, our start and levels"),
    "dds": ("DDS", "diffusion with CG steps, our start and levels"),
    "ddrm": ("DDRM", "exact update along singular directions"),
    "ddnm": ("DDNM+", "null-space diffusion, noise-aware"),
    "pigdm": ("PiGDM", "pseudo-inverse guidance through the network's gradient"),
    "dps": ("DPS", "posterior sampling by the gradient of the misfit"),
    "red-diff": ("RED-diff", "variational optimisation with a diffusion regulariser"),
    "daps": ("DAPS", "decoupled annealing posterior sampling"),
    "split-gibbs": ("Split Gibbs", "alternating draws from likelihood and prior"),
    "repaint": ("RePaint", "diffusion inpainting with resampling"),
    "kriging": ("Kriging", "best linear estimate, no network"),
    "fbp": ("FBP", "filtered back-projection"),
    "sirt": ("SIRT", "simultaneous iterative reconstruction"),
    "tv": ("TV", "total-variation least squares"),
    "zero-filled": ("Zero-filled", "inverse transform, zeros where not measured"),
    "as-it-is": ("As it is", "moved slices left as they were measured"),
    "linear-z": ("Linear in z", "straight lines from slice to slice"),
    "cubic-z": ("Cubic in z", "cubic splines from slice to slice"),
    "wavelet": ("Wavelet", "L1-wavelet least squares"),
    "biharmonic": ("Biharmonic", "smooth interpolation"),
    "telea": ("Telea", "fast-marching inpainting"),
    "navier-stokes": ("Navier-Stokes", "inpainting along isophotes"),
    "bicubic": ("Bicubic", "cubic interpolation"),
    "wiener": ("Wiener", "regularised inverse filter"),
    "richardson-lucy": ("Richardson-Lucy", "iterative deconvolution"),
    "bilinear": ("Bilinear", "interpolated colours"),
    "fbp-nlm": ("FBP + NLM", "filtered back-projection, then non-local means"),
    "nlm": ("NLM", "non-local means"),
    "inversion": ("Inversion", "haze or darkness undone, noise and all"),
    "gamma": ("Gamma", "a curve that brightens"),
    "clahe": ("CLAHE", "contrast-limited adaptive equalisation"),
    "anscombe-nlm": ("Anscombe + NLM", "noise stabilised, then non-local means"),
    "decoded": ("Decoded", "the JPEG file as decoders show it"),
    "decoded-nlm": ("Decoded + NLM", "non-local means of the decoded picture"),
    "decoded-tv": ("Decoded + TV", "total variation of the decoded picture"),
    "bm3d": ("BM3D", "block matching and 3-D filtering"),
}

COLUMNS = {
    "psnr": ("PSNR", "dB", "peak signal-to-noise ratio, whole image; higher is better"),
    "psnr_hole": ("PSNR, hole", "dB", "PSNR of the missing pixels alone; higher is better"),
    "psnr_body": ("PSNR, body", "dB", "PSNR inside the body mask; higher is better"),
    "ssim": ("SSIM", "", "structural similarity; 1 is identical"),
    "ssim_body": ("SSIM, body", "", "structural similarity inside the body mask"),
    "edge_error": ("Edge error", "", "RMS difference of gradient magnitudes; lower is better"),
    "z_gradient_error": ("Error along z", "", "mean error of the difference to the slice or frame"
                         " before; lower is steadier"),
    "residual": ("Residual", "", "weighted misfit per measurement; about 1 explains the data,"
                 " below 1 fits its noise too; largest misfit where the data are exact"),
    "gain_db": ("Gain", "dB", "above the best classical method, kriging included"),
    "nfe": ("NFE", "", "evaluations of the network for one slice"),
    "num_operator_calls": ("A calls", "", "applications of the operator or its adjoint"),
    "seconds": ("Time", "s", "wall time of one slice on one worker"),
    "peak_bytes": ("Memory", "MiB", "largest resident size of the worker"),
}  # fmt: skip


_TITLES = {"haze": "Haze", "low-light": "Low light"}


def noun(domain: str) -> str:
    """What one image of a domain is called."""
    return "picture" if domain == "city" else "slice"


def domain_title(domain: str) -> str:
    """Heading of a domain."""
    return DOMAINS.get(domain, domain)


def method_label(method: str) -> str:
    """Short name of a method."""
    return METHODS.get(method, (method, ""))[0]


def method_gloss(method: str) -> str:
    """What a method is, in a few words; '' for a guest's."""
    return METHODS.get(method, ("", ""))[1]


def task_title(task: Task) -> str:
    """Heading of a task."""
    params = task.operator_params
    if task.noise["kind"] in _TITLES:
        return _TITLES[task.noise["kind"]]
    known: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "jpeg-blocks": lambda p: f"JPEG of quality {p.get('quality')}",
        "parallel-beam": _ct_title,
        "fourier": _mri_title,
        "mask": _mask_title,
        "blur": lambda p: f"{p.get('kernel', 'Known')} blur".capitalize(),
        "pool": lambda p: f"{p.get('factor', '')}{TIMES} super-resolution",
        "pool-rows": lambda p: f"{p.get('factor', '')}{TIMES} super-resolution along z",
        "identity": lambda _: "Noise removal",
        "multi-coil": lambda p: f"{_mri_title(p)}, {p.get('num_coils')} coils",
        "downsample": lambda p: f"{p.get('factor', '')}{TIMES} super-resolution (bicubic)",
        "varying-blur": lambda _: "Lens blur",
        "mosaic": lambda _: "Demosaicing",
    }
    make = known.get(task.operator)
    return make(params) if make else task.name


def measurement_words(task: Task) -> str:
    """What is measured and how noisy it is, as one sentence."""
    p = task.operator_params
    known: dict[str, Callable[[], str]] = {
        "parallel-beam": lambda: (
            f"A parallel-beam scan of {p['num_views']} views over {p['arc_degrees']:g}°"
        ),
        "fourier": lambda: (
            f"Single-coil Cartesian k-space, {p['acceleration']} times fewer lines, "
            f"the {p['centre_share']:.0%} in the centre all kept"
        ),
        "mask": lambda: _mask_words(p),
        "pool-rows": lambda: f"Means of {p['factor']} slices, seen from the side",
        "blur": lambda: f"A known {p['kernel']} blur",
        "pool": lambda: f"Means of {p['factor']}{TIMES}{p['factor']} pixels",
        "identity": lambda: "Every pixel",
        "jpeg-blocks": lambda: f"A JPEG file of quality {p['quality']}, {p['subsampling']}",
        "multi-coil": lambda: (
            f"Cartesian k-space of {p['num_coils']} coils, {p['acceleration']} times fewer lines, "
            f"the {p['centre_share']:.0%} in the centre all kept"
        ),
        "downsample": lambda: f"Bicubic reduction {p['factor']}{TIMES}",
        "varying-blur": lambda: "A blur that grows towards the corners",
        "mosaic": lambda: "One colour a pixel, as a camera's sensor sees them",
    }
    try:
        what = known[task.operator]()
    except (KeyError, TypeError, ValueError):
        what = f"Operator {task.operator} {dict(p)}"
    return f"{what}; {noise_words(task.noise)}."


def _mask_words(p: Mapping[str, Any]) -> str:
    if p["pattern"] in BETWEEN:
        return f"{p['pattern'].capitalize()} seen from the side, one of {p['every']} kept"
    if p["pattern"] == "moved-slices":
        return (
            f"Of {p['every']} slices one moved while it was measured ({p['num_moves']} times, by "
            f"{p['shift_mm']:g} mm std), and is taken as missing; seen from the side"
        )
    return f"{p['missing_share']:.0%} of the pixels taken away ({p['pattern']})"


def noise_words(noise: Mapping[str, Any]) -> str:
    """A noise model in words."""
    kind = noise.get("kind")
    if kind == "gaussian" and not noise.get("sigma_y"):
        return "no noise"
    if kind == "gaussian":
        return f"Gaussian noise, std {noise['sigma_y']:g} on [{MINUS}1, 1]"
    if kind == "rician":
        return f"Rician noise of a magnitude image, std {noise['sigma_y']:g} on [{MINUS}1, 1]"
    if kind == "jpeg":
        return "coefficients rounded to its steps"
    if kind == "haze":
        return f"haze, and Gaussian noise, std {noise['sigma_y']:g} on [{MINUS}1, 1]"
    if kind == "low-light":
        return (
            f"{noise['exposure']:.0%} of the light, {noise['photons']:g} photons at white were it "
            f"all, {noise['read_electrons']:g} electrons of read-out"
        )
    if kind == "poisson":
        return f"Poisson noise, {noise['counts_per_ray']:,.0f} photons a ray"
    if kind == "speckle":
        return f"speckle of {noise['num_looks']:g} looks (gamma noise that multiplies)"
    if kind == "snr":
        return f"complex Gaussian noise at {noise['snr_db']:g} dB"
    return f"noise {dict(noise)}"


def _ct_title(params: Mapping[str, Any]) -> str:
    spoilt = {"metal": "Metal in the body", "rings": "Detector elements that lie"}
    if params.get("pattern") in spoilt:
        return spoilt[params["pattern"]]
    arc = params.get("arc_degrees", 180.0)
    views = f"{params.get('num_views')} views"
    return f"Tomography from {views}" + ("" if arc == 180.0 else f" over {arc:g}°")


def _mri_title(params: Mapping[str, Any]) -> str:
    real = ", image known to be real" if params.get("phase") == "zero" else ""
    return f"Every {_ordinal(params.get('acceleration', 0))} line of k-space{real}"


def _ordinal(number: int) -> str:
    return {4: "fourth", 8: "eighth"}.get(number, f"{number}th")


BETWEEN = ("slices", "frames")
"""Patterns of masks that take away whole slices, or frames."""


def _mask_title(params: Mapping[str, Any]) -> str:
    share = f"{params.get('missing_share', 0):.0%}"
    pattern = params.get("pattern", "")
    if pattern in BETWEEN:
        return f"{params['every'] - 1} of {params['every']} {pattern} missing"
    if pattern == "moved-slices":
        return "Slices that moved"
    if pattern == "random":
        return f"{share} of the pixels missing"
    return f"Free-form {pattern} over {share} of the picture"
