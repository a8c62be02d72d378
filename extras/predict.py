"""The emotions of your own conversation, by the models of a finished run.

    bash run.sh predict --run runs/demo --input conversation.csv     # a table, and conversation.emotions.csv
    bash run.sh predict --run runs/live --stream                     # JSON lines in, a JSON line out for each at once

Columns of the csv and keys of a JSON line: see data.make_utterance. Paths are relative to the csv (--stream: to the
working folder). What is missing or broken is noted; as in training its feature is zero and masked as a key.
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_model
from torch import Tensor, nn

import data
import magtkd
from data import FIELDS, MODALITIES, Conversation, FeatureFile, InputError, Utterance, read_features
from encoders import Encoder, checkpoint_digest, decode
from extras.variants import CLASSES
from fusion import TEXT
from magtkd import CONFIG, Config, Examples, about, load_fusion, read_json


@dataclass(frozen=True)
class Model:
    """What a run has trained."""

    config: Config
    encoders: dict[str, Encoder]  # modality ->
    fusion: nn.Module
    kinds: tuple[str, ...]  # of the features that it fuses
    file: FeatureFile  # all features of the run's corpus


def load_run(folder: Path, device: torch.device) -> Model:
    """The encoders and the best fusion model of the main row. Errors: InputError if unfinished; see check_fit."""
    config, options = magtkd.read_config(folder)
    if options.get("features"):
        raise InputError(f"{folder} was trained on a feature file: it has no encoders. Give a run on a corpus")
    if options.get("encoders") == "tiny":
        config = replace(config, **{f"{m}_model": str(folder / "tiny" / m) for m in MODALITIES})
    if not (folder / "metrics.json").is_file():
        raise InputError(f"{folder} is not a finished run: no metrics.json. The command that started it resumes it")
    fusion_file = str(read_json(folder / "metrics.json").get("weights"))
    fusion, kinds = load_fusion(folder / fusion_file, CLASSES)
    file = read_features(folder / "features.safetensors")
    check_fit(folder, fusion_file, kinds, file)
    encoders = {kind.removesuffix("_kd"): load_encoder(folder, kind, config, file).to(device) for kind in kinds}
    return Model(config, encoders, fusion.to(device), kinds, file)


def check_fit(folder: Path, fusion_file: str, kinds: tuple[str, ...], file: FeatureFile) -> None:
    """Errors: InputError for a file that is not what another was made from, say a new encoder beside an old fusion."""
    fusion, features = about(folder / fusion_file)["made_from"], "features.safetensors"
    same_features = set(kinds) <= file.features.keys() and fusion.get("features and labels") == data.file_digest(
        file, kinds
    )
    same_salt = fusion.get("salt") == read_json(folder / CONFIG).get("salt")  # another one: --fresh was interrupted
    pairs = [(fusion_file, features, same_features), (fusion_file, CONFIG, same_salt)]
    for kind in kinds:
        if not (folder / f"{kind}.safetensors").exists():
            again = f"bring it back, or move {kind}.features.safetensors away and start the run's command again"
            raise InputError(f"{folder}: {kind}.safetensors, the encoder's weights, is missing; {again}")
        key = about(folder / f"{kind}.safetensors").get("key")
        pairs.append((features, f"{kind}.safetensors", file.made_from.get(kind) == key))
    for made, source, fits in pairs:
        if not fits:
            raise InputError(f"{folder}: {made} was not made from today's {source}; start the run's command again")


def load_encoder(folder: Path, kind: str, config: Config, file: FeatureFile) -> Encoder:
    """A run's encoder. Errors: InputError if its checkpoint (weights, configuration, tokenizer) is another one now."""
    path, checkpoint = folder / f"{kind}.safetensors", getattr(config, f"{kind.removesuffix('_kd')}_model")
    encoder = magtkd.make_encoder(kind, config, len(file.label_names))
    now = checkpoint_digest(checkpoint)
    if now is None:
        print(f"{checkpoint}: cannot be compared with what {path.name} was trained from", file=sys.stderr)
    elif now != about(path)["made_from"].get("checkpoint"):
        raise InputError(f"{checkpoint}: its weights, configuration or tokenizer have changed since {path} was trained")
    load_model(encoder, path)
    return encoder.eval()


def load_examples(model: Model, modality: str, conversation: Conversation, first: int = 0) -> tuple[Examples, list]:
    """What an encoder takes of the utterances from number `first` on, and a note for each, "" if it is complete."""
    encoder, utterances, found, notes = model.encoders[modality], conversation.utterances[first:], {}, []
    if modality == TEXT:
        found = {u.id: prompt for u, prompt in zip(utterances, encoder.prompts(conversation)[first:])}
        notes = ["" if u.text else "no text (missing)" for u in utterances]
        return Examples(found.__getitem__, {i: len(x) for i, x in found.items()}), notes
    c = encoder.backbone.config
    shape = (c.num_frames, c.image_size) if modality == "video" else ()
    for u in utterances:
        try:
            array, note = decode(u, modality, *shape)
            found[u.id] = torch.from_numpy(array / np.float32(32767) if modality == "audio" else array)
            notes.append(note and f"{modality} ({note})")
        except data.MediaError as e:
            notes.append(f"no {modality} ({e})")
    return Examples(found.__getitem__, {i: len(x) for i, x in found.items()}), notes


def speaker_indices(model: Model, conversation: Conversation) -> Tensor:
    """[U] int64, 0 for an unknown speaker. By name; by order where the run's are IEMOCAP's "first" and "second"."""
    file, names = model.file, [u.speaker for u in conversation.utterances]
    known = {file.speaker_names[i]: i + 1 for i in file.speaker[file.split == 0].unique().tolist()}
    if known.keys() <= {"first", "second"}:
        order = dict(zip(dict.fromkeys(names), ("first", "second")))
        names = [order.get(name, "") for name in names]
    return torch.tensor([known.get(name, 0) for name in names])


class Stream:
    """A conversation in progress. Each utterance is encoded once; the fusion, a hundredth of the FLOPs, each time
    over all of them."""

    def __init__(self, model: Model):
        self.model, self.utterances, self.features = model, (), {}

    @torch.inference_mode()
    def add(self, *utterances: Utterance) -> list[dict]:
        """{"speaker", "text", "emotion", "probabilities", "notes" (what is missing)} of each of the next utterances."""
        model, first, features, notes = self.model, len(self.utterances), {}, []
        conversation = Conversation("stream", (*self.utterances, *utterances))
        for m, encoder in model.encoders.items():
            examples, notes_of_m = load_examples(model, m, conversation, first)
            x = magtkd.encode(encoder, examples, [u.id for u in utterances], model.config.precision).features
            features[m] = torch.cat([self.features[m], x]) if first else x  # [U, d], NaN where missing
            notes.append(notes_of_m)
        self.utterances, self.features = conversation.utterances, features

        device = next(model.fusion.parameters()).device
        present = {m: ~x.isnan().any(dim=1).to(device) for m, x in features.items()}
        features = {m: x.nan_to_num().to(device) for m, x in features.items()}
        speakers = speaker_indices(model, conversation).to(device)
        output = model.fusion(features, speakers, [len(speakers)], present)
        rows = []
        for u, x, notes_of_u in zip(utterances, output.logits[TEXT][first:].softmax(dim=-1).tolist(), zip(*notes)):
            p = {name: round(value, 4) for name, value in zip(model.file.label_names, x)}
            row = {"speaker": u.speaker, "text": u.text, "emotion": max(p, key=p.get), "probabilities": p}
            rows.append(row | {"notes": [note for note in notes_of_u if note]})
        return rows


def predict_lines(model: Model, lines: Iterable[str]) -> None:
    """Prints a JSON line for every line. Errors: InputError; at the end, if any line was not an utterance."""
    if not model.fusion.config.causal:
        raise InputError("--stream needs a run with --causal: give the run's own command with it")
    stream, bad = Stream(model), 0
    for number, line in ((n, line) for n, line in enumerate(lines, 1) if line.strip()):
        try:
            row = dict(json.loads(line.removeprefix("\ufeff")))
            utterance = data.make_utterance(row, f"line {number}", str(number), Path())
        except (InputError, TypeError, ValueError, RecursionError) as e:
            reason = str(e) if isinstance(e, InputError) else f"line {number}: not a JSON object ({e})"
            result, bad = {"error": reason}, bad + 1
        else:
            (result,) = stream.add(utterance)
        print(json.dumps(result, ensure_ascii=False), flush=True)
    if bad:
        raise InputError(f"{bad} lines were not utterances and were left out; the output says why")


def write_csv(path: Path, rows: list[dict]) -> None:
    """A spreadsheet would run a cell that begins with = + - @ as a formula; it gets a ' before it."""
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["speaker", "text", "emotion", *(f"p_{x}" for x in rows[0]["probabilities"]), "notes"])
        for row in rows:
            *known, probabilities, notes = row.values()
            cells = [*known, *probabilities.values(), "; ".join(notes)]
            writer.writerow([f"'{x}" if str(x).startswith(tuple("=+-@\t")) else x for x in cells])


def work(args: argparse.Namespace) -> None:
    device = torch.device(args.device or magtkd.choose_device(False))
    if args.stream and args.out:
        raise InputError("--stream answers on standard output, line by line; --out belongs to --input")
    if args.stream:
        return predict_lines(load_run(args.run, device), sys.stdin)
    conversation, out = data.read_conversation(args.input), args.out or args.input.with_suffix(".emotions.csv")
    if os.path.lexists(out):  # an input, an older result, a device, ..
        raise InputError(f"{out}: exists already, and is not overwritten; give another name with --out")
    data.check_target(out)
    rows = Stream(load_run(args.run, device)).add(*conversation.utterances)
    for row in rows:
        emotion = f"{row['emotion']} {row['probabilities'][row['emotion']]:.2f}"
        print(f"{row['speaker']:<12.12}  {emotion:<16}  {row['text']:<40.40}", *row["notes"], sep="  ")
    data.replace_file(out, lambda temporary: write_csv(temporary, rows))
    print(f"\n{out}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="predict", description="The emotions of your own conversation.")
    parser.add_argument("--run", type=Path, required=True, help="the folder of a finished run, for example runs/demo")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=Path, help=f"csv with the columns {','.join(FIELDS)}; the last four optional")
    source.add_argument("--stream", action="store_true", help="JSON lines on standard input, with the same fields")
    parser.add_argument("--out", type=Path, help="with --input: a new csv (default: INPUT.emotions.csv beside it)")
    parser.add_argument("--device", type=magtkd.device_name, help="cpu, cuda or cuda:N (default: cuda if there)")
    args = parser.parse_args(argv)
    return magtkd.run_command("predict", lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
