"""How many actors of which kind, and what each of them asks of the cluster."""

from __future__ import annotations

from dataclasses import dataclass

from imgbatch.config import ResourcesConfig
from imgbatch.core.backends import Backend
from imgbatch.core.machine import cuda_of_driver, cuda_of_torch, local_gpus, num_cpus, why_torch_lacks
from imgbatch.core.plan import DeviceKind
from imgbatch.errors import UsageError

_CPU_BATCH_PIXELS, _MIN_CPU_BATCH, _MAX_CPU_BATCH, _GPU_BATCH = 8 * 224**2, 8, 64, 256
"""On a core, ResNet-18 in torch is fastest at batches of 8 with images of 224 px, and at 64 with images of 64 px, which
is 1.4 times its rate at 8."""
_MAX_AUTO_THREADS = 4
_GPU_STREAMS = 2
"""While the results of one unit come back from the GPU, it computes the other."""
_MAX_DECODE_PROCESSES, _MAX_STREAMS = 2, 4
"""Of one actor, unless it is told otherwise: a process of Ray's costs 3 s of CPU to start and 120 MB, one with torch
twice that and more; but whatever an actor does in Python, its threads do in turn."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is: of this machine, or summed over a cluster's nodes."""

    num_cpus: int
    """Of nodes that decode."""
    num_gpus: int
    """Of nodes that run the model."""
    node_cpus: int = 0
    """Of the smallest node that has any; 0: it is all one."""
    model_cpus: int | None = None
    """Of nodes that run the model; none: the same as those that decode."""
    unfit_gpus: str = ""
    """Why torch does not compute on its GPUs, in a line; empty: nothing speaks against it."""


@dataclass(frozen=True, slots=True)
class Pools:
    """Sizes of the actor pools and the share of a CPU or GPU that each actor asks for."""

    decode_actors: int
    decode_processes: int
    """Of each decode actor."""
    classify_actors: int
    classify_streams: int
    """Units at once in each classify actor."""
    classify_threads: int
    """Of each of these."""
    decode_cpus: float
    classify_cpus: float
    classify_gpus: float

    @property
    def decoders(self) -> int:
        """Units that are decoded at once, in all."""
        return self.decode_actors * self.decode_processes

    @property
    def classifiers(self) -> int:
        """Units that the model runs over at once, in all."""
        return self.classify_actors * self.classify_streams

    @property
    def decode_calls(self) -> int:
        """Units at once in a decode actor: one more than it can decode, so that its first files are on their way."""
        return self.decode_processes + 1

    @property
    def classify_calls(self) -> int:
        """Units at once in a classify actor: those that the model runs over, and those written or waiting meanwhile.

        On a GPU a unit takes no longer than a write to an object store, on cores much longer.
        """
        return self.classify_streams + (2 if self.classify_gpus else 1)

    def describe(self) -> str:
        device = "GPU" if self.classify_gpus else f"{self.classify_streams} x {self.classify_threads} thread(s)"
        return (
            f"{self.decode_actors} decode actors ({self.decode_processes} process(es) each), "
            f"{self.classify_actors} classify actors ({device} each)"
        )


def this_machine() -> Machine:
    """Cores and GPUs that this process and those it starts may use."""
    gpus = local_gpus()
    return Machine(num_cpus(), len(gpus), unfit_gpus=why_torch_lacks(gpus, cuda_of_driver(), cuda_of_torch()))


def choose_device(config: ResourcesConfig, machine: Machine) -> DeviceKind:
    """The device that ``resources.device`` means on ``machine``.

    Raises:
        UsageError: ``cuda``, and torch does not compute on this machine's GPUs; a cluster's nodes may have another
            torch, and tell when they load the model.
    """
    if config.device == "cuda" and machine.unfit_gpus and not machine.node_cpus:
        raise UsageError(f"resources.device cuda: {machine.unfit_gpus}")
    if config.device != "auto":
        return config.device
    return "cuda" if machine.num_gpus and not machine.unfit_gpus else "cpu"


def device_remarks(config: ResourcesConfig, machine: Machine) -> list[str]:
    """Why ``auto`` is the CPU where there are GPUs, in one line; nothing where it is not."""
    if config.device == "auto" and machine.unfit_gpus:
        return [f"resources.device auto: the CPU, as {machine.unfit_gpus}"]
    return []


def choose_batch_size(configured: int | str, device: DeviceKind, crop_size: int, backend: Backend | None = None) -> int:
    """``classify.batch_size`` resolved; a variant was measured for it when it was made.

    Args:
        crop_size: side of the square that the model sees, px.
    """
    if isinstance(configured, int):
        return configured
    if backend is not None and backend.variant is not None:
        return backend.variant.batch_size
    if device == "cuda":
        return _GPU_BATCH
    fits = max(1, _CPU_BATCH_PIXELS // crop_size**2)
    return min(_MAX_CPU_BATCH, max(_MIN_CPU_BATCH, 1 << (fits.bit_length() - 1)))


def choose_pools(config: ResourcesConfig, device: DeviceKind, machine: Machine) -> Pools:
    """Pools that fill ``machine``.

    On GPUs: one classify actor each, with two units at once, which asks for the GPU alone so that decode actors cannot
    keep it out of a node, and every CPU but one per classify actor and one for the driver decodes. On
    CPUs both pools share the cores, because which of them has more to do depends on the model: as many decode
    processes as cores (half of them beyond eight), and forward passes whose threads add up to the cores. Each actor
    then asks for half of the CPUs that it can use, so that all fit at once; on several nodes for a fifth, so that
    half of the nodes have room for all when the others are lost. Several of either share an actor.

    Raises:
        UsageError: a cluster that has nothing yet, and sizes that would be taken from what it has.
    """
    model_cpus = machine.num_cpus if machine.model_cpus is None else machine.model_cpus
    there = machine.num_gpus if device == "cuda" else min(machine.num_cpus, model_cpus)
    if not there and "auto" in (config.decode_actors, config.classify_actors):
        labelled = " on nodes with the labels asked for" if config.decode_labels or config.classify_labels else ""
        raise UsageError(
            f"resources: there is no {'GPU' if device == 'cuda' else 'CPU'} yet{labelled}; on a cluster that starts "
            f"from zero give resources.device, resources.decode_actors and resources.classify_actors"
        )
    cores = machine.num_cpus or _given(config.decode_actors, 1)
    model_cores = model_cpus or cores
    node_cpus = machine.node_cpus or cores
    if device == "cuda":
        classify_actors = _given(config.classify_actors, max(1, machine.num_gpus))
        most = max(1, cores - classify_actors - 1)
        decode_actors, processes = _shared_out(
            most, min(_MAX_DECODE_PROCESSES, node_cpus), config.decode_actors, config.decode_processes
        )
        decode_cpus = _cpu_share(most / decode_actors) if config.decode_actors == "auto" else float(processes)
        decode_cpus = decode_cpus if cores > 2 else 0.25
        streams = _given(config.classify_streams, _GPU_STREAMS)
        return Pools(decode_actors, processes, classify_actors, streams, 1, decode_cpus, 0.0, 1.0)
    decode_actors, processes = _shared_out(
        cores if cores <= 8 else cores // 2 + 4,
        min(_MAX_DECODE_PROCESSES, node_cpus),
        config.decode_actors,
        config.decode_processes,
    )
    threads = _given(config.classify_threads, min(_MAX_AUTO_THREADS, node_cpus, max(1, model_cores // 8)))
    classify_actors, streams = _shared_out(
        max(1, model_cores // threads),
        max(1, min(_MAX_STREAMS, node_cpus // threads)),
        config.classify_actors,
        config.classify_streams,
    )
    share = 0.2 if node_cpus < cores else 0.5
    decode_cpus = _cpu_share(share * cores / decode_actors)
    classify_cpus = _cpu_share(share * model_cores / classify_actors)
    return Pools(decode_actors, processes, classify_actors, streams, threads, decode_cpus, classify_cpus, 0.0)


def _shared_out(total: int, most: int, actors: int | str, each: int | str) -> tuple[int, int]:
    """Actors, and how much each does at once, for ``total`` in all and at most ``most`` in one; numbers are kept."""
    if isinstance(actors, int):
        return actors, each if isinstance(each, int) else 1
    if isinstance(each, int):
        return max(1, total // each), each
    num_actors = -(-total // most)
    return num_actors, max(1, round(total / num_actors))


def _given(configured: int | str, automatic: int) -> int:
    return configured if isinstance(configured, int) else automatic


def _cpu_share(cpus: float) -> float:
    """Ray takes fractions below one and whole numbers from there on."""
    return float(int(cpus)) if cpus >= 1 else int(cpus * 1000) / 1000
