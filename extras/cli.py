"""The command line: options, a run from a corpus or a feature file to a report, and what to say when it cannot be.

Not here: the method itself (magtkd.py).
"""

import argparse
import dataclasses
import errno
import hashlib
import os
import sys
from pathlib import Path

import torch

from data import KINDS, MODALITIES, SPLITS, Corpus, InputError, read_iemocap, read_meld
from extras import anatomy, experiments, machine, report, runs
from extras.check import check
from extras.features import read_features
from extras.guard import check_paths, device, guard, number
from extras.pickles import read_pickles
from extras.released import RELEASED
from extras.tiny import read_demo, tiny_models
from fusion import TEXT
from magtkd import CONFIGS, PAPER, PRECISIONS, Config, feature_sets, run_both, run_stage2

READERS = {"iemocap": read_iemocap, "meld": read_meld}
ROOTS = {"iemocap": "data/IEMOCAP_full_release", "meld": "data/MELD.Raw"}
TITLES = {"iemocap": "IEMOCAP", "meld": "MELD", "demo": "a made-up corpus (demo)"}
FREE = ("gradient_checkpointing", "log_steps")  # fields of Config that change no result: another start may change them
MOST_CELLS = 12  # values of a sweep, of alpha and of beta each


def run(args: argparse.Namespace) -> None:
    """From a corpus or a feature file to a report in args.out."""
    config = make_config(args)
    if args.check:
        return check(READERS[args.corpus](args.root), args.root, config, args.out)
    meant, args.device = args.device is not None, machine.choose(args.device)
    warn_of_slow_precision(args)
    device = torch.device(args.device)
    begun = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}
    begun |= {"corpus": args.corpus, "seed": args.seed, "encoders": args.encoders}
    models = {f"--{m}-model": Path(getattr(config, f"{m}_model")) for m in MODALITIES}
    check_paths(args.out, {"--root": args.root, "--features": args.features, **models})
    file = corpus = None
    if args.features:
        files = sorted(args.features.glob("*.pkl")) if args.features.is_dir() else [args.features]
        begun["features"] = digest(files)
        file = read_pickles(args.features) if args.features.is_dir() else read_features(args.features)
    elif args.corpus != "demo":
        begun["root"] = os.path.realpath(args.root)
        corpus = read_corpus(args, config)
    folder = runs.open_run(args.out, begun, args.fresh)
    folder.note_device(args.device)
    if not args.ablation and folder.was_ablation():
        print(f"{args.out} holds an ablation: it stays in the report, with all its rows (--fresh begins anew)")
        args.ablation = True

    method = RELEASED[args.corpus].method() if config.preset == "released" else PAPER
    methods = experiments.with_context(method) if args.ablation else method
    seeds = range(args.seed, args.seed + args.seeds)
    if file is None:
        corpus = corpus or read_demo(args.out)
        print("\n".join([f"{corpus.name} at {args.root or args.out / 'corpus'}:", *(f"  {n}" for n in corpus.notes)]))
        if args.encoders == "tiny":
            config = dataclasses.replace(config, **tiny_models(corpus, args.out))
        folder.check_corpus(corpus)
        folder.renew(corpus, config, args.workers)
        folder.drop_orphans()
        folder.check_results([u.label for u in corpus.utterances("test")], len(corpus.label_names))
        names = KINDS if args.ablation else ("text", "audio_kd", "video")  # the paper's best: T + A_KD + V
        names = [k for k in names if k.removesuffix("_kd") in config.modalities]
        if args.encoders == "full" and args.device == "cpu" and not meant:
            steps = config.stage1_epochs[TEXT] * -(-len(corpus.utterances("train")) // config.stage1_batch)
            todo = [k for k in names if not (args.out / f"{k}.features.safetensors").exists()]
            machine.warn_of_days(todo, steps)
        both = (config, names, corpus, args.out, seeds, device, args.workers, args.ablation, methods)
        file, rows, problems = run_both(*both)
        problems = folder.keep_problems(problems)
        notes, title = list(corpus.notes), TITLES[args.corpus]
    else:
        folder.check_results(file.label[file.split == SPLITS.index("test")].tolist(), len(file.label_names))
        kinds = [k for k in file.features if k.removesuffix("_kd") in config.modalities]
        rows = run_stage2(config, file, feature_sets(kinds, args.ablation), seeds, args.out, device, methods)
        problems, notes = [], [f"features of {len(file.label)} utterances from {printable(args.features.name)}"]
        title = printable(args.features.name)

    result = {"title": f"MAGTKD on {title}", "made_up": args.corpus == "demo" and not args.features}
    result |= {"corpus": corpus.name if corpus else "", "machine": report.machine(device)}
    result |= {"notes": notes, "problems": problems, "label_names": file.label_names, "rows": rows}
    if args.ablation:
        result |= experiments.ablation(file, rows, args.out)
    table = report.write_report(args.out, result)
    print(f"\n{result['title']}; test, {args.seeds} seeds of stage 2\n\n{table}\n")
    print(f"The whole report: {args.out / 'report.md'}")

    kinds = [k for k in file.features if k.removesuffix("_kd") in config.modalities]
    about = (feature_sets(kinds, False)[0], seeds, args.out, device, result["made_up"])
    study = experiments.Study(config, method, file, *about)
    if args.sweep is not None:
        print(f"\n{experiments.sweep(study, args.sweep or experiments.GRID)}\n\nMore: {args.out / 'sweep.md'}")
    if args.compare_presets:
        print(f"\n{experiments.compare_presets(study, args.corpus)}\n\nMore: {args.out / 'presets.md'}")
    if args.anatomy:
        print(f"\n{anatomy.study(study)}\n\nMore: {args.out / 'anatomy.md'}")
    folder.close()


def make_config(args: argparse.Namespace) -> Config:
    """A corpus' configuration with what the command line changes."""
    names = [field.name for field in dataclasses.fields(Config) if field.name != "stage1_epochs"]
    changes = {name: getattr(args, name) for name in names if getattr(args, name, None) not in (None, False)}
    if args.encoders == "tiny" and args.corpus != "demo":
        tiny = CONFIGS["demo"]
        small = {k: getattr(tiny, k) for k in ("width", "stage1_lr", "stage1_batch", "stage1_epochs", "stage2_lr")}
        changes = small | changes
    if args.stage1_epochs is not None:
        changes["stage1_epochs"] = dict.fromkeys(MODALITIES, args.stage1_epochs)
    return dataclasses.replace(CONFIGS[args.corpus], **changes)


def read_corpus(args: argparse.Namespace, config: Config) -> Corpus:
    corpus = READERS[args.corpus](args.root)
    for split in SPLITS:
        for what in config.modalities:
            if what != TEXT and not any(getattr(u, what) for u in corpus.utterances(split)):
                notes = "\n".join(f"  {note}" for note in corpus.notes)
                raise InputError(
                    f"{corpus.name} at {args.root}: no {what} file for any utterance of {split}. Unpack the whole "
                    "corpus, train on what there is with --modalities (say --modalities text), or run stage 2 on "
                    f"features of your own with --features. What was found:\n{notes}"
                )
    return corpus


def digest(paths: list[Path]) -> str:
    """Of the files' content. Errors: InputError for what is no file, or cannot be read."""
    found = hashlib.sha256()
    for path in paths:
        try:
            if not path.is_file():
                raise FileNotFoundError(errno.ENOENT, "no such file")
            with open(path, "rb") as f:
                found.update(hashlib.file_digest(f, "sha256").digest())
        except OSError as e:
            what = "--features wants a feature file, docs/corpora.md says what it holds"
            raise InputError(f"{path}: {e.strerror}; {what}") from e
    return found.hexdigest()


def modalities(text: str) -> tuple[str, ...]:
    wanted = tuple(m for m in MODALITIES if m in text.split(","))
    if not set(text.split(",")) <= set(MODALITIES) or TEXT not in wanted:
        raise argparse.ArgumentTypeError(f"wants text, or text with audio or video or both, not {text!r}")
    return wanted


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="magtkd.py",
        description="Emotion recognition in conversation: both stages of MAGTKD, from raw files to a results table.",
        epilog="A run leaves its files in --out. The same command continues where it was interrupted, and takes "
        "seconds if nothing is left to do.",
    )
    add, c = parser.add_argument, Config()
    count, weight, rate = number(int, 1, 100_000), number(float, 0.0, 1000.0), number(float, 1e-12, 10.0)
    add("corpus", choices=list(CONFIGS), help="demo: a small made-up corpus, written on the spot")
    add("--root", type=Path, help=f"the corpus' folder (default: {' or '.join(ROOTS.values())})")
    add("--out", type=Path, help="the run's folder (default: runs/<corpus>, or runs/<features' name>)")
    text = "stage 2 alone, on this feature file (format: README), or on a folder with the authors' three pickles"
    add("--features", type=Path, help=text)
    add("--modalities", type=modalities, metavar="M,M", help="text, or text,audio or text,video (default: all three)")
    add("--seeds", type=number(int, 1, 100), default=3, help="how often stage 2 is repeated (default: 3)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="the first seed (default: 0)")
    text = "all thirteen rows of Table 3 (five encoders, four sets), and Context; later starts keep them"
    add("--ablation", action="store_true", help=text)
    text = "MAGT over a grid of alpha and beta (default: 0 0.3 0.7 1)"
    add("--sweep", type=weight, nargs="*", metavar="X", help=text)
    add("--compare-presets", action="store_true", help="what each difference from the authors' stage 2 is worth")
    text = "a study of what MAGT's anchors hear, with parts of MAGT taken out (docs/anatomy.md)"
    add("--anatomy", action="store_true", help=text)
    text = "released: stage 2 as the authors' code does it"
    add("--preset", choices=["paper", "released"], help=text)
    add("--alpha", type=weight, help="weight of L_KD^a in Eq. 25 (default: Table 1)")
    add("--beta", type=weight, help="weight of L_KD^v in Eq. 25 (default: Table 1)")
    add("--causal", action="store_true", help="stage 2 reads the past alone, as `predict --stream` must")
    add("--class-weights", action="store_true", help="cross entropy weighted by inverse class frequency")
    add("--stage1-epochs", type=count, help="of every encoder (default: Table 1's 10)")
    add("--stage2-epochs", type=count, help="(default: Table 1's 30)")
    add("--stage1-lr", type=rate, help="highest learning rate of the encoders (default: Table 1's 1e-5)")
    add("--stage1-batch", type=count, help="utterances per step of the encoders (default: Table 1's 4)")
    add("--stage2-lr", type=rate, help="highest learning rate of the fusion (default: 1e-4; Table 1, IEMOCAP: 1e-5)")
    text = "of the models: auto is bfloat16 (else float16) on CUDA, float32 on a CPU"
    add("--precision", choices=list(PRECISIONS), help=text)
    add("--encoders", choices=["full", "tiny"], help="tiny: small, random weights (default for demo)")
    kinds = {"text": "an encoder with a mask token", "audio": "a Data2vec or relative", "video": "a TimeSformer"}
    for m, what in kinds.items():
        add(f"--{m}-model", help=f"hub name or local folder of {what} (default: {getattr(c, f'{m}_model')})")
    add("--max-tokens", type=number(int, 64, 100_000), help="longest prompt, the oldest context is cut (default: 512)")
    add("--width", type=number(int, 8, 8192), help="of the features and of the fusion (default: Table 1's 768)")
    add("--gradient-checkpointing", action="store_true", help="stage 1 in less memory, more slowly")
    add("--log-steps", action="store_true", help="a line per step in log.jsonl, not only per epoch")
    add("--device", type=device, help="cpu, cuda or cuda:N (default: cuda if there)")
    add(
        "--workers",
        type=number(int, 1, 256),
        default=os.cpu_count() or 1,
        help="threads that decode sound and pictures",
    )
    text = "is --root the paper's corpus, and what will a run need? Trains nothing, writes nothing"
    add("--check", action="store_true", help=text)
    add("--fresh", action="store_true", help="delete what --out holds and start anew")
    args = parser.parse_args(argv)

    values = set(args.sweep or ())
    if len(values) > MOST_CELLS:
        parser.error(f"--sweep takes {MOST_CELLS} weights at most: it trains each with each")
    if len({f"{x:g}" for x in values}) < len(values):
        parser.error("--sweep: two weights agree in their first six digits, and would share a file")
    if (args.width or 8) % c.heads:
        parser.error(f"--width must be a multiple of {c.heads}, the number of attention heads")
    if args.corpus == "demo" and args.root:
        parser.error("demo writes its own corpus; --root belongs to iemocap and meld")
    if args.check and (args.corpus == "demo" or args.features):
        parser.error("--check reads a corpus on disk: iemocap or meld, without --features")
    args.root = args.root or (Path(ROOTS[args.corpus]) if args.corpus in ROOTS else None)
    args.encoders = args.encoders or ("tiny" if args.corpus == "demo" else "full")
    args.out = args.out or Path("runs") / (args.features.stem if args.features else args.corpus)
    return args


def warn_of_slow_precision(args: argparse.Namespace) -> None:
    """Says so if a CPU must imitate the half precision that was asked for."""
    with open("/proc/cpuinfo") if os.path.exists("/proc/cpuinfo") else open(os.devnull) as f:
        flags = f.read()
    fast = args.precision == "bfloat16" and ("amx_bf16" in flags or "avx512_bf16" in flags)
    if args.device == "cpu" and args.precision in ("bfloat16", "float16") and not fast:
        print(
            f"--precision {args.precision}: this processor has no instructions for it (AMX or AVX512-BF16 for "
            "bfloat16), so it may be many times slower than float32",
            file=sys.stderr,
        )


def printable(name: str) -> str:
    """A file's name as text: bytes that are none become question marks."""
    return name.encode("utf-8", "replace").decode("utf-8")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit code, see guard.py; a line on stderr says what it is about."""
    args = parse(argv)

    stopped = f"\nstopped. The same command continues with what is whole in {args.out}"
    return guard("magtkd", lambda: run(args), args.out, stopped)
