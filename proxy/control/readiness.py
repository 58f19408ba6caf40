"""Decide whether this Cairn should receive requests, from what the workers reported. Pure."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import msgspec

from proxy.control.messages import REDIS_UP, WorkerReport

STALE_SECONDS = 10.0  # a worker reports four times a second; one that is silent for this long does not serve
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
    """One worker as the supervisor sees it; `report_age_seconds` is None before its first report."""

    number: int
    ready: bool
    report: WorkerReport | None = None
    report_age_seconds: float | None = None

    @property
    def serves(self) -> bool:
        """Whether it reported to be ready, and reported lately."""
        return self.ready and (self.report_age_seconds is None or self.report_age_seconds < STALE_SECONDS)


class Readiness(msgspec.Struct, frozen=True):
    """The status and the reasons why it is not better. An upstream is up if any worker can reach it."""

    status: ReadinessStatus
    reasons: tuple[str, ...] = ()
    workers: int = 0
    in_flight: int = 0
    redis: str | None = None
    upstreams: dict[str, bool] = {}


def judge(stage: Stage, workers: Sequence[WorkerView]) -> Readiness:
    """Decide the readiness: ready if a worker serves and an upstream is up, degraded if anything else is wrong."""
    serving = [worker for worker in workers if worker.serves]
    reports = [worker.report for worker in serving if worker.report is not None]
    upstreams = _upstreams(reports)
    blocking = _blocking(stage, serving, upstreams)
    redis = next((report.redis for report in reports if report.redis not in _REDIS_FINE), None)
    lacking = _lacking(workers, serving, upstreams, redis)
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


def _blocking(stage: Stage, serving: Sequence[WorkerView], upstreams: dict[str, bool]) -> list[str]:
    """Reasons to receive no requests."""
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
    """Reasons why a Cairn that serves is degraded."""
    lacking = [f"upstream {name} is down" for name, is_up in upstreams.items() if not is_up]
    if redis is not None:
        lacking.append(f"redis is {redis}")
    if len(serving) < len(workers):
        lacking.append(f"{len(serving)} of {len(workers)} workers are ready")
    return lacking
