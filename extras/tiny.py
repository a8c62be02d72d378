"""The demo's corpus and its encoders: small, with random weights, but of the same classes as the full ones.

Not here: how the corpus is made up (demo.py).
"""

import dataclasses
import shutil
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data import MODALITIES, Corpus, read_iemocap
from extras import demo


def read_demo(out: Path) -> Corpus:
    """The made-up corpus, in IEMOCAP's layout, written once into a run's folder."""
    folder = out / "corpus"
    if not folder.exists():
        print(f"writing a made-up corpus to {folder}", flush=True)
        part = out / "corpus.part"
        shutil.rmtree(part, ignore_errors=True)
        demo.write_iemocap(part, conversations=20)
        part.rename(folder)
    return dataclasses.replace(read_iemocap(folder), name="demo (made up)")


def tiny_models(corpus: Corpus, out: Path) -> dict[str, str]:
    """Small random encoders in a run's folder, written once: {"text_model": path, ...}."""
    folder = out / "tiny"
    if not folder.exists():
        part = out / "tiny.part"
        shutil.rmtree(part, ignore_errors=True)
        save_tiny(part, [u.text for u in corpus.utterances("train")])
        part.rename(folder)
    return {f"{m}_model": str(folder / m) for m in MODALITIES}


def save_tiny(folder: Path, texts: list[str], seed: int = 0) -> dict[str, str]:
    """Writes small random RoBERTa, Data2vec and TimeSformer checkpoints with their processors into `folder`.

    texts: what the tokenizer is trained on. Returns modality -> path. The classes, files and loading are those of the
    full models; only the sizes (64 wide, 1 or 2 layers, 48 x 48 pixels) and the missing pretraining differ.
    """
    torch.manual_seed(seed)
    paths = {m: str(Path(folder) / m) for m in MODALITIES}
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

    # One layer: each clip goes through by itself, so that on a CPU layers cost time, whatever their width.
    config = transformers.Data2VecAudioConfig(
        # Four wide steps instead of seven small ones, 320 samples a frame as there.
        conv_dim=(32,) * 4,
        conv_kernel=(20, 4, 2, 2),
        conv_stride=(20, 4, 2, 2),
        feat_extract_activation="relu",
        num_conv_pos_embeddings=2,  # layers; 5 there
        num_conv_pos_embedding_groups=4,
        layerdrop=0.0,
        **size | {"num_hidden_layers": 1},
    )
    transformers.Data2VecAudioModel(config).save_pretrained(paths["audio"])
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(paths["audio"])

    config = transformers.TimesformerConfig(image_size=48, patch_size=12, num_frames=8, **size)
    transformers.TimesformerModel(config).save_pretrained(paths["video"])
    transformers.VideoMAEImageProcessor(size={"shortest_edge": 48}).save_pretrained(paths["video"])
    return paths
