"""How a measurement is taken and kept: the fixture `measure`; results after a complete run."""

import os
import subprocess

import pytest
import torch
from torch.utils._pytree import tree_leaves

from bench import cases, cost, report
from bench.cases import DEVICE
from extras.report import machine

LOAD_BEFORE = os.getloadavg()[0]  # what else ran on the machine before the run


@pytest.fixture
def measure(benchmark):
    """measure(function, reference, rounds) gives the peak in bytes and the seconds of each round.

    reference: timed before each round, for ratios that do not depend on what else the machine does meanwhile.
    """

    def run(function, reference=None, rounds=cases.ROUNDS) -> dict:
        pairs = []

        def setup():
            if reference is not None:
                pairs.append(cost.seconds(reference, DEVICE))

        peak = cost.peak_bytes(function, DEVICE)  # also the warm-up
        setup()
        result = benchmark.pedantic(function, setup=setup, rounds=rounds)
        assert all(x.isfinite().all() for x in tree_leaves(result))
        seconds = benchmark.stats.stats.data if benchmark.enabled else []
        facts = {"seconds": seconds, "reference_seconds": pairs[1:]}
        return {"peak_bytes": peak, **{key: [round(x, 6) for x in times] for key, times in facts.items()}}

    return run


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own table
def pytest_terminal_summary(terminalreporter, exitstatus):
    """Writes the results of a timed run in which every measurement of test_cases.py ran and everything passed."""
    passed = terminalreporter.getreports("passed")
    rows = [row for test in passed for name, row in test.user_properties if name == "row"]
    if exitstatus != pytest.ExitCode.OK or len(rows) != cases.ROWS:
        return
    git = f"git -C '{report.RESULTS}' describe --always --dirty=+ --exclude='*'"  # "+": tracked files were changed
    failed, commit = subprocess.getstatusoutput(git)
    environment = {
        "device": DEVICE,
        "machine": machine(torch.device(DEVICE)),
        "commit": "unknown" if failed else commit,
        "load before": round(LOAD_BEFORE, 1),
        "load at the end": round(os.getloadavg()[0], 1),  # the benchmark's own threads included
        "matrix_rates": cost.matrix_rates(DEVICE, cases.DTYPES),
    }
    path = report.save(environment, rows)
    terminalreporter.line(f"{report.crossing_table(rows)}\nWritten: bench/results/{path.name}, .md and .png")
