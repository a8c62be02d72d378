"""What do MAGT's anchors hear? A study of trained models: the option `--anatomy` of a run.

    bash run.sh demo --anatomy                               table, figure and anatomy.json in runs/demo
    bash run.sh iemocap --features my.safetensors --anatomy  the same on a feature file
    python -m extras.anatomy --fill docs/anatomy.md          a page's tables and figures, from stored results

Three fusions and MAGT with a bias to the own utterance (own_utterance.py), over text alone, with the next modality, and
with all; then MAGT over all of them with one part taken out at a time. Epochs are chosen on dev; differences have the
bootstrap intervals of experiments.py. Of each stream: the attention that an utterance gives to its own row and to its
neighbours' rows, before and after training, and the mean gate (Eq. 21).

Not here: training (magtkd.py), the bootstrap and the gates (experiments.py), the table and the page (anatomy_page.py).
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import Conversations, FeatureFile, replace_file
from extras.anatomy_page import BIASED, figure, fill, section, table
from extras.context import Context
from extras.experiments import MADE_UP, Study, compare, mean_gates, summary
from extras.own_utterance import OWN, OwnMAGT, own_magt
from extras.released import swap_anchors
from extras.report import machine
from extras.runs import read_json
from fusion import MAGT, Anchor, Concat, FusionConfig, read_inputs
from magtkd import TABLE_NAMES, Method, load_fusion, seed_everything, train_fusion

REACH = 6  # utterances before and after, of the figure
MODELS = {"Concat": Concat, "Context": Context, "MAGT": MAGT, BIASED: own_magt()}
LISTENED = ("MAGT", BIASED)  # the models whose attention and gates are measured


# MAGT with a part taken out


class OpenAnchor(Anchor):
    """Eq. 22 without Eq. 21: all of every answer passes."""

    def __init__(self, config: FusionConfig, name: str):
        super().__init__(config, name)
        self.gate = nn.ModuleDict()

    def alpha(self, source: str, h: Tensor) -> Tensor:
        return torch.ones_like(h)


class OtherAnchor(Anchor):
    """An anchor that reads the other modalities and not itself."""

    def __init__(self, config: FusionConfig, name: str):
        super().__init__(config, name)
        del self.block[name], self.gate[name]
        self.merge = nn.Linear(len(self.block) * config.width, config.width)


def with_anchors(anchor: type[Anchor]) -> Callable[[FusionConfig], MAGT]:
    return lambda config: swap_anchors(MAGT(config), anchor)


class NoPositions(MAGT):
    """Eq. 18 without the positions: features and speakers."""

    def tag(self, features, speakers, lengths, present, past) -> tuple[dict[str, Tensor], Tensor]:
        parts = read_inputs(self.input, self.config, features, speakers, lengths, present)
        tags = self.speaker(speakers)
        return {m: x + tags for m, x in parts.items()}, tags


# The trainings


class Cell(NamedTuple):
    """A model over a set of features: a row of the table."""

    model: str  # its name in the table
    kinds: tuple[str, ...]
    make: Callable[[FusionConfig], nn.Module]
    distil: bool = True  # False: alpha = beta = 0 in Eq. 25

    @property
    def features(self) -> str:
        return "+".join(TABLE_NAMES[k] for k in self.kinds)

    @property
    def file(self) -> str:
        return re.sub(r"[^\w+]+", "-", f"{self.model} {self.features}")


def cells(kinds: tuple[str, ...]) -> list[Cell]:
    """All trainings of the study, in the table's order. kinds: of features, text first."""
    sets = [kinds[: n + 1] for n in range(len(kinds))]
    table = [Cell(name, s, make) for s in sets for name, make in MODELS.items() if len(s) > 1 or name != BIASED]
    parts = {
        "no gates": with_anchors(OpenAnchor),
        "no distillation": MAGT,
        "no positions": NoPositions,
    }
    if len(kinds) > 1:
        parts |= {
            "no self streams": with_anchors(OtherAnchor),
            "own row, from 0": own_magt(0.0),
        }
    return table + [Cell(f"MAGT, {name}", kinds, make, name != "no distillation") for name, make in parts.items()]


def train_cell(study: Study, cell: Cell) -> tuple[list[dict], list[dict]]:
    """The results of train_fusion, per seed, and what `listen` says of each model if it is one of LISTENED.

    Both are kept in study.out/anatomy; weights are not.
    """
    data, C = Conversations(study.file, cell.kinds, study.device), len(study.file.label_names)
    name = cell.model if cell.model in ("Concat", "Context") else "MAGT"  # a seed begins all of MAGT's kind alike
    config = study.config if cell.distil else dataclasses.replace(study.config, alpha=0.0, beta=0.0)
    runs, heard = [], []
    for seed in study.seeds:
        path = study.out / "anatomy" / f"{cell.file}-seed{seed}"
        weights, measured = Path(f"{path}.safetensors"), Path(f"{path}.heard.json")
        listens = cell.model in LISTENED and len(cell.kinds) > 1
        if listens and not measured.exists() and not weights.exists():
            Path(f"{path}.json").unlink(missing_ok=True)  # stopped between the two: train again
        runs.append(train_fusion(name, data, C, config, path, seed, Method({name: cell.make})))
        if listens:
            if not measured.exists():
                kept = listen(weights, seed, cell, study.file)
                replace_file(measured, lambda part, kept=kept: part.write_text(json.dumps(kept)))
            heard.append(read_json(measured))
        weights.unlink(missing_ok=True)
    return runs, heard


# What the anchors hear


def listen(weights: Path, seed: int, cell: Cell, file: FeatureFile) -> dict:
    """A trained model on test: {"before", "after"} (training, of `attention`), "gates" [anchors, sources], "numbers".

    numbers: of a model with a bias to the own row, all of them after training; else none.
    """

    def make(_, fields: dict) -> nn.Module:
        fields.pop("own", None)  # of the bias: cell.make knows it
        return cell.make(FusionConfig(**fields))

    model, kinds = load_fusion(weights, make)
    seed_everything(seed, "MAGT")
    untrained = make("", dataclasses.asdict(model.config)).eval()  # as train_fusion had it
    result = {"before": attention(untrained, kinds, file), "after": attention(model, kinds, file)}
    result["gates"] = mean_gates(model, kinds, file).tolist()
    own = [x for name, x in model.state_dict().items() if name.endswith(".own")]
    return result | {"numbers": torch.cat(own).tolist() if isinstance(model, OwnMAGT) else []}


@torch.inference_mode()
def attention(model: MAGT, kinds: tuple[str, ...], file: FeatureFile) -> dict[str, dict]:
    """How the utterances of test spread their attention, per stream ("audio -> text": text asks, audio answers).

    Per stream {"own": mean attention to the own row, "thirds": the same in the first, second and last third of a
    conversation, "near": mean attention to the row d utterances later, for d from -REACH to REACH}. Means over heads
    and over the utterances whose row in question is there to be read; None if there are none. model on the CPU.
    """
    data = Conversations(file, kinds, torch.device("cpu"))
    batch = data.batch(data.splits["test"])
    maps: dict[str, list[Tensor]] = {}  # stream -> per conversation [U, U], NaN in the columns that may not be read
    streams = [(a, s, block) for a, anchor in model.anchor.items() for s, block in anchor.block.items()]
    for anchor, source, block in streams:
        block.attend_one = watch(block, maps.setdefault(f"{source} -> {anchor}", []))
    model(*batch.inputs)
    for _, _, block in streams:
        del block.attend_one
    return {stream: describe(found) for stream, found in maps.items()}


def watch(block: nn.Module, maps: list[Tensor]) -> Callable:
    """block.attend_one, which also appends its attention to `maps`."""
    attend_one = block.attend_one

    def watched(q: Tensor, k: Tensor, v: Tensor, readable: Tensor | None) -> Tensor:
        T = len(k)
        identity = torch.eye(T).repeat(1, block.heads)  # as values: the answer is then the attention itself
        weights = attend_one(q, k, identity, readable).unflatten(1, (block.heads, T)).mean(dim=1)  # [U, T]
        maps.append(weights if readable is None else weights.masked_fill(~readable, torch.nan))
        return attend_one(q, k, v, readable)

    return watched


def describe(maps: list[Tensor]) -> dict:
    """`attention` of one stream, from a map [U, U] per conversation."""

    def mean(values: list[Tensor]) -> float | None:
        x = torch.cat(values) if values else torch.empty(0)
        x = x[~x.isnan()]
        return float(x.mean()) if len(x) else None

    own = [x.diag() for x in maps]
    third = [torch.arange(len(x)) * 3 // len(x) for x in maps]
    thirds = [mean([x[t == i] for x, t in zip(own, third)]) for i in range(3)]
    near = [mean([x.diag(d) for x in maps if len(x) > abs(d)]) for d in range(-REACH, REACH + 1)]
    return {"own": mean(own), "thirds": thirds, "near": near}


# The study


def study(about: Study) -> str:
    """Trains, measures and writes anatomy.json, anatomy.md and figures/anatomy.png. Returns the table.

    The paper's method is studied, whatever about.method is.
    """
    (about.out / "anatomy").mkdir(parents=True, exist_ok=True)
    (about.out / "figures").mkdir(exist_ok=True)
    todo = cells(about.kinds)
    runs, heard = {}, {}
    for cell in tqdm(todo, "anatomy", unit=" models", disable=None):
        key = cell.model, cell.features
        runs[key], heard[key] = train_cell(about, cell)
    rows = []
    for (model, features), results in runs.items():
        pairs, fewer = [], features.rpartition("+")[0]
        if model != "MAGT":
            pairs.append(("against MAGT", results, runs["MAGT", features]))
        if fewer and model in MODELS:  # over text alone, a bias between modalities has nothing to do
            pairs.append(("added", results, runs.get((model, fewer), runs["MAGT", fewer])))
        rows.append({"model": model, "features": features, **summary(results)})
        rows[-1] |= {c.pop("pair"): c for c in compare(about.file, pairs)}
    result = {"made_up": about.made_up, "machine": machine(about.device), "seeds": len(about.seeds)}
    result |= {"width": about.config.width, "own": OWN, "rows": rounded(rows)}
    result["heard"] = [
        {"model": model, "features": features, **rounded(average(found))}
        for (model, features), found in heard.items()
        if found
    ]
    replace_file(about.out / "anatomy.json", lambda part: part.write_text(json.dumps(result, indent=1)))
    figure(about.out / "figures" / "anatomy.png", result)
    text = f"# What MAGT's anchors hear\n\n{MADE_UP if about.made_up else ''}{section(result, 'figures/anatomy.png')}\n"
    replace_file(about.out / "anatomy.md", lambda part: part.write_text(text, encoding="utf-8"))
    return table(result)


def average(found: list):
    """The mean over seeds of equally built trees of numbers."""
    if isinstance(found[0], dict):
        return {key: average([x[key] for x in found]) for key in found[0]}
    if isinstance(found[0], list):
        return [average(list(x)) for x in zip(*found)]
    return None if found[0] is None else float(np.mean(found))


def rounded(x):
    """A tree of numbers with four decimals: what a stored result needs."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(value) for value in x]
    return round(x, 4) if isinstance(x, float) else x


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m extras.anatomy", description="Fills a page from stored results.")
    parser.add_argument("--fill", type=Path, metavar="PAGE", required=True, help="with its results in PAGE/../figures")
    page = parser.parse_args(argv).fill
    text = fill(page.read_text(encoding="utf-8"), page.parent / "figures")
    replace_file(page, lambda part: part.write_text(text, encoding="utf-8"))
    for stored in sorted((page.parent / "figures").glob("anatomy-*.json")):
        figure(stored.with_suffix(".png"), json.loads(stored.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
