"""What the four modules share: construction around a dense layer, filling, packing."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import inherit_kernels

from .dense_view import DenseWeightView
from .factors import balance, svd_factors, zero_sum_noise


class Gate(nn.Module):
    """Softmax gate over heads: `g = softmax(t·weightᵀ + bias)`.

    Shapes: `t` `[..., R]`, `weight` `[H, R]`, `bias` `[H]`, result `[..., H]`. It is not an `nn.Linear` on purpose:
    tools that replace every linear layer must leave it alone. The owning module hands its parameters to the fused op
    and does not call it; call it for inspection or for a balance loss.
    """

    def __init__(self, rank: int, heads: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(heads, device=device, dtype=dtype))

    def forward(self, t: Tensor) -> Tensor:
        return torch.softmax(nn.functional.linear(t, self.weight, self.bias), dim=-1)

    def extra_repr(self) -> str:
        return f"rank={self.weight.shape[1]}, heads={self.weight.shape[0]}"


class LowRankModule(nn.Module):
    """Base of the low-rank modules: parameters `down`, `up`, `bias` (gated ones also `gate.weight`, `gate.bias`)."""

    op_name: ClassVar[str]
    rank: int
    heads: int = 1
    down: nn.Parameter
    up: nn.Parameter
    bias: nn.Parameter | None
    #: How many of the ranks are in use, the first ones; None: all, 0: none, `full` computes. Set by `use`.
    leading: int | None = None
    _packed: Any = None

    def _register_factors(
        self, down: tuple[int, ...], out: int, bias: bool, heads: int | None, device: Any, dtype: torch.dtype | None
    ) -> None:
        """Create the parameters; `heads` None means plain (no gate, no head dimension)."""
        _require_positive("rank", down[0])
        _require_positive("input size", min(down[1:]))
        _require_positive("output size", out)
        lead: tuple[int, ...] = ()
        if heads is not None:
            _require_positive("heads", heads)
            lead = (heads,)
        make = {"device": device, "dtype": dtype}
        self.rank = down[0]
        self.heads = heads or 1
        self.down = nn.Parameter(torch.empty(down, **make))
        self.up = nn.Parameter(torch.empty((*lead, out, down[0]), **make))
        if bias:
            self.bias = nn.Parameter(torch.empty((*lead, out), **make))
        else:
            self.register_parameter("bias", None)
        if heads is not None:
            self.gate = Gate(down[0], heads, **make)
        self.reset_parameters()

    @property
    def gated(self) -> bool:
        """Whether the module mixes heads with a gate (also true for a gate over one head)."""
        return self.up.dim() == 3

    @property
    def full(self) -> Any:
        """The dense layer of those levels of an elastic network at which no rank pays, or None."""
        return self._modules.get("full")

    def weights(self) -> tuple[Tensor | None, ...]:
        """The op's weight arguments in the op's order, bias last."""
        if self.leading is not None:
            return self._first(self.leading)
        try:
            # nn.Module.__getattr__ costs 0.7 to 1.4 µs a parameter: half of a small layer's time.
            own, gate = self._parameters, self._modules.get("gate")
            if gate is None:
                return own["down"], own["up"], own["bias"]
            mixing = gate._parameters
            return own["down"], own["up"], mixing["weight"], mixing["bias"], own["bias"]
        except KeyError:  # a parametrization, a replica or a sharder keeps them elsewhere
            if self.gated:
                return self.down, self.up, self.gate.weight, self.gate.bias, self.bias
            return self.down, self.up, self.bias

    def _first(self, rank: int) -> tuple[Tensor | None, ...]:
        down, up = self.down[:rank], self.up[..., :rank]
        return (
            (down, up, self.gate.weight[:, :rank], self.gate.bias, self.bias) if self.gated else (down, up, self.bias)
        )

    def use(self, rank: int | None) -> LowRankModule:
        """Compute with the first `rank` directions only (None: all), as views: nothing is copied, gradients reach the whole.
        0: with the dense layer `full`.

        Raises:
            ValueError: the module has fewer ranks, or no dense layer.
        """
        if rank is not None and not (self.full is None) <= rank <= self.rank:
            raise ValueError(f"rank is {rank}, expected 1 to {self.rank}, the ranks that the module has, or None")
        self.leading = None if rank == self.rank else rank
        return self.unpack()

    def densely(self, input: Tensor) -> Tensor:
        """What the dense layer `full` computes."""
        result: Tensor = self.full(input)
        return result

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random start with the output variance of the dense layer's default init (`Var W = 1/(3K)`).

        Norms are balanced as in a decomposition, heads are drawn independently (scaled by √H, because a uniform gate
        averages them) and the gate starts at zero.
        """
        with torch.no_grad():
            fan_in, out = self.down[0].numel(), self.up.shape[-2]
            product = (self.heads / (3.0 * fan_in * self.rank)) ** 0.5
            ratio = (out / fan_in) ** 0.25
            _normal_(self.down, product**0.5 * ratio, generator)
            _normal_(self.up, product**0.5 / ratio, generator)
            if self.bias is not None:
                _uniform_(self.bias, fan_in**-0.5, generator)
            if self.gated:
                self.gate.weight.zero_()
                self.gate.bias.zero_()
        self.unpack()

    @torch.no_grad()
    def fill_(
        self,
        down: Tensor,
        up: Tensor,
        bias: Tensor | None = None,
        *,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> LowRankModule:
        """Copy a factor pair in, as it is; every head gets the full `up` plus zero-sum noise, the gate becomes zero.

        Args:
            down: `[R, K]` (a convolution's `K = C·kh·kw`).
            up: `[N, R]`.
            bias: `[N]`, given to every head; None fills the module's bias, where it has one, with zeros.
            noise: standard deviation of the head perturbation relative to `std(up)`.
            generator: source of the perturbation; the global one of the device otherwise.

        Raises:
            ValueError: a shape does not fit, or a bias is given to a module without one.
        """
        _require_shape("down", down, (self.rank, self.down[0].numel()))
        _require_shape("up", up, tuple(self.up.shape[-2:]))
        if bias is not None:
            if self.bias is None:
                raise ValueError("bias is given, but this module has none; build it with bias=True")
            _require_shape("bias", bias, (self.up.shape[-2],))
        self.down.copy_(down.reshape(self.down.shape))
        self.up.copy_(up + zero_sum_noise(up, self.heads, noise, generator) if self.gated else up)
        if self.bias is not None:
            self.bias.copy_(bias) if bias is not None else self.bias.zero_()
        if self.gated:
            self.gate.weight.zero_()
            self.gate.bias.zero_()
        self.unpack()
        return self

    @property
    def weight(self) -> Tensor:
        """The equal dense weight, shaped as the source layer's, its numbers computed at each use.

        For code that looks into a layer, as transformers does for its dtype (ViT, CLIP, T5), which costs 10 µs; the
        forward never uses it. Its numbers raise the ValueError of `dense_weight` where no dense layer equals this one.
        """
        shape = (self.up.shape[-2], *self.down.shape[1:])
        if torch.compiler.is_compiling() or self.up.is_meta:  # dynamo drops what nobody uses
            return self.dense_weight()[0].view(shape)
        return DenseWeightView(self, shape)

    @torch.no_grad()
    def dense_weight(self) -> tuple[Tensor, Tensor | None]:
        """The equal dense weight `[N, K]` and bias `[N]`, computed in float64 and returned in the module's dtype.

        Raises:
            ValueError: the gate reads the input (several heads and a non-zero `gate.weight`), so that no single
                dense layer equals this module.
        """
        if self.leading == 0:
            return self.full.weight.flatten(1), self.full.bias
        down, up, *mixing, bias = self._in_float64()
        if self.gated:
            if self.heads > 1 and bool((mixing[0] != 0).any()):
                raise ValueError(
                    f"gate.weight is not zero, so the mixture of the {self.heads} heads depends on the input and no "
                    "dense layer equals this module; to_dense() needs one head, or gate.weight == 0"
                )
            share = torch.softmax(mixing[1], 0)
            up = torch.einsum("h,hnr->nr", share, up)
            bias = None if bias is None else share @ bias
        weight = up @ down.flatten(1)
        return weight.to(self.up.dtype), None if bias is None else bias.to(self.up.dtype)

    def _in_float64(self) -> list[Any]:
        return [None if weight is None else weight.double() for weight in self.weights()]

    def pack(self) -> LowRankModule:
        """Prepare the weights for the fastest inference kernels (an explicit step; weights stay as they are).

        The pack serves calls that need no gradient. Training mode, `load_state_dict` and `.to()` drop it; it is never
        saved, copied or pickled. After writing to a parameter by hand, pack again.

        Raises:
            RuntimeError: the module is in training mode.
        """
        if self.training:
            raise RuntimeError("pack() needs an eval-mode module: weights change in training; call eval() first")
        if self.leading == 0:
            return self  # the dense layer has nothing to pack
        self._packed = inherit_kernels.pack(self.op_name, *(w if w is None else w.detach() for w in self.weights()))
        return self

    def unpack(self) -> LowRankModule:
        """Drop the pack, if there is one."""
        self._packed = None
        return self

    @property
    def packed(self) -> bool:
        """Whether a pack is held."""
        return self._packed is not None

    def _operands(self) -> tuple[Any, ...]:
        if self._packed is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.weights()
        return (self._packed,)

    def train(self, mode: bool = True) -> LowRankModule:
        if mode:
            self.unpack()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> LowRankModule:
        self.unpack()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_packed"}


def like_dense(cls: type[LowRankModule], layer: Any, bias: bool, *args: Any, **kwargs: Any) -> Any:
    """Build `cls` uninitialised with the device, dtype, training flag and `requires_grad` of `layer`."""
    weight = layer.weight
    # On meta nothing is computed and no random number is drawn; filling comes after.
    module = cls(*args, **kwargs, bias=bias, device="meta", dtype=weight.dtype)
    if weight.device.type != "meta":
        module = module.to_empty(device=weight.device)
    module.requires_grad_(weight.requires_grad)
    if module.bias is not None and layer.bias is not None:
        module.bias.requires_grad_(layer.bias.requires_grad)
    return module.train(layer.training)


def take_over(
    module: Any,
    layer: Any,
    factors: tuple[Tensor, Tensor] | None = None,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Any:
    """Fill a module with a layer's balanced factors (its exact truncated SVD if none are given) and its bias."""
    if not module.down.is_meta:
        down, up = balance(*(factors or svd_factors(layer.weight, module.rank)))
        module.fill_(down, up, layer.bias, noise=noise, generator=generator)
    return module


def wants_bias(layer: Any, head_bias: str | None) -> bool:
    """Resolve the bias rule: "source" (or None) follows the source layer, "always" gives every head a bias."""
    if head_bias not in (None, "source", "always"):
        raise ValueError(f'head_bias is {head_bias!r}, expected "source" or "always"')
    return head_bias == "always" or layer.bias is not None


def _require_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected an integer of at least 1")


def _require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


def _normal_(tensor: Tensor, std: float, generator: torch.Generator | None) -> None:
    tensor.copy_(_draw(torch.randn, tensor, generator) * std)


def _uniform_(tensor: Tensor, bound: float, generator: torch.Generator | None) -> None:
    tensor.copy_((_draw(torch.rand, tensor, generator) * 2 - 1) * bound)


def _draw(sample: Any, tensor: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw on the generator's device: a CPU generator gives the same numbers whatever device the module is on."""
    device = tensor.device if generator is None or tensor.is_meta else generator.device
    generator = None if tensor.is_meta else generator
    return sample(tensor.shape, dtype=torch.float32, device=device, generator=generator)
