"""The benchmark: are the complexity claims of the paper's section 4.7 true, and when? `pytest bench/ --benchmark-only`.

mult.py       MulT, the frame-level baseline
measure.py    FLOPs, bytes, time
lengths.py    how long the conversations of MELD and IEMOCAP are
grid.py       what is measured: the settings, the sizes, the inputs
test_*.py     the measurements themselves (pytest-benchmark), and tests of this folder's own code
verdicts.py   what the measurements say about each claim
plots.py      tables and figures from results/*.json: `python -m bench.plots`
"""
