"""torchvision's networks, without torch's compiler.

One of torchvision's detection operators imports ``torch._dynamo`` for a question that it asks when it runs: some 4 s of
CPU and 280 MB in every process that builds a classifier. While torchvision is imported, a stand-in takes that module's
place that imports it when it is first asked.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_COMPILER, _ASKED = "torch._dynamo", "torch._dynamo.utils"


def import_models() -> Any:
    """The module ``torchvision.models``."""
    import torch  # noqa: F401  (before the stand-in: it looks for its own modules)

    if "torchvision" in sys.modules or _COMPILER in sys.modules:
        return importlib.import_module("torchvision.models")
    sys.modules[_COMPILER], sys.modules[_ASKED] = ModuleType(_COMPILER), _StandIn(_ASKED)
    try:
        return importlib.import_module("torchvision.models")
    finally:
        # What comes later gets the real ones.
        del sys.modules[_COMPILER], sys.modules[_ASKED]


class _StandIn(ModuleType):
    """Has every function of the module that it is named after, each of which imports that module when called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def ask(*args: Any, **options: Any) -> Any:
            return getattr(importlib.import_module(_ASKED), name)(*args, **options)

        return ask
