"""Random damage to files, for tests/hostile.py: bytes, text, JSON, tensor files, pickles, sounds; and what is no file.

Everything is drawn from the `random.Random` that is given, so that a case can be repeated. What is made is made up.
"""

import json
import math
import os
import pickle
import random
import struct
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

TEXTS = [
    "\ufeff",
    "\r",
    "\r\n",
    "\u2028",
    "\x85",
    "\x0c",
    "\x0b",
    "\0",
    '"',
    "'",
    ",",
    ";",
    "\t",
    "$\\frac",
    "%s{}",
    "\\",
]
TEXTS += [
    "nan",
    "-1",
    "1e400",
    "9" * 400,
    "x" * 300,
    "[",
    "]",
    "{",
    "<s1>",
    "<mask>",
    "é",
    "中文",
    "\U0001f600",
    "../..",
    "-",
]
NUMBERS = [0, -1, 1, 2, 7, 255, 2**31, 2**63, 2**64, 10**400, 0.5, -0.5, 1e13, 1e300, math.nan, math.inf, -math.inf]
VALUES = [*NUMBERS, None, True, "", "x", "\ud800", "a\nb", "$x$", [], {}, [[]], [1, "2"], {"a": None}, "9" * 400]
DTYPES = ["float16", "float32", "float64", "int64", "int32", "uint8", "bool"]


# Bytes and text


def spoil_bytes(draw: random.Random, content: bytes) -> bytes:
    """Some bytes changed, cut, put in, doubled; more often in the first hundred, where headers are."""
    x = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(min(len(x), draw.choice([100, len(x) or 1])) or 1)
        length = draw.choice([1, 1, 4, 50, len(x) // 2])
        what = draw.randrange(7)
        if what == 0:
            x[at : at + length] = draw.randbytes(length)
        elif what == 1:
            del x[at:]
        elif what == 2:
            del x[at : at + length]
        elif what == 3:
            x[at:at] = draw.randbytes(length)
        elif what == 4:
            x[at:at] = x[at : at + length]
        elif what == 5:
            x[at : at + 4] = draw.choice([b"\xff" * 4, bytes(4), b"\xff\xff\xff\x7f", b"\0\0\0\x80"])
        elif x:
            x[at % len(x)] ^= 1 << draw.randrange(8)
    return bytes(x)


def spoil_text(draw: random.Random, content: bytes) -> bytes:
    """Lines and pieces of them changed, doubled, swapped, left out; marks of editors and spreadsheets put in."""
    text = content.decode("utf-8", "replace")
    for _ in range(draw.randint(1, 3)):
        lines, at = text.split("\n"), draw.randrange(len(text) + 1)
        i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
        what = draw.randrange(11)
        if what == 0:
            text = text[:at] + draw.choice(TEXTS) + text[at:]
        elif what == 1:
            text = text[:at] + text[at + draw.choice([1, 5, 80]) :]
        elif what == 2:
            text = "\n".join([*lines[:i], lines[j], *lines[i:]])
        elif what == 3:
            lines[i], lines[j] = lines[j], lines[i]
            text = "\n".join(lines)
        elif what == 4:
            text = "\n".join(lines[:i] + lines[i + 1 :])
        elif what == 5:
            text = text.replace(*draw.choice([("\n", "\r\n"), ("\n", "\r"), ("\n", "\u2028"), (",", ";"), (",", "\t")]))
        elif what == 6:
            text = draw.choice(TEXTS) + text
        elif what == 7:
            digits = [k for k, x in enumerate(text) if x.isdigit()] or [0]
            k = draw.choice(digits)
            text = text[:k] + draw.choice([str(x) for x in NUMBERS]) + text[k + 1 :]
        elif what == 8:
            words = lines[i].split("\t")
            draw.shuffle(words)
            text = "\n".join([*lines[:i], "\t".join(words), *lines[i + 1 :]])
        elif what == 9:
            words = text.split(" ")
            words[draw.randrange(len(words))] = draw.choice(words) + draw.choice(TEXTS)
            text = " ".join(words)
        else:
            text = draw.choice(["", text[:at], text + text, text.upper(), text[::-1]])
    coding = draw.choice(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "utf-32", "cp1252"])
    return text.encode(coding, "replace")


# What has a structure


def spoil_value(draw: random.Random, x, depth: int = 0):
    """JSON, or what a pickle holds, with one value somewhere in it replaced, left out or doubled."""
    if isinstance(x, (dict, list)) and x and draw.random() < 0.9:
        key = draw.choice(list(x)) if isinstance(x, dict) else draw.randrange(len(x))
        what, x = draw.random(), x.copy()
        if what < 0.1:
            del x[key]
        elif what < 0.15 and isinstance(x, list):
            x.append(x[key])
        elif what < 0.2 and isinstance(x, dict):
            x[draw.choice([str(key) + "x", "", "\ud800"])] = x.pop(key)
        else:
            x[key] = spoil_value(draw, x[key], depth + 1)
        return x
    if draw.random() < 0.03:
        for _ in range(draw.choice([3, 200])):
            x = [x]
        return x
    return draw.choice(VALUES)


def spoil_json(draw: random.Random, content: bytes) -> bytes:
    try:
        return json.dumps(spoil_value(draw, json.loads(content))).encode()
    except ValueError:
        return spoil_text(draw, content)


def spoil_array(draw: random.Random, x: np.ndarray) -> np.ndarray:
    """Other numbers, shapes and types."""
    what = draw.randrange(8)
    if what == 0 and x.size:
        x = x.copy()
        value = draw.choice([v for v in NUMBERS if abs(v) < 2**63 or v != v or x.dtype.kind == "f" and abs(v) < 1e39])
        x.flat[draw.randrange(x.size)] = value if x.dtype.kind == "f" or math.isfinite(value) else -1
    elif what == 1:
        with np.errstate(all="ignore"):
            x = x.astype(draw.choice(DTYPES))
    elif what == 2:
        x = x[: draw.randrange(len(x) + 1)] if x.ndim else x
    elif what == 3:
        x = x.reshape(draw.choice([(-1,), (1, *x.shape), (*x.shape, 1), x.shape[::-1]]))
    elif what == 4:
        x = np.roll(x, 1, axis=0) if x.ndim else x
    elif what == 5:
        x = x[..., :0] if x.ndim else x
    elif what == 6 and x.dtype.kind == "f":
        x = x * draw.choice([0, 1e30, 1e6, np.nan, np.inf])
    else:
        x = np.full_like(x, draw.choice([0, 1, 5, 127]))
    return np.ascontiguousarray(x)


def spoil_tensors(draw: random.Random, path: Path) -> None:
    """A safetensors file: a tensor, a name or the metadata changed; or its header, or any of its bytes."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    metadata, what = header.pop("__metadata__", {}), draw.random()
    if what < 0.5:
        tensors = load_file(path)
        name = draw.choice(list(tensors))
        x = tensors.pop(name)
        if draw.random() < 0.9:
            tensors[name if draw.random() < 0.9 else f"{name}x"] = spoil_array(draw, x)
        save_file(tensors, path, metadata)
    elif what < 0.75 and metadata:
        key = draw.choice(list(metadata))
        metadata[key] = spoil_json(draw, metadata[key].encode()).decode("utf-8", "replace").replace("\ud800", "?")
        save_file(load_file(path), path, metadata)
    elif what < 0.85:
        text = json.dumps(spoil_value(draw, header | {"__metadata__": metadata})).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    else:
        path.write_bytes(spoil_bytes(draw, content))


def spoil_pickle(draw: random.Random, path: Path) -> None:
    """The values of a pickle, its bytes, or a pickle that stands for gigabytes."""
    content, what = path.read_bytes(), draw.random()
    if what < 0.6:
        x = pickle.loads(content)
        field = draw.choice(list(x))
        if isinstance(x[field], dict) and draw.random() < 0.5:
            vid = draw.choice(list(x[field]))
            rows = list(x[field][vid])
            i = draw.randrange(len(rows))
            rows[i] = spoil_array(draw, np.asarray(rows[i])) if draw.random() < 0.7 else draw.choice(VALUES)
            x[field][vid] = rows
        else:
            x = spoil_value(draw, x)
        content = pickle.dumps(x, draw.choice(range(6)))
    elif what < 0.7:
        bomb = [0.0] * 100
        for _ in range(draw.choice([3, 28])):
            bomb = [bomb] * draw.choice([2, 10])
        x = pickle.loads(content)
        x[draw.choice(list(x))] = draw.choice([bomb, {"a": bomb}, {vid: bomb for vid in x["vids"]}])
        content = pickle.dumps(x)
    elif what < 0.75:
        content = b"\x80\x04]r" + struct.pack("<I", draw.choice([2**31, 2**32 - 1])) + b"."
    else:
        content = spoil_bytes(draw, content)
    path.write_bytes(content)


def write_odd_sound(draw: random.Random, path: Path) -> None:
    """A WAV whose header is well formed and says anything: channels, rate, bits, and samples to it."""
    kind, bits = draw.choice(
        [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64), (6, 8), (7, 8), (2, 4), (85, 0), (1, 3)]
    )
    channels = draw.choice([0, 1, 2, 3, 6, 7, 8, 9, 16, 63, 64, 65, 255, 65535])
    rate = draw.choice([0, 1, 7, 100, 8000, 11127, 16000, 44101, 96000, 383981, 10**6, 2**31, 2**32 - 1])
    data = draw.randbytes(draw.choice([0, 1, 100, 40_000]))
    block = max(1, channels * bits // 8) & 0xFFFF
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, kind, channels, rate, min(rate * block, 2**32 - 1), block, bits)
    said = draw.choice([len(data), len(data), 0, 2**32 - 1, 2 * len(data)])
    body = b"WAVE" + form + struct.pack("<4sI", b"data", said) + data
    path.write_bytes(struct.pack("<4sI", b"RIFF", len(body)) + body)


# What is no file


def replace_by_something(draw: random.Random, path: Path) -> None:
    path.unlink()
    what = draw.randrange(8)
    if what == 0:
        path.mkdir()
    elif what == 1:
        os.mkfifo(path)
    elif what == 2:
        path.symlink_to(draw.choice(["/dev/zero", "/dev/null", "/dev/tty", "/proc/self/mem"]))
    elif what == 3:
        path.symlink_to(draw.choice(["nowhere", path.name, ".", "x" * 300]))
    elif what == 4:
        path.write_bytes(b"")
    elif what == 5:
        path.write_bytes(draw.randbytes(draw.choice([1, 12, 5000])))
    elif what == 6:
        path.write_bytes(b"\0" * 300)


def spoil(draw: random.Random, path: Path) -> None:
    """Damages a file, by what it is; one in ten becomes something else than a file."""
    if draw.random() < 0.1:
        replace_by_something(draw, path)
    elif path.suffix == ".wav" and draw.random() < 0.5:
        write_odd_sound(draw, path)
    elif path.suffix == ".safetensors":
        spoil_tensors(draw, path)
    elif path.suffix == ".pkl":
        spoil_pickle(draw, path)
    elif path.suffix == ".json" and draw.random() < 0.7:
        path.write_bytes(spoil_json(draw, path.read_bytes()))
    elif path.suffix in (".txt", ".csv", ".json", ".jsonl", ".md"):
        path.write_bytes(spoil_text(draw, path.read_bytes()))
    else:
        path.write_bytes(spoil_bytes(draw, path.read_bytes()))
