"""What docs/ shows: results taken over from finished runs, the exercises of docs/course.md, the losses' sizes.

    python -m extras.gather demo=runs/demo meld=runs/meld mosi=runs/mosi causal=runs/causal weights=runs/weights
    python -m extras.gather meld-causal=runs/meld-causal meld-weights=runs/meld-weights  # stage 2 alone
    python -m extras.gather mosi-bfloat16=runs/mosi-bfloat16  # the same with --precision bfloat16
    python -m extras.gather --exercises runs/demo     # stage 2 with each exercise's change, 3 minutes on two cores
    python -m extras.gather --losses                  # L_s and L_f on random features, seconds

All of it goes to docs/figures/; then the pages are filled again. Not here: the pages (docs.py).
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from unittest import mock

import torch

import losses
from data import SPLITS, Conversations, InputError, read_encoded, replace_file
from extras import docs
from extras.context import Context
from extras.docs_runs import CONTEXT, MAGT
from extras.docs_stored import FIGURES
from extras.experiments import compare, summary
from extras.features import read_features
from extras.predict import main as predict
from extras.report import machine, mean_std
from fusion import Anchor
from magtkd import CONFIGS, PAPER, Config, Method, fusion_losses, most_likely, train_fusion

# Taking over the results of runs

NAMES = {  # what one gives -> the file in docs/figures/
    "demo": "demo-metrics",
    "causal": "demo-causal",
    "weights": "demo-weights",
    "meld": "meld-metrics",
    "meld-causal": "meld-causal",
    "meld-weights": "meld-weights",
    "mosi": "mosi-metrics",
    "mosi-bfloat16": "mosi-bfloat16",
}
FILM = "corpus/Session5/dialog/avi/DivX/Ses05F_impro04.avi"  # in a demo's folder
CONVERSATIONS = {
    "demo": f"""speaker,text,video,start,end
Ann,"I mean, are you okay about the keys?",{FILM},0.6,1.67
Bob,"Listen, I am lonely about the keys.",{FILM},5.16,6.42
Ann,"Yeah, that phone made me impatient.",lost.avi,,
Bob,Words alone.,,,
""",
    "meld": """speaker,text
Ann,You will never guess who called me today!
Bob,I do not care. You promised to be here at six.
Ann,I am so sorry. I lost track of the time.
Bob,"Oh God, you scared me. I thought something had happened to you."
""",
}


def take(name: str, run: Path, figures: Path = FIGURES) -> None:
    """Copies what is shown of a finished run, and lets it predict a conversation of CONVERSATIONS.

    name: one of NAMES. Errors: InputError for a run that is not finished.
    """
    if not (run / "metrics.json").exists():
        raise InputError(f"{run}: no finished run, there is no metrics.json in it")
    shutil.copy(run / "metrics.json", figures / f"{NAMES[name]}.json")
    if name == "meld":
        write("meld-words", against_words(run), figures)
    if name not in CONVERSATIONS:
        return
    for figure in sorted({*(run / "figures").glob("*.png")} - {run / "figures" / "anatomy.png"}):  # anatomy.py draws it
        shutil.copy(figure, figures / f"{name}-{figure.name}")
    for page in ("presets", "sweep"):
        if (run / f"{page}.md").exists():
            text = (run / f"{page}.md").read_text(encoding="utf-8").replace("(figures/", f"({name}-")
            (figures / f"{name}-{page}.md").write_text(text, encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        typed, answers = Path(folder) / "conversation.csv", Path(folder) / "answers.csv"
        text = CONVERSATIONS[name].replace("corpus/", f"{os.path.relpath(run, folder)}/corpus/")
        typed.write_text(text, encoding="utf-8")
        with open(Path(folder) / "said", "w+", encoding="utf-8") as f:
            with redirect_stdout(f):
                options = ["--run", str(run), "--input", str(typed), "--out", str(answers), "--device", "cpu"]
                code = predict(options)
            if code:
                raise InputError(f"{run}: predict ended with exit code {code}")
            f.seek(0)
            lines = [line.rstrip() for line in f if line.strip() and str(answers) not in line]
    (figures / f"{name}-predict.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def against_words(run: Path) -> dict:
    """{"comparisons": of `experiments.compare`}: each fusion of a run over the text alone against its text encoder.

    The encoder was trained once: its answers stand beside those of every seed.
    """
    file = read_features(run / "features.safetensors")
    answers = most_likely(read_encoded(run / "text.features.safetensors", file.utterance_names))
    test = (file.split == SPLITS.index("test")).nonzero().flatten().tolist()
    words = {"labels": file.label[test].tolist(), "predictions": [answers[i] for i in test]}
    fusions: dict[str, list[dict]] = {}
    for path in sorted((run / "fusion").glob("*-T-seed*.json")):
        fusions.setdefault(path.stem.split("-")[0], []).append(json.loads(path.read_text()))
    pairs = [(f"{name} T - T", runs, [words] * len(runs)) for name, runs in fusions.items()]
    return {"comparisons": compare(file, pairs)}


# Measured here


def measure_losses() -> dict:
    """L_s, and L_f with cosines and with raw products, of random logits [B, 6] and features [B, 768], seed 0."""
    torch.manual_seed(0)
    rows = []
    for B in (4, 16, 64, 512):
        f_s, f_t, p_s, p_t = torch.randn(B, 768), torch.randn(B, 768), torch.randn(B, 6), torch.randn(B, 6)
        cosines, raw = (losses.feature_loss(f_s, f_t, normalize=n) for n in (True, False))
        found = (losses.soft_label_loss(p_s, p_t), cosines, raw)
        rows.append({"B": B, **{name: float(x) for name, x in zip(("L_s", "L_f", "L_f raw"), found)}})
    return {"rows": rows}


def raw_products() -> AbstractContextManager:
    return mock.patch.object(losses, "feature_loss", partial(losses.feature_loss, normalize=False))


def gates(value: float) -> AbstractContextManager:
    return mock.patch.object(Anchor, "alpha", lambda anchor, source, h: torch.full_like(h, value))


TEACHER = PAPER._replace(losses=partial(fusion_losses, detach_teacher=False))
WITH_CONTEXT = PAPER._replace(models={CONTEXT: Context})
EXERCISES: dict[str, tuple[str, Method, Callable]] = {  # name: (the fusion, its method, what is patched meanwhile)
    "the paper": (MAGT, PAPER, nullcontext),
    "1. gradient into the teacher": (MAGT, TEACHER, nullcontext),
    "2. raw dot products in L_f": (MAGT, PAPER, raw_products),
    "3. gates closed": (MAGT, PAPER, partial(gates, 0.0)),
    "3. gates open": (MAGT, PAPER, partial(gates, 1.0)),
    "4. Context instead of MAGT": (CONTEXT, WITH_CONTEXT, nullcontext),
}


def exercises(run: Path, seeds: range = range(3), config: Config = CONFIGS["demo"]) -> dict:
    """Trains stage 2 on a run's features with each change of docs/course.md.

    {"machine", "seeds", "rows": name -> "weighted_f1" and "macro_f1" on test, "answers" (how many different ones there
    are on test), "terms" (of the loss on train, last epoch)}.
    """
    file, rows = read_features(run / "features.safetensors"), {}
    kinds = tuple(k for k in ("text", "audio_kd", "video") if k in file.features)
    data, C = Conversations(file, kinds, torch.device("cpu")), len(file.label_names)
    for name, (model, method, patch) in EXERCISES.items():
        results = []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder, patch():
                results.append(train_fusion(model, data, C, config, Path(folder) / "model", seed, method))
        scores, last = summary(results), [r["history"][-1]["train"] for r in results]
        rows[name] = {key: dict(zip(("mean", "std"), scores[key])) for key in ("weighted_f1", "macro_f1")}
        rows[name]["answers"] = mean_std([len(set(r["predictions"])) for r in results])[0]
        rows[name]["terms"] = {key: mean_std([x[key] for x in last])[0] for key in last[0]}
        print(f"{name}: W-F1 {scores['weighted_f1'][0]:.2f} ± {scores['weighted_f1'][1]:.2f}", flush=True)
    return {"machine": machine(torch.device("cpu")), "seeds": len(seeds), "rows": rows}


def write(name: str, result: dict, figures: Path = FIGURES) -> None:
    replace_file(figures / f"{name}.json", lambda part: part.write_text(json.dumps(result, indent=2) + "\n"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m extras.gather", description=__doc__.split("\n\n")[0])
    text = f"a finished run to take over; NAME: {', '.join(NAMES)}"
    parser.add_argument("runs", nargs="*", metavar="NAME=RUN", help=text)
    parser.add_argument("--exercises", type=Path, metavar="RUN", help="train the exercises on this run's features")
    parser.add_argument("--losses", action="store_true", help="measure L_s and L_f on random features")
    args = parser.parse_args(argv)
    given = dict(entry.partition("=")[::2] for entry in args.runs)
    if unknown := sorted(given.keys() - set(NAMES)):
        parser.error(f"{', '.join(unknown)}: not a name; wanted {', '.join(NAMES)}")
    try:
        for name, run in given.items():
            take(name, Path(run).resolve())
        if args.exercises:
            write("course", exercises(args.exercises))
        if args.losses:
            write("losses", measure_losses())
    except InputError as e:
        print(f"gather: {e}", file=sys.stderr)
        return 2
    return docs.main([])


if __name__ == "__main__":
    sys.exit(main())
