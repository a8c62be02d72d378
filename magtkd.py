"""MAGTKD: emotion recognition in conversation from text, audio and video (IJCAI 2025).

    python magtkd.py demo                               # everything, on a small made-up corpus
    python magtkd.py iemocap --root IEMOCAP_full_release
    python magtkd.py iemocap --features my.safetensors  # stage 2 alone, on vectors of one's own

The story: a corpus is read (data.py) and decoded (media.py); an encoder per modality is fine-tuned, text as the teacher
of audio and video, and says a vector of every utterance (stage1.py, Eq. 1-14); the vectors of a conversation are fused
(stage2.py, Eq. 15-25); a report says what came out (report.py). Each step leaves a file in runs/<name>/, and a second
start goes on after the last one that is whole.

Not here: any of these steps; this file puts them together and is the command line.
"""

import argparse
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError

import checkpoint
import demo
import experiments
from data import SPLITS, Corpus, InputError, read_iemocap, read_meld
from encoders import ENCODERS, save_tiny, video_size
from features import Features, read_features, write_features
from media import MediaStore
from pickles import read_pickles
from report import machine, write_report
from stage1 import predict, run_stage1, to_features
from stage2 import FUSIONS, PAPERS, ROWS, run_stage2
from training import CONFIGS, PRESETS, TINY, Config

READERS = {"iemocap": read_iemocap, "meld": read_meld, "demo": read_iemocap}
ROOTS = {"iemocap": "data/IEMOCAP_full_release", "meld": "data/MELD.Raw"}
TITLES = {"iemocap": "IEMOCAP", "meld": "MELD", "demo": "a made-up corpus (demo)"}
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


def run(args: argparse.Namespace) -> None:
    config = make_config(args)
    device = torch.device(args.device)
    begun = dataclasses.asdict(config) | {"corpus": args.corpus, "seed": args.seed}
    if args.features:
        files = sorted(args.features.glob("*.pkl")) if args.features.is_dir() else [args.features]
        begun["features"] = hashlib.sha256(b"".join(map(read_bytes, files))).hexdigest()
    elif args.corpus != "demo":
        begun["root"] = str(args.root.resolve())
    features = None
    if args.features:
        features = read_pickles(args.features) if args.features.is_dir() else read_features(args.features)
    corpus = None if args.features or args.corpus == "demo" else read_corpus(args)
    lock = checkpoint.open_run(args.out, begun, args.fresh)

    if not args.ablation and was_ablation(args.out):  # what a report once held, a later start does not take out of it
        print(f"{args.out} holds an ablation: it stays in the report, with all its rows (--fresh begins anew)")
        args.ablation = True
    rows, problems = {}, []
    if features is None:
        corpus = corpus or read_demo(args.out)
        print("\n".join([f"{corpus.name} at {args.root or args.out / 'corpus'}:", *(f"  {n}" for n in corpus.notes)]))
        features, rows, problems = stage1(config, corpus, args, device)
    sets = feature_sets(features, args.ablation)
    seeds, fusions = range(args.seed, args.seed + args.seeds), tuple(FUSIONS) if args.ablation else PAPERS
    rows |= run_stage2(config, features, sets, seeds, args.out, device, fusions)
    notes = (
        list(corpus.notes) if corpus else [f"features of {len(features.label)} utterances from {args.features.name}"]
    )
    result = {
        "title": f"MAGTKD on {args.features.name if args.features else TITLES[args.corpus]}",
        "made_up": args.corpus == "demo" and not args.features,
        "corpus": "" if args.features else corpus.name,
        "machine": machine(device),
        "notes": notes,
        "problems": problems,
        "label_names": features.label_names,
        "rows": rows,
    }
    if args.ablation:
        (args.out / "figures").mkdir(exist_ok=True)
        result["comparisons"], result["section"] = experiments.ablation(features, rows, args.out)
    table = write_report(args.out, result)
    print(f"\n{result['title']}; test, {args.seeds} seeds of stage 2\n\n{table}\n")
    print(f"The whole report: {args.out / 'report.md'}")
    more = (args.out, device, result["made_up"])
    kinds = feature_sets(features, ablation=False)[0]
    if args.sweep is not None:
        print(f"\n{experiments.sweep(config, features, kinds, seeds, args.sweep or experiments.GRID, *more)}\n")
        print(f"More: {args.out / 'sweep.md'}")
    if args.compare_presets:
        print(f"\n{experiments.compare_presets(config, features, kinds, seeds, args.corpus, *more)}\n")
        print(f"More: {args.out / 'presets.md'}")
    lock.close()


def was_ablation(out: Path) -> bool:
    path = out / "metrics.json"
    return path.exists() and bool(json.loads(path.read_text()).get("comparisons"))


def stage1(config: Config, corpus: Corpus, args: argparse.Namespace, device: torch.device):
    """Vectors of a corpus, in the run's feature file too. Returns (features, rows of the encoders, broken files)."""
    names = ["text", "audio_kd", "video"]
    if args.ablation:
        names = list(ROWS)
    if args.encoders == "tiny":
        config = dataclasses.replace(config, **tiny_models(corpus, args.out))
    store = MediaStore(args.out / "media", video_size(config.video_model))
    if not all((args.out / f"{name}.vectors.safetensors").exists() for name in names):
        store.fill([u for split in SPLITS for u in corpus.utterances(split)], args.workers)
    vectors = run_stage1(config, names, corpus, store, args.out, args.seed, device)
    features = to_features(vectors, corpus)
    checkpoint.replace(args.out / "features.safetensors", lambda part: write_features(part, features))
    test = (features.split == 2).nonzero().flatten()
    labels = features.label[test].tolist()
    rows = {}
    for name, x in vectors.items():
        predictions = [predict(x)[i] for i in test]
        rows[ROWS[name]] = [{"seed": args.seed, "epoch": None, "labels": labels, "predictions": predictions}]
    return features, rows, store.problems


def make_config(args: argparse.Namespace) -> Config:
    """A corpus' configuration with what the command line changes."""
    changes = dict(TINY) if args.encoders == "tiny" else {}
    changes |= {f"{m}_model": getattr(args, f"{m}_model") for m in ENCODERS if getattr(args, f"{m}_model")}
    changes |= {k: getattr(args, k) for k in ("alpha", "beta", "stage2_epochs") if getattr(args, k) is not None}
    if args.stage1_epochs is not None:
        changes["stage1_epochs"] = dict.fromkeys(ENCODERS, args.stage1_epochs)
    changes["preset"] = PRESETS[args.preset][args.corpus]
    changes |= {k: getattr(args, k) for k in ("gradient_checkpointing", "class_weights", "causal", "log_steps")}
    return dataclasses.replace(CONFIGS[args.corpus], **changes)


def read_corpus(args: argparse.Namespace) -> Corpus:
    corpus = READERS[args.corpus](args.root)
    for split in SPLITS:
        for what in ("audio", "video"):
            if not any(getattr(u, what) for u in corpus.utterances(split)):
                notes = "\n".join(f"  {note}" for note in corpus.notes)
                raise InputError(
                    f"{corpus.name} at {args.root}: no {what} file for any utterance of {split}. Unpack the whole "
                    f"corpus, or run stage 2 on vectors of your own with --features. What was found:\n{notes}"
                )
    return corpus


def read_demo(out: Path) -> Corpus:
    """The made-up corpus, in IEMOCAP's layout, written once."""
    folder = out / "corpus"
    if not folder.exists():
        print(f"writing a made-up corpus to {folder}", flush=True)
        part = out / "corpus.part"
        shutil.rmtree(part, ignore_errors=True)
        demo.write_iemocap(part, conversations=20)
        part.rename(folder)
    return dataclasses.replace(read_iemocap(folder), name="demo (made up)")


def tiny_models(corpus: Corpus, out: Path) -> dict[str, str]:
    """Small random encoders in the run's folder, written once: {"text_model": path, ...}."""
    folder = out / "tiny"
    if not folder.exists():
        part = out / "tiny.part"
        save_tiny(part, [u.text for u in corpus.utterances("train")])
        part.rename(folder)
    return {f"{m}_model": str(folder / m) for m in ENCODERS}


def feature_sets(features: Features, ablation: bool) -> list[tuple[str, ...]]:
    """Which vectors are fused: T + A_KD + V, the paper's best row, or what is nearest to it; all for the ablation."""
    audio = [k for k in ("audio", "audio_kd") if k in features.vectors]
    video = [k for k in ("video_kd", "video") if k in features.vectors]
    if not ablation:
        return [("text", *audio[-1:], *video[-1:])]
    return [("text", *a, *v) for a in ([(k,) for k in audio] or [()]) for v in ([(k,) for k in video[::-1]] or [()])]


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}; --features wants a feature file, the README says what it holds") from e


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="magtkd.py",
        description="Emotion recognition in conversation: both stages of MAGTKD, from raw files to a results table.",
        epilog="A run leaves its files in --out; the same command goes on where it was interrupted, and is done in "
        "seconds if nothing is left to do.",
    )
    parser.add_argument("corpus", choices=list(CONFIGS), help="demo: a small made-up corpus, written on the spot")
    parser.add_argument("--root", type=Path, help=f"the corpus' folder (default: {' or '.join(ROOTS.values())})")
    parser.add_argument("--out", type=Path, help="the run's folder (default: runs/<corpus>, or runs/<features' name>)")
    parser.add_argument(
        "--features",
        type=Path,
        help="stage 2 alone, on this feature file (format: README), or on a folder with the authors' three pickles",
    )
    parser.add_argument("--seeds", type=int, default=3, help="how often stage 2 is repeated (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument(
        "--ablation",
        action="store_true",
        help="all thirteen rows of Table 3 (five encoders, four sets), and Context; later starts keep them",
    )
    parser.add_argument(
        "--sweep",
        type=float,
        nargs="*",
        metavar="X",
        help="MAGT over a grid of alpha and beta (default: 0 0.3 0.7 1)",
    )
    parser.add_argument(
        "--compare-presets", action="store_true", help="what each difference from the authors' stage 2 is worth"
    )
    parser.add_argument(
        "--preset", choices=list(PRESETS), default="paper", help="released: stage 2 as the authors' code does it"
    )
    parser.add_argument("--alpha", type=float, help="weight of L_KD^a in Eq. 25 (default: Table 1)")
    parser.add_argument("--beta", type=float, help="weight of L_KD^v in Eq. 25 (default: Table 1)")
    parser.add_argument(
        "--causal", action="store_true", help="stage 2 reads the past alone, as `predict --stream` must"
    )
    parser.add_argument(
        "--class-weights", action="store_true", help="cross entropy weighted by inverse class frequency"
    )
    parser.add_argument("--stage1-epochs", type=int, help="of every encoder (default: Table 1's 10)")
    parser.add_argument("--stage2-epochs", type=int, help="(default: Table 1's 30)")
    parser.add_argument("--encoders", choices=["full", "tiny"], help="tiny: small, random weights (default for demo)")
    for m, cls in (("text", "RoBERTa"), ("audio", "Data2vec"), ("video", "TimeSformer")):
        parser.add_argument(f"--{m}-model", help=f"hub name or local folder of a {cls} (default: {_default(m)})")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="stage 1 in less memory, more slowly")
    parser.add_argument("--log-steps", action="store_true", help="a line per step in log.jsonl, not only per epoch")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:N (default: cuda if there)",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads that decode sound and pictures")
    parser.add_argument("--fresh", action="store_true", help="delete what --out holds and start anew")
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch sees no CUDA here; use --device cpu")
    if args.seeds < 1 or args.workers < 1:
        parser.error("--seeds and --workers must be 1 or more")
    if any(not 0 <= x < float("inf") for x in args.sweep or ()):
        parser.error("--sweep wants weights of 0 or more")
    if args.corpus == "demo" and args.root:
        parser.error("demo writes its own corpus; --root belongs to iemocap and meld")
    args.root = args.root or (Path(ROOTS[args.corpus]) if args.corpus in ROOTS else None)
    args.encoders = args.encoders or ("tiny" if args.corpus == "demo" else "full")
    args.out = args.out or Path("runs") / (args.features.stem if args.features else args.corpus)
    return args


def _default(modality: str) -> str:
    return getattr(Config(), f"{modality}_model")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns 0, 2 for the user's error (a line on stderr says which), 130 for Ctrl-C."""
    args = parse(argv)
    try:
        run(args)
        return 0
    except InputError as e:
        message = str(e)
    except torch.OutOfMemoryError as e:
        message = f"the GPU's memory is full ({str(e).splitlines()[0]}); try --gradient-checkpointing, or --device cpu"
    except SafetensorError as e:
        message = f"{args.out}: could not be written or read ({e}); is the disk full? What is whole stays"
    except OSError as e:
        if e.errno not in DISK:
            raise
        message = f"{e.filename or args.out}: {e.strerror}; free some space or give another folder with --out"
    except KeyboardInterrupt:
        print(f"\nstopped. The same command goes on with what is whole in {args.out}", file=sys.stderr)
        return 130
    print(f"magtkd: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
