"""Whether this Cairn should get requests, judged from what the workers reported. Pure."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import msgspec

from proxy.control.channel import REDIS_UP, WorkerReport

STALE_SECONDS = 10.0  # a worker reports every second; one this silent stands still
_REDIS_FINE = frozenset({None, REDIS_UP})


class Stage(enum.Enum):
    """Where the whole stands between its start and its end."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


class ReadinessStatus(enum.StrEnum):
    """The answer of /readyz."""

    READY = "ready"
    DEGRADED = "degraded"  # requests are served, something beside them is not as it should be
    NOT_READY = "not ready"


class WorkerView(msgspec.Struct, frozen=True):
    """One worker as the supervisor sees it; `report_age_seconds` is None before its first report."""

    number: int
    ready: bool
    report: WorkerReport | None = None
    report_age_seconds: float | None = None

    @property
    def serves(self) -> bool:
        """True where it said that it is ready and was heard of lately."""
        return self.ready and (self.report_age_seconds is None or self.report_age_seconds < STALE_SECONDS)


class Readiness(msgspec.Struct, frozen=True):
    """The judgement, and why it is not better; `upstreams` are up where any worker finds them so."""

    standing: ReadinessStatus
    reasons: tuple[str, ...] = ()
    workers: int = 0
    in_flight: int = 0
    redis: str | None = None
    upstreams: dict[str, bool] = {}


def judge(stage: Stage, workers: Sequence[WorkerView]) -> Readiness:
    """Ready while one worker serves and one upstream is up; without Redis degraded, which still takes requests."""
    serving = [worker for worker in workers if worker.serves]
    reports = [worker.report for worker in serving if worker.report is not None]
    upstreams = _upstreams(reports)
    blocking = _blocking(stage, serving, upstreams)
    redis = next((report.redis for report in reports if report.redis not in _REDIS_FINE), None)
    lacking = _lacking(workers, serving, upstreams, redis)
    standing = (
        ReadinessStatus.NOT_READY if blocking else ReadinessStatus.DEGRADED if lacking else ReadinessStatus.READY
    )
    return Readiness(
        standing,
        (*blocking, *lacking),
        len(serving),
        sum(report.in_flight for report in reports),
        redis or next((report.redis for report in reports), None),
        upstreams,
    )


def _upstreams(reports: Sequence[WorkerReport]) -> dict[str, bool]:
    up: dict[str, bool] = {}
    for report in reports:
        for name, is_up in report.upstreams.items():
            up[name] = up.get(name, False) or is_up
    return up


def _blocking(stage: Stage, serving: Sequence[WorkerView], upstreams: dict[str, bool]) -> list[str]:
    blocking = []
    if stage is Stage.DRAINING:
        blocking.append("draining")
    if not serving:
        blocking.append("no worker is ready")
    if upstreams and not any(upstreams.values()):
        blocking.append("no upstream is up")
    return blocking


def _lacking(
    workers: Sequence[WorkerView], serving: Sequence[WorkerView], upstreams: dict[str, bool], redis: str | None
) -> list[str]:
    lacking = [f"upstream {name} is down" for name, is_up in upstreams.items() if not is_up]
    if redis is not None:
        lacking.append(f"redis is {redis}")
    if len(serving) < len(workers):
        lacking.append(f"{len(serving)} of {len(workers)} workers are ready")
    return lacking
