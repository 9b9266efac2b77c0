from __future__ import annotations

from typing import Any


class CudaDriver:
    """What of ``libcuda`` is asked, for machines without a GPU; 0 is success."""

    def __init__(self, gpus: list[tuple[bytes, int, int]], *, starts: bool = True, version: int = 13000) -> None:
        self._gpus, self._starts, self._version = gpus, starts, version

    def cuInit(self, _flags: int) -> int:  # noqa: N802 - CUDA's name, as are those below
        return 0 if self._starts else 100

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = self._version
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self._gpus)
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = self._gpus[device.value][0][: size - 1]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = {75: self._gpus[device.value][1], 76: self._gpus[device.value][2]}[attribute]
        return 0
