"""`--check`: is this the corpus of the paper, and what will a run need? Reads labels and file names; decodes nothing.

Hours are arithmetic: weights of Table 1's encoders times positions (tokens, audio frames, patches) of the corpus.
"""

import math
import os
import shutil
import timeit
from collections import Counter
from pathlib import Path

import torch

from data import SPLITS, Conversation, Corpus, InputError
from encoders import MAX_SECONDS, MediaStore
from fusion import TEXT

# Conversations of train, dev and test; least and most utterances; how many of them may have no file. A strict reading
# of IEMOCAP leaves out 53 turns that other people's lists call happy.
EXPECTED = {"IEMOCAP": ([108, 12, 31], 7380, 7433, 0), "MELD": ([1038, 114, 280], 13_708, 13_708, 1)}
WEIGHTS = {"text": 303e6, "audio": 90e6, "video": 121e6}  # of the layers of Table 1's checkpoints
AUDIO_RATE, PATCHES = 50, 8 * 14 * 14  # positions: per second of audio; of 8 frames of 224 pixels
SECONDS = 4.0  # of an utterance without times
TOKENS_PER_WORD, TOKENS_PER_TURN, TOKENS_PER_PROMPT = 1.3, 3, 12  # besides words: "<s1>:"; "For <s1>:", "Now .. <mask>"
TRAINING, ENCODING = 6, 2  # FLOPs per weight and position: forward and backward, forward
SHARE, H100 = 0.4, 150e12  # what training is assumed to reach: of a matrix product's rate here; FLOP/s in bfloat16


def check(corpus: Corpus, root: Path, config, out: Path, device: str | None = None) -> None:
    """Prints what was found and what a run needs. config: a magtkd.Config. Errors: InputError for another corpus."""
    is_csv = Path(root).is_file()  # it may have the name MELD.csv
    everyone, wrong, may_lack = corpus.utterances(), [], len(corpus.utterances())
    print("\n  ".join([f"{corpus.name} at {root}", *corpus.notes]))
    if not is_csv:
        conversations, least, most, may_lack = EXPECTED[corpus.name]
        print(f"  expected: {'/'.join(map(str, conversations))} conversations, {most} utterances")
        if [len(corpus.splits[s]) for s in SPLITS] != conversations or not least <= len(everyone) <= most:
            wrong.append("other conversations or utterances than the paper's")
    for m in (m for m in config.modalities if m != TEXT):
        missing = sum(getattr(u, m) is None for u in everyone)
        if missing > may_lack or any(all(getattr(u, m) is None for u in corpus.utterances(s)) for s in SPLITS):
            wrong.append(f"{missing} of {len(everyone)} utterances without {m}")
    labels = Counter(corpus.label_names[u.label] for u in everyone)
    print(f"  labels: {', '.join(f'{name} {n}' for name, n in labels.most_common())}")
    print_needs(corpus, config, out / "media", device)
    if wrong:
        what = "not complete" if is_csv else "not the corpus of the paper"
        remedy = "Add what is missing, or train on what is there: --modalities text"
        raise InputError(f"{corpus.name} at {root} is {what}: {'; '.join(wrong)}. {remedy}")
    print("This csv can be trained on." if is_csv else "This is the corpus of the paper.")


def print_needs(corpus: Corpus, config, media: Path, device: str | None) -> None:
    store, total = MediaStore(media, ()), 0.0
    need = sum(store.bytes_for(u, m) for u in corpus.utterances() for m in config.modalities if m != TEXT)
    free = shutil.disk_usage(next(p for p in Path(os.path.realpath(media)).parents if p.exists())).free
    print(f"  disk for decoded media: {need / 1e9:.1f} GB in {media}; {free / 1e9:.1f} GB are free")
    for m in config.modalities:
        train, dev, test = (sum(sum(positions(c, m, config)) for c in corpus.splits[s]) for s in SPLITS)
        trainings, epochs = 2 if m == "audio" else 1, config.stage1_epochs[m]  # A, and A_KD from it
        # Every epoch trains on train and encodes dev; at the end all splits are encoded.
        each = epochs * (TRAINING * train + ENCODING * dev) + ENCODING * (train + dev + test)
        flops = trainings * each * WEIGHTS[m]
        steps = trainings * epochs * math.ceil(len(corpus.utterances("train")) / config.stage1_batch)
        print(f"  {m}: {train + dev + test:,.0f} positions, {steps:,} steps, {flops / 1e15:,.1f} PFLOP")
        total += flops
    here = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"  stage 1 with Table 1's encoders: {total / 1e15:,.1f} PFLOP (attention products and decoding not counted)")
    for name, rate in ((f"this {here.type}", SHARE * matmul_rate(here)), ("an H100 (assumed)", H100)):
        print(f"    {total / rate / 3600:,.1f} hours at {rate / 1e12:.3g} TFLOP/s, {name}")
    print("  GPU memory for them, batches of 4, half precision: text 9 GB, audio 5, video 5 (arithmetic)")


def positions(conversation: Conversation, modality: str, config) -> list[float]:
    """How many positions an encoder's transformer has for each utterance."""
    if modality == "audio":
        times = [SECONDS if u.end is None else u.end - (u.start or 0.0) for u in conversation.utterances]
        return [AUDIO_RATE * min(max(0.0, t), MAX_SECONDS) for t in times]
    if modality == "video":
        return [PATCHES] * len(conversation.utterances)
    context, prompts = 0.0, []
    for u in conversation.utterances:
        tokens = TOKENS_PER_WORD * len(u.text.split())
        context += tokens + TOKENS_PER_TURN
        prompts.append(min(context + tokens + TOKENS_PER_PROMPT, config.max_tokens))
    return prompts


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large matrix product: in bfloat16 on a GPU, in float32 on a CPU."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    x = torch.randn(n, n, device=device, dtype=dtype)
    seconds = timeit.repeat(lambda: (x @ x)[0, 0].item(), number=1, repeat=20)  # item() waits for a GPU
    return 2 * n**3 / min(seconds)
