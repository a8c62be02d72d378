"""The benchmark: are the complexity claims of the paper's section 4.7 true, and when? `pytest bench/ --benchmark-only`.

mult.py       MulT, the frame-level baseline
measure.py    FLOPs, bytes, time
lengths.py    how long the conversations of MELD and IEMOCAP are
grid.py       what is measured: the settings, the sizes, the inputs
test_*.py     the measurements themselves (pytest-benchmark), and tests of this folder's own code
verdicts.py   what the measurements say about each claim
tables.py     results/*.json as text
plots.py      figures, and the tables again: `python -m bench.plots`
speed.py      both stages before and after what was done about speed: `python -m bench.speed`
"""

import os

# Before torch is imported: a thread that waits for another one spins for some tens of microseconds and then sleeps. To
# sleep at once costs a tenth of a step on an idle machine; to spin on makes it ten times slower on a busy one.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
