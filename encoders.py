"""Stage 1's encoders: one vector per utterance from its words (Eq. 1-3), its sound (Eq. 4) or its picture (Eq. 5).

Each is a pretrained transformer from a hub name or a folder written by `save_pretrained`, a rule for which of its
output vectors stands for the utterance, and a linear classifier. The training loop uses all three without knowing the
modality: `collate` makes a batch of examples, `forward` gives features [B, d] and logits [B, C].

    text   RoBERTa      the vector at <mask> of a prompt that asks what the speaker feels, the past before it
    audio  Data2vec     the mean over the frames of the sound itself, padding left out
    video  TimeSformer  the class token of 8 frames

What a checkpoint's processor wants (mean, deviation, rate, normalisation) is read from the checkpoint. `save_tiny`
writes small random ones of the same classes, for the demo and the tests.

Not here: decoding (media.py), training (magtkd.py).
"""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from data import Conversation, InputError
from media import FRAMES, RATE

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries without a network; our error says it once

SPEAKER_TOKENS = [f"<s{i}>" for i in range(1, 10)]  # MELD has at most 9 speakers in a conversation; a tenth shares <s9>
MAX_TOKENS = 512
MIN_BATCH_SECONDS = 0.5  # SpecAugment masks 10 frames at a time, and raises on batches shorter than that


class TextEncoder(nn.Module):
    """RoBERTa at the <mask> of a prompt (Eq. 3). Examples are lists of token ids, from `prompts`."""

    def __init__(self, checkpoint: str, num_classes: int, width: int = 768):
        super().__init__()
        self.tokenizer = _load(transformers.AutoTokenizer.from_pretrained, checkpoint, "--text-model")
        self.tokenizer.add_tokens(SPEAKER_TOKENS, special_tokens=True)
        self.backbone = _load_backbone(transformers.RobertaModel, checkpoint, "--text-model", add_pooling_layer=False)
        self.backbone.resize_token_embeddings(len(self.tokenizer))
        hidden = self.backbone.config.hidden_size
        self.project = nn.Identity() if hidden == width else nn.Linear(hidden, width)
        self.classifier = nn.Linear(width, num_classes)

    def prompts(self, conversation: Conversation) -> list[list[int]]:
        """For each utterance k of a conversation the ids of <s> C_k </s> P_k </s> (Eq. 1, 2).

        Over 512 tokens the oldest of C_k go first. P_k stays, but for the end of an utterance too long for it alone.
        """
        t = self.tokenizer

        def ids(text: str) -> list[int]:
            return t(text, add_special_tokens=False, verbose=False)["input_ids"]

        limit = min(MAX_TOKENS, self.backbone.config.max_position_embeddings - 2)
        order = list(dict.fromkeys(u.speaker for u in conversation.utterances))
        context, prompts = [], []
        for u in conversation.utterances:
            s = SPEAKER_TOKENS[min(order.index(u.speaker), len(SPEAKER_TOKENS) - 1)]
            words, head, tail = ids(f" {u.text}"), ids(f"For {s}:"), ids(f" Now {s} feels {t.mask_token}")
            context += ids(f" {s}:") + words  # C_k: the past and the present, never the future
            room = limit - 3 - len(head) - len(tail)  # beside <s>, </s>, </s>
            prompt = head + words[:room] + tail  # P_k
            past = context[max(0, len(context) - (room - len(words))) :] if room > len(words) else []
            prompts.append([t.bos_token_id, *past, t.eos_token_id, *prompt, t.eos_token_id])
        return prompts

    def collate(self, examples: list[list[int]]) -> dict[str, Tensor]:
        """input_ids [B, T], padded on the right."""
        rows = [torch.tensor(ids) for ids in examples]
        pad = self.tokenizer.pad_token_id
        return {"input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)}

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.backbone(input_ids, attention_mask=input_ids != self.tokenizer.pad_token_id).last_hidden_state
        at_mask = (input_ids == self.tokenizer.mask_token_id).int()
        # The last <mask> of a row: an utterance could hold one of its own.
        place = input_ids.shape[1] - 1 - at_mask.flip(1).argmax(dim=1)
        features = self.project(hidden[torch.arange(len(hidden), device=hidden.device), place])
        return features, self.classifier(features)


class AudioEncoder(nn.Module):
    """Data2vec, mean over the valid frames (Eq. 4). Examples are float32 [T] at 16 kHz."""

    def __init__(self, checkpoint: str, num_classes: int, width: int = 768):
        super().__init__()
        self.processor = _load(transformers.AutoFeatureExtractor.from_pretrained, checkpoint, "--audio-model")
        if self.processor.sampling_rate != RATE:
            raise InputError(
                f"--audio-model {checkpoint}: wants {self.processor.sampling_rate} Hz, this project reads {RATE}"
            )
        self.backbone = _load_backbone(transformers.Data2VecAudioModel, checkpoint, "--audio-model")
        # Its stacked convolutions for positions carry what becomes of the padding back into the sound: a clip's vector
        # would depend on the longest clip of its batch.
        for layer in self.backbone.encoder.pos_conv_embed.layers:
            layer.register_forward_hook(self._silence_padding)
        hidden = self.backbone.config.hidden_size
        self.project = nn.Identity() if hidden == width else nn.Linear(hidden, width)
        self.classifier = nn.Linear(width, num_classes)

    def collate(self, examples: list[Tensor]) -> dict[str, Tensor]:
        """sound [B, T], normalised as the checkpoint wants, zeros on the right; samples [B], the length of each."""
        samples = torch.tensor([len(x) for x in examples])
        batch = self.processor(
            [x.numpy() for x in examples],
            sampling_rate=RATE,
            return_tensors="pt",
            return_attention_mask=True,  # or it takes the padding for sound when it normalises
            padding="max_length",
            max_length=max(int(samples.max()), int(MIN_BATCH_SECONDS * RATE)),
        )
        return {"sound": batch["input_values"], "samples": samples}

    def forward(self, sound: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        inside = torch.arange(sound.shape[1], device=sound.device) < samples[:, None]  # [B, T]
        frames = self._frames(samples)
        self.valid = torch.arange(self._frames(sound.shape[1]), device=sound.device) < frames[:, None]  # [B, frames]
        hidden = self.backbone(sound, attention_mask=inside.long()).last_hidden_state  # [B, frames, hidden]
        features = self.project((hidden * self.valid[..., None]).sum(1) / frames[:, None])
        return features, self.classifier(features)

    def _frames(self, samples: Tensor | int) -> Tensor | int:
        """How many frames the convolutions make of so many samples, without any that reaches into padding."""
        for kernel, stride in zip(self.backbone.config.conv_kernel, self.backbone.config.conv_stride):
            samples = (samples - kernel) // stride + 1
        return samples

    def _silence_padding(self, layer: nn.Module, inputs: tuple, hidden: Tensor) -> Tensor:
        return hidden * self.valid[:, None]  # [B, hidden, frames]


class VideoEncoder(nn.Module):
    """TimeSformer at its class token (Eq. 5). Examples are uint8 [8, 3, size, size], RGB."""

    def __init__(self, checkpoint: str, num_classes: int, width: int = 768):
        super().__init__()
        processor = _load(transformers.AutoImageProcessor.from_pretrained, checkpoint, "--video-model")
        self.backbone = _load_backbone(transformers.TimesformerModel, checkpoint, "--video-model")
        if self.backbone.config.num_frames != FRAMES:
            raise InputError(
                f"--video-model {checkpoint}: wants {self.backbone.config.num_frames} frames, not {FRAMES}"
            )
        self.register_buffer("mean", torch.tensor(processor.image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(processor.image_std).view(3, 1, 1), persistent=False)
        hidden = self.backbone.config.hidden_size
        self.project = nn.Identity() if hidden == width else nn.Linear(hidden, width)
        self.classifier = nn.Linear(width, num_classes)

    def collate(self, examples: list[Tensor]) -> dict[str, Tensor]:
        """frames [B, 8, 3, size, size], uint8 still: a quarter of the bytes on their way to the GPU."""
        return {"frames": torch.stack(examples)}

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        pixels = (frames / 255 - self.mean) / self.std
        features = self.project(self.backbone(pixels).last_hidden_state[:, 0])
        return features, self.classifier(features)


ENCODERS = {"text": TextEncoder, "audio": AudioEncoder, "video": VideoEncoder}


def video_size(checkpoint: str) -> int:
    """Height and width, in pixels, of the frames that a TimeSformer checkpoint takes."""
    return _load(transformers.AutoConfig.from_pretrained, checkpoint, "--video-model").image_size


def _load(load: Callable, checkpoint: str, option: str, **options):
    """`load(checkpoint)` with a message that says what to do when it is not there."""
    try:
        return load(checkpoint, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        what = str(e).strip().splitlines()[0][:200]
        if Path(checkpoint).is_dir():
            where = "the folder is there, but not whole: it needs what model.save_pretrained and its processor's write"
        else:
            where = (
                "it is neither a folder here nor in the cache, and the hub did not give it. Without network: download "
                f"it elsewhere (hf download {checkpoint} --local-dir DIR), copy the folder here, and give {option} DIR"
            )
        raise InputError(f"cannot load {checkpoint!r}: {where}. ({what})") from e


def _load_backbone(cls: type, checkpoint: str, option: str, **options) -> nn.Module:
    """A model with its checkpoint's weights, in float32 whatever they are kept in."""
    model, info = _load(
        cls.from_pretrained, checkpoint, option, dtype=torch.float32, output_loading_info=True, **options
    )
    if len(info["missing_keys"]) > len(model.state_dict()) / 2:  # transformers would go on, with random weights
        raise InputError(f"{option} {checkpoint}: these are not the weights of a {cls.__name__}")
    return model


def save_tiny(folder: Path, texts: list[str], seed: int = 0) -> dict[str, str]:
    """Writes small random RoBERTa, Data2vec and TimeSformer checkpoints with their processors into `folder`.

    texts: what the tokenizer is trained on. Returns modality -> path. The classes, files and loading are those of the
    full models; only the sizes (64 wide, 2 layers, 48 x 48 pixels) and the missing pretraining differ.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    torch.manual_seed(seed)
    paths = {m: str(Path(folder) / m) for m in ENCODERS}
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    extra = [" For", " Now", " feels"]  # of the prompt
    bpe.train_from_iterator(
        [*(f" {t}" for t in texts), *extra * 10],
        trainers.BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), special))
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **names).save_pretrained(paths["text"])
    config = transformers.RobertaConfig(
        vocab_size=bpe.get_vocab_size(),
        max_position_embeddings=66,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        **size,
    )
    transformers.RobertaModel(config, add_pooling_layer=False).save_pretrained(paths["text"])

    config = transformers.Data2VecAudioConfig(
        # Four wide steps instead of seven small ones, 320 samples a frame as there.
        conv_dim=(32,) * 4,
        conv_kernel=(20, 4, 2, 2),
        conv_stride=(20, 4, 2, 2),
        feat_extract_activation="relu",
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        layerdrop=0.0,
        **size,
    )
    transformers.Data2VecAudioModel(config).save_pretrained(paths["audio"])
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(paths["audio"])

    config = transformers.TimesformerConfig(image_size=48, patch_size=12, num_frames=FRAMES, **size)
    transformers.TimesformerModel(config).save_pretrained(paths["video"])
    transformers.VideoMAEImageProcessor(size={"shortest_edge": 48}).save_pretrained(paths["video"])
    return paths
