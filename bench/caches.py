"""What decoding once and teaching once save: seconds of an epoch of a distilled audio encoder, four ways.

    python -m bench.caches          # figures/caches.json and caches.png; 3 minutes on two cores

With both caches (what stage1.py does), with one of them, and with neither (every file decoded again in every epoch,
the frozen teacher run again for every batch), in turn, three times over, in one process. The corpus is made up by
demo.py, and the encoders are the demo's small ones: this teacher has 0.1 M parameters, RoBERTa-large has 355 M.
"""

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import matplotlib
import torch

import demo
from bench.measure import environment
from data import SPLITS, read_iemocap
from encoders import AudioEncoder, TextEncoder, save_tiny
from losses import stage1_loss
from media import MediaStore, load_audio
from stage1 import Examples, Vectors, encode, make_examples
from training import CONFIGS, make_batches, make_optimizer, mixed_precision, optimizer_step

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FIGURES = Path(__file__).parent.parent / "figures"
WAYS = {
    "neither": (False, False),
    "decoded once": (True, False),
    "taught once": (False, True),
    "both": (True, True),
}


def measure(rounds: int = 3) -> dict:
    """{"seconds": way -> one figure per round, "utterances", and the machine}."""
    with tempfile.TemporaryDirectory() as folder:
        demo.write_iemocap(Path(folder) / "corpus", conversations=6)
        corpus = read_iemocap(Path(folder) / "corpus")
        paths = save_tiny(Path(folder) / "tiny", [u.text for u in corpus.utterances("train")])
        everyone = [u for split in SPLITS for u in corpus.utterances(split)]
        store = MediaStore(Path(folder) / "media", size=48)
        store.fill(everyone, workers=2)
        config = dataclasses.replace(CONFIGS["demo"])
        teacher = TextEncoder(paths["text"], 6, config.width)
        prompts = make_examples(teacher, "text", corpus, store)
        taught = encode(teacher, prompts, [u.id for u in everyone])
        student = AudioEncoder(paths["audio"], 6, config.width)
        files = {u.id: u.audio for u in everyone}
        stored = make_examples(student, "audio", corpus, store)
        decoded = Examples(lambda i: load_audio(files[i]), stored.length)
        seconds = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way, (once_decoded, once_taught) in WAYS.items():
                sounds = stored if once_decoded else decoded
                start = time.perf_counter()
                epoch(student, sounds, corpus, config, taught if once_taught else (teacher, prompts))
                seconds[way].append(time.perf_counter() - start)
        return {"seconds": seconds, "utterances": len(corpus.utterances("train")), **environment("cpu")}


def epoch(student: AudioEncoder, sounds: Examples, corpus, config, teacher: Vectors | tuple) -> None:
    """One epoch of Eq. 14, with the teacher's vectors or with the teacher itself."""
    train = corpus.utterances("train")
    row = {u.id: i for i, u in enumerate(train)}  # train comes first among everyone
    lengths = [sounds.length(u.id) for u in train]
    batches = make_batches(lengths, config.stage1_batch)
    optimizer, schedule = make_optimizer(student, config.stage1_lr, len(batches), 0.1)
    _, scaler = mixed_precision(torch.device("cpu"))
    student.train()
    for batch in batches:
        ids = [train[i].id for i in batch]
        features, logits = student(**student.collate([sounds.get(i) for i in ids]))
        if isinstance(teacher, Vectors):
            rows = [row[i] for i in ids]
            t_features, t_logits = teacher.features[rows], teacher.logits[rows]
        else:
            model, prompts = teacher
            with torch.no_grad():
                t_features, t_logits = model.eval()(**model.collate([prompts.get(i) for i in ids]))
        labels = torch.tensor([train[i].label for i in batch])
        loss = stage1_loss(logits, labels, features, t_logits, t_features)
        optimizer_step(loss, student, optimizer, schedule, scaler, config.clip)


def figure(result: dict, path: Path) -> None:
    """A bar per way: the median of the rounds, the rounds as dots."""
    fig, ax = plt.subplots(figsize=(6, 2.4))
    for place, (way, seconds) in enumerate(result["seconds"].items()):
        ax.barh(place, median(seconds), color="white", edgecolor="black", hatch="//" if way == "both" else "")
        ax.plot(seconds, [place] * len(seconds), "k.")
    ax.set_yticks(range(len(WAYS)), WAYS)
    ax.set_xlabel(f"seconds per epoch of {result['utterances']} utterances\n(made-up corpus, small encoders)")
    fig.tight_layout()
    fig.savefig(path, dpi=130)


if __name__ == "__main__":
    result = measure()
    (FIGURES / "caches.json").write_text(json.dumps(result, indent=2) + "\n")
    figure(result, FIGURES / "caches.png")
    for way, seconds in result["seconds"].items():
        print(f"{way}: {median(seconds):.2f} s per epoch of {result['utterances']} utterances")
