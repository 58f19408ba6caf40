"""The models that all workers count under their own names."""

from __future__ import annotations

from proxy.metrics import definitions as metrics
from proxy.metrics.agreed_labels import AgreedLabels
from proxy.metrics.definitions import MODEL_NAMES_AT_MOST, OTHER
from proxy.metrics.exposition import Exposition
from proxy.metrics.model_labels import ModelNames
from proxy.metrics.recorder import Recorder

LISTED = [f"listed-{number}" for number in range(MODEL_NAMES_AT_MOST + 36)]


class Bench:
    """A supervisor's figures, and a worker that counts for them."""

    def __init__(self) -> None:
        self.agreed = AgreedLabels()
        self.exposition = Exposition()

    def ask(self, names: ModelNames, models: list[str]) -> None:
        """Count one request of each model in a worker with these names, and report."""
        recorder = Recorder()
        for model in models:
            label = names.label(model)
            recorder.inc(metrics.REQUESTS, ("chat_completions", label, "u", "2xx", "miss", "false"))
            recorder.observe(metrics.GEN_AI_TTFT, ("chat", label, "u"), 0.5)
        self.exposition.apply(0, self.agreed.settle(recorder.take()))

    def requests(self) -> dict[str, float]:
        return {labels[1]: count for labels, count in self.exposition.series(metrics.REQUESTS).items()}

    def timed(self) -> dict[str, int]:
        found = self.exposition.observed(metrics.GEN_AI_TTFT)
        return {labels[1]: sum(observed.counts) for labels, observed in found.items()}


def test_no_model_is_counted_half_under_its_name_and_half_as_other() -> None:
    """Whatever order the workers meet models in, and although each has counted before it hears of the other's."""
    bench = Bench()
    workers = [(ModelNames(LISTED), LISTED), (ModelNames(LISTED), LISTED[::-1])]
    for start in range(0, len(LISTED), 20):
        for names, order in workers:
            bench.ask(names, order[start : start + 20])
        for names, _ in workers:
            names.adopt(bench.agreed.models)
    assert len(bench.agreed.models) == MODEL_NAMES_AT_MOST
    assert bench.requests() == bench.timed() == dict.fromkeys(bench.agreed.models, 2) | {OTHER: 2 * 36}


def test_a_worker_counts_by_the_labels_of_all() -> None:
    """Its successor too; what it used alone stays a label while there is room, and gives way when there is none."""
    names = ModelNames(LISTED)
    assert names.label(LISTED[-1]) == LISTED[-1]
    names.adopt(LISTED[:1])
    assert [names.label(model) for model in (LISTED[0], LISTED[-1])] == [LISTED[0], LISTED[-1]]
    names.adopt(LISTED[:MODEL_NAMES_AT_MOST])
    assert names.label(LISTED[-1]) == OTHER
    assert {names.label(model) for model in LISTED} == {*LISTED[:MODEL_NAMES_AT_MOST], OTHER}


def test_a_restart_of_a_worker_adds_no_further_names() -> None:
    """The page stays as bounded as it was."""
    bench = Bench()
    bench.ask(ModelNames(LISTED), LISTED)
    successor = ModelNames(LISTED)
    successor.adopt(bench.agreed.models)
    bench.ask(successor, LISTED[::-1])
    assert len(bench.requests()) == MODEL_NAMES_AT_MOST + 1
