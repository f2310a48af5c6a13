"""The miniature's student: a word-level tokenizer, a processor and a small LLaVA."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curation_env.mini import language as say
from curation_env.mini.questions import LETTER_HINT
from curation_env.mini.render import COLORS, LETTERS, PATCH, SHAPES, SIDE, SIZES

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}"
    " ASSISTANT:{% else %} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}</s>{% endif %}{% endfor %}"
)
_WORD = re.compile(r"\w+|[^\w\s]")
_FORM_WORDS = """
what color is the shape in size there how many objects are where which object does do sign say says read text first
second letter digits digit shown larger sum of bar bars tallest shortest tall taller than height describe image detail
you see how placed left right above below and a an no yes these kind thing that with two chart number is was top bottom
Answer with the option's letter from the given choices directly. Question Options Please select answer question using
single word or phrase one number image Hint correct . , ? ! : ' ( ) - |
"""


def words(text: str) -> list[str]:
    """Split text as the tokenizer does."""
    return _WORD.findall(text)


def vocabulary() -> list[str]:
    """All words that the generator, the benchmarks and the prompts can write, in a fixed order."""
    texts = [_FORM_WORDS, LETTER_HINT, *say.REFUSALS, *say.VERBOSE, *(t for pair in say.CHAT for t in pair)]
    found = {w for text in texts for w in words(re.sub(r"\{.\}", "", text))}
    found |= {*COLORS, *SHAPES, *SIZES, *LETTERS, *say.PLURAL.values(), *say.CATEGORY, *say.FACTS, *"ABCD"}
    found |= {str(k) for k in range(21)}
    return [*SPECIAL, *sorted(found)]


def count_supervised(conversation: list[dict[str, str]]) -> int:
    """Assistant tokens of a row, its end tokens included. No row of the miniature is long enough to be cut."""
    return sum(len(words(turn["assistant"])) + 1 for turn in conversation)


def build_processor() -> LlavaProcessor:
    """Build tokenizer, image processor and chat template."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({w: k for k, w in enumerate(vocabulary())}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=["<image>", "USER:", "ASSISTANT:"], padding_side="left",
        clean_up_tokenization_spaces=False, model_max_length=256,
    )  # fmt: skip
    return LlavaProcessor(
        image_processor=image_processor(), tokenizer=fast, patch_size=PATCH, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def image_processor() -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    )


def build_model(
    seed: int = 0, width: int = 96, layers: int = 3, vision_layers: int = 3
) -> LlavaForConditionalGeneration:
    """Build a student with random weights in fp32."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vocab = vocabulary()
    index = vocab.index
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=vision_layers, num_attention_heads=4,
        image_size=SIDE, patch_size=PATCH, projection_dim=width,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(vocab), hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=index("<s>"), eos_token_id=index("</s>"), pad_token_id=index("<pad>"),
    )  # fmt: skip
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=index("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="default", vision_feature_layer=-1, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).float()
    model.generation_config.pad_token_id = index("<pad>")
    model.generation_config.eos_token_id = index("</s>")
    model.generation_config.bos_token_id = index("<s>")
    return model


def save_student(model: LlavaForConditionalGeneration, path: Path) -> None:
    """Write model, tokenizer, processor and SHA256SUMS to a folder."""
    import hashlib

    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    build_processor().save_pretrained(path)
    sums = [
        f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}"
        for p in sorted(path.iterdir())
        if p.name != "SHA256SUMS"
    ]
    for file in path.iterdir():
        file.chmod(0o644)
    (path / "SHA256SUMS").write_text("\n".join(sums) + "\n")


def init_dir() -> Path:
    """The shipped starting checkpoint."""
    return Path(str(files("curation_env.mini") / "assets" / "init"))
