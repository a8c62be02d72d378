#!/usr/bin/env bash
# bash run.sh demo                    both stages on a small made-up corpus; needs no download, no licence and no GPU
# bash run.sh iemocap --root DIR      both stages on IEMOCAP_full_release (meld: on MELD.Raw)
# bash run.sh test | bench            the tests; the benchmark of the paper's complexity claims
# bash run.sh predict --run DIR --input CSV   emotions of a conversation of your own, by a finished run
# bash run.sh tour                    the method on one conversation, step by step, with its numbers
# bash run.sh gpu                     the measurements on a CUDA card, within 8 minutes
# bash run.sh demo --help             every option
#
# Uses the active Python if it has all of requirements.txt, else makes .venv beside this file, once (3-4 minutes, 5 GB).
# PYTHON=/path/to/python bash run.sh ..  takes that Python as it is, for another build of torch say.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

has_all() { # does this Python have every pinned package?
  "$1" - "$here/requirements.txt" <<'P' 2>/dev/null
import sys
from importlib.metadata import version
lines = (line.split("#")[0].strip() for line in open(sys.argv[1]))
wanted = dict(line.split("==") for line in lines if line)
sys.exit(any(version(name).split("+")[0] != pin for name, pin in wanted.items()))
P
}

describe() { # versions of the pinned packages that this Python has, and the missing ones
  "$1" - "$here/requirements.txt" <<'P'
import platform, sys
from importlib.metadata import PackageNotFoundError, version
lines = (line.split("#")[0].strip() for line in open(sys.argv[1]))
have, missing = [f"Python {platform.python_version()}"], []
for name, pin in (line.split("==") for line in lines if line):
    try:
        found = version(name)
        have.append(f"{name} {found}" + (f" (pinned: {pin})" if found.split("+")[0] != pin else ""))
    except PackageNotFoundError:
        missing.append(name)
print(f"run.sh: {sys.executable}: {', '.join(have)}" + (f"; missing: {', '.join(missing)}" if missing else ""))
P
}

python=python3
if [ -n "${PYTHON-}" ]; then
  python=$(command -v "$PYTHON" || echo "$PYTHON")
  case "$python" in /*) ;; *) python=$PWD/$python ;; esac # there is a cd below
  describe "$python" >&2 || { echo "run.sh: PYTHON=$PYTHON does not run; give the path of a Python" >&2; exit 2; }
elif ! has_all python3; then
  python=$here/.venv/bin/python
  if ! has_all "$python"; then
    for candidate in python3 python3.13 python3.12 python3.11 ""; do
      [ -n "$candidate" ] || { echo "run.sh: needs Python 3.11 or newer" >&2; exit 2; }
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    echo "run.sh: installing requirements.txt into $here/.venv, once (3-4 minutes, 5 GB)" >&2
    "$candidate" -m venv "$here/.venv"
    "$python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
  fi
fi

case "${1-}" in
  "") sed -n '2,11s/^# \{0,1\}//p' "$here/run.sh"; exit 2 ;;
  test) shift; cd "$here"; exec "$python" -m pytest -q tests bench --benchmark-disable "$@" ;;
  predict) shift; PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m extras.predict "$@" ;;
  tour) shift; PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m extras.tour "$@" ;;
  gpu) shift; cd "$here"; exec "$python" -m bench.gpu "$@" ;;
  bench) shift; cd "$here"; exec "$python" -m pytest bench --benchmark-only "$@" ;;
  *) exec "$python" "$here/magtkd.py" "$@" ;;
esac
