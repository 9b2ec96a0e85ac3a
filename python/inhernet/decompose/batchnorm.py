"""BatchNorm statistics of a converted model: measured anew, and compared with what the teacher was trained on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..console import progress
from .batches import batch_size, call, device_of, model_inputs, reusable, undisturbed
from .calibration import origin

# Distance of a layer's statistics, in standard deviations, from which the calibration data is another distribution.
# Digits network at 40 %: data like its training's 0.19 (4 images: 0.25). Shifted by 0.3, halved, one image, noise, shifted
# by 1, inverted, tripled: 0.46 to 2.7; from the second on, re-estimation was worse than none (error 0.78 → 0.89 to 2.5).
FAR = 0.4
# Samples that are looked at for it, in whole batches.
ENOUGH = 256


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, calibration: Iterable[Any]) -> int:
    """Recompute the running statistics of every BatchNorm in one pass, in place; returns how many there are.

    Each batch counts by its size, dropout stays off, momentum, flags and batch counters are restored on any exit, and
    the statistics on an error.

    Raises:
        ValueError: no batches, or a batch that makes statistics NaN or infinite (with its number and the layer's name).
    """
    norms = _norms(model)
    if not norms:
        return 0
    before = [(norm.momentum, [tensor.clone() for tensor in _state(norm)]) for norm in norms.values()]
    device, seen = device_of(model), 0
    calibration = reusable(calibration)
    with undisturbed(model), torch.inference_mode(False), progress("BatchNorm") as bar:
        try:
            for norm in norms.values():
                norm.train()
            for number, batch in enumerate(calibration, 1):
                inputs = model_inputs(batch, device)
                size = batch_size(inputs)
                seen += size
                for norm in norms.values():
                    norm.momentum = size / max(seen, 1)
                call(model, inputs)
                _need_finite(norms, number, inputs)
                bar.advance()
            if not seen:
                raise ValueError("calibration yielded no batches (or only empty ones); expected at least one")
        except BaseException:
            for norm, (_, state) in zip(norms.values(), before, strict=True):
                for tensor, old in zip(_state(norm), state, strict=True):
                    tensor.copy_(old)
            raise
        finally:
            for norm, (momentum, state) in zip(norms.values(), before, strict=True):
                norm.momentum = momentum
                norm.num_batches_tracked.copy_(state[2])
    return len(norms)


def check_batchnorm(teacher: nn.Module, calibration: Iterable[Any]) -> None:
    """Warn where the calibration data gives the teacher other BatchNorm statistics than its training did.

    Per layer, over its channels: `√ mean(((μ' − μ)² + (σ' − σ)²) / σ²)`, μ and σ the running statistics, μ' and σ' those
    of the data; 0.4 or more is far. A teacher without training of its own (no batch counted) is not judged.
    """
    distances = batchnorm_distances(teacher, calibration)
    name = max(distances, key=distances.__getitem__, default=None)
    if name is not None and distances[name] >= FAR:
        warnings.warn(
            f"the calibration data is not what the teacher was trained on: on it the statistics of BatchNorm {name!r} are "
            f"{distances[name]:.1f} standard deviations from the teacher's, and the model has the new ones; calibrate "
            "with data like the training's (same normalisation, many samples), or keep the teacher's with "
            "batchnorm=False (`inhernet convert --keep-batchnorm`)",
            stacklevel=3,
        )


@torch.no_grad()
def batchnorm_distances(teacher: nn.Module, calibration: Iterable[Any]) -> dict[str, float]:
    """How far the statistics of the data's first 256 samples are from the running ones, for every BatchNorm that has
    counted a batch."""
    norms = {name: norm for name, norm in _norms(teacher).items() if int(norm.num_batches_tracked)}
    sums: dict[str, list[Tensor]] = {name: [] for name in norms}
    sizes: dict[str, list[int]] = {name: [] for name in norms}

    def measure(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().float()
            positions = x.numel() // x.shape[1]
            if positions > 1:
                variance, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1])
                sums[name].append(torch.stack([mean, variance]).cpu().double() * positions)
                sizes[name].append(positions)

        return hook

    handles = [norm.register_forward_pre_hook(measure(name)) for name, norm in norms.items()]
    try:
        with undisturbed(teacher), torch.inference_mode(False), progress("BatchNorm of the teacher") as bar:
            device, seen = device_of(teacher), 0
            for batch in reusable(calibration):
                if seen >= ENOUGH:
                    break
                inputs = model_inputs(batch, device)
                call(teacher, inputs)
                seen += batch_size(inputs)
                bar.advance()
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: _distance(norm, torch.stack(sums[name]).sum(0) / sum(sizes[name]))
        for name, norm in norms.items()
        if sizes[name]
    }


def _distance(norm: Any, found: Tensor) -> float:
    mean, deviation = norm.running_mean.cpu().double(), (norm.running_var.cpu().double() + norm.eps).sqrt()
    new_mean, new_deviation = found[0], (found[1] + norm.eps).sqrt()
    squares = ((new_mean - mean) / deviation).square() + ((new_deviation - deviation) / deviation).square()
    return float(squares.mean().sqrt())


def _norms(model: nn.Module) -> dict[str, Any]:
    kind = nn.modules.batchnorm._BatchNorm
    return {name: m for name, m in model.named_modules() if isinstance(m, kind) and m.running_mean is not None}


def has_batchnorm(model: nn.Module) -> bool:
    """Whether there are running statistics that new weights need anew."""
    return bool(_norms(model))


def _state(norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    return norm.running_mean, norm.running_var, norm.num_batches_tracked


def _need_finite(norms: dict[str, Any], number: int, inputs: Any) -> None:
    for name, norm in norms.items():
        if not bool(norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):
            raise ValueError(
                f"calibration batch {number}: the input of BatchNorm {name!r} holds NaN or infinity; {origin(inputs)}"
            )
