"""The text is what Prometheus' own parser reads, and all of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvmifup.agent.metrics import FAMILIES, Metrics


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample in *text*."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_was_counted_is_what_is_read() -> None:
    metrics = Metrics()
    metrics.add("kvm_ifup_runs_total", program="kvm-ifup-pre", code="0")
    metrics.add("kvm_ifup_runs_total", program="kvm-ifup-pre", code="0")
    metrics.add("kvm_ifup_runs_total", program="kvm-ifup-post", code="69")
    metrics.took("kvm_ifup_arrival_seconds", 0.002)
    metrics.took("kvm_ifup_arrival_seconds", 0.003)
    metrics.set("kvm_ifup_armed", {(): 3})
    metrics.set("kvm_ifup_armed", {(): 2})
    assert samples(metrics.text()) == {
        ("kvm_ifup_runs_total", (("code", "0"), ("program", "kvm-ifup-pre"))): 2,
        ("kvm_ifup_runs_total", (("code", "69"), ("program", "kvm-ifup-post"))): 1,
        ("kvm_ifup_arrival_seconds_sum", ()): 0.005,
        ("kvm_ifup_arrival_seconds_count", ()): 2,
        ("kvm_ifup_armed", ()): 2,
    }


def test_every_family_says_what_it_is() -> None:
    families = {family.name: family for family in text_string_to_metric_families(Metrics().text())}
    assert {name.removesuffix("_total"): kind for name, (kind, _) in FAMILIES.items()} == {
        name: family.type for name, family in families.items()
    }
    assert all(family.documentation for family in families.values())


def test_any_label_can_be_read_back() -> None:
    metrics = Metrics()
    odd = 'a "quoted"\\ line\nand another'
    metrics.add("kvm_ifup_arrivals_total", frame=odd)
    assert samples(metrics.text()) == {("kvm_ifup_arrivals_total", (("frame", odd),)): 1}


def test_threads_do_not_lose_each_others_counts() -> None:
    metrics = Metrics()

    def count() -> None:
        for _ in range(2000):
            metrics.add("kvm_ifup_leftovers_total")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert samples(metrics.text())["kvm_ifup_leftovers_total", ()] == 8000


def test_the_file_is_for_everybody_to_read(tmp_path: Path) -> None:
    metrics = Metrics()
    metrics.set("kvm_ifup_armed", {(): 1})
    path = tmp_path / "metrics.prom"
    metrics.write(path)
    metrics.write(path)
    assert path.read_text() == metrics.text()
    assert path.stat().st_mode & 0o777 == 0o644
    assert [one.name for one in tmp_path.iterdir()] == ["metrics.prom"]


def test_what_has_not_changed_is_not_written_again_but_its_time_is(tmp_path: Path) -> None:
    """By the time of the file the exporter tells that somebody still counts."""
    metrics, path = Metrics(), tmp_path / "metrics.prom"
    metrics.set("kvm_ifup_nics", {(("phase", "post"),): 2, (("phase", "pre"),): 0})
    metrics.write(path)
    file = path.stat().st_ino
    for _ in range(2):
        os.utime(path, (1, 1))
        metrics.set("kvm_ifup_nics", {(("phase", "pre"),): 0, (("phase", "post"),): 2})  # in another order
        metrics.write(path)
        assert path.stat().st_ino == file
        assert path.stat().st_mtime > 1
    path.unlink()
    metrics.write(path)  # somebody has removed it
    assert path.read_text() == metrics.text()


@pytest.mark.parametrize(
    "change",
    [
        lambda metrics: metrics.add("kvm_ifup_mends_total"),
        lambda metrics: metrics.took("kvm_ifup_arrival_seconds", 0.5),
        lambda metrics: metrics.set("kvm_ifup_armed", {(): 2}),
        lambda metrics: metrics.set("kvm_ifup_armed", {}),
    ],
    ids=["counted", "took", "another value", "gone"],
)
def test_what_has_changed_is_written(tmp_path: Path, change: Callable[[Metrics], None]) -> None:
    metrics, path = Metrics(), tmp_path / "metrics.prom"
    metrics.set("kvm_ifup_armed", {(): 1})
    metrics.write(path)
    before = path.read_text()
    change(metrics)
    metrics.write(path)
    assert path.read_text() == metrics.text() != before


def test_what_could_not_be_written_is_written_the_next_time(tmp_path: Path) -> None:
    metrics, path = Metrics(), tmp_path / "run" / "metrics.prom"
    with pytest.raises(FileNotFoundError):
        metrics.write(path)
    path.parent.mkdir()
    metrics.write(path)
    assert path.read_text() == metrics.text()
