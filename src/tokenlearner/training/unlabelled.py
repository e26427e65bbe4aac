"""Compression without labels and without a head: a backbone made cheaper, taught by its own features as they were.

For CLIP, SigLIP, DINOv2 and other hosts whose features are searched, compared with text, or read by heads that somebody
else has trained. Any folder of pictures will do.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import MeanMetric

from tokenlearner.data.clip_sources import holds_videos
from tokenlearner.data.images import Batch, LabelledImages, OnError, damaged_entries, find_images, find_splits
from tokenlearner.data.sources import ImageData, name_of
from tokenlearner.errors import InputError
from tokenlearner.evaluation.accuracy import needed_preprocessing
from tokenlearner.evaluation.clips import takes_clips
from tokenlearner.evaluation.features import (
    Extracted,
    FeatureScores,
    FolderLabels,
    compare,
    features_of,
    projection_for,
)
from tokenlearner.evaluation.fewshot import extract
from tokenlearner.insertion.insert import insertion_of
from tokenlearner.insertion.saving import save
from tokenlearner.inspection.report import write_report
from tokenlearner.inspection.summary import hardware, write_summary
from tokenlearner.training.build import inserted_copy
from tokenlearner.training.distill import Taught
from tokenlearner.training.fit import Fitted, Processes, fit
from tokenlearner.training.losses import Targets
from tokenlearner.training.material import Material
from tokenlearner.training.recipe import Recipe, check_recipe
from tokenlearner.training.side_by_side import results_of
from tokenlearner.training.train import (
    RECIPE,
    SUMMARY,
    Ready,
    check_output,
    checked_sets,
    fit_ready,
    recipe_of_run,
)

METRIC = "cosine"  # of the angle to the host's features
REFERENCES = 10_000  # pictures at most among which neighbours are looked for


class AnyTargets(Targets):
    """Mixes pictures as :class:`Targets` does, and does not look at their labels."""

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(images, torch.zeros(len(images), dtype=torch.int64, device=images.device))


class FeatureTaught(Taught):
    """Trained towards the features of the teacher alone. Logs ``val_cosine`` in place of an accuracy."""

    def __init__(self, model: nn.Module, recipe: Recipe, num_classes: int, **options: Any) -> None:
        super().__init__(model, recipe, 2, **options)  # the base class can't score a single one
        mixing = recipe.augment
        self.targets = AnyTargets(2, mixup=mixing.mixup, cutmix=mixing.cutmix)
        self.score_name, self.score = "val_cosine", MeanMetric()
        self.features = torch.compile(features_of) if recipe.compile else features_of

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        return feature_distance(*self.both(images))

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            taught = self.features(self.teacher, images)
        return self.features(self.model, images), taught

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._note_damaged(batch)
        if len(batch.images):
            seen, taught = (features.float() for features in self.both(batch.images))
            self.val_loss.add(feature_distance(seen, taught), len(seen))
            self.score.update(F.cosine_similarity(seen, taught, dim=-1))


def feature_distance(seen: Float[Tensor, "b d"], taught: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """1 − cosine, plus the squared error as a share of the teacher's squared length; the mean over the pictures.

    The cosine is what search and zero-shot classification read. It leaves the length of the features free, which a
    head or a projection trained on the teacher's reads too; the squared error holds on to that.
    """
    seen, taught = seen.float(), taught.float()
    error = (seen - taught).square().sum(dim=-1) / taught.square().sum(dim=-1).clamp_min(1e-12)
    return (1 - F.cosine_similarity(seen, taught, dim=-1) + error).mean()


def fit_features(
    student: nn.Module,
    teacher: nn.Module,
    train_set: Dataset[Any],
    val_set: Dataset[Any],
    recipe: Recipe,
    folder: Path,
    **options: Any,
) -> Fitted:
    """Trains ``student`` in place towards the features of ``teacher``, as :func:`fit` trains, whose ``options`` it has.

    ``history`` has ``val_cosine`` (−1 to 1) in place of an accuracy, and so has ``accuracy``. The sets' labels are not
    read. A head of the student stays as it is, so that one of the teacher's (CLIP's projection, say) goes on fitting.

    Raises:
        InputError: As :func:`fit`; a model of clips, or one that has no features.
    """
    for model in (student, teacher):
        refuse_clips(model)
    with heads_left_alone(student):
        fitted = fit(
            student,
            train_set,
            val_set,
            recipe,
            folder,
            num_classes=1,
            teacher=teacher,
            taught=FeatureTaught,
            **options,
        )
    return replace(fitted, metric=METRIC)


def refuse_clips(model: nn.Module) -> None:
    if takes_clips(model):
        raise InputError(
            f"{type(model).__name__} takes clips, and features are learned from pictures only: give a model of images"
        )


@contextmanager
def heads_left_alone(model: nn.Module) -> Iterator[None]:
    """Without gradients for what comes after the features; they would be missing, which DDP does not allow."""
    getter: Any = getattr(model, "get_classifier", None)
    found = getter() if getter is not None else ()
    heads = found if isinstance(found, tuple) else (found,)  # two of a distilled DeiT
    frozen = [p for head in heads if isinstance(head, nn.Module) for p in head.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)


class Pictures(NamedTuple):
    """``material`` is what is trained on, without labels; ``train`` and ``val`` are the same pictures by folder."""

    material: Material
    train: LabelledImages
    val: LabelledImages

    @property
    def in_classes(self) -> bool:
        return len(self.train.classes) > 1

    def references(self, seed: int) -> LabelledImages:
        """The training pictures, or as many of them, drawn by ``seed``, as neighbours are looked for among."""
        if len(self.train) <= REFERENCES:
            return self.train
        return self.train.subset(sorted(random.Random(seed).sample(range(len(self.train)), REFERENCES)))


def read_pictures(data: Path, held_out: float, seed: int) -> Pictures:
    """All pictures of a folder, at any depth: those in ``train`` and ``val`` where there are both, else split.

    Folders under it count as classes, for the accuracy of nearest neighbours and to hold out a share of each, if all
    pictures lie in them, there are at least two, and these hold two pictures or more on average.

    Raises:
        InputError: No folder, one without pictures or with a single one, or one of videos.
    """
    if not data.is_dir():
        raise InputError(f"{data} is no folder: give a folder of pictures")
    if holds_videos(data):
        raise InputError(f"{data} holds videos, and features are learned from pictures only: give a folder of pictures")
    train_folder, val_folder = find_splits(data)
    train = by_folder(train_folder)
    if val_folder is not None:
        val = by_folder(val_folder, train.classes)
        train = train if val.classes == train.classes else unlabelled(train)
    elif len(train) < 2:
        raise InputError(f"{data} holds a single picture: give at least one to learn from and one to be scored by")
    else:
        train, val = train.split(held_out, seed)
    split = ImageData(unlabelled(train), unlabelled(val), None if val_folder else data)
    return Pictures(Material(split, "pictures", lambda file: name_of(file, data)), train, val)


def by_folder(root: Path, classes: tuple[str, ...] | None = None) -> LabelledImages:
    """The pictures under ``root``, labelled by the folder of ``root`` they lie in, or all alike: where these folders
    are not (all among) ``classes``, or don't look like any.
    """
    files = tuple(find_images(root))
    names = ["" if file.parent == root else file.relative_to(root).parts[0] for file in files]
    if classes is None and 2 <= len(set(names)) <= len(files) / 2:
        classes = tuple(sorted(set(names)))
    if classes is None or "" in names or not set(names) <= set(classes):
        return unlabelled(LabelledImages(files, (), ()))
    place = {name: i for i, name in enumerate(classes)}
    return LabelledImages(files, tuple(place[name] for name in names), classes)


def unlabelled(images: LabelledImages) -> LabelledImages:
    """The same pictures, all of one class."""
    return replace(images, labels=(0,) * len(images), classes=("pictures",))


def compress_unlabelled(
    model: nn.Module,
    data: str | Path,
    output: str | Path,
    recipe: Recipe,
    *,
    name: str = "model",
    class_embeddings: Float[Tensor, "c e"] | None = None,
    on_error: OnError = "skip",
    resume: bool = False,
    log: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Puts a TokenLearner into a copy of ``model``, trains it towards the model's features, and returns the summary.

    Writes to ``output`` what ``train`` writes: the compressed model after every epoch, ``checkpoints``, ``metrics.csv``
    and ``recipe.json``; and ``summary.json`` and ``report.html`` of both side by side. ``features`` in the summary has
    the :class:`FeatureScores` of the model, of the untrained insertion and of the trained one.

    Args:
        model: With or without a head, and with a preprocessing; becomes the teacher and keeps its weights.
        data: What :func:`read_pictures` takes.
        output: A new folder.
        recipe: What is inserted and how it is trained. ``init`` is the folder of ``model``; where it is None, the model
            is saved in ``output/host``. What it says of the host, of classes and of ``distill`` is not used.
        name: What the report calls the model.
        class_embeddings: To compare by, a row a class, such as texts in CLIP's space; of the features' length, or of
            the outputs' of the model's head.
        on_error: What to do with a damaged file.
        resume: Go on with a run that was stopped.
        log: Gets a line for every step.

    Raises:
        InputError: The model has no features or a TokenLearner already, takes clips or does not say how pictures are
            prepared; the data are no pictures; the insertion does not fit; an unfinished run in ``output``.
    """
    start, output = time.perf_counter(), Path(output)
    is_first = Processes.of_torchrun().rank == 0
    going_on = resume and (output / RECIPE).is_file()
    if is_first:
        check_output(output, data, resume=resume)
    if going_on:
        recipe = recipe_of_run(output, recipe)
    check_recipe(recipe)
    refuse_clips(model)
    student = inserted_copy(model, recipe, name)
    preprocessing = needed_preprocessing(model)
    projection = projection_for(model, preprocessing.model_input, class_embeddings)
    pictures = read_pictures(Path(data), recipe.held_out, recipe.seed)
    spec: Any = insertion_of(student)
    task = Ready(student, preprocessing, pictures.material, None, teacher=model, taught=FeatureTaught)
    checked_sets(task, recipe, on_error)
    if is_first:
        if recipe.init is None:
            recipe = replace(recipe, init=str(save(model, output / "host")))
        log(f"{spec.describe()}; {recipe.epochs} epochs towards the features of {name}")
    with heads_left_alone(student):
        fitted, _ = fit_ready(task, recipe, output, on_error=on_error, resume=going_on)
    if not is_first:
        return {}
    compared = {"host": model, "untrained": inserted_copy(model, recipe, name), "trained": student}
    scores = score_features(compared, pictures, recipe, class_embeddings, projection, on_error)
    for which in ("untrained", "trained"):
        log(f"{which}: {scores[which]}")
    batch = torch.randn(min(16, recipe.batch_size), *preprocessing.model_input)
    rows = {
        "host": Fitted(scores["host"].cosine, 0.0, [], (), METRIC),
        "tokenlearner": replace(fitted, accuracy=scores["trained"].cosine, metric=METRIC),
    }
    results = results_of({"host": model, "tokenlearner": student}, rows, batch)
    seconds = time.perf_counter() - start
    write_report(
        output / "report.html",
        f"{name}, compressed",
        f"{spec.describe()}, trained for {recipe.epochs} epochs towards the features of the model as it was, without "
        f"labels. On {len(pictures.val):,} held-out pictures: {scores['trained']}; before training: "
        f"{scores['untrained']}.",
        results,
        footer=f"tokenlearner compress, seed {recipe.seed}, {seconds:.0f} s on {hardware()}.",
    )
    return write_summary(
        output / SUMMARY,
        seconds,
        results,
        data=str(data),
        train_pictures=len(pictures.train),
        held_out=len(pictures.val),
        model=name,
        insertion=spec.to_dict(),
        epochs=recipe.epochs,
        seed=recipe.seed,
        features={which: score.to_dict() for which, score in scores.items()},
        damaged=damaged_entries(fitted.damaged),
    )


def score_features(
    models: dict[str, nn.Module],
    pictures: Pictures,
    recipe: Recipe,
    class_embeddings: Tensor | None,
    projection: nn.Module | None,
    on_error: OnError,
) -> dict[str, FeatureScores]:
    """Each model's measures beside the first one, on the held-out pictures, and among the training pictures."""
    parts = (pictures.val, pictures.references(recipe.seed))
    host: Extracted | None = None
    labels: FolderLabels | None = None
    scores = {}
    for name, model in models.items():
        both = [extract(model, part, recipe.batch_size, recipe.workers, on_error, "auto") for part in parts]
        model.cpu()
        (seen, seen_labels, *_), (references, reference_labels, *_) = both
        features = Extracted(seen, references)
        if host is None:
            host = features
            if pictures.in_classes:
                labels = FolderLabels(seen_labels, reference_labels, len(pictures.train.classes))
        scores[name] = compare(features, host, labels=labels, class_embeddings=class_embeddings, projection=projection)
    return scores
