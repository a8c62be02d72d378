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
import sys
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
HEIGHT, WIDTH = 96, 144  # 3:2 as IEMOCAP's videos; both faces lie within the central square, so a centre crop keeps them

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
CONFUSED = {"ang": "fru", "fru": "ang", "exc": "hap", "hap": "exc", "neu": "sad", "sad": "neu"}
CONFUSED |= {"fea": "sad", "dis": "ang", "sur": "hap"}
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

IEMOCAP_PRIOR = {"ang": 0.15, "exc": 0.17, "fru": 0.20, "hap": 0.13, "neu": 0.20, "sad": 0.15}
MELD_PRIOR = {"ang": 0.15, "dis": 0.08, "fea": 0.09, "hap": 0.17, "neu": 0.27, "sad": 0.11, "sur": 0.13}
MELD_NAMES = {"ang": "anger", "dis": "disgust", "fea": "fear", "hap": "joy", "neu": "neutral", "sad": "sadness"}
MELD_NAMES |= {"sur": "surprise"}


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
    return Actor(name, pitch * rng.uniform(0.92, 1.08), rng.uniform((190, 150, 120), (235, 185, 155)), rng.uniform(20, 110, 3))


def make_conversation(rng, actors: list[Actor], prior: dict[str, float], length: int, rate=SAMPLE_RATE) -> list[Turn]:
    """`length` utterances in the order of speaking, 0.8 to 2 s each, 0.1 to 0.4 s apart."""
    labels, weights = list(prior), np.array(list(prior.values()))
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
        seconds = round(0.8 + 1.2 * rng.beta(1, 2.2), 4)
        seen = emotion if rng.random() < FACE_TELL else rng.choice(labels)
        heard = emotion if rng.random() < VOICE_TELL else rng.choice(labels)
        sound, loudness = voice(rng, actors[speaker].pitch, ACTING[heard][0], seconds, rate)
        face = np.empty((max(1, round(seconds * FPS)), 6), np.float32)
        face[:, :5] = ACTING[seen][1] + FACE_NOISE * rng.standard_normal(5)
        face[:, 5] = loudness[(np.arange(len(face)) / FPS * rate).astype(int).clip(max=len(loudness) - 1)]
        turns.append(Turn(actors[speaker], emotion, sentence(rng, emotion), clock, clock + seconds, sound, face))
        clock = round(clock + seconds + rng.uniform(0.1, 0.4), 4)
    return turns


def sentence(rng: np.random.Generator, emotion: str) -> str:
    """One sentence whose one or two telling words show the emotion, a neighbouring one, or none."""
    shown = TELLING[emotion].split()
    if rng.random() >= WORDS_TELL:
        shown = TELLING[CONFUSED[emotion]].split() if rng.random() < 0.4 else NON_COMMITTAL
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


def write_frames(path: Path, frames: np.ndarray, sound: np.ndarray | None = None, rate: int = 0, layout: str = "") -> None:
    """frames (T, H, W, 3) to a video file; with sound, (channels, samples) float32 in -1..1, to MP4 (H.264 and AAC)."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4" if sound is None else "libx264", rate=FPS)
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        video.codec_context.thread_count = 1
        video.options = {"qmin": "6", "qmax": "6"} if sound is None else {"preset": "veryfast", "crf": "26"}
        for frame in np.round(frames).clip(0, 255).astype(np.uint8):
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(video.encode())


def write_wav(path: Path, sound: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(sound.astype("<i2").tobytes())


def draw_dialogue(rng: np.random.Generator, turns: list[Turn], actors: list[Actor]) -> np.ndarray:
    """Both actors side by side; whoever is silent keeps a still, neutral face."""
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


def write_iemocap(root, seed=0, conversations=12, utterances=(10, 18), flaws=False) -> None:
    prepare(root, "IEMOCAP", seed)
    for session in range(1, 6):
        rng = np.random.default_rng([seed, session])
        actors = [make_actor(rng, "F", 200), make_actor(rng, "M", 130)]
        for k in range(conversations):
            letter = "FM"[k % 2]
            kind = f"script{k // 6 + 1:02d}_{k // 2 % 3 + 1}" if k % 6 > 3 else f"impro{k // 2 + 1:02d}"
            name = f"Ses{session:02d}{letter}_{kind}"
            rng = np.random.default_rng([seed, session, k])
            cast = actors if letter == "F" else actors[::-1]
            turns = make_conversation(rng, cast, IEMOCAP_PRIOR, rng.integers(utterances[0], utterances[1] + 1))
            write_dialogue(root / f"Session{session}", name, turns, actors, rng)


def write_dialogue(folder, name, turns, actors, rng) -> None:
    wavs = folder / "sentences" / "wav" / name
    paths = [folder / "dialog" / p for p in ("EmoEvaluation", "transcriptions", "avi/DivX")]
    for path in [wavs, *paths]:
        path.mkdir(parents=True, exist_ok=True)
    labels, words, count = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n"], [], {"F": 0, "M": 0}
    for turn in turns:
        letter = turn.actor.name
        turn_name = f"{name}_{letter}{count[letter]:03d}"
        count[letter] += 1
        labels.append(f"[{turn.start:.4f} - {turn.end:.4f}]\t{turn_name}\t{turn.emotion}\t[2.5000, 2.5000, 2.5000]")
        labels.append("C-E2:\tNeutral;\t()\nA-E3:\tval 3; act 2; dom  2;\t()\n")
        words.append(f"{turn_name} [{turn.start:08.4f}-{turn.end:08.4f}]: {turn.words}")
        write_wav(wavs / f"{turn_name}.wav", turn.sound)
    (paths[0] / f"{name}.txt").write_text("\n".join(labels) + "\n")
    (paths[1] / f"{name}.txt").write_text("\n".join(words) + "\n")
    write_frames(paths[2] / f"{name}.avi", draw_dialogue(rng, turns, actors))


def prepare(root: Path, corpus: str, seed: int) -> None:
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} exists and is not an empty folder; give a new one")
    root.mkdir(parents=True, exist_ok=True)
    (root / "README.txt").write_text(f"made up by demo.py, seed {seed}; not {corpus}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", choices=["iemocap", "meld"])
    parser.add_argument("dir", type=Path)
    args = parser.parse_args()
    write_iemocap(args.dir)
    sys.exit(0)
