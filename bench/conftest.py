"""How a bench reports: the `row` fixture, the results of a whole run in results/, the verdicts at the end.

Results are written only by a timed run in which every bench of bench/ ran and passed.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from bench.grid import DEVICE
from bench.measure import SEED, THREADS, environment, gemm_rates, synchronize
from bench.plots import figure
from bench.tables import markdown, results_path, verdict_text

ROWS, RATES = pytest.StashKey[list[dict]](), pytest.StashKey[dict[str, float]]()
PARTIAL, WRITTEN = pytest.StashKey[bool](), pytest.StashKey[Path]()
BUSY = pytest.StashKey[float]()


def pytest_configure(config):
    config.stash[ROWS] = []
    config.stash[BUSY] = os.getloadavg()[0]  # what else ran on the machine before the run


@pytest.fixture
def timed(pytestconfig) -> bool:
    """False under --benchmark-disable: every bench runs once, and small."""
    return not pytestconfig.getoption("benchmark_disable")


@pytest.fixture(autouse=True)
def _pinned():
    """The same threads and the same seed for each test of this folder; threads as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rates(pytestconfig, timed) -> dict[str, float]:
    """The machine's own float32 matrix-product rates in FLOP/s, measured once a run."""
    if RATES not in pytestconfig.stash:
        pytestconfig.stash[RATES] = gemm_rates(DEVICE) if timed else gemm_rates(DEVICE, (64,), 1)
    return pytestconfig.stash[RATES]


@pytest.fixture
def row(benchmark, pytestconfig, request):
    """row(function, rounds, kind=.., flops=.., bytes=.., params=.., ..) times function and keeps one row of results.

    Everything named goes into the row and into extra_info; on CUDA the allocator's peak too. The tensors that function
    returns must be finite.
    """

    def run(function, rounds, **facts):
        def synchronized():
            result = function()
            synchronize(DEVICE)
            return result

        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        result = benchmark.pedantic(synchronized, rounds=rounds, warmup_rounds=1, iterations=1)
        if DEVICE == "cuda":
            facts["cuda_peak_bytes"] = torch.cuda.max_memory_allocated()
        benchmark.group = facts["kind"]
        benchmark.extra_info.update(facts)
        for x in tree_leaves(result):
            assert not isinstance(x, torch.Tensor) or torch.isfinite(x).all(), "a result is not finite"
        if benchmark.enabled:
            stats = benchmark.stats.stats
            spread = {"seconds": stats.median, "seconds_iqr": stats.iqr, "rounds": stats.rounds}
            pytestconfig.stash[ROWS].append({"name": request.node.name, **facts, **spread})
        return result

    return run


def pytest_deselected(items):
    if items:
        items[0].config.stash[PARTIAL] = True


def _is_whole(session, exitstatus) -> bool:
    """Whether each bench of this folder was collected, timed and passed (those that need CUDA, where it is)."""
    benches = [item for item in session.items if "row" in getattr(item, "fixturenames", ())]
    can_run = [item for item in benches if not any(mark.args[0] for mark in item.iter_markers("skipif"))]
    return (
        exitstatus == pytest.ExitCode.OK
        and session.config.stash[ROWS]
        and len(session.config.stash[ROWS]) == len(can_run)
        and {item.path.name for item in benches} == {"test_grid.py", "test_parts.py"}
        and not session.config.stash.get(PARTIAL, False)
        and not any("::" in argument for argument in session.config.args)
    )


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    if not _is_whole(session, exitstatus):
        return
    config = session.config
    busy = {"load average before": round(config.stash[BUSY], 1)}
    facts = {**environment(DEVICE), **busy, "gemm_flops_per_s": config.stash[RATES]}
    path = results_path(facts)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"environment": facts, "rows": config.stash[ROWS]}, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(path))
    figure(path)
    config.stash[WRITTEN] = path


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own table
def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("benchmark_disable") or not config.stash[ROWS]:
        return
    terminalreporter.section("Are the complexity claims of section 4.7 true?")
    if WRITTEN not in config.stash:
        terminalreporter.line("No verdicts, and no results written: that takes all of bench/, passed.")
        return
    path = config.stash[WRITTEN]
    terminalreporter.line(verdict_text(path))
    terminalreporter.line(f"Written: bench/results/{path.name}, .md and .png")
