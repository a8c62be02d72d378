"""The encoders on checkpoints that the tests save themselves: prompts, families, what comes from the checkpoint."""

import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers

import encoders
from data import Conversation, InputError, Utterance
from encoders import ENCODERS, TextEncoder, checkpoint_digest

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # transformers' DeBERTa calls it


def make(checkpoint, modality, width=64):
    torch.manual_seed(0)
    return ENCODERS[modality](str(checkpoint), num_classes=5, width=width).eval()


def conversation(*turns):
    return Conversation("c", tuple(Utterance(f"u{i}", s, t, 0, None, None) for i, (s, t) in enumerate(turns)))


def test_the_prompt_equals_the_equations(tiny):
    """Eq. 1-3: the past and the present with their speakers, </s>, "For s: t Now s feels <mask>"."""
    encoder = make(tiny["text"], "text")
    prompts = encoder.prompts(conversation(("Ada", "I am happy"), ("Bob", "well, yes"), ("Ada", "so am I")))
    assert [encoder.tokenizer.decode(ids) for ids in prompts] == [
        "<s><s1>: I am happy</s>For<s1>: I am happy Now<s1> feels <mask></s>",
        "<s><s1>: I am happy<s2>: well, yes</s>For<s2>: well, yes Now<s2> feels <mask></s>",
        "<s><s1>: I am happy<s2>: well, yes<s1>: so am I</s>For<s1>: so am I Now<s1> feels <mask></s>",
    ]


@pytest.mark.parametrize("max_tokens, limit", [(512, 64), (50, 50)])  # 64 by the checkpoint's positions
def test_long_conversations(tiny, max_tokens, limit):
    """The oldest context is cut first, then the end of a long utterance. A tenth speaker shares <s9>."""
    encoder = TextEncoder(str(tiny["text"]), 5, 64, max_tokens)
    turns = [(f"speaker {i % 11}", f"well, <mask> {i}") for i in range(60)]
    prompts = encoder.prompts(conversation(*turns, ("speaker 1", "happy " * 250), ("speaker 2", "so I am")))
    texts = [encoder.tokenizer.decode(ids) for ids in prompts]
    assert len(prompts[0]) < limit == max(map(len, prompts))
    assert "Now<s9> feels" in texts[9] and "Now<s9> feels" in texts[10]
    assert "well, <mask> 58<s5>: well, <mask> 59</s>For<s5>: well, <mask> 59 Now<s5> feels <mask></s>" in texts[59]
    assert "</s>For<s2>: happy" in texts[60] and texts[60].endswith("happy Now<s2> feels <mask></s>")
    hidden = encoder.eval().backbone(torch.tensor(prompts[:1])).last_hidden_state[0]
    torch.testing.assert_close(encoder(prompts[:1])[0][0], hidden[-2])  # the mask before the last </s>


# Larger initial weights than by default: features of tiny models would otherwise be nearly alike.
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZES |= {"initializer_range": 0.3, "vocab_size": 2000, "pad_token_id": 1, "max_position_embeddings": 100}
SIZES |= {"conv_dim": (16,) * 4, "conv_kernel": (20, 4, 2, 2), "conv_stride": (20, 4, 2, 2), "layerdrop": 0.0}
SIZES |= {"num_conv_pos_embeddings": 2, "num_conv_pos_embedding_groups": 4}
SIZES |= {"image_size": 32, "patch_size": 16, "num_frames": 4}


@pytest.mark.parametrize(
    "modality, family, special",
    [
        ("text", "DebertaV2", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
        ("audio", "Data2VecAudio", {}),
        ("video", "Timesformer", {}),
        ("video", "VideoMAE", {"tubelet_size": 2}),
        ("video", "Vivit", {"tubelet_size": [2, 16, 16]}),
    ],
)
def test_features_of_each_family(tiny, tmp_path, modality, family, special):
    """They do not depend on the batch, every part gets a gradient, and pixels are as the processor makes them."""
    folder, size = shutil.copytree(tiny[modality], tmp_path / "c"), {"height": 32, "width": 32}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | special)
    getattr(transformers, f"{family}Model")(config).bfloat16().save_pretrained(folder)
    if modality == "video":
        kind = transformers.VivitImageProcessor if family == "Vivit" else transformers.VideoMAEImageProcessor
        kind(size=size, crop_size=size).save_pretrained(folder)
    encoder = make(folder, modality, width=24)
    batch = {  # of different lengths where a modality has them
        "text": [[5] * n + [4, 2] for n in (3, 9, 30)],  # .. <mask> </s>
        "audio": [torch.sin(torch.arange(n) / 10) for n in (480, 9_000, 20_000)],
        "video": list(torch.randint(0, 256, (3, 4, 3, 32, 32), dtype=torch.uint8)),
    }[modality]
    features, logits = encoder(batch)
    assert features.shape == (3, 24) and not torch.equal(features[0], features[1])
    with torch.no_grad():
        for i, example in enumerate(batch):
            for whole, single in zip((features, logits), encoder([example])):
                torch.testing.assert_close(whole[i], single[0], atol=2e-5, rtol=0)
        if modality == "video":
            processor = transformers.AutoImageProcessor.from_pretrained(folder)
            pixels = processor(list(batch[0].permute(0, 2, 3, 1).numpy()), return_tensors="pt")["pixel_values"]
            hidden = encoder.backbone(pixels).last_hidden_state
            expected = encoder.project(hidden.mean(1) if family == "VideoMAE" else hidden[:, 0])
            torch.testing.assert_close(features[:1], expected, atol=2e-5, rtol=0)
    F.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    assert sum(p.grad is not None and bool(p.grad.any()) for p in encoder.parameters()) > 12
    assert encoder.classifier.weight.dtype == encoder.backbone.dtype == torch.float32


@pytest.mark.parametrize("samples", [400, 16_000])
def test_audio_is_normalised_padded_and_masked(tiny, samples):
    """Any clip can be trained on; SpecAugment's least number of masks (2) covers at most 6 steps of 20 ms."""
    encoder = make(tiny["audio"], "audio").train()
    encoder.backbone.config.mask_time_prob = 1e-6
    encoder.backbone.masked_spec_embed.data.fill_(77.0)
    seen = []
    for part in (encoder.backbone, encoder.backbone.encoder):
        part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    encoder([3 + torch.randn(samples)])
    clip, steps = seen[0][0], seen[1][0]
    assert clip[:samples].mean().abs() < 1e-3 and abs(clip[:samples].std() - 1) < 1e-2
    assert len(clip) == max(samples, 4_800) and not clip[samples:].any()  # padding, which is not normalised
    assert 3 <= (steps == 77).all(-1).sum() <= 6


def test_the_digest_of_a_checkpoint(tiny, tmp_path):
    folder = shutil.copytree(tiny["text"], tmp_path / "text")
    (folder / "README.md").write_text("notes")
    assert (first := checkpoint_digest(str(folder))) == checkpoint_digest(tiny["text"])
    (folder / "tokenizer.json").write_bytes(b"")
    assert first != checkpoint_digest(str(folder))


def test_checkpoints_that_cannot_be_used(tiny, tmp_path, monkeypatch):
    """Refused in one line."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    no_mask = shutil.copytree(tiny["text"], tmp_path / "no-mask") / "tokenizer_config.json"
    no_mask.write_text(no_mask.read_text().replace('"mask_token"', '"other"'))
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(no_mask.parent)
    lacking = shutil.copytree(tiny["audio"], tmp_path / "lacking")
    (lacking / "preprocessor_config.json").unlink()
    other = shutil.copytree(tiny["video"], tmp_path / "other")
    shutil.copy(f"{tiny['text']}/model.safetensors", other)
    for folder, modality, message in [
        (no_mask.parent, "text", "no-mask: its tokenizer has no mask token"),
        (lacking, "audio", "the folder is incomplete or damaged"),
        (tiny["text"], "video", "--video-model .*: not a video model"),
        (other, "video", "not the weights of a TimesformerModel"),
        (no_mask.parent, "audio", "not a model of the wav2vec 2.0 family"),
        ("no-such/model", "text", "cannot load 'no-such/model'.*hf download .*--text-model DIR"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            make(folder, modality)
        assert "\n" not in str(caught.value)

    with pytest.raises(InputError, match="pip install sentencepiece protobuf"):
        encoders.load(lambda _: int("SentencePiece"), "m", "--text-model")  # an error that names it, as DeBERTa-v3's
