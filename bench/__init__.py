"""The benchmark: are the complexity claims of the paper's section 4.7 true, and when? `pytest bench/ --benchmark-only`.

mult.py       MulT, the frame-level baseline
measure.py    FLOPs, bytes, time
lengths.py    how long the conversations of MELD and IEMOCAP are
grid.py       what is measured: the settings, the sizes, the inputs
test_*.py     the measurements themselves (pytest-benchmark), and tests of this folder's own code
verdicts.py   what the measurements say about each claim
tables.py     results/*.json as text
plots.py      figures, and the tables again: `python -m bench.plots`
"""

import os

# Before torch is imported: a thread that waits for another one sleeps. By default it spins, which makes a step up to
# thirty times slower where anything else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
