"""The encoders on checkpoints that the tests save themselves: prompts, families, what comes from the checkpoint."""

import json
import shutil

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from data import Conversation, InputError, Utterance
from encoders import ENCODERS, SPEAKER_TOKENS, AudioEncoder, TextEncoder, VideoEncoder, video_shape

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # transformers' DeBERTa calls it


def make(checkpoints, modality, width=64):
    torch.manual_seed(0)
    return ENCODERS[modality](str(checkpoints[modality]), num_classes=5, width=width).eval()


def conversation(*turns):
    return Conversation("c", tuple(Utterance(f"u{i}", s, t, 0, None, None) for i, (s, t) in enumerate(turns)))


def texts(encoder, conversation):
    return [encoder.tokenizer.decode(ids) for ids in encoder.prompts(conversation)]


# The prompt


def test_prompt_equals_the_equations(tiny):
    """Eq. 1-3: the past and the present with their speakers, </s>, "For s: t Now s feels <mask>"."""
    encoder = make(tiny, "text")
    talk = conversation(("Ada", "I am happy"), ("Bob", "well, yes"), ("Ada", "so am I"))
    assert texts(encoder, talk) == [
        "<s><s1>: I am happy</s>For<s1>: I am happy Now<s1> feels <mask></s>",
        "<s><s1>: I am happy<s2>: well, yes</s>For<s2>: well, yes Now<s2> feels <mask></s>",
        "<s><s1>: I am happy<s2>: well, yes<s1>: so am I</s>For<s1>: so am I Now<s1> feels <mask></s>",
    ]
    ids = encoder.prompts(talk)[0]
    assert ids.count(encoder.tokenizer.mask_token_id) == 1
    assert encoder.tokenizer.convert_tokens_to_ids("<s1>") in ids
    assert encoder.backbone.embeddings.word_embeddings.num_embeddings == len(encoder.tokenizer)


def test_no_space_of_its_own_before_a_speaker(tiny):
    """The space before a speaker's token belongs to the token: the words' tokens stay those of the words."""
    t = make(tiny, "text").tokenizer
    for text in (" <s1>: I feel well Now <s2> feels", "For <s1>:"):
        ids, without = (t(x, add_special_tokens=False)["input_ids"] for x in (text, text.replace(" <", "<")))
        assert ids == without


def test_the_oldest_context_is_cut_first(tiny):
    encoder = make(tiny, "text")
    limit = encoder.backbone.config.max_position_embeddings - 2
    talk = conversation(*(("Ada", f"I am happy today {i}") for i in range(60)))
    prompts = encoder.prompts(talk)
    assert len(prompts[0]) < limit and len(prompts[-1]) == limit == max(map(len, prompts))
    last = encoder.tokenizer.decode(prompts[-1])
    assert last.endswith("</s>For<s1>: I am happy today 59 Now<s1> feels <mask></s>")
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
        assert encoder.tokenizer.decode(ids).endswith(f" Now{s} feels <mask></s>")
        assert f"</s>For{s}:" in encoder.tokenizer.decode(ids)


def test_a_tenth_speaker_shares_the_last_token(tiny):
    encoder = make(tiny, "text")
    last = texts(encoder, conversation(*((f"speaker {i}", "well") for i in range(11))))[-1]
    assert f"Now{SPEAKER_TOKENS[-1]} feels" in last


def test_a_mask_among_the_words_is_not_the_prompts(tiny):
    encoder = make(tiny, "text")
    ids = encoder.prompts(conversation(("Ada", "I am <mask> today")))[0]
    assert ids.count(encoder.tokenizer.mask_token_id) > 1
    features, _ = encoder([ids])
    hidden = encoder.backbone(torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(features[0], hidden[len(ids) - 2])  # before the last </s>


# The families


WORDS = ["I am so happy today", "this is a terrible day", "well, yes", "For: Now feels"]
# Wider weights than at a training's beginning: tiny models would otherwise give all examples much the same feature.
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SMALL |= {"initializer_range": 0.3}


def save_text(folder, family):
    """A tiny checkpoint of a family, with a tokenizer of its kind trained on the spot."""
    classic = family in ("RoBERTa", "without a mask")
    first, pad, last, unknown, mask = (
        ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if classic else ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
    )
    special = {"vocab_size": 400, "special_tokens": [first, pad, last, unknown, mask], "show_progress": False}
    if family == "BERT":
        t = tokenizers.Tokenizer(models.WordPiece(unk_token=unknown))
        t.normalizer, t.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(**special)
    elif family == "DeBERTa-v2":
        t = tokenizers.Tokenizer(models.Unigram())
        t.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(**special, unk_token=unknown)
    else:
        t = tokenizers.Tokenizer(models.BPE())
        t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(**special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator(WORDS, trainer)
    names = {"unk_token": unknown, "pad_token": pad, "mask_token": mask}
    names |= {"bos_token": first, "eos_token": last} if classic else {"cls_token": first, "sep_token": last}
    if family == "without a mask":
        del names["mask_token"]
    transformers.PreTrainedTokenizerFast(tokenizer_object=t, **names).save_pretrained(folder)
    sizes = SMALL | {"vocab_size": t.get_vocab_size(), "pad_token_id": 1, "max_position_embeddings": 100}
    if family == "BERT":
        model = transformers.BertModel(transformers.BertConfig(**sizes))
    elif family == "DeBERTa-v2":
        relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}
        relative |= {"position_biased_input": False, "norm_rel_ebd": "layer_norm", "share_att_key": True}
        model = transformers.DebertaV2Model(transformers.DebertaV2Config(**sizes, **relative))
    elif family == "ModernBERT":
        ends = {"bos_token_id": 0, "cls_token_id": 0, "eos_token_id": 2, "sep_token_id": 2, "local_attention": 16}
        model = transformers.ModernBertModel(transformers.ModernBertConfig(**sizes, **ends))
    else:
        model = transformers.RobertaModel(transformers.RobertaConfig(**sizes, bos_token_id=0, eos_token_id=2))
    model.save_pretrained(folder)
    return folder


def save_audio(folder, family):
    sizes = SMALL | {"conv_dim": (16,) * 4, "conv_kernel": (20, 4, 2, 2), "conv_stride": (20, 4, 2, 2)}
    sizes |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "layerdrop": 0.0}
    config, model, more = {
        "Data2vec": (transformers.Data2VecAudioConfig, transformers.Data2VecAudioModel, {"num_conv_pos_embeddings": 2}),
        "Wav2Vec2": (transformers.Wav2Vec2Config, transformers.Wav2Vec2Model, {"feat_extract_norm": "group"}),
        "Wav2Vec2 large": (
            transformers.Wav2Vec2Config,
            transformers.Wav2Vec2Model,
            {"feat_extract_norm": "layer", "do_stable_layer_norm": True},
        ),
        "HuBERT": (transformers.HubertConfig, transformers.HubertModel, {"feat_extract_norm": "group"}),
        "WavLM": (transformers.WavLMConfig, transformers.WavLMModel, {"feat_extract_norm": "group"}),
    }[family]
    model(config(**sizes | more)).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=family != "WavLM").save_pretrained(folder)
    return folder


def save_video(folder, family):
    if family == "TimeSformer":
        model = transformers.TimesformerModel(
            transformers.TimesformerConfig(**SMALL, image_size=32, patch_size=16, num_frames=4)
        )
    else:
        config = transformers.VideoMAEConfig(**SMALL, image_size=32, patch_size=16, num_frames=4, tubelet_size=2)
        model = transformers.VideoMAEModel(config)
    model.save_pretrained(folder)
    transformers.VideoMAEImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder)
    return folder


SAVE = {"text": save_text, "audio": save_audio, "video": save_video}
FAMILIES = [("text", family) for family in ("RoBERTa", "BERT", "DeBERTa-v2", "ModernBERT")]
FAMILIES += [("audio", family) for family in ("Data2vec", "Wav2Vec2", "Wav2Vec2 large", "HuBERT", "WavLM")]
FAMILIES += [("video", family) for family in ("TimeSformer", "VideoMAE")]
TALK = conversation(("Ada", "I am happy"), ("Bob", "well, yes, so happy"), ("Ada", "yes"))
EXAMPLES = {  # three, of different lengths where a modality has them
    "text": lambda encoder: encoder.prompts(TALK),
    "audio": lambda encoder: [torch.sin(torch.arange(n) / 10) for n in (480, 9_000, 20_000)],
    "video": lambda encoder: list(torch.randint(0, 256, (3, 4, 3, 32, 32), dtype=torch.uint8)),
}


@pytest.fixture(scope="module")
def family_of(tmp_path_factory):
    """A family's encoder, of a checkpoint written once: family_of("audio", "WavLM", width=24)."""
    root = tmp_path_factory.mktemp("families")

    def load(modality, family, width=32):
        folder = root / family.replace(" ", "-")
        torch.manual_seed(0)
        return make({modality: folder if folder.exists() else SAVE[modality](folder, family)}, modality, width)

    return load


@pytest.mark.parametrize("modality, family", FAMILIES)
def test_a_feature_does_not_depend_on_its_batch(family_of, modality, family):
    encoder = family_of(modality, family)
    examples = EXAMPLES[modality](encoder)
    with torch.no_grad():
        features, logits = encoder(examples)
        alone = [encoder([example]) for example in examples]
        turned = encoder(examples[::-1])
    assert features.shape == (3, 32) and logits.shape == (3, 5)
    for i in range(3):
        torch.testing.assert_close(features[i], alone[i][0][0], atol=2e-5, rtol=0)
        torch.testing.assert_close(logits[i], alone[i][1][0], atol=2e-5, rtol=0)
        torch.testing.assert_close(features[i], turned[0][2 - i], atol=2e-5, rtol=0)
        assert (features[i] - features[i - 1]).abs().max() > 1e-2  # though it does depend on the example


@pytest.mark.parametrize("modality, family", FAMILIES)
def test_every_parameter_learns_and_the_width_is_free(family_of, modality, family):
    encoder = family_of(modality, family, width=24)
    assert encoder.project.in_features == 32
    examples, labels = EXAMPLES[modality](encoder), torch.tensor([0, 1, 2])
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}

    def loss():
        with torch.no_grad():
            return F.cross_entropy(encoder.eval()(examples)[1], labels).item()

    first = loss()
    for checkpointing in (False, True):
        if checkpointing:
            encoder.backbone.gradient_checkpointing_enable()
        features, logits = encoder.train()(examples)
        assert features.shape == (3, 24)
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        assert [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
        optimizer.step()
    assert loss() < first
    assert [name for name, p in encoder.named_parameters() if torch.equal(p, before[name])] == []


@pytest.mark.parametrize("family", [family for modality, family in FAMILIES if modality == "text"])
def test_every_family_of_words_gets_its_prompt(family_of, family):
    encoder = family_of("text", family)
    t, names = encoder.tokenizer, ("<s>", "</s>", "<mask>") if family == "RoBERTa" else ("[CLS]", "[SEP]", "[MASK]")
    for k, ids in enumerate(encoder.prompts(TALK)):
        tokens = t.convert_ids_to_tokens(ids)
        last = max(i for i, token in enumerate(tokens) if token == names[1] and i < len(tokens) - 1)
        assert (tokens[0], tokens[-2], tokens[-1]) == (names[0], names[2], names[1])
        assert tokens[last - 1] == t.tokenize(f" {TALK.utterances[k].text}")[-1]
        speaker = "<s2>" if k == 1 else "<s1>"
        assert tokens[last + 1 :].count(speaker) == 2 and tokens[1] == "<s1>"
        for before, token in zip(tokens, tokens[1:]):
            assert token not in SPEAKER_TOKENS or before not in ("\u0120", "\u2581")  # a space alone

    positions = 100 - 2 * (family == "RoBERTa")  # it counts its positions from 2
    long = conversation(*(("Ada", f"I am happy today {i}") for i in range(30)))
    prompts = encoder.prompts(long)
    assert max(map(len, prompts)) == positions
    with torch.no_grad():
        assert encoder(prompts)[0].isfinite().all()


@pytest.mark.parametrize("family, shape", [("TimeSformer", (4, 32)), ("VideoMAE", (4, 32))])
def test_frames_and_pixels_are_the_checkpoints(family_of, family, shape):
    encoder = family_of("video", family)
    assert video_shape(encoder.backbone.config._name_or_path) == shape


def test_the_class_token_or_the_mean(family_of):
    """Eq. 5: TimeSformer has a token for the whole; VideoMAE has none."""
    frames = EXAMPLES["video"](None)
    for family, pick in (("TimeSformer", lambda hidden: hidden[:, 0]), ("VideoMAE", lambda hidden: hidden.mean(1))):
        encoder = family_of("video", family)
        pixels = (torch.stack(frames) / 255 - encoder.mean) / encoder.std
        with torch.no_grad():
            torch.testing.assert_close(encoder(frames)[0], pick(encoder.backbone(pixels).last_hidden_state))


# What comes from the checkpoint


def test_a_clip_of_30_ms_trains(tiny):
    """SpecAugment raises on batches below 0.25 s; ours are never that short."""
    encoder = make(tiny, "audio").train()
    assert encoder.backbone.config.mask_time_prob > 0
    features, _ = encoder([torch.ones(480)])
    assert features.isfinite().all()


def test_a_silent_clip(tiny):
    encoder = make(tiny, "audio")
    assert encoder([torch.zeros(16_000)])[0].isfinite().all()


def seen_by(encoder, examples):
    """What the backbone is given."""
    seen = []
    handle = encoder.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder(examples)
    handle.remove()
    return seen


def test_sound_is_normalised_as_the_checkpoint_says(tiny, tmp_path):
    encoder = make(tiny, "audio")
    long, short = seen_by(encoder, [3 + torch.randn(16_000), 3 + torch.randn(2_000)])
    assert long.shape == (1, 16_000) and long.mean().abs() < 1e-3 and abs(long.std() - 1) < 1e-2
    assert short.shape == (1, 4_800) and not short[0, 2_000:].any()  # zeros, and not part of what is normalised
    assert short[0, :2_000].mean().abs() < 1e-3 and abs(short[0, :2_000].std() - 1) < 1e-2
    other = shutil.copytree(tiny["audio"], tmp_path / "audio")
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(settings | {"do_normalize": False}))
    raw = torch.randn(16_000)
    assert torch.equal(seen_by(AudioEncoder(str(other), 5, 64), [raw])[0][0], raw)
    (other / "preprocessor_config.json").write_text(json.dumps(settings | {"sampling_rate": 8000}))
    with pytest.raises(InputError, match="wants 8000 Hz"):
        AudioEncoder(str(other), 5, 64)


def test_pictures_are_normalised_as_the_checkpoint_says(tiny, tmp_path):
    other = shutil.copytree(tiny["video"], tmp_path / "video")
    path = other / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 4]}))
    encoder = VideoEncoder(str(other), 5, 64)
    assert encoder.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    seen = seen_by(encoder, [torch.full((8, 3, 48, 48), 255, dtype=torch.uint8)])
    assert seen[0][0, 0, :, 0, 0].tolist() == pytest.approx([0.9, 0.4, 0.175])
    assert video_shape(tiny["video"]) == (8, 48)


def test_weights_come_from_the_checkpoint_in_float32(tmp_path, tiny):
    model = transformers.RobertaModel.from_pretrained(tiny["text"], add_pooling_layer=False).to(torch.bfloat16)
    other = shutil.copytree(tiny["text"], tmp_path / "text")
    model.save_pretrained(other)
    encoder = TextEncoder(str(other), 5, 64)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    expected = model.encoder.layer[0].attention.self.query.weight.float()
    assert torch.equal(encoder.backbone.encoder.layer[0].attention.self.query.weight, expected)


def test_another_models_weights_are_refused(tmp_path):
    save_text(tmp_path, "BERT")
    transformers.TimesformerConfig(**SMALL).save_pretrained(tmp_path)
    transformers.VideoMAEImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="not the weights of a TimesformerModel"):
        VideoEncoder(str(tmp_path), 5)


def test_no_network_and_nothing_cached(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot load 'no-such/model'.*hf download no-such/model.*--text-model DIR"):
        TextEncoder("no-such/model", 5)
    with pytest.raises(InputError, match="--video-model DIR"):
        video_shape("no-such/model")


@pytest.mark.parametrize("share", [-1, 2, float("nan")])
def test_a_dropout_that_is_no_share(tiny, tmp_path, share):
    folder = shutil.copytree(tiny["audio"], tmp_path / "audio")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": share}))
    with pytest.raises(InputError, match="cannot load|attention_dropout"):
        ENCODERS["audio"](str(folder), 3, 16)


@pytest.mark.parametrize("mean", [[0.5, 0.5], "grey", None, [[0.5] * 3] * 2, ["a", "b", "c"]])
def test_a_processor_with_other_colours(tiny, tmp_path, mean):
    folder = shutil.copytree(tiny["video"], tmp_path / "video")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": mean}))
    with pytest.raises(InputError, match="cannot load"):
        ENCODERS["video"](str(folder), 3, 16)


@pytest.mark.parametrize("modality, lost", [("text", "config.json"), ("audio", "preprocessor_config.json")])
def test_a_folder_that_is_not_whole(tiny, tmp_path, modality, lost):
    other = shutil.copytree(tiny[modality], tmp_path / modality)
    (other / lost).unlink()
    with pytest.raises(InputError, match="the folder is there, but not whole"):
        ENCODERS[modality](str(other), 5, 64)


def fails_in_one_line(make, words):
    with pytest.raises(InputError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_what_eq_2_needs(tiny, tmp_path):
    folder = save_text(tmp_path / "no-mask", "without a mask")
    fails_in_one_line(lambda: TextEncoder(str(folder), 5), "--text-model .*no-mask: its tokenizer has no mask token")
    for name in ("bos_token", "eos_token", "pad_token"):
        other = shutil.copytree(tiny["text"], tmp_path / name)
        settings = json.loads((other / "tokenizer_config.json").read_text())
        del settings[name]
        (other / "tokenizer_config.json").write_text(json.dumps(settings))
        fails_in_one_line(lambda: TextEncoder(str(other), 5), "no token for the start, the end or padding")  # noqa: B023


def test_a_checkpoint_too_short_for_the_question(tiny, tmp_path):
    other = shutil.copytree(tiny["text"], tmp_path / "text")
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 31}))
    fails_in_one_line(lambda: TextEncoder(str(other), 5), "--text-model .*: prompts of 31 tokens, 32 are the least")
    fails_in_one_line(lambda: TextEncoder(tiny["text"], 5, max_tokens=5), "prompts of 5 tokens")
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 32}))
    encoder = TextEncoder(str(other), 5)
    talk = conversation(("Ada", "I am happy"), ("Bob", "well " * 50))
    assert max(map(len, encoder.prompts(talk))) == 32


def test_prompts_are_as_long_as_the_user_says(tiny):
    encoder = TextEncoder(tiny["text"], 5, 64, max_tokens=40)
    talk = conversation(*(("Ada", f"I am happy today {i}") for i in range(20)))
    assert max(map(len, encoder.prompts(talk))) == 40


@pytest.mark.parametrize("modality", ENCODERS)
@pytest.mark.parametrize("other", ENCODERS)
def test_a_checkpoint_of_another_modality(tiny, modality, other):
    if modality != other:
        fails_in_one_line(lambda: make({modality: tiny[other]}, modality), f"cannot load .*{other}|--{modality}-model")


@pytest.mark.parametrize("modality", ENCODERS)
@pytest.mark.parametrize("kept", [0, 5, 1_000, -1, None])
def test_weights_that_are_not_whole(tiny, tmp_path, modality, kept):
    other = shutil.copytree(tiny[modality], tmp_path / modality)
    weights = other / "model.safetensors"
    weights.write_bytes(b"noise" * 500 if kept is None else weights.read_bytes()[:kept])
    fails_in_one_line(lambda: make({modality: other}, modality), "the folder is there, but not whole")


def test_models_of_another_kind(tmp_path):
    """A picture is no film, and Whisper's spectra are no samples."""
    transformers.ViTConfig(hidden_size=32).save_pretrained(tmp_path)
    transformers.VideoMAEImageProcessor().save_pretrained(tmp_path)
    fails_in_one_line(lambda: video_shape(str(tmp_path)), "--video-model .*: not a video model")
    fails_in_one_line(lambda: VideoEncoder(str(tmp_path), 5), "--video-model .*: not a video model")
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 60, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    transformers.WhisperModel(config).save_pretrained(tmp_path / "whisper")
    transformers.WhisperFeatureExtractor().save_pretrained(tmp_path / "whisper")
    fails_in_one_line(lambda: AudioEncoder(str(tmp_path / "whisper"), 5), "a WhisperModel, not one of the wav2vec 2.0")
