"""Second moments of a teacher's layers: of the inputs, and of the gradients at the outputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..console import progress
from .batches import (
    batch_size,
    call,
    device_of,
    floating_outputs,
    model_inputs,
    real_rows,
    reusable,
    token_masks,
    undisturbed,
)
from .factorise import Moments
from .rows import length_of

# A layer's name and the initialisation its moments are for.
Key = tuple[str, str]
# Fewer samples than this are warned of: their moments say more about them than about the task.
FEW_SAMPLES = 8
# Patches are unfolded in pieces of at most this many numbers (64 MB in float32).
UNFOLD_LIMIT = 1 << 24


def same_padding(layer: Any) -> list[int]:
    """Padding of a convolution in the order of `F.pad`: left, right, top, bottom ("same" is larger at the far end)."""
    if layer.padding == "valid":
        return [0, 0, 0, 0]
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [part for total in reversed(totals) for part in (total // 2, total - total // 2)]
    return [layer.padding[1], layer.padding[1], layer.padding[0], layer.padding[0]]


def patches(layer: Any, x: Tensor) -> Tensor:
    """The patches a convolution sees, `[B, C, Hi, Wi]` → rows `[B·Ho·Wo, C·kh·kw]`."""
    x = F.pad(x, same_padding(layer))
    columns = F.unfold(x, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def collect_moments(
    model: nn.Module,
    needs: Iterable[Key],
    calibration: Iterable[Any],
    *,
    output_fn: Callable[[Any], Any] | None = None,
    projections: int = 1,
    seed: int = 0,
) -> dict[Key, Moments]:
    """One pass over the data; flags, buffers and gradients of the model are as before afterwards, on any exit.

    For "fisher" every floating tensor of the model's output (or of `output_fn(output)`) is projected on Gaussian
    directions, padded tokens left out and each tensor scaled by its RMS; the gradients g at the layers' outputs give
    `G = Σ g gᵀ`, and `M = Σ |g|² x xᵀ / Σ |g|²`: the half step of the nearest Kronecker product that lets positions
    count by how much the output feels them (measured on MiniLM at 50 %: cosine 0.891 → 0.903).

    Args:
        needs: (layer name, "activation" or "fisher") pairs.
        calibration: batches: tensors, tuples or lists whose first element is the input, or dicts (called as keyword
            arguments; `attention_mask` marks the real tokens).
        output_fn: what of the output to preserve, e.g. `lambda out: out.last_hidden_state`.
        projections: Gaussian directions per batch.
        seed: of the directions.

    Raises:
        ValueError: no batches, no floating output to project, or a NaN or infinity on the way (with the batch's number
            and the layer's name).
        TypeError: a batch of an unknown form.

    Warns:
        UserWarning: fewer than 8 samples.
    """
    modules = dict(model.named_modules())
    needs = list(needs)
    fisher = any(init == "fisher" for _, init in needs)
    generator = torch.Generator().manual_seed(seed)
    device, draws = device_of(model), 0
    scales: dict[str, float] = {}
    calibration = reusable(calibration)
    with (
        undisturbed(model),
        torch.inference_mode(False),
        torch.set_grad_enabled(fisher),
        progress("calibration", length_of(calibration)) as bar,
    ):
        sums = {(name, init): _Sums(name, modules[name], init == "fisher") for name, init in needs}
        for number, batch in enumerate(calibration, 1):
            inputs = model_inputs(batch, device)
            draws += batch_size(inputs) * projections
            try:
                _one_batch(model, sums, inputs, output_fn, projections, generator, scales)
            except NotFinite as problem:
                raise ValueError(f"calibration batch {number}: {problem}; {origin(inputs)}") from None
            bar.advance()
    if not draws:
        raise ValueError("calibration yielded no batches (or only empty ones); expected at least one")
    samples = draws // projections
    if samples < FEW_SAMPLES:
        warnings.warn(
            f"calibration holds {samples} sample{'s' * (samples > 1)}, and the ranks fit these rather than the task; "
            "256 varied samples serve",
            stacklevel=4,
        )
    return {key: s.moments(draws) for key, s in sums.items()}


class NotFinite(Exception):
    """A NaN or an infinity, and where it was met."""


def origin(inputs: Any) -> str:
    """Whether a batch brought the NaN or infinity that was met, and what to do."""
    tensors = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    if all(bool(t.isfinite().all()) for t in tensors if isinstance(t, Tensor)):
        return "the batch itself is finite, so the model makes them: look at its weights and its dtype"
    return "the batch itself holds them: clean it or leave it out"


class _Sums:
    """Running sums of one layer's moments, on its smaller side (see `Moments`)."""

    def __init__(self, name: str, module: Any, fisher: bool) -> None:
        self.name, self.module, self.fisher = name, module, fisher
        self.conv = isinstance(module, nn.Conv2d)
        self.weight = _real(module.weight.detach().flatten(1))
        self.rows, self.columns = self.weight.shape
        self.narrow = self.rows > self.columns  # the inputs are the smaller side
        side = min(self.rows, self.columns)
        self.inputs = self.weight.new_zeros(side, side)
        self.outputs = self.weight.new_zeros(side, side)
        self.input_square = self.output_square = self.total = 0.0

    def capture(self, x: Tensor, y: Tensor, masks: list[Tensor]) -> list[tuple[Tensor, Tensor, slice]]:
        """Pieces of (vectors on the smaller side, squared input norms, part of the batch), padded tokens left out."""
        if not self.conv:
            rows = _real(real_rows(x, masks))
            return [(rows if self.narrow else self._centred(real_rows(y, masks)), _squares(rows), slice(None))]
        if not self.narrow:
            return [(self._centred(_pixels(y)), _patch_squares(self.module, x), slice(None))]
        pieces = []
        step = max(1, UNFOLD_LIMIT // max(1, self.columns * y.shape[-1] * y.shape[-2]))
        for start in range(0, len(x), step):
            rows = _real(patches(self.module, x[start : start + step]))
            pieces.append((rows, _squares(rows), slice(start, start + step)))
        return pieces

    def _centred(self, rows: Tensor) -> Tensor:
        """The outputs without bias, `W x`."""
        return _real(rows) if self.module.bias is None else _real(rows) - _real(self.module.bias.detach())

    def add(self, vectors: Tensor, squares: Tensor, weight: Tensor | None = None) -> None:
        """Add `Σ w v vᵀ`, `Σ w |x|²`, `Σ w`."""
        scaled = vectors if weight is None else vectors * weight.unsqueeze(1)
        self.inputs += scaled.mT @ vectors
        self.input_square += float(squares.sum() if weight is None else (squares * weight).sum())
        self.total += float(len(vectors) if weight is None else weight.sum())

    def add_gradient(self, gradient: Tensor, captured: list[tuple[Tensor, Tensor, slice]], masks: list[Tensor]) -> None:
        for vectors, squares, piece in captured:
            g = _real(_pixels(_images(gradient)[piece]) if self.conv else real_rows(gradient, masks))
            weight = _squares(g)
            self.need_finite("the gradient at the output", weight)
            self.output_square += float(weight.sum())
            side = g @ self.weight if self.narrow else g
            self.outputs += side.mT @ side
            self.add(vectors, squares, weight)

    def need_finite(self, what: str, *tensors: Tensor) -> None:
        if not all(bool(t.isfinite().all()) for t in tensors):
            raise NotFinite(f"{what} of layer {self.name!r} holds NaN, infinity or what overflows when squared")

    def moments(self, draws: int) -> Moments:
        total = self.total if self.total > 0 else 1.0
        result = Moments(self.inputs.cpu() / total, self.input_square / total / self.columns)
        if self.fisher:
            # Divided by samples, not positions: a layer seen at more positions moves the output more (K-FAC, "expand").
            result.outputs, result.output_mean = self.outputs.cpu() / draws, self.output_square / draws / self.rows
        return result


def _one_batch(
    model: nn.Module,
    sums: dict[Key, _Sums],
    inputs: Any,
    output_fn: Callable[[Any], Any] | None,
    projections: int,
    generator: torch.Generator,
    scales: dict[str, float],
) -> None:
    masks = token_masks(inputs)
    leaves: list[Tensor] = []
    handles = [
        s.module.register_forward_hook(_hook(s, masks, leaves), prepend=True, with_kwargs=True) for s in sums.values()
    ]
    try:
        output = call(model, inputs)
        if not leaves:
            return
        targets = floating_outputs(output if output_fn is None else output_fn(output))
        targets = [(name, tensor) for name, tensor in targets if tensor.requires_grad]
        if not targets:
            raise ValueError(
                "init='fisher' found no floating output that depends on the selected layers; pass output_fn= name one"
            )
        for index in range(projections):
            terms = [project(name, tensor, masks, generator, scales) for name, tensor in targets]
            torch.autograd.grad(
                torch.stack(terms).sum(), leaves, retain_graph=index + 1 < projections, allow_unused=True
            )
    finally:
        for handle in handles:
            handle.remove()


def project(
    name: str, tensor: Tensor, masks: list[Tensor], generator: torch.Generator, scales: dict[str, float]
) -> Tensor:
    """Inner product with a Gaussian direction, zero on padded tokens, over the tensor's RMS in its first batch."""
    direction = torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
    for mask in masks:
        if tensor.dim() >= 3 and tensor.shape[:2] == mask.shape:
            # Selected, not multiplied by zero: whatever stands on a padded position (NaN too) stays out.
            tensor, direction = tensor[mask], direction[mask]
            break
    if not bool(tensor.isfinite().all()):
        raise NotFinite(f"the model's {name!r} holds NaN or infinity (output_fn= chooses another)")
    if name not in scales:
        rms = float(tensor.detach().float().square().mean().sqrt())
        scales[name] = 1.0 / rms if rms > 0 else 1.0
    return (tensor * direction).sum() * scales[name]


def _hook(sums: _Sums, masks: list[Tensor], leaves: list[Tensor]) -> Callable[..., Tensor | None]:
    def forward_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        x, y = (args[0] if args else kwargs["input"]).detach(), output.detach()
        captured = sums.capture(_images(x), _images(y), masks) if sums.conv else sums.capture(x, y, masks)
        sums.need_finite("the input", *(squares for _, squares, _ in captured))
        sums.need_finite("the input or output", *(vectors for vectors, _, _ in captured))
        if not sums.fisher:
            for vectors, squares, _ in captured:
                sums.add(vectors, squares)
            return None
        if not torch.is_grad_enabled():
            return None  # the model runs this part under no_grad: no gradient will ever arrive
        if not output.requires_grad:
            # The parameters are frozen, so the first layers start the graph.
            leaves.append(output.detach().requires_grad_())
            output = leaves[-1]
        # The clone, not what was captured, is what ReLU(inplace=True) right behind would overwrite.
        result = output.clone()
        version = None if x.is_inference() else x._version

        def backward_hook(gradient: Tensor) -> None:
            if sums.narrow and version is not None and x._version != version:
                raise RuntimeError(
                    f"the input of a {type(module).__name__} was changed in place after the layer had read it; "
                    "init='fisher' needs it: make that operation out of place, or use init='activation'"
                )
            with torch.no_grad():
                sums.add_gradient(gradient.detach(), captured, masks)

        result.register_hook(backward_hook)
        return result

    return forward_hook


def _real(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _squares(rows: Tensor) -> Tensor:
    """Squared norms of the rows."""
    return rows.square().sum(1)


def _images(t: Tensor) -> Tensor:
    return t.unsqueeze(0) if t.dim() == 3 else t


def _pixels(y: Tensor) -> Tensor:
    """`[B, N, Ho, Wo]` → `[B·Ho·Wo, N]`."""
    return y.flatten(2).transpose(1, 2).flatten(0, 1)


def _patch_squares(layer: Any, x: Tensor) -> Tensor:
    """Squared norms of a convolution's patches, `[B·Ho·Wo]`, without unfolding them: a one-channel sum of x²."""
    square = F.pad(_real(x).square().sum(1, keepdim=True), same_padding(layer))
    ones = square.new_ones(1, 1, *layer.kernel_size)
    return F.conv2d(square, ones, stride=layer.stride, dilation=layer.dilation).flatten()
