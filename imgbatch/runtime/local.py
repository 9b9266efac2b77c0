"""The pipeline as a plain loop in this process: the oracle of the Ray engine, for notebooks and for debugging."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from imgbatch.core.parallel import MapParts, in_threads
from imgbatch.core.plan import Run
from imgbatch.core.results import Receipt
from imgbatch.core.stages import ClassifyStage, CommitStage, DecodeStage
from imgbatch.errors import CannotWrite
from imgbatch.runtime.engine import EngineStopped
from imgbatch.runtime.isolate import classify_isolated
from imgbatch.runtime.pools import choose_batch_size, this_machine


class LocalEngine:
    """One decode stage, one classify stage and one commit stage, one unit after the other."""

    def __init__(self, run: Run) -> None:
        self._run = run
        threads = run.config.resources.classify_threads
        self._classify = ClassifyStage(
            run,
            batch_size=choose_batch_size(
                run.config.classify.batch_size, run.plan.device, run.spec.crop_size, run.backend
            ),
            num_threads=threads if isinstance(threads, int) else this_machine().num_cpus,
        )
        self._decode = DecodeStage(run, watched=False)  # last: it holds files open, and loading the model may fail

    @property
    def window(self) -> int:
        """Units under way at once."""
        return 1

    @property
    def num_actors(self) -> dict[str, int]:
        return {}

    def describe(self) -> str:
        return "one process"

    def classify_units(self, units: Sequence[int], *, defer: bool) -> Generator[Receipt]:
        """A receipt for each of the units, in order."""
        commit = CommitStage(self._run, defer=defer)
        try:
            for unit in units:
                yield self._receipt(unit, commit)
        finally:
            commit.close()

    def _receipt(self, unit: int, commit: CommitStage) -> Receipt:
        try:
            return commit(self._classify(self._decode(unit)))
        except CannotWrite:
            raise
        except Exception as error:
            raise EngineStopped(f"{type(error).__name__}: {error}") from error

    def classify_isolated(self, unit: int, *, defer: bool) -> Receipt:
        """The last resort for a unit that does not get through."""
        return classify_isolated(self._run, unit, defer=defer)

    @property
    def map_parts(self) -> MapParts:
        """In threads of this process."""
        return in_threads

    def close(self) -> None:
        self._decode.close()
        self._classify.close()
