"""Random damage to everything that the two command lines read, and to what a run leaves.

    nice -n 10 python -m tests.hostile --seconds 600            # prints its seed
    python -m tests.hostile --seed 7 --case 123 --keep DIR      # one case again; its files stay in DIR

Each case copies whole inputs, damages some, and runs the command line in a forked process that has the imports done.
A case fails on a traceback, a signal, exit code 1, a hang, a file of the user that changed, more memory than MEMORY, or
an error that is not one line. Exit code 0 is right: much damage is bearable, and some is none.

Not here: the damage (damage.py); cases by kind with the message that each must get (test_hostile*.py).
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # an import must not change what other tests start
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import numpy as np  # noqa: E402
import torch  # noqa: E402

import magtkd  # noqa: E402
from data import SPLITS  # noqa: E402
from extras import cli, demo, experiments, predict, runs, tiny  # noqa: E402, F401
from extras.features import read_features  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import damage  # noqa: E402

HANG, MEMORY = 60, 2_000_000_000  # seconds; bytes beside what the imports take
SHORT = "--encoders tiny --stage1-epochs 1 --stage2-epochs 1 --seeds 1 --workers 1 --device cpu".split()
NUMBERS = [
    "0",
    "-1",
    "1",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e-400",
    "9" * 30,
    "",
    "x",
    "0x10",
    "1_0",
    "\u0661",
    "1e5",
]
OPTIONS = "alpha beta stage1-epochs stage2-epochs stage1-lr stage1-batch stage2-lr max-tokens width seed seeds".split()


def write_pickles(folder: Path, features: Path) -> None:
    """The features of a run in the authors' layout."""
    import pickle

    folder.mkdir()
    file = read_features(features)
    for s, split in enumerate(SPLITS):
        content: dict = {"vids": []}
        for c in file.conversation[file.split == s].unique().tolist():
            rows, vid = (file.conversation == c).nonzero().flatten(), file.conversation_names[c]
            content["vids"].append(vid)
            for kind, x in file.features.items():
                content.setdefault(kind, {})[vid] = [row.numpy() for row in x[rows]]
            content.setdefault("labels", {})[vid] = file.label[rows].tolist()
            content.setdefault("speakers", {})[vid] = file.speaker[rows].tolist()
        (folder / f"first_stage_{split}_features.pkl").write_bytes(pickle.dumps(content))


def prepare(home: Path) -> None:
    """Whole inputs of every kind, and a finished run on two of them."""
    demo.write_iemocap(home / "iemocap", seed=1, conversations=1, utterances=(4, 4))
    demo.write_meld(home / "meld", seed=1, conversations=(2, 1, 1), utterances=(3, 4))
    tiny.save_tiny(home / "models", ["I am so happy today", "this is a terrible day", "well, yes"])
    code, said, _ = run(magtkd.main, ["iemocap", "--root", "iemocap", "--out", "run", *SHORT, "--causal"], home)
    assert code == 0, said
    shutil.copytree(home / "run", home / "live")
    (home / "features").mkdir()
    shutil.copy(home / "run" / "features.safetensors", home / "features" / "f.safetensors")
    write_pickles(home / "pickles", home / "run" / "features.safetensors")
    talk = home / "talk"
    talk.mkdir()
    films = sorted((home / "iemocap").rglob("*.avi")), sorted((home / "iemocap").rglob("*.wav"))
    shutil.copy(films[0][0], talk / "film.avi")
    shutil.copy(films[1][0], talk / "sound.wav")
    lines = ["speaker,text,audio,video,start,end", "Ann,I am fine.,sound.wav,film.avi,0.6,1.9"]
    lines += ['Bob,"Well, no.",,film.avi,2.0,2.9', "Ann,Oh.,,,,", "Bob,So?,sound.wav,,,"]
    (talk / "talk.csv").write_text("\n".join(lines) + "\n")
    rows = [{"speaker": "Ann", "text": "I am fine.", "audio": "talk/sound.wav"}, {"speaker": "Bob", "text": "No."}]
    rows += [{"speaker": "Ann", "text": "So?", "video": "talk/film.avi", "start": 1, "end": 2.5}]
    (talk / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# A command line in a process of its own


def run(main, argv: list[str], folder: Path, stdin: Path | None = None) -> tuple[int, str, int]:
    """Returns its exit code (-9: signal 9; -1000: it hung), what it said on stderr, and its largest size in bytes."""
    log = folder / ".said"
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            os.setsid()
            os.chdir(folder)
            size = 2 * MEMORY + int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            source = os.open(stdin or os.devnull, os.O_RDONLY)
            nowhere, said = os.open(os.devnull, os.O_WRONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for fd, target in ((source, 0), (nowhere, 1), (said, 2)):
                os.dup2(fd, target)
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
            code = main(argv)
        except SystemExit as e:  # of argparse
            code = e.code
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
    begun = time.monotonic()
    while True:
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() - begun > HANG and not is_starved(pid):
            os.killpg(pid, signal.SIGKILL)
            _, _, used = os.wait4(pid, 0)
            return -1000, log.read_text(errors="replace"), used.ru_maxrss * 1024
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(status), log.read_text(errors="replace"), used.ru_maxrss * 1024


def is_starved(pid: int) -> bool:
    """Whether it would go on, but other programs have the processor: a thread of it could run, and has run little."""
    stats = [path.read_text().rpartition(")")[2].split() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    ticks = sum(int(x) for fields in stats for x in fields[11:13])  # in its own code, and in the kernel
    return any(fields[0] == "R" for fields in stats) and ticks < HANG * os.sysconf("SC_CLK_TCK")


def snapshot(folder: Path) -> dict:
    """Path -> content of what is the user's: everything but the run's folder `run`, answers and this program's log."""
    found = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if inside.parts[0] in ("run", ".said") or path.name.endswith((".emotions.csv", ".part")):
            continue
        if path.is_symlink():
            found[inside] = os.readlink(path)
        else:
            found[inside] = path.read_bytes() if path.is_file() else oct(path.stat().st_mode)
    return found


# The cases


@dataclass(frozen=True)
class Kind:
    """inputs: what is copied. damaged: patterns of the files of which some are damaged. argv: of the command line."""

    inputs: tuple[str, ...]
    damaged: tuple[str, ...]
    argv: str
    main: object = magtkd.main
    most: int = 2  # files damaged at once
    stdin: str = ""


CORPUS = "--out run --modalities {}"
PREDICT = ("live", "talk")
KINDS = {
    "IEMOCAP's text": Kind(("iemocap",), ("iemocap/**/*.txt",), "iemocap --root iemocap --out run --modalities text"),
    "MELD's tables": Kind(("meld",), ("meld/**/*.csv",), "meld --root meld --out run --modalities text"),
    "sounds": Kind(("iemocap",), ("**/*.wav",), "iemocap --root iemocap --out run --modalities text,audio", most=9),
    "films": Kind(("iemocap",), ("**/*.avi",), "iemocap --root iemocap --out run --modalities text,video", most=4),
    "clips": Kind(("meld",), ("**/*.mp4",), "meld --root meld --out run", most=9),
    "feature file": Kind(("features",), ("features/*",), "meld --features features/f.safetensors --out run", most=1),
    "pickles": Kind(("pickles",), ("pickles/*",), "iemocap --features pickles --out run", most=1),
    "encoders": Kind(
        ("iemocap", "models"),
        ("models/*/*",),
        "iemocap --root iemocap --out run --width 64 --text-model models/text --audio-model models/audio "
        "--video-model models/video",
        most=1,
    ),
    "a finished run": Kind(("iemocap", "run"), ("run/**/*",), "iemocap --root iemocap --out run --causal", most=1),
    "predict, a run": Kind(PREDICT, ("live/*", "live/tiny/*/*"), "--run live --input talk/talk.csv", predict.main, 1),
    "predict, a csv": Kind(PREDICT, ("talk/talk.csv",), "--run live --input talk/talk.csv", predict.main, 1),
    "predict, media": Kind(PREDICT, ("talk/*.avi", "talk/*.wav"), "--run live --input talk/talk.csv", predict.main),
    "predict, lines": Kind(PREDICT, ("talk/lines.jsonl",), "--run live --stream", predict.main, 1, "talk/lines.jsonl"),
    "options": Kind(("features",), (), "iemocap --features features/f.safetensors --out run"),
}


def options(draw: random.Random, kind: Kind) -> list[str]:
    """The command line, whole; that of "options" with wrong numbers."""
    argv = kind.argv.split()
    if kind.main is predict.main:
        return [
            *argv,
            "--device",
            draw.choice(["cpu", "cpu", "cpu", "cuda", "meta", "cpu:7", ""]) if not kind.damaged else "cpu",
        ]
    argv += SHORT
    if "--text-model" in argv:  # stands for full encoders
        argv[argv.index("--encoders") + 1] = "full"
    if not kind.damaged:
        for _ in range(draw.randint(1, 2)):
            name = draw.choice([*OPTIONS, "sweep", "device", "precision", "modalities"])
            argv += [f"--{name}={draw.choice(NUMBERS)}"] if name != "sweep" else ["--sweep", *draw.sample(NUMBERS, 2)]
    return argv


def do_case(home: Path, folder: Path, name: str, draw: random.Random) -> str:
    """Makes and runs one case. Returns what went wrong, empty if nothing."""
    kind = KINDS[name]
    folder.mkdir()
    for part in kind.inputs:
        shutil.copytree(home / part, folder / part)
    paths = sorted({path for pattern in kind.damaged for path in folder.glob(pattern) if path.is_file()})
    for path in draw.sample(paths, min(len(paths), draw.randint(1, kind.most))):
        damage.spoil(draw, path)
    before, argv = snapshot(folder), options(draw, kind)
    stdin = folder / kind.stdin if kind.stdin else None
    if stdin and not stdin.is_file():
        return ""
    code, said, size = run(kind.main, argv, folder, stdin)
    after = snapshot(folder)
    tail = " | ".join(said.strip().splitlines()[-3:])[-600:]
    if code == -1000:
        return f"hangs: {tail}"
    if code < 0:
        return f"{signal.Signals(-code).name}: {tail}"
    if code not in (0, 2):
        return f"exit code {code}: {tail}"
    if "Traceback" in said:
        return f"a traceback: {tail}"
    lines = [x for x in said.splitlines() if x.startswith(("magtkd", "predict:"))]
    if code == 2 and len(lines) != 1 and not (kind.main is predict.main and len(lines) == 2):
        return f"{len(lines)} lines for an error: {tail}"
    if changed := [str(p) for p in {**before, **after} if before.get(p) != after.get(p) and "live/.lock" != str(p)]:
        return f"changed: {', '.join(changed[:3])}"
    if size > MEMORY + BASE:
        return f"{size / 1e9:.1f} GB"
    return ""


BASE = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.hostile", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--keep", type=Path, help="a new folder for the inputs and the cases that fail")
    parser.add_argument("--kind", choices=list(KINDS), help="this kind alone")
    parser.add_argument("--out", type=Path, help="a JSON file for the count")
    args = parser.parse_args()
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    home = args.keep or Path(tempfile.mkdtemp(prefix="hostile-"))
    home.mkdir(parents=True, exist_ok=True)
    print(f"seed {args.seed}, in {home}", flush=True)
    prepare(home)
    start, counts, failures, number = time.monotonic(), Counter(), [], args.case or 0
    names = [args.kind] if args.kind else list(KINDS)
    while True:
        draw = random.Random(f"{args.seed} {number}")
        name, folder = names[number % len(names)], home / f"case{number}"
        wrong = do_case(home, folder, name, draw)
        counts[name] += 1
        if wrong:
            failures.append(f"{name}: {wrong}")
            again = f"--seed {args.seed} --case {number}" + (f" --kind '{args.kind}'" if args.kind else "")
            print(f"FAILED {name}: {wrong}\n    again: python -m tests.hostile {again}", flush=True)
        if not (args.keep and (wrong or args.case is not None)):
            shutil.rmtree(folder)
        number += 1
        if args.case is not None or time.monotonic() - start > args.seconds:
            break
    for name, n in counts.items():
        print(f"{n:6} {name}")
    print(f"{sum(counts.values()):6} cases in {time.monotonic() - start:.0f} s, {len(failures)} failed")
    if args.out:
        result = {"seed": args.seed, "seconds": round(time.monotonic() - start), "counts": counts, "failures": failures}
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    if not args.keep:
        shutil.rmtree(home)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
