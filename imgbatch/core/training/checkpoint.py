"""Checkpoints: the last epoch to go on from, the best one to keep. Tensors and plain values only."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from imgbatch.core import storage
from imgbatch.core.training.job import JobPaths
from imgbatch.errors import ImgbatchError

_REQUEST_BYTES = 2**30
"""What is larger goes to an object store in parts: S3 takes 5 GiB in one request, and a part is soon sent again."""


def save_best(paths: JobPaths, epoch: int, weights: Mapping[str, Tensor]) -> None:
    """The weights of the best epoch so far; the file of the one before stays, as no record tells of this one yet."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    _write(paths.best_of(epoch), safetensors.torch.save(tensors))


def load_best(paths: JobPaths, epoch: int) -> dict[str, Tensor]:
    """What :func:`save_best` stored, or what was stored when the file's name had no epoch."""
    uri = paths.best_of(epoch)
    return load_weights(uri if storage.exists(uri) else storage.join(paths.directory, "best.safetensors"))


def remove_earlier_best(paths: JobPaths, epoch: int) -> None:
    """Every file of :func:`save_best` but this epoch's, whose record is stored."""
    for name in storage.list_stems(paths.directory, ["best"]):
        if name != paths.best_of(epoch).rsplit("/", 1)[-1]:
            storage.remove(storage.join(paths.directory, name))


def load_weights(uri: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    return safetensors.torch.load(storage.read_bytes(uri))


def save_last(paths: JobPaths, state: Mapping[str, Any], history: list[dict[str, Any]]) -> None:
    """What the next epoch starts from, and the records of those so far (also as epochs.jsonl)."""
    buffer = io.BytesIO()
    torch.save({**state, "history": json.dumps(history)}, buffer)
    _write(paths.last, buffer.getvalue())
    _write(paths.epochs, json_lines(history))


def load_last(paths: JobPaths) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """The state and history that :func:`save_last` stored; none where there is none."""
    if not storage.exists(paths.last):
        return None
    state = torch.load(io.BytesIO(storage.read_bytes(paths.last)), map_location="cpu", weights_only=True)
    return state, json.loads(state.pop("history"))


def read_epochs(paths: JobPaths) -> list[dict[str, Any]]:
    """The records of the epochs so far; empty before the first."""
    if not storage.exists(paths.epochs):
        return []
    return [json.loads(line) for line in storage.read_bytes(paths.epochs).splitlines()]


def json_lines(values: Iterable[Any]) -> bytes:
    """One line of JSON for each value."""
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def _write(uri: str, data: bytes) -> None:
    try:
        if storage.is_local(uri) or len(data) <= _REQUEST_BYTES:
            storage.replace(uri, data)
        else:
            with storage.staged_file(uri) as staged:
                staged.write_bytes(data)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ImgbatchError(
            f"train.storage: no space for {uri} ({len(data) / 1e6:,.0f} MB); make room, then the same command continues"
        ) from error
