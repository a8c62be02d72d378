"""The encoders on checkpoints that the tests save themselves: prompts, padding, what comes from the checkpoint."""

import json
import shutil

import pytest
import torch
import transformers

from data import Conversation, InputError, Utterance
from encoders import ENCODERS, SPEAKER_TOKENS, AudioEncoder, TextEncoder, VideoEncoder, video_size


def make(tiny, modality, width=64):
    torch.manual_seed(0)
    return ENCODERS[modality](tiny[modality], num_classes=5, width=width).eval()


def conversation(*turns):
    return Conversation("c", tuple(Utterance(f"u{i}", s, t, 0, None, None) for i, (s, t) in enumerate(turns)))


def texts(encoder, conversation):
    return [encoder.tokenizer.decode(ids) for ids in encoder.prompts(conversation)]


def test_prompt_equals_the_equations(tiny):
    """Eq. 1-3: the past and the present with their speakers, </s>, "For s: t Now s feels <mask>"."""
    encoder = make(tiny, "text")
    talk = conversation(("Ada", "I am happy"), ("Bob", "well, yes"), ("Ada", "so am I"))
    assert texts(encoder, talk) == [
        "<s> <s1>: I am happy</s>For <s1>: I am happy Now <s1> feels <mask></s>",
        "<s> <s1>: I am happy <s2>: well, yes</s>For <s2>: well, yes Now <s2> feels <mask></s>",
        "<s> <s1>: I am happy <s2>: well, yes <s1>: so am I</s>For <s1>: so am I Now <s1> feels <mask></s>",
    ]
    ids = encoder.prompts(talk)[0]
    assert ids.count(encoder.tokenizer.mask_token_id) == 1
    assert encoder.tokenizer.convert_tokens_to_ids("<s1>") in ids
    assert encoder.backbone.embeddings.word_embeddings.num_embeddings == len(encoder.tokenizer)


def test_the_oldest_context_is_cut_first(tiny):
    encoder = make(tiny, "text")
    limit = encoder.backbone.config.max_position_embeddings - 2
    talk = conversation(*(("Ada", f"I am happy today {i}") for i in range(60)))
    prompts = encoder.prompts(talk)
    assert len(prompts[0]) < limit and len(prompts[-1]) == limit == max(map(len, prompts))
    last = encoder.tokenizer.decode(prompts[-1])
    assert last.endswith("</s>For <s1>: I am happy today 59 Now <s1> feels <mask></s>")
    assert "today 59</s>" in last and "today 58" in last and "today 1 " not in last


@pytest.mark.parametrize("words", [100, 230, 250, 2000])
def test_an_utterance_of_2000_words(tiny, words):
    encoder = make(tiny, "text")
    talk = conversation(("Ada", "so I am"), ("Bob", " ".join(["happy"] * words)), ("Ada", "well"))
    limit = encoder.backbone.config.max_position_embeddings - 2
    prompts = encoder.prompts(talk)
    assert max(map(len, prompts)) <= limit
    for i, ids in enumerate(prompts):
        s = "<s2>" if i == 1 else "<s1>"
        assert encoder.tokenizer.decode(ids).endswith(f" Now {s} feels <mask></s>")
        assert f"</s>For {s}:" in encoder.tokenizer.decode(ids)


def test_a_tenth_speaker_shares_the_last_token(tiny):
    encoder = make(tiny, "text")
    last = texts(encoder, conversation(*((f"speaker {i}", "well") for i in range(11))))[-1]
    assert f"Now {SPEAKER_TOKENS[-1]} feels" in last


def test_a_mask_among_the_words_is_not_the_prompts(tiny):
    encoder = make(tiny, "text")
    ids = encoder.prompts(conversation(("Ada", "I am <mask> today")))[0]
    assert ids.count(encoder.tokenizer.mask_token_id) > 1
    features, _ = encoder(**encoder.collate([ids]))
    hidden = encoder.backbone(torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(features[0], hidden[len(ids) - 2])  # before the last </s>


EXAMPLES = {
    "text": lambda e: e.prompts(conversation(("Ada", "I am happy"), ("Bob", "well, yes, so happy"), ("Ada", "yes"))),
    "audio": lambda e: [torch.sin(torch.arange(n) / 10) for n in (480, 9_000, 20_000)],
    "video": lambda e: list(torch.randint(0, 256, (3, 8, 3, 48, 48), dtype=torch.uint8)),
}


@pytest.mark.parametrize("modality", ENCODERS)
def test_padding_changes_nothing(tiny, modality):
    encoder = make(tiny, modality)
    examples = EXAMPLES[modality](encoder)
    features, logits = encoder(**encoder.collate(examples))
    assert features.shape == (3, 64) and logits.shape == (3, 5)
    for i, example in enumerate(examples):
        alone = encoder(**encoder.collate([example]))
        torch.testing.assert_close(features[i : i + 1], alone[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("modality", ENCODERS)
def test_every_parameter_learns_and_the_width_is_free(tiny, modality):
    encoder = make(tiny, modality, width=24).train()
    features, logits = encoder(**encoder.collate(EXAMPLES[modality](encoder)))
    assert features.shape == (3, 24) and encoder.project.in_features == 64
    logits.square().sum().backward()
    lacking = [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert lacking == []


def test_a_clip_of_30_ms_trains(tiny):
    """SpecAugment raises on batches below 0.25 s; ours are never that short."""
    encoder = make(tiny, "audio").train()
    assert encoder.backbone.config.mask_time_prob > 0
    features, _ = encoder(**encoder.collate([torch.ones(480)]))
    assert features.isfinite().all()


def test_a_silent_clip(tiny):
    encoder = make(tiny, "audio")
    assert encoder(**encoder.collate([torch.zeros(16_000)]))[0].isfinite().all()


def test_sound_is_normalised_as_the_checkpoint_says(tiny, tmp_path):
    encoder = make(tiny, "audio")
    sound = encoder.collate([3 + torch.randn(16_000), torch.randn(9_000)])["sound"]
    assert sound[0].mean().abs() < 1e-3 and abs(sound[0].std() - 1) < 1e-2 and not sound[1, 9_000:].any()
    other = shutil.copytree(tiny["audio"], tmp_path / "audio")
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(settings | {"do_normalize": False}))
    raw = torch.randn(16_000)
    assert torch.equal(AudioEncoder(str(other), 5, 64).collate([raw])["sound"][0], raw)
    (other / "preprocessor_config.json").write_text(json.dumps(settings | {"sampling_rate": 8000}))
    with pytest.raises(InputError, match="wants 8000 Hz"):
        AudioEncoder(str(other), 5, 64)


def test_pictures_are_normalised_as_the_checkpoint_says(tiny, tmp_path):
    other = shutil.copytree(tiny["video"], tmp_path / "video")
    path = other / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 4]}))
    encoder = VideoEncoder(str(other), 5, 64)
    assert encoder.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    seen = []
    encoder.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder(**encoder.collate([torch.full((8, 3, 48, 48), 255, dtype=torch.uint8)]))
    assert seen[0][0, 0, :, 0, 0].tolist() == pytest.approx([0.9, 0.4, 0.175])
    assert video_size(tiny["video"]) == 48


def test_weights_come_from_the_checkpoint_in_float32(tmp_path, tiny):
    model = transformers.RobertaModel.from_pretrained(tiny["text"], add_pooling_layer=False).to(torch.bfloat16)
    other = shutil.copytree(tiny["text"], tmp_path / "text")
    model.save_pretrained(other)
    encoder = TextEncoder(str(other), 5, 64)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    expected = model.encoder.layer[0].attention.self.query.weight.float()
    assert torch.equal(encoder.backbone.encoder.layer[0].attention.self.query.weight, expected)


def test_another_models_weights_are_refused(tmp_path):
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    transformers.BertModel(config).save_pretrained(tmp_path)
    transformers.VideoMAEImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="not the weights of a TimesformerModel"):
        VideoEncoder(str(tmp_path), 5)


def test_no_network_and_nothing_cached(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot load 'no-such/model'.*hf download no-such/model.*--text-model DIR"):
        TextEncoder("no-such/model", 5)
    with pytest.raises(InputError, match="--video-model DIR"):
        video_size("no-such/model")


@pytest.mark.parametrize("modality, lost", [("text", "config.json"), ("audio", "preprocessor_config.json")])
def test_a_folder_that_is_not_whole(tiny, tmp_path, modality, lost):
    other = shutil.copytree(tiny[modality], tmp_path / modality)
    (other / lost).unlink()
    with pytest.raises(InputError, match="the folder is there, but not whole"):
        ENCODERS[modality](str(other), 5, 64)
