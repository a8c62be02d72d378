"""Small synthetic corpora in the layouts of IEMOCAP and MELD, with the irregularities of real copies."""

import csv
from pathlib import Path

import numpy as np

from extras import demo

# How often each label is drawn, by the names that extras/demo.py acts.
EMOTIONS = {"ang": 0.15, "dis": 0.08, "hap": 0.17, "sur": 0.13, "fea": 0.09, "sad": 0.11, "neu": 0.27}
IN_CSV = dict(zip(EMOTIONS, "anger disgust joy surprise fear sadness neutral".split()))
COLUMNS = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime"
TIMES = "00:16:16,059", "00:16:21,731"  # of the episode, not of the clip
FOLDERS = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}
CAST = {"Ada": 215, "Bruno": 120, "Clara": 190, "Dario": 140, "Edith": 205, "Felix": 130}  # pitch in Hz
SIZE, RATE = 96, 44_100  # pixels, Hz
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
    rng = np.random.default_rng(1)
    cast = [demo.make_actor(rng, *person) for person in CAST.items()]
    for s, (split, folder) in enumerate(FOLDERS.items()):
        (root / folder).mkdir(parents=True)
        rows = []
        for k in range((6, 2, 3)[s]):
            rng = np.random.default_rng([1, s, k])
            actors = [cast[i] for i in rng.permutation(len(cast))[: rng.integers(2, 5)]]
            turns = demo.make_conversation(rng, actors, EMOTIONS, (4, 6), RATE)
            for u, (actor, emotion, text, _, _, samples, face) in enumerate(turns):
                rows.append([len(rows) + 1, text, actor.name, IN_CSV[emotion], "positive", k, u, 1, 1, *TIMES])
                channels = np.outer(demo.CHANNELS[rng.choice(list(demo.CHANNELS))], samples)
                frames = demo.draw_faces(rng, face, actor, SIZE)
                demo.write_video(root / folder / f"dia{k}_utt{u}.mp4", frames, channels, RATE)
        write_rows(root / f"{split}_sent_emo.csv", COLUMNS.split(","), rows)
    train, dev, test = (root / folder for folder in FOLDERS.values())
    for folder in (train, dev, test):
        (folder / "._dia0_utt0.mp4").write_bytes(APPLE_DOUBLE)
    # Control characters for punctuation, a clip without a row, a gap in the numbers, rows in no order of speaking.
    with open(root / "train_sent_emo.csv", encoding="utf-8", newline="") as file:
        columns, *rows = csv.reader(file)
    rows[0][1] += " \x93It\x92s done\x85\x94"
    rows = [row for row in rows if row[5] != "2" and row[5:7] != ["1", "1"]]
    write_rows(root / "train_sent_emo.csv", columns, rows[::-1])
    for clip in [*train.glob("dia2_utt*.mp4"), dev / "dia0_utt1.mp4"]:
        clip.unlink()
    # A clip without its index (moov), a wrong one beside the corrected one, 20 ms of audio, four minutes.
    (train / "dia0_utt1.mp4").write_bytes((train / "dia0_utt1.mp4").read_bytes().partition(b"moov")[0])
    (test / "dia0_utt0.mp4").rename(test / "final_videos_testdia0_utt0.mp4")
    (test / "dia0_utt0.mp4").write_bytes((test / "dia0_utt1.mp4").read_bytes())
    for path, seconds, audio_seconds in ((train / "dia0_utt2.mp4", 1.5, 0.02), (test / "dia0_utt2.mp4", 240, 240)):
        frames = np.full((int(seconds * demo.FPS), SIZE, SIZE, 3), demo.GREY, np.uint8)
        demo.write_video(path, frames, np.zeros((1, int(audio_seconds * RATE)), np.int16), RATE)
    # csv and clips of dev in dev/, the clips of test in test/.
    (root / "dev").mkdir()
    (root / "test").mkdir()
    for path in (dev, test, root / "dev_sent_emo.csv"):
        path.rename(root / path.name.replace("dev_", "dev/dev_").replace("output_", "test/output_"))
    return root


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
