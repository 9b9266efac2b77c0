"""Pass after pass over pending units, and isolation of what will not pass, until none is pending."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from imgbatch.core.budget import ErrorBudget
from imgbatch.core.failpoints import failpoint
from imgbatch.core.plan import Run
from imgbatch.core.results import Receipt
from imgbatch.errors import ErrorBudgetExceeded, Interrupted, Status, normalise_message
from imgbatch.runtime.engine import Engine, EngineStopped
from imgbatch.runtime.interrupts import StopSwitch
from imgbatch.runtime.progress import RunProgress
from imgbatch.runtime.reporter import Reporter
from imgbatch.runtime.run_log import RunLog
from imgbatch.runtime.suspects import Suspects
from imgbatch.runtime.watchdog import Stalled

MAX_PASS_UNITS = 20_000
"""Units of one pass: keeps the driver small, and lets pools be sized anew between passes."""
MAX_INNOCENT = 3
"""Units whose isolation speaks against the engine, nothing having come through it meanwhile, before it is taken for
broken."""
_AT_FAULT = {Status.CLASSIFY_FAILED.value, Status.NON_FINITE.value, Status.OUT_OF_MEMORY.value, Status.TIMEOUT.value}


class Passes:
    """The passes of one command over some units of a run."""

    def __init__(
        self,
        run: Run,
        engine: Engine,
        reporter: Reporter,
        pending: list[int],
        *,
        find_pending: Callable[[], list[int]],
        log: RunLog | None,
        stop: StopSwitch,
    ) -> None:
        """
        Args:
            pending: the units to be committed.
            find_pending: those of them that are not committed yet.
            log: remembers for the next command what was under way when the engine stood still, which ends this one;
                none: nothing is remembered, so it is looked into at once.
            stop: ends the passes after the units in flight when it is turned on.
        """
        self._run = run
        self._stop = stop
        self._in_flight = engine.window
        """Units that may still come after a stop was asked for."""
        self._engine = engine
        self._log = log
        self._reporter = reporter
        self._budget = ErrorBudget(run.config.errors)
        self._num_changed = 0
        self._deferred = set(log.deferred_before() if log is not None else ())
        """Units that came once, to this command or the one before, and were left uncommitted, to be tried again."""
        self._suspects = Suspects(log.suspects_before() if log is not None else ())
        layout = run.plan.layout
        self._pending = pending
        self._find_pending = find_pending
        self._any_committed = len(pending) < layout.num_units
        self._came_since_stall = False
        """Whether anything was committed since the engine stood still, or since the command began."""
        self._stopped_isolated: int | None = None
        """The unit in whose isolation the engine stopped, the last time that it did."""
        self._any_passed = False
        """Whether the engine got any unit through by itself, in this command."""
        self._innocent = 0
        """Units isolated since anything came through the engine that speak for a broken one."""
        self._last_end = ""
        """What a pass or an isolation that ended early said."""
        self._progress = RunProgress(
            reporter,
            total_rows=layout.num_rows,
            done_rows=layout.num_rows - sum(layout.unit(index).num_rows for index in pending),
            num_actors=engine.num_actors,
        )

    def run_all(self) -> None:
        """Raises :class:`ErrorBudgetExceeded` or :class:`Interrupted`; otherwise every unit is committed after it."""
        defer = True
        with self._progress:
            pending = self._pending
            while pending:
                self._stop.check()
                num_deferred = len(self._deferred)
                if alone := self._suspects.alone(pending):
                    ended_early = self._isolate(alone[0], defer=defer)
                else:
                    units = self._suspects.choose(pending, self._deferred, MAX_PASS_UNITS)
                    ended_early = self._one_pass(units, defer=defer)
                left = self._find_pending()
                if left and self._innocent >= MAX_INNOCENT:
                    # Units beside each other may be alike: the last ones are the furthest from those that were tried.
                    self._one_pass(left[-self._engine.window :], defer=defer)
                    left = self._find_pending()
                if left and self._innocent >= MAX_INNOCENT:
                    raise Interrupted(
                        f"the engine stops whatever the unit, the last time with: {self._last_end}; put it right and "
                        f"run the same command again to continue"
                    )
                nothing_new = len(self._deferred) == num_deferred or self._deferred.issuperset(left)
                if not ended_early and len(left) == len(pending) and nothing_new:
                    self._refuse_to_loop(defer)
                    defer = False
                pending = left
        if self._num_changed and self._run.config.input.if_changed == "warn":
            self._reporter.say(
                f"{self._num_changed:,} objects were not what the manifest lists; they were labelled as they are now"
            )

    def _one_pass(self, units: list[int], *, defer: bool) -> bool:
        """Whether the engine stopped with units under way, which are suspects then."""
        if self._log is not None:
            self._log.pass_started()
        failpoint("job.before_pass")
        unseen = dict.fromkeys(units)
        try:
            with contextlib.closing(self._engine.classify_units(units, defer=defer)) as receipts:
                for receipt in receipts:
                    unseen.pop(receipt.unit, None)
                    self._take(receipt)
        except (EngineStopped, Stalled) as error:
            # What was committed stays; the units under way are tried again.
            under_way = list(unseen)[: self._engine.window]
            if self._log is not None:
                self._log.suspect(under_way)
                if isinstance(error, Stalled) and not (self._came_since_stall or self._suspects.hold(units)):
                    raise
            self._came_since_stall = self._came_since_stall and not isinstance(error, Stalled)
            self._last_end = normalise_message(error)
            self._reporter.say(f"a pass ended early: {self._last_end}")
            self._suspects.pass_ended_early(units, under_way, anything_came=len(unseen) < len(units))
            return bool(unseen)
        self._suspects.pass_ended()
        failpoint("job.after_pass")
        return False

    def _isolate(self, unit: int, *, defer: bool) -> bool:
        """Whether the engine stopped before the unit came.

        Where its rows fail for reasons that may pass it is deferred, once: it may always need isolation.
        """
        self._reporter.say(f"unit {unit}: classified row by row, in processes of their own", unit_id=unit)
        try:
            receipt = self._engine.classify_isolated(unit, defer=defer and unit not in self._deferred)
        except EngineStopped as error:
            # As when the node dies that it is done on.
            self._last_end = normalise_message(error)
            if self._stopped_isolated == unit:
                raise Interrupted(
                    f"unit {unit}: {self._last_end}, twice; run the same command again to continue"
                ) from error
            self._stopped_isolated = unit
            self._reporter.say(f"unit {unit}: not done yet: {self._last_end}", unit_id=unit)
            return True
        self._take(receipt)
        self._judge(receipt)
        self._suspects.came(unit)
        return False

    def _judge(self, receipt: Receipt) -> None:
        """What an isolated unit says of the engine.

        Rows at fault clear the engine, but where nothing ever worked, not even beside them. A unit without any speaks
        against the engine only if it was alone when that died: beside others it may have been a bystander.
        """
        is_at_fault = bool(_AT_FAULT & receipt.counts.keys())
        if is_at_fault and (self._any_passed or Status.OK.value in receipt.counts):
            self._innocent = 0
        elif is_at_fault or self._suspects.died_alone(receipt.unit):
            self._innocent += 1

    def _take(self, receipt: Receipt) -> None:
        if self._log is not None:
            self._log.add(receipt)
        self._reporter.unit(receipt)
        self._progress.add(receipt)
        if receipt.outcome != "deferred":
            self._any_committed = self._came_since_stall = True
        if not receipt.isolated:
            self._any_passed, self._innocent = True, 0
        self._num_changed += receipt.num_changed
        if receipt.unit not in self._deferred:  # a unit that is tried again failed already
            self._budget.add(receipt)
        if receipt.outcome == "deferred":
            self._deferred.add(receipt.unit)
        failpoint("job.receipt", receipt.unit)
        if self._stop.reason():
            self._in_flight -= 1
            if self._in_flight <= 0:
                self._stop.check()

    def _refuse_to_loop(self, defer: bool) -> None:
        """After a pass that committed nothing: the next one commits what comes, unless nothing good ever came."""
        if not defer:
            raise Interrupted("a pass committed nothing; run the same command again to continue")
        if not self._any_committed:
            raise ErrorBudgetExceeded(
                f"in every unit more rows than errors.max_rate allows failed: {self._budget.reasons()}; nothing was "
                f"written; put it right and run the same command again"
            )
