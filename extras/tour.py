"""One conversation of a finished run through Eq. 1 to 25, as on a blackboard.

    bash run.sh tour                                  # a conversation of runs/demo's test set
    bash run.sh tour --run runs/iemocap --conversation Ses05F_impro04

Every number comes from the functions of the five modules, called as training calls them. What they do not return (a
softmax, an attention weight) is computed here. The text is printed, and written to tour.md in the run's folder.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import encoders
import fusion
import losses
import magtkd
from data import Conversation, Corpus, Encoded, InputError
from extras import demo, predict
from fusion import MAGT, TEXT

TITLE = "A conversation through Eq. 1 to 25"
CHANGED = "bring the corpus back, or start the run's own command again"
TOLERANCE = 0.05  # relative difference to the run's features: bfloat16 on a GPU gives 0.01, other media more


class Board:
    """Lines of Markdown, and every number in them under a name of its own."""

    def __init__(self):
        self.lines, self.values = [], {}

    def write(self, *lines: str) -> None:
        self.lines += lines

    def block(self, *lines: str) -> None:
        self.lines += [f"    {line}" for line in lines]

    def head(self, title: str, equations: str, *functions: Callable) -> None:
        names = ", ".join(f"{f.__module__}.{f.__qualname__}" for f in functions)
        self.write("", f"## {title}", "", f"{equations}: {names}", "")

    def tensor(self, symbol: str, x: Tensor, row: int) -> str:
        """A line with the shape of a tensor, [N, d], and the first numbers of one row."""
        self.values[symbol] = x
        numbers = " ".join(f"{v:+.3f}" for v in x[row, :6].tolist())
        return f"{symbol:<12} {list(x.shape)}, row {row + 1}: {numbers}{' ..' if x.shape[1] > 6 else ''}"

    def number(self, symbol: str, x: Tensor | float) -> str:
        self.values[symbol] = float(x)
        return f"{symbol} = {float(x):.4f}"


@torch.inference_mode()
def walk(run: Path, wanted: str | None = None) -> Board:
    """A conversation of a finished run, from Eq. 1 to 25. Errors: InputError, also if its corpus has changed since."""
    board, model = Board(), predict.load_run(run, torch.device("cpu"))
    options = magtkd.read_config(run)[1]
    reader = magtkd.READERS.get(options["corpus"])  # none for the demo
    corpus = reader(Path(options["root"])) if reader else demo.read_demo(run)
    check_labels(run, model, corpus)
    conversations = {c.id: c for split in data.SPLITS for c in corpus.splits[split]}
    wanted = wanted or min(corpus.splits["test"], key=lambda c: abs(len(c.utterances) - 6)).id  # it fits on a screen
    if wanted not in conversations:
        some = ", ".join(c.id for c in corpus.splits["test"][:5])
        raise InputError(f"--conversation {wanted}: there is none of this name; test has {some}, ..")
    conversation = conversations[wanted]
    u = len(conversation.utterances) // 2  # the utterance that is shown in detail

    board.write(f"# {TITLE}: {conversation.id} of {corpus.name}", "", "Shown in detail: the one marked with >.", "")
    for i, x in enumerate(conversation.utterances):
        board.block(f"{'>' if i == u else ' '} {i + 1:>2} {x.speaker:<7} [{corpus.label_names[x.label]}] {x.text}")
    encoded = stage1(board, model, conversation, u)
    distillation(board, encoded, conversation, u)
    stage2(board, model, conversation, encoded, u)
    return board


def check_labels(run: Path, model: predict.Model, corpus: Corpus) -> None:
    """Errors: InputError if the corpus has other utterances, labels or text than the run was made from."""
    parts = magtkd.stage1_parts(model.config, [TEXT], corpus, None, magtkd.Run(run, "", None), 0)
    before = magtkd.about(run / f"{TEXT}.features.safetensors")["made_from"]
    same_text = before.get("inputs") == parts[TEXT].features["inputs"]
    labels = [corpus.label_names[u.label] for u in corpus.utterances()]
    if not same_text or labels != [model.file.label_names[i] for i in model.file.label]:
        raise InputError(f"{corpus.name}: has other utterances, labels or text than {run} was made from; {CHANGED}")


def stage1(board: Board, model: predict.Model, conversation: Conversation, u: int) -> dict[str, Encoded]:
    """Eq. 1-5: from text, audio and frames to features. Returns modality -> output for the conversation."""
    ids, encoded = [x.id for x in conversation.utterances], {}
    titles = {
        TEXT: ("Text: the prompt and the feature at its mask", "Eq. 1-3", encoders.TextEncoder.prompts),
        "audio": ("Audio: the mean over the encoder's frames", "Eq. 4", encoders.load_audio),
        "video": ("Video: the encoder's output for the frames", "Eq. 5", encoders.load_frames),
    }
    for m, encoder in model.encoders.items():
        examples, _ = predict.load_examples(model, m, conversation)
        encoded[m] = magtkd.encode(encoder, examples, ids, model.config.precision)
        board.head(*titles[m], type(encoder))
        if ids[u] not in examples.lengths:
            board.write(f"Utterance {u + 1} has no {m}.")
            continue
        example = examples.get(ids[u])
        if m == TEXT:
            tokens = [encoder.tokenizer.decode([token]).strip() or "_" for token in example]
            board.write(f"<s> C_k </s> P_k </s> has {len(example)} tokens.", "")
            board.block(*(" ".join(tokens[i : i + 16]) for i in range(0, len(tokens), 16)))
        else:
            board.write(f"{list(example.shape)}, {example.dtype}", "")
        x = encoded[m]
        board.block(board.tensor(f"F_{m[0]}", x.features, u), board.tensor(f"logits_{m[0]}", x.logits, u))
    return encoded


def distillation(board: Board, encoded: dict[str, Encoded], conversation: Conversation, u: int) -> None:
    """Eq. 6-14, with the conversation as the batch."""
    labels = torch.tensor([x.label for x in conversation.utterances])
    functions = (losses.pearson_distance, losses.soft_label_loss, losses.feature_loss, losses.stage1_loss)
    board.head("What text teaches: the paper's losses, with the conversation as the batch", "Eq. 6-14", *functions)
    text = encoded[TEXT]
    board.block(board.number("text: L_CE (13)", losses.cross_entropy(text.logits, labels)))
    for m in (m for m in encoded if m != TEXT):
        there = (~encoded[m].features.isnan().any(dim=1)).nonzero().flatten()
        if not len(there):
            board.write("", f"No utterance has {m}.")
            continue
        row = there.tolist().index(u) if u in there else 0
        student, teacher = (Encoded(*(x[there] for x in of)) for of in (encoded[m], text))
        loss = losses.stage1_loss(student.logits, labels[there], student.features, teacher.logits, teacher.features)
        y_s, y_t = (x.logits.div(2).softmax(dim=1) for x in (student, teacher))  # Eq. 7, 8, tau = 2
        f_s, f_t = (F.normalize(x.features) for x in (student, teacher))
        t, s = ((f_t @ f.T).softmax(dim=1) for f in (f_t, f_s))  # Eq. 10, 11, tau = 1
        board.write("", f"{m} as the student of text, with {len(there)} utterances:", "")
        board.block(
            board.tensor(f"Y^t_{m} (7)", y_t, row),
            board.tensor(f"Y^s_{m} (8)", y_s, row),
            board.number(f"d(Y^s, Y^t) of this row, {m} (6)", losses.pearson_distance(y_s[row], y_t[row])),
            board.number(f"L_s {m} (9)", loss["l_s"]),
            board.tensor(f"T_i {m} (10)", t, row),
            board.tensor(f"S_i {m} (11)", s, row),
            board.number(f"L_f {m} (12)", loss["l_f"]),
            board.number(f"L_CE {m} (13)", loss["l_ce"]),
            board.number(f"L_all {m} = L_CE + L_s + L_f (14)", loss["loss"]),
        )


def stage2(board: Board, model: predict.Model, conversation: Conversation, encoded: dict[str, Encoded], u: int) -> None:
    """Eq. 15-25, from the feature file. Errors: InputError if the features above are not those of the file."""
    batch = data.Conversations(model.file, model.kinds, torch.device("cpu")).batch([conversation.id])
    features, speakers, lengths, present = batch.inputs
    net, out = model.fusion, model.fusion(*batch.inputs)
    now = {m: x.features.nan_to_num() for m, x in encoded.items()}
    gap = max(float((x - now[m]).norm() / x.norm().clamp(min=1e-6)) for m, x in features.items())
    if gap > TOLERANCE:
        raise InputError(f"{conversation.id}: the run's features were made from other media than today's; {CHANGED}")

    board.head("From features to H", "Eq. 15-18", MAGT.inputs, fusion.positions_and_speakers)
    board.write(f"The feature file against the features above: {board.number('relative difference', gap)}.", "")
    h = net.inputs(features, speakers, lengths, present)
    positions = fusion.sinusoidal_positions(lengths[0], net.config.width)
    board.block(board.tensor("PE (15, 16)", positions, u), board.tensor("SE (17)", net.speaker(speakers), u))
    board.block(*(board.tensor(f"H_{m[0]} (18)", x, u) for m, x in h.items()))

    board.head("Streams and gates", "Eq. 19-22", fusion.Block, fusion.Anchor.stream, fusion.Anchor.alpha, fusion.Anchor)
    board.write("source -> anchor, its gate, its norm before and after the gate, the largest attention weights:", "")
    audio_and_video = {m: x for m, x in out.hidden.items() if m != TEXT}
    sources = {**net.enriched(audio_and_video, speakers, lengths), TEXT: h[TEXT]}  # of the text anchor
    for anchor in out.hidden:  # audio, video, text
        for source, x in (sources if anchor == TEXT else h).items():
            name, there = f"{source} -> {anchor}", present.get(source)
            weights = attention_weights(net.anchor[anchor].block[source], h[anchor], x, there)
            stream = net.anchor[anchor].stream(source, h[anchor], x, lengths, there)  # Eq. 19, 20
            gated = stream * out.gates[anchor][source]  # Eq. 22
            board.values[f"attention {name}"] = weights
            largest = zip(*(x.tolist() for x in weights[u].topk(min(5, len(weights)))))
            attention = ", ".join(f"{i + 1}: {100 * weight:.0f} %" for weight, i in largest)
            gate = board.number(f"gate {name} (21)", out.gates[anchor][source][u].mean())
            board.block(f"{gate:<38} |H| {stream[u].norm():.2f} -> |H'| {gated[u].norm():.2f}   {attention}")
    board.block(*(board.tensor(f"{m[0]}'", x, u) for m, x in out.hidden.items()))

    board.head("The prediction", "Eq. 23", MAGT.forward)
    p, label_names = out.logits[TEXT][u].softmax(dim=-1), model.file.label_names  # Eq. 23
    board.values["probabilities"] = p
    board.block(*(f"{name:<10} {100 * x:5.1f} %" for name, x in zip(label_names, p.tolist())))
    board.block(f"Predicted: {label_names[int(p.argmax())]}. Labelled: {label_names[int(batch.labels[u])]}.")

    board.head("The losses of stage 2", "Eq. 24, 25", losses.distillation_loss, losses.stage2_loss)
    alpha, beta = model.config.alpha, model.config.beta
    terms = losses.stage2_loss(out.logits, out.hidden, batch.labels, alpha, beta, batch.rows)
    board.block(board.number("L_CE (13)", terms["l_ce"]))
    for m in audio_and_video:
        parts = [(f"L_s {m}, stage 2 (9)", "l_s"), (f"L_f {m}, stage 2 (12)", "l_f"), (f"L_KD {m} (24)", "kd")]
        board.block("   ".join(board.number(symbol, terms[f"{key}_{m}"]) for symbol, key in parts))
    board.block(f"{board.number('L_total (25)', terms['loss'])}   with alpha {alpha:g}, beta {beta:g}")


def attention_weights(block: fusion.Block, anchor: Tensor, source: Tensor, present: Tensor | None) -> Tensor:
    """[U, U], mean over the heads: what the block's attention makes of values that are 1 at one utterance, else 0."""
    U = len(anchor)
    keys, _ = block.key_value(source).chunk(2, dim=-1)
    values = torch.eye(U).repeat(1, block.heads)  # [U, heads * U]
    return block.attend_one(block.query(anchor), keys, values, present).unflatten(-1, (block.heads, U)).mean(dim=1)


def work(run: Path, wanted: str | None) -> None:
    text, path = "\n".join(walk(run, wanted).lines), run / "tour.md"
    print(text)
    if path.is_file() and TITLE.encode() not in path.read_bytes()[:1000]:
        raise InputError(f"{path}: was not written by the tour, and is not overwritten; move it away")
    data.replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(f"\n{path}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tour", description="One conversation of a finished run through Eq. 1 to 25.")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished run (default: runs/demo)")
    parser.add_argument(
        "--conversation", metavar="ID", help="which one (default: of test, the one nearest to six utterances)"
    )
    args = parser.parse_args(argv)
    return magtkd.run_command("tour", lambda: work(args.run, args.conversation))


if __name__ == "__main__":
    sys.exit(main())
