"""Decide whether this Cairn should receive requests, from what the workers reported. Pure."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import msgspec

from proxy.control.messages import REDIS_UP, PoolReport, WorkerReport

RESPONSIVE_SECONDS = 1.0  # a worker that is silent for this long gets no new connections while others respond
SILENT_SECONDS = 2.0  # a worker sends a heartbeat twice a second; one that is silent for this long does not serve
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
    lacking += [f"optional pool {name} is down" for name, pool in pools.items() if pool.optional and not pool.up]
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
    blocking += [f"pool {name} is down" for name, pool in pools.items() if not (pool.up or pool.optional)]
    return blocking


def _lacking(
    workers: Sequence[WorkerView], serving: Sequence[WorkerView], upstreams: dict[str, bool], redis: str | None
) -> list[str]:
    """Return the reasons why a Cairn that serves requests is degraded."""
    lacking = [f"upstream {name} is down" for name, is_up in upstreams.items() if not is_up]
    if redis is not None:
        lacking.append(f"redis is {redis}")
    if len(serving) < len(workers):
        lacking.append(f"{len(serving)} of {len(workers)} workers are ready")
    silent = [worker for worker in workers if worker.ready and worker.is_silent]
    lacking += [f"worker {each.number} has not responded for {each.silent_seconds:.0f} s" for each in silent]
    lacking += [f"worker {each.number} has ended {each.deaths} times in a row" for each in workers if each.deaths]
    return lacking
