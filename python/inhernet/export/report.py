"""What `optimize` chose, why, and where that is valid."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

import inherit_kernels

from ..console import say, table
from .forms import FORMS
from .sites import Site

FORMAT_VERSION = 1


@dataclass(frozen=True)
class LayerChoice:
    """One layer: what it takes in, the form chosen, and the figures behind it.

    Attributes:
        site: the layer's name, and the BatchNorm, addition and activation that it takes in.
        form: "dense", "unfused", "fused", "packed", "blas" or "triton".
        reason: why this form, in a few words.
        microseconds: median per form, "given" for the modules as they were; empty where there was nothing to choose.
        weight_bytes: the layer's own parameters.
        extra_bytes: what the form holds beside them: panels, folded or merged weights.
    """

    site: Site
    form: str
    reason: str = ""
    microseconds: dict[str, float] = field(default_factory=dict)
    weight_bytes: int = 0
    extra_bytes: int = 0


@dataclass(frozen=True)
class Optimization:
    """What `optimize` decided for a model; `model.optimization` of its result. `show()` prints it.

    Attributes:
        layers: one choice per layer.
        kept: "optimised", or "given" where the whole was not faster than the model it came from.
        channels_last: whether images are turned to channels-last at the entry.
        cuda_graph: whether calls on a GPU run in CUDA graphs.
        traced: whether the forward is a rewritten torch.fx graph; `untraced` says why not.
        milliseconds: median per call of the whole model: "given", and each variant measured.
        device, versions: where and with what it was measured.
    """

    layers: tuple[LayerChoice, ...]
    kept: str = "optimised"
    channels_last: bool = False
    cuda_graph: bool = False
    traced: bool = False
    untraced: str = ""
    milliseconds: dict[str, float] = field(default_factory=dict)
    device: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def forms(self) -> dict[str, str]:
        """Layer name -> form."""
        return {layer.site.name: layer.form for layer in self.layers}

    @property
    def weight_bytes(self) -> int:
        """Bytes of the layers' own parameters, which stay so that the model can be saved."""
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def extra_bytes(self) -> int:
        """Bytes that the forms hold beside them."""
        return sum(layer.extra_bytes for layer in self.layers)

    def to_json(self) -> str:
        return json.dumps({"format": "inhernet-optimized", "version": FORMAT_VERSION, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Optimization:
        """Read what `to_json` wrote.

        Raises:
            ValueError: another format or version, or entries of another form.
        """
        values = json.loads(text)
        if not isinstance(values, dict) or values.pop("format", None) != "inhernet-optimized":
            raise ValueError('it does not say "format": "inhernet-optimized"')
        version = values.pop("version", None)
        if version != FORMAT_VERSION:
            raise ValueError(f"it has version {version!r}, expected {FORMAT_VERSION}; optimise the model again")
        try:
            layers = tuple(LayerChoice(**{**layer, "site": Site(**layer["site"])}) for layer in values.pop("layers"))
            found = cls(layers=layers, **values)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"an entry is missing or unknown: {error}") from error
        if found.kept not in ("optimised", "given") or any(form not in FORMS for form in found.forms.values()):
            raise ValueError("it names a form that does not exist")
        return found

    def mismatch(self, device: torch.device) -> str | None:
        """One sentence why the choices were not measured for this device and these versions, or None."""
        for what, then, now in (("device", self.device, stamp(device)), ("versions", self.versions, versions())):
            for key in sorted(set(then) | set(now)):
                if then.get(key) != now.get(key):
                    return f"{what}: {key} was {then.get(key)!r}, here it is {now.get(key)!r}"
        return None

    def show(self) -> None:
        """Print the choices as a table, and the whole model's figures."""
        rows = []
        measured = {name for layer in self.layers for name in layer.microseconds}
        shown = [name for name in ("given", *FORMS) if name in measured]
        for layer in self.layers:
            site = layer.site
            taken = [site.batchnorm and "batchnorm", "add" if site.residual else None, site.activation]
            times = [_figure(layer.microseconds.get(name)) for name in shown]
            sizes = (_size(layer.weight_bytes), _size(layer.extra_bytes))
            rows.append((site.name, " ".join(filter(None, taken)), *times, layer.form, *sizes, layer.reason))
        names = tuple(f"{name} µs" for name in shown)
        columns = ("layer", "takes in", *names, "form", "weights", "beside", "why")
        if rows:
            table(f"forms of {len(rows)} layers", columns, rows, left=(0, 1, len(shown) + 2, len(shown) + 5))
        for name, value in self.milliseconds.items():
            base = self.milliseconds["given"]
            say(f"whole model, {name}: {value:.3f} ms" + (f" ({base / value:.2f}×)" if name != "given" else ""))
        graph = " in a CUDA graph" if self.cuda_graph else ""
        if self.kept == "given":
            say(f"kept the model as it was given{graph}: no other variant was faster, or gave the same outputs")
        else:
            layout = ", images channels-last" if self.channels_last else ""
            how = "traced and rewritten" if self.traced else f"layers replaced one by one, because {self.untraced}"
            say(f"kept the optimised form{layout}{graph and ','}{graph}; forward {how}")
            say(f"memory: {_size(self.weight_bytes)} of layer weights, {_size(self.extra_bytes)} beside them")


def stamp(device: torch.device) -> dict[str, Any]:
    """What a measurement depends on: the processor, its instruction set, the number of threads."""
    if device.type == "cuda":
        return {"type": "cuda", "name": torch.cuda.get_device_name(device)}
    native = inherit_kernels.status().facts["native library"]
    return {
        "type": device.type,
        "name": _processor(),
        "native": native.split(", ")[1] if "," in native else native,
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    """The versions whose kernels were measured."""
    return {"inherit_kernels": inherit_kernels.__version__, "torch": str(torch.__version__)}


@cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
