"""The feature file: what is written is read, what does not fit is named, columns of any size are standardised."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
from data import NAMES, ROWS, Encoded, FeatureFile, InputError, file_digest, read_features, standardise, write_features


def example():
    """Seven utterances: two conversations of train, one of dev, one of test; one without audio."""
    generator = torch.Generator().manual_seed(0)
    return FeatureFile(
        features={"text": torch.randn(7, 4, generator=generator), "audio_kd": torch.randn(7, 3, generator=generator)},
        present={"text": torch.ones(7, dtype=torch.bool), "audio_kd": torch.arange(7) != 2},
        label=torch.tensor([0, 1, 2, 0, 1, 2, 0]),
        speaker=torch.tensor([0, 1, 0, 1, 0, 0, 2]),
        conversation=torch.tensor([0, 0, 1, 2, 2, 3, 3]),
        split=torch.tensor([0, 0, 0, 1, 1, 2, 2]),
        label_names=["sad", "glad", "mad"],
        speaker_names=["Ada", "Bob", "Eve"],
        conversation_names=["c0", "c1", "c2", "c3"],
        utterance_names=[f"u{i}" for i in range(7)],
        made_from={"text": "0123"},
    )


@pytest.fixture
def path(tmp_path):
    write_features(tmp_path / "f.safetensors", example())
    return tmp_path / "f.safetensors"


def spoil(path, **fields):
    """Writes `example` again with other fields, `...`: without it. Without made_from, as old files are."""
    content = load_file(path) | {n: getattr(example(), n) for n in NAMES} | {"split_names": ["train", "dev", "test"]}
    content = {name: x for name, x in (content | fields).items() if x is not ...}
    tensors = {name: x for name, x in content.items() if isinstance(x, torch.Tensor)}
    save_file(tensors, path, {name: json.dumps(x) for name, x in content.items() if name not in tensors})


BOTH = ("text", "audio_kd")
TEXT, NAN, LONG = example().features["text"].double(), torch.full((7, 3), torch.nan), torch.zeros(7, dtype=torch.long)
FAULTS = [
    ("audio_kd", torch.zeros(6, 3), r"'audio_kd' must be float32 \[7, d\]; got .*\[6, 3\]"),
    ("text", TEXT.masked_fill(TEXT == TEXT[3, 1], torch.nan), "inside row 3, 'u3'"),
    ("text", TEXT.index_fill(0, LONG[:1] + 3, 1e300), "inside row 3, 'u3'"),  # infinite in float32
    ("text", ..., "'text' is missing or NaN throughout"),
    ("label", torch.tensor([0, 1, 2, 3, 0, 0, 0]), "'label' must be 0 to 2; row 3 has 3"),
    ("label", ..., "'label' must be int64 .* got nothing"),
    ("split", LONG, "'split' has no utterance in dev, test"),
    ("split", torch.tensor([0, 0, 0, 0, 1, 2, 2]), "'conversation' must have .* together, in one split"),
    ("conversation", torch.tensor([0, 1, 0, 2, 2, 3, 3]), "'conversation' must have .* together, in one split"),
    ("split_names", ["train", "valid", "test"], "'split_names' must be"),
    ("speaker_names", ..., "metadata must have .*'speaker_names'"),
    ("made_from", ["text"], "metadata must have"),
    ("label_names", ["one"], "'label_names' must name 2 to 100 classes, got 1"),
    ("utterance_names", ["a", "b", "a"], "'utterance_names' contains the name 'a' twice"),
    *[("label_names", x, "'label_names' must be a list of names") for x in (None, "sad", [1, 2], [" ", "a"], ["b\n"])],
]


@pytest.mark.parametrize("field, value, words", FAULTS)
def test_what_does_not_fit_is_named(path, field, value, words):
    spoil(path, **{field: value})
    with pytest.raises(InputError, match=f"{path}: .*{words}"):
        read_features(path)


def test_old_files_and_what_is_no_feature_file(path):
    spoil(path, audio_kd=NAN)
    file = read_features(path)
    assert file.made_from == {} and list(file.features) == ["text"]  # a modality that nobody has is absent
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match=f"{path}: not a readable feature file"):
        read_features(path)


def test_from_encoders_to_the_feature_file_and_back(path):
    """`to_feature_file` makes `example` from a corpus; written and read, it is the same."""
    expected = example()
    who = [expected.speaker_names[i] for i in expected.speaker]
    said = [data.Utterance(f"u{i}", who[i], "", int(expected.label[i]), None, None) for i in range(7)]
    parts = (said[:2], said[2:3], said[3:5], said[5:])
    conversations = [data.Conversation(f"c{i}", tuple(part)) for i, part in enumerate(parts)]
    splits = {"train": conversations[:2], "dev": conversations[2:3], "test": conversations[3:]}
    corpus = data.Corpus("synthetic", tuple(expected.label_names), splits, ())
    expected.features["audio_kd"][2] = torch.nan
    encoded = {kind: Encoded(x.clone(), torch.zeros(7, 3)) for kind, x in expected.features.items()}
    expected.features["audio_kd"][2] = 0
    for file in read_features(path), data.to_feature_file(encoded, corpus, expected.made_from):
        assert file_digest(file, BOTH) == file_digest(expected, BOTH) and file.made_from == expected.made_from


def test_standardise():
    file, plain = example(), standardise(example())[0].features["audio_kd"]
    raw = file.features["audio_kd"] * torch.tensor([1e5, 1e9, 1e-9]) + torch.tensor([3e5, 1e3, 1e-8])
    new, moments = standardise(dataclasses.replace(file, features=file.features | {"audio_kd": raw}))
    train = plain[:2]  # of three utterances of train, one has no audio
    torch.testing.assert_close(train.mean(dim=0), torch.zeros(3))
    torch.testing.assert_close(train.std(dim=0, correction=0), torch.ones(3))
    torch.testing.assert_close(new.features["audio_kd"], plain, rtol=1e-4, atol=1e-4)
    assert not plain[2].any() and moments["audio_kd"]["mean"] == pytest.approx(raw[:2].mean(dim=0).tolist(), rel=1e-5)
    assert moments.keys() == {"audio_kd"} and new.features["text"] is file.features["text"]  # made by our encoder

    x = file.features["audio_kd"]
    x[:, 0], x[1, 0], x[4:, 0] = 123456.7, 123456.71, -5.0  # constant in train, but for rounding
    new, moments = standardise(file)
    assert not new.features["audio_kd"][:, 0].any() and moments["audio_kd"]["std"][0] == 0
    file.present["audio_kd"] = torch.arange(7) > 3
    with pytest.raises(InputError, match="'audio_kd': no utterance of train has it"):
        standardise(file)


def test_the_digest_covers_what_training_reads():
    digests = {file_digest(dataclasses.replace(example(), made_from={}), BOTH)}
    for name in ("nothing", "features", "present", *ROWS, *NAMES):
        file = example()
        if name in NAMES:
            getattr(file, name)[0] += "x"
        elif name != "nothing":
            changed = getattr(file, name) if name in ROWS else getattr(file, name)["audio_kd"]
            changed[0] = 1 - changed[0].long()
        digests.add(file_digest(file, BOTH))
        assert (file_digest(file, ("text",)) == file_digest(example(), ("text",))) == (name not in (*ROWS, *NAMES))
    assert len(digests) == 4 + len(ROWS) + len(NAMES)
