"""The benchmark: are the complexity claims of the paper's section 4.7 true, and when? `pytest bench/ --benchmark-only`.

mult.py       MulT, the frame-level baseline
cost.py       FLOPs counted three ways, bytes, the machine's own rates
cases.py      what is measured: models, lengths, inputs, the stage-2 step, the encoders of stage 1
test_cases.py the measurements; the other test_*.py test this folder's own code
report.py     numbers, tables and the figure from results/<device>.json: `python -m bench.report`
"""

import os

# Set before torch is imported: long spinning of waiting OpenMP threads makes a step 2.5 times slower on a busy machine.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
