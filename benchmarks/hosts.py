"""Tries ``insert`` on every plain ViT timm registers and writes down what came of it.

python benchmarks/hosts.py           # → docs/hosts.md (about 2 minutes on one core)
python benchmarks/hosts.py eva beit  # only prints what these families give

Each model is built without numbers (on the meta device), gets 4 tokens at half its depth and runs once on one image of
its own size. It counts as served if every layer of the first half ran on its patches and every later one on its prefix
tokens and the 4.
"""

import sys
import warnings
from collections import defaultdict
from pathlib import Path

import tokenlearner  # before timm
from tokenlearner.insertion.hosts import host_of
from tokenlearner.inspection.cost import describe_tokens

import timm
import torch
from timm.models import model_entrypoint

DOCUMENT = Path(__file__).parent.parent / "docs/hosts.md"
NUM_TOKENS = 4

# The modules of timm with plain ViTs, and what is in them.
PLAIN = {
    "vision_transformer": "ViT: ImageNet, CLIP, SigLIP, DINO, DINOv2, AIMv2 and others",
    "deit": "DeiT and DeiT-III, distilled ones too",
    "vision_transformer_hybrid": "ViT on the features of a ResNet",
    "vitamin": "ViTamin: ViT on the features of a convolutional stem",
    "eva": "EVA, EVA-02, DINOv3, Perception Encoder, ViT with rotary embeddings",
    "beit": "BEiT and BEiT v2",
    "vision_transformer_relpos": "ViT with relative positions",
    "naflexvit": "NaFlexViT, for images (not for batches of patches)",
    "cait": "CaiT",
    "vision_transformer_sam": "the image encoder of SAM",
}
# Modules whose models have one grid throughout, but pool by it or attend by it: all tried, not counted as plain.
ONE_GRID = ("convit", "deepseek_vit", "gemma4_vit", "qwen3_vit")
# Transformers that are nothing of the kind; one of each is tried.
OTHERS = (
    *("coat_tiny", "crossvit_9_240", "davit_tiny", "edgenext_xx_small", "efficientformer_l1", "fastvit_t8"),
    *("gcvit_xxtiny", "hiera_tiny_224", "iformer_t", "levit_128", "maxvit_tiny_tf_224", "mobilevit_xxs"),
    *("mvitv2_tiny", "nest_tiny", "nextvit_small", "pit_ti_224", "pvt_v2_b0", "sam2_hiera_tiny"),
    *("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "tiny_vit_5m_224", "tnt_s_patch16_224"),
    *("twins_svt_small", "visformer_tiny", "volo_d1_224", "xcit_nano_12_p16_224"),
)


def family_of(name: str) -> str:
    return model_entrypoint(name).__module__.rpartition(".")[2]


def attempt(name: str) -> tuple[bool, str]:
    """Whether ``insert`` serves timm's model ``name``, and its tokens per layer or the reason it doesn't."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model(name)
    try:
        tokenlearner.insert(model, NUM_TOKENS)
    except (TypeError, ValueError) as error:
        return False, str(error)
    tokens = tokenlearner.cost(model, model.pretrained_cfg["input_size"]).tokens
    half, prefix = len(tokens) // 2, host_of(model).num_prefix_tokens
    whole = tokens[0]
    wanted = (whole,) * half + (NUM_TOKENS + prefix,) * (len(tokens) - half)
    if tokens != wanted or whole <= NUM_TOKENS + prefix or len(tokens) != len(host_of(model).layers()):
        raise AssertionError(f"{name} is neither served nor refused: its layers run on {tokens} tokens, not {wanted}")
    return True, describe_tokens(tokens)


def try_families(families: list[str]) -> dict[str, dict[str, tuple[bool, str]]]:
    found: dict[str, dict[str, tuple[bool, str]]] = defaultdict(dict)
    for name in timm.list_models():
        family = family_of(name)
        if family in families:
            found[family][name] = attempt(name)
            served, text = found[family][name]
            print(f"{family}: {name}: {'served' if served else 'REFUSED'}: {text}", flush=True)
    return found


def document(found: dict[str, dict[str, tuple[bool, str]]], others: dict[str, str]) -> str:
    total = sum(len(models) for models in found.values())
    served = sum(served for models in found.values() for served, _ in models.values())
    near = sum(family_of(name) in ONE_GRID for name in others)
    lines = [
        "# Which of timm's models can be hosts",
        "",
        f"Written by `python benchmarks/hosts.py` with timm {timm.__version__}: every plain ViT timm registers, with"
        f" {NUM_TOKENS} tokens inserted at half its depth and one image of its own size. **{served} of {total} names"
        f" ({served / total:.1%}) are served**, the others refused with the reason below. Counting also the"
        f" {near} names of {', '.join(ONE_GRID)}, which keep one grid throughout but need it after or inside their"
        f" layers, it is {served} of {total + near} ({served / (total + near):.1%}). The tables give the tokens each"
        " layer runs on, those before the patches (class token, registers) included.",
        "",
        "| timm's module | models | served |",
        "|---|---|---|",
        *(
            f"| [{family}](#{family}): {PLAIN[family]} | {len(models)} | {sum(ok for ok, _ in models.values())} |"
            for family, models in found.items()
        ),
        "",
        "What the layers of these models know of places does not reach learned tokens, which have none: no rotary"
        " embedding, and no relative position bias between learned tokens (that of the class token stays).",
        "",
    ]
    for family, models in found.items():
        lines += [f"## {family}", "", PLAIN[family] + ".", "", "| name | tokens per layer |", "|---|---|"]
        lines += [f"| {name} | {text if ok else f'refused: {text}'} |" for name, (ok, text) in models.items()]
        lines.append("")
    lines += [
        "## Transformers that are no plain ViT",
        "",
        f"All names of {', '.join(ONE_GRID)}, and one of each other architecture. All are refused.",
        "",
    ]
    lines += ["| name | why |", "|---|---|", *(f"| {name} | {why} |" for name, why in others.items()), ""]
    return "\n".join(lines)


def main(only: list[str]) -> None:
    if only:
        try_families(only)
        return
    found = try_families(list(PLAIN))
    found = {family: found[family] for family in PLAIN}
    others = {}
    for name in [*(name for name in timm.list_models() if family_of(name) in ONE_GRID), *OTHERS]:
        served, others[name] = attempt(name)
        if served:
            raise AssertionError(f"{name} is no plain ViT, and was taken for one")
    DOCUMENT.write_text(document(found, others))


if __name__ == "__main__":
    main(sys.argv[1:])
