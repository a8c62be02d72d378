#!/usr/bin/env bash
# bash run.sh demo                        both stages on a small synthetic corpus; no download, no licence, no GPU
# bash run.sh iemocap --root DIR          both stages on IEMOCAP_full_release (meld: on MELD.Raw)
# bash run.sh csv --root FILE.csv         both stages on your own corpus, one row per utterance
# bash run.sh test | bench                the tests; the benchmark of the paper's complexity claims
# bash run.sh predict --run DIR --input CSV    emotions of your own conversation, by a finished run
# bash run.sh tour                        one conversation of a finished run, equation by equation
# bash run.sh sweep | presets --run DIR   more experiments on a finished run
# bash run.sh demo --help                 every option
#
# Uses the active Python if it has the packages of requirements.txt, at the pinned or a newer release. Else it makes
# .venv beside this file, once (3-4 minutes, 5 GB). PYTHON=/path/to/python bash run.sh ..  takes that Python as it is.
set -euo pipefail
unset CDPATH # cd would print a path
file=${BASH_SOURCE[0]}
while [ -L "$file" ]; do # through a link
  target=$(readlink "$file")
  case "$target" in /*) file=$target ;; *) file=$(dirname "$file")/$target ;; esac
done
here=$(cd "$(dirname "$file")" && pwd)
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT-10000}" # on a busy machine OpenMP's default makes a step 2.5 times slower

case "${1-}" in
  "") sed -n '2,12s/^# \{0,1\}//p' "$here/run.sh"; exit 2 ;;
  test | bench) need=all ;;
  demo | iemocap | meld | csv | predict | tour | sweep | presets | -*) need=run ;;
  *) echo "run.sh: no command '$1'; give demo, iemocap, meld, csv, test, bench, predict, tour, sweep or presets" >&2; exit 2 ;;
esac

# Does this Python have the packages? Prints a line if a release is newer than the pin. -P: the working folder may hold a
# re.py or a random.py of the user's.
has() {
  "$1" -P - "$here/requirements.txt" "$need" <<'P' 2>/dev/null
import re, sys
from importlib.metadata import PackageNotFoundError, version
text = open(sys.argv[1]).read()
if sys.argv[2] == "run":
    text = text.partition("# For the tests")[0]
number = lambda v: [int(x) for x in re.findall(r"\d+", v.partition("+")[0])]
pins, other = dict(re.findall(r"^([\w-]+)==(\S+)", text, re.M)), []
try:
    found = {name: version(name) for name in pins}
except PackageNotFoundError:
    sys.exit(1)
if sys.version_info < (3, 11) or any(number(found[name]) < number(pin) for name, pin in pins.items()):
    sys.exit(1)
if newer := [f"{name} {found[name]} (pinned: {pin})" for name, pin in pins.items() if number(found[name]) != number(pin)]:
    print(f"run.sh: {sys.executable} has other releases: {', '.join(newer)}")
P
}

absolute() { case "$1" in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; } # `test` and `bench` change the folder

python=python3
if [ -n "${PYTHON-}" ]; then
  python=$(command -v "$PYTHON") || { echo "run.sh: PYTHON=$PYTHON does not run; give the path of a Python" >&2; exit 2; }
  python=$(absolute "$python")
elif note=$(has python3); then
  [ -z "$note" ] || echo "$note" >&2
else
  python=$here/.venv/bin/python
  if ! has "$python" >&2; then
    for candidate in python3 python3.13 python3.12 python3.11 ""; do
      [ -n "$candidate" ] || { echo "run.sh: needs Python 3.11 or newer" >&2; exit 2; }
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    echo "run.sh: installing requirements.txt into $here/.venv, once (3-4 minutes, 5 GB)" >&2
    "$candidate" -P -m venv "$here/.venv"
    "$python" -P -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
  fi
fi

module() { # nothing in the working folder is imported: it may hold a data.py or an extras/ of the user's
  local name=$1
  shift
  exec "$python" -c 'import sys
sys.path[:] = [sys.argv.pop(1)] + [p for p in sys.path if p]
import runpy, signal
signal.signal(signal.SIGINT, signal.SIG_DFL) # until run_command: Ctrl-C during the imports prints nothing
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)' "$here" "$name" "$@"
}

case "$1" in
  test)
    shift
    files=(tests bench)
    # docs/exercise.md: LOSSES=my_losses.py runs the tests of losses.py on your own file
    [ -z "${LOSSES-}" ] || { files=(tests/test_losses.py); export LOSSES=$(absolute "$LOSSES"); }
    [ -z "${FUSION-}" ] || { files=(tests/test_fusion.py); export FUSION=$(absolute "$FUSION"); }
    cd "$here"
    exec "$python" -m pytest -q "${files[@]}" --benchmark-disable "$@"
    ;;
  bench) shift; cd "$here"; exec "$python" -m pytest bench --benchmark-only "$@" ;;
  predict | tour) command=$1; shift; module "extras.$command" "$@" ;;
  sweep | presets) module extras.experiments "$@" ;;
  *) exec "$python" "$here/magtkd.py" "$@" ;;
esac
