"""A run's folder: one owner at a time, one configuration, one corpus, and nothing in it that is not whole.

`magtkd-run.json`, which no other program writes, marks the folder. It holds the options that change results, what
the corpus was (per utterance its split, conversation, speaker, label, a hash of its words, its times), size and time of
every sound and film, and why some could not be decoded. A second start compares all of it with what there is now.

Not here: the comparing (changes.py), and what is in the other files (data.py, report.py).
"""

import fcntl
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from data import SPLITS, Corpus, InputError, Utterance, replace_file
from encoders import MediaStore, video_shape
from extras.changes import compare, describe, stamps
from magtkd import TABLE_NAMES

MARKER = "magtkd-run.json"
FOLDERS = ("fusion", "sweep", "presets", "anatomy", "media", "figures", "corpus", "tiny")
ENCODER = r"(\.features\.safetensors|\.safetensors|\.resume\.pt)"  # the endings of an encoder's files
# The names of all files that a run makes: --fresh removes these and no others.
OWN = re.compile(
    r"(magtkd-run\.json|config\.json|metrics\.json|report\.md|sweep\.md|presets\.md|log\.jsonl|crash\.txt|anatomy\.(json|md)"
    r"|(features|fusion)\.safetensors"
    rf"|(text|audio|video|audio_kd|video_kd){ENCODER}"
    r"|(fusion|sweep|presets|anatomy)/log\.jsonl"
    r"|fusion/(Concat|Context|MAGT)-T(\+(A|A_KD|V|V_KD))*-seed\d+\.(json|safetensors|resume\.pt)"
    r"|sweep/alpha[\d_e+-]+-beta[\d_e+-]+-seed\d+\.(json|safetensors|resume\.pt)"
    r"|presets/(paper|row\d+|released)-seed\d+\.(json|safetensors|resume\.pt)"
    r"|anatomy/(Concat|Context|MAGT)[\w+-]*-seed\d+\.(json|heard\.json|safetensors|resume\.pt)"
    r"|figures/(confusion|losses|gates|tsne|sweep|anatomy)\.png"
    r"|media/(new/)?(audio|video)/(Ses\w+|(train|dev|test)_dia\d+_utt\d+)(~\w+)?\.(npy|txt)"
    r"|corpus(\.part)?/(README\.txt|Session\d/(dialog|sentences)/.*Ses0\d[FM]_\w+\.(txt|avi|wav))"
    r"|tiny(\.part)?/(text|audio|video)/(config|tokenizer|tokenizer_config|preprocessor_config|video_preprocessor_config"
    r"|special_tokens_map|processor_config)\.json|tiny(\.part)?/(text|audio|video)/model\.safetensors"
    r")(\.part)?"
)


class Run:
    """A run's folder, locked as long as this lives. `open_run` makes it."""

    def __init__(self, out: Path, lock, record: dict[str, Any]):
        self.out, self.lock, self.record = out, lock, record

    def save(self, **changes) -> None:
        self.record |= changes
        replace_file(self.out / MARKER, lambda part: part.write_text(json.dumps(self.record)))

    def close(self) -> None:
        self.lock.close()

    def note_device(self, device: str) -> None:
        if (before := self.record.get("device", device)) != device:
            print(f"begun on {before}, continues on {device}: results may differ in their last digits")
        self.save(device=device)

    def check_corpus(self, corpus: Corpus) -> None:
        """Errors: InputError that names what changed since the run was begun."""
        now = describe(corpus)
        before = self.record.setdefault("corpus", now)
        if changes := compare(before, now):
            raise InputError(
                f"{corpus.name} is not what it was when {self.out} was begun: {'; '.join(changes)}. Bring back the old "
                "corpus, give another folder with --out, or --fresh to begin anew"
            )
        self.save()

    def renew(self, corpus: Corpus, config, workers: int) -> None:
        """Decodes media files again whose size or time changed, and removes what was made from the old ones.

        A file that was only copied or touched decodes to what is there already: nothing else is made again then. A kill
        at any moment costs nothing: what was made goes before what it was made from, and the marker changes last.
        """
        wanted = [m for m in ("audio", "video") if m in config.modalities]
        now = {m: stamps(corpus, m) for m in wanted}
        before, shape = self.record.get("media", now), ()
        changed = {m: [u for u in corpus.utterances() if before.get(m, {}).get(u.id) != now[m][u.id]] for m in wanted}
        if changed.get("video"):
            shape = video_shape(config.video_model)
        for m, some in changed.items():
            if some:
                print(f"{len(some)} {m} files changed since the last start: decoded again")
                self._renew(m, some, shape, workers)
        remove(self.out, re.compile(r"media/new/.*"))  # what is the same as before, or of a start that was killed
        for folder in (self.out / "media/new" / name for name in ("audio", "video", "")):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        self.save(media=now)

    def _renew(self, m: str, utterances: list[Utterance], shape: tuple[int, ...], workers: int) -> None:
        remove(self.out, re.compile(r"media/new/.*"))
        old, new = (MediaStore(folder, (m,), *shape) for folder in (self.out / "media", self.out / "media" / "new"))
        new.fill(utterances, workers)
        made = self.files(rf"media/new/{m}/.*")
        fresh = [path for path in made if not same_bytes(path, old.folder / m / path.name)]
        if fresh:
            names = [k for k in TABLE_NAMES if k.removesuffix("_kd") == m]
            gone = remove(self.out, re.compile(rf"({'|'.join(names)}){ENCODER}")) + self.remove_fusions(names)
            if gone:
                print(f"{len(fresh)} of them are different: {', '.join(names)} and the fusions are trained again")
        for path in fresh:
            for ending in (".npy", ".txt"):
                (old.folder / m / path.name).with_suffix(ending).unlink(missing_ok=True)
            os.replace(path, old.folder / m / path.name)

    def remove_fusions(self, names: list[str]) -> list[Path]:
        """Removes the results of stage 2 that were made from these encoders' features."""
        kinds = "|".join(re.escape(TABLE_NAMES[name]) for name in names)
        rows = remove(self.out, re.compile(rf"fusion/\w+-([\w+]+\+)?({kinds})(\+[\w+]+)?-seed.*"))
        return rows + (remove(self.out, re.compile(r"(sweep|presets|anatomy)/.*-seed.*")) if rows else [])

    def drop_orphans(self) -> None:
        """Removes what was made from an encoder's features that are no longer there (the user deleted a damaged file).

        A fusion is then trained from the new features, not read from a file beside them.
        """
        lost = [k for k in TABLE_NAMES if not (self.out / f"{k}.features.safetensors").exists()]
        gone = []
        if "text" in lost:  # their teacher
            gone = remove(self.out, re.compile(rf"(audio|video)_kd{ENCODER}"))
            lost += ["audio_kd", "video_kd"]
        if gone := gone + self.remove_fusions(lost):
            print(f"{self.out}: an encoder's features are missing; what was made from them is made again")

    def check_results(self, labels: list[int], num_classes: int) -> None:
        """Errors: InputError for a result of stage 2 that is damaged, or belongs to other labels of test."""
        for path in self.files(r"(fusion|sweep|presets|anatomy)/.*-seed\d+\.json"):
            wrong = what_is_wrong(read_json(path), labels, num_classes)
            weights = path.with_suffix(".safetensors")
            if not wrong and path.parent.name == "fusion":
                wrong = "" if is_readable(weights) else f"{weights.name}, which belongs to it, is missing or damaged"
            if wrong:
                raise InputError(f"{path}: {wrong}; delete it, and this training is repeated")

    def keep_problems(self, problems: list[str]) -> list[str]:
        """The lines about broken media, with those from before about files that the store no longer holds."""
        there = {f"{p.stem}: {p.parent.name}" for p in self.files(r"media/.*")}
        old = [line for line in self.record.get("problems", []) if " ".join(line.split(" ")[:2]) not in there]
        self.save(problems=sorted({*old, *problems}))
        return self.record["problems"]

    def was_ablation(self) -> bool:
        """Whether the report holds an ablation."""
        path = self.out / "metrics.json"
        if not path.exists():
            return False
        if not isinstance(metrics := read_json(path), dict) or not isinstance(metrics.get("rows"), dict):
            raise InputError(f"{path}: not this program's metrics; delete it, it is made again")
        return bool(metrics.get("comparisons"))

    def files(self, pattern: str) -> list[Path]:
        return [p for p in own_files(self.out) if re.fullmatch(pattern, p.relative_to(self.out).as_posix())]


def open_run(out: Path, options: dict, fresh: bool) -> Run:
    """Makes or reopens a run's folder and locks it.

    options: all that change a result. Errors: InputError if the folder holds foreign files, if another process runs in
    it, if it was begun with other options, or if one of a run's files is something else than a file.
    """
    lock, options = lock_folder(out), json.loads(json.dumps(options))
    kept = clear(out) if fresh else {}
    check_kinds(out)
    run = Run(out, lock, kept | read_marker(out / MARKER))
    before = run.record.setdefault("options", options)
    changed = [key for key in sorted(before.keys() | options.keys()) if before.get(key) != options.get(key)]
    if changed:
        changes = "; ".join(f"{key}: {before.get(key)} there, {options.get(key)} now" for key in changed)
        raise InputError(
            f"{out} was begun with another configuration ({changes}). Give the same options to go on, another folder "
            "with --out, or --fresh to delete what the run made."
        )
    run.save(program="magtkd")
    replace_file(out / "config.json", lambda part: part.write_text(json.dumps(options, indent=2)))
    return run


def lock_folder(out: Path) -> IO:
    """Makes the folder; the lock lasts until the file is closed. Errors: InputError if it is no run's, or in use."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in out.iterdir()} - {".lock"}
        if names and not names & {MARKER, f"{MARKER}.part"}:
            some = ", ".join(sorted(names)[:3])
            raise InputError(f"{out}: holds files that are not of a run ({some}), no {MARKER}; give a new --out")
        lock = open(out / ".lock", "a+")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except BlockingIOError as e:
        raise InputError(f"{out}: another run is at work in this folder; wait for it, or give another --out") from e
    except OSError as e:
        raise InputError(f"{out}: cannot be written ({e.strerror}); give another folder with --out") from e


def clear(out: Path) -> dict[str, Any]:
    """--fresh: removes the run's own files. Returns what of the marker must be kept: the stamps of a linked store.

    What was decoded into a linked `media` stays there, so it must be known what it was decoded from.
    """
    if links := [name for name in FOLDERS if name != "media" and (out / name).is_symlink()]:
        raise InputError(f"{out / links[0]}: a link, which --fresh does not follow; remove it, or give another --out")
    linked = (out / "media").is_symlink()
    kept = {"media": read_marker(out / MARKER).get("media", {})} if linked else {}
    remove(out, re.compile(rf"(?!media/){OWN.pattern}") if linked else OWN)
    return kept


def read_marker(path: Path) -> dict:
    if not path.exists():
        return {}
    record = read_json(path, "start again with --fresh")
    fields = {"options": dict, "corpus": dict, "media": dict, "problems": list, "device": str}
    if not isinstance(record, dict) or record.get("program") != "magtkd" or "options" not in record:
        raise InputError(f"{path}: not of this program; start again with --fresh")
    whole = all(isinstance(record.get(name, kind()), kind) for name, kind in fields.items())
    whole = whole and all(isinstance(x, list) for x in record.get("corpus", {}).values())
    whole = whole and all(isinstance(x, dict) for x in record.get("media", {}).values())
    if not whole or any(not isinstance(x, str) for x in record.get("problems", [])):
        raise InputError(f"{path}: damaged; start again with --fresh")
    return record


def read_json(path: Path, advice: str = "delete it, it is made again") -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: damaged ({type(e).__name__}); {advice}") from e


def own_files(out: Path) -> Iterator[Path]:
    """What bears the name of a file that a run makes, whatever it is. Follows no link but `media`."""
    for top in (out, out / "media"):
        if top == out or top.is_symlink():
            for folder, folders, files in os.walk(top):
                paths = (Path(folder, name) for name in [*files, *folders])
                yield from sorted(p for p in paths if OWN.fullmatch(p.relative_to(out).as_posix()))


def check_kinds(out: Path) -> None:
    """Errors: InputError for a folder, a pipe, .. in the place of a run's file, or a file in that of its folder."""
    for path in own_files(out):
        if not path.is_file():
            raise InputError(f"{path}: is no file; move it away or delete it, a run writes a file of this name")
    for name in (*FOLDERS, "media/audio", "media/video"):
        if os.path.lexists(out / name) and not (out / name).is_dir():
            raise InputError(f"{out / name}: is no folder; move it away or delete it, a run makes one of this name")


def remove(out: Path, pattern: re.Pattern) -> list[Path]:
    """Removes the run's own files whose path matches, and folders that this leaves empty; links to folders stay."""
    gone = []
    for path in list(own_files(out)):
        is_folder = path.is_dir() and not path.is_symlink()
        if pattern.fullmatch(path.relative_to(out).as_posix()) and not is_folder:
            path.unlink()
            gone.append(path)
    for folder in sorted({parent for path in gone for parent in path.parents if out in parent.parents}, reverse=True):
        if not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()
    return gone


def same_bytes(a: Path, b: Path) -> bool:
    return b.is_file() and a.read_bytes() == b.read_bytes()


def is_readable(path: Path) -> bool:
    """Whether a safetensors file is whole: its length is that which its header gives."""
    try:
        with safe_open(path, framework="np") as f:
            return "fusion" in (f.metadata() or {})
    except (OSError, SafetensorError):
        return False


def what_is_wrong(result: Any, labels: list[int], num_classes: int) -> str:
    """Why a file is not what train_fusion left for these labels of test; empty if it is."""
    try:
        if result["labels"] != labels:
            return "it belongs to other labels than the corpus has now"
        guesses, epochs, selected = np.array(result["predictions"]), result["history"], result["test_selected"]
        terms = [epoch[split] for epoch in epochs for split in SPLITS]
        numbers = [result["seed"], result["dev_f1"], *selected.values(), *(x for t in terms for x in t.values())]
        if (
            guesses.dtype.kind == "i" and guesses.shape == (len(labels),)
            and 0 <= guesses.min() and guesses.max() < num_classes
            and 1 <= result["epoch"] <= len(epochs) and all("loss" in t for t in terms)
            and selected.keys() >= {"accuracy", "weighted_f1", "macro_f1"} and np.isfinite(numbers).all()
        ):  # fmt: skip
            return ""
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        pass
    return "not a result of this program's stage 2"
