"""Small synthetic corpora in the layouts of IEMOCAP and MELD, with the irregularities of real copies."""

import csv
from pathlib import Path

import av
import numpy as np

from extras import demo

EMOTIONS = "neutral anger joy sadness surprise fear disgust".split()
COLUMNS = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime"
TIMES = "00:16:16,059", "00:16:21,731"  # of the episode, not of the clip
FOLDERS = {"train": "train_splits", "dev": "dev/dev_splits_complete", "test": "test/output_repeated_splits_test"}
CAST = "Ada Bruno Clara Dario Edith Felix".split()
APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X\xa3\xa2".ljust(212, b"\x00")  # macOS leaves these files


def make_iemocap(root: Path) -> Path:
    demo.write_iemocap(root, seed=1, conversations=3, utterances=(8, 10))
    transcripts = [root / f"Session{n}/dialog/transcriptions/Ses0{n}F_impro01.txt" for n in range(1, 6)]
    labels = [root / f"Session{n}/dialog/EmoEvaluation/Ses0{n}F_impro01.txt" for n in range(1, 6)]
    # Stubs beside files, lines of the transcript that are no turn.
    for path in [path for path in (root / "Session1").rglob("Ses01F_impro01*") if path.is_file()]:
        path.with_name("._" + path.name).write_bytes(APPLE_DOUBLE)
    noise = "Ses01F_impro01_MXX0 [000.1000-000.4000]: [BREATHING]\nM: Yeah.\n"
    transcripts[0].write_text(noise + transcripts[0].read_text())
    # Labels go by name, not by time.
    header, *turns, end = labels[1].read_text().split("\n\n")
    labels[1].write_text("\n\n".join([header, *sorted(turns, key=lambda turn: turn.split("\t")[1]), end]))
    # The first five turns have labels that are not among the six.
    header, *turns = labels[2].read_text().split("\n\n")
    for k, label in enumerate(("xxx", "sur", "fea", "dis", "oth")):
        times, name, _, rest = turns[k].split("\t", 3)
        turns[k] = "\t".join((times, name, label, rest))
    labels[2].write_text("\n\n".join([header, *turns]))
    next(root.rglob("Ses04F_impro01_F000.wav")).unlink()
    (root / "Session5/dialog/avi/DivX").rename(root / "Session5/dialog/avi/Divx")
    return root


def make_meld(root: Path) -> Path:
    """dev's csv and clips are in dev/, test's clips in test/."""
    for s, (split, folder) in enumerate(FOLDERS.items()):
        (root / folder).mkdir(parents=True)
        rows = []
        for k in ((0, 1, 3, 4, 5), (0, 1), (0, 1, 2))[s]:  # a gap in the numbers
            for u in range(4 + k % 3):
                emotion, speaker = EMOTIONS[(s + k + 2 * u) % 7], CAST[k // 2 + u % 3]
                text = f"Well, {CAST[u]}, \x93It\x92s {emotion}\x85\x94"  # control characters for punctuation
                rows.append([len(rows) + 1, text, speaker, emotion, "positive", k, u, 1, 1, *TIMES])
                audio = 0.5 * np.sin(np.arange(48_000 + 4_800 * u) / (5 + 2 * k + s))
                write_media(root / folder / f"dia{k}_utt{u}.mp4", 1 + u / 10, audio)
        table = root / ("dev" if split == "dev" else "") / f"{split}_sent_emo.csv"
        write_rows(table, COLUMNS.split(","), rows[::-1])  # in no order of speaking
    train, dev, test = (root / folder for folder in FOLDERS.values())
    # A clip without a row, a row without a clip, a clip without its index (moov), a wrong one beside the corrected one.
    (train / "dia2_utt0.mp4").touch()
    (dev / "dia0_utt1.mp4").unlink()
    (train / "dia0_utt1.mp4").write_bytes((train / "dia0_utt1.mp4").read_bytes().partition(b"moov")[0])
    (test / "dia0_utt0.mp4").rename(test / "final_videos_testdia0_utt0.mp4")
    (test / "dia0_utt0.mp4").write_bytes((test / "dia0_utt1.mp4").read_bytes())
    return root


def write_media(path, video=5.0, audio=None, codecs=("mpeg4", "aac"), rotation=0, **options):
    """video: seconds; 0 for none. audio: [T] or [6, T] at 48 kHz. options: of FFmpeg's muxer."""
    with av.open(str(path), "w", options=options) as f:
        if video:
            track = f.add_stream(codecs[0], rate=10, width=64, height=48, pix_fmt="yuv420p", options={"g": "12"})
            track.set_display_rotation(rotation)
        if audio is not None:
            audio = np.atleast_2d(np.float32(audio))
            layout = "mono" if len(audio) == 1 else "5.1"
            heard = f.add_stream(codecs[1], rate=48_000, layout=layout, bit_rate=64_000)
            frame = av.AudioFrame.from_ndarray(audio, "fltp", layout)
            frame.sample_rate, frame.pts = 48_000, 0
            f.mux([*heard.encode(frame), *heard.encode()])
        for i in range(round(video * 10)):
            picture = np.zeros((48, 64, 3), np.uint8)
            picture[..., 1] = 5 * i
            picture[:8, :, 0] = 255 * (rotation != 0)  # a red bar at the top
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i
            f.mux(track.encode(frame))
        if video:
            f.mux(track.encode())
    return path


def write_rows(path: Path, columns: list[str], rows: list[list], delimiter: str = ",") -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([columns, *rows])
    return path


def write_as_csv(path: Path, corpus) -> Path:
    """A corpus that another reader has read, as `data.read_csv` reads it."""
    rows = []
    for split, conversations in corpus.splits.items():
        for c in conversations:
            for u in c.utterances:
                cells = [split, c.id, u.speaker, u.text, corpus.label_names[u.label]]
                rows.append([*cells, u.id.removeprefix(f"{c.id}_"), u.audio, u.video, u.start, u.end])
    return write_rows(path, "split conversation speaker text label id audio video start end".split(), rows)
