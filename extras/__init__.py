"""What people use around the method; nothing in the five modules at the top needs it, except the command line.

cli.py          the command line: options, a run from start to end, errors
runs.py         a run's folder: one owner, one configuration
report.py       metrics.json, report.md, tables; figures.py draws
experiments.py  bootstrap, ablation, sweep, the authors' variants compared; context.py a baseline of our own
anatomy.py      what MAGT's anchors hear (--anatomy), anatomy_page.py its page; own_utterance.py a variant of MAGT
check.py        is it the corpus of the paper? (--check); machine.py  a GPU that cannot be used, days on a CPU
released.py     what the authors' released code does differently (--preset released)
predict.py      emotions of a conversation of your own, by a finished run
pickles.py      the authors' published features, read without running any code in them
demo.py         the made-up corpus; tiny.py its small encoders with random weights
"""
