"""The feature file: what is written is read, what does not fit is named, columns of any size are standardised."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

import data
from data import NAMES, ROWS, Encoded, InputError, file_digest, read_features, standardise, write_features


def example():
    """Seven utterances: two conversations of train, one of dev, one of test; one without audio."""
    who = zip(("Ada", "Bob", "Ada", "Bob", "Ada", "Ada", "Eve"), (0, 1, 2, 0, 1, 2, 0))
    said = [data.Utterance(f"u{i}", speaker, "", label, None, None) for i, (speaker, label) in enumerate(who)]
    parts = (said[:2], said[2:3], said[3:5], said[5:])
    conversations = [data.Conversation(f"c{i}", tuple(part)) for i, part in enumerate(parts)]
    splits = {"train": conversations[:2], "dev": conversations[2:3], "test": conversations[3:]}
    generator = torch.Generator().manual_seed(0)
    text, audio = (torch.randn(7, d, generator=generator) for d in (4, 3))
    audio[2] = torch.nan
    encoded = {"text": Encoded(text, torch.zeros(7, 3)), "audio_kd": Encoded(audio, torch.zeros(7, 3))}
    corpus = data.Corpus("synthetic", ("sad", "glad", "mad"), splits, ())
    return data.to_feature_file(encoded, corpus, {"text": "0123"})


BOTH = ("text", "audio_kd")
TEXT, LONG = example().features["text"].double(), torch.zeros(7, dtype=torch.long)
FAULTS = [
    ("audio_kd", torch.zeros(6, 3), r"'audio_kd' must be float32 \[7, d\]; got .*\[6, 3\]"),
    ("text", TEXT.index_fill(0, LONG[:1] + 3, 1e300), "inside row 3, 'u3'"),  # infinite in float32
    ("text", ..., "'text' is missing or NaN throughout"),
    ("label", torch.tensor([0, 1, 2, 3, 0, 0, 0]), "'label' must be 0 to 2; row 3 has 3"),
    ("label", ..., r"'label' must be int64 .* got .* \[0\]"),
    ("split", LONG, "'split' has no utterance in dev, test"),
    ("conversation", torch.tensor([0, 1, 0, 2, 2, 3, 3]), "'conversation' must have .* together, in one split"),
    ("split_names", ["train", "valid", "test"], "'split_names' must be"),
    ("speaker_names", ..., "KeyError: 'speaker_names'.*metadata must have"),
    ("label_names", ["one"], "'label_names' must name 2 to 100 classes, got 1"),
    *[("label_names", x, "must be a list of different names") for x in ("sad", [1, 2], [" ", "a"], ["b\n"], ["a"] * 2)],
]


def test_what_does_not_fit_is_named(tmp_path):
    path = tmp_path / "f.safetensors"

    def read(**fields):
        """`example` with other fields, `...`: without it. Without made_from, as old files are."""
        content = {name: getattr(example(), name) for name in (*ROWS, *NAMES)} | example().features
        content |= {"split_names": ["train", "dev", "test"]} | fields
        tensors = {name: x for name, x in content.items() if isinstance(x, torch.Tensor)}
        save_file(tensors, path, {k: json.dumps(x) for k, x in content.items() if k not in tensors and x is not ...})
        return read_features(path)

    file = read(audio_kd=torch.full((7, 3), torch.nan))
    assert file.made_from == {} and list(file.features) == ["text"]  # a modality that nobody has is absent
    for field, value, words in FAULTS:
        with pytest.raises(InputError, match=f"{path}: .*{words}"):
            read(**{field: value})
    with pytest.raises(InputError, match="not a readable feature file"):
        read_features(__file__)


def test_what_is_written_is_read(tmp_path):
    file, path = example(), tmp_path / "f.safetensors"
    write_features(path, file)
    assert file_digest(read_features(path), BOTH) == file_digest(file, BOTH) and read_features(path).made_from
    rows = [getattr(file, name).tolist() for name in ROWS]
    assert rows[:2] == [[0, 1, 2, 0, 1, 2, 0], [0, 1, 0, 1, 0, 0, 2]]
    assert rows[2:] == [[0, 0, 1, 2, 2, 3, 3], [0, 0, 0, 1, 1, 2, 2]]


def test_standardise():
    file, plain = example(), standardise(example())[0].features["audio_kd"]
    raw = file.features["audio_kd"] * torch.tensor([1e5, 1e9, 1e-9]) + torch.tensor([3e5, 1e3, 1e-8])
    new, moments = standardise(dataclasses.replace(file, features=file.features | {"audio_kd": raw}))
    torch.testing.assert_close(plain[:2].mean(dim=0), torch.zeros(3))  # two of train's three utterances have audio
    torch.testing.assert_close(plain[:2].std(dim=0, correction=0), torch.ones(3))
    torch.testing.assert_close(new.features["audio_kd"], plain, rtol=1e-4, atol=1e-4)
    assert not plain[2].any() and moments["audio_kd"]["mean"] == pytest.approx(raw[:2].mean(dim=0).tolist(), rel=1e-5)
    assert moments.keys() == {"audio_kd"} and new.features["text"] is file.features["text"]  # made by our encoder

    x = file.features["audio_kd"]
    x[:, 0], x[1, 0], x[4:, 0] = 123456.7, 123456.71, -5.0  # constant in train, but for rounding
    new, moments = standardise(file)
    assert not new.features["audio_kd"][:, 0].any() and moments["audio_kd"]["std"][0] == 0
