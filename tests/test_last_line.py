"""The last line of defence of both command lines: bugs, Ctrl-C, closed pipes, full disks, terminals of few letters."""

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_hostile import SHORT

import magtkd
from data import InputError
from extras import cli, demo, guard, predict, runs

PROJECT = Path(__file__).parent.parent


def fail(error):
    def work():
        raise error

    return work


@pytest.fixture
def run_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / runs.MARKER).write_text("{}")
    return tmp_path / "run"


ERRORS = {
    "the user's": (InputError("x.csv: torn\nrow"), 2, "p: x.csv: torn row"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "stopped"),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "a.bin"), 2, "p: a.bin: No space left"),
    "a quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, "Disk quota exceeded; free some space"),
    "a disk that may not be written": (OSError(errno.EROFS, "Read-only file system", "a"), 2, "give another folder"),
    "a file that is gone": (FileNotFoundError(errno.ENOENT, "No such file", "a.txt"), 2, "p: a.txt: No such file"),
    "a full GPU": (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 2, "--gradient-checkpointing"),
    "a full memory": (MemoryError(), 2, "the memory is full"),
    "a bug": (ZeroDivisionError("a\nb\u2028c"), 1, "p: a bug of this program (ZeroDivisionError: a b c). Please"),
    "a bug in a file": (OSError("?"), 1, "a bug of this program (OSError: ?)"),
    "a bug without end": (RecursionError(), 1, "a bug of this program (RecursionError"),
    "a bug of bytes": (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates"), 1, "UnicodeEncodeError"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_is_one_line(kind, run_folder, capfd):
    error, code, words = ERRORS[kind]
    assert guard.guard("p", fail(error), run_folder, "stopped") == code
    said = capfd.readouterr().err
    assert words in said and len(said.splitlines()) == 1 and "Traceback" not in said
    crash = run_folder / "crash.txt"
    assert crash.exists() == (code == 1)
    if code == 1:
        assert str(crash) in said and "Traceback" in crash.read_text() and "in work" in crash.read_text()


def test_a_traceback_goes_into_no_folder_of_the_users(tmp_path, capfd):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert guard.guard("p", fail(ZeroDivisionError()), folder, "") == 1
        path = Path(capfd.readouterr().err.split("the traceback is in ")[1].strip())
        assert not list(tmp_path.iterdir()) and "ZeroDivisionError" in path.read_text()
        path.unlink()


@pytest.mark.parametrize("main", [magtkd.main, predict.main], ids=["magtkd", "predict"])
def test_both_command_lines_have_it(main, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(cli, "run", lambda args: 1 / 0)
    monkeypatch.setattr(predict, "work", lambda args: 1 / 0)
    options = {magtkd.main: ["demo", "--out", str(tmp_path)], predict.main: ["--run", str(tmp_path), "--stream"]}
    assert main(options[main]) == 1
    line = capfd.readouterr().err
    assert "a bug of this program (ZeroDivisionError" in line and len(line.splitlines()) == 1
    Path(line.split("the traceback is in ")[1].strip()).unlink()


# Real streams, in processes

SCRIPT = """
import json, os, sys
sys.path.insert(0, {project!r})
from extras.guard import guard
from pathlib import Path
answers = {{}}

def try_it(name, prepare, work):
    r, w = os.pipe()
    if (pid := os.fork()) == 0:
        os.dup2(w, 2)
        prepare()
        os._exit(guard("p", work, Path("."), "stopped"))
    os.close(w)
    said = os.fdopen(r).read()
    answers[name] = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said]

def to(path, encoding="utf-8"):
    def prepare():
        os.dup2(os.open(path, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = open(1, "w", encoding=encoding), open(2, "w", encoding=encoding)
    return prepare

def pipe():
    r, w = os.pipe()
    os.close(r)
    os.dup2(w, 1)
    sys.stdout = open(1, "w")

def closed():
    os.close(0)
    os.close(1)
    sys.stdin = sys.stdout = None

def words():
    print("\\u4e2d \\u00e9 \\ud800", "x" * 100_000, flush=True)

def file():
    print("words")
    handle = os.open(os.devnull, os.O_WRONLY)
    assert handle > 2, handle

try_it("full", to("/dev/full"), words)
try_it("full at the end", to("/dev/full"), lambda: print("a"))
try_it("pipe", pipe, words)
try_it("pipe at the end", pipe, lambda: print("a"))
try_it("closed", closed, file)
try_it("ascii", to("/dev/null", "ascii"), words)
try_it("latin", to("/dev/null", "latin1"), words)
print(json.dumps(answers))
"""


def test_outputs_of_every_kind():
    """Closed, full, of few letters: the right exit code, and no complaint of Python's at its end."""
    command = [sys.executable, "-c", SCRIPT.format(project=str(PROJECT))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    full = "p: standard output: No space left on device\n"
    assert json.loads(done.stdout) == {
        "full": [2, full],
        "full at the end": [2, full],
        "pipe": [141, ""],
        "pipe at the end": [141, ""],
        "closed": [0, ""],
        "ascii": [0, ""],
        "latin": [0, ""],
    }


@pytest.mark.parametrize("program", [["magtkd.py", "demo"], ["-m", "extras.predict", "--run", "x", "--stream"]])
def test_ctrl_c_during_the_imports(program, tmp_path):
    """They take seconds. It ends as a program that Ctrl-C ends: by the signal, or as guard does it; no traceback."""
    out = ["--out", str(tmp_path / "run")] if "demo" in program else []
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *program, *out], cwd=PROJECT, stderr=subprocess.PIPE
    )
    for line in process.stderr:
        if b" numpy" in line or b" torch._utils" in line:
            break
    process.send_signal(signal.SIGINT)
    said = process.stderr.read().decode()
    assert process.wait(60) in (-signal.SIGINT, 130)
    assert "Traceback" not in said and "KeyboardInterrupt" not in said, said[-2000:]
    assert not (tmp_path / "run").exists()


# The stream of predict


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    root = tmp_path_factory.mktemp("live")
    demo.write_iemocap(root / "iemocap", seed=2, conversations=1, utterances=(4, 4))
    options = ["iemocap", "--root", str(root / "iemocap"), "--out", str(root / "run"), *SHORT, "--causal"]
    assert magtkd.main(options) == 0
    return root / "run"


GOOD = [
    '{"speaker": "Ann", "text": "I am fine."}',
    '\ufeff{"speaker": "Bob", "text": "No", "audio": "nowhere.wav"}',
    '{"speaker": "Ann", "text": "", "video": null, "start": 0, "end": 1e3}',
    '{"speaker": "Ann", "text": "a\u2028b\x85c", "audio": "nul\\u0000.wav"}',
    '{"speaker": "Ann", "text": "' + "word " * 3000 + '", "video": "' + "x" * 5000 + '"}',
    '{"speaker": "Ann", "text": "<mask> <s1> </s> $x$ \\ud83d\\ude00", "audio": "/dev/zero", "video": "/"}',
]
BAD = [
    "no JSON",
    "[1]",
    "null",
    "3",
    '{"speaker": "Ann"',
    '{"text": "nobody"}',
    '{"speaker": 3, "text": "x"}',
    '{"speaker": "Ann", "text": ["x"]}',
    '{"speaker": "Ann", "text": "\\ud800"}',
    '{"speaker": "\udcff", "text": "bytes that are no text"}',
    '{"speaker": "Ann", "text": "x", "start": NaN}',
    '{"speaker": "Ann", "text": "x", "start": -1}',
    '{"speaker": "Ann", "text": "x", "start": "1", "end": Infinity}',
    '{"speaker": "Ann", "text": "x", "end": ' + "9" * 400 + "}",
    '{"speaker": "Ann", "text": "x", "end": ' + "9" * 5000 + "}",
    '{"speaker": "Ann", "text": "x", "start": {"a": 1}}',
    '{"speaker": "Ann", "text": "x", "start": true, "end": 0}',
    "[" * 100_000,
    "\x00",
]


def test_the_stream_survives_any_line(live, capfd):
    """An answer per line; what was no utterance leaves no trace in what follows."""
    model = predict.load_run(live, torch.device("cpu"))
    predict.answer_stream(model, iter(GOOD))
    expected = capfd.readouterr().out.split("\n")[:-1]
    lines = [line for pair in zip(BAD, [*GOOD, *[""] * len(BAD)]) for line in pair]
    with pytest.raises(InputError, match=f"{len(BAD)} lines were no utterances"):
        predict.answer_stream(model, iter(lines))
    answers = [json.loads(line) for line in capfd.readouterr().out.split("\n")[:-1]]
    assert [x for x in answers if "error" not in x] == [json.loads(x) for x in expected]
    errors = [x["error"] for x in answers if "error" in x]
    assert len(expected) == len(GOOD) and len(errors) == len(BAD)
    assert [int(e.split(":")[0].removeprefix("line ")) for e in errors] == [2 * i + 1 for i in range(len(BAD))]
    assert all(len(e) < 300 for e in errors)


@pytest.mark.parametrize("out", ["the csv", "its sound", "the run", "a folder"])
def test_predict_overwrites_nothing_that_it_reads(live, tmp_path, capfd, out):
    (tmp_path / "sound.wav").write_bytes(b"mine")
    (tmp_path / "talk.csv").write_text("speaker,text,audio\nAnn,Well.,sound.wav\n")
    (tmp_path / "link.csv").symlink_to(tmp_path / "talk.csv")
    names = {"the csv": tmp_path / "link.csv", "its sound": tmp_path / "sound.wav", "a folder": tmp_path}
    path = names.get(out, live / "config.json")
    before = (live / "config.json").read_bytes()
    options = ["--run", str(live), "--input", str(tmp_path / "talk.csv"), "--out", str(path)]
    assert predict.main(options) == 2
    assert "give another file with --out" in capfd.readouterr().err
    assert (tmp_path / "sound.wav").read_bytes() == b"mine" and "speaker" in (tmp_path / "talk.csv").read_text()
    assert (live / "config.json").read_bytes() == before
    assert predict.main(options[:4]) == 0
    assert (tmp_path / "talk.emotions.csv").exists()
