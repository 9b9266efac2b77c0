"""The pipeline on Ray Data.

    pending units --> decode actors --> classify actors, which commit --> receipts

One unit stays one block from end to end: ``batch_size=None`` hands a block to a stage whole, and without a target
block size Ray never splits one.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, ClassVar, cast

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, ExecutionResources
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.annotations import RayDeprecationWarning

from imgbatch.core.machine import ONE_ARENA
from imgbatch.core.parallel import Context, Part, Result
from imgbatch.core.plan import Run
from imgbatch.core.results import Receipt
from imgbatch.core.stages import UNIT
from imgbatch.errors import Interrupted, UsageError
from imgbatch.runtime.actors import ClassifyActor, DecodeActor, read_receipts
from imgbatch.runtime.engine import EngineStopped
from imgbatch.runtime.isolate import LONGEST_STEP_S, classify_row_by_row
from imgbatch.runtime.memory import max_stored_units, stored_unit_bytes
from imgbatch.runtime.metrics import RunMetrics
from imgbatch.runtime.pools import Pools, choose_batch_size
from imgbatch.runtime.session import cluster_address
from imgbatch.runtime.watchdog import watched

FINITE_RETRIES = {"max_restarts": 3, "max_task_retries": 3}
"""Ray Data's own defaults are infinite: one image that kills its actor would do so for ever."""
_STATS_TIMEOUT_S = 5.0
_POOLS_END_S = 10.0
"""In a cluster of several jobs, others may have taken the cores meanwhile."""
_ACTOR = re.compile(r"\((\w+)Actor\)")


class RayEngine:
    """Runs the stages in actor pools of the connected Ray."""

    decode_actor: ClassVar[type] = DecodeActor
    classify_actor: ClassVar[type] = ClassifyActor
    """What the pools are made of; a simulation puts others in their place."""

    def __init__(self, run: Run, choose_pools: Callable[[], Pools]) -> None:
        """``choose_pools`` is asked before each pass, for nodes come and go."""
        self._run = run
        self._choose_pools = choose_pools
        self._pools = choose_pools()
        self._metrics = RunMetrics(run.run_id)
        configure_ray_data()

    @property
    def window(self) -> int:
        """Units under way at once, at most: as many again as are worked on in an actor, and as many queued."""
        return 4 * (self._pools.decoders + self._pools.classifiers)

    @property
    def num_actors(self) -> dict[str, int]:
        """Units at once in the stages whose seconds receipts count; fetching and decoding share a pool."""
        decode, classify = self._pools.decoders, self._pools.classifiers
        return {"fetch": decode, "decode": decode, "classify": classify, "commit": classify}

    def describe(self) -> str:
        return self._pools.describe()

    def classify_units(self, units: Sequence[int], *, defer: bool) -> Generator[Receipt]:
        """A receipt for each of the units, as they are committed; close it to end the pass.

        Raises:
            EngineStopped: an actor died or failed more often than it is tried again.
            CannotWrite: a unit's results cannot be stored.
            Stalled: nothing was committed for ``run.no_progress_s``.
        """
        with contextlib.suppress(UsageError):  # as when every node is gone for the moment: then what was before
            self._pools = self._choose_pools()
        with warnings.catch_warnings():
            # Finite retries have no other way in: the named parameters that replace remote args lack them.
            warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated", RayDeprecationWarning)
            pipeline = self._pipeline(units, defer)
        try:
            for block in watched(iter_blocks(pipeline), self._run.config.run.no_progress_s, self._where):
                for receipt in read_receipts(block):
                    self._metrics.add(receipt)
                    yield receipt
        except RayError as error:
            raise EngineStopped(describe_failure(error)) from error
        finally:
            end_pass(pipeline)

    def _where(self) -> str:
        """How many units are through each stage of the pass, which shows the one that is waited for."""
        done = units_done_by_stage()
        if not done:
            return ""
        free = ray.available_resources()
        return (
            f"which has {', '.join(f'{count} units through {stage}' for stage, count in done.items())}, and "
            f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs free"
        )

    def _pipeline(self, units: Sequence[int], defer: bool) -> Dataset:
        run, pools = self._run, self._pools
        unit_bytes = stored_unit_bytes(run.plan.layout.unit_rows, run.spec, run.config.decode.gpu_share)
        DataContext.get_current().execution_options.resource_limits = ExecutionResources(
            object_store_memory=max_stored_units(pools) * unit_bytes
        )
        resources = run.config.resources
        batch_size = choose_batch_size(run.config.classify.batch_size, run.plan.device, run.spec.crop_size, run.backend)
        threads = pools.classify_threads if run.plan.device == "cpu" else None
        return (
            # Not from_arrow, which starts a task for each block to learn its schema.
            ray.data.from_items([{UNIT: unit} for unit in units], override_num_blocks=len(units))
            .map_batches(
                self.decode_actor,
                fn_constructor_kwargs={"run": run, "processes": pools.decode_processes},
                compute=ActorPoolStrategy(
                    size=min(pools.decode_actors, len(units)),
                    max_tasks_in_flight_per_actor=pools.decode_calls,
                    max_concurrent_calls_per_actor=pools.decode_calls,
                    enable_true_multi_threading=True,
                ),
                num_cpus=pools.decode_cpus,
                label_selector=resources.decode_labels or None,
                batch_size=None,
                batch_format="pyarrow",
                **FINITE_RETRIES,
            )
            .map_batches(
                self.classify_actor,
                fn_constructor_kwargs={
                    "run": run,
                    "batch_size": batch_size,
                    "num_threads": threads,
                    "streams": pools.classify_streams,
                    "defer": defer,
                },
                compute=ActorPoolStrategy(
                    size=min(pools.classify_actors, len(units)),
                    max_tasks_in_flight_per_actor=pools.classify_calls,
                    max_concurrent_calls_per_actor=pools.classify_calls,
                    enable_true_multi_threading=True,
                ),
                num_cpus=pools.classify_cpus,
                num_gpus=pools.classify_gpus,
                label_selector=resources.classify_labels or None,
                batch_size=None,
                batch_format="pyarrow",
                runtime_env=model_environment(run),
                **FINITE_RETRIES,
            )
        )

    def classify_isolated(self, unit: int, *, defer: bool) -> Receipt:
        """The last resort for a unit that does not get through; runs where the model runs."""
        isolated = ray.remote(
            num_cpus=0,
            num_gpus=self._pools.classify_gpus,
            label_selector=self._run.config.resources.classify_labels or None,
            max_retries=0,
            num_returns="streaming",
        )(classify_row_by_row)
        steps = isolated.remote(self._run, unit, defer=defer)
        try:
            for reference in watched(steps, max(self._run.config.run.no_progress_s, LONGEST_STEP_S), self._where):
                receipt = ray.get(reference)
        except RayTaskError as error:
            # What the function raised, not what Ray made of it.
            raise error.cause from error
        except RayError as error:
            raise EngineStopped(describe_failure(error)) from error
        except BaseException:  # it stands still, or a person wants it to end: it is at work yet
            with contextlib.suppress(Exception):
                ray.cancel(steps, force=True)
            raise
        return cast("Receipt", receipt)

    def map_parts(
        self, function: Callable[[Context, Part], Result], context: Context, parts: Sequence[Part]
    ) -> Iterator[Result]:
        """:class:`MapParts` in tasks, on whatever nodes have a core free, once the actors of the last pass are gone.

        Ray starts processes for tasks that wait for a core, and actors take seconds to end: both at once hold more
        memory than the job ever did.
        """
        cpus = self._pools.decode_actors * self._pools.decode_cpus
        cpus += self._pools.classify_actors * self._pools.classify_cpus
        until = time.monotonic() + _POOLS_END_S
        while ray.available_resources().get("CPU", 0) < cpus and time.monotonic() < until:
            time.sleep(0.1)
        yield from map_in_tasks(function, context, parts, timeout_s=self._run.config.run.no_progress_s)

    def close(self) -> None:
        """The pools end with each pass; nothing is held between them."""


def iter_blocks(pipeline: Dataset) -> Iterator[pa.Table]:
    """Not ``iter_batches``, which every five seconds sends what is known of each block so far to an actor of Ray's."""
    for bundle in pipeline.iter_internal_ref_bundles():
        yield from ray.get([entry.ref for entry in bundle.blocks])


def end_pass(pipeline: Dataset) -> None:
    """Leaves no thread of Ray Data's behind: one that asks Ray for something when Ray is gone starts another Ray, or
    ends the process."""
    name = f"StreamingExecutor-{pipeline.get_dataset_id()}"
    for thread in threading.enumerate():
        if thread.name == name:
            executor: Any = thread  # it is both
            with contextlib.suppress(Exception):  # why the pass ends is what counts
                executor.shutdown(force=True)


def map_in_tasks(
    function: Callable[[Context, Part], Result], context: Context, parts: Sequence[Part], *, timeout_s: float
) -> Iterator[Result]:
    """:class:`MapParts` in tasks of Ray; a task whose node dies is done again.

    Raises:
        Interrupted: no part was done for ``timeout_s``, or one could not be done.
    """
    task = ray.remote(num_cpus=1, max_retries=FINITE_RETRIES["max_task_retries"])(function)
    shared = ray.put(context)
    pending = deque(task.remote(shared, part) for part in parts)
    unfinished = list(pending)
    try:
        while pending:
            if pending[0] in unfinished:
                done, unfinished = ray.wait(unfinished, timeout=timeout_s)
                if not done:
                    free = ray.available_resources().get("CPU", 0)
                    raise Interrupted(
                        f"no part of the output was done for {timeout_s:g} s (run.no_progress_s); {free:g} CPUs are "
                        f"free; run the same command again to continue"
                    )
                continue
            yield ray.get(pending.popleft(), timeout=timeout_s)
    except RayTaskError as error:
        # What the function raised, not what Ray made of it.
        raise error.cause from error
    except RayError as error:
        raise Interrupted(f"{describe_failure(error)}; run the same command again to continue") from error
    finally:
        # Only these: to cancel a task that is just ending may crash Ray's core, and the driver with it.
        for reference in unfinished:
            ray.cancel(reference)


def model_environment(run: Run) -> dict[str, Any] | None:
    """``runtime_env`` of what runs the model; a Ray of our own has been started with it, which costs no process."""
    in_cluster = cluster_address(run.config) is not None
    return {"env_vars": ONE_ARENA} if in_cluster and run.plan.device == "cpu" else None


def configure_ray_data() -> None:
    """One block in is one block out, failures end the pipeline, and nothing is printed."""
    context = DataContext.get_current()
    context.target_max_block_size = None
    context.max_errored_blocks = 0
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = False
    # Our own watchdog (run.no_progress_s) says what waited for what.
    context.execution_no_progress_timeout_s = -1
    for handler in logging.getLogger("ray.data").handlers:
        # What went wrong is told in one line; Ray's log file in the session's directory keeps the tracebacks.
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)


def units_done_by_stage() -> dict[str, int]:
    """Units that each actor class has finished in the newest pass of this job; empty where Ray does not say."""
    # Ray keeps it for its dashboard and shows it nowhere else; a message is all that depends on it.
    with contextlib.suppress(Exception):
        from ray.data._internal.stats import get_or_create_stats_actor

        asked = get_or_create_stats_actor().get_datasets.remote(ray.get_runtime_context().get_job_id())
        newest = max(ray.get(asked, timeout=_STATS_TIMEOUT_S).values(), key=lambda dataset: dataset["start_time"])
        found = {_ACTOR.search(name): state["progress"] for name, state in newest["operators"].items()}
        return {match[1].lower(): count for match, count in found.items() if match}
    return {}


def describe_failure(error: BaseException) -> str:
    """Class and message of what an actor raised, or else of the last thing that is known, in one line."""
    while error.__cause__ is not None and not _holds_traceback(error):
        error = error.__cause__
    if not _holds_traceback(error):
        return f"{type(error).__name__}: {error}"
    text = str(error)
    if isinstance(error, RayTaskError):
        # Ray Data puts an exception of its own around the actor's, whose traceback is all that arrives of it.
        text = text.partition("\nThe above exception was the direct cause")[0]
    lines = text.strip().splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith("  ")]
    return " ".join(lines[frames[-1] + 1 if frames else 0 :])


def _holds_traceback(error: BaseException) -> bool:
    """Whether its text is that of what was raised elsewhere: in a task, or while an actor was made."""
    return isinstance(error, RayTaskError) or (isinstance(error, RayActorError) and error.actor_init_failed)
