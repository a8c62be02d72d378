"""The encoders on checkpoints that the tests save themselves: prompts, families, what comes from the checkpoint."""

import json
import shutil

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import pre_tokenizers

import encoders
from data import Conversation, InputError, Utterance
from encoders import ENCODERS, SPEAKER_TOKENS, TextEncoder, checkpoint_digest

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # transformers' DeBERTa calls it


def make(checkpoint, modality, width=64):
    torch.manual_seed(0)
    return ENCODERS[modality](str(checkpoint), num_classes=5, width=width).eval()


def conversation(*turns):
    return Conversation("c", tuple(Utterance(f"u{i}", s, t, 0, None, None) for i, (s, t) in enumerate(turns)))


def edited(folder, copy, name, **fields):
    """A copy of a checkpoint, with fields of one of its JSON files replaced."""
    shutil.copytree(folder, copy)
    (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | fields))
    return copy


# The prompt


def test_the_prompt_equals_the_equations(tiny):
    """Eq. 1-3: the past and the present with their speakers, </s>, "For s: t Now s feels <mask>"."""
    encoder = make(tiny["text"], "text")
    prompts = encoder.prompts(conversation(("Ada", "I am happy"), ("Bob", "well, yes"), ("Ada", "so am I")))
    assert [encoder.tokenizer.decode(ids) for ids in prompts] == [
        "<s><s1>: I am happy</s>For<s1>: I am happy Now<s1> feels <mask></s>",
        "<s><s1>: I am happy<s2>: well, yes</s>For<s2>: well, yes Now<s2> feels <mask></s>",
        "<s><s1>: I am happy<s2>: well, yes<s1>: so am I</s>For<s1>: so am I Now<s1> feels <mask></s>",
    ]
    assert encoder.tokenizer.convert_tokens_to_ids("<s1>") in prompts[0]
    assert encoder.backbone.embeddings.word_embeddings.num_embeddings == len(encoder.tokenizer)


@pytest.mark.parametrize("words, max_tokens", [(4, 512), (250, 512), (2000, 512), (4, 64)])
def test_the_oldest_context_is_cut_first(tiny, words, max_tokens):
    encoder = TextEncoder(str(tiny["text"]), 5, 64, max_tokens)
    limit = min(max_tokens, encoder.backbone.config.max_position_embeddings - 2)
    turns = [("Ada", f"well, yes {i}") for i in range(60)]
    prompts = encoder.prompts(conversation(*turns, ("Bob", " ".join(["happy"] * words)), ("Ada", "so I am")))
    texts = [encoder.tokenizer.decode(ids) for ids in prompts]
    assert len(prompts[0]) < limit == max(map(len, prompts))
    assert texts[59].endswith("yes 59</s>For<s1>: well, yes 59 Now<s1> feels <mask></s>") and "yes 1<" not in texts[59]
    assert "</s>For<s2>: happy" in texts[60] and texts[60].endswith("happy Now<s2> feels <mask></s>")


def test_a_tenth_speaker_and_a_mask_in_the_text(tiny):
    encoder = make(tiny["text"], "text")
    first, *_, last = encoder.prompts(conversation(*[(f"speaker {i}", "I am <mask> today") for i in range(11)]))
    assert f"Now{SPEAKER_TOKENS[-1]} feels" in encoder.tokenizer.decode(last)
    hidden = encoder.backbone(torch.tensor([first])).last_hidden_state[0]
    torch.testing.assert_close(encoder([first])[0][0], hidden[len(first) - 2])  # the mask before the last </s>


# The families

# Larger initial weights than by default: features of tiny models would otherwise be nearly alike.
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZES |= {"initializer_range": 0.3, "vocab_size": 300, "pad_token_id": 1, "max_position_embeddings": 100}
SIZES |= {"conv_dim": (16,) * 4, "conv_kernel": (20, 4, 2, 2), "conv_stride": (20, 4, 2, 2), "layerdrop": 0.0}
SIZES |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
SIZES |= {"image_size": 32, "patch_size": 16, "num_frames": 4}
FAMILIES = [  # modality, name, what is special
    ("text", "Bert", {}),
    ("text", "DebertaV2", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}),
    ("audio", "Data2VecAudio", {"num_conv_pos_embeddings": 2}),
    ("audio", "Wav2Vec2", {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}),
    ("audio", "WavLM", {}),
    ("video", "Timesformer", {}),
    ("video", "VideoMAE", {"tubelet_size": 2}),
    ("video", "Vivit", {"tubelet_size": [2, 16, 16]}),
]


def save(folder, modality, name, special):
    """A tiny checkpoint of a family, with its tokenizer or processor."""
    config = getattr(transformers, f"{name}Config")(**SIZES | special)
    torch.manual_seed(0)
    getattr(transformers, f"{name}Model")(config).save_pretrained(folder)
    if modality == "text":
        names = {"cls_token": "[CLS]", "pad_token": "[PAD]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        vocabulary = [*names.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
        t = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
        t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        transformers.PreTrainedTokenizerFast(tokenizer_object=t, **names).save_pretrained(folder)
    elif modality == "audio":
        transformers.Wav2Vec2FeatureExtractor(do_normalize=name != "WavLM").save_pretrained(folder)
    else:
        processor = transformers.VivitImageProcessor if name == "Vivit" else transformers.VideoMAEImageProcessor
        size = {"height": 32, "width": 32}
        processor(size=size, crop_size=size).save_pretrained(folder)
    return folder


EXAMPLES = {  # three, of different lengths where a modality has them
    "text": lambda encoder: encoder.prompts(conversation(("Ada", "I am happy"), ("Bob", "well, yes"), ("Ada", "yes"))),
    "audio": lambda encoder: [torch.sin(torch.arange(n) / 10) for n in (480, 9_000, 20_000)],
    "video": lambda encoder: list(torch.randint(0, 256, (3, 4, 3, 32, 32), dtype=torch.uint8)),
}


@pytest.mark.parametrize("modality, family, special", FAMILIES)
def test_features_of_each_family(tmp_path, modality, family, special):
    """They do not depend on the batch, every part gets a gradient, and pixels are as the processor makes them."""
    encoder = make(save(tmp_path, modality, family, special), modality, width=24)
    batch = EXAMPLES[modality](encoder)
    features, logits = encoder(batch)
    assert features.shape == (3, 24) and logits.shape == (3, 5) and not torch.equal(features[0], features[1])
    with torch.no_grad():
        for i, example in enumerate(batch):
            for whole, single in zip((features, logits), encoder([example])):
                torch.testing.assert_close(whole[i], single[0], atol=2e-5, rtol=0)
        if modality == "video":
            processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
            pixels = processor(list(batch[0].permute(0, 2, 3, 1).numpy()), return_tensors="pt")["pixel_values"]
            hidden = encoder.backbone(pixels).last_hidden_state
            expected = encoder.project(hidden.mean(1) if family == "VideoMAE" else hidden[:, 0])
            torch.testing.assert_close(features[:1], expected, atol=2e-5, rtol=0)
    F.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    assert encoder.project.weight.grad.abs().sum() > 0 and encoder.classifier.weight.grad.abs().sum() > 0
    assert sum(p.grad is not None and bool(p.grad.any()) for p in encoder.backbone.parameters()) > 10


# What comes from the checkpoint


def inputs_of(part):
    """A list to which all that a part of a model is given will be appended."""
    seen = []
    part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    return seen


@pytest.mark.parametrize("samples", [400, 16_000])
def test_spec_augment_masks_three_steps(tiny, tmp_path, samples):
    """Any clip can be trained on, and the least number of masks (2) covers at most 6 steps of 20 ms."""
    encoder = make(edited(tiny["audio"], tmp_path / "c", "config.json", mask_time_prob=1e-6), "audio").train()
    encoder.backbone.masked_spec_embed.data.fill_(77.0)
    seen = inputs_of(encoder.backbone.encoder)
    encoder([torch.randn(samples)])
    assert 3 <= (seen[0] == 77).all(-1).sum() <= 6


def test_audio_is_normalised_and_then_padded(tiny):
    encoder = make(tiny["audio"], "audio")
    seen = inputs_of(encoder.backbone)
    encoder([3 + torch.randn(16_000), 3 + torch.randn(2_000)])
    assert seen[0].mean().abs() < 1e-3 and abs(seen[0].std() - 1) < 1e-2
    assert seen[1].shape == (1, 4_800) and not seen[1][0, 2_000:].any()  # padding, which is not normalised


def test_weights_come_from_the_checkpoint_in_float32(tmp_path, tiny):
    model = transformers.RobertaModel.from_pretrained(tiny["text"], add_pooling_layer=False).to(torch.bfloat16)
    model.save_pretrained(shutil.copytree(tiny["text"], tmp_path / "text"))
    ours = make(tmp_path / "text", "text").backbone.encoder.layer[0].attention.self.query.weight
    assert ours.dtype == torch.float32
    assert torch.equal(ours, model.encoder.layer[0].attention.self.query.weight.float())


def test_the_digest_of_a_checkpoint(tiny, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny["text"], tmp_path / "text")
    (folder / "README.md").write_text("notes")
    assert checkpoint_digest(str(folder)) == checkpoint_digest(tiny["text"])
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + b" ")
        assert checkpoint_digest(str(folder)) != checkpoint_digest(tiny["text"])
        (folder / name).write_bytes(content)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model, commit = tmp_path / "hub/models--org--model", "0123456789" * 4
    (model / "snapshots" / commit).mkdir(parents=True)
    (model / "snapshots" / commit / "config.json").write_text("{}")
    (model / "refs").mkdir()
    (model / "refs/main").write_text(commit)
    assert checkpoint_digest("org/model") == f"org/model@{commit}" and checkpoint_digest("org/other") is None


def test_checkpoints_that_cannot_be_used(tiny, tmp_path, monkeypatch):
    """Refused in one line."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    no_mask = edited(tiny["text"], tmp_path / "no-mask", "tokenizer_config.json", mask_token=None)
    lacking = shutil.copytree(tiny["audio"], tmp_path / "lacking")
    (lacking / "preprocessor_config.json").unlink()
    cut = shutil.copytree(tiny["text"], tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1_000])
    other = save(tmp_path / "other", "text", "Bert", {})
    transformers.TimesformerConfig(**SIZES).save_pretrained(other)
    transformers.VideoMAEImageProcessor().save_pretrained(other)
    spectra = save(tmp_path / "spectra", "audio", "AST", {})
    for folder, modality, message in [
        (no_mask, "text", "no-mask: its tokenizer has no mask token"),
        (lacking, "audio", "the folder is incomplete or damaged"),
        (cut, "text", "the folder is incomplete or damaged"),
        (tiny["text"], "audio", "the folder is incomplete or damaged"),
        (tiny["text"], "video", "--video-model .*: not a video model"),
        (other, "video", "not the weights of a TimesformerModel"),
        (spectra, "audio", "not a model of the wav2vec 2.0 family"),
        ("no-such/model", "text", "cannot load 'no-such/model'.*hf download .*--text-model DIR"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            make(folder, modality)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_that_needs_more_packages():
    def fail(_):  # as DeBERTa-v3's, without a tokenizer.json
        raise ValueError("SentencePieceExtractor requires the SentencePiece library")

    with pytest.raises(InputError, match="pip install sentencepiece protobuf"):
        encoders.load(fail, "m", "--text-model")
