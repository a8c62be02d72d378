"""How a measurement is taken and kept: the `record` fixture, results/<device>.* after a complete run, a summary.

Results are written only by a timed run in which every measurement of test_cases.py ran and everything passed.
"""

import os
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from bench import cases, cost, report
from bench.cases import DEVICE

ROWS, WRITTEN, LOAD = pytest.StashKey[list[dict]](), pytest.StashKey[Path](), pytest.StashKey[float]()


def pytest_configure(config):
    config.stash[ROWS] = []
    config.stash[LOAD] = os.getloadavg()[0]  # what else ran on the machine before the run


@pytest.fixture
def timed(pytestconfig) -> bool:
    """False under --benchmark-disable: every measurement runs once, and small."""
    return not pytestconfig.getoption("benchmark_disable")


@pytest.fixture(autouse=True)
def _same_threads_and_seed():
    before = torch.get_num_threads()
    torch.set_num_threads(cost.THREADS)
    torch.manual_seed(cost.SEED)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def record(benchmark, pytestconfig):
    """record(function, rounds, reference, kind=.., ..) times function, keeps a row of results, returns function().

    The row has the named facts, and if rounds > 1 the seconds of each round and the peak in bytes. reference: a
    function that is timed before each round, for ratios that do not depend on what else the machine does meanwhile.
    The result must be finite.
    """

    def run(function, rounds=cases.ROUNDS, reference=None, **facts):
        def synchronized():
            result = function()
            cost.synchronize(DEVICE)
            return result

        pairs = []
        if rounds > 1:
            facts["peak_bytes"] = cost.peak_bytes(function, DEVICE)  # also the warm-up
        if reference is not None:
            reference()
        setup = None if reference is None else lambda: pairs.append(cost.seconds(reference, DEVICE))
        result = benchmark.pedantic(synchronized, setup=setup, rounds=rounds)
        benchmark.group = facts["kind"]
        for x in tree_leaves(result):
            assert not isinstance(x, torch.Tensor) or torch.isfinite(x).all(), "a result is not finite"
        if benchmark.enabled:
            if rounds > 1:
                facts["seconds"] = [round(x, 6) for x in benchmark.stats.stats.data]
            if pairs:
                facts["reference_seconds"] = [round(x, 6) for x in pairs]
            pytestconfig.stash[ROWS].append(facts)
        return result

    return run


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    rows = session.config.stash[ROWS]
    if exitstatus != pytest.ExitCode.OK or len(rows) != cases.ROWS:
        return
    facts = {
        **cost.environment(DEVICE),
        "load before": round(session.config.stash[LOAD], 1),
        "load at the end": round(os.getloadavg()[0], 1),  # two threads of it are the benchmark's own
        "matrix_rates": cost.matrix_rates(DEVICE, cases.DTYPES),
    }
    path = session.config.stash[WRITTEN] = report.results_path(facts)
    report.save(path, facts, rows)


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own table
def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("benchmark_disable") or not config.stash[ROWS]:
        return
    terminalreporter.section("Are the complexity claims of section 4.7 true?")
    if WRITTEN not in config.stash:
        terminalreporter.line("No results written: that takes all of bench/, passed.")
        return
    path = config.stash[WRITTEN]
    for table in (report.granularity_table, report.crossing_table, report.exponent_table):
        terminalreporter.line(table(report.load(path)[1]))
    terminalreporter.line(f"Written: bench/results/{path.name}, .md and .png")
