"""LLaVA-1.5 as it is before visual instruction tuning, assembled of what is published: Vicuna, CLIP, the projector.

The published LLaVA checkpoints are instruction-tuned, and nothing in a checkpoint says so. What tells them apart is the
language model: before the tuning it is Vicuna's, weight for weight. So every init is verified against its parts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curation_env.errors import MissingAssets, TaskMismatch
from curation_env.students import Card, file_hash

if TYPE_CHECKING:
    import torch

Progress = Callable[[dict[str, Any]], None]
#: Of the source folder: a checkpoint that somebody has assembled already; it is verified and taken as it is.
READY = "llava"
#: Layers of the projector file, and of the model.
PROJECTOR = {"model.mm_projector.0": "linear_1", "model.mm_projector.2": "linear_2"}
TUNED = "llava-hf/llava-1.5-7b-hf and liuhaotian/llava-v1.5-7b are"
ROWS = 64  # the vocabulary is padded to a multiple of it
SPREAD = 1e-5  # variance of the added rows, as a share of the embeddings' own


class Parts:
    """The three parts, read: Vicuna, CLIP's vision tower, the projector by the model's names."""

    def __init__(self, card: Card, source: Path) -> None:
        import torch
        from transformers import CLIPVisionModel, LlamaForCausalLM
        from transformers.utils.logging import disable_progress_bar, set_verbosity_error

        disable_progress_bar()
        set_verbosity_error()  # CLIP's text tower is left out on purpose
        lacking = [f"{path} ({name})" for path, name in card.parts.items() if not (source / path).exists()]
        if lacking:
            raise MissingAssets(f"{source} lacks {', '.join(lacking)}{_refusal(source)}")
        language, vision, projector = card.parts
        self.folders = [source / language, source / vision]
        self.language = LlamaForCausalLM.from_pretrained(self.folders[0], dtype="auto", local_files_only=True)
        self.dtype = self.language.dtype
        self.vision = CLIPVisionModel.from_pretrained(self.folders[1], dtype=self.dtype, local_files_only=True)
        given = torch.load(source / projector, map_location="cpu", weights_only=True)
        names = {f"{old}.{kind}": f"{new}.{kind}" for old, new in PROJECTOR.items() for kind in ("weight", "bias")}
        if given.keys() != names.keys():
            raise TaskMismatch(f"{source / projector} holds {', '.join(given)}, not {', '.join(names)}")
        self.projector = {names[name]: tensor.to(self.dtype) for name, tensor in given.items()}

    def differences(self, model: Any) -> Iterator[tuple[str, str, float]]:
        """Yield (part, tensor, largest difference) wherever a model is not made of these parts.

        Rows of the vocabulary that Vicuna does not have are left out.
        """
        pairs = (
            ("language model", self.language.model, model.model.language_model.state_dict()),
            ("language model", self.language.lm_head, model.lm_head.state_dict()),
            ("vision tower", self.vision, model.model.vision_tower.state_dict()),
            ("projector", None, model.model.multi_modal_projector.state_dict()),
        )
        for part, module, found in pairs:
            expected = self.projector if module is None else module.state_dict()
            for name, tensor in expected.items():
                own = found[name][: len(tensor)]
                if own.shape != tensor.shape:
                    yield part, name, float("inf")
                elif not own.equal(tensor.to(own.dtype)):
                    yield part, name, (own.float() - tensor.float()).abs().max().item()


def assemble_llava(card: Card, source: Path, out: Path, on_progress: Progress | None = None) -> dict[str, Any]:
    """Write the init into a folder, read it back and verify it against its parts.

    Args:
        source: Holds the card's `parts`; and `llava/` where a checkpoint is there already, which is verified instead.
        out: An empty folder.

    Returns:
        sha256 of every file of weights that it was made of, by public name.

    Raises:
        MissingAssets: Parts are missing.
        TaskMismatch: It is not made of them: a checkpoint that has been instruction-tuned is refused by this.
    """

    def report(done: int) -> None:
        if on_progress is not None:
            on_progress({"stage": "prepare student", "done": done, "total": 4, "unit": "steps"})

    report(0)
    parts = Parts(card, source)
    report(1)
    if (source / READY).is_dir():
        for path in sorted((source / READY).iterdir()):
            if path.is_file() and not path.name.startswith("."):
                (out / path.name).write_bytes(path.read_bytes())
    else:
        _write(parts, out)
    report(2)
    verify(parts, out, source / READY if (source / READY).is_dir() else out)
    report(3)
    made_of = {}
    for part, name in card.parts.items():
        files = [source / part] if (source / part).is_file() else sorted((source / part).iterdir())
        weights = [f for f in files if f.suffix in (".bin", ".safetensors")]
        made_of[name] = {f.name: file_hash(f) for f in weights}
    report(4)
    return made_of


def verify(parts: Parts, folder: Path, shown: Path) -> None:
    """Read a checkpoint and compare every tensor with its parts.

    Args:
        shown: Where it lies in the user's eyes.

    Raises:
        TaskMismatch: It is not made of them.
    """
    from transformers import LlavaForConditionalGeneration

    found = json.loads((folder / "config.json").read_text()).get("model_type")
    if found != "llava":
        raise TaskMismatch(f"{shown} is a {found!r}, not a 'llava'")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=parts.dtype, local_files_only=True)
    differ = list(parts.differences(model))
    if not differ:
        return
    kinds = sorted({part for part, _, _ in differ})
    part, name, largest = max(differ, key=lambda entry: entry[2])
    why = f"{shown} is not made of the given parts: {len(differ)} tensors of its {', '.join(kinds)} differ, "
    why += f"most of all {name} of its {part}, by {largest:.3g}. "
    if "language model" in kinds:
        why += f"Visual instruction tuning changes the language model: {TUNED} tuned, and the task starts before it. "
    raise TaskMismatch(why + "Leave the folder out, and the init is assembled of its parts")


def _refusal(source: Path) -> str:
    """Why a LLaVA checkpoint in place of its parts is not taken."""
    config = source / "config.json"
    if not config.is_file() or json.loads(config.read_text()).get("model_type") not in ("llava", "llava_llama"):
        return ""
    return (
        f". It is a LLaVA checkpoint itself, which is refused: nothing in it says whether it is instruction-tuned "
        f"({TUNED}), and the task starts before that. Put the parts into one folder, and such a checkpoint, if you "
        f"have one from before the tuning, into {READY}/ beside them: it is verified against them"
    )


def _write(parts: Parts, out: Path) -> None:
    """Put the parts together as the converter of transformers' LLaVA checkpoints does."""
    import torch
    from transformers import AddedToken, AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    text = parts.language.config
    known = text.vocab_size
    tokenizer = AutoTokenizer.from_pretrained(parts.folders[0], local_files_only=True)
    if len(tokenizer) != known:
        raise TaskMismatch(
            f"{parts.folders[0]}: its tokenizer has {len(tokenizer)} tokens, its embeddings {known} rows"
        )
    tokenizer.add_tokens(AddedToken("<image>", special=True, normalized=False), special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": AddedToken("<pad>", special=True, normalized=False)})
    config = LlavaConfig(
        text_config=text,
        vision_config=parts.vision.config,
        image_token_index=known,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        dtype=parts.dtype,
    )
    config.update({"pad_token_id": known + 1})
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(parts.language.model.state_dict(), assign=True)
    model.lm_head.load_state_dict(parts.language.lm_head.state_dict(), assign=True)
    model.model.vision_tower.load_state_dict(parts.vision.state_dict(), assign=True)
    model.model.multi_modal_projector.load_state_dict(parts.projector, assign=True)
    rows = -(-len(tokenizer) // ROWS) * ROWS - known
    embeddings = parts.language.model.embed_tokens.weight.detach()
    for layer, seed in ((model.model.language_model.embed_tokens, 0), (model.lm_head, 1)):
        extended = torch.cat([layer.weight.detach(), added_rows(embeddings, rows, seed)])
        layer.weight = torch.nn.Parameter(extended)
    model.model.language_model.embed_tokens.num_embeddings = model.lm_head.out_features = known + rows
    model.config.text_config.vocab_size = known + rows
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    CLIPImageProcessorPil.from_pretrained(parts.folders[1], local_files_only=True).save_pretrained(out)


def added_rows(embeddings: torch.Tensor, rows: int, seed: int) -> torch.Tensor:
    """Draw rows for tokens that the language model does not know: (rows, width), the same on every machine.

    They are normal around the mean embedding, with the embeddings' covariance times `SPREAD`: a mix of the centred
    embeddings with normal weights has just that, and needs no decomposition of it.
    """
    import torch

    centre = embeddings.float().mean(0)
    weights = torch.randn((rows, len(embeddings)), generator=torch.Generator().manual_seed(seed))
    drawn = centre + (SPREAD / len(embeddings)) ** 0.5 * weights @ (embeddings.float() - centre)
    return drawn.to(embeddings.dtype)
