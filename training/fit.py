"""Train one of the four networks.

Try it on a CPU in a minute, then for real::

    python -m training.fit --arch baseline --epochs 1 --limit-train 2000
    python -m training.fit --arch inception                     # Tiny ImageNet, the modern recipe
    python -m training.fit --arch resnet20 --recipe paper       # as in the paper
    python -m training.fit --arch resnet20 --data my_photos/    # train/<class>/*, val/<class>/*

Stopped runs (Ctrl-C, SIGTERM, a crash) go on with the same command and ``--resume``. A run leaves
in its folder: ``config.json``, ``history.csv``, ``curves.png``, TensorBoard events,
``checkpoint.pt`` and, when it has finished, ``weights.pt`` and ``result.json``.
"""

import argparse
import csv
import dataclasses
import io
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from tinyserve.errors import DeviceError, TinyserveError, UsageError
from tinyserve.modelfile import Training
from tinyserve.report import wilson_interval
from training import augment, checkpoint, data
from training.evaluate import Score, ServedNetwork, served_accuracy, view_accuracy
from training.models import ARCHS, count_parameters
from training.plots import draw_curves
from training.recipes import RECIPES, Recipe

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CENTRE = ((0.5, 0.5, False),)
EVALUATION_BATCH = 256


class Stopped(TinyserveError):
    """A signal asked the run to stop; its checkpoint is written."""

    def __init__(self, signal_number: int, out: Path) -> None:
        super().__init__(f"stopped; checkpoint in {out}, go on with the same command and --resume")
        self.exit_code = 128 + signal_number


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything that the weights depend on; kept as ``config.json`` and compared on resuming."""

    arch: str
    recipe: Recipe
    seed: int
    precision: str
    image_size: int
    limit_train: int | None


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        config, device = _configure(arguments)
        dataset = data.load(
            data.locate(arguments.data), image_size=config.image_size, skip_bad=arguments.skip_bad
        )
        out = arguments.out or Path("runs") / f"{config.arch}-{config.recipe.name}"
        fit(config, dataset, device, out, resume=arguments.resume)
    except TinyserveError as error:
        print(f"training.fit: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def fit(
    config: Config, dataset: data.Dataset, device: torch.device, out: Path, *, resume: bool
) -> None:
    """Train, evaluate and write everything into ``out``.

    With ``resume`` a run goes on from its checkpoint to the same weights, bit for bit on a CPU, as
    if it had never stopped: every random number of a step is drawn from a seed made of the run's
    seed and the step's number, so no generator's state has to survive.
    """
    recipe = config.recipe
    saved = _open_run(out, config, dataset, resume=resume)
    precision = PRECISIONS[config.precision]

    images = torch.from_numpy(dataset.train.images).to(device)
    labels = torch.from_numpy(dataset.train.labels).to(device)
    val_images = torch.from_numpy(dataset.val.images).to(device)
    val_labels = torch.from_numpy(dataset.val.labels).to(device)
    subset = _subset(len(labels), config.limit_train, device)
    batch_size = min(recipe.batch_size, len(subset))
    steps_per_epoch = len(subset) // batch_size
    mean, std = pixel_statistics(images, subset, mean_image=recipe.mean_image)

    torch.manual_seed(config.seed)
    network = ARCHS[config.arch](
        len(dataset.classes), image_size=recipe.crop, batch_norm=recipe.batch_norm
    )
    model = network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        _parameter_groups(model, recipe),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        fused=True,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    average = (
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)
        if recipe.ema is not None
        else None
    )
    stateful: dict[str, Any] = {"model": model, "optimizer": optimizer, "scaler": scaler}
    if average is not None:
        stateful["average"] = average

    step, history = 0, []
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, correct of this epoch so far
    if saved is not None:
        for name, part in stateful.items():
            part.load_state_dict(saved[name])
        step, history = saved["step"], saved["history"]
        sums += saved["sums"].to(device)
        print(f"resumed at step {step}, epoch {step // steps_per_epoch + 1}", file=sys.stderr)

    def save_checkpoint() -> None:
        state = {name: part.state_dict() for name, part in stateful.items()}
        progress = {"step": step, "history": history, "sums": sums.cpu()}
        identity = _identity(config, dataset)
        checkpoint.save(out / checkpoint.CHECKPOINT, {**identity, **state, **progress})

    evaluated = average.module if average is not None else model
    writer = SummaryWriter(str(out), purge_step=step)
    print(
        f"{config.arch}, {count_parameters(model):,} parameters, recipe {recipe.name}: "
        f"{recipe.epochs} epochs of {steps_per_epoch} steps of {batch_size} images, "
        f"{config.precision} on {_device_name(device)}, into {out}",
        file=sys.stderr,
    )
    with _stop_signals() as stop:
        for epoch in range(step // steps_per_epoch, recipe.epochs):
            torch.manual_seed(_mix(config.seed, epoch, 0))
            order = subset[torch.randperm(len(subset), device=device)]
            model.train()
            start, first_step = time.perf_counter(), step
            bar = tqdm(
                total=steps_per_epoch * batch_size,
                initial=(step - epoch * steps_per_epoch) * batch_size,
                desc=f"epoch {epoch + 1}/{recipe.epochs}",
                unit="image",
                disable=None,
            )
            while step < (epoch + 1) * steps_per_epoch:
                torch.manual_seed(_mix(config.seed, epoch, step + 1))
                lr = recipe.learning_rate(step, steps_per_epoch)
                size = recipe.training_size(step, steps_per_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                position = (step - epoch * steps_per_epoch) * batch_size
                indices = order[position : position + batch_size]

                pixels = augment.normalise(images[indices], mean, std)
                x = augment.extract(pixels, _random_boxes(pixels, recipe, size), size)
                y = labels[indices]
                with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                    outputs = model(x)
                loss, logits = _loss(outputs, y, recipe)
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
                scaler.step(optimizer)
                scaler.update()
                if average is not None:
                    average.update_parameters(model)

                step += 1
                with torch.no_grad():
                    hits = (logits.argmax(dim=1) == y).sum()
                    sums += torch.stack([loss.detach().double(), hits.double()])
                bar.update(batch_size)
                if step % 20 == 0:  # reading the loss waits for the device: not at every step
                    now = loss.item()
                    bar.set_postfix(loss=f"{now:.3f}", lr=f"{lr:.4f}", size=size, refresh=False)
                    writer.add_scalar("step/loss", now, step)
                    writer.add_scalar("step/lr", lr, step)
                if stop.signal_number is not None:
                    bar.close()
                    save_checkpoint()
                    raise Stopped(stop.signal_number, out)
            loss_sum, correct = sums.tolist()
            seconds = time.perf_counter() - start
            bar.close()
            if not torch.isfinite(torch.tensor(loss_sum)):
                raise TinyserveError(
                    f"the loss is not finite in epoch {epoch + 1}: try a lower --lr (now {recipe.lr})"
                )
            score = view_accuracy(
                evaluated,
                val_images,
                val_labels,
                mean=mean,
                std=std,
                crop=recipe.crop,
                size=size,
                views=CENTRE,
                precision=precision,
                batch=EVALUATION_BATCH,
            )
            row = {
                "epoch": epoch + 1,
                "step": step,
                "size": size,
                "lr": lr,
                "train_loss": loss_sum / steps_per_epoch,
                "train_top1": correct / (steps_per_epoch * batch_size),
                "val_loss": score.loss,
                "val_top1": score.top1,
                "val_top5": score.top5,
                "images_per_second": (step - first_step) * batch_size / seconds,
                "seconds": seconds,
            }
            history.append(row)
            sums.zero_()
            save_checkpoint()
            _write_history(out / "history.csv", history)
            draw_curves(
                out / "curves.png", f"{config.arch}, {recipe.name}", history, recipe, steps_per_epoch
            )
            for name in ("train_loss", "train_top1", "val_loss", "val_top1", "images_per_second"):
                writer.add_scalar(f"epoch/{name}", row[name], step)
            print(
                f"epoch {epoch + 1}: train loss {row['train_loss']:.3f} "
                f"top-1 {100 * row['train_top1']:.2f} %, validation top-1 {100 * score.top1:.2f} % "
                f"at {size} px, {row['images_per_second']:.0f} images/s",
                file=sys.stderr,
            )
    writer.close()
    _finish(config, dataset, evaluated, mean, std, val_images, val_labels, history, out)


def pixel_statistics(images: Tensor, subset: Tensor, *, mean_image: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of stored images, in units of 0..255.

    The mean is an image, float32 ``[H, W, 3]``, or a colour, ``[3]``; the deviation is ``[3]``.
    """
    total = torch.zeros(images.shape[1:], dtype=torch.float64, device=images.device)
    squares = torch.zeros_like(total)
    for indices in subset.split(1024):
        pixels = images[indices].double()
        total += pixels.sum(dim=0)
        squares += pixels.square().sum(dim=0)
    mean = total / len(subset)
    colour = mean.mean(dim=(0, 1))
    std = ((squares / len(subset)).mean(dim=(0, 1)) - colour.square()).sqrt()
    return (mean if mean_image else colour).float(), std.float()


def _finish(
    config: Config,
    dataset: data.Dataset,
    network: nn.Module,
    mean: Tensor,
    std: Tensor,
    val_images: Tensor,
    val_labels: Tensor,
    history: list[dict[str, Any]],
    out: Path,
) -> None:
    """Evaluate the final weights as they will be served, in fp32, and write them."""
    recipe = config.recipe
    weights = checkpoint.Weights(
        arch=config.arch,
        batch_norm=recipe.batch_norm,
        labels=dataset.classes,
        image_size=config.image_size,
        crop=recipe.crop,
        mean=mean.cpu(),
        std=std.cpu(),
        state=checkpoint.final_state(network),
        training=Training(
            dataset=dataset.name,
            dataset_fingerprint=dataset.fingerprint,
            train_images=min(config.limit_train or len(dataset.train), len(dataset.train)),
            recipe=recipe.name,
            epochs=recipe.epochs,
            seed=config.seed,
            precision=config.precision,
            commit=_commit(),
            val_images=len(dataset.val),
            val_top1=0.0,
            val_top5=0.0,
        ),
    )
    device = val_images.device
    shipped = weights.network().to(device, memory_format=torch.channels_last)
    served = ServedNetwork(
        shipped, mean, std, image_size=config.image_size, crop=recipe.crop
    ).to(device)
    single = served_accuracy(served, val_images, val_labels, batch=EVALUATION_BATCH)
    training = dataclasses.replace(weights.training, val_top1=single.top1, val_top5=single.top5)
    result: dict[str, Any] = {"single_view": _describe(single)}
    if recipe.ten_crop:
        ten = view_accuracy(
            shipped,
            val_images,
            val_labels,
            mean=mean,
            std=std,
            crop=recipe.crop,
            size=recipe.crop,
            views=augment.TEN_CROPS,
            precision=PRECISIONS[config.precision],
            batch=EVALUATION_BATCH,
        )
        result["ten_crop"] = _describe(ten)
    result["seconds"] = sum(row["seconds"] for row in history)
    checkpoint.save_weights(out, dataclasses.replace(weights, training=training))
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    for views, score in (("single centre view", single),) + (
        (("ten crops", ten),) if recipe.ten_crop else ()
    ):
        low, high = wilson_interval(score.correct_top1, score.images)
        print(
            f"{config.arch}, {views}: top-1 {100 * score.top1:.2f} % "
            f"({score.correct_top1} of {score.images}; 95 % {100 * low:.2f} to {100 * high:.2f}), "
            f"top-5 {100 * score.top5:.2f} %"
        )
    print(f"export it with: python -m training.export {out} -o exported/", file=sys.stderr)


def _describe(score: Score) -> dict[str, Any]:
    return {
        "images": score.images,
        "correct_top1": score.correct_top1,
        "top1": score.top1,
        "top1_ci95": wilson_interval(score.correct_top1, score.images),
        "top5": score.top5,
        "loss": score.loss,
    }


def _loss(outputs: Tensor | tuple[Tensor, ...], y: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The training loss, and the main logits ``[N, classes]``."""
    logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
    smoothing = recipe.label_smoothing
    loss = F.cross_entropy(logits.float(), y, label_smoothing=smoothing)
    for head in auxiliary:
        extra = F.cross_entropy(head.float(), y, label_smoothing=smoothing)
        loss = loss + recipe.auxiliary_weight * extra
    return loss, logits


def _random_boxes(pixels: Tensor, recipe: Recipe, size: int) -> augment.Boxes:
    count, height, width, _ = pixels.shape
    if recipe.crop_area is None:
        return augment.random_crops(count, height, width, recipe.crop, pixels.device)
    return augment.random_resized_crops(count, height, width, recipe.crop_area, pixels.device)


def _parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    decay = recipe.weight_decay if recipe.decay_norms_and_biases else 0.0
    return [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": decay},
    ]


def _subset(count: int, limit: int | None, device: torch.device) -> Tensor:
    """Indices of the training images to use: all, or ``limit`` drawn at random, always the same."""
    if limit is None or limit >= count:
        return torch.arange(count, device=device)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(count, generator=generator)[:limit]
    return chosen.sort().values.to(device)


def _mix(*numbers: int) -> int:
    """One seed from several numbers, so that neighbouring runs and steps share no randomness."""
    mixed = 0
    for number in numbers:
        mixed = (mixed ^ number) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 29
    return mixed


def _configure(arguments: argparse.Namespace) -> tuple[Config, torch.device]:
    if arguments.arch not in ARCHS:
        raise UsageError(f"unknown architecture {arguments.arch!r} (known: {', '.join(ARCHS)})")
    overrides = {
        name: getattr(arguments, name)
        for name in ("epochs", "batch_size", "lr")
        if getattr(arguments, name) is not None
    }
    recipe = dataclasses.replace(RECIPES[arguments.recipe](arguments.arch), **overrides)
    if arguments.limit_train is not None and arguments.limit_train < 1:
        raise UsageError("--limit-train must be at least 1")
    device = _device(arguments.device)
    config = Config(
        arch=arguments.arch,
        recipe=recipe,
        seed=arguments.seed,
        precision=_precision(arguments.precision, device),
        image_size=64,
        limit_train=arguments.limit_train,
    )
    return config, device


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda: PyTorch finds no usable CUDA device here")
    return torch.device(name)


def _precision(name: str, device: torch.device) -> str:
    if name == "fp16" and device.type == "cpu":
        raise UsageError("--precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "fp16"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def _identity(config: Config, dataset: data.Dataset) -> dict[str, Any]:
    return {
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "dataset": {"name": dataset.name, "fingerprint": dataset.fingerprint},
    }


def _open_run(
    out: Path, config: Config, dataset: data.Dataset, *, resume: bool
) -> dict[str, Any] | None:
    """Make the run's folder, or read the checkpoint in it; refuses to mix two runs."""
    path = out / checkpoint.CHECKPOINT
    identity = _identity(config, dataset)
    if resume:
        saved = checkpoint.load(path)
        for part, wanted in identity.items():
            differing = {
                name: (value, wanted[name])
                for name, value in saved.get(part, {}).items()
                if value != wanted.get(name)
            }
            if differing or part not in saved:
                listed = ", ".join(f"{name} was {was!r}, is {now!r}" for name, (was, now) in differing.items())
                raise UsageError(f"cannot resume {out} with another {part}: {listed}")
        return saved
    if path.exists():
        raise UsageError(f"{out} holds a run already: --resume goes on with it, --out names another")
    out.mkdir(parents=True, exist_ok=True)
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    document = {**identity, "data": str(dataset.root.resolve()), "environment": environment}
    (out / "config.json").write_text(json.dumps(document, indent=2) + "\n")
    return None


def _write_history(path: Path, history: list[dict[str, Any]]) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    partial = path.with_suffix(".partial")
    partial.write_text(buffer.getvalue())
    partial.replace(path)


def _commit() -> str | None:
    """The commit of this checkout, with "+" where it has uncommitted changes; None outside of git."""
    here = Path(__file__).parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=here, capture_output=True, text=True, check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


class _Stop:
    signal_number: int | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self.signal_number = number


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """SIGINT and SIGTERM set a flag that the loop reads between two steps."""
    stop = _Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.fit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--arch", required=True, metavar="NAME", help=f"one of {', '.join(ARCHS)}")
    add("--recipe", choices=list(RECIPES), default="modern", help="default: %(default)s")
    add("--epochs", type=int, help="default: the recipe's, as for the next two")
    add("--batch-size", "-b", type=int)
    add("--lr", type=float, help="peak learning rate at this batch size")
    add("--data", type=Path, help=f"default: {data.DEFAULT_ROOT}, downloaded if it is not there")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--precision", choices=("auto", *PRECISIONS), default="auto",
        help="auto: fp16 on a GPU, bf16 on CPUs that have it, otherwise fp32")
    add("--seed", type=int, default=0)
    add("--out", "-o", type=Path, help="default: runs/<arch>-<recipe>")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--limit-train", type=int, metavar="N", help="use only N training images")
    add("--skip-bad", action="store_true", help="go on without images that cannot be read")
    return parser


if __name__ == "__main__":
    sys.exit(main())
