"""A small made-up corpus, written to disk from a seed in the layout of IEMOCAP or of MELD.

    python demo.py iemocap DIR                # WAV, AVI, transcripts, label files: as IEMOCAP_full_release has them
    python demo.py meld DIR --seed 1 --flaws  # csv and MP4: as MELD.Raw has them, with the faults that users meet

Whoever speaks tends to keep the emotion of his own last turn and to catch that of the turn before, so context helps. Words
mostly give the emotion away, the voice (a tone in syllables: pitch, its movement, timbre, rate, breath) does so less, and
the drawn face (brows, eyes, mouth, colour) least. Given the emotion, the three err independently, so fusion helps.
The first block of constants below says how much each of them tells: change them and see what becomes of the results.

IEMOCAP_FLAWS and MELD_FLAWS list what flaws=True plants, and where. The same seed gives the same files.

Not here: real speech, real faces, overlapping turns, sound in IEMOCAP's videos, IEMOCAP's motion capture. No figure
obtained on this corpus says anything about people. Nothing else of this project is imported.
"""

import argparse
import csv
import wave
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

KEEP, CATCH = 0.55, 0.20  # probability of one's own last emotion again, of the last turn's; else a fresh draw
WORDS_TELL = 0.72  # probability that the words show the emotion; else they show a neighbouring one or none at all
VOICE_TELL, VOICE_NOISE = 0.70, 0.35  # the same for the voice (else any emotion), and its spread around the typical
FACE_TELL, FACE_NOISE = 0.55, 0.35  # the same for the face

SAMPLE_RATE, FPS = 16_000, 10
HEIGHT, WIDTH = (
    96,
    144,
)  # 3:2 as IEMOCAP's videos; both faces lie within the central square, so a centre crop keeps them

# Typical acting. Voice: pitch (semitones from the speaker's own), its movement from first to last syllable (semitones),
# timbre (how slowly the harmonics fade, 0 to 1), syllables per second, breath (0 to 1), how clipped the syllables are,
# tremor (0 to 1). Face: inner ends of the brows down, brows raised, corners of the mouth up, eyes open, red (all -1 to 1).
ACTING = {
    "ang": ((3, -4, 0.82, 6.0, 0.35, 2.0, 0.0), (1.0, -0.5, -0.5, 0.2, 1.0)),
    "dis": ((-3, -5, 0.75, 3.4, 0.40, 0.7, 0.0), (0.6, -0.5, -0.7, -0.9, -0.3)),
    "exc": ((9, 4, 0.75, 7.0, 0.05, 1.2, 0.0), (-0.3, 0.9, 1.0, 1.0, 0.5)),
    "fea": ((7, 2, 0.45, 6.5, 0.35, 1.0, 0.5), (-0.9, 0.7, -0.4, 1.0, -1.0)),
    "fru": ((0, -3, 0.75, 4.8, 0.20, 1.8, 0.0), (0.6, -0.2, -0.8, -0.4, 0.4)),
    "hap": ((6, 3, 0.60, 5.4, 0.05, 0.8, 0.0), (0.0, 0.3, 0.9, 0.0, 0.2)),
    "neu": ((0, 0, 0.50, 4.2, 0.08, 0.8, 0.0), (0.0, 0.0, 0.0, 0.0, 0.0)),
    "sad": ((-4, -2, 0.25, 2.8, 0.15, 0.5, 0.3), (-1.0, 0.0, -0.9, -0.8, -0.7)),
    "sur": ((8, 7, 0.70, 3.6, 0.10, 1.6, 0.0), (-0.1, 1.0, 0.1, 1.0, 0.0)),
}
VOICE_SPREAD = np.array([3.0, 3.0, 0.15, 1.2, 0.1, 0.4, 0.15])
# Label: how often it is drawn afresh, and the label whose words are used by mistake.
IEMOCAP = {"ang": (0.15, "fru"), "exc": (0.17, "hap"), "fru": (0.20, "ang"), "hap": (0.13, "exc"), "neu": (0.20, "sad")}
IEMOCAP |= {"sad": (0.15, "neu")}
MELD = {"ang": (0.15, "dis"), "dis": (0.08, "ang"), "fea": (0.09, "sad"), "hap": (0.17, "sur"), "neu": (0.27, "sad")}
MELD |= {"sad": (0.11, "fea"), "sur": (0.13, "hap")}
TELLING = {
    "ang": "furious angry mad outraged livid raging hateful",
    "dis": "disgusting gross nasty revolting sickening rotten vile",
    "exc": "excited thrilled amazed pumped ecstatic wild eager",
    "fea": "scared afraid terrified frightened nervous panicked anxious",
    "fru": "frustrated annoyed stuck irritated fed-up bothered impatient",
    "hap": "happy glad pleased delighted cheerful joyful grateful",
    "neu": "fine okay normal usual plain alright regular",
    "sad": "sad heartbroken lonely miserable hopeless gloomy crying",
    "sur": "surprised shocked stunned speechless startled unbelievable sudden",
}
NON_COMMITTAL = "busy ready early late back here done waiting".split()
TOPICS = "flight car office letter house dinner phone ticket party doctor keys bank weekend neighbor".split()
OPENERS = ("Well", "You know", "Look", "So", "Yeah", "Listen", "Oh", "I mean")
SENTENCES = (
    "{o}, I am {e} about the {t}.",
    "{o}, I feel {e} and {e2} today.",
    "{o}, the {t} is so {e}.",
    "{o}, that {t} made me {e}.",
    "{o}, are you {e} about the {t}?",
    "{o}, it is all {e} with this {t}, just {e2}.",
)

# As the annotators' lines of IEMOCAP and the csv of MELD spell them.
IN_FULL = {
    "ang": "Anger",
    "exc": "Excited",
    "fru": "Frustration",
    "hap": "Happiness",
    "neu": "Neutral",
    "sad": "Sadness",
}
IN_CSV = {"ang": "anger", "dis": "disgust", "fea": "fear", "hap": "joy", "neu": "neutral", "sad": "sadness"}
IN_CSV |= {"sur": "surprise"}
MELD_SPLITS = (("train", "train_splits"), ("dev", "dev_splits_complete"), ("test", "output_repeated_splits_test"))
MELD_CAST = {"Ada": 215, "Bruno": 120, "Clara": 190, "Dario": 140, "Edith": 205, "Felix": 130}  # Hz
MELD_GUESTS = {"Gustav": 125, "Helga": 200}  # in test alone
CHANNELS = {"mono": [1], "stereo": [1, 0.8], "5.1": [0.1, 0.1, 1, 0, 0.05, 0.05]}  # gains

IEMOCAP_FLAWS = {
    "Session1, Ses01F_impro01": "an AppleDouble file `._*` beside each of its files; in its transcript a line with an XX id"
    " (Ses01F_impro01_MXX0) and one without id and bracket; sub-folders Attribute, Categorical, Self-evaluation",
    "Session2, Ses02F_impro01": "label file and transcript: all turns of F before those of M",
    "Session3, Ses03F_impro01": "its second to sixth turn by time are labelled xxx, sur, fea, dis, oth",
    "Session4, Ses04F_impro01": "F000.wav is missing, M000.wav has no bytes, F001.wav has a header and no samples",
    "Session5": "its videos lie in `Divx` instead of `DivX`",
    "everywhere": "both F and M speak, whatever the letter in the name of the session",
}
MELD_FLAWS = {
    "train dialogue 0": "dia0_utt0 has U+0085 and U+0092 to U+0094 in the csv; dia0_utt1.mp4 is corrupt (no moov atom);"
    " dia0_utt2.mp4 has 20 ms of sound",
    "train dialogue 1": "Utterance_ID 1 is not in the csv, though its clip is there",
    "train dialogue 2": "is neither in the csv nor among the clips",
    "dev": "csv and clips lie under dev/; dia0_utt1.mp4 is missing",
    "test": "the clips, not the csv, lie under test/; dia0_utt0.mp4 shows another utterance, the right cut is"
    " final_videos_testdia0_utt0.mp4; dia1_utt0.mp4 is four minutes long",
    "every split": "a 212-byte stub `._dia0_utt0.mp4`",
}
DROPPED = ("xxx", "sur", "fea", "dis", "oth")
APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X".ljust(212, b"\x00")


@dataclass
class Actor:
    name: str
    pitch: float  # Hz
    skin: np.ndarray  # RGB, 0 to 255
    shirt: np.ndarray


@dataclass
class Turn:
    actor: Actor
    emotion: str
    words: str
    start: float  # seconds
    end: float
    sound: np.ndarray  # (samples,) int16
    face: np.ndarray  # (frames, 6): the five of ACTING, and the mouth's opening


def make_actor(rng: np.random.Generator, name: str, pitch: float) -> Actor:
    return Actor(
        name, pitch * rng.uniform(0.92, 1.08), rng.uniform((190, 150, 120), (235, 185, 155)), rng.uniform(20, 110, 3)
    )


def make_conversation(rng, actors: list[Actor], mix: dict, length: int, rate=SAMPLE_RATE) -> list[Turn]:
    """`length` utterances in the order of speaking, 0.8 to 2 s each, 0.1 to 0.4 s apart."""
    labels, weights = list(mix), np.array([share for share, _ in mix.values()])
    turns, last, speaker, clock = [], {}, 0, 0.6
    for k in range(length):
        if k and (k < 4 or rng.random() < 0.8):  # the first turns go round, so that flaws have names known beforehand
            speaker = (speaker + 1 + (len(actors) > 2 and k >= 4 and rng.integers(len(actors) - 1))) % len(actors)
        chance = rng.random()
        if chance < KEEP and speaker in last:
            emotion = last[speaker]
        elif KEEP <= chance < KEEP + CATCH and turns:
            emotion = turns[-1].emotion
        else:
            emotion = str(rng.choice(labels, p=weights / weights.sum()))
        last[speaker] = emotion
        seconds = round(0.8 + 1.2 * rng.beta(1, 2.6), 4)
        seen = emotion if rng.random() < FACE_TELL else rng.choice(labels)
        heard = emotion if rng.random() < VOICE_TELL else rng.choice(labels)
        sound, loudness = voice(rng, actors[speaker].pitch, ACTING[heard][0], seconds, rate)
        face = np.empty((max(1, round(seconds * FPS)), 6), np.float32)
        face[:, :5] = ACTING[seen][1] + FACE_NOISE * rng.standard_normal(5)
        face[:, 5] = loudness[(np.arange(len(face)) / FPS * rate).astype(int).clip(max=len(loudness) - 1)]
        turns.append(
            Turn(actors[speaker], emotion, sentence(rng, emotion, mix[emotion][1]), clock, clock + seconds, sound, face)
        )
        clock = round(clock + seconds + rng.uniform(0.1, 0.4), 4)
    return turns


def sentence(rng: np.random.Generator, emotion: str, neighbour: str) -> str:
    """One sentence whose one or two telling words show the emotion, a neighbouring one, or none."""
    shown = TELLING[emotion].split()
    if rng.random() >= WORDS_TELL:
        shown = TELLING[neighbour].split() if rng.random() < 0.4 else NON_COMMITTAL
    first, second = rng.choice(shown, 2, replace=False)
    return str(rng.choice(SENTENCES)).format(o=rng.choice(OPENERS), e=first, e2=second, t=rng.choice(TOPICS))


def voice(rng, base: float, acting: tuple, seconds: float, rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Sound, (samples,) int16, and its loudness over time, (samples,), 0 to 1."""
    acting = np.array(acting) + VOICE_NOISE * VOICE_SPREAD * rng.standard_normal(len(acting))
    level, move, timbre, pace, breath, clipped, tremor = acting
    timbre, pace, clipped = np.clip(timbre, 0.05, 0.88), max(pace, 1.5), max(clipped, 0.2)
    breath, tremor = np.clip([breath, tremor], 0, 0.6)
    time = np.arange(round(seconds * rate)) / rate
    syllables = time * pace + rng.random() * 0.3
    wobble = rng.normal(0, 0.6, int(syllables[-1]) + 1)[syllables.astype(int)]
    semitones = level + move * (time / seconds - 0.5) + wobble
    phase = 2 * np.pi * np.cumsum(base * 2 ** (semitones / 12)) / rate
    loudness = np.sin(np.pi * (syllables % 1)) ** clipped * (1 - tremor * (0.5 + 0.5 * np.sin(2 * np.pi * 9 * time)))
    # The sum over all harmonics k of timbre^k sin(k phase) has this closed form; the factor keeps its power at about 1.
    tone = timbre * np.sin(phase) / (1 - 2 * timbre * np.cos(phase) + timbre**2) * np.sqrt(2 * (1 - timbre**2)) / timbre
    hiss = rng.standard_normal(len(time))
    sound = loudness * ((1 - breath) * tone + breath * hiss) + 0.01 * hiss
    return (sound * rng.uniform(2000, 4000)).clip(-32767, 32767).astype(np.int16), loudness


def draw_faces(rng, faces: np.ndarray, actor: Actor, size: int) -> np.ndarray:
    """(frames, 6) as in Turn.face -> (frames, size, size, 3) float32 RGB on a grey ground; size is about the head's height."""
    inner, raised, smile, eyes, red, opening = np.float32(faces).T[:, :, None, None]
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].astype(np.float32)
    moving = (opening > 0) * np.float32(0.03)  # a still head is drawn alike in every frame
    x = x + moving * rng.standard_normal(inner.shape, np.float32)
    y = y + moving * rng.standard_normal(inner.shape, np.float32)
    image = np.empty((len(faces), size, size, 3), np.float32)
    image[:] = 90

    def paint(inside: np.ndarray, colour: np.ndarray) -> None:  # inside: signed, in half head heights; edges are soft
        cover = (inside * (size / 2) + 0.5).clip(0, 1)[..., None]
        image[:] += cover * (colour - image)

    skin = actor.skin + red[..., None] * np.array([25, -30, -30])
    dark = np.array([25, 20, 20])
    paint(0.92 - np.hypot(x * 1.1, y), skin.astype(np.float32))
    side = np.abs(x)  # both halves of the face at once
    paint(np.minimum(0.17 - np.abs(side - 0.38), 0.11 + 0.09 * eyes - np.abs(y + 0.18)), np.float32([245, 245, 245]))
    paint(0.09 - np.hypot(side - 0.38, y + 0.18), dark)
    brow = -0.48 - 0.14 * raised + 0.55 * inner * (0.38 - side)  # the row of the brow at each column
    paint(np.minimum(0.075 - np.abs(y - brow), 0.27 - np.abs(side - 0.38)), dark)
    mouth = 0.48 + 0.15 * smile - 1.0 * smile * x**2
    paint(np.minimum(0.07 + 0.14 * opening - np.abs(y - mouth), 0.48 - side), np.float32([120, 20, 30]))
    return image


def write_video(
    path: Path, frames: np.ndarray, sound: np.ndarray | None = None, rate: int = 0, layout: str = ""
) -> None:
    """frames (T, H, W, 3): MPEG-4 without sound; or with sound (channels, samples) int16, H.264 and AAC."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4" if sound is None else "libx264", rate=FPS)
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        video.options = {"qmin": "7", "qmax": "7"} if sound is None else {"preset": "superfast", "crf": "26"}
        video.codec_context.thread_count = 1  # the same pixels on any number of cores
        if sound is not None:
            audio = container.add_stream("aac", rate=rate, layout=layout)
            heard = av.AudioFrame.from_ndarray(np.float32(sound) / 32768, "fltp", layout)
            heard.sample_rate = rate
            container.mux(audio.encode(heard))
            container.mux(audio.encode())
        for frame in np.round(frames).clip(0, 255).astype(np.uint8):
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(video.encode())


def write_wav(path: Path, sound: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", "not compressed"))
        file.writeframes(sound.astype("<i2").tobytes())


def prepare(root: Path, corpus: str, seed: int, utterances: tuple[int, int], smallest: int) -> None:
    if not smallest <= utterances[0] <= utterances[1]:
        raise ValueError(f"utterances must be two rising numbers from {smallest} on, not {utterances}")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} is there already and not an empty folder: give a new one")
    root.mkdir(parents=True, exist_ok=True)
    (root / "README.txt").write_text(f"made up by demo.py, seed {seed}; not {corpus}\n")


def write_iemocap(
    root: Path, seed: int = 0, conversations: int = 12, utterances: tuple[int, int] = (10, 18), flaws: bool = False
) -> None:
    """Five sessions of `conversations` each; utterances: fewest and most per conversation. Times are in seconds.

    Raises FileExistsError if root holds anything, ValueError for numbers that make no corpus (flaws need 8 utterances).
    """
    root = Path(root)
    prepare(root, "IEMOCAP", seed, utterances, 8 if flaws else 1)
    for session in range(1, 6):
        rng = np.random.default_rng([seed, session])
        actors = [make_actor(rng, "F", 200), make_actor(rng, "M", 130)]
        for k in range(conversations):
            letter, n = "FM"[k % 2], k // 2
            kind = f"script{n // 3 + 1:02d}_{n % 3 + 1}" if n % 3 == 2 else f"impro{n + 1:02d}"
            rng = np.random.default_rng(
                [seed, session, k]
            )  # its own: more conversations leave the first ones as they are
            cast = actors if letter == "F" else actors[::-1]
            turns = make_conversation(rng, cast, IEMOCAP, rng.integers(utterances[0], utterances[1] + 1))
            write_dialogue(rng, root / f"Session{session}", f"Ses{session:02d}{letter}_{kind}", turns, actors)
    if flaws:
        plant_iemocap_flaws(root)


def write_dialogue(rng, folder: Path, name: str, turns: list[Turn], actors: list[Actor]) -> None:
    wavs, dialog = folder / "sentences/wav" / name, folder / "dialog"
    for path in (wavs, dialog / "EmoEvaluation", dialog / "transcriptions", dialog / "avi/DivX"):
        path.mkdir(parents=True, exist_ok=True)
    labels, words, count = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n", "", {"F": 0, "M": 0}
    for turn in turns:
        letter = turn.actor.name
        turn_name = f"{name}_{letter}{count[letter]:03d}"
        count[letter] += 1
        val, act, dom = rng.integers(1, 6, 3)
        labels += (
            f"[{turn.start:.4f} - {turn.end:.4f}]\t{turn_name}\t{turn.emotion}\t[{val:.4f}, {act:.4f}, {dom:.4f}]\n"
        )
        labels += "".join(f"C-{who}:\t{IN_FULL[turn.emotion]};\t()\n" for who in ("E2", "E3", "E4"))
        labels += "".join(f"A-{who}:\tval {val}; act {act}; dom  {dom};\t()\n" for who in ("E3", "E4")) + "\n"
        words += f"{turn_name} [{turn.start:08.4f}-{turn.end:08.4f}]: {turn.words}\n"
        write_wav(wavs / f"{turn_name}.wav", turn.sound)
    (dialog / "EmoEvaluation" / f"{name}.txt").write_text(labels)
    (dialog / "transcriptions" / f"{name}.txt").write_text(words)
    write_video(dialog / "avi/DivX" / f"{name}.avi", draw_dialogue(rng, turns, actors))


def draw_dialogue(rng: np.random.Generator, turns: list[Turn], actors: list[Actor]) -> np.ndarray:
    """(frames, H, W, 3): both actors side by side; whoever is silent keeps a still, neutral face."""
    frames = np.full((int((turns[-1].end + 0.6) * FPS), HEIGHT, WIDTH, 3), 90, np.float32)
    for actor, left in zip(actors, (WIDTH // 2 - 47, WIDTH // 2 + 1)):
        faces = np.zeros((len(frames), 6), np.float32)
        for turn in turns:
            if turn.actor is actor:
                first = round(turn.start * FPS)
                faces[first : first + len(turn.face)] = turn.face
        frames[:, 24:70, left : left + 46] = draw_faces(rng, faces, actor, 46)
        frames[:, 74:, left + 4 : left + 42] = actor.shirt
    return frames


def plant_iemocap_flaws(root: Path) -> None:
    """See IEMOCAP_FLAWS."""
    dialogs = [root / f"Session{n}/dialog" for n in range(1, 6)]
    for path in list((root / "Session1").rglob("Ses01F_impro01*.*")):
        path.with_name("._" + path.name).write_bytes(APPLE_DOUBLE)
    for kind in ("Attribute", "Categorical", "Self-evaluation"):
        (dialogs[0] / "EmoEvaluation" / kind).mkdir()
        (dialogs[0] / "EmoEvaluation" / kind / f"Ses01F_impro01_e2_{kind[:3].lower()}.txt").write_text(
            "F000 :Neutral; ()\n"
        )
    transcript = dialogs[0] / "transcriptions/Ses01F_impro01.txt"
    lines = transcript.read_text().splitlines(keepends=True)
    lines[1:1] = ["Ses01F_impro01_MXX0 [000.1000-000.4000]: [BREATHING]\n", "M: Yeah.\n"]
    transcript.write_text("".join(lines))
    transcript = dialogs[1] / "transcriptions/Ses02F_impro01.txt"
    transcript.write_text("".join(sorted(transcript.read_text().splitlines(keepends=True))))
    labels = dialogs[1] / "EmoEvaluation/Ses02F_impro01.txt"
    header, *blocks = labels.read_text().strip().split("\n\n")
    labels.write_text("\n\n".join([header, *sorted(blocks, key=lambda block: block.split("\t")[1])]) + "\n\n")
    labels = dialogs[2] / "EmoEvaluation/Ses03F_impro01.txt"
    blocks = labels.read_text().split("\n\n")
    for k, label in enumerate(DROPPED, start=2):  # after the header and the first turn
        cells = blocks[k].split("\t")
        blocks[k] = "\t".join([*cells[:2], label, *cells[3:]])
    labels.write_text("\n\n".join(blocks))
    wavs = root / "Session4/sentences/wav/Ses04F_impro01"
    (wavs / "Ses04F_impro01_F000.wav").unlink()
    (wavs / "Ses04F_impro01_M000.wav").write_bytes(b"")
    write_wav(wavs / "Ses04F_impro01_F001.wav", np.zeros(0))
    (dialogs[4] / "avi/DivX").rename(dialogs[4] / "avi/Divx")


def write_meld(
    root: Path,
    seed: int = 0,
    conversations: tuple[int, int, int] = (40, 6, 14),
    utterances=(4, 12),
    flaws: bool = False,
) -> None:
    """Train, dev and test of so many conversations; utterances: fewest and most per conversation.

    Raises FileExistsError if root holds anything, ValueError for numbers that make no corpus (flaws need 4 utterances,
    and 4, 1, 2 conversations).
    """
    root = Path(root)
    if flaws and any(have < least for have, least in zip(conversations, (4, 1, 2))):
        raise ValueError(f"flaws need at least 4, 1, 2 conversations, not {conversations}")
    prepare(root, "MELD", seed, utterances, 4 if flaws else 1)
    rng = np.random.default_rng(seed)
    cast, guests = ([make_actor(rng, *person) for person in people.items()] for people in (MELD_CAST, MELD_GUESTS))
    for s, ((split, folder), count) in enumerate(zip(MELD_SPLITS, conversations)):
        (root / folder).mkdir()
        rows = []
        for k in range(count):
            rng = np.random.default_rng([seed, s, k])
            actors = [cast[i] for i in rng.permutation(len(cast))[: rng.integers(2, 5)]]
            if split == "test" and k % 3 == 0:
                actors[1] = guests[k % 2]
            rate, clock = int(rng.choice([44_100, 48_000])), int(rng.integers(60, 1200))
            series, episode = rng.integers(1, 10), rng.integers(1, 25)
            turns = make_conversation(rng, actors, MELD, rng.integers(utterances[0], utterances[1] + 1), rate)
            for u, turn in enumerate(turns):
                sentiment = {"neu": "neutral", "hap": "positive", "sur": rng.choice(["positive", "negative"])}
                cells = [
                    turn.words,
                    turn.actor.name,
                    IN_CSV[turn.emotion],
                    sentiment.get(turn.emotion, "negative"),
                    k,
                    u,
                ]
                rows.append(
                    [len(rows) + 1, *cells, series, episode, stamp(clock + turn.start), stamp(clock + turn.end)]
                )
                frames = np.full((len(turn.face), HEIGHT, WIDTH, 3), 90, np.float32)
                frames[:, 4:92, 28:116] = draw_faces(rng, turn.face, turn.actor, 88)
                layout = str(rng.choice(list(CHANNELS)))
                sound = np.outer(CHANNELS[layout], turn.sound)
                write_video(root / folder / f"dia{k}_utt{u}.mp4", frames, sound, rate, layout)
        write_csv(root / f"{split}_sent_emo.csv", rows)
    if flaws:
        plant_meld_flaws(root)


def stamp(seconds: float) -> str:
    ms = round(seconds * 1000)
    return f"{ms // 3_600_000:02d}:{ms // 60_000 % 60:02d}:{ms // 1000 % 60:02d},{ms % 1000:03d}"


def write_csv(path: Path, rows: list[list]) -> None:
    header = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])


def plant_meld_flaws(root: Path) -> None:
    """See MELD_FLAWS."""
    train, dev, test = (root / folder for _, folder in MELD_SPLITS)
    for folder in (train, dev, test):
        (folder / "._dia0_utt0.mp4").write_bytes(APPLE_DOUBLE)
    with open(root / "train_sent_emo.csv", encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file)
    rows[0][1] += " \x93It\x92s done\x85\x94"
    write_csv(root / "train_sent_emo.csv", [row for row in rows if row[5] != "2" and row[5:7] != ["1", "1"]])
    for clip in train.glob("dia2_utt*.mp4"):
        clip.unlink()
    clip = train / "dia0_utt1.mp4"
    clip.write_bytes(clip.read_bytes().partition(b"moov")[0])
    still, quiet = np.full((15, HEIGHT, WIDTH, 3), 90), np.zeros((1, 882), np.int16)
    write_video(train / "dia0_utt2.mp4", still, quiet, 44_100, "mono")
    (dev / "dia0_utt1.mp4").unlink()
    (test / "dia0_utt0.mp4").rename(test / "final_videos_testdia0_utt0.mp4")
    (test / "dia0_utt0.mp4").write_bytes((test / "dia0_utt1.mp4").read_bytes())
    long = np.broadcast_to(np.uint8(90), (240 * FPS, HEIGHT, WIDTH, 3))
    write_video(test / "dia1_utt0.mp4", long, np.zeros((1, 240 * 44_100), np.int16), 44_100, "mono")
    for split, folder in (("dev", dev), ("test", test)):
        (root / split).mkdir()
        folder.rename(root / split / folder.name)
    (root / "dev_sent_emo.csv").rename(root / "dev/dev_sent_emo.csv")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a small made-up corpus in the layout of IEMOCAP or MELD.")
    parser.add_argument("corpus", choices=["iemocap", "meld"])
    parser.add_argument("dir", type=Path, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--conversations", type=int, metavar="N", help="per session, or (meld) in train, with N/6 and N/3 more"
    )
    parser.add_argument("--utterances", type=int, nargs=2, metavar=("LO", "HI"), help="per conversation")
    parser.add_argument("--flaws", action="store_true", help="plant the faults that users of the real corpus meet")
    args = parser.parse_args()
    options = {"utterances": args.utterances and tuple(args.utterances), "conversations": args.conversations}
    if args.conversations is not None and args.conversations < 1 or args.seed < 0:
        parser.error("--conversations must be at least 1, and --seed at least 0")
    if args.conversations and args.corpus == "meld":
        options["conversations"] = (
            args.conversations,
            max(1, args.conversations // 6),
            max(2, args.conversations // 3),
        )
    write = {"iemocap": write_iemocap, "meld": write_meld}[args.corpus]
    try:
        write(
            args.dir, args.seed, flaws=args.flaws, **{key: value for key, value in options.items() if value is not None}
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"wrote a made-up corpus in the layout of {args.corpus.upper()} to {args.dir}")


if __name__ == "__main__":
    main()
