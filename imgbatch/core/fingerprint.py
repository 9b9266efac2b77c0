"""What a run is the same run by: everything that changes a result, and nothing else.

The fingerprint covers the manifest's content, the model, the preprocessing, backend and device, and the settings of
input, decode and output. It leaves out ``errors``, ``resources``, ``fetch`` and how the work is cut and batched, so
that a rerun may change those.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from imgbatch.config import Config
from imgbatch.core.backends import Backend
from imgbatch.core.manifest import Manifest
from imgbatch.core.model import ModelBundle
from imgbatch.core.row_decoder import reads_rasters
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.schema import ETAG, SCHEMA_VERSION

ProbabilityMode = Literal["all", "top_k", "none"]

AUTO_ALL_MAX_CLASSES = 100


def probability_mode(config: Config, bundle: ModelBundle) -> ProbabilityMode:
    """``output.probabilities`` resolved."""
    if config.output.probabilities != "auto":
        return config.output.probabilities
    return "all" if len(bundle.class_names) <= AUTO_ALL_MAX_CLASSES else "top_k"


def result_fields(
    config: Config, manifest: Manifest, bundle: ModelBundle, spec: PreprocessSpec, device: str, backend: Backend
) -> dict[str, Any]:
    """Everything that changes a result of a run: what its fingerprint is taken of."""
    return {
        "manifest": manifest.content_identity(),
        **_etag_fields(config, manifest),
        **_raster_fields(config, manifest, spec),
        "input.limit": config.input.limit,
        "input.duplicates": config.input.duplicates,
        "input.skip_existing": config.input.skip_existing,
        "input.since_run": config.input.since_run,
        "model": bundle.model_id,
        "preprocess": json.loads(json.dumps(spec.to_dict())),
        **backend.fields,
        "device": device,
        **_decode_fields(config),
        "output.partition_by": list(config.output.partition_by),
        "output.probabilities": probability_mode(config, bundle),
        "output.top_k": config.output.top_k,
        "output.embeddings": config.output.embeddings,
        "output.target_file_mb": config.output.target_file_mb,
        "schema_version": SCHEMA_VERSION,
    }


def _decode_fields(config: Config) -> dict[str, Any]:
    """Without the GPU's share where it has none, so that runs from before there was one can go on."""
    fields = {f"decode.{key}": value for key, value in config.decode.model_dump().items()}
    return {key: value for key, value in fields.items() if key != "decode.gpu_share" or value}


def _etag_fields(config: Config, manifest: Manifest) -> dict[str, Any]:
    """Kept out of the fingerprint where the manifest does not know what the objects were."""
    return {"input.if_changed": config.input.if_changed} if ETAG in manifest.schema.names else {}


def _raster_fields(config: Config, manifest: Manifest, spec: PreprocessSpec) -> dict[str, Any]:
    """Kept out of the fingerprint of photographs, which they do not change."""
    return {"geo.max_nodata": config.geo.max_nodata} if reads_rasters(manifest.schema.names, spec) else {}


def fingerprint_of(fields: dict[str, Any]) -> str:
    """sha256, hex."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
