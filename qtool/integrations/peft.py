"""LoRA of PEFT (Hu et al., 2021, arXiv:2106.09685) beside quantized linears, which don't change.

PEFT decides by a module's class what adapts it, and knows nothing of ours. Importing this module
lets it; `integrations.transformers.quantizer` does so once PEFT and a checkpoint are both there.
"""

import functools
import warnings
from typing import Any, NoReturn

from peft.tuners import tuners_utils
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from qtool.errors import BackendError
from qtool.runtime.modules import QuantizedLinear

STARTS = (True, False, "gaussian", "eva")
"""Of `init_lora_weights`: what needs no weight to begin with."""
CANT_MERGE = (
    "A quantized layer can't take up an adapter: its codes are what they are. Save the adapter "
    "beside the checkpoint, or merge it into the original model and quantize that."
)


class LoraQuantizedLinear(Linear):  # type: ignore[misc]
    """A quantized linear and its adapters."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any) -> None:
        config = options["config"]
        if config.use_dora or config.init_lora_weights not in STARTS:
            raise BackendError(
                "LoRA of a quantized layer works without use_dora, and with init_lora_weights "
                f"{', '.join(map(repr, STARTS))}: others change or read a dense weight."
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            super().__init__(base_layer, adapter_name, **options)

    def merge(self, *_args: Any, **_options: Any) -> NoReturn:
        """Refuse.

        Raises:
            BackendError: always.
        """
        raise BackendError(CANT_MERGE)


def _teach_dispatch() -> None:
    """Let LoRA know the class of quantized linears."""
    default = lora_model.dispatch_default

    @functools.wraps(default)
    def dispatch(target: nn.Module, adapter_name: str, **options: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, QuantizedLinear):
            return LoraQuantizedLinear(target, adapter_name, **options)
        return default(target, adapter_name, **options)

    lora_model.dispatch_default = dispatch


def _teach_all_linear() -> None:
    """Let `target_modules="all-linear"` mean quantized ones too."""
    include = tuners_utils._maybe_include_all_linear_layers

    @functools.wraps(include)
    def include_ours(peft_config: Any, model: nn.Module) -> Any:
        wanted = getattr(peft_config, "target_modules", None)
        found = include(peft_config, model)
        if isinstance(wanted, str) and wanted.lower() == "all-linear":
            head = getattr(model, "get_output_embeddings", lambda: None)()
            names = (n for n, m in model.named_modules() if _is_free(n, m) and m is not head)
            found.target_modules = {*found.target_modules, *names}
        return found

    tuners_utils._maybe_include_all_linear_layers = include_ours


def _is_free(name: str, module: nn.Module) -> bool:
    """Return whether a module is a quantized linear that has no adapter yet."""
    return isinstance(module, QuantizedLinear) and not name.endswith("base_layer")


_teach_dispatch()
_teach_all_linear()
