"""What was done about speed, with and without it, in one process: docs/figures/speed.json and speed.png.

    python -m bench.speed          # minutes on two cores
    python -m bench.speed --toy    # seconds, at toy sizes, into runs/speed-toy: tries the command, measures nothing

Every epoch here is one of magtkd.train, the training loop of both stages, on the CPU. The ways that are compared take
turns, epoch by epoch: what else happens on the machine meets them all alike. Their losses are kept beside the seconds.

Stage 1: an epoch of a distilled audio encoder with both caches (what stage 1 does), with one of them, and with neither:
then every file is decoded again in every epoch, and the frozen teacher runs again for every batch. The corpus is
the demo's made-up one, and the encoders are the demo's small ones. This teacher has 0.1 M parameters; so one of
RoBERTa-large's size, with random weights, is timed too, on the same utterances.

Stage 2: an epoch of MAGT at D = 768, on random features in conversations of IEMOCAP's lengths: attention on padded
batches, attention per conversation (what stage 2 does), and the same in bfloat16, if the processor multiplies in it.

And the share of padding: in batches of prompts, and in batches of conversations if they were padded.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import matplotlib
import torch
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaModel

import losses
from bench import grid
from bench.measure import SEED, THREADS, environment, gemm_rates, magt_flops
from bench.modes import PaddedMAGT, bfloat16_is_fast
from data import MODALITIES, Conversations, Corpus, FeatureFile, read_iemocap
from encoders import AudioEncoder, MediaStore, TextEncoder, load_audio
from extras import demo
from extras.tiny import save_tiny
from fusion import MAGT
from magtkd import CONFIGS, Examples, Recipe, encode, fusion_losses, make_batches, make_examples, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parent.parent
NOT_MEASURED = "not measured"
CACHES = {  # way: (decoded once, taught once)
    "neither": (False, False),
    "decoded once": (True, False),
    "taught once": (False, True),
    "both": (True, True),
}
FUSIONS = {  # way: (model, precision)
    "padded, float32": (PaddedMAGT, "float32"),
    "float32": (MAGT, "float32"),
    "bfloat16": (MAGT, "bfloat16"),
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rounds: int = 3  # epochs of each way that count; one more comes first and warms up
    conversations: int = 6  # of the made-up corpus, per session
    utterances: tuple[int, int] = (10, 18)  # of each of them, fewest and most
    teacher: tuple[tuple[str, int], ...] = tuple(grid.ROBERTA_LARGE.items())  # of the large teacher
    corpus: grid.Corpus = grid.CORPORA["IEMOCAP"]  # whose conversations stage 2 takes
    width: int = grid.WIDTH  # D
    products: tuple[int, ...] = (1024, 2048, 4096)  # n of the matrix products [n, n] that give the machine's rate
    shuffles: int = 20  # epochs over which a share of padding is the mean


TOY = Sizes(
    rounds=1,
    conversations=1,
    utterances=(2, 3),
    teacher=tuple({**grid.ROBERTA_LARGE, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}.items()),
    corpus=dataclasses.replace(grid.CORPORA["IEMOCAP"], lengths=(8, 18, 26, 47)),
    width=32,
    products=(64,),
    shuffles=2,
)


# One epoch


def one_epoch(
    model: nn.Module, lengths: dict[str, int], loss_terms: Callable, recipe: Recipe, folder: Path, seed: int
) -> dict:
    """What magtkd.train logs of an epoch: "seconds", without evaluating and saving, "loss", and more."""
    with contextlib.redirect_stdout(io.StringIO()):  # it would print a W-F1 on dev, which nobody computes here
        train(model, lengths, loss_terms, lambda: {"dev_f1": 0.0}, recipe, folder / "model", seed)
    (folder / "model.resume.pt").unlink()  # the next epoch starts anew
    return json.loads((folder / "log.jsonl").read_text().splitlines()[-1])


def in_turn(ways: list[str], rounds: int, epoch: Callable[[str, int], dict]) -> dict[str, dict[str, list[float]]]:
    """{"seconds": {way: one number per round}, "loss": likewise} of epoch(way, round); round 0 warms up."""
    entries = [{way: epoch(way, number) for way in ways} for number in range(1 + rounds)][1:]
    return {key: {way: [entry[way][key] for entry in entries] for way in ways} for key in ("seconds", "loss")}


# Stage 1


def made_up_corpus(sizes: Sizes, folder: Path) -> tuple[Corpus, dict[str, str]]:
    """The demo's corpus with fewer conversations, and the folders of its small encoders by modality."""
    demo.write_iemocap(folder / "corpus", conversations=sizes.conversations, utterances=sizes.utterances)
    corpus = read_iemocap(folder / "corpus")
    return corpus, save_tiny(folder / "tiny", [u.text for u in corpus.utterances("train")])


def stage1_epochs(corpus: Corpus, paths: dict[str, str], sizes: Sizes, folder: Path) -> dict:
    """{"seconds", "loss" (see in_turn), "utterances", "seconds_of_large_teacher"}."""
    utterances = {u.id: u for u in corpus.utterances("train")}
    row = {name: i for i, name in enumerate(utterances)}
    store = MediaStore(folder / "media", ("audio",))
    store.fill(list(utterances.values()), workers=2)
    config, C = CONFIGS["demo"], len(corpus.label_names)
    teacher, student = TextEncoder(paths["text"], C, config.width), AudioEncoder(paths["audio"], C, config.width)
    start = {name: x.clone() for name, x in student.state_dict().items()}
    prompts, sounds = make_examples(teacher, "text", corpus, None), make_examples(student, "audio", corpus, store)
    answers = encode(teacher, prompts, list(utterances), "float32")  # leaves the teacher in eval mode
    recipe = Recipe(config.stage1_lr, config.stage1_batch, epochs=1, clip=config.clip, precision="float32")

    def epoch(way: str, number: int) -> dict:
        decoded_once, taught_once = CACHES[way]

        def loss_terms(ids: list[str]) -> dict[str, Tensor]:
            clips = [sounds.get(i) if decoded_once else load_audio(utterances[i].audio) for i in ids]
            features, logits = student(clips)
            with torch.no_grad():
                rows = [row[i] for i in ids]
                taught = [x[rows] for x in answers] if taught_once else teacher([prompts.get(i) for i in ids])
            labels = torch.tensor([utterances[i].label for i in ids])
            return {"loss": losses.stage1_loss(logits, labels, features, taught[1], taught[0])}

        student.load_state_dict(start)
        return one_epoch(student, {i: sounds.lengths[i] for i in utterances}, loss_terms, recipe, folder, number)

    found = in_turn(list(CACHES), sizes.rounds, epoch)
    seconds = large_teacher(prompts, list(utterances), dict(sizes.teacher))
    return {**found, "utterances": len(utterances), "seconds_of_large_teacher": seconds}


@torch.inference_mode()
def large_teacher(prompts: Examples, ids: list[str], teacher: dict) -> float:
    """Seconds that a RoBERTa of this configuration with random weights takes for the prompts, in batches of 4."""
    model = RobertaModel(RobertaConfig(**teacher), add_pooling_layer=False).eval()
    ids = sorted(ids, key=lambda i: prompts.lengths[i])
    start = time.perf_counter()
    for i in range(0, len(ids), 4):
        tokens = [torch.tensor(prompts.get(j)) for j in ids[i : i + 4]]
        padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=1)
        model(padded, attention_mask=padded != 1)
    return time.perf_counter() - start


# Stage 2


def random_conversations(corpus: grid.Corpus, width: int) -> Conversations:
    """Random features, labels and speakers in conversations of the corpus's lengths, all in train."""
    lengths, N = torch.tensor(corpus.lengths), sum(corpus.lengths)
    file = FeatureFile(
        features={m: torch.randn(N, width) for m in MODALITIES},
        present={m: torch.ones(N, dtype=torch.bool) for m in MODALITIES},
        label=torch.randint(0, corpus.classes, (N,)),
        speaker=torch.arange(N) % grid.SPEAKERS,
        conversation=torch.arange(len(lengths)).repeat_interleave(lengths),
        split=torch.zeros(N, dtype=torch.int64),
        label_names=[str(i) for i in range(corpus.classes)],
        speaker_names=[str(i) for i in range(grid.SPEAKERS)],
        conversation_names=[str(i) for i in range(len(lengths))],
        utterance_names=[str(i) for i in range(N)],
    )
    return Conversations(file, MODALITIES, torch.device("cpu"))


def stage2_epochs(sizes: Sizes, folder: Path) -> dict:
    """{"seconds", "loss" (see in_turn), "utterances", "useful_flops", "gemm_flops_per_s"}.

    A way that is not measured here has None for its seconds and its loss. useful_flops: of an epoch, without padding.
    """
    corpus, config = sizes.corpus, sizes.corpus.config
    data, fusion = random_conversations(corpus, sizes.width), corpus.fusion(sizes.width)
    models = {build: build(fusion) for build in (MAGT, PaddedMAGT)}
    start = {name: x.clone() for name, x in models[MAGT].state_dict().items()}

    def epoch(way: str, number: int) -> dict:
        build, precision = FUSIONS[way]
        model = models[build]

        def loss_terms(names: list[str]) -> dict[str, Tensor]:
            batch = data.batch(names)
            return fusion_losses(model(*batch.inputs), batch, config)

        model.load_state_dict(start)
        recipe = Recipe(config.stage2_lr, config.stage2_batch, epochs=1, clip=config.clip, precision=precision)
        return one_epoch(model, dict.fromkeys(data.splits["train"], 1), loss_terms, recipe, folder, number)

    ways = [way for way, (_, precision) in FUSIONS.items() if precision == "float32" or bfloat16_is_fast("cpu")]
    found = in_turn(ways, sizes.rounds, epoch)
    facts = {"utterances": sum(corpus.lengths), "useful_flops": 3 * magt_flops(fusion, list(corpus.lengths)).total}
    rates = gemm_rates("cpu", sizes.products)
    return {key: {way: x.get(way) for way in FUSIONS} for key, x in found.items()} | facts | {"gemm_flops_per_s": rates}


# Padding


def padding_share(lengths: dict[str, int], batches: list[list[str]]) -> float:
    """The share of padding where each batch is padded to its longest example."""
    padded = sum(len(batch) * max(lengths[name] for name in batch) for batch in batches)
    return 1 - sum(lengths.values()) / padded


def padding(corpus: Corpus, paths: dict[str, str], shuffles: int) -> dict[str, dict[str, float]]:
    """Mean share of padding in batches of 16: {what: {"at random", "similar lengths"}}."""
    prompts = make_examples(TextEncoder(paths["text"], 6, 64), "text", corpus, None)
    kinds = {"prompts": {u.id: prompts.lengths[u.id] for u in corpus.utterances("train")}}
    kinds |= {name: {str(i): n for i, n in enumerate(c.lengths)} for name, c in grid.CORPORA.items()}

    def mean(lengths: dict[str, int], keys: dict[str, int]) -> float:
        return sum(padding_share(lengths, make_batches(keys, 16)) for _ in range(shuffles)) / shuffles

    torch.manual_seed(SEED)
    return {
        name: {"at random": mean(lengths, dict.fromkeys(lengths, 1)), "similar lengths": mean(lengths, lengths)}
        for name, lengths in kinds.items()
    }


# Output


def figure(result: dict, path: Path) -> None:
    """A bar per way: the median of the rounds, the rounds as dots. Hatched: what the two stages do."""
    one, two = result["stage1"], result["stage2"]
    speeds = {way: s and [two["utterances"] / x for x in s] for way, s in two["seconds"].items()}
    fig, axes = plt.subplots(2, 1, figsize=(6.5, 4.5))
    bars(axes[0], one["seconds"], "both")
    axes[0].set_xlabel(
        f"stage 1: seconds per epoch of {one['utterances']} utterances\n(made-up corpus, small encoders)"
    )
    bars(axes[1], speeds, "float32")
    axes[1].set_xlabel(f"stage 2: utterances per second\n(MAGT, D = {two['width']}, IEMOCAP's lengths)")
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def bars(ax: plt.Axes, values: dict[str, list[float] | None], ours: str) -> None:
    for y, (way, numbers) in enumerate(values.items()):
        if numbers is None:
            ax.text(0, y, f" {NOT_MEASURED}", va="center")
            continue
        ax.barh(y, median(numbers), color="white", edgecolor="black", hatch="//" if way == ours else "")
        ax.plot(numbers, [y] * len(numbers), "k.")
    ax.set_yticks(range(len(values)), values)
    ax.invert_yaxis()


def summary(result: dict) -> str:
    """A line per way."""
    one, two = result["stage1"], result["stage2"]
    n, large = one["utterances"], one["seconds_of_large_teacher"]
    lines = [f"stage 1, {way}: {median(s):.2f} s per epoch of {n} utterances" for way, s in one["seconds"].items()]
    lines.append(f"a teacher of RoBERTa-large's size: {large:.1f} s more per epoch, if not taught once")
    for way, seconds in two["seconds"].items():
        if seconds is None:
            lines.append(f"stage 2, {way}: {NOT_MEASURED}")
            continue
        rate = two["useful_flops"] / median(seconds)
        shares = ", ".join(f"{rate / r:.2f} ({size})" for size, r in two["gemm_flops_per_s"].items())
        speed = two["utterances"] / median(seconds)
        lines.append(f"stage 2, {way}: {speed:.0f} utterances/s; share of the rates of float32 products: {shares}")
    for what, share in result["padding"].items():
        lines.append(f"padding of {what}: " + ", ".join(f"{x:.0%} {how}" for how, x in share.items()))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="toy sizes, in seconds: tries the command, measures nothing")
    parser.add_argument("--out", type=Path, help="folder of results (docs/figures; with --toy runs/speed-toy)")
    options = parser.parse_args(argv)
    sizes = TOY if options.toy else Sizes()
    out = options.out or ROOT / ("runs/speed-toy" if options.toy else "docs/figures")

    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    result = {"toy": options.toy, "machine": environment("cpu")}
    with tempfile.TemporaryDirectory() as folder:
        corpus, paths = made_up_corpus(sizes, Path(folder))
        result["stage1"] = stage1_epochs(corpus, paths, sizes, Path(folder))
        result["stage2"] = {"width": sizes.width, **stage2_epochs(sizes, Path(folder))}
        result["padding"] = padding(corpus, paths, sizes.shuffles)
    out.mkdir(parents=True, exist_ok=True)
    (out / "speed.json").write_text(json.dumps(result, indent=2) + "\n")
    figure(result, out / "speed.png")
    print(summary(result))
    print(f"Written: {out / 'speed.json'} and speed.png")


if __name__ == "__main__":
    main()
