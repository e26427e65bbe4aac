"""What a run trains on and is scored by: images, or clips of videos, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from timm.data import create_transform
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms import Compose, Grayscale, RandomCrop

from tokenlearner.data.clip_sources import ClipData, Listing, clip_name, holds_videos, read_clip_data
from tokenlearner.data.clips import ClipFiles, EveryFrame
from tokenlearner.data.images import ImageFiles, OnError, collate
from tokenlearner.data.sources import ImageData, held_out_names, name_of, read_images
from tokenlearner.errors import InputError
from tokenlearner.evaluation.clips import clip_transform, takes_clips
from tokenlearner.insertion.saving import Preprocessing
from tokenlearner.training.looks import film_looks, looks_at
from tokenlearner.training.recipe import AugmentRecipe, Recipe

FPS = 12.5  # frames a second of clips, where neither recipe nor model says


@dataclass(frozen=True)
class Material:
    """Labelled images or clips: ``data`` says which, ``noun`` is what a sentence calls them."""

    data: ImageData | ClipData
    noun: str
    names: Callable[[Any], str]
    """The name of a file of ``data``, wherever that lies."""

    @property
    def clips(self) -> bool:
        return isinstance(self.data, ClipData)

    @property
    def multilabel(self) -> bool:
        return self.data.train.multilabel

    @property
    def left_out(self) -> dict[str, Any]:
        """What the summary says was there and not used, or not there."""
        if isinstance(self.data, ImageData):
            return {"strays": [str(path) for path in self.data.train.strays]}
        missing = [str(path) for part in (self.data.train, self.data.val) for path in part.missing]
        return {"missing": {"count": len(missing), "files": missing}}

    def held_out_names(self) -> list[str]:
        """Of what was split off for evaluation; none where the data has an evaluation part."""
        if isinstance(self.data, ImageData):
            return held_out_names(self.data)
        if self.data.held_out_of is None:
            return []
        return list(dict.fromkeys(self.names(file) for file in self.data.val.files))

    def datasets(
        self, recipe: Recipe, preprocessing: Preprocessing, on_error: OnError
    ) -> tuple[Dataset[Any], Dataset[Any]]:
        """(training set, evaluation set) by ``recipe``, for a model with this ``preprocessing``.

        Raises:
            InputError: The recipe's views or times don't fit the clips.
        """
        augment = training_transform(preprocessing, recipe.augment)
        if isinstance(self.data, ImageData):
            return (
                ImageFiles(self.data.train, augment, on_error),
                ImageFiles(self.data.val, preprocessing.transform(), on_error),
            )
        window: dict[str, Any] = {
            "frames": preprocessing.frames,
            "fps": preprocessing.fps,
            "on_error": on_error,
        }
        prepare = clip_transform(preprocessing)
        decoded = clip_transform(preprocessing, recipe.clip.short_side)
        label_by = recipe.clip.label_by
        return (
            ClipFiles(self.data.train, decoded, augment=EveryFrame(augment), label_by=label_by, **window),
            ClipFiles(self.data.val, prepare, views=recipe.clip.views, **window),
        )

    def looks(
        self, model: nn.Module, val_set: Dataset[Any], preprocessing: Preprocessing, folder: Path, most: int = 8
    ) -> dict[str, Any]:
        """What each token looks at in held-out images or clips, spread over the classes, as ``write_report`` takes it.

        Of clips half as many, as sheets and films in ``folder``.
        """
        most = most // 2 if self.clips else most
        count = len(self.data.val)
        batch = collate([val_set[i] for i in range(0, count, max(1, count // most))])
        if not len(batch.labels):
            return {}
        shown = batch.images[:most], batch.labels[:most]
        names = self.data.train.classes
        if not self.clips:
            return {"looks": looks_at(model, *shown, preprocessing, names)}
        clips = shown[0][:, shown[0].shape[1] // 2]  # one view of each
        return {"films": film_looks(model, clips, shown[1], preprocessing, names, folder)}


def read_material(
    data: Path, recipe: Recipe, listing: Listing | None = None, classes: Sequence[str] | None = None
) -> Material:
    """The images or clips of DATA, in a part to train on and one to be scored by; of ``classes`` where given.

    Raises:
        InputError: Neither, a broken one, or one that can't be split.
    """
    if data.exists() and holds_videos(data, listing):
        clips = read_clip_data(data, recipe.held_out, recipe.seed, listing, classes)
        return Material(clips, "clips", lambda file: clip_name(file, data, listing))
    if listing is not None and listing != Listing():
        raise InputError(f"{data} holds pictures, and --videos, --classes, --val and --hierarchy are about videos")
    images = read_images(data, recipe.held_out, recipe.seed, classes)
    return Material(images, "images", lambda file: name_of(file, data))


def prepared(preprocessing: Preprocessing, model: nn.Module, recipe: Recipe, material: Material) -> Preprocessing:
    """``preprocessing`` with the rate of clips that the recipe asks for, or that it has, or else :data:`FPS`.

    Raises:
        InputError: A model of images for clips, or the other way round.
    """
    if takes_clips(model) and not material.clips:
        raise InputError("the model takes clips, and DATA holds pictures: give videos, or a model of images")
    if not material.clips:
        return preprocessing
    if not takes_clips(model):
        raise InputError(
            "DATA holds videos, and the model takes images: give a model of clips, such as vivit_tiny_patch16x2_224"
        )
    return replace(preprocessing, fps=recipe.clip.fps or preprocessing.fps or FPS)


def training_transform(preprocessing: Preprocessing, augment: AugmentRecipe) -> Any:
    """timm's training transform: random crop, flip, policy, jitter, normalisation, erasing; grey for one channel.

    A crop of kind ``shifted`` takes the place of timm's: what is evaluated, moved over black.
    """
    transform = create_transform(
        input_size=preprocessing.input_size,
        is_training=True,
        scale=augment.scale,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
        re_prob=augment.erasing,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
    )
    if augment.crop == "shifted":
        height, width = preprocessing.input_size[1:]
        move = RandomCrop((height, width), padding=(width // 8, height // 8))
        transform = Compose([*preprocessing.resizing(), move, *transform.transforms[1:]])
    return Compose([Grayscale(1), transform]) if preprocessing.input_size[0] == 1 else transform
