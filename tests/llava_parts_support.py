"""The three parts of LLaVA-1.5 before instruction tuning: small, of random weights, in the formats of the real ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from training_support import WORDS
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
LANGUAGE, VISION, PROJECTOR = "vicuna-7b-v1.5", "clip-vit-large-patch14-336", "mm_projector.bin"


def make_parts(folder: Path, shards: str = "bin") -> Path:
    """Write Vicuna (shards of ".bin" or ".safetensors", a tokenizer of SentencePiece's), CLIP and the projector."""
    import sentencepiece
    from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    language = folder / LANGUAGE
    language.mkdir(parents=True)
    (folder / "words.txt").write_text("\n".join([WORDS] * 3))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "words.txt"),
        model_prefix=str(language / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    (language / "tokenizer.vocab").unlink()
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {**marks, "add_bos_token": True, "legacy": False, "tokenizer_class": "LlamaTokenizer"}
    (language / "tokenizer_config.json").write_text(json.dumps(settings))
    (language / "special_tokens_map.json").write_text(json.dumps({**marks, "pad_token": "<unk>"}))
    text = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(text).half()
    if shards == "safetensors":
        model.save_pretrained(language, max_shard_size="60KB")
    else:
        text.save_pretrained(language)
        weights, names = model.state_dict(), [f"pytorch_model-0000{k}-of-00002.bin" for k in (1, 2)]
        where = {name: names[k % 2] for k, name in enumerate(weights)}
        for file in names:
            torch.save({name: tensor for name, tensor in weights.items() if where[name] == file}, language / file)
        index = {"metadata": {}, "weight_map": where}
        (language / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    words = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPConfig(
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        text_config={**words, "vocab_size": 50, "eos_token_id": 2, "bos_token_id": 1},
        projection_dim=16,
    )
    CLIPModel(clip).save_pretrained(folder / VISION)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder / VISION
    )
    shapes = {"0.weight": (32, 32), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    projector = {f"model.mm_projector.{name}": torch.randn(shape).half() / 5 for name, shape in shapes.items()}
    torch.save(projector, folder / PROJECTOR)
    return folder
