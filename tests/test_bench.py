"""The benchmark harness: statistics, the results file, and the document made from it."""

import re
import sys
from pathlib import Path

import pytest

from pool import run_ranks

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

harness = pytest.importorskip("bench.harness")


def test_measurements_alternate_and_leave_the_warmup_out():
    calls = []
    clock = iter(range(1000))
    ours, peer = harness.measure_pairs(
        lambda: calls.append("ours"), lambda: calls.append("peer"), 4, num_warmup=2, clock=lambda: float(next(clock))
    )
    assert calls == ["ours", "peer", "peer", "ours"] * 3
    assert ours == peer == [1.0] * 4


def test_the_ratio_is_the_median_over_pairs_with_its_interval():
    ours, peer = [1.0, 2.0, 30.0, 4.0, 5.0], [1.0, 1.0, 10.0, 1.0, 1.0]
    result = harness.paired_result("name", "s", ours, peer, "ratio <= 1.05")
    assert (result.ratio_median, result.ours, result.peer, result.pairs) == (3.0, 4.0, 1.0, 5)
    assert 1.0 <= result.ratio_low <= 3.0 <= result.ratio_high <= 5.0
    assert result.verdict == "within noise"
    assert harness.paired_result("name", "s", [1.0], [1.0], "ratio <= 1.05").verdict == "met"
    assert harness.plain_result("name", "us", 200.0, 3, "ours <= 150").verdict == "missed"
    assert harness.plain_result("name", "us", 200.0, 3, "reported").verdict == "-"
    assert harness.plain_result("name", "MiB", 3.0, 1, "ratio <= 1.01", peer=2.0).verdict == "missed"


def test_one_benchmark_replaces_only_its_own_line(tmp_path):
    path = tmp_path / "results.json"
    harness.merge_results([harness.plain_result(name, "us", 1.0, 3, "reported") for name in ("b", "a")], path)
    harness.merge_results([harness.plain_result("b", "us", 2.0, 3, "reported")], path)
    assert [(result.name, result.ours) for result in harness.read_results(path)] == [("a", 1.0), ("b", 2.0)]


def test_the_document_is_in_step_with_the_results():
    from bench import report

    results = harness.read_results()
    assert results, "bench/results.json is missing"
    assert report.REPORT_FILE.read_text() == report.current_report()
    for result in results:
        assert result.target == "reported" or re.fullmatch(harness.TARGET, result.target), result.name
        assert report.case_of(result) is not None, f"no benchmark makes {result.name!r}"


@pytest.mark.parametrize(
    "spread, names, kinds",
    [
        ("pp2_tp2", ["compare_background"], {"stall", "steps_meanwhile"}),
        pytest.param(
            "sharded4",
            ["compare_plain", "compare_gathered"],
            {"save", "load", "load_cached", "save_peak", "load_peak"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_checkpoints_are_compared(tmp_path, spread, names, kinds):
    from bench import checkpoint_jobs
    from bench.cases import checkpoints

    arguments = (checkpoint_jobs.SMALL, 1, True, str(tmp_path / "checkpoints"))
    found = {}
    for name in names:
        function = getattr(checkpoints, name)
        found |= run_ranks(function, 4, *arguments, parameters=dict(checkpoint_jobs.SPREADS[spread]))[0]
    assert found.keys() == kinds
    pairs = [pair for kind, pair in found.items() if not kind.endswith("_peak")]
    assert all(len(ours) == len(peer) == 1 and ours[0] > 0 and peer[0] > 0 for ours, peer in pairs)
