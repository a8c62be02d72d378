"""Emotions of a conversation of one's own, by the models of a finished run.

    bash run.sh predict --run runs/demo --input conversation.csv     # a table, and conversation.emotions.csv
    bash run.sh predict --run runs/live --stream                     # JSON lines in, an answer to each as it comes

An utterance has a speaker and text, and may have audio and video: files that PyAV reads, with their paths relative to
the csv (--stream: to where one stands). Without audio the sound of the video is taken. start and end, in seconds, say
where the utterance lies in these files; without them it is all of the file. A sound file of the utterance alone, as
long as it and ending before `end`, is taken whole, so that it can stand beside a film of the conversation. What is
missing or broken is marked, and counts as zero that no other utterance reads, as in training.

Not here: reading the csv (conversation.py), training (magtkd.py), the encoders (encoders.py), the fusion (fusion.py).
"""

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds: quiet. guard.py goes on from there
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import csv
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn

from data import Conversation, InputError, MediaError, Utterance, replace_file
from encoders import load_audio, load_frames, video_shape
from extras.conversation import FIELDS, make_utterance, read_conversation
from extras.features import read_features
from extras.guard import device, guard
from extras.released import build
from extras.runs import read_json
from fusion import MAGT, TEXT, Past
from magtkd import Config, Examples, encode, load_fusion, make_encoder

ALONE = 0.5  # seconds by which a sound file of one utterance may differ from its length


@dataclass(frozen=True)
class Model:
    """What a run has learned."""

    encoders: dict[str, nn.Module]  # modality ->
    fusion: nn.Module
    label_names: list[str]
    speakers: dict[str, int]  # those of train, from 1; others get 0
    video_shape: tuple[int, int]  # frames; pixels


@dataclass(frozen=True)
class Answer:
    utterance: Utterance
    probabilities: list[float]  # one per label
    missing: list[str]  # "audio (why)", ...


def load_run(folder: Path, device: torch.device) -> Model:
    """The encoders and the fusion model that a finished run left. Errors: InputError, if it is not finished."""
    folder = Path(folder)
    need_files(folder, ["config.json", "fusion.safetensors"])
    config = read_json(folder / "config.json", "start the run again, it is made anew")
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'}: not of this program; start the run again, it is made anew")
    if "features" in config:
        raise InputError(
            f"{folder} was trained on a feature file, so it has no encoders; give a run on a corpus, say runs/demo"
        )
    fusion, kinds = load_fusion(folder / "fusion.safetensors", build)
    need_files(folder, ["features.safetensors", *(f"{kind}.safetensors" for kind in kinds)])
    file = read_features(folder / "features.safetensors")
    if (folder / "tiny").exists():
        config |= {f"{m}_model": str(folder / "tiny" / m) for m in ("text", "audio", "video")}
    config = read_config(folder / "config.json", config)
    encoders = {}
    for kind in kinds:
        encoder = make_encoder(kind, config, len(file.label_names))
        try:
            load_model(encoder, folder / f"{kind}.safetensors")
        except (SafetensorError, RuntimeError, OSError) as e:
            path = folder / f"{kind}.safetensors"
            raise InputError(f"{path}: not the weights of this run's encoder ({type(e).__name__})") from e
        encoders[kind.removesuffix("_kd")] = encoder.to(device)
    seen = file.speaker[file.split == 0].unique().tolist()
    speakers = {file.speaker_names[i]: i + 1 for i in seen}
    shape = video_shape(config.video_model) if "video" in encoders else (0, 0)
    return Model(encoders, fusion.to(device), file.label_names, speakers, shape)


def read_config(path: Path, options: dict) -> Config:
    """The run's configuration. Errors: InputError if a field is of another type than it was written with."""
    fields = {}
    for field in dataclasses.fields(Config):
        x, default = options.get(field.name), getattr(Config(), field.name)
        wanted = (
            (list, tuple) if isinstance(default, tuple) else (int, float) if type(default) is float else type(default)
        )
        if field.name in options and not (isinstance(x, wanted) and isinstance(x, bool) == isinstance(default, bool)):
            raise InputError(f"{path}: {field.name} is damaged; start the run again, it is made anew")
        fields[field.name] = options.get(field.name, default)
    return Config(**fields)


def need_files(folder: Path, names: list[str]) -> None:
    if lacking := [name for name in names if not (folder / name).is_file()]:
        raise InputError(
            f"{folder} is no finished run: {', '.join(lacking)} missing. The command that began it goes on with it "
            "(bash run.sh demo, say, for runs/demo)"
        )


def speaker_indices(model: Model, conversation: Conversation) -> Tensor:
    """[U] int64. By name; in order of appearance where the run's speakers are "first" and "second", as IEMOCAP's."""
    names = [u.speaker for u in conversation.utterances]
    if model.speakers.keys() <= {"first", "second"}:
        order = dict(zip(dict.fromkeys(names), ("first", "second")))
        names = [order.get(name, "") for name in names]
    return torch.tensor([model.speakers.get(name, 0) for name in names])


def sound_window(u: Utterance) -> tuple[float, float | None]:
    """From where to where, in seconds, its sound file is read: all of it, if the file holds this utterance alone."""
    start = u.start or 0.0
    if u.end is not None and u.video not in (None, u.audio) and os.path.isfile(u.audio):
        try:
            with av.open(str(u.audio)) as container:
                length = (container.duration or 0) / av.time_base
        except (av.FFmpegError, OSError, ValueError):
            return start, u.end  # load_audio will say what is wrong with it
        if length < u.end and abs(length - (u.end - start)) <= ALONE:
            return 0.0, None
    return start, u.end


def decode(utterance: Utterance, modality: str, shape: tuple[int, int]) -> Tensor | MediaError:
    """Its sound or its frames, or why there are none, whatever a file makes a decoder raise."""
    try:
        if getattr(utterance, modality) is None:
            raise MediaError("none given")
        if modality == "audio":
            return load_audio(utterance.audio, *sound_window(utterance))
        return load_frames(utterance.video, utterance.start, utterance.end, *shape)
    except MediaError as e:
        return e
    except Exception as e:
        size = os.path.getsize(getattr(utterance, modality))
        return MediaError(f"broken, {size} bytes ({type(e).__name__})" if size else "empty file")


def encode_utterances(
    model: Model, conversation: Conversation, first: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[list[str]]]:
    """The features of the utterances from number `first` on.

    Returns features {modality: [U, d]}, zero where missing; present {modality: [U]}; per utterance what is missing.
    """
    utterances = conversation.utterances[first:]
    missing = [[] if u.text else ["text (none given)"] for u in utterances]
    features, present = {}, {}
    for m, encoder in model.encoders.items():
        if m == TEXT:
            examples = encoder.prompts(conversation)[first:]
        else:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                examples = list(pool.map(lambda u, m=m: decode(u, m, model.video_shape), utterances))
            for x, notes in zip(examples, missing):
                if isinstance(x, MediaError):
                    notes.append(f"{m} ({x})")
        having = {u.id: x for u, x in zip(utterances, examples) if not isinstance(x, MediaError)}
        examples = Examples(having.get, {i: len(x) for i, x in having.items()})
        answers = encode(encoder, examples, [u.id for u in utterances])
        features[m], present[m] = answers.features.nan_to_num(), ~answers.features.isnan().any(dim=1)
    return features, present, missing


@torch.inference_mode()
def predict(model: Model, conversation: Conversation) -> list[Answer]:
    """An answer per utterance of a whole conversation."""
    device = next(model.fusion.parameters()).device
    features, present, missing = encode_utterances(model, conversation)
    features, present = ({m: x.to(device) for m, x in part.items()} for part in (features, present))
    speakers = speaker_indices(model, conversation).to(device)
    probabilities = model.fusion(features, speakers, [len(speakers)], present).logits[TEXT].softmax(dim=-1).tolist()
    return [Answer(*parts) for parts in zip(conversation.utterances, probabilities, missing)]


class Stream:
    """A conversation as it happens: `add` answers each utterance from what was said before it."""

    def __init__(self, model: Model):
        if not (isinstance(model.fusion, MAGT) and model.fusion.config.causal):
            raise InputError(
                "--stream needs a fusion model that does not read the future; train one with --causal, "
                "say bash run.sh demo --causal --out runs/live"
            )
        self.model, self.past, self.said = model, Past(), ()

    @torch.inference_mode()
    def add(self, utterance: Utterance) -> Answer:
        said = (*self.said, utterance)
        conversation, last = Conversation("stream", said), len(said) - 1
        device = next(self.model.fusion.parameters()).device
        features, present, missing = encode_utterances(self.model, conversation, last)
        features, present = ({m: x.to(device) for m, x in part.items()} for part in (features, present))
        speaker = speaker_indices(self.model, conversation)[-1:].to(device)
        logits = self.model.fusion.step(self.past, features, speaker, present).logits[TEXT]
        self.said = said
        return Answer(utterance, logits[0].softmax(dim=-1).tolist(), missing[0])


def answer_stream(model: Model, lines: Iterator[str]) -> None:
    """Prints a JSON line for every line. Errors: InputError at the end, if any line was no utterance."""
    stream, bad = Stream(model), 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            row = json.loads(line.removeprefix("\ufeff"))
            if not isinstance(row, dict):
                raise InputError(f"{where}: wanted an object with {', '.join(FIELDS)}")
            answer = stream.add(make_utterance(row, where, str(number), Path()))
            text = json.dumps(as_row(answer, model.label_names), ensure_ascii=False)
        except InputError as e:
            text, bad = json.dumps({"error": str(e)}), bad + 1
        except (ValueError, RecursionError) as e:
            text, bad = json.dumps({"error": f"{where}: no JSON ({e})"}), bad + 1
        print(text, flush=True)
    if bad:
        raise InputError(f"{bad} lines were no utterances and were left out; their answers say why")


def as_row(answer: Answer, label_names: list[str]) -> dict:
    p = dict(zip(label_names, answer.probabilities))
    head = {"speaker": answer.utterance.speaker, "text": answer.utterance.text, "emotion": max(p, key=p.get)}
    return {**head, "probabilities": {name: round(x, 4) for name, x in p.items()}, "missing": answer.missing}


def table(answers: list[Answer], label_names: list[str]) -> str:
    """Lines for a terminal: probabilities in percent."""
    rows = [["", "speaker", "text", "emotion", *(f"%{name}" for name in label_names), "missing"]]
    for i, row in enumerate((as_row(a, label_names) for a in answers), 1):
        text = row["text"] if len(row["text"]) <= 40 else row["text"][:39] + "…"
        numbers = [f"{100 * x:.0f}" for x in row["probabilities"].values()]
        rows.append([str(i), row["speaker"], text, row["emotion"], *numbers, ", ".join(row["missing"])])
    widths = [max(map(len, column)) for column in zip(*rows)]
    right = range(4, 4 + len(label_names))
    return "\n".join(
        "  ".join(x.rjust(w) if c in right else x.ljust(w) for c, (x, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    )


def write_csv(path: Path, answers: list[Answer], label_names: list[str]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["speaker", "text", "emotion", *(f"p_{name}" for name in label_names), "missing"])
        for row in (as_row(a, label_names) for a in answers):
            numbers = row["probabilities"].values()
            writer.writerow([row["speaker"], row["text"], row["emotion"], *numbers, "; ".join(row["missing"])])


def check_out(out: Path, conversation: Conversation, source: Path, run: Path) -> None:
    """Errors: InputError if the answers would overwrite what is read: the csv, its sounds and films, or the run."""
    read = {source, *(path for u in conversation.utterances for path in (u.audio, u.video) if path is not None)}
    if out.is_dir() or os.path.realpath(out) in {os.path.realpath(path) for path in read}:
        what = "a folder" if out.is_dir() else "read for these answers"
        raise InputError(f"{out}: is {what}; give another file with --out")
    if Path(os.path.realpath(run)) in Path(os.path.realpath(out)).parents:
        raise InputError(f"{out}: lies in the run's folder, where only the run writes; give another file with --out")


def work(args: argparse.Namespace) -> None:
    if args.stream:
        return answer_stream(load_run(args.run, torch.device(args.device)), sys.stdin)
    conversation, out = read_conversation(args.input), args.out or args.input.with_suffix(".emotions.csv")
    check_out(out, conversation, args.input, args.run)
    model = load_run(args.run, torch.device(args.device))
    answers = predict(model, conversation)
    print(table(answers, model.label_names))
    replace_file(out, lambda part: write_csv(part, answers, model.label_names))
    print(f"\n{out}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit code, see guard.py; a line on stderr says what it is about."""
    parser = argparse.ArgumentParser(prog="predict", description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="the folder of a finished run, say runs/demo")
    source = parser.add_mutually_exclusive_group(required=True)
    text = f"csv with the columns {','.join(FIELDS)}; the last four may be absent"
    source.add_argument("--input", type=Path, help=text)
    source.add_argument("--stream", action="store_true", help="JSON lines on standard input, with the same fields")
    text = "the csv that is written (default: INPUT.emotions.csv beside the input)"
    parser.add_argument("--out", type=Path, help=text)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=here, help="cpu, cuda or cuda:N (default: cuda if there)")
    args = parser.parse_args(argv)
    return guard("predict", lambda: work(args), args.run, "stopped")


if __name__ == "__main__":
    sys.exit(main())
