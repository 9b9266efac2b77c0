"""A finished run on disk, made from plain rows: what the readers of an output are tested on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.core import current, storage
from imgbatch.core.runs import RunPaths
from imgbatch.schema import PREDICTED_AT_TYPE, TOP_K_TYPE, UNIT_SCHEMA

StoreRun = Callable[..., Path]


@pytest.fixture
def store_run(tmp_path: Path) -> StoreRun:
    """Writes a finished run and returns its output directory."""

    def store(
        class_names: Sequence[str],
        probs_NK: np.ndarray,
        *,
        task: str = "multiclass",
        out: str = "out",
        run_id: str = "r000000000001",
        columns: dict[str, Sequence[Any]] | None = None,
        failed: dict[str, Sequence[Any]] | None = None,
        keep: str = "all",
        top_k: int = 5,
        model_id: str = "m000000000001",
        predicted_at: str = "2026-01-02T03:04:05.000000+00:00",
        image_ids: Sequence[str] | None = None,
    ) -> Path:
        """One prediction per row of ``probs_NK`` with the manifest's ``columns``; ``failed`` are the error rows'."""
        folder = tmp_path / out
        paths = RunPaths(str(folder), run_id)
        ids = list(image_ids) if image_ids is not None else [f"image-{i}" for i in range(len(probs_NK))]
        predictions = _predictions(class_names, probs_NK, task, keep, top_k, ids, model_id, predicted_at)
        for name, values in (columns or {}).items():
            predictions = predictions.append_column(name, pa.array(values))
        manifest_columns = predictions.select(["image_id", *(columns or {})])
        errors = manifest_columns.slice(0, 0).append_column("status", pa.array([], pa.string()))
        if failed is not None:
            errors = pa.table(failed)
        errors = errors.append_column("row_id", pa.array(range(errors.num_rows), pa.int64()))
        files = []
        for kind, table in (("predictions", predictions), ("errors", errors)):
            relative = f"{kind}/run_id={run_id}/part-00000.parquet"
            (folder / relative).parent.mkdir(parents=True)
            pq.write_table(table, folder / relative)
            files.append({"path": relative, "kind": kind, "rows": table.num_rows})
        fields = {"model": model_id, "input.duplicates": "error"}
        plan = {"fields": fields, "predicted_at": predicted_at, "parent": None, "probabilities": keep}
        storage.write_json(paths.plan, plan)
        storage.write_json(paths.classes, {"task": task, "class_names": list(class_names), "model_id": model_id})
        storage.write_json(paths.files, {"files": files, "partition_types": {}})
        storage.create_if_absent(paths.success, b"")
        current.update(str(folder))
        return folder

    return store


def _predictions(
    class_names: Sequence[str],
    probs_NK: np.ndarray,
    task: str,
    keep: str,
    top_k: int,
    ids: list[str],
    model_id: str,
    predicted_at: str,
) -> pa.Table:
    order_NK = np.argsort(-probs_NK, axis=1, kind="stable")
    best_N = order_NK[:, 0]
    listed = [
        [{"label": class_names[k], "probability": float(p[k])} for k in order[:top_k]]
        for p, order in zip(probs_NK, order_NK, strict=True)
    ]
    said = [[class_names[k] for k in np.flatnonzero(p >= 0.5)] for p in probs_NK]
    size = len(ids)
    values = {
        "label": [class_names[k] for k in best_N],
        "label_index": best_N,
        "probability": probs_NK.max(axis=1),
        "top_k": listed if keep != "none" else [None] * size,
        "probabilities": probs_NK.tolist() if keep == "all" else [None] * size,
        "labels": said if task == "multilabel" else [None] * size,
    }
    types = {field.name: field.type for field in UNIT_SCHEMA} | {"top_k": TOP_K_TYPE}
    moment = datetime.fromisoformat(predicted_at)
    return pa.table(
        {
            "row_id": pa.array(range(size), pa.int64()),
            "image_id": ids,
            "uri": [f"s3://bucket/{image_id}.jpg" for image_id in ids],
            **{name: pa.array(column, types[name]) for name, column in values.items()},
            "model_id": [model_id] * size,
            "predicted_at": pa.array([moment] * size, PREDICTED_AT_TYPE),
        }
    )
