"""CIFAR-10 from scratch: a plain ViT beside TokenLearner at ½ and ¾ depth and with TokenFuser, by the same recipe.

Method. Every model is the same small ViT (4×4 patches of 32×32 pixels, so 8×8 = 64 tokens; no class token, average
pooling, 2-D sin-cos position embedding to start with), trained by the same recipe; only what is inserted differs.
Scored are the averaged weights (EMA) of the last epoch on all 10,000 test images: no epoch is picked. ``--tune`` holds
the last 5,000 training images out and scores on those, which is how the recipe was chosen.

Two recipes. ``cpu`` is the smallest honest version, for one thread without a GPU, minutes a run. ``gpu`` is meant for
plain ViT ≥ 90 %: width 192, 12 layers, AdamW, mixup and cutmix, 150 epochs, compiled; it keeps the images on the GPU
and fills it with several runs at once (``--jobs``). Neither set of twelve runs is complete yet: not run.

    OMP_NUM_THREADS=1 python studies/cifar10/train.py --recipe cpu --out runs/cifar10
    python studies/cifar10/train.py --recipe gpu --jobs 6 --out runs/cifar10-gpu

A run that is in OUT/results.csv is not done again, so the same command continues after a stop.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shlex
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import tokenlearner
from tokenlearner.inspection.summary import hardware
from tokenlearner.training.fit import quiet_lightning
from tokenlearner.training.optim import build_optimizer, build_schedule
from tokenlearner.training.recipe import OptimizerRecipe

import lightning as L
import numpy as np
import timm.layers
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from timm.data import Mixup
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from cifar import MEAN, STD, Augmentation, Batches, Images, read_npz

REPOSITORY = Path(__file__).parents[2]
MODELS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "tl8-half": {"num_tokens": 8, "at": 0.5},
    "tl8-three-quarters": {"num_tokens": 8, "at": 0.75},
    "tl8-half-fuser": {"num_tokens": 8, "at": 0.5, "fuser": "fuser"},
}
PREPROCESSING = tokenlearner.Preprocessing((3, 32, 32), MEAN, STD, interpolation="bicubic", crop_pct=1.0)


@dataclass(frozen=True)
class Settings:
    width: int = 192
    depth: int = 12
    heads: int = 3
    epochs: int = 150
    batch: int = 512
    optimizer: str = "adamw"
    lr: float = 1.5e-3
    min_lr: float = 1e-6
    weight_decay: float = 0.08
    beta2: float = 0.999
    warmup: float = 5.0
    clip: float = 1.0
    label_smoothing: float = 0.1
    drop_path: float = 0.1
    mixup: float = 0.4
    cutmix: float = 1.0
    affine: float = 1.0
    colour: float = 0.3
    erase: int = 0
    ema: float = 0.9995
    """Largest weight of the past in the average; starts small."""
    compile: int = 1


RECIPES = {
    "gpu": Settings(),
    "cpu": Settings(
        width=128,
        depth=4,
        heads=4,
        epochs=4,
        batch=64,
        optimizer="muon",  # the best of what was tried for runs this short, see the docstring
        lr=3e-3,
        weight_decay=0.05,
        warmup=0.5,
        label_smoothing=0.0,
        drop_path=0.0,
        mixup=0.0,
        cutmix=0.0,
        affine=0.0,
        colour=0.0,
        ema=0.99,
        compile=0,
    ),
}


@dataclass(frozen=True)
class Job:
    """One run. ``stop_at`` is the time.time() at which it gives up."""

    model: str
    seed: int
    settings: Settings
    data: Path
    out: Path
    tune: bool
    limit: int | None
    stop_at: float
    commit: str
    command: str


def build_model(name: str, settings: Settings, classes: int) -> nn.Module:
    # Autocast's fused attention is slower backwards than its three parts on a CPU (torch 2.13, 64 tokens).
    timm.layers.set_fused_attn(torch.cuda.is_available())
    model = VisionTransformer(
        img_size=32,
        patch_size=4,
        num_classes=classes,
        embed_dim=settings.width,
        depth=settings.depth,
        num_heads=settings.heads,
        class_token=False,
        global_pool="avg",
        drop_path_rate=settings.drop_path,
    )
    grid = list(model.patch_embed.grid_size)
    with torch.no_grad():
        model.pos_embed.copy_(timm.layers.build_sincos2d_pos_embed(grid, dim=settings.width))
    return model if MODELS[name] is None else tokenlearner.insert(model, **MODELS[name])


class Run(L.LightningModule):
    """Trains ``model``; evaluates its average. Keeps a row per epoch in ``curve``."""

    def __init__(self, model: nn.Module, settings: Settings, classes: int) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self.average: tuple[ModelEmaV3, ...] = ()  # in a tuple, so that Lightning does not put it in training mode
        self.curve: list[dict[str, float]] = []
        self.losses: list[Tensor] = []
        self.hits: list[Tensor] = []
        mix = Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.label_smoothing, num_classes=classes)
        self.mix = mix if settings.mixup or settings.cutmix else None

    def on_fit_start(self) -> None:
        self.average = (ModelEmaV3(self.model, decay=self.settings.ema, use_warmup=True),)
        if self.settings.compile:
            self.model.compile()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        if self.mix and len(images) % 2 == 0:
            images, labels = self.mix(images, labels)  # labels become distributions, smoothed
            loss = F.cross_entropy(self.model(images), labels)
        else:
            loss = F.cross_entropy(self.model(images), labels, label_smoothing=self.settings.label_smoothing)
        self.losses.append(loss.detach())
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.average[0].update(self.model, step=self.global_step)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.hits.append(self.average[0].module(images).argmax(dim=1) == labels)

    def on_validation_epoch_end(self) -> None:
        loss, top1 = torch.stack(self.losses).mean().item(), torch.cat(self.hits).float().mean().item()
        self.losses.clear()
        self.hits.clear()
        self.curve.append({"epoch": self.current_epoch + 1, "train_loss": round(loss, 4), "top1": round(100 * top1, 2)})
        if not math.isfinite(loss):
            raise ValueError(f"the training loss is {loss} in epoch {self.current_epoch + 1}; lower --lr")

    def configure_optimizers(self) -> Any:
        s = self.settings
        recipe = OptimizerRecipe(s.optimizer, s.lr, s.weight_decay, (0.9, s.beta2), s.warmup, s.min_lr)
        optimizer = build_optimizer(self.model, recipe)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = build_schedule(optimizer, recipe, steps, steps / s.epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)  # timm's schedulers count updates themselves


class Watch(Callback):
    """Times the training part of each epoch, prints a line now and then, and stops at the deadline."""

    def __init__(self, job: Job) -> None:
        self.job, self.seconds, self.cut_off = job, [], False

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Run) -> None:
        row, job, epochs = pl_module.curve[-1], self.job, self.job.settings.epochs
        if row["epoch"] % max(1, epochs // 10) == 0:
            print(f"  {job.model} seed {job.seed} epoch {row['epoch']}/{epochs} top-1 {row['top1']:.2f}", flush=True)
        if time.time() > job.stop_at and row["epoch"] < epochs:
            trainer.should_stop = self.cut_off = True


def run(job: Job) -> tuple[dict[str, Any], list[dict[str, float]]] | None:
    """Trains and scores one model and saves it; None if the deadline came first."""
    if time.time() > job.stop_at:
        return None
    s, started, cpu_started = job.settings, time.perf_counter(), time.process_time()
    torch.set_float32_matmul_precision("high")
    train, test = load_data(job, "cuda" if torch.cuda.is_available() else "cpu")
    watch, batch = Watch(job), min(s.batch, len(train.labels))
    augmentation = Augmentation(affine=s.affine, colour=s.colour, erase=s.erase)
    with quiet_lightning():
        L.seed_everything(job.seed, verbose=False)
        trained = Run(build_model(job.model, s, len(train.classes)), s, len(train.classes))
        batches = Batches(train, batch, augmentation, job.seed), Batches(test, 1000)
        new_trainer(s, watch).fit(trained, *batches)
    if watch.cut_off:
        return None
    model = trained.average[0].module.cpu().eval()
    used = tokenlearner.cost(model, (3, 32, 32))
    tokenlearner.save(
        model.half(), job.out / "weights" / f"{job.model}-{job.seed}", preprocessing=PREPROCESSING, labels=train.classes
    )
    warm = watch.seconds[1:] or watch.seconds  # the first epoch compiles
    row = {
        "model": job.model,
        "seed": job.seed,
        "epochs": s.epochs,
        "top1": trained.curve[-1]["top1"],
        "train_loss": trained.curve[-1]["train_loss"],
        "parameters": used.parameters,
        "macs": used.macs,
        "tokens": " ".join(map(str, used.tokens)),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu_started, 1),
        "images_per_second": round(len(warm) * (len(train.labels) // batch) * batch / sum(warm), 1),
        "scored_on": "held out" if job.tune else "test",
        "commit": job.commit,
        "command": job.command,
        "hardware": hardware(),
    }
    return row, trained.curve


def new_trainer(settings: Settings, watch: Watch) -> L.Trainer:
    return L.Trainer(
        max_epochs=settings.epochs,
        accelerator="auto",
        devices=1,
        precision="bf16-mixed",
        gradient_clip_val=settings.clip or None,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )


def load_data(job: Job, device: str) -> tuple[Images, Images]:
    train = read_npz(job.data / "cifar10_train.npz", job.limit)
    if job.tune:
        held_out = len(train.labels) // 10
        train, test = train.part(None, -held_out), train.part(-held_out, None)
    else:
        test = read_npz(job.data / "cifar10_test.npz", job.limit)
    return tuple(Images(part.pixels.to(device), part.labels.to(device), part.classes) for part in (train, test))


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replaces the file at once, so that a stop at any moment leaves a whole one."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def run_all(jobs: list[Job], at_once: int, out: Path) -> None:
    """Each run in a process of its own; results are on the disk as soon as a run ends."""
    results, curves = out / "results.csv", out / "curves.csv"
    done = {(row["model"], int(row["seed"])) for row in read_rows(results)}
    jobs = [job for job in jobs if (job.model, job.seed) not in done]
    with ProcessPoolExecutor(at_once, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        running = {pool.submit(run, job): job for job in jobs}
        for future in as_completed(running):
            job = running[future]
            try:
                result = future.result()
            except Exception as error:  # one run that fails must not take the others along
                print(f"{job.model} seed {job.seed} failed: {error!r}", flush=True)
                continue
            if result is None:
                print(f"{job.model} seed {job.seed}: cut off by --minutes, no result", flush=True)
                continue
            row, curve = result
            key = {"model": job.model, "seed": str(job.seed)}
            others = [r for r in read_rows(curves) if not key.items() <= r.items()]  # a stop may have left its curve
            write_rows(curves, [*others, *(key | r for r in curve)])
            write_rows(results, [*read_rows(results), row])
            print(
                f"{job.model} seed {job.seed}: top-1 {row['top1']:.2f} % on {row['scored_on']}, "
                f"{row['seconds']:.0f} s, {row['images_per_second']:.0f} images/s",
                flush=True,
            )


def git_commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, default="cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared/data/images", help="folder of the npz")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--minutes", type=float, default=math.inf, help="give up runs that have not ended by then")
    parser.add_argument(
        "--tune", action="store_true", help="score on 10 %% of the training images, not on the test set"
    )
    parser.add_argument("--limit", type=int, help="only so many images of each set, to try the script")
    parser.add_argument("--commit", default=git_commit(), help="of the code that is run")
    changes = parser.add_argument_group("changes to the recipe")
    for field in fields(Settings):
        changes.add_argument(f"--{field.name.replace('_', '-')}", type=type(getattr(RECIPES["gpu"], field.name)))
    return parser.parse_args()


def main() -> None:
    given = read_arguments()
    changes = {f.name: v for f in fields(Settings) if (v := getattr(given, f.name)) is not None}
    settings = replace(RECIPES[given.recipe], **changes)
    given.out.mkdir(parents=True, exist_ok=True)
    recorded, wanted = given.out / "settings.json", json.dumps(asdict(settings), indent=2) + "\n"
    if recorded.exists() and recorded.read_text() != wanted:
        sys.exit(f"{given.out} holds runs of another recipe ({recorded}); give another --out")
    recorded.write_text(wanted)
    stop_at, command = time.time() + 60 * given.minutes, shlex.join(["python", *sys.argv])
    jobs = [
        Job(model, seed, settings, given.data, given.out, given.tune, given.limit, stop_at, given.commit, command)
        for seed in given.seeds  # one seed of every model first: a stop leaves something to compare
        for model in given.models
    ]
    run_all(jobs, given.jobs, given.out)
    rows = read_rows(given.out / "results.csv")
    for model in given.models:
        scores = [float(row["top1"]) for row in rows if row["model"] == model]
        if scores:
            spread = f" ± {np.std(scores, ddof=1):.2f}" if len(scores) > 1 else ""
            print(f"{model}: {np.mean(scores):.2f}{spread} % (n = {len(scores)})")


if __name__ == "__main__":
    main()
