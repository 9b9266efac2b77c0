"""Where commands that run no job do work that comes in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from imgbatch.config import Config
from imgbatch.core.parallel import Context, MapParts, Part, Result, in_threads


def map_parts_of(config: Config) -> MapParts:
    """In tasks of the Ray that ``config`` names, or in threads of this process with ``classify.engine=local``.

    Ray is connected, or started, when there are parts to spread: a single one is done here.
    """

    def in_session(
        function: Callable[[Context, Part], Result], context: Context, parts: Sequence[Part]
    ) -> Iterator[Result]:
        if len(parts) < 2:
            yield from in_threads(function, context, parts)
            return
        from imgbatch.runtime.ray_data import map_in_tasks
        from imgbatch.runtime.session import ray_session

        with ray_session(config):
            yield from map_in_tasks(function, context, parts, timeout_s=config.run.no_progress_s)

    return in_threads if config.classify.engine == "local" else in_session
