"""How a saved directory names its architecture, and which names are followed without the caller's consent.

A name is data from a file that may be hostile. Without consent it can only pick a function listed in
`inhernet.models.__all__`, or a model class of transformers by its configuration class; nothing else is imported.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z][A-Za-z0-9_]*)+", re.ASCII)
_MODELS = "inhernet.models."
_TRANSFORMERS = "transformers."
# Configuration entries that make transformers fetch or run something besides the model class.
_REFUSED = ("auto_map", "custom_pipelines", "quantization_config", "trust_remote_code", "use_pretrained_backbone")
_ATTENTION = (None, "eager", "sdpa", "flex_attention", "flash_attention_2")
# What transformers calls `model_type`. A test searches the code of these (transformers 5.23) for imports by name, fetches, and
# models chosen by another configuration, and finds none. Anything else needs consent.
MODEL_TYPES = frozenset(
    (  # noqa: SIM905  (a list would have a line per name)
        "albert bert camembert canine convbert data2vec-text deberta deberta-v2 distilbert dpr electra ernie esm fnet funnel "
        "gte layoutlm longformer luke megatron-bert mobilebert modernbert mpnet nomic_bert nystromformer rembert roberta "
        "roberta-prelayernorm roformer squeezebert xlm xlm-roberta xlm-roberta-xl xlnet "
        "bloom codegen cohere cohere2 deepseek_v2 deepseek_v3 falcon gemma gemma2 glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox "
        "gpt_oss gptj granite granitemoe llama mamba mamba2 ministral mistral mixtral mpt nemotron olmo olmo2 olmo3 olmoe "
        "openai-gpt opt persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe smollm3 stablelm starcoder2 "
        "bart blenderbot led longt5 m2m_100 marian mbart mt5 nllb-moe pegasus prophetnet switch_transformers t5 umt5 "
        "align_text_model align_vision_model beit bit blip_text_model blip_vision_model clip clip_text_model "
        "clip_vision_model convnext convnextv2 cvt data2vec-vision deit dinat dinov2 dinov2_with_registers dinov3_convnext "
        "dinov3_vit efficientnet focalnet hiera ijepa levit mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 poolformer pvt "
        "pvt_v2 regnet resnet sam sam_mask_decoder sam_prompt_encoder sam_vision_model segformer siglip siglip2 "
        "siglip2_text_model siglip2_vision_model siglip_text_model siglip_vision_model swiftformer swin swinv2 videomae vit "
        "vit_mae vit_msn yolos "
        "audio-spectrogram-transformer data2vec-audio hubert sew speech_to_text unispeech wav2vec2-bert wavlm whisper "
    ).split()
)
# Integers of a saved description: sizes, depths, token numbers. The base of a rotary embedding alone may be larger.
_LARGEST = 2**24
_MAY_BE_LARGER = ("theta", "base")
# What a builder raises for arguments that are not its own.
_FAILURES = (
    TypeError, ValueError, RuntimeError, AttributeError, LookupError, ArithmeticError, AssertionError, ImportError, MemoryError
)  # fmt: skip


class Untrusted(ValueError):
    """A name that needs the caller's consent; `package` is what would have to be trusted."""

    def __init__(self, message: str, package: str) -> None:
        super().__init__(f"{message}. If you trust it, pass trust=({package + '.'!r},)")
        self.message, self.package = message, package


def describe(
    model: nn.Module, factory: str | Callable[..., nn.Module] | None, args: dict[str, Any] | None
) -> tuple[str, dict[str, Any]]:
    """The factory name and plain arguments that rebuild `model`'s dense architecture.

    Raises:
        ValueError: nothing says how the model is built, or the factory cannot be named; TypeError: an argument is not
            plain data.
    """
    if factory is None:
        if args is not None:
            raise ValueError(
                f"args is {args!r} without a factory; give both, or neither for a model that knows its own"
            )
        factory, args = _own_description(model)
    elif callable(factory):
        factory = f"{getattr(factory, '__module__', '')}.{getattr(factory, '__qualname__', type(factory).__qualname__)}"
    args = {} if args is None else args
    if not isinstance(factory, str) or not _NAME.fullmatch(factory):
        raise ValueError(
            f"factory is {factory!r}, expected a function at the top level of a module, as a callable or as "
            '"package.module.function" (no lambda, no method, no leading underscore)'
        )
    if not isinstance(args, dict):
        raise TypeError(f"args is {args!r}, expected a dictionary of keyword arguments")
    return factory, plain(args, "args")


def _own_description(model: nn.Module) -> tuple[str, dict[str, Any]]:
    known = getattr(model, "inhernet_factory", None)
    if known is not None and not known[0].startswith(_TRANSFORMERS):
        return known
    config: Any = getattr(model, "config", None)
    if type(model).__module__.startswith(_TRANSFORMERS) and type(config).__module__.startswith(_TRANSFORMERS):
        values = json.loads(config.to_json_string(use_diff=False))
        values = {key: value for key, value in values.items() if key not in _REFUSED}
        return _TRANSFORMERS + type(config).__name__, {"model": type(model).__name__, "config": values}
    raise ValueError(
        f"factory is None and {type(model).__name__} does not say how it is built; "
        'pass factory="package.module.function" and args={...} that build the dense architecture'
    )


def plain(value: Any, where: str) -> Any:
    """The value as JSON can hold it without loss (tuples become lists); TypeError naming the place otherwise."""
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    raise TypeError(f"{where} is {value!r}, expected plain data: None, bool, int, finite float, str, list, dict")


def build(
    name: Any,
    args: Any,
    factory: Callable[..., nn.Module] | None = None,
    trust: Sequence[str] = (),
    parameters: int | None = None,
) -> nn.Module:
    """Build the architecture that a directory names, its parameters on meta and its buffers real.

    Args:
        name: the factory's name as read.
        args: its keyword arguments as read.
        factory: the caller's own builder, used in place of the name.
        trust: package prefixes whose functions the caller allows to run.
        parameters: how many parameters at most may be made: a damaged depth must not build for hours.

    Raises:
        Untrusted: a name outside what is allowed without consent.
        ValueError: bad arguments, too many parameters, or a result that is not an nn.Module.
    """
    if isinstance(trust, str) or not all(isinstance(prefix, str) and prefix.strip(".") for prefix in trust):
        raise ValueError(f'trust is {trust!r}, expected a tuple of package names such as ("mypackage.",)')
    if not isinstance(args, dict):
        raise ValueError(f"args is {args!r}, expected an object of keyword arguments")
    if factory is not None and not callable(factory):
        raise ValueError(f"factory is {factory!r}, expected a callable that builds the model")
    if factory is None:
        _need_moderate(args, "args")
    make = partial(factory, **args) if factory is not None else _resolve(name, args, tuple(trust))
    state = torch.random.get_rng_state()
    try:
        with parameters_on_meta(parameters):
            model = make()
    except Untrusted:
        raise
    except _FAILURES as error:
        raise ValueError(f"factory {name!r} failed with args {args!r}: {error}") from error
    finally:
        torch.random.set_rng_state(state)
    if not isinstance(model, nn.Module):
        raise ValueError(f"factory {name!r} returned {type(model).__name__}, expected an nn.Module")
    return model


def _trusted(name: str, trust: Sequence[str]) -> bool:
    return any(name.startswith(prefix.rstrip(".") + ".") for prefix in trust)


def _resolve(name: Any, args: dict[str, Any], trust: tuple[str, ...]) -> Callable[..., nn.Module]:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"factory is {name!r}, expected a dotted name of public identifiers")
    if name.startswith(_MODELS):
        models = import_module("inhernet.models")
        if name.removeprefix(_MODELS) in models.__all__:
            return partial(getattr(models, name.removeprefix(_MODELS)), **args)
    if name.startswith(_TRANSFORMERS):
        return _transformers_model(name, args, _trusted(name, trust))
    if _trusted(name, trust):
        return partial(_trusted_function(name, trust), **args)
    raise Untrusted(
        f"factory is {name!r}: without consent a directory may only name a function of inhernet.models or a "
        "configuration class of transformers",
        name.split(".")[0],
    )


def _trusted_function(name: str, trust: tuple[str, ...]) -> Callable[..., nn.Module]:
    module_name, _, attribute = name.rpartition(".")
    try:
        function = getattr(import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"factory is {name!r}, but it cannot be imported: {error}") from error
    # Consent covers what the package defines, not what it happens to import (package.module.system).
    if not callable(function) or not _trusted(f"{getattr(function, '__module__', '')}.", trust):
        raise ValueError(f"factory is {name!r}, which is not a function defined in {', '.join(trust)}")
    return function


def _transformers_model(name: str, args: dict[str, Any], trusted: bool) -> Callable[..., nn.Module]:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"factory is {name!r}, which needs transformers: pip install inherit-kernels[hf]") from error
    config_class = _public_class(transformers, name.removeprefix(_TRANSFORMERS), transformers.PretrainedConfig)
    if config_class is None:
        raise ValueError(f"factory is {name!r}, expected a configuration class of transformers, such as BertConfig")
    model_class: Any = _public_class(transformers, args.get("model"), transformers.PreTrainedModel)
    if model_class is None or model_class.config_class is not config_class:
        raise ValueError(f"args['model'] is {args.get('model')!r}, expected a model class that takes {name}")
    values = args.get("config")
    if not isinstance(values, dict) or set(args) != {"model", "config"}:
        raise ValueError(f"args has the keys {sorted(args)}, expected 'model' and 'config' (an object)")
    _refuse_fetching(values, "args['config']")
    if not trusted:
        _refuse_unknown_types(config_class.model_type, values)
    return lambda: model_class(config_class.from_dict(values))


def _public_class(package: Any, name: Any, base: type) -> type | None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Z][A-Za-z0-9]*", name, re.ASCII):
        return None
    found = getattr(package, name, None)
    known = isinstance(found, type) and issubclass(found, base) and found.__module__.startswith(_TRANSFORMERS)
    return found if known else None


def _refuse_unknown_types(model_type: str, values: dict[str, Any]) -> None:
    """Raise Untrusted for a kind of model that is not known to build from transformers' code alone, at any depth."""
    for found in (model_type, *_named(values, "model_type")):
        if found not in MODEL_TYPES:
            raise Untrusted(
                f"model type {found!r} is not among those of transformers that build without consent: others may import "
                "or fetch a backbone",
                "transformers",
            )


def _named(value: Any, key: str) -> Iterator[Any]:
    """Every value under a key, at any depth, but for empty ones."""
    if isinstance(value, dict):
        if value.get(key) not in (None, ""):
            yield value[key]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _named(item, key)


def _need_moderate(value: Any, where: str) -> None:
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError(f"{where} is {value}, expected a number of at most {_LARGEST:,}: no size, depth or token")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in items:
        if not str(key).endswith(_MAY_BE_LARGER):
            _need_moderate(item, f"{where}[{key!r}]")


def _refuse_fetching(value: Any, where: str) -> None:
    """Refuse entries that point transformers at remote code, other weights or downloadable kernels."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_fetching(item, f"{where}[{index}]")
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        refused = key in _REFUSED and bool(item)
        if refused or (key.endswith("_implementation") and item not in _ATTENTION):
            raise ValueError(f"{where}[{key!r}] is {item!r}: a saved model may not make transformers fetch or run this")
        _refuse_fetching(item, f"{where}[{key!r}]")


@contextmanager
def parameters_on_meta(most: int | None = None) -> Iterator[None]:
    """Parameters that this thread registers are moved to meta at once; buffers and plain tensors stay real.

    More than `most` of them raise ValueError.

    Plain `torch.device("meta")` would lose non-persistent buffers (rotary tables, position ids), which no state dict
    brings back. Whoever fills the parameters also ties them.
    """
    owner, made = threading.get_ident(), 0

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        nonlocal made
        if parameter is None or threading.get_ident() != owner or parameter.is_meta:
            return None  # None keeps the parameter as it is
        made += 1
        if most is not None and made > most:
            raise ValueError(f"it makes more than {most:,} parameters, far more than were saved")
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
