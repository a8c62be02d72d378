"""The demo: a synthetic corpus in IEMOCAP's layout, and small encoders with random weights.

A speaker tends to keep the emotion of their previous turn and to take over that of the turn before, so context helps.
The text shows the emotion most often, the voice (a tone in syllables) less often, the drawn face least. They err
independently, so fusion helps. Change the first constants and run the demo again. No number is about people.
"""

import dataclasses
import os
import secrets
import shutil
import wave
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from data import MODALITIES, TEMPORARY, Corpus, InputError, digest, read_iemocap

KEEP, CATCH = 0.55, 0.20  # probability of the speaker's previous emotion, of the previous turn's; else a fresh draw
TEXT_SHOWS, TEXT_MISLEADS = 0.70, 0.12  # the text shows the emotion, or its neighbour; else it is non-committal
VOICE_SHOWS, VOICE_STD = 0.60, 0.30  # the voice shows the emotion, else one drawn uniformly; spread around its typical
FACE_SHOWS, FACE_STD = 0.52, 0.35  # the same for the face
SAMPLE_RATE, FPS = 16_000, 10
HEIGHT, WIDTH, GREY = 96, 144, 90  # IEMOCAP's 3:2; both faces lie in the central square, so a centre crop keeps them
# How often each label is drawn. They stand in pairs of neighbours, whose texts are confused with each other.
IEMOCAP = {"ang": 0.15, "fru": 0.20, "exc": 0.17, "hap": 0.13, "neu": 0.20, "sad": 0.15}
# Voice: pitch and its rise (semitones), timbre (how slowly the harmonics decay), syllables per second, breath, how
# clipped the syllables are, tremor. Face, -1 to 1: inner brows down, brows up, mouth up, eyes open, red. Then words.
ACTING = dict(
    ang=((3, -4, 0.82, 6, 0.35, 2, 0), (1, -0.5, -0.5, 0.2, 1), "furious angry mad outraged raging"),
    exc=((9, 4, 0.75, 7, 0.05, 1.2, 0), (-0.3, 0.9, 1, 1, 0.5), "excited thrilled amazed ecstatic eager"),
    fru=((0, -3, 0.75, 4.8, 0.2, 1.8, 0), (0.6, -0.2, -0.8, -0.4, 0.4), "frustrated annoyed stuck irritated impatient"),
    hap=((6, 3, 0.6, 5.4, 0.05, 0.8, 0), (0, 0.3, 0.9, 0, 0.2), "happy glad pleased delighted grateful"),
    neu=((0, 0, 0.5, 4.2, 0.08, 0.8, 0), (0, 0, 0, 0, 0), "fine okay normal usual alright"),
    sad=((-4, -2, 0.25, 2.8, 0.15, 0.5, 0.3), (-1, 0, -0.9, -0.8, -0.7), "sad heartbroken lonely miserable gloomy"),
)
VOICE_SPREAD = np.array([3.0, 3.0, 0.15, 1.2, 0.1, 0.4, 0.15])  # what VOICE_STD = 1 means for each
NON_COMMITTAL = "busy ready early late here waiting"
TOPICS = "flight car office letter house dinner phone ticket party doctor keys bank weekend neighbor".split()
OPENERS = ("Well", "You know", "Look", "So", "Yeah", "Listen", "Oh", "I mean")
SENTENCES = ("{o}, I am {e} about the {t}.", "{o}, I feel {e} and {e2} today.", "{o}, are you {e} about the {t}?")
SENTENCES += ("{o}, the {t} is so {e}.", "{o}, that {t} made me {e}.", "{o}, it is all {e} with this {t}, just {e2}.")
IN_FULL = dict(zip(IEMOCAP, "Anger Frustration Excited Happiness Neutral Sadness".split()))  # as IEMOCAP's annotators
Actor = namedtuple("Actor", "name pitch skin")  # Hz; RGB, 0 to 255
# start, end: seconds; audio: (samples,) int16; face: (frames, 6), ACTING's five and how far the mouth is open.
Turn = namedtuple("Turn", "actor emotion text start end audio face")


def make_actor(rng: np.random.Generator, name: str, pitch: float) -> Actor:
    return Actor(name, pitch * rng.uniform(0.92, 1.08), rng.uniform((190, 150, 120), (235, 185, 155)))


def make_conversation(rng, actors: list[Actor], utterances: tuple[int, int]) -> list[Turn]:
    """Draws utterances[0] to utterances[1] turns in the order of speaking, 0.8 to 2 s each, 0.1 to 0.4 s apart."""
    turns, last, speaker, clock = [], {}, 0, 0.6
    names, share = list(IEMOCAP), np.array(list(IEMOCAP.values())) / sum(IEMOCAP.values())
    for k in range(rng.integers(utterances[0], utterances[1] + 1)):
        if 0 < k < 4:  # the first four take turns, so that tests know which utterances exist
            speaker = (speaker + 1) % len(actors)
        elif k and rng.random() < 0.8:
            speaker = (speaker + rng.integers(1, len(actors))) % len(actors)
        draw, emotion = rng.random(), str(rng.choice(names, p=share))
        if draw < KEEP:
            emotion = last.get(speaker, emotion)
        elif draw < KEEP + CATCH and turns:
            emotion = turns[-1].emotion
        last[speaker] = emotion
        seconds = round(0.8 + 1.2 * rng.beta(1, 2.6), 4)
        in_voice = emotion if rng.random() < VOICE_SHOWS else str(rng.choice(names))
        in_face = emotion if rng.random() < FACE_SHOWS else str(rng.choice(names))
        audio, loudness = voice(rng, actors[speaker].pitch, ACTING[in_voice][0], seconds)
        face = np.empty((round(seconds * FPS), 6))
        face[:, :5] = ACTING[in_face][1] + FACE_STD * rng.standard_normal(5)
        face[:, 5] = loudness[np.linspace(0, len(audio) - 1, len(face)).astype(int)]
        neighbour = names[names.index(emotion) ^ 1]  # the other of its pair
        text = sentence(rng, [ACTING[emotion][2], ACTING[neighbour][2], NON_COMMITTAL])
        turns.append(Turn(actors[speaker], emotion, text, clock, round(clock + seconds, 4), audio, face))
        clock = round(clock + seconds + rng.uniform(0.1, 0.4), 4)
    return turns


def sentence(rng, pools: list[str]) -> str:
    """pools: words of the emotion, of its neighbour, non-committal ones."""
    pool = rng.choice(pools, p=[TEXT_SHOWS, TEXT_MISLEADS, 1 - TEXT_SHOWS - TEXT_MISLEADS]).split()
    first, second = rng.choice(pool, 2, replace=False)
    return str(rng.choice(SENTENCES)).format(o=rng.choice(OPENERS), e=first, e2=second, t=rng.choice(TOPICS))


def voice(rng, own_pitch: float, acting: tuple, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """The audio, (samples,) int16, and its loudness, (samples,) from 0 to 1."""
    acting = acting + VOICE_STD * VOICE_SPREAD * rng.standard_normal(len(acting))
    least, most = [-12, -12, 0.05, 1.5, 0, 0.2, 0], [18, 12, 0.88, 9, 0.6, 3, 0.6]
    pitch, rise, timbre, pace, breath, clipped, tremor = np.clip(acting, least, most)
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    syllable, part = np.divmod(time * pace + 0.3 * rng.random(), 1)
    semitones = pitch + rise * (time / seconds - 0.5) + rng.normal(0, 0.6, 20)[syllable.astype(int)]
    phase = 2 * np.pi * np.cumsum(own_pitch * 2 ** (semitones / 12)) / SAMPLE_RATE
    loudness = np.sin(np.pi * part) ** clipped * (1 - tremor * (0.5 + 0.5 * np.sin(2 * np.pi * 9 * time)))
    # The sum of timbre^k sin(k phase) over all harmonics k in closed form, scaled to a power of 1.
    tone = np.sin(phase) / (1 - 2 * timbre * np.cos(phase) + timbre**2) * np.sqrt(2 * (1 - timbre**2))
    noise = rng.standard_normal(len(time))
    audio = (loudness * ((1 - breath) * tone + breath * noise) + 0.01 * noise) * rng.uniform(2000, 4000)
    return audio.clip(-32767, 32767).astype(np.int16), loudness


def draw_faces(rng, faces: np.ndarray, actor: Actor, size: int) -> np.ndarray:
    """Turn.face (frames, 6) -> RGB (frames, size, size, 3) float32, 0 to 255; a head fills the square."""
    inner, raised, smile, eyes, red, opening = np.float32(faces).T[:, :, None, None]
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].astype(np.float32)
    x, y = (a + 0.03 * (opening > 0) * rng.standard_normal(opening.shape, np.float32) for a in (x, y))  # nodding
    side = np.abs(x)  # both halves of the face at once
    image = np.full((len(faces), size, size, 3), GREY, np.float32)

    def paint(inside, colour):  # inside: distance from the edge in half heads, negative outside
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


def write_video(path: Path, frames: np.ndarray) -> None:
    """frames: (L, H, W, 3), written as MPEG-4."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=FPS, options={"qmin": "7", "qmax": "7"})
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        video.codec_context.thread_count = 1  # the same pixels for any number of cores
        for frame in frames:
            rgb = np.round(frame).clip(0, 255).astype(np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(rgb, "rgb24")))
        container.mux(video.encode())


def write_iemocap(root: Path, seed: int = 0, conversations: int = 12, utterances: tuple[int, int] = (10, 18)) -> None:
    """Writes five sessions of `conversations` each, of utterances[0] to utterances[1] turns, to an empty folder."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "README.txt").write_text(f"synthetic, written by extras/demo.py with seed {seed}; not IEMOCAP\n")
    for session in range(1, 6):
        rng = np.random.default_rng([seed, session])
        actors = [make_actor(rng, "F", 200), make_actor(rng, "M", 130)]
        for k in range(conversations):
            rng = np.random.default_rng([seed, session, k])  # one each: with more of them, the first stay the same
            letter, n = "FM"[k % 2], k // 4
            kind = f"script{n // 3 + 1:02d}_{n % 3 + 1}" if k % 4 > 1 else f"impro{n + 1:02d}"
            turns = make_conversation(rng, actors if letter == "F" else actors[::-1], utterances)
            write_dialogue(rng, root / f"Session{session}", f"Ses{session:02d}{letter}_{kind}", turns, actors)


def write_dialogue(rng, session: Path, name: str, turns: list[Turn], actors: list[Actor]) -> None:
    """Writes one conversation to a session's folder: labels, transcript, a WAV per utterance, one AVI for all."""
    wavs, dialog = session / "sentences/wav" / name, session / "dialog"
    labels, transcripts, videos = dialog / "EmoEvaluation", dialog / "transcriptions", dialog / "avi/DivX"
    for folder in (wavs, labels, transcripts, videos):
        folder.mkdir(parents=True, exist_ok=True)
    evaluation, transcript, count = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n", "", {"F": 0, "M": 0}
    frames = np.full((int((turns[-1].end + 0.6) * FPS), HEIGHT, WIDTH, 3), GREY, np.float32)
    sides = {"F": slice(WIDTH // 2 - 47, WIDTH // 2 - 1), "M": slice(WIDTH // 2 + 1, WIDTH // 2 + 47)}
    for actor in actors:  # whoever is silent has a still, neutral face
        frames[:, 25:71, sides[actor.name]] = draw_faces(rng, np.zeros((1, 6)), actor, 46)
    for actor, emotion, text, start, end, audio, face in turns:
        first = round(start * FPS)
        frames[first : first + len(face), 25:71, sides[actor.name]] = draw_faces(rng, face, actor, 46)
        turn_name = f"{name}_{actor.name}{count[actor.name]:03d}"
        count[actor.name] += 1
        v, a, d = rng.integers(1, 6, 3)
        evaluation += f"[{start:.4f} - {end:.4f}]\t{turn_name}\t{emotion}\t[{v:.4f}, {a:.4f}, {d:.4f}]\n"
        evaluation += "".join(f"C-{who}:\t{IN_FULL[emotion]};\t()\n" for who in ("E2", "E3", "E4"))
        evaluation += "".join(f"A-{who}:\tval {v}; act {a}; dom  {d};\t()\n" for who in ("E3", "E4")) + "\n"
        transcript += f"{turn_name} [{start:08.4f}-{end:08.4f}]: {text}\n"
        with wave.open(str(wavs / f"{turn_name}.wav"), "wb") as file:
            file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", "not compressed"))
            file.writeframes(audio.astype("<i2").tobytes())
    (labels / f"{name}.txt").write_text(evaluation)
    (transcripts / f"{name}.txt").write_text(transcript)
    write_video(videos / f"{name}.avi", frames)


def read_demo(out: Path) -> Corpus:
    """The synthetic corpus of a run's folder `out`: 100 conversations, written to out/corpus if need be."""
    write_once(out / "corpus", lambda root: write_iemocap(root, conversations=20))
    return dataclasses.replace(read_iemocap(out / "corpus"), name="demo (synthetic)")


def tiny_models(corpus: Corpus, out: Path) -> dict[str, str]:
    """Small random encoders, written to out/tiny if need be: {"text_model": path, "audio_model": .., ..}."""
    texts = [u.text for u in corpus.utterances("train")]
    write_once(out / "tiny", lambda folder: save_tiny(folder, texts), *texts)
    return {f"{m}_model": str(out / "tiny" / m) for m in MODALITIES}


def write_once(folder: Path, write: Callable[[Path], object], *inputs: str) -> None:
    """Makes sure that `folder` contains what `write(folder)`, made from `inputs`, writes today.

    A folder that does not agree with its digest.txt is renamed to NAME.<8 digits>.
    """
    written = folder / "digest.txt"
    if written.is_file() and written.read_bytes() == _digest(folder, inputs):
        return
    if os.path.lexists(folder):
        old = folder.rename(f"{folder}.{secrets.token_hex(4)}")
        print(f"{folder} was changed, or made from other text: renamed to {old.name}", flush=True)
    print(f"writing {folder} (synthetic)", flush=True)
    temporary = folder.with_name(TEMPORARY + folder.name)
    shutil.rmtree(temporary, ignore_errors=True)  # of an interrupted run
    try:
        write(temporary)
    except Exception as e:
        if "(os error " not in str(e):  # how safetensors and tokenizers report a full disk
            raise
        raise InputError(f"{folder}: cannot be written ({e})") from e
    temporary.rename(folder)
    written.write_bytes(_digest(folder, inputs))


def _digest(folder: Path, inputs: tuple[str, ...]) -> bytes:
    """Of this module, `inputs` and the folder's files, but hidden ones and digest.txt."""
    paths = [path for path in sorted(folder.rglob("[!.]*")) if path.is_file() and path.name != "digest.txt"]
    content = [(path.relative_to(folder).as_posix(), digest(path.read_bytes())) for path in paths]
    return digest(Path(__file__).read_text("utf-8"), inputs, content).encode()


def save_tiny(folder: Path, texts: list[str], seed: int = 0) -> dict[str, str]:
    """Writes small random checkpoints with their processors; their classes and files are those of full size.

    texts: what the tokenizer is trained on. Returns modality -> path.
    """
    torch.manual_seed(seed)
    paths = {m: str(Path(folder) / m) for m in MODALITIES}
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}  # by their ids in RoBERTa
    special |= {"unk_token": "<unk>", "mask_token": "<mask>"}
    lines = [*(f" {t}" for t in texts), *[" For", " Now", " feels"] * 10]  # the latter: of the prompt
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(lines, 2000, min_frequency=0, show_progress=False, special_tokens=list(special.values()))
    config = transformers.RobertaConfig(vocab_size=bpe.get_vocab_size(), max_position_embeddings=66, **size)
    transformers.RobertaModel(config, add_pooling_layer=False).save_pretrained(paths["text"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe.to_str()), **special)
    tokenizer.save_pretrained(paths["text"])
    # Four wide convolutions and one layer: clips go through one by one, so the time grows with the number of layers.
    audio = {"conv_dim": (32,) * 4, "conv_kernel": (20, 4, 2, 2), "conv_stride": (20, 4, 2, 2), "layerdrop": 0.0}
    audio |= {"feat_extract_activation": "relu", "num_conv_pos_embeddings": 2, "num_conv_pos_embedding_groups": 4}
    config = transformers.Data2VecAudioConfig(**size | audio | {"num_hidden_layers": 1})
    transformers.Data2VecAudioModel(config).save_pretrained(paths["audio"])
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(paths["audio"])
    config = transformers.TimesformerConfig(image_size=48, patch_size=12, num_frames=8, **size)
    transformers.TimesformerModel(config).save_pretrained(paths["video"])
    transformers.VideoMAEImageProcessor(size={"shortest_edge": 48}).save_pretrained(paths["video"])
    return paths
