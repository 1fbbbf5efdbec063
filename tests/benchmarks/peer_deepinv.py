"""deepinv on our network and our measurements. Runs in deepinv's own environment (peer_env.py).

    PYTHONPATH=REPOSITORY python tests/benchmarks/peer_deepinv.py MODEL THREADS DTYPE

Reads one path of a job (.npz, peer.py writes it) a line, restores, writes a result beside it, and
answers with one line of JSON. Needs torch, numpy, scipy, safetensors and deepinv alone.

Images are in [0, 1] here, as deepinv has them: x01 = (x + 1) / 2, and so y01 = (y + A 1) / 2 with
noise of half the size. Data of unequal variance come whitened, noise of standard deviation 1/2.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def import_deepinv() -> Any:
    """deepinv imports torchvision for its image transforms; there is no build of its operators for
    the CPU wheels of torch. Declared, never called, they are not missed.
    """
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import deepinv

    return deepinv, operators


dinv, _OPERATORS = import_deepinv()

from scipy.sparse import csr_array, load_npz  # noqa: E402

from diffusion_core.model import Model  # noqa: E402

LEAST_SIGMA = 1e-3
"""deepinv's DDRM ends with a level of 0, which has no logarithm."""


class OurDenoiser(dinv.models.Denoiser):
    """Our network as deepinv wants it: images and noise on [0, 1]; counts its calls."""

    def __init__(self, model: Model, condition: str) -> None:
        super().__init__()
        self._denoise = model.denoiser(condition)
        self.num_calls = 0

    def forward(self, x, sigma, **kwargs):
        self.num_calls += 1
        sigmas = torch.as_tensor(sigma, dtype=torch.float32).reshape(-1).expand(len(x))
        out = self._denoise(2 * x.float() - 1, (2 * sigmas).clamp_min(LEAST_SIGMA))
        return ((out + 1) / 2).to(x.dtype)


class Kspace(dinv.physics.LinearPhysics):
    """Masked unitary Fourier transform of a real image; deepinv's own takes complex images only."""

    def __init__(self, mask, **kwargs):
        super().__init__(**kwargs)
        self.register_buffer("mask", mask)

    def A(self, x, **kwargs):
        return torch.fft.fft2(x, norm="ortho") * self.mask

    def A_adjoint(self, y, **kwargs):
        return torch.fft.ifft2(y * self.mask, norm="ortho").real


class WeightedProjector(dinv.physics.LinearPhysics):
    """R^(-1/2) P for a projector P given as a sparse matrix, our own, whitened by the counts."""

    def __init__(self, matrix: csr_array, transpose: csr_array, weight, side: int, **kwargs):
        super().__init__(**kwargs)
        self._matrix, self._transpose, self._weight, self._side = matrix, transpose, weight, side

    def A(self, x, **kwargs):
        y = self._matrix @ x.detach().reshape(-1).numpy()
        return torch.from_numpy(y).reshape(self._weight.shape) * self._weight

    def A_adjoint(self, y, **kwargs):
        x = self._transpose @ (y * self._weight).detach().reshape(-1).numpy()
        return torch.from_numpy(x).reshape(1, 1, self._side, self._side)


def physics_of(job) -> Any:
    """deepinv's own operator where it has one, with its closed forms."""
    kind, shape = str(job["kind"]), tuple(int(n) for n in job["shape"][1:])
    noise = dinv.physics.GaussianNoise(float(job["sigma_y"]))
    if kind == "mask":
        mask = torch.from_numpy(job["mask"]).float().expand(1, *shape)
        return dinv.physics.Inpainting(img_size=shape, mask=mask.clone(), noise_model=noise)
    if kind == "blur":
        kernel = torch.from_numpy(job["kernel"])[None, None]
        return dinv.physics.BlurFFT(img_size=shape, filter=kernel, noise_model=noise)
    if kind == "pool":
        return pooling(shape, int(job["factor"]), noise)
    if kind == "fourier":
        return Kspace(torch.from_numpy(job["mask"]), noise_model=noise)
    weight = torch.from_numpy(job["weight"])
    matrix = load_npz(str(job["matrix"])) * np.float32(job["scale"])
    transpose = load_npz(str(job["transpose"])) * np.float32(job["scale"])
    return WeightedProjector(matrix, transpose, weight, shape[-1], noise_model=noise)


def pooling(shape, factor: int, noise) -> Any:
    """Average pooling as deepinv's Downsampling: a box that reaches from 0 to factor - 1 forward.

    It convolves about the filter's centre and samples at multiples of the factor.
    """
    size = 2 * factor - 1
    box = torch.zeros(1, 1, size, size)
    box[..., :factor, :factor] = 1.0 / factor**2
    return dinv.physics.Downsampling(
        img_size=shape, filter=box, factor=factor, padding="circular", noise_model=noise
    )


def check(physics, job) -> None:
    """The operator must be ours: |A u - (A u of ours)| on a fixed image."""
    ours = torch.from_numpy(job["probe_data"])
    theirs = physics.A(torch.from_numpy(job["probe"]))
    error = float((theirs - ours).abs().max() / ours.abs().max())
    if error > 1e-4:
        raise SystemExit(f"{job['kind']}: deepinv's operator differs from ours by {error:.1e}")


def sampler_of(method: str, options: dict[str, Any], denoiser: OurDenoiser, sigma_y: float) -> Any:
    """DiffPIR, DPS or DDRM with deepinv's defaults but for `options`."""
    if method == "diffpir":
        return dinv.sampling.DiffPIR(
            model=denoiser, data_fidelity=dinv.optim.data_fidelity.L2(), sigma=sigma_y, **options
        )
    if method == "dps":
        return dinv.sampling.DPS(denoiser=denoiser, **options)
    return dinv.sampling.DDRM(denoiser=denoiser, **options)


def restore(path: Path, model: Model) -> dict[str, Any]:
    """One job."""
    job = np.load(path)
    method, options = str(job["method"]), json.loads(str(job["options"]))
    physics, y = physics_of(job), torch.from_numpy(job["y"])
    check(physics, job)
    denoiser = OurDenoiser(model, str(job["condition"]))
    sampler = sampler_of(method, options, denoiser, float(job["sigma_y"]))
    start_image = {"x_init": torch.from_numpy(job["x_init"])} if method == "diffpir" else {}
    torch.manual_seed(1)  # DPS takes torch's own generator
    start = time.perf_counter()
    x = sampler(y, physics, seed=1, **start_image)
    seconds = time.perf_counter() - start
    result = path.with_suffix(".result.npy")
    np.save(result, (2 * x - 1).detach().float().numpy())
    return {"result": str(result), "nfe": denoiser.num_calls, "seconds": seconds}


def main() -> None:
    model_path, num_threads, dtype = sys.argv[1:4]
    torch.set_num_threads(int(num_threads))
    model = Model.load(Path(model_path), dtype=getattr(torch, dtype))
    sys.stdout.write(json.dumps({"deepinv": dinv.__version__, "torch": torch.__version__}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(restore(Path(line.strip()), model)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
