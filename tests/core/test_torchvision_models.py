from __future__ import annotations

import subprocess
import sys

_LOADS = """
import sys
from imgbatch.core.torchvision_models import import_models
models = import_models()
print([name for name in sys.modules if name.startswith(("torch._dynamo", "sympy"))])
import torch
from torchvision.ops import roi_align
torch.use_deterministic_algorithms(True)
network = models.resnet18(num_classes=3).eval()
with torch.inference_mode():
    print(tuple(network(torch.zeros(2, 3, 64, 64)).shape))
print(tuple(roi_align(torch.ones(1, 1, 8, 8), [torch.tensor([[0.0, 0.0, 4.0, 4.0]])], 2).shape))
print(float(torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(()))))
"""


def test_the_networks_come_without_the_compiler_which_is_there_when_it_is_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", _LOADS], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "(2, 3)", "(1, 1, 2, 2)", "1.0"]
