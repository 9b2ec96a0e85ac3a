"""transformers' own `save_pretrained` and `from_pretrained` for inherited models.

The plan travels in `config.json` as a quantization config of the method "inhernet", the factors in the ordinary weight files.
`register()` tells transformers what the method means; then `AutoModel.from_pretrained`, Trainer and `generate` work as ever.
"""

from __future__ import annotations

import json
import warnings
import weakref
from typing import Any, TypeVar

from torch import nn

METHOD = "inhernet"
Model = TypeVar("Model", bound=nn.Module)


def register() -> None:
    """Teach transformers to load inherited models; call it once in a process, before `from_pretrained`.

    Raises:
        ModuleNotFoundError: no transformers, with the command that installs it.

    Example:
        >>> inhernet.register()  # doctest: +SKIP
        >>> model = transformers.AutoModel.from_pretrained("small")  # doctest: +SKIP
    """
    try:
        from transformers.quantizers.auto import (
            AUTO_QUANTIZATION_CONFIG_MAPPING,
            register_quantization_config,
            register_quantizer,
        )
        from transformers.quantizers.base import HfQuantizer
        from transformers.utils.quantization_config import QuantizationConfigMixin
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("needs transformers: pip install 'inherit-kernels[hf]'") from error
    if METHOD in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return

    class InheritedConfig(QuantizationConfigMixin):  # type: ignore[misc]
        """The plan of an inherited model, as `inhernet.Plan.to_dict` writes it."""

        def __init__(self, plan: dict[str, Any], **more: Any) -> None:
            self.quant_method: Any = METHOD
            self.plan = plan

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": METHOD, "plan": json.loads(json.dumps(self.plan))}

    class InheritedLoader(HfQuantizer):  # type: ignore[misc]
        """Puts low-rank modules where the plan has them, before weights are loaded. Nothing is quantised."""

        is_trainable = is_qat_trainable = is_compileable = True

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return True

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            from .decompose.plans import Plan
            from .decompose.rebuild import with_empty_layers

            config: Any = self.quantization_config
            plan = Plan.from_dict(config.plan)
            rebuilt = with_empty_layers(model, plan.layers)
            if rebuilt is not model:  # layers were opened in a copy: transformers goes on with its own object
                model._modules.update(rebuilt._modules)
            model.inhernet_plan = plan
            return model

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            model.is_quantized = False  # .float() and .half() work as on any other model
            return kept_by_pretrained(model)

    register_quantization_config(METHOD)(InheritedConfig)
    register_quantizer(METHOD)(InheritedLoader)


def inherited_config(plan: Any) -> Any:
    """transformers' `quantization_config` that carries a plan."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    register()
    return AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD](plan.to_dict())


class _SavePretrained:
    """`save_pretrained` of an inherited model: as transformers' own, with the plan in `config.json`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)  # no cycle: a model's memory is free as soon as the last name is gone

    def __reduce__(self) -> tuple[Any, ...]:
        return _SavePretrained, (self._model(),)  # for pickle and deepcopy: the copy speaks of the copied model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self._model()
        if "inhernet_levels" in model.__dict__:
            raise ValueError(
                "model has levels, which transformers' files do not know: save inhernet.cut(model, level), or the whole with "
                "inhernet.save"
            )
        before = getattr(model.config, "quantization_config", None)
        if before is not None and getattr(before, "quant_method", None) != METHOD:
            warnings.warn(
                f"the model's config has a quantization_config of another method ({before}), which this save replaces: "
                "from_pretrained knows one",
                stacklevel=2,
            )
        model.config.quantization_config = inherited_config(model.inhernet_plan)
        try:
            return type(model).save_pretrained(model, *args, **kwargs)
        finally:
            if before is None:
                del model.config.quantization_config
            else:
                model.config.quantization_config = before


def kept_by_pretrained(model: Model) -> Model:
    """Let `model.save_pretrained`, if there is one, write what `from_pretrained` needs."""
    plan: Any = getattr(model, "inhernet_plan", None)
    if hasattr(type(model), "save_pretrained") and plan is not None and plan.factorised:
        model.__dict__["save_pretrained"] = _SavePretrained(model)
    return model
