"""One conversation of a trained run through Eq. 1 to 25, as one would write it on a board.

    bash run.sh tour                                  # a conversation of runs/demo's test set
    bash run.sh tour --run runs/iemocap --conversation Ses05F_impro04

Every number comes from the functions of the five modules, called as the program calls them; what a function keeps to
itself (an attention row, a softmax) is listened to while it runs. The text goes to the terminal, and as Markdown with
links to the code to tour.md in the run's folder, beside a picture of the frames.

Not here: the method. This file computes none of it.
"""

import argparse
import dataclasses
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

import data
import encoders
import fusion
import losses
import magtkd
from data import Conversation, Corpus, InputError
from extras.cli import READERS
from extras.features import read_features
from extras.predict import load_run
from extras.released import build
from extras.tiny import read_demo
from fusion import MAGT, TEXT

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BARS = "▁▂▃▄▅▆▇█"
SHOWN = 16  # columns of an attention row: more do not fit on a line


class Board:
    """What is written: lines of Markdown, and every number in them under a name of its own."""

    def __init__(self, folder: Path):
        self.folder, self.lines, self.values = folder, [], {}

    def write(self, *lines: str) -> None:
        self.lines += lines

    def head(self, title: str, equations: str, *functions: Callable) -> None:
        """A section; its equations are a link to the code that computes them."""
        links = [f"[{name(f)}]({self.link(f)})" for f in functions]
        self.write("", f"## {title}", "", f"{equations}: {', '.join(links)}", "")

    def link(self, function: Callable) -> str:
        file = os.path.relpath(inspect.getsourcefile(function), self.folder.resolve())
        return f"{file}#L{inspect.getsourcelines(function)[1]}"

    def tensor(self, symbol: str, x: Tensor, row: int | None = None) -> str:
        """A line with a tensor's shape and its first numbers (of one row)."""
        self.values[symbol] = x
        first = x if row is None else x[row]
        numbers = " ".join(f"{v:+.3f}" for v in first.flatten()[:6].tolist())
        of = "" if row is None else f", row {row + 1}"
        return f"{symbol:<12} {list(x.shape)}{of}: {numbers}{' ..' if first.numel() > 6 else ''}"

    def number(self, symbol: str, x: Tensor | float) -> str:
        self.values[symbol] = float(x)
        return f"{symbol} = {float(x):.4f}"

    def block(self, *lines: str) -> None:
        """Lines in a fixed width."""
        self.write("```", *lines, "```")

    def text(self) -> str:
        """For a terminal: without links and fences."""
        kept = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", line) for line in self.lines if line != "```"]
        return "\n".join(line for line in kept if not line.startswith("!")) + "\n"


def name(function: Callable) -> str:
    return f"{Path(inspect.getsourcefile(function)).name}:{function.__qualname__}"


@contextmanager
def listen(owner, attribute: str) -> Iterator[list[Tensor]]:
    """What a function returns while this lasts, call by call."""
    function, heard = getattr(owner, attribute), []

    def heard_by_us(*args, **kwargs):
        heard.append(function(*args, **kwargs))
        return heard[-1]

    setattr(owner, attribute, heard_by_us)
    try:
        yield heard
    finally:
        setattr(owner, attribute, function)


@torch.inference_mode()
def tour(run: Path, wanted: str | None = None) -> Board:
    """Writes a conversation of a finished run on the board. Errors: InputError for a run that is none."""
    run = Path(run)
    model = load_run(run, torch.device("cpu"))  # encoders and fusion, as `predict` takes them
    if not isinstance(model.fusion, MAGT):
        raise InputError(f"{run}: its fusion model is {type(model.fusion).__name__}; the tour walks through MAGT")
    settings = json.loads((run / "config.json").read_text())
    known = {field.name for field in dataclasses.fields(magtkd.Config)}
    config = magtkd.Config(**{key: x for key, x in settings.items() if key in known})
    corpus = read_demo(run) if (run / "corpus").exists() else READERS[settings["corpus"]](Path(settings["root"]))
    conversation = choose(corpus, wanted)
    u = len(conversation.utterances) // 2  # the utterance that is looked at
    board = Board(run)

    made_up = " **It is made up: its numbers say nothing about people.**" if settings["corpus"] == "demo" else ""
    board.write(f"# A conversation through Eq. 1 to 25: {conversation.id} of {corpus.name}", "")
    board.write(f"The utterance marked with > is the one that is looked at.{made_up}", "")
    board.block(
        *(
            f"{'>' if i == u else ' '} {i + 1:>2} {x.speaker:<7} [{corpus.label_names[x.label]}] {x.text}"
            for i, x in enumerate(conversation.utterances)
        )
    )
    answers = stage1(board, run, model, config, corpus, conversation, u)
    distillation(board, answers, conversation, u)
    stage2(board, run, model, config, conversation, answers, u)
    return board


def choose(corpus: Corpus, wanted: str | None) -> Conversation:
    """The one that was asked for, or the shortest of test that has four utterances."""
    everyone = [c for split in data.SPLITS for c in corpus.splits[split]]
    if wanted is None:
        test = corpus.splits["test"]
        return min(test, key=lambda c: (len(c.utterances) < 4, len(c.utterances), c.id))
    found = [c for c in everyone if c.id == wanted]
    if not found:
        raise InputError(f"--conversation {wanted}: there is none; test has {test_names(corpus)}")
    return found[0]


def test_names(corpus: Corpus) -> str:
    names = [c.id for c in corpus.splits["test"]]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# Stage 1


def stage1(board, run, model, config, corpus, conversation, u) -> dict[str, data.Encoded]:
    """Eq. 1-5: from words, sound and frames to features. Returns modality -> answers of the conversation."""
    alone = dataclasses.replace(corpus, splits={"train": (), "dev": (), "test": (conversation,)})
    wanted = tuple(m for m in model.encoders if m != TEXT)
    store = encoders.MediaStore(run / "media", wanted, *model.video_shape)
    store.fill(list(conversation.utterances), workers=os.cpu_count() or 1)
    ids, spoken = [x.id for x in conversation.utterances], conversation.utterances[u]
    answers = {}
    for m, encoder in model.encoders.items():
        examples = magtkd.make_examples(encoder, m, alone, store)
        answers[m] = magtkd.encode(encoder, examples, ids, config.precision)
        here = ids[u] in examples.lengths
        example = examples.get(ids[u]) if here else None
        if m == TEXT:
            board.head("Words: the prompt and the feature at its mask", "Eq. 1-3", type(encoder).prompts, type(encoder))
            shown = [encoder.tokenizer.decode([token]) for token in example]
            words = " ".join(token.strip() or "_" for token in shown)
            mask = max(i for i, token in enumerate(example) if token == encoder.tokenizer.mask_token_id)
            board.values["tokens"], board.values["mask"] = example, mask
            end = " Its oldest words were cut off." if len(example) == encoder.max_tokens else ""
            board.write(f"<s> C_k </s> P_k </s> has {len(example)} tokens, the mask is token {mask + 1}.{end}", "")
            board.block(*wrap(words))
        elif m == "audio":
            board.head("Sound: the mean over the frames of the encoder", "Eq. 4", encoders.load_audio, type(encoder))
            board.write(*(sound_lines(example) if here else [f"Utterance {u + 1} has no sound."]), "")
        else:
            board.head("Pictures: the encoder's answer to the frames", "Eq. 5", encoders.load_frames, type(encoder))
            if here:
                strip = example.permute(2, 0, 3, 1).flatten(1, 2)  # [height, frames * width, 3]
                large = strip.repeat_interleave(3, 0).repeat_interleave(3, 1) if strip.shape[0] < 100 else strip
                plt.imsave(run / "tour-frames.png", large.numpy())
                when = (
                    "" if spoken.start is None else f", from {spoken.start:.2f} to {spoken.end:.2f} s and a second more"
                )
                board.write(f"{list(example.shape)}, bytes{when}; as a strip in tour-frames.png", "")
                board.write("![The frames](tour-frames.png)", "")
            else:
                board.write(f"Utterance {u + 1} has no pictures.", "")
        if here:
            board.block(
                board.tensor(f"F_{m[0]}", answers[m].features, u), board.tensor(f"logits_{m[0]}", answers[m].logits, u)
            )
    return answers


def wrap(words: str, width: int = 100) -> list[str]:
    lines = [""]
    for word in words.split(" "):
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f"{word} "
    return [line.rstrip() for line in lines]


def sound_lines(x: Tensor, bars: int = 60) -> list[str]:
    """Length and loudness of a sound, [T] at 16 kHz."""
    parts = [float(part.square().mean().sqrt()) for part in x.chunk(bars)]
    loud = "".join(BARS[min(7, int(8 * p / (max(parts) or 1)))] for p in parts)
    return [
        f"{len(x) / encoders.RATE:.2f} s, {len(x):,} samples, {x.min():+.2f} to {x.max():+.2f}. Loudness:",
        "",
        loud,
    ]


def distillation(board: Board, answers: dict[str, data.Encoded], conversation: Conversation, u: int) -> None:
    """Eq. 6-14, with the conversation as the batch."""
    labels = torch.tensor([x.label for x in conversation.utterances])
    functions = (losses.pearson_distance, losses.soft_label_loss, losses.feature_loss, losses.stage1_loss)
    board.head("What text teaches: the losses of stage 1", "Eq. 6-14", *functions)
    board.write(
        "The conversation is the batch here. L_s wants the student's classes in the teacher's order (a row of Y). L_f "
        "wants the batch to look alike in both spaces (a row of T and of S: whom does this utterance resemble?).",
        "",
    )
    text = answers[TEXT]
    board.block(board.number("text: L_CE (13)", losses.cross_entropy(text.logits, labels)))
    for m in (m for m in answers if m != TEXT):
        there = (~answers[m].features.isnan().any(dim=1)).nonzero().flatten()
        if not len(there):
            board.write("", f"No utterance has {m}.")
            continue
        row = there.tolist().index(u) if u in there else 0
        s_features, s_logits = (x[there] for x in answers[m])
        t_features, t_logits = (x[there] for x in text)
        with listen(losses.F, "softmax") as y:
            l_s = losses.soft_label_loss(s_logits, t_logits)
        with listen(losses.F, "log_softmax") as logs:
            l_f = losses.feature_loss(s_features, t_features)
        l_ce = losses.cross_entropy(s_logits, labels[there])
        both = losses.stage1_loss(s_logits, labels[there], s_features, t_logits, t_features)
        board.write("", f"{m} learns from text, with {len(there)} utterances:", "")
        board.block(
            board.tensor(f"Y^t_{m} (7)", y[1], row),
            board.tensor(f"Y^s_{m} (8)", y[0], row),
            board.number(f"d(Y^s, Y^t) of this row, {m} (6)", losses.pearson_distance(y[0][row], y[1][row])),
            board.number(f"L_s {m} (9)", l_s),
            board.tensor(f"T_i {m} (10)", logs[0].exp(), row),
            board.tensor(f"S_i {m} (11)", logs[1].exp(), row),
            board.number(f"L_f {m} (12)", l_f),
            board.number(f"L_CE {m} (13)", l_ce),
            board.number(f"L_all {m} = L_CE + L_s + L_f (14)", both),
        )


# Stage 2


def stage2(board, run, model, config, conversation, answers, u) -> None:
    """Eq. 15-25, from the feature file."""
    file = read_features(run / "features.safetensors")
    _, kinds = magtkd.load_fusion(run / "fusion.safetensors", build)
    rows = data.Conversations(file, kinds, torch.device("cpu"))
    batch = rows.batch([conversation.id])
    features, speakers, lengths, present = batch.inputs
    net = model.fusion
    here = {m: ~answers[m].features.isnan().any(dim=1) for m in features}
    gap = max(float((features[m] - answers[m].features)[here[m]].abs().max()) for m in features if here[m].any())

    board.head(
        "From the feature file to H", "Eq. 15-18", MAGT.tag, fusion.sinusoidal_positions, fusion.speaker_embedding
    )
    board.write(f"The feature file against the features above: {board.number('largest difference', gap)}.", "")
    h, tags = net.tag(features, speakers, lengths, present, None)
    position = fusion.sinusoidal_positions(lengths[0], net.config.width)
    board.block(
        board.tensor("PE (15, 16)", position, u),
        board.tensor("SE (17)", net.speaker(speakers), u),
        *(board.tensor(f"H_{m[0]} (18)", x, u) for m, x in h.items()),
    )
    out, heard = walk(net, batch.inputs)
    names = list(net.config.widths)
    order = [m for m in names if m != TEXT] + [TEXT]

    board.head("Who reads whom", "Eq. 19, 20", fusion.Block, fusion.Anchor)
    board.write(
        f"source -> anchor: the anchor's utterance {u + 1} asks, the source's utterances answer. How much of its "
        "attention each of them gets, in percent, mean of the heads.",
        "",
    )
    board.values["attention"] = {stream: x["attention"] for stream, x in heard.items()}
    width = max(len(f"{s} -> {a}") for a, s in heard)
    first = max(0, min(u - SHOWN // 2, lengths[0] - SHOWN))
    columns = range(first, min(lengths[0], first + SHOWN))
    lines = [f"{'':{width}} {''.join(f'{i + 1:>5}' for i in columns)}"]
    for anchor in order:
        for source in names:
            row = heard[anchor, source]["attention"][u].tolist()
            lines.append(f"{f'{source} -> {anchor}':{width}} {''.join(f'{100 * row[i]:>5.0f}' for i in columns)}")
    board.block(*lines)

    board.head("The gates", "Eq. 21, 22", fusion.Anchor.alpha, fusion.Anchor)
    board.write(f"Mean gate of utterance {u + 1}, and the length of its answer before and after it.", "")
    lines = []
    for anchor in order:
        for source in names:
            x = heard[anchor, source]
            gate = board.number(f"gate {source} -> {anchor} (21)", x["gate"][u].mean())
            before, after = x["answer"][u].norm(), (x["answer"] * x["gate"])[u].norm()
            board.values[f"gated {source} -> {anchor}"] = float(after)
            lines.append(f"{gate:<38} |H| {before:.2f} -> |H'| {after:.2f} (22)")
    board.block(*lines)
    board.write("", f"Anchors in this order: {', '.join(order)}. What they end with, enriched:", "")
    board.block(*(board.tensor(f"{m[0]}'", out.hidden[m], u) for m in order))

    board.head("The answer", "Eq. 23", MAGT.answer)
    p = out.logits[TEXT][u].softmax(dim=-1)  # Eq. 23
    board.values["probabilities"] = p
    guess, label = int(p.argmax()), int(batch.labels[u])
    board.block(
        *(f"{name:<10} {100 * x:5.1f} % {'#' * round(30 * x)}" for name, x in zip(file.label_names, p.tolist())),
        f"The answer: {file.label_names[guess]}. It was labelled {file.label_names[label]}.",
    )
    right = int((out.logits[TEXT].argmax(dim=-1) == batch.labels).sum())
    board.write("", f"In this conversation {right} of {lengths[0]} answers are right.")

    board.head("The losses of stage 2", "Eq. 24, 25", magtkd.fusion_losses, losses.stage2_loss)
    terms = magtkd.fusion_losses(out, batch, config)
    lines = [board.number("L_CE (13)", terms["l_ce"])]
    for m in (m for m in order if m != TEXT):
        parts = [(f"L_s {m}, stage 2 (9)", "l_s"), (f"L_f {m}, stage 2 (12)", "l_f"), (f"L_KD {m} (24)", "kd")]
        lines.append("   ".join(board.number(symbol, terms[f"{key}_{m}"]) for symbol, key in parts))
    weights = f"alpha {config.alpha:g}, beta {config.beta:g}"
    board.block(*lines, f"{board.number('L_total (25)', terms['loss'])}   with {weights}")


def walk(net: MAGT, inputs: tuple) -> tuple[fusion.FusionOutput, dict[tuple[str, str], dict[str, Tensor]]]:
    """The model's output, and per (anchor, source) its "attention" [U, U] (mean of the heads), "gate" and "answer".

    inputs: of one conversation. The attention weights are what `Block.attend_one` makes of values that are 1 at one
    utterance and 0 at the others.
    """
    heard: dict[tuple[str, str], dict[str, Tensor]] = {}
    seen: list[Tensor] = []  # by the last block that answered: its gate is asked next

    def after_block(block: fusion.Block, args: tuple, _) -> None:
        anchor, source, (length,), readable, _ = args
        keys, _ = block.key_value(source).chunk(2, dim=-1)
        each = torch.eye(length).repeat(1, block.heads)  # [U, heads * U]
        attention = block.attend_one(block.query(anchor), keys, each, readable)
        seen[:] = [attention.unflatten(-1, (block.heads, length)).mean(dim=1)]

    def after_gate(anchor: fusion.Anchor):
        alpha = anchor.alpha

        def gate(source: str, h: Tensor) -> Tensor:
            heard[anchor.name, source] = {"attention": seen[0], "answer": h, "gate": alpha(source, h)}
            return heard[anchor.name, source]["gate"]

        return gate

    blocks = {block for anchor in net.anchor.values() for block in anchor.block.values()}
    hooks = [block.register_forward_hook(after_block) for block in blocks]
    for anchor in net.anchor.values():
        anchor.alpha = after_gate(anchor)
    try:
        return net(*inputs), heard
    finally:
        for hook in hooks:
            hook.remove()
        for anchor in net.anchor.values():
            del anchor.alpha


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns 0, or 2 for the user's error (a line on stderr says which)."""
    parser = argparse.ArgumentParser(prog="tour", description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished run (default: runs/demo)")
    parser.add_argument("--conversation", metavar="ID", help="which one (default: the shortest of test)")
    args = parser.parse_args(argv)
    try:
        board = tour(args.run, args.conversation)
        markdown = "\n".join(board.lines) + "\n"
        data.replace_file(args.run / "tour.md", lambda part: part.write_text(markdown, encoding="utf-8"))
        print(f"{board.text()}\nWith links to the code, and the frames: {args.run / 'tour.md'}")
        return 0
    except InputError as e:
        print(f"tour: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
