"""What was done about speed, before and after, side by side in one process: figures/speed.json and speed.png.

    python -m bench.speed          # 5 minutes on two cores

Stage 1: seconds of an epoch of a distilled audio encoder with both caches (what stage1.py does), with one of them, and
with neither (every file decoded again in every epoch, the frozen teacher run again for every batch). The corpus is made
up by demo.py, and the encoders are the demo's small ones. This teacher has 0.1 M parameters; so one of RoBERTa-large's
size, with random weights, is timed too, over the same utterances.

Stage 2: utterances per second of an epoch of MAGT at D = 768, random vectors in conversations of IEMOCAP's
(reconstructed) lengths: batches at random or of similar length, padding in all layers or in attention alone (packed).
Both as stage2.py trains: Eq. 25, clipping, AdamW. And the share of padding in batches of the demo's prompts and sound,
and of conversations.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import matplotlib
import torch
from transformers import RobertaConfig, RobertaModel

import demo
from bench.grid import CORPORA, MODALITIES, SPEAKERS, WIDTH
from bench.measure import SEED, THREADS, environment, gemm_rates
from bench.test_parts import ROBERTA_LARGE
from data import SPLITS, read_iemocap
from encoders import AudioEncoder, TextEncoder, save_tiny
from features import Features
from fusion import MAGT
from losses import stage1_loss
from media import MediaStore, load_audio
from stage1 import Examples, Vectors, encode, make_examples
from stage2 import Conversations, fusion_losses
from training import CONFIGS, make_batches, make_optimizer, mixed_precision, optimizer_step, padding_share

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FIGURES = Path(__file__).parent.parent / "figures"
CACHES = {  # way: (decoded once, taught once)
    "neither": (False, False),
    "decoded once": (True, False),
    "taught once": (False, True),
    "both": (True, True),
}
BATCHES = {  # way: (of similar length, packed)
    "at random, padded": (False, False),
    "similar lengths, padded": (True, False),
    "at random, packed": (False, True),
    "similar lengths, packed": (True, True),
}


def in_turn(ways: Iterable[str], run: Callable[[str], None]) -> dict[str, float]:
    """Seconds of run(way), one way after the other: what else happens on the machine meets them all alike."""
    seconds = {}
    for way in ways:
        start = time.perf_counter()
        run(way)
        seconds[way] = time.perf_counter() - start
    return seconds


def stage1_epochs(rounds: int = 3) -> dict:
    """{"seconds": way -> one figure per round, "utterances", "seconds_of_large_teacher"}."""
    with tempfile.TemporaryDirectory() as folder:
        demo.write_iemocap(Path(folder) / "corpus", conversations=6)
        corpus = read_iemocap(Path(folder) / "corpus")
        paths = save_tiny(Path(folder) / "tiny", [u.text for u in corpus.utterances("train")])
        everyone = [u for split in SPLITS for u in corpus.utterances(split)]
        store = MediaStore(Path(folder) / "media", size=48)
        store.fill(everyone, workers=2)
        config = CONFIGS["demo"]
        teacher = TextEncoder(paths["text"], 6, config.width)
        prompts = make_examples(teacher, "text", corpus, store)
        taught = encode(teacher, prompts, [u.id for u in everyone])
        student = AudioEncoder(paths["audio"], 6, config.width)
        files = {u.id: u.audio for u in everyone}
        stored = make_examples(student, "audio", corpus, store)
        decoded = Examples(lambda i: load_audio(files[i]), stored.length)

        def run(way: str) -> None:
            once_decoded, once_taught = CACHES[way]
            sounds = stored if once_decoded else decoded
            epoch(student, sounds, corpus, config, taught if once_taught else (teacher, prompts))

        epochs = [in_turn(CACHES, run) for _ in range(1 + rounds)][1:]  # the first round warms up
        seconds = {way: [s[way] for s in epochs] for way in CACHES}
        utterances = len(corpus.utterances("train"))
        return {
            "seconds": seconds,
            "utterances": utterances,
            "seconds_of_large_teacher": large_teacher(prompts, corpus),
        }


@torch.inference_mode()
def large_teacher(prompts: Examples, corpus) -> float:
    """Seconds that a RoBERTa-large with random weights takes for train's prompts, in batches of 4, in eval mode."""
    model = RobertaModel(RobertaConfig(**ROBERTA_LARGE), add_pooling_layer=False).eval()
    ids = sorted((u.id for u in corpus.utterances("train")), key=prompts.length)
    start = time.perf_counter()
    for i in range(0, len(ids), 4):
        tokens = [torch.tensor(prompts.get(j)) for j in ids[i : i + 4]]
        padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=1)
        model(padded, attention_mask=padded != 1)
    return time.perf_counter() - start


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


def stage2_epochs(rounds: int = 3) -> dict:
    """{"seconds": way -> one figure per round, "utterances", "useful_flops", "gemm_flops_per_s"}."""
    corpus = CORPORA["IEMOCAP (reconstructed lengths)"]
    lengths, config = torch.tensor(corpus.lengths), CONFIGS["iemocap"]
    n = int(lengths.sum())
    features = Features(
        vectors={m: torch.randn(n, WIDTH) for m in MODALITIES},
        present={m: torch.ones(n, dtype=torch.bool) for m in MODALITIES},
        label=torch.randint(0, corpus.classes, (n,)),
        speaker=torch.randint(0, SPEAKERS, (n,)),
        conversation=torch.arange(len(lengths)).repeat_interleave(lengths),
        split=torch.zeros(n, dtype=torch.int64),
        label_names=[str(i) for i in range(corpus.classes)],
        speaker_names=[str(i) for i in range(SPEAKERS)],
        conversation_names=[str(i) for i in range(len(lengths))],
        utterance_names=[str(i) for i in range(n)],
    )
    data = Conversations(features, MODALITIES, torch.device("cpu"))
    model = MAGT(corpus.config).train()
    steps = len(corpus.batches()) * (1 + rounds) * len(BATCHES)
    optimizer, schedule = make_optimizer(model, config.stage2_lr, steps, 0.1)
    _, scaler = mixed_precision(torch.device("cpu"))

    def run(way: str) -> None:
        similar, packed = BATCHES[way]
        batch = data.batch(next(epochs[similar, packed]))
        places = batch.inputs[-1] if packed else torch.arange(batch.labels.numel())  # all: padding too
        loss = fusion_losses(model(*batch.inputs[:-1], places), batch, config)["total"]
        optimizer_step(loss, model, optimizer, schedule, scaler, config.clip)

    seconds = {way: [] for way in BATCHES}
    for _ in range(1 + rounds):
        epochs = {}
        for similar, packed in BATCHES.values():
            epochs[similar, packed] = iter(make_batches(corpus.lengths if similar else [1] * len(lengths), 16))
        steps_of_epoch = [in_turn(BATCHES, run) for _ in range(len(corpus.batches()))]
        for way in BATCHES:
            seconds[way].append(sum(step[way] for step in steps_of_epoch))
    seconds = {way: s[1:] for way, s in seconds.items()}  # the first round warms up
    useful = 3 * corpus.valid_flops([list(corpus.lengths)]).total
    return {"seconds": seconds, "utterances": n, "useful_flops": useful, "gemm_flops_per_s": gemm_rates("cpu")}


def padding(shuffles: int = 20) -> dict[str, dict[str, float]]:
    """Mean share of padding in batches at random and of similar length: {what: {"at random", "similar lengths"}}."""
    with tempfile.TemporaryDirectory() as folder:
        demo.write_iemocap(Path(folder) / "corpus", conversations=20)  # the demo's own
        corpus = read_iemocap(Path(folder) / "corpus")
        paths = save_tiny(Path(folder) / "tiny", [u.text for u in corpus.utterances("train")])
        prompts = make_examples(TextEncoder(paths["text"], 6, 64), "text", corpus, None)
        train = corpus.utterances("train")
        kinds = {
            "prompts": [prompts.length(u.id) for u in train],
            "sound": [len(load_audio(u.audio)) for u in train],
            **{name: list(c.lengths) for name, c in CORPORA.items()},
        }
    torch.manual_seed(SEED)

    def mean(lengths: list[int], keys: list[int]) -> float:
        return sum(padding_share(lengths, make_batches(keys, 16)) for _ in range(shuffles)) / shuffles

    return {name: {"at random": mean(x, [1] * len(x)), "similar lengths": mean(x, x)} for name, x in kinds.items()}


def figure(result: dict, path: Path) -> None:
    """A bar per way: the median of the rounds, the rounds as dots."""
    one, two = result["stage1"], result["stage2"]
    speeds = {way: [two["utterances"] / s for s in seconds] for way, seconds in two["seconds"].items()}
    fig, axes = plt.subplots(2, 1, figsize=(6.5, 5))
    bars(axes[0], one["seconds"], "both")
    axes[0].set_xlabel(
        f"stage 1: seconds per epoch of {one['utterances']} utterances\n(made-up corpus, small encoders)"
    )
    bars(axes[1], speeds, "similar lengths, packed")
    axes[1].set_xlabel("stage 2: utterances per second\n(MAGT, D = 768, IEMOCAP's reconstructed lengths)")
    fig.tight_layout()
    fig.savefig(path, dpi=130)


def bars(ax, values: dict[str, list[float]], ours: str) -> None:
    for place, (way, numbers) in enumerate(values.items()):
        ax.barh(place, median(numbers), color="white", edgecolor="black", hatch="//" if way == ours else "")
        ax.plot(numbers, [place] * len(numbers), "k.")
    ax.set_yticks(range(len(values)), values)
    ax.invert_yaxis()


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    result = {"machine": environment("cpu"), "stage1": stage1_epochs(), "stage2": stage2_epochs()}
    result["padding"] = padding()
    (FIGURES / "speed.json").write_text(json.dumps(result, indent=2) + "\n")
    figure(result, FIGURES / "speed.png")
    one, two = result["stage1"], result["stage2"]
    for way, seconds in one["seconds"].items():
        print(f"stage 1, {way}: {median(seconds):.2f} s per epoch of {one['utterances']} utterances")
    print(
        f"a teacher of RoBERTa-large's size: {one['seconds_of_large_teacher']:.1f} s more per epoch, if not taught once"
    )
    for way, seconds in two["seconds"].items():
        rate = two["useful_flops"] / median(seconds)
        shares = ", ".join(f"{rate / r:.2f} of {n}'s" for n, r in two["gemm_flops_per_s"].items())
        print(f"stage 2, {way}: {two['utterances'] / median(seconds):.0f} utterances/s; share of the rates: {shares}")
