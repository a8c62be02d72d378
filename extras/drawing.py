"""The two drawings of docs/, from the list of their boxes: the method, and a single stream of it.

    python -m extras.drawing          # writes docs/magtkd.svg and docs/stream.svg

Black on a white card, so that they can be read on a dark page and on paper. Each box names its equations and the
function that computes them, as `module.name`; tests/test_drawing.py checks that there is such a function and that it
names these equations.
"""

import re
from html import escape
from pathlib import Path

EQUATIONS = re.compile(r"Eq\. (\d+(?:-\d+)?(?:(?:, | and )\d+(?:-\d+)?)*)")
DOCS = Path(__file__).parent.parent / "docs"
FONT = "Helvetica, Arial, sans-serif"
MODULES = ("losses", "fusion", "encoders", "data", "magtkd")


def equations(text: str) -> set[int]:
    """The numbers of the equations that a text names: "Eq. 6-8, 24 and 25" gives {6, 7, 8, 24, 25}."""
    parts = (part for found in EQUATIONS.findall(text) for part in re.split(", | and ", found))
    ends = ([int(n) for n in part.split("-")] for part in parts)
    return {n for first_last in ends for n in range(first_last[0], first_last[-1] + 1)}


class Drawing:
    """A list of SVG elements on a white card. Lengths are in pixels; the origin is the upper left corner."""

    def __init__(self, width: int, height: int, title: str):
        self.title, self.size, self.parts = title, (width, height), []
        self.parts.append(f'<rect width="{width}" height="{height}" rx="10" fill="white"/>')

    def text(self, x: float, y: float, line: str, size: float = 14, bold: bool = False, anchor: str = "middle") -> None:
        """anchor: "start", "middle" or "end", which part of the line stands at x."""
        weight = ' font-weight="bold"' * bold
        head = f'<text x="{x:g}" y="{y:g}" font-family="{FONT}" font-size="{size:g}"{weight} text-anchor="{anchor}"'
        self.parts.append(f'{head} fill="black">{escape(line)}</text>')

    def box(self, x: float, y: float, w: float, h: float, *lines: str, fill: str = "white", line: float = 1.5) -> None:
        """A box with its lines in the middle: the first is bold, one that names a function is smaller."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="6" fill="{fill}" stroke="black" '
            f'stroke-width="{line:g}"/>'
        )
        top = y + h / 2 - 9 * (len(lines) - 1) + 5
        for i, words in enumerate(lines):
            code = any(f"{module}." in words for module in MODULES)
            self.text(x + w / 2, top + 18 * i, words, 11.5 if code else 13, bold=not i)

    def frame(self, y: float, h: float, title: str, x: float = 26) -> None:
        """A light band over the whole width, with a title."""
        w = self.size[0] - 20
        self.parts.append(f'<rect x="10" y="{y:g}" width="{w}" height="{h:g}" rx="8" fill="#f2f2f2"/>')
        self.text(x, y + 24, title, 16, True, "start")

    def arrow(self, *points: tuple[float, float], width: float = 1.5, dashed: bool = False) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dash = ' stroke-dasharray="7 4"' * dashed
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="black" stroke-width="{width:g}"{dash} '
            'marker-end="url(#head)"/>'
        )

    def svg(self) -> str:
        w, h = self.size
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img">\n'
            f"<title>{escape(self.title)}</title>\n"
            '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="9" markerHeight="9" '
            'markerUnits="userSpaceOnUse" orient="auto"><path d="M0,0 L10,5 L0,10 z" fill="black"/></marker></defs>\n'
        )
        return head + "\n".join(self.parts) + "\n</svg>\n"


def method() -> Drawing:
    """Both stages. Columns: audio, text, video."""
    d = Drawing(1040, 1075, "MAGTKD: stage 1, the feature file, stage 2")
    d.frame(10, 400, "Stage 1: one encoder per modality. Text teaches sound and pictures.")
    left, middle, right, w = 30, 400, 770, 240
    d.box(left, 55, w, 56, "the sound, 16 kHz mono", "encoders.load_audio")
    d.box(middle, 55, w, 56, "the words so far, a question", "Eq. 1, 2  encoders.TextEncoder.prompts")
    d.box(right, 55, w, 56, "8 frames of the film", "encoders.load_frames")
    d.box(left, 150, w, 60, "Data2vec, mean over frames", "Eq. 4  encoders.AudioEncoder", line=2.5)
    d.box(middle, 150, w, 60, "RoBERTa, at the mask", "Eq. 3  encoders.TextEncoder", line=2.5)
    d.box(right, 150, w, 60, "TimeSformer, class token", "Eq. 5  encoders.VideoEncoder", line=2.5)
    for x in (left, middle, right):
        d.arrow((x + w / 2, 111), (x + w / 2, 150))
    student = ("L_CE + L_s + L_f", "Eq. 13, 14  magtkd.train_encoder", "Eq. 7-9  losses.soft_label_loss")
    student += ("Eq. 10-12  losses.feature_loss",)
    inner = 214  # the losses' boxes; beside them the features go down
    d.box(left + w - inner, 270, inner, 100, *student)
    d.box(middle + 10, 270, 190, 100, "L_CE", "Eq. 13  losses.cross_entropy")
    d.box(right, 270, inner, 100, *student)
    d.arrow((left + 133, 210), (left + 133, 270))
    d.arrow((middle + 105, 210), (middle + 105, 270))
    d.arrow((right + 107, 210), (right + 107, 270))
    d.arrow((middle, 185), (335, 185), (335, 300), (270, 300), dashed=True, width=2.5)
    d.arrow((middle + w, 185), (705, 185), (705, 300), (770, 300), dashed=True, width=2.5)
    for x in (335, 705):
        d.text(x, 148, "teaches", 13, True)
        d.text(x, 166, "(frozen)", 13)
    for x, name in ((left + 12, "F_a"), (middle + 222, "F_t"), (right + w - 12, "F_v")):
        d.arrow((x, 210), (x, 432), width=2.5)
        d.text(x + (-6 if x > 900 else 6), 398, name, 13, True, "end" if x > 900 else "start")
    d.box(30, 432, 980, 58, "features.safetensors: one feature (a vector) per utterance and encoder",
          "data.to_feature_file   data.write_features   data.Conversations.batch", fill="#e0e0e0")  # fmt: skip

    d.frame(510, 555, "Stage 2: MAGT over conversations", x=168)
    d.text(536, 534, "audio and video are the anchors first, text last", 13, False, "start")
    for x, m in ((left, "a"), (middle, "t"), (right, "v")):
        d.arrow((x + w / 2, 490), (x + w / 2, 550), width=2.5)
        d.box(x, 550, w, 58, f"H_{m} = F_{m} + position + speaker", "Eq. 15-18  fusion.MAGT.tag")
    y = 690
    for x, m, others in ((left, "audio", "H_a, H_t, H_v"), (right, "video", "H_v, H_t, H_a")):
        d.box(
            x, y, w, 78, f"1. {m} is the anchor", f"reads {others}; three gates", "Eq. 19-22  fusion.Anchor", line=2.5
        )
    near, far = left + w / 2, right + w / 2
    d.arrow((near, 608), (near, y), width=3)
    d.arrow((far, 608), (far, y), width=3)
    d.arrow((middle + 40, 608), (left + w - 50, y))
    d.arrow((middle + w - 40, 608), (right + 50, y))
    d.arrow((right + 40, 608), (left + w - 15, y))
    d.arrow((left + w - 40, 608), (right + 15, y))
    d.box(
        middle,
        780,
        w,
        78,
        "2. text is the anchor",
        "reads H_t and the enriched two",
        "Eq. 19-22  fusion.Anchor",
        line=2.5,
    )
    d.arrow((520, 608), (520, 780), width=3)
    d.arrow((270, 740), (335, 740), (335, 819), (400, 819))
    d.arrow((770, 740), (705, 740), (705, 819), (640, 819))
    for x, m in ((left, "a"), (right, "v")):
        d.box(x, 900, w, 62, f"L_KD^{m} = L_f + L_s", "Eq. 24  magtkd.fusion_losses")
        d.arrow((x + w / 2, 768), (x + w / 2, 900))
    d.box(middle, 900, w, 62, "the emotion, and L_CE", "Eq. 23  fusion.MAGT.answer")
    d.arrow((520, 858), (520, 900))
    d.arrow((400, 931), (270, 931), dashed=True, width=2.5)
    d.arrow((640, 931), (770, 931), dashed=True, width=2.5)
    for x in (335, 705):
        d.text(x, 900, "teaches", 13, True)
        d.text(x, 918, "(detached)", 13)
    d.box(270, 998, 500, 54, "L_total = L_CE + alpha L_KD^a + beta L_KD^v", "Eq. 25  losses.stage2_loss")
    d.arrow((150, 962), (150, 1025), (270, 1025))
    d.arrow((890, 962), (890, 1025), (770, 1025))
    d.arrow((520, 962), (520, 998))
    d.text(26, 1056, "thick: asks; thin: answers", 12, False, "start")
    d.text(1014, 1056, "dashed: no gradient flows back", 12, False, "end")
    return d


def stream() -> Drawing:
    """One stream: source n answers anchor m."""
    d = Drawing(1040, 560, "One stream of MAGT: the anchor asks, the source answers, a gate decides")
    d.frame(10, 540, "One stream: anchor m asks, source n answers, a gate decides how much of the answer passes.")
    d.box(30, 70, 190, 58, "anchor H_m  [N, D]", "Eq. 18  fusion.MAGT.tag")
    d.box(30, 230, 190, 58, "source H_n  [N, D]", "Eq. 18  fusion.MAGT.tag")
    d.text(30, 308, "Where text asks, audio and video", 12, False, "start")
    d.text(30, 324, "answer with their enriched sequences.", 12, False, "start")
    d.box(270, 70, 130, 58, "query", "Linear D x D")
    d.box(270, 230, 130, 58, "key and value", "Linear D x 2D")
    d.arrow((220, 99), (270, 99), width=3)
    d.arrow((220, 259), (270, 259))
    d.box(
        450,
        130,
        240,
        76,
        "attention, 8 heads",
        "Eq. 19, 20  fusion.Block",
        "each conversation by itself",
        line=2.5,
    )
    d.arrow((400, 99), (500, 99), (500, 130), width=3)
    d.arrow((400, 259), (500, 259), (500, 206))
    # Two conversations, of 3 and of 4 utterances: who may read whom.
    side, x0, y0 = 14, 585, 230
    for i in range(7):
        for j in range(7):
            same = (i < 3) == (j < 3)
            d.parts.append(
                f'<rect x="{x0 + side * j}" y="{y0 + side * i}" width="{side}" height="{side}" '
                f'fill="{"#808080" if same else "white"}" stroke="black" stroke-width="0.7"/>'
            )
    d.text(x0 + 3.5 * side, y0 - 8, "is read", 12)
    d.text(x0 - 10, y0 + 3.5 * side + 4, "asks", 12, False, "end")
    d.text(x0 + 3.5 * side, y0 + 7 * side + 17, "conversations of 3 and 4", 12)

    d.box(740, 140, 110, 56, "out", "Linear, dropout")
    d.arrow((690, 168), (740, 168))
    plus(d, 900, 168)
    d.arrow((850, 168), (886, 168))
    d.arrow((245, 99), (245, 52), (900, 52), (900, 154))
    d.text(570, 68, "residual: the anchor itself", 12)

    d.box(
        800,
        240,
        200,
        92,
        "feed-forward",
        "LayerNorm, Linear, GELU,",
        "dropout, Linear, dropout",
        "Eq. 19, 20  fusion.Block",
    )
    d.arrow((900, 182), (900, 240))
    plus(d, 900, 372)
    d.arrow((900, 332), (900, 358))
    d.arrow((900, 214), (1018, 214), (1018, 372), (914, 372))
    d.box(640, 430, 240, 76, "gate = sigmoid(W H + b)", "Eq. 21  fusion.Anchor.alpha", "0 to 1, [N, D]", line=2.5)
    d.text(912, 406, "H_{n->m}", 14, True, "start")
    d.arrow((900, 386), (900, 408), (760, 408), (760, 430))
    times(d, 590, 468)
    d.arrow((640, 468), (604, 468))
    d.arrow((900, 408), (590, 408), (590, 454))
    d.text(590, 505, "Eq. 22", 13)
    d.box(
        290,
        422,
        230,
        92,
        "merge",
        "the three gated streams side",
        "by side, then Linear 3D x D",
        "Eq. 19-22  fusion.Anchor",
    )
    d.arrow((576, 468), (520, 468))
    d.arrow((560, 530), (405, 530), (405, 514))
    d.text(570, 534, "the two other streams of this anchor", 12, False, "start")
    d.box(50, 430, 180, 76, "enriched sequence", "of anchor m  [N, D]")
    d.arrow((290, 468), (230, 468), width=3)
    return d


def plus(d: Drawing, x: float, y: float, sign: str = "+") -> None:
    d.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="13" fill="white" stroke="black" stroke-width="1.5"/>')
    d.text(x, y + 6, sign, 18, True)


def times(d: Drawing, x: float, y: float) -> None:
    plus(d, x, y, "×")


DRAWINGS = {"magtkd.svg": method, "stream.svg": stream}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (DOCS / name).write_text(draw().svg(), encoding="utf-8")
        print(f"docs/{name}")
