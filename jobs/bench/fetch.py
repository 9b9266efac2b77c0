"""What getting images from an object store costs beside decoding them, by client, against a local disk.

    python -m jobs.bench.fetch s3://BUCKET/PREFIX [--folder IMAGES] [--max-images 372] [--repeats 5]
                               [--server-pids PID,...]

One decode actor's work: requests in flight in this process, decoding in its child. Images are uploaded first, and
each run fetches them all several times over. With ``--server-pids`` the server is pinned to one core and this process
and its child to another, so that both places are compared on the same core, whatever the server takes. Runs
alternate; medians and the range are printed as Markdown tables. An image that does not decode fails the benchmark.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from imgbatch.config import Config, FetchConfig
from imgbatch.core import storage
from imgbatch.core.decoder import Decoder
from imgbatch.core.fetch import Fetcher
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import RowError
from jobs.bench.common import describe_machine, find_photographs, spread

UNIT_ROWS = 512
CLIENTS: tuple[Literal["s3fs", "obstore"], ...] = ("s3fs", "obstore")


@dataclass
class Measured:
    """Of one candidate, an entry per run: images a second, and CPU in ms an image."""

    images_per_s: list[float] = field(default_factory=list)
    client_ms: list[float] = field(default_factory=list)
    server_ms: list[float] = field(default_factory=list)


def cpu_s(pids: Sequence[int]) -> float:
    """Seconds of CPU that the processes have taken."""
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(t.user + t.system for t in times)


def consume(payloads: Iterator[bytes | RowError]) -> None:
    for payload in payloads:
        if isinstance(payload, RowError):
            raise SystemExit(f"an image was not fetched: {payload}")


class Candidate:
    """One way to come by the images; keeps its client and its decoder over all runs, as an actor does."""

    def __init__(self, uris: Sequence[str], config: FetchConfig, *, decodes: bool) -> None:
        self._uris = uris
        self._fetcher = Fetcher(config)
        self._decoder = Decoder(PreprocessSpec(), Config().decode) if decodes else None
        self.measured = Measured()
        self._work(uris[:16])

    def run(self, server_pids: Sequence[int]) -> None:
        client = [os.getpid(), *([self._decoder.child_pid] if self._decoder and self._decoder.child_pid else [])]
        client_before, server_before, started = cpu_s(client), cpu_s(server_pids), time.perf_counter()
        for first in range(0, len(self._uris), UNIT_ROWS):
            self._work(self._uris[first : first + UNIT_ROWS])
        count = len(self._uris)
        self.measured.images_per_s.append(count / (time.perf_counter() - started))
        self.measured.client_ms.append((cpu_s(client) - client_before) / count * 1000)
        self.measured.server_ms.append((cpu_s(server_pids) - server_before) / count * 1000)

    def _work(self, uris: Sequence[str]) -> None:
        fetched = self._fetcher.fetch(uris)
        if self._decoder is None:
            consume(fetched)
            return
        errors = [error for error in self._decoder.decode(fetched, len(uris)).errors if error is not None]
        if errors:
            raise SystemExit(f"an image did not decode: {errors[0]}")

    def close(self) -> None:
        self._fetcher.close()
        if self._decoder:
            self._decoder.close()


def upload(paths: Sequence[Path], prefix: str) -> list[str]:
    uris = [storage.join(prefix, f"{index:05d}.jpg") for index in range(len(paths))]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda pair: storage.replace(pair[1], pair[0].read_bytes()), zip(paths, uris, strict=True)))
    return uris


def compare(title: str, candidates: dict[str, Candidate], repeats: int, server_pids: Sequence[int]) -> None:
    for _ in range(repeats):
        for candidate in candidates.values():
            candidate.run(server_pids)
    base = sorted(next(iter(candidates.values())).measured.images_per_s)[repeats // 2]
    print(f"\n| {title} | images/s | of the first | CPU of the client, ms an image | of the server |")
    print("| --- | --- | --- | --- | --- |")
    for name, candidate in candidates.items():
        found = candidate.measured
        ratio = sorted(found.images_per_s)[repeats // 2] / base
        server = spread(found.server_ms) if server_pids else ""
        print(f"| {name} | {spread(found.images_per_s)} | {ratio:.2f} | {spread(found.client_ms)} | {server} |")
        candidate.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", help="where to put the images; the server as AWS_ENDPOINT_URL says")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--max-images", type=int, default=372)
    parser.add_argument("--rounds", type=int, default=6, help="times that a run fetches each image")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--in-flight", type=int, default=FetchConfig().in_flight)
    parser.add_argument("--server-pids", type=lambda text: [int(pid) for pid in text.split(",")], default=[])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        paths = find_photographs(arguments.folder, Path(scratch))[: arguments.max_images]
        uris = upload(paths, arguments.prefix) * arguments.rounds
        local = [str(path) for path in paths] * arguments.rounds
        print(describe_machine())
        if arguments.server_pids:
            own, others = sorted(os.sched_getaffinity(0))[:2]
            for pid in arguments.server_pids:
                for thread in psutil.Process(pid).threads():
                    os.sched_setaffinity(thread.id, {others})
            for thread in psutil.Process().threads():
                os.sched_setaffinity(thread.id, {own})
        kilobytes = sum(path.stat().st_size for path in paths) / len(paths) / 1000
        print(f"{len(paths)} images of {kilobytes:.0f} KB, {arguments.in_flight} requests in flight")

        def candidate(uris: Sequence[str], client: Literal["auto", "s3fs", "obstore"], *, decodes: bool) -> Candidate:
            config = FetchConfig(client=client, in_flight=arguments.in_flight)
            return Candidate(uris, config, decodes=decodes)

        repeats, pids = arguments.repeats, arguments.server_pids
        compare("fetching", {name: candidate(uris, name, decodes=False) for name in CLIENTS}, repeats, pids)
        places = {"local disk": candidate(local, "auto", decodes=True)}
        places.update({name: candidate(uris, name, decodes=True) for name in CLIENTS})
        compare("fetching and decoding", places, repeats, pids)


if __name__ == "__main__":
    main()
