"""A folder that transformers' ``save_pretrained`` wrote, as a model that says how its inputs are prepared.

transformers itself is imported when a folder is opened, so that one can be told from ours without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from tokenlearner.errors import InputError
from tokenlearner.insertion.insert import SPEC
from tokenlearner.insertion.saving import CONFIG, Preprocessing, config_has, read_json

OUTPUTS = ("logits", "image_embeds", "pooler_output", "last_hidden_state")  # what to read first
_NEAR = 0.02  # of the range of pixels, the mean difference of a picture prepared by the processor and by us


class TransformersModel(nn.Module):
    """A model of transformers as one that takes a tensor and gives one, as timm's do.

    Images (b, c, h, w) or clips (b, c, t, h, w) become its logits, or of a model without a head the embedding, the
    pooled output or the last hidden state. The model itself is ``model``; insertion, labels and preprocessing are its.
    """

    wraps_host = True

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__()
        self.model = model
        self.processor = processor
        self.frames_first = takes_frames_first(model)
        self.takes_clips = self.frames_first
        classifies = "Classification" in type(model).__name__
        self.num_classes = model.config.num_labels if classifies else 0  # type: ignore[union-attr]
        self.preprocessing = getattr(model, "preprocessing", None)
        self.label_names = getattr(model, "label_names", None)

    @property
    def token_learner_insertion(self) -> Any:
        return getattr(self.model, SPEC)  # an AttributeError where nothing is inserted, as of any host

    @token_learner_insertion.setter
    def token_learner_insertion(self, spec: Any) -> None:
        setattr(self.model, SPEC, spec)

    @token_learner_insertion.deleter
    def token_learner_insertion(self) -> None:
        delattr(self.model, SPEC)

    def forward(self, x: Tensor) -> Tensor:
        return output_of(self.forward_features(x))[1]

    def forward_features(self, x: Tensor) -> Any:
        """All that the model returns."""
        return self.model(rearrange(x, "b c t h w -> b t c h w") if self.frames_first else x)

    def forward_head(self, outputs: Any, pre_logits: bool = True) -> Tensor | None:
        """The pooled output, (b, d), of a model without a head; None of others."""
        return getattr(outputs, "pooler_output", None)

    def get_classifier(self) -> nn.Module:
        return getattr(self.model, "classifier", nn.Identity())

    def save_pretrained(self, folder: str | Path, labels: Sequence[str] = ()) -> None:
        """Writes model and processor as transformers do; ``labels`` name the outputs."""
        config: Any = self.model.config
        if labels:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: i for i, label in enumerate(labels)}
        self.model.save_pretrained(folder)  # type: ignore[operator]
        if self.processor is not None:
            self.processor.save_pretrained(folder)


def takes_frames_first(model: nn.Module) -> bool:
    """Whether it is a video model of transformers, whose clips are (b, t, c, h, w)."""
    return "video" in getattr(model, "input_modalities", ())


def output_of(returned: Any) -> tuple[str, Tensor]:
    """Which of what a model of transformers ``returned`` is to be read, and its name.

    Raises:
        InputError: It is none of :data:`OUTPUTS`.
    """
    for name in OUTPUTS:
        if isinstance(found := getattr(returned, name, None), Tensor):
            return name, found
    raise InputError(f"the model returns a {type(returned).__name__}; one that returns one tensor can be used")


def is_pretrained(folder: str | Path) -> bool:
    """Whether ``folder`` has a ``config.json`` of transformers."""
    return config_has(folder, "architectures")


def open_pretrained(folder: str | Path) -> TransformersModel:
    """The model saved in ``folder``, with a TokenLearner or without, in eval mode, in float32 and on the CPU.

    It carries ``preprocessing``, from the image or video processor saved beside it, whose rate of frames is None where
    that has none, and ``label_names``, from ``id2label`` (None where these are but numbered).

    Raises:
        InputError: transformers is missing, the model is of no family that is served, weights or processor are missing
            or damaged, or the processor does what ``Preprocessing`` can't say.
    """
    folder = Path(folder)
    try:
        from tokenlearner.insertion.huggingface_families import HOSTS, REFUSED
        from tokenlearner.insertion.huggingface_saving import MODELS
    except ImportError as error:
        raise InputError(f"{folder} is of transformers, which is needed in version 5 or newer: {error}") from error
    classes = read_json(folder / CONFIG)["architectures"] or ["model of no class"]
    name = classes if isinstance(classes, str) else classes[0]
    served: dict[str, Any] = {kind.__name__: kind for kind in (*HOSTS, *MODELS.values())}
    if name not in served:
        why = next((f": {reason}" for start, reason in REFUSED.items() if name.startswith(start)), None)
        others = f"; of transformers' models these are: {', '.join(kind.__name__ for kind in HOSTS)}"
        raise InputError(f"{folder} has a {name}, which is not served{why or others}")
    try:
        model, report = served[name].from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # whatever damaged files make of transformers' readers
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(f"the model in {folder} can't be loaded: {' '.join(said)[:300]}") from error
    if other := sorted(report["mismatched_keys"]):
        key, found, wanted = other[0]
        raise InputError(
            f"the weights in {folder} are not those of the {name} its {CONFIG} says: {key} is {tuple(found)} there and "
            f"{tuple(wanted)} by the config"
        )
    missing = sorted(report["missing_keys"])
    if wrong := missing or sorted(key for key in report["unexpected_keys"] if ".token_" in key):
        raise InputError(
            f"the weights in {folder} are not those of the {name} its {CONFIG} says: they "
            f"{'lack' if missing else 'also have'} {wrong[0]}; insert into the model that is saved, and save all of it"
        )
    processor = _processor(model, folder)
    model.preprocessing = _preprocessing(model, processor, folder)
    names = tuple(model.config.id2label[i] for i in sorted(model.config.id2label))
    numbered = names == tuple(f"LABEL_{i}" for i in range(len(names)))
    model.label_names = None if numbered or "Classification" not in name else names
    return TransformersModel(model, processor).eval()


def _processor(model: Any, folder: Path) -> Any:
    from transformers import AutoImageProcessor, AutoVideoProcessor

    clips = takes_frames_first(model)
    noun = "video" if clips else "image"
    automatic: Any = AutoVideoProcessor if clips else AutoImageProcessor
    try:
        return automatic.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} has no {noun} processor, so how its {noun}s are prepared is not known: "
            f"save it there too, processor.save_pretrained({str(folder)!r})"
        ) from error


def _preprocessing(model: Any, processor: Any, folder: Path) -> Preprocessing:
    """What ``processor`` does, tried out: its code is not the same for all families."""
    clips = takes_frames_first(model)
    noun = "video" if clips else "image"

    def prepare(picture: Image.Image) -> Tensor:
        out = processor([[picture]] if clips else picture, return_tensors="pt")
        return next(iter(out.values())).flatten(0, -4)[0]

    wide = Image.merge("RGB", [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.linear_gradient("L")])
    wide = wide.resize((400, 300))
    channels, height, width = prepare(wide).shape
    black, white = (prepare(Image.new("RGB", wide.size, colour)).mean(dim=(1, 2)) for colour in ("black", "white"))
    std = 1 / (white - black)
    edge, side = processor.size.get("shortest_edge"), processor.size.get("height")
    found = Preprocessing(
        input_size=(channels, height, width),
        mean=tuple(round(value, 6) for value in (-black * std).tolist()),
        std=tuple(round(value, 6) for value in std.tolist()),
        interpolation=Image.Resampling(processor.resample).name.lower(),
        crop_pct=_share(height, edge or side or height),
        crop_mode="center" if edge else "squash",
        frames=(getattr(model.config, "frames_per_clip", None) or model.config.num_frames) if clips else None,
        fps=getattr(processor, "fps", None),
    )
    for picture in (wide, wide.rotate(90, expand=True)):
        theirs, ours = prepare(picture), found.transform()(picture)
        if theirs.shape != ours.shape or float(((theirs - ours).mul(std[:, None, None])).abs().mean()) > _NEAR:
            raise InputError(
                f"the {type(processor).__name__} in {folder} prepares {noun}s of no fixed size, or in another way than "
                "resizing them, cropping their centre and normalising; give it a size and a crop, and save it again"
            )
    return found


def _share(crop: int, edge: int) -> float:
    """Which share of ``edge`` is cropped, such that ``crop`` by it, rounded down, is the edge again."""
    share = crop / edge
    return share if math.floor(crop / share) == edge else math.nextafter(share, 0)
