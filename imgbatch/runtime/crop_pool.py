"""The crop store filled on Ray Data: parts of the store --> decode actors --> crops on shared storage.

Apart from the training because decode actors load this module, and need no torch.
"""

from __future__ import annotations

import json
import warnings

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy
from ray.util.annotations import RayDeprecationWarning

from imgbatch.config import Config
from imgbatch.core.training.crops import CropDecoder, CropStore, OnPart
from imgbatch.runtime.pools import choose_pools
from imgbatch.runtime.ray_data import FINITE_RETRIES, configure_ray_data, end_pass, iter_blocks
from imgbatch.runtime.session import cluster_machine

PART, REPORT = "part", "report"


class CropActor:
    """CPU pool: fetches, decodes and stores parts of a crop store, and returns their reports. Does not import torch."""

    def __init__(self, store: CropStore, config: Config) -> None:
        self._decoder = CropDecoder(store, config)

    def __call__(self, block: pa.Table) -> pa.Table:
        return pa.table({REPORT: [json.dumps(self._decoder.decode_part(part)) for part in block[PART].to_pylist()]})


def decode_on_ray(store: CropStore, config: Config, on_part: OnPart) -> None:
    """Every part that is missing, on the connected Ray; what ``on_part`` raises ends it."""
    parts = store.missing_parts()
    if not parts:
        return
    configure_ray_data()
    resources = config.resources.model_copy(update={"classify_labels": {}})  # no model runs
    pools = choose_pools(resources, "cpu", cluster_machine(resources))
    with warnings.catch_warnings():
        # Finite retries have no other way in: the named parameters that replace remote args lack them.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated", RayDeprecationWarning)
        reports = ray.data.from_arrow([pa.table({PART: pa.array([part], pa.int32())}) for part in parts]).map_batches(
            CropActor,
            fn_constructor_kwargs={"store": store, "config": config},
            # Each decodes one part at a time, where the job's decode actors have several children.
            compute=ActorPoolStrategy(size=min(pools.decoders, len(parts))),
            num_cpus=pools.decode_cpus / pools.decode_processes,
            label_selector=config.resources.decode_labels or None,
            batch_size=None,
            batch_format="pyarrow",
            **FINITE_RETRIES,
        )
    try:
        for block in iter_blocks(reports):
            for report in block[REPORT].to_pylist():
                on_part(json.loads(report))
    finally:
        end_pass(reports)
