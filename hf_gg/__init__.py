"""Residual-float (RF8) weights for Hugging Face models.

`import hf_gg` loads the standard library only. The public names below are imported on first use, and the quantization
method `gg` is registered as soon as Transformers is imported (see `hf_gg.integrations.autoload`).
"""

from .integrations import autoload as _autoload


TYPE_CHECKING = False  # type checkers know the name; `import typing` would cost more than all the rest
if TYPE_CHECKING:
    from . import ggd as ggd
    from .formats import get_format as get_format
    from .integrations.calibration import Calibration as Calibration
    from .integrations.initialization import gg_init as gg_init
    from .integrations.initialization import gg_init_ as gg_init_
    from .integrations.onnx import export_onnx as export_onnx
    from .integrations.peft.backslash import BackSlashConfig as BackSlashConfig
    from .integrations.peft.deepshape import DeepShapeConfig as DeepShapeConfig
    from .integrations.trainer import BackSlashCallback as BackSlashCallback
    from .integrations.transformers import GGConfig as GGConfig
    from .integrations.transformers import quantization_report as quantization_report
    from .integrations.transformers import quantize_ as quantize_
    from .nn import RF8Experts as RF8Experts
    from .nn import RF8Linear as RF8Linear
    from .posttraining.adapter import RouterAdapter as RouterAdapter
    from .posttraining.config import RoMAConfig as RoMAConfig
    from .posttraining.roma import RoMATrainer as RoMATrainer
    from .training.backslash import BackSlash as BackSlash
    from .training.deepshape import deepshape_ as deepshape_
    from .training.initialization import GGInit as GGInit

__version__ = "0.1.0"

__all__ = [
    "BackSlash",
    "BackSlashCallback",
    "BackSlashConfig",
    "Calibration",
    "DeepShapeConfig",
    "GGConfig",
    "GGInit",
    "RF8Experts",
    "RF8Linear",
    "RoMAConfig",
    "RoMATrainer",
    "RouterAdapter",
    "__version__",
    "deepshape_",
    "export_onnx",
    "get_format",
    "gg_init",
    "gg_init_",
    "ggd",
    "quantization_report",
    "quantize_",
]

_HOME = {
    "BackSlash": "hf_gg.training.backslash",
    "BackSlashCallback": "hf_gg.integrations.trainer",
    "BackSlashConfig": "hf_gg.integrations.peft.backslash",
    "Calibration": "hf_gg.integrations.calibration",
    "DeepShapeConfig": "hf_gg.integrations.peft.deepshape",
    "GGConfig": "hf_gg.integrations.transformers",
    "GGInit": "hf_gg.training.initialization",
    "RF8Experts": "hf_gg.nn",
    "RF8Linear": "hf_gg.nn",
    "RoMAConfig": "hf_gg.posttraining.config",
    "RoMATrainer": "hf_gg.posttraining.roma",
    "RouterAdapter": "hf_gg.posttraining.adapter",
    "deepshape_": "hf_gg.training.deepshape",
    "export_onnx": "hf_gg.integrations.onnx",
    "get_format": "hf_gg.formats",
    "ggd": "hf_gg",
    "gg_init": "hf_gg.integrations.initialization",
    "gg_init_": "hf_gg.integrations.initialization",
    "quantization_report": "hf_gg.integrations.transformers",
    "quantize_": "hf_gg.integrations.transformers",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    home = _HOME[name]
    value = import_module(f"hf_gg.{name}") if home == "hf_gg" else getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Last: where Transformers is already loaded, this registers at once, and what it imports may look at this module.
_autoload.on_import()
