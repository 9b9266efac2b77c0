"""Classify stages that fail as a device does, for the processes that a unit is isolated in."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import torch

from imgbatch.core.stages import ClassifyStage
from imgbatch.errors import ImgbatchError
from imgbatch.schema import ROW_ID

FAILING_ROW = 1
ONCE_VARIABLE = "FAILED_ONCE"
"""Names the file that shows to all processes that it has happened."""


class FailsOnce(ClassifyStage):
    """Raises for one row, in the first process that sees it."""

    def __call__(self, block: pa.Table) -> pa.Table:
        marker = Path(os.environ[ONCE_VARIABLE])
        if block[ROW_ID][0].as_py() == FAILING_ROW and not marker.exists():
            marker.touch()
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")
        return super().__call__(block)


class IsPoisoned(ClassifyStage):
    """Gives an error row for one row, and raises for whatever the same process is asked after it."""

    is_poisoned = False

    def __call__(self, block: pa.Table) -> pa.Table:
        if self.is_poisoned:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if block[ROW_ID][0].as_py() == FAILING_ROW:
            self.is_poisoned = True
            error = {"status": "CLASSIFY_FAILED", "error_stage": "classify", "error_message": "hurts", "attempts": 1}
            for name, value in error.items():
                index = block.schema.get_field_index(name)
                block = block.set_column(index, name, pa.array([value], block.schema.field(name).type))
        return super().__call__(block)


class IsBroken(ClassifyStage):
    """Raises for whatever it is asked."""

    def __call__(self, block: pa.Table) -> pa.Table:
        raise torch.AcceleratorError(f"CUDA error: unknown error, in row {block[ROW_ID][0]}")


class IsTooSmall(ClassifyStage):
    """Has no room for one image."""

    def __call__(self, block: pa.Table) -> pa.Table:
        raise ImgbatchError(f"the memory of Tesla T4 is too little for row {block[ROW_ID][0]}")
