"""Calibration batches of any common form, run through a model that is left exactly as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MASK_KEYS = ("attention_mask", "decoder_attention_mask")


def reusable(loader: Iterable[Any], what: str = "calibration") -> Iterable[Any]:
    """`loader`, or a list of its batches when it can be iterated only once."""
    if isinstance(loader, (Tensor, Mapping, str)) or not isinstance(loader, Iterable):
        raise TypeError(
            f"{what} is {type(loader).__name__}, expected an iterable of batches; put a single batch in a list"
        )
    return list(loader) if isinstance(loader, Iterator) else loader


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> Any:
    """A deep copy, of modules with old-style weight_norm, spectral_norm or pruning too: their `weight` is the result of
    a computation, which torch does not copy, and is made anew at the next call anyway."""
    made = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    known = {id(value): value.detach().clone() for value in made if not value.is_leaf}
    return copy.deepcopy(model, {**known, **(memo or {})})


def model_inputs(batch: Any, device: torch.device) -> Any:
    """What the model is called with: a dict, or the batch itself, or the first element of a tuple or list; detached."""
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ValueError("a calibration batch is an empty sequence; expected (inputs, ...)")
        batch = batch[0]
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, Tensor):
        return _moved(batch, device)
    raise TypeError(
        f"a calibration batch is {type(batch).__name__}; expected a tensor, a dict of tensors, or a tuple whose first "
        "element is one of these"
    )


def _moved(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach().to(device)
    return value.clone() if value.is_inference() else value


def call(model: nn.Module, inputs: Any) -> Any:
    """`model(**inputs)` for a dict, else `model(inputs)`."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def batch_size(inputs: Any) -> int:
    """Length of the first tensor's first dimension."""
    tensors = [v for v in inputs.values() if isinstance(v, Tensor)] if isinstance(inputs, Mapping) else [inputs]
    return int(tensors[0].shape[0]) if tensors and tensors[0].dim() else 1


def token_masks(inputs: Any) -> list[Tensor]:
    """Boolean `[B, T]` masks of real tokens that came with a dict batch."""
    if not isinstance(inputs, Mapping):
        return []
    found = (inputs.get(key) for key in MASK_KEYS)
    return [mask.bool() for mask in found if isinstance(mask, Tensor) and mask.dim() == 2]


def real_rows(x: Tensor, masks: list[Tensor]) -> Tensor:
    """`x` `[..., K]` as rows `[P, K]` without padded tokens, where its leading dimensions are those of a mask."""
    for mask in masks:
        if x.dim() >= 3 and x.shape[:2] == mask.shape:
            return x[mask].reshape(-1, x.shape[-1])
        if x.dim() == 2 and mask.shape[1] > 1 and x.shape[0] == mask.numel():
            return x[mask.flatten()]
    return x.reshape(-1, x.shape[-1])


def floating_outputs(output: Any, prefix: str = "output") -> list[tuple[str, Tensor]]:
    """Every floating tensor of a model's output with a name, scalars (losses) left out."""
    if isinstance(output, Tensor):
        return [(prefix, output)] if output.is_floating_point() and output.dim() > 0 else []
    if isinstance(output, Mapping):
        items = [(str(key), value) for key, value in output.items()]
    elif isinstance(output, (tuple, list)):
        items = [(f"{prefix}[{index}]", value) for index, value in enumerate(output)]
    else:
        return []
    return [pair for name, value in items for pair in floating_outputs(value, name)]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without parameter gradients inside; training and requires_grad flags restored on any exit."""
    training = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
