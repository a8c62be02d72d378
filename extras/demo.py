"""A small made-up corpus, written to disk from a seed in the layout of IEMOCAP or of MELD.

    python -m extras.demo iemocap DIR                # WAV, AVI, transcripts, labels: as IEMOCAP_full_release has them
    python -m extras.demo meld DIR --seed 1 --flaws  # csv and MP4: as MELD.Raw has them, with the faults users meet

Whoever speaks tends to keep the emotion of his own last turn and to catch that of the turn before, so context helps.
Words mostly give the emotion away; the voice (a tone in syllables) does so less, the drawn face least. Given the
emotion the three err independently, so fusion helps. The first constants say how much each tells: try other values.

Not here: real speech, real faces, overlapping turns, sound in IEMOCAP's videos. No figure obtained on this corpus says
anything about people. Nothing else of this project is imported.
"""

import argparse
import csv
import wave
from collections import namedtuple
from pathlib import Path

import av
import numpy as np

KEEP, CATCH = 0.55, 0.20  # probability of one's own last emotion again, of the last turn's; else a fresh draw
WORDS_TELL, WORDS_MISLEAD = 0.70, 0.12  # the words show the emotion, or its neighbour; else they are non-committal
VOICE_TELL, VOICE_NOISE = 0.60, 0.30  # the voice shows the emotion, else any at random; spread around the typical
FACE_TELL, FACE_NOISE = 0.52, 0.35  # the same for the face

SAMPLE_RATE, FPS = 16_000, 10
HEIGHT, WIDTH, GREY = 96, 144, 90  # IEMOCAP's 3:2; both faces lie in the central square, so a centre crop keeps them

# How often each label is drawn afresh. They stand in pairs of neighbours: those whose words are taken for each other's.
IEMOCAP = {"ang": 0.15, "fru": 0.20, "exc": 0.17, "hap": 0.13, "neu": 0.20, "sad": 0.15}
MELD = {"ang": 0.15, "dis": 0.08, "hap": 0.17, "sur": 0.13, "fea": 0.09, "sad": 0.11, "neu": 0.27}
# Voice: pitch (semitones above the speaker's own), its rise from start to end (semitones), timbre (how slowly the
# harmonics fade, 0 to 1), syllables per second, breath (0 to 1), how clipped the syllables are, tremor (0 to 1).
# Face, -1 to 1: inner ends of the brows down, brows raised, corners of the mouth up, eyes open, red.
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
VOICE_SPREAD = np.array([3.0, 3.0, 0.15, 1.2, 0.1, 0.4, 0.15])  # what VOICE_NOISE = 1 means for each
TELLING = {
    "ang": "furious angry mad outraged raging",
    "dis": "disgusting gross revolting sickening rotten",
    "exc": "excited thrilled amazed ecstatic eager",
    "fea": "scared afraid terrified nervous panicked",
    "fru": "frustrated annoyed stuck irritated impatient",
    "hap": "happy glad pleased delighted grateful",
    "neu": "fine okay normal usual alright",
    "sad": "sad heartbroken lonely miserable gloomy",
    "sur": "surprised shocked stunned speechless startled",
}
NON_COMMITTAL = "busy ready early late here waiting"
TOPICS = "flight car office letter house dinner phone ticket party doctor keys bank weekend neighbor".split()
OPENERS = ("Well", "You know", "Look", "So", "Yeah", "Listen", "Oh", "I mean")
SENTENCES = ("{o}, I am {e} about the {t}.", "{o}, I feel {e} and {e2} today.", "{o}, are you {e} about the {t}?")
SENTENCES += ("{o}, the {t} is so {e}.", "{o}, that {t} made me {e}.", "{o}, it is all {e} with this {t}, just {e2}.")

IN_FULL = dict(zip(IEMOCAP, "Anger Frustration Excited Happiness Neutral Sadness".split()))  # as IEMOCAP's annotators
IN_CSV = dict(zip(MELD, "anger disgust joy surprise fear sadness neutral".split()))
MELD_COLUMNS = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime"
MELD_FOLDERS = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}
MELD_CAST = {"Ada": 215, "Bruno": 120, "Clara": 190, "Dario": 140, "Edith": 205, "Felix": 130}  # pitch in Hz
MELD_GUESTS = {"Gustav": 125, "Helga": 200}  # they appear in test alone
CHANNELS = {"mono": [1], "stereo": [1, 0.8], "5.1": [0.1, 0.1, 1, 0, 0.05, 0.05]}  # gains
APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X\xa3\xa2".ljust(
    212, b"\x00"
)  # what macOS leaves beside its files

Actor = namedtuple("Actor", "name pitch skin")  # Hz; RGB, 0 to 255
# start, end: seconds; sound: (samples,) int16; face: (frames, 6), ACTING's five and the mouth's opening.
Turn = namedtuple("Turn", "actor emotion words start end sound face")


def make_actor(rng: np.random.Generator, name: str, pitch: float) -> Actor:
    return Actor(name, pitch * rng.uniform(0.92, 1.08), rng.uniform((190, 150, 120), (235, 185, 155)))


def make_conversation(rng, actors: list[Actor], labels: dict[str, float], utterances, rate=SAMPLE_RATE) -> list[Turn]:
    """From utterances[0] to utterances[1] turns in the order of speaking, 0.8 to 2 s each, 0.1 to 0.4 s apart."""
    turns, last, speaker, clock = [], {}, 0, 0.6
    names, share = list(labels), np.array(list(labels.values())) / sum(labels.values())
    for k in range(rng.integers(utterances[0], utterances[1] + 1)):
        if 0 < k < 4:  # one after the other, so that it is known beforehand which turns there are
            speaker = (speaker + 1) % len(actors)
        elif k and rng.random() < 0.8:
            speaker = (speaker + rng.integers(1, len(actors))) % len(actors)
        chance, emotion = rng.random(), str(rng.choice(names, p=share))
        if chance < KEEP:
            emotion = last.get(speaker, emotion)
        elif chance < KEEP + CATCH and turns:
            emotion = turns[-1].emotion
        last[speaker] = emotion
        seconds = round(0.8 + 1.2 * rng.beta(1, 2.6), 4)
        heard = emotion if rng.random() < VOICE_TELL else str(rng.choice(names))
        seen = emotion if rng.random() < FACE_TELL else str(rng.choice(names))
        sound, loudness = voice(rng, actors[speaker].pitch, ACTING[heard][0], seconds, rate)
        face = np.empty((round(seconds * FPS), 6))
        face[:, :5] = ACTING[seen][1] + FACE_NOISE * rng.standard_normal(5)
        face[:, 5] = loudness[np.linspace(0, len(sound) - 1, len(face)).astype(int)]
        neighbour = names[min(names.index(emotion) ^ 1, len(names) - 1)]  # the other one of the pair
        words = sentence(rng, [TELLING[emotion], TELLING[neighbour], NON_COMMITTAL])
        turns.append(Turn(actors[speaker], emotion, words, clock, round(clock + seconds, 4), sound, face))
        clock = round(clock + seconds + rng.uniform(0.1, 0.4), 4)
    return turns


def sentence(rng, pools: list[str]) -> str:
    pool = rng.choice(pools, p=[WORDS_TELL, WORDS_MISLEAD, 1 - WORDS_TELL - WORDS_MISLEAD]).split()
    first, second = rng.choice(pool, 2, replace=False)
    return str(rng.choice(SENTENCES)).format(o=rng.choice(OPENERS), e=first, e2=second, t=rng.choice(TOPICS))


def voice(rng, own_pitch: float, acting: tuple, seconds: float, rate: int) -> tuple[np.ndarray, np.ndarray]:
    """The sound, (samples,) int16, and its loudness in time, (samples,) from 0 to 1."""
    acting = acting + VOICE_NOISE * VOICE_SPREAD * rng.standard_normal(len(acting))
    least, most = [-12, -12, 0.05, 1.5, 0, 0.2, 0], [18, 12, 0.88, 9, 0.6, 3, 0.6]
    pitch, rise, timbre, pace, breath, clipped, tremor = np.clip(acting, least, most)
    time = np.arange(round(seconds * rate)) / rate
    syllable, part = np.divmod(time * pace + 0.3 * rng.random(), 1)
    semitones = pitch + rise * (time / seconds - 0.5) + rng.normal(0, 0.6, 20)[syllable.astype(int)]
    phase = 2 * np.pi * np.cumsum(own_pitch * 2 ** (semitones / 12)) / rate
    loudness = np.sin(np.pi * part) ** clipped * (1 - tremor * (0.5 + 0.5 * np.sin(2 * np.pi * 9 * time)))
    # The sum of timbre^k sin(k phase) over all harmonics k in closed form, scaled to a power of 1.
    tone = np.sin(phase) / (1 - 2 * timbre * np.cos(phase) + timbre**2) * np.sqrt(2 * (1 - timbre**2))
    hiss = rng.standard_normal(len(time))
    sound = (loudness * ((1 - breath) * tone + breath * hiss) + 0.01 * hiss) * rng.uniform(2000, 4000)
    return sound.clip(-32767, 32767).astype(np.int16), loudness


def draw_faces(rng, faces: np.ndarray, actor: Actor, size: int) -> np.ndarray:
    """Turn.face (frames, 6) -> RGB (frames, size, size, 3), 0 to 255; a head fills the square."""
    inner, raised, smile, eyes, red, opening = np.float32(faces).T[:, :, None, None]
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].astype(np.float32)
    x, y = (a + 0.03 * (opening > 0) * rng.standard_normal(opening.shape, np.float32) for a in (x, y))  # nodding
    side = np.abs(x)  # both halves of the face at once
    image = np.full((len(faces), size, size, 3), GREY, np.float32)

    def paint(inside, colour):  # inside: how far from the edge, in half heads, negative outside
        cover = (inside * (size / 2) + 0.5).clip(0, 1)[..., None]
        image[:] += cover * (np.float32(colour) - image)

    paint(0.92 - np.hypot(x * 1.1, y), actor.skin + red[..., None] * [25, -30, -30])
    paint(np.minimum(0.17 - np.abs(side - 0.38), 0.11 + 0.09 * eyes - np.abs(y + 0.18)), (245, 245, 245))
    paint(0.09 - np.hypot(side - 0.38, y + 0.18), (25, 20, 20))
    brow = -0.48 - 0.14 * raised + 0.55 * inner * (0.38 - side)
    paint(np.minimum(0.075 - np.abs(y - brow), 0.27 - np.abs(side - 0.38)), (25, 20, 20))
    mouth = 0.48 + 0.15 * smile - smile * x**2
    paint(np.minimum(0.07 + 0.14 * opening - np.abs(y - mouth), 0.48 - side), (120, 20, 30))
    return image


def write_video(path: Path, frames: np.ndarray, sound: np.ndarray | None = None, rate: int = 0) -> None:
    """frames: (T, H, W, 3), as MPEG-4; with sound, (channels, samples) int16, as H.264 and AAC."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4" if sound is None else "libx264", rate=FPS)
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        video.options = {"qmin": "7", "qmax": "7"} if sound is None else {"preset": "superfast", "crf": "26"}
        video.codec_context.thread_count = 1  # the same pixels whatever the number of cores
        if sound is not None:
            layout = next(name for name, gains in CHANNELS.items() if len(gains) == len(sound))
            audio = container.add_stream("aac", rate=rate, layout=layout, options={"aac_coder": "fast"})
            heard = av.AudioFrame.from_ndarray(np.float32(sound) / 32768, "fltp", layout)
            heard.sample_rate = rate
            container.mux(audio.encode(heard) + audio.encode())
        for frame in frames:
            rgb = np.round(frame).clip(0, 255).astype(np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(rgb, "rgb24")))
        container.mux(video.encode())


def prepare(root: Path, corpus: str, seed: int, enough: bool, utterances: tuple[int, int]) -> None:
    if seed < 0 or not enough or not 1 <= utterances[0] <= utterances[1]:
        raise ValueError(
            "numbers too small: seed from 0, conversations and utterances from 1, LO up to HI, flaws need more"
        )
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} is there already and is not an empty folder: give a new one")
    root.mkdir(parents=True, exist_ok=True)
    (root / "README.txt").write_text(f"made up by demo.py, seed {seed}; not {corpus}\n")


def write_iemocap(root: Path, seed=0, conversations=12, utterances=(10, 18), flaws=False) -> None:
    """Five sessions of `conversations` each, of utterances[0] to utterances[1] turns; with flaws, of 6 at least.

    Raises FileExistsError if root holds anything, ValueError if a number is too small. The same holds for write_meld.
    """
    enough = conversations >= 1 and (utterances[0] >= 6 or not flaws)
    prepare(root, "IEMOCAP", seed, enough, utterances)
    for session in range(1, 6):
        rng = np.random.default_rng([seed, session])
        actors = [make_actor(rng, "F", 200), make_actor(rng, "M", 130)]
        for k in range(conversations):
            rng = np.random.default_rng([seed, session, k])  # its own, so that more of them leave the first as they are
            letter, n = "FM"[k % 2], k // 4
            kind = f"script{n // 3 + 1:02d}_{n % 3 + 1}" if k % 4 > 1 else f"impro{n + 1:02d}"
            turns = make_conversation(rng, actors if letter == "F" else actors[::-1], IEMOCAP, utterances)
            write_dialogue(rng, root / f"Session{session}", f"Ses{session:02d}{letter}_{kind}", turns, actors)
    if flaws:
        plant_iemocap_flaws(root)


def write_dialogue(rng, session: Path, name: str, turns: list[Turn], actors: list[Actor]) -> None:
    inside = (f"sentences/wav/{name}", "dialog/EmoEvaluation", "dialog/transcriptions", "dialog/avi/DivX")
    for folder in inside:
        (session / folder).mkdir(parents=True, exist_ok=True)
    wavs, labels, transcripts, videos = (session / folder / name for folder in inside)
    evaluation, transcript, count = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n", "", {"F": 0, "M": 0}
    frames = np.full((int((turns[-1].end + 0.6) * FPS), HEIGHT, WIDTH, 3), GREY, np.float32)
    sides = {"F": slice(WIDTH // 2 - 47, WIDTH // 2 - 1), "M": slice(WIDTH // 2 + 1, WIDTH // 2 + 47)}
    for actor in actors:  # whoever is silent has a still, neutral face
        frames[:, 25:71, sides[actor.name]] = draw_faces(rng, np.zeros((1, 6)), actor, 46)
    for actor, emotion, words, start, end, sound, face in turns:
        first = round(start * FPS)
        frames[first : first + len(face), 25:71, sides[actor.name]] = draw_faces(rng, face, actor, 46)
        turn_name = f"{name}_{actor.name}{count[actor.name]:03d}"
        count[actor.name] += 1
        v, a, d = rng.integers(1, 6, 3)
        evaluation += f"[{start:.4f} - {end:.4f}]\t{turn_name}\t{emotion}\t[{v:.4f}, {a:.4f}, {d:.4f}]\n"
        evaluation += "".join(f"C-{who}:\t{IN_FULL[emotion]};\t()\n" for who in ("E2", "E3", "E4"))
        evaluation += "".join(f"A-{who}:\tval {v}; act {a}; dom  {d};\t()\n" for who in ("E3", "E4")) + "\n"
        transcript += f"{turn_name} [{start:08.4f}-{end:08.4f}]: {words}\n"
        with wave.open(f"{session}/{inside[0]}/{turn_name}.wav", "wb") as file:
            file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", "not compressed"))
            file.writeframes(sound.astype("<i2").tobytes())
    labels.with_suffix(".txt").write_text(evaluation)
    transcripts.with_suffix(".txt").write_text(transcript)
    write_video(videos.with_suffix(".avi"), frames)


def plant_iemocap_flaws(root: Path) -> None:
    """What a user's copy may have (turns counted in time, from 0; both F and M speak, with flaws or without).

    Ses01F_impro01: an AppleDouble file `._*` beside each of its files; sub-folders Attribute, Categorical and
        Self-evaluation; in the transcript a line with an XX id (Ses01F_impro01_MXX0) and one without id and times.
    Ses02F_impro01: label file and transcript hold all turns of F before those of M.
    Ses03F_impro01: turns 1 to 5 are labelled xxx, sur, fea, dis, oth.
    Ses04F_impro01: F000.wav is missing, M000.wav has no bytes, F001.wav has a header and no samples.
    Session5: the videos of all conversations lie in `Divx`.
    """
    transcripts = [root / f"Session{n}/dialog/transcriptions/Ses0{n}F_impro01.txt" for n in range(1, 6)]
    labels = [root / f"Session{n}/dialog/EmoEvaluation/Ses0{n}F_impro01.txt" for n in range(1, 6)]
    for path in [path for path in (root / "Session1").rglob("Ses01F_impro01*") if path.is_file()]:
        path.with_name("._" + path.name).write_bytes(APPLE_DOUBLE)
    for kind in ("Attribute", "Categorical", "Self-evaluation"):
        (labels[0].parent / kind).mkdir()
        (labels[0].parent / kind / "Ses01F_impro01_e2.txt").write_text("Ses01F_impro01_F000 :Neutral; ()\n")
    noise = "Ses01F_impro01_MXX0 [000.1000-000.4000]: [BREATHING]\nM: Yeah.\n"
    transcripts[0].write_text(noise + transcripts[0].read_text())
    transcripts[1].write_text("".join(sorted(transcripts[1].read_text().splitlines(keepends=True))))
    header, *turns, end = labels[1].read_text().split("\n\n")
    labels[1].write_text("\n\n".join([header, *sorted(turns, key=lambda turn: turn.split("\t")[1]), end]))
    turns = labels[2].read_text().split("\n\n")
    for k, label in enumerate(("xxx", "sur", "fea", "dis", "oth"), start=2):  # after the header and turn 0
        times, name, _, rest = turns[k].split("\t", 3)
        turns[k] = "\t".join((times, name, label, rest))
    labels[2].write_text("\n\n".join(turns))
    missing, empty, cut = (next(root.rglob(f"Ses04F_impro01_{turn}.wav")) for turn in ("F000", "M000", "F001"))
    missing.unlink()
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:44])
    (root / "Session5/dialog/avi/DivX").rename(root / "Session5/dialog/avi/Divx")


def write_meld(root: Path, seed=0, conversations=(40, 6, 14), utterances=(4, 12), flaws=False) -> None:
    """Train, dev and test of so many conversations (with flaws, at least 4 in train and 4 utterances in each)."""
    enough = min(conversations) >= 1 and (conversations[0] >= 4 and utterances[0] >= 4 or not flaws)
    prepare(root, "MELD", seed, enough, utterances)
    rng = np.random.default_rng(seed)
    cast, guests = ([make_actor(rng, *person) for person in people.items()] for people in (MELD_CAST, MELD_GUESTS))
    for s, (split, folder) in enumerate(MELD_FOLDERS.items()):
        (root / folder).mkdir()
        rows = []
        for k in range(conversations[s]):
            rng = np.random.default_rng([seed, s, k])
            actors = [cast[i] for i in rng.permutation(len(cast))[: rng.integers(2, 5)]]
            if split == "test" and k % 2 == 0:
                actors[1] = guests[k // 2 % 2]
            rate, begin, season, episode = rng.choice([44_100, 48_000]), *rng.integers(1, (1200, 10, 25))
            for u, turn in enumerate(make_conversation(rng, actors, MELD, utterances, rate)):
                sentiments = {"neu": "neutral", "hap": "positive", "sur": rng.choice(["positive", "negative"])}
                cells = [turn.words, turn.actor.name, IN_CSV[turn.emotion], sentiments.get(turn.emotion, "negative")]
                times = [meld_time(begin + turn.start), meld_time(begin + turn.end)]
                rows.append([len(rows) + 1, *cells, k, u, season, episode, *times])
                frames = np.full((len(turn.face), HEIGHT, WIDTH, 3), GREY, np.float32)
                frames[:, 4:92, 28:116] = draw_faces(rng, turn.face, turn.actor, 88)
                sound = np.outer(CHANNELS[rng.choice(list(CHANNELS))], turn.sound)
                write_video(root / folder / f"dia{k}_utt{u}.mp4", frames, sound, int(rate))
        write_csv(root / f"{split}_sent_emo.csv", rows)
    if flaws:
        plant_meld_flaws(root)


def meld_time(seconds: float) -> str:
    seconds = round(seconds, 3)
    return f"{int(seconds // 3600):02d}:{int(seconds // 60 % 60):02d}:{seconds % 60:06.3f}".replace(".", ",")


def write_csv(path: Path, rows: list[list]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([MELD_COLUMNS.split(","), *rows])


def plant_meld_flaws(root: Path) -> None:
    """What a user's copy may have.

    Each split: a stub of 212 bytes, `._dia0_utt0.mp4`.
    train: U+0085, U+0092, U+0093 and U+0094 in the words of dia0_utt0; dia0_utt1.mp4 is corrupt (no moov atom);
        dia0_utt2.mp4 has 20 ms of sound; dia1_utt1.mp4 has no row in the csv; there is no dialogue 2.
    dev: csv and clips lie under dev/; dia0_utt1.mp4 is missing.
    test: the clips, not the csv, lie under test/; dia0_utt0.mp4 shows another utterance, the right cut is
        final_videos_testdia0_utt0.mp4; dia0_utt2.mp4 is four minutes long.
    """
    train, dev, test = (root / folder for folder in MELD_FOLDERS.values())
    for folder in (train, dev, test):
        (folder / "._dia0_utt0.mp4").write_bytes(APPLE_DOUBLE)
    with open(root / "train_sent_emo.csv", encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file)
    rows[0][1] += " \x93It\x92s done\x85\x94"
    write_csv(root / "train_sent_emo.csv", [row for row in rows if row[5] != "2" and row[5:7] != ["1", "1"]])
    for clip in [*train.glob("dia2_utt*.mp4"), dev / "dia0_utt1.mp4"]:
        clip.unlink()
    (train / "dia0_utt1.mp4").write_bytes((train / "dia0_utt1.mp4").read_bytes().partition(b"moov")[0])
    (test / "dia0_utt0.mp4").rename(test / "final_videos_testdia0_utt0.mp4")
    (test / "dia0_utt0.mp4").write_bytes((test / "dia0_utt1.mp4").read_bytes())
    for path, seconds, heard in ((train / "dia0_utt2.mp4", 1.5, 0.02), (test / "dia0_utt2.mp4", 240, 240)):
        frames = np.broadcast_to(np.uint8(GREY), (int(seconds * FPS), HEIGHT, WIDTH, 3))
        write_video(path, frames, np.zeros((1, int(heard * 44_100)), np.int16), 44_100)
    (root / "dev").mkdir()
    (root / "test").mkdir()
    for path in (dev, test, root / "dev_sent_emo.csv"):
        path.rename(root / path.name.replace("dev_", "dev/dev_").replace("output_", "test/output_"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    parser.add_argument("corpus", choices=["iemocap", "meld"])
    parser.add_argument("dir", type=Path, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--seed", type=int, help="0 unless given")
    parser.add_argument("--conversations", type=int, metavar="N", help="per session; MELD: in train, N/6 dev, N/3 test")
    parser.add_argument("--utterances", type=int, nargs=2, metavar=("LO", "HI"), help="per conversation")
    parser.add_argument("--flaws", action="store_true", help="plant the faults that users of the real corpora meet")
    options = vars(parser.parse_args())
    corpus, root, n = options.pop("corpus"), options.pop("dir"), options.get("conversations")
    if corpus == "meld" and n is not None:
        options["conversations"] = (n, max(n // 6, 1), max(n // 3, 1))
    try:
        {"iemocap": write_iemocap, "meld": write_meld}[corpus](root, **options)
    except (OSError, ValueError) as error:
        parser.error(str(error))  # exit status 2
    print(f"Made up, in the layout of {corpus.upper()}: {root}")


if __name__ == "__main__":
    main()
