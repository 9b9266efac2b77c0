"""imgbatch: distributed batch classification of large image collections.

    from imgbatch import classify, load_config
    result = classify(load_config("nightly.yaml"))

Importing this imports neither ray nor torch; the functions do when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from imgbatch.config import Config
    from imgbatch.core.config_file import read_config as load_config
    from imgbatch.core.evaluate import Evaluation, evaluate
    from imgbatch.core.model import ModelBundle
    from imgbatch.core.model import load_bundle as load_model
    from imgbatch.core.verify import VerifyResult, verify
    from imgbatch.runtime.job import RunResult, classify, retry
    from imgbatch.runtime.train import TrainResult, train

_HOME = {
    "Config": ("imgbatch.config", "Config"),
    "load_config": ("imgbatch.core.config_file", "read_config"),
    "ModelBundle": ("imgbatch.core.model", "ModelBundle"),
    "load_model": ("imgbatch.core.model", "load_bundle"),
    "VerifyResult": ("imgbatch.core.verify", "VerifyResult"),
    "verify": ("imgbatch.core.verify", "verify"),
    "RunResult": ("imgbatch.runtime.job", "RunResult"),
    "classify": ("imgbatch.runtime.job", "classify"),
    "retry": ("imgbatch.runtime.job", "retry"),
    "TrainResult": ("imgbatch.runtime.train", "TrainResult"),
    "train": ("imgbatch.runtime.train", "train"),
    "Evaluation": ("imgbatch.core.evaluate", "Evaluation"),
    "evaluate": ("imgbatch.core.evaluate", "evaluate"),
}

__all__ = [
    "Config",
    "Evaluation",
    "ModelBundle",
    "RunResult",
    "TrainResult",
    "VerifyResult",
    "__version__",
    "classify",
    "evaluate",
    "load_config",
    "load_model",
    "retry",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'imgbatch' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _HOME[name]
    return getattr(import_module(module), attribute)
