"""A plain ViT beside TokenLearner at ½ and ¾ depth and with TokenFuser, from scratch and by the same recipe.

Method. Every model is the same small ViT (no class token, average pooling, 2-D sin-cos position embedding to start
with), trained by the same recipe; only what is inserted differs. Scored are the averaged weights (EMA) of the last
epoch on the whole test set: no epoch is picked. ``--tune`` scores on other photos (CIFAR-10: the last 5,000 training
images, which are not trained on then; flowers: ``val``); so the recipes were chosen, with the plain model (README.md).

========= ======= ====== ================= ===================
data set  train   test   ``cpu``           ``gpu``
========= ======= ====== ================= ===================
cifar10   50,000  10,000 32×32, 64 tokens  32×32, 64 tokens
flowers   3,233   647    64×64, 64 tokens  128×128, 256 tokens
========= ======= ====== ================= ===================

``cpu`` is the smallest honest version, for one thread without a GPU, minutes a run: width 128, 4 layers, Muon. ``gpu``
is meant for plain ViT ≥ 90 % on CIFAR-10: width 192, 12 layers, AdamW, mixup and cutmix, compiled; it keeps the photos
on the GPU and fills it with several runs at once (``--jobs``). Not run: ``gpu``.

    OMP_NUM_THREADS=1 python studies/photos/train.py cifar10 --recipe cpu --out runs/cifar10
    OMP_NUM_THREADS=1 python studies/photos/train.py flowers --recipe cpu --out runs/flowers
    python studies/photos/train.py cifar10 --recipe gpu --jobs 6 --out runs/cifar10-gpu

A run that is in OUT/results.csv is not done again, so the same command continues after a stop. To try the script:

    python studies/photos/train.py cifar10 --limit 64 --epochs 1 --models plain tl8-half --seeds 0 --out runs/try
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import tokenlearner
from tokenlearner.inspection.summary import command_line, git_commit, hardware
from tokenlearner.study import read_rows, write_rows
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

from photos import DATASETS, Augmentation, Batches, load
from processes import in_process, stop_on_signals
from recipes import MODELS, RECIPES, Settings
from records import REPOSITORY, read_settings


@dataclass(frozen=True)
class Job:
    """One run. ``stop_at`` is the time.time() at which it gives up."""

    dataset: str
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
        img_size=settings.size,
        patch_size=settings.patch,
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
    inserted = MODELS[name].inserted
    return tokenlearner.insert(model, **inserted) if inserted else model


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


class CutOffError(Exception):
    """The deadline came before the run's end."""


class Watch(Callback):
    """Times the training part of each epoch, prints a line now and then, and raises CutOffError at the deadline."""

    def __init__(self, job: Job) -> None:
        self.job, self.seconds = job, []

    def on_train_batch_start(self, *_: Any) -> None:
        if time.time() > self.job.stop_at:
            raise CutOffError

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


def run(job: Job) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Trains and scores one model and saves it: its row of results.csv and its rows of curves.csv.

    Raises:
        CutOffError: The deadline came first.
    """
    s, started, cpu_started = job.settings, time.perf_counter(), time.process_time()
    torch.set_float32_matmul_precision("high")
    dataset, device = DATASETS[job.dataset], "cuda" if torch.cuda.is_available() else "cpu"
    train, test = (p.to(device) for p in load(job.dataset, job.data, s.size, tune=job.tune, limit=job.limit))
    watch, batch = Watch(job), min(s.batch, len(train.labels))
    augmentation = Augmentation(dataset.mean, dataset.std, crop=s.crop, affine=s.affine, colour=s.colour, erase=s.erase)
    with quiet_lightning():
        L.seed_everything(job.seed, verbose=False)
        trained = Run(build_model(job.model, s, len(train.classes)), s, len(train.classes))
        batches = Batches(train, batch, augmentation, job.seed), Batches(test, 1000, augmentation)
        new_trainer(s, watch).fit(trained, *batches)
    model = trained.average[0].module.cpu().eval()
    used = tokenlearner.cost(model, (3, s.size, s.size))
    preprocessing = tokenlearner.Preprocessing(
        (3, s.size, s.size), dataset.mean, dataset.std, interpolation="bicubic", crop_pct=1.0
    )
    folder = job.out / "weights" / f"{job.model}-{job.seed}"
    tokenlearner.save(model.half(), folder, preprocessing=preprocessing, labels=train.classes)
    warm = watch.seconds[1:] or watch.seconds  # the first epoch compiles
    row = {
        "dataset": job.dataset,
        "model": job.model,
        "label": MODELS[job.model].label,
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


def run_all(jobs: list[Job], at_once: int, out: Path) -> int:
    """Each run in a process of its own; results are on the disk as soon as a run ends. Returns how many failed."""
    failed, results, curves = 0, out / "results.csv", out / "curves.csv"
    done = {(row["model"], int(row["seed"])) for row in read_rows(results)}
    jobs = [job for job in jobs if (job.model, job.seed) not in done]
    with ThreadPoolExecutor(at_once) as pool:
        running = {pool.submit(run_in_time, job): job for job in jobs}
        for future in as_completed(running):
            job = running[future]
            try:
                row, curve = future.result()
            except CutOffError:
                print(f"{job.model} seed {job.seed}: cut off by --minutes, no result", flush=True)
                continue
            except Exception as error:  # one run that fails must not take the others along
                failed += 1
                print(f"{job.model} seed {job.seed} failed: {error!r}", flush=True)
                continue
            key = {"model": job.model, "seed": str(job.seed)}
            others = [r for r in read_rows(curves) if not key.items() <= r.items()]  # a stop may have left its curve
            write_rows(curves, [*others, *(key | r for r in curve)])
            write_rows(results, [*read_rows(results), row])
            print(
                f"{job.model} seed {job.seed}: top-1 {row['top1']:.2f} % on {row['scored_on']}, "
                f"{row['seconds']:.0f} s, {row['images_per_second']:.0f} images/s",
                flush=True,
            )
    return failed


def run_in_time(job: Job) -> tuple[dict[str, Any], list[dict[str, float]]]:
    if time.time() > job.stop_at:
        raise CutOffError
    return in_process(run, job)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--recipe", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared/data/images", help="folder of the npz")
    parser.add_argument("--out", type=Path, help="default: runs/DATASET-RECIPE")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--minutes", type=float, default=math.inf, help="give up runs that have not ended by then")
    parser.add_argument("--tune", action="store_true", help="score on photos held out of the training set, not on test")
    parser.add_argument("--limit", type=int, help="only so many photos of each set, to try the script")
    parser.add_argument("--commit", default=git_commit(REPOSITORY), help="of the code that is run")
    changes = parser.add_argument_group("changes to the recipe")
    for field in fields(Settings):
        changes.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default))
    return parser.parse_args()


def main() -> None:
    given = read_arguments()
    changes = {f.name: v for f in fields(Settings) if (v := getattr(given, f.name)) is not None}
    settings = replace(RECIPES[given.dataset][given.recipe], **changes)
    out = given.out or Path("runs") / f"{given.dataset}-{given.recipe}"
    out.mkdir(parents=True, exist_ok=True)
    recorded = out / "settings.json"
    what = {"dataset": given.dataset, "tune": given.tune, "limit": given.limit}
    if recorded.exists() and read_settings(recorded) != (what, settings):
        sys.exit(f"{out} holds runs of another data set or recipe ({recorded}); give another --out")
    recorded.write_text(json.dumps(what | asdict(settings), indent=2) + "\n")
    stop_at, command = time.time() + 60 * given.minutes, command_line("python studies/photos/train.py", sys.argv[1:])
    jobs = [
        Job(
            given.dataset,
            model,
            seed,
            settings,
            given.data,
            out,
            given.tune,
            given.limit,
            stop_at,
            given.commit,
            command,
        )
        for seed in given.seeds  # one seed of every model first: a stop leaves something to compare
        for model in given.models
    ]
    stop_on_signals()
    failed = run_all(jobs, given.jobs, out)
    rows = read_rows(out / "results.csv")
    for model in given.models:
        scores = [float(row["top1"]) for row in rows if row["model"] == model]
        if scores:
            spread = f" ± {np.std(scores, ddof=1):.2f}" if len(scores) > 1 else ""
            print(f"{MODELS[model].label}: {np.mean(scores):.2f}{spread} % (n = {len(scores)})")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
