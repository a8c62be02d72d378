"""A corpus of 5,040 utterances through the store of decoded media, on demand: `pytest -m slow -s` (4 minutes, 7 GB).

One sound in a hundred is corrupt, a stub, empty or missing. The memory that the process itself holds must stay bounded;
the files that it reads are in the system's cache, which gives way when others need it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data import read_iemocap
from extras import demo
from extras.report import write_report

FILL = """
import json, sys, threading, time
from pathlib import Path
from data import read_iemocap
from encoders import MediaStore

def held():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024

def watch():
    global most
    while True:
        most = max(most, held())
        time.sleep(0.05)

corpus = read_iemocap(Path(sys.argv[1]))
utterances = corpus.utterances()
store = MediaStore(Path(sys.argv[2]), ("audio", "video"), size=224)
most = before = held()
threading.Thread(target=watch, daemon=True).start()
start = time.monotonic()
store.fill(utterances, workers=2)
filled = time.monotonic() - start
start = time.monotonic()
total = 0
for u in utterances:
    total += int(store.get(u.id, "audio").isfinite().all()) if store.length(u.id, "audio") else 0
    total += int(store.get(u.id, "video").sum() > 0) if store.length(u.id, "video") else 0
read = time.monotonic() - start
print(json.dumps([before, most, filled, read, total, store.problems()]))
"""


@pytest.mark.slow
def test_five_thousand_utterances_in_bounded_memory(tmp_path):
    demo.write_iemocap(tmp_path / "corpus", conversations=72, utterances=(14, 14))
    corpus = read_iemocap(tmp_path / "corpus")
    utterances = corpus.utterances()
    assert len(utterances) == 5040
    broken = utterances[::100]
    for i, u in enumerate(broken):
        (lambda p: p.unlink(), lambda p: p.write_bytes(b""), lambda p: p.write_bytes(bytes(212)), halve)[i % 4](u.audio)
    done = subprocess.run(
        [sys.executable, "-c", FILL, tmp_path / "corpus", tmp_path / "store"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    before, most, filled, read, total, problems = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{filled:.0f} s to decode, {read:.0f} s to read; {(most - before) / 1e6:.0f} MB of memory at the most")
    assert most - before < 200e6
    assert {p.split(":")[0] for p in problems} == {u.id for u in broken}
    assert total == 2 * len(utterances) - len(broken)
    row = [{"seed": 0, "epoch": None, "labels": [0, 1], "predictions": [0, 1]}]
    about = {"title": "5,040", "made_up": True, "corpus": "demo", "machine": "here", "notes": []}
    about |= {"label_names": ["a", "b"], "problems": problems, "rows": {"T": row}}
    write_report(tmp_path, about)
    listed = (tmp_path / "report.md").read_text().splitlines()
    assert all(f"- {p}" in listed for p in problems)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])  # the header is cut
