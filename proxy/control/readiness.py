"""Decide whether this Cairn should receive requests, from what the workers reported. Pure."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import msgspec

from proxy.control.messages import REDIS_UP, PoolReport, WorkerReport

RESPONSIVE_SECONDS = 1.0  # a worker that is silent for this long gets no new connections while others respond
SILENT_SECONDS = 2.0  # a worker sends a heartbeat twice a second; one that is silent for this long does not serve
NAMED_AT_MOST = 5  # pools and upstreams in the reasons; more are counted
UPSTREAMS_AT_MOST = 100  # shown to a probe, which may come each second
_REDIS_FINE = frozenset({None, REDIS_UP})


class Stage(enum.Enum):
    """The stage of the supervisor's life."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


class ReadinessStatus(enum.StrEnum):
    """The status in the answer of /readyz."""

    READY = "ready"
    DEGRADED = "degraded"  # requests are served, but something else is wrong
    NOT_READY = "not ready"


class WorkerView(msgspec.Struct, frozen=True):
    """One worker as the supervisor sees it.

    `silent_seconds` is the time since its last message of any kind. `deaths` is how often in a row it has ended soon
    after its start, 0 unless that keeps happening.
    """

    number: int
    ready: bool
    report: WorkerReport | None = None
    silent_seconds: float = 0.0
    deaths: int = 0

    @property
    def is_silent(self) -> bool:
        """True if its last message is too old."""
        return self.silent_seconds >= SILENT_SECONDS

    @property
    def serves(self) -> bool:
        """True if it is ready and responds."""
        return self.ready and not self.is_silent

    @property
    def is_responsive(self) -> bool:
        """True if it can be given connections of another worker: it is ready and has just sent something."""
        return self.ready and self.silent_seconds < RESPONSIVE_SECONDS


class Readiness(msgspec.Struct, frozen=True):
    """The status and the reasons why it is not better. An upstream is up if any worker can reach it."""

    status: ReadinessStatus
    reasons: tuple[str, ...] = ()
    workers: int = 0
    in_flight: int = 0
    redis: str | None = None
    upstreams: dict[str, bool] = {}

    def shown(self) -> dict[str, object]:
        """Return what a probe is told: of very many upstreams a part, those that are down first."""
        shown = msgspec.structs.asdict(self)
        left_out = len(self.upstreams) - UPSTREAMS_AT_MOST
        if left_out > 0:
            first = sorted(self.upstreams, key=self.upstreams.__getitem__)[:UPSTREAMS_AT_MOST]
            shown["upstreams"] = {name: self.upstreams[name] for name in first}
            shown["upstreams_left_out"] = left_out
        return shown


def judge(stage: Stage, workers: Sequence[WorkerView], failing_tasks: Sequence[str] = ()) -> Readiness:
    """Decide the readiness: ready if a worker serves and a replica of each pool that is not optional is up.

    It is degraded if anything else is wrong.

    `failing_tasks` are those of the supervisor itself.
    """
    serving = [worker for worker in workers if worker.serves]
    reports = [worker.report for worker in serving if worker.report is not None]
    upstreams = _upstreams(reports)
    pools = _pools(reports)
    blocking = _blocking(stage, serving, upstreams, pools)
    redis = next((report.redis for report in reports if report.redis not in _REDIS_FINE), None)
    failing = {*failing_tasks, *(name for report in reports for name in report.failing_tasks)}
    lacking = _lacking(workers, serving, upstreams, redis)
    down = [name for name, pool in pools.items() if pool.optional and not pool.up]
    lacking += _each_is_down("optional pool", down)
    lacking += [f"background task {name} failed and is restarted" for name in sorted(failing)]
    status = ReadinessStatus.NOT_READY if blocking else ReadinessStatus.DEGRADED if lacking else ReadinessStatus.READY
    return Readiness(
        status=status,
        reasons=(*blocking, *lacking),
        workers=len(serving),
        in_flight=sum(report.in_flight for report in reports),
        redis=redis or next((report.redis for report in reports), None),
        upstreams=upstreams,
    )


def _upstreams(reports: Sequence[WorkerReport]) -> dict[str, bool]:
    up: dict[str, bool] = {}
    for report in reports:
        for name, is_up in report.upstreams.items():
            up[name] = up.get(name, False) or is_up
    return up


def _pools(reports: Sequence[WorkerReport]) -> dict[str, PoolReport]:
    pools: dict[str, PoolReport] = {}
    for report in reports:
        for name, pool in report.pools.items():
            if name not in pools or pool.up:
                pools[name] = pool
    return pools


def _blocking(
    stage: Stage, serving: Sequence[WorkerView], upstreams: dict[str, bool], pools: dict[str, PoolReport]
) -> list[str]:
    """Return the reasons why Cairn should receive no requests."""
    blocking = []
    if stage is Stage.DRAINING:
        blocking.append("draining")
    if not serving:
        blocking.append("no worker is ready")
    if upstreams and not any(upstreams.values()):
        blocking.append("no upstream is up")
    blocking += _each_is_down("pool", [name for name, pool in pools.items() if not (pool.up or pool.optional)])
    return blocking


def _each_is_down(what: str, names: Sequence[str]) -> list[str]:
    """Return a reason for each of the first `names`, and one with the number of the others."""
    named = names if len(names) <= NAMED_AT_MOST + 1 else names[:NAMED_AT_MOST]
    reasons = [f"{what} {name} is down" for name in named]
    if left_out := len(names) - len(named):
        reasons.append(f"{left_out:,} more {what}s are down")
    return reasons


def _lacking(
    workers: Sequence[WorkerView], serving: Sequence[WorkerView], upstreams: dict[str, bool], redis: str | None
) -> list[str]:
    """Return the reasons why a Cairn that serves requests is degraded."""
    lacking = _each_is_down("upstream", [name for name, is_up in upstreams.items() if not is_up])
    if redis is not None:
        lacking.append(f"redis is {redis}")
    if len(serving) < len(workers):
        lacking.append(f"{len(serving)} of {len(workers)} workers are ready")
    silent = [worker for worker in workers if worker.ready and worker.is_silent]
    lacking += [f"worker {each.number} has not responded for {each.silent_seconds:.0f} s" for each in silent]
    lacking += [f"worker {each.number} has ended {each.deaths} times in a row" for each in workers if each.deaths]
    return lacking
