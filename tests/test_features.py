"""The feature file, and the encoders' answers: what is written is read; what does not fit is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from data import (
    NAMES,
    Conversation,
    Corpus,
    Encoded,
    FeatureFile,
    InputError,
    Utterance,
    read_encoded,
    to_feature_file,
    write_encoded,
    write_features,
)
from extras.features import read_features


def example():
    """Seven utterances: two conversations of train, one of dev, one of test; one without sound."""
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
    )


@pytest.fixture
def path(tmp_path):
    write_features(tmp_path / "f.safetensors", example())
    return tmp_path / "f.safetensors"


def test_written_and_read(path):
    before, after = example(), read_features(path)
    before.features["audio_kd"][2] = 0  # the missing one
    for name in ("features", "present"):
        for kind in ("text", "audio_kd"):
            assert torch.equal(getattr(before, name)[kind], getattr(after, name)[kind])
    for name in ("label", "speaker", "conversation", "split"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert all(getattr(before, name) == getattr(after, name) for name in NAMES)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert load_file(path)["audio_kd"][2].isnan().all()


def spoil(path, tensors=None, names=None, without=()):
    """Writes the file again with some fields changed or left out."""
    fields = {k: v for k, v in (load_file(path) | (tensors or {})).items() if k not in without}
    metadata = {name: getattr(example(), name) for name in NAMES} | {"split_names": ["train", "dev", "test"]}
    metadata = {k: json.dumps(v) for k, v in (metadata | (names or {})).items() if k not in without}
    save_file(fields, path, metadata)


NAN = torch.full((7, 3), torch.nan)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"tensors": {"audio_kd": torch.zeros(6, 3)}}, r"'audio_kd' must be float32 \[7, d\]; got .*\[6, 3\]"),
        ({"tensors": {"audio_kd": torch.zeros(7)}}, "'audio_kd' must be float32"),
        ({"tensors": {"audio_kd": torch.zeros(7, 3, dtype=torch.long)}}, "'audio_kd' must be float32"),
        ({"tensors": {"text": torch.eye(7).masked_fill(torch.eye(7) > 0, torch.nan)}}, "'text' has NaN .* row 0"),
        ({"tensors": {"text": torch.full((7, 3), torch.inf)}}, "'text' has NaN or infinity inside row 0"),
        ({"tensors": {"text": NAN}}, "'text' is NaN throughout"),
        ({"without": ("text",)}, "'text' is missing; MAGT's last anchor is text"),
        ({"tensors": {"label": torch.tensor([0, 1, 2, 3, 0, 0, 0])}}, "'label' must be 0 to 2; row 3 has 3"),
        ({"tensors": {"label": torch.zeros(7)}}, r"'label' must be int64 \[7\].*float32"),
        ({"without": ("label",)}, "'label' must be int64 .* got nothing"),
        ({"tensors": {"speaker": torch.full((7,), -1)}}, "'speaker' must be 0 to 2; row 0 has -1"),
        ({"tensors": {"split": torch.full((7,), 7)}}, "'split' must be 0 to 2"),
        ({"tensors": {"split": torch.zeros(7, dtype=torch.long)}}, "'split' has no utterance in dev, test"),
        ({"tensors": {"split": torch.tensor([0, 0, 0, 0, 1, 2, 2])}}, "'split' must not change within"),
        ({"tensors": {"conversation": torch.tensor([0, 1, 0, 2, 2, 3, 3])}}, "'conversation' must hold .* together"),
        ({"names": {"split_names": ["train", "valid", "test"]}}, "'split_names' must be"),
        ({"names": {"utterance_names": ["u"]}}, "'label' must be int64"),
        ({"without": ("speaker_names",)}, "'speaker_names' must be in the metadata"),
    ],
)
def test_what_does_not_fit_is_named(path, changes, words):
    spoil(path, **changes)
    with pytest.raises(InputError, match=f"{path}: field {words}"):
        read_features(path)


def test_a_modality_that_nobody_has_is_absent(path):
    spoil(path, {"audio_kd": NAN})
    assert list(read_features(path).features) == ["text"]


def test_not_a_feature_file(tmp_path):
    (tmp_path / "f").write_bytes(b"nonsense")
    for name in ("f", "nothing"):
        with pytest.raises(InputError, match=f"{name}: not a readable feature file"):
            read_features(tmp_path / name)


# The encoders' answers


def corpus():
    """Two conversations of train, one of dev and of test; four utterances, of three speakers."""

    def conversation(name, *speakers):
        turns = (Utterance(f"{name}_{i}", s, "words", i, None, None) for i, s in enumerate(speakers))
        return Conversation(name, tuple(turns))

    train = (conversation("a", "Ada", "Bob"), conversation("b", "Bob"))
    splits = {"train": train, "dev": (conversation("c", "Ada"),), "test": (conversation("d", "Eve", "Ada"),)}
    return Corpus("made up", ("sad", "glad"), splits, ())


def answers():
    """An encoder's for the six utterances; the third has no sound."""
    generator = torch.Generator().manual_seed(0)
    encoded = Encoded(torch.randn(6, 4, generator=generator), torch.randn(6, 2, generator=generator))
    for x in encoded:
        x[2] = torch.nan
    return encoded


def test_an_encoders_answers_are_kept(tmp_path):
    ids = [u.id for u in corpus().utterances()]
    write_encoded(tmp_path / "audio", answers(), ids)
    found = read_encoded(tmp_path / "audio", ids)
    for x, y in zip(found, answers()):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    for other in (ids[:-1], ids[::-1], [*ids[:-1], "d_2"]):
        with pytest.raises(InputError, match="audio: .*other utterances.*--fresh"):
            read_encoded(tmp_path / "audio", other)


@pytest.mark.parametrize("content", [None, b"", b"nonsense", "a tensor file without names"])
def test_not_what_an_encoder_left(tmp_path, content):
    if isinstance(content, bytes):
        (tmp_path / "audio").write_bytes(content)
    elif content:
        save_file(answers()._asdict(), tmp_path / "audio")
    with pytest.raises(InputError, match="audio: not .*; delete it"):
        read_encoded(tmp_path / "audio", [])


def test_from_answers_to_the_feature_file(tmp_path):
    text = Encoded(torch.ones(6, 3), torch.zeros(6, 2))
    file = to_feature_file({"text": text, "audio_kd": answers()}, corpus())
    assert file.utterance_names == ["a_0", "a_1", "b_0", "c_0", "d_0", "d_1"]
    assert file.conversation_names == ["a", "b", "c", "d"] and file.conversation.tolist() == [0, 0, 1, 2, 3, 3]
    assert file.split.tolist() == [0, 0, 0, 1, 2, 2] and file.label.tolist() == [0, 1, 0, 0, 0, 1]
    assert [file.speaker_names[i] for i in file.speaker] == ["Ada", "Bob", "Bob", "Ada", "Eve", "Ada"]
    assert file.label_names == ["sad", "glad"] and file.present["text"].all()
    assert file.present["audio_kd"].tolist() == [True, True, False, True, True, True]
    assert torch.equal(file.features["audio_kd"], answers().features.nan_to_num())
    write_features(tmp_path / "f", file)
    again = read_features(tmp_path / "f")
    assert torch.equal(again.features["audio_kd"], file.features["audio_kd"])
    assert torch.equal(again.present["audio_kd"], file.present["audio_kd"])
