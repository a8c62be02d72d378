"""The benchmark: are the complexity claims of the paper's section 4.7 true, and when? `pytest bench/ --benchmark-only`.

mult.py       MulT, the frame-level baseline
measure.py    FLOPs, bytes, the machine's own rate
lengths.py    how many utterances the conversations of IEMOCAP and MELD have
grid.py       what is measured: the settings, the sizes, the inputs
modes.py      the ways to run MAGT that are compared: padded attention, bfloat16, torch.compile, CUDA graph
test_*.py     the measurements themselves (test_grid.py, test_parts.py), and tests of this folder's own code
verdicts.py   what the measurements say about each claim
tables.py     results/*.json as text
plots.py      figures, and the tables again: `python -m bench.plots`
speed.py      both stages with and without what was done about speed: `python -m bench.speed`
"""

import os

# Before torch is imported. A thread that waits for another one spins for some tens of microseconds, then sleeps.
# Without spinning, a step takes a tenth longer on an idle machine; with torch's long spinning, ten times longer on a
# busy one.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
