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
import dataclasses
import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from tinyserve.errors import DeviceError, TinyserveError, UsageError
from tinyserve.modelfile import Training
from tinyserve.report import wilson_interval
from training import augment, checkpoint, data, pretrained
from training.evaluate import Score, served_accuracy
from training.models import ARCHS, count_parameters
from training.plots import draw_curves
from training.recipes import RECIPES
from training.run import Config, Row, Run, commit, write_json
from training.trainer import PRECISIONS, Trainer

LOSS_EVERY = 20
"""Steps from one reading of the loss to the next."""


class StoppedError(TinyserveError):
    """A signal asked the run to stop; its checkpoint is written."""

    def __init__(self, signal_number: int, out: Path) -> None:
        super().__init__(f"stopped; checkpoint in {out}, go on with the same command and --resume")
        self.exit_code = 128 + signal_number


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        config, device = _configure(arguments)
        dataset = data.load(
            data.locate(arguments.data), image_size=config.image_size, skip_bad=arguments.skip_bad
        )
        out = arguments.out or Path("runs") / f"{config.arch}-{config.recipe.name}"
        initial = pretrained.load(arguments.init) if arguments.init else None
        run = Run(out, config, dataset, resume=arguments.resume)
        fit(config, dataset, device, run, initial)
    except TinyserveError as error:
        print(f"training.fit: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("training.fit: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def fit(
    config: Config,
    dataset: data.Dataset,
    device: torch.device,
    run: Run,
    initial: checkpoint.Weights | None = None,
) -> None:
    """Train, from ``initial`` or from scratch, evaluate and write everything into the run's folder.

    A resumed run goes on from its checkpoint to the same weights, bit for bit on a CPU, as if it
    had never stopped.
    """
    recipe = config.recipe
    trainer = Trainer(config, dataset, device, initial)
    history: list[Row] = []
    if run.saved is not None:
        trainer.load_state_dict(run.saved["trainer"])
        history = run.saved["history"]
        print(f"resumed at step {trainer.step} of {trainer.steps}", file=sys.stderr)
    print(
        f"{config.arch}, {count_parameters(trainer.model):,} parameters, recipe {recipe.name}: "
        f"{recipe.epochs} epochs of {trainer.steps_per_epoch} steps of {trainer.batch_size} "
        f"images, {config.precision} on {_device_name(device)}, into {run.folder}",
        file=sys.stderr,
    )
    writer = SummaryWriter(str(run.folder), purge_step=trainer.step)
    with _stop_signals() as stop:
        while trainer.step < trainer.steps:
            epoch = trainer.step // trainer.steps_per_epoch + 1
            for loss in _with_progress(trainer, epoch):
                if stop.signal_number is not None:
                    run.save_checkpoint({"trainer": trainer.state_dict(), "history": history})
                    raise StoppedError(stop.signal_number, run.folder)
                if loss is not None:
                    writer.add_scalar("step/loss", loss, trainer.step)
                    writer.add_scalar("step/lr", trainer.lr, trainer.step)
            row = trainer.finish_epoch()
            if not math.isfinite(row["train_loss"]):
                raise TinyserveError(
                    f"the loss is not finite in epoch {epoch}: lower --lr (now {recipe.lr})"
                )
            history.append(row)
            run.save_checkpoint({"trainer": trainer.state_dict(), "history": history})
            run.write_history(history)
            title = f"{config.arch}, recipe {recipe.name}"
            draw_curves(run.folder / "curves.png", title, history, recipe, trainer.steps_per_epoch)
            for name, value in row.items():
                writer.add_scalar(f"epoch/{name}", value, trainer.step)
            print(
                f"epoch {epoch}: train loss {row['train_loss']:.3f} "
                f"top-1 {100 * row['train_top1']:.2f} %, "
                f"validation top-1 {100 * row['val_top1']:.2f} % at {row['size']} px, "
                f"{row['images_per_second']:.0f} images/s",
                file=sys.stderr,
            )
    writer.close()
    _finish(config, dataset, trainer, history, run.folder, initial)


def _with_progress(trainer: Trainer, epoch: int) -> Iterator[float | None]:
    """Run the rest of an epoch behind a progress bar; yields before every step.

    What it yields is the last loss where that was read, and otherwise None: reading it waits for
    the device.
    """
    bar = tqdm(
        total=trainer.steps_per_epoch * trainer.batch_size,
        initial=trainer.step % trainer.steps_per_epoch * trainer.batch_size,
        desc=f"epoch {epoch}/{trainer.config.recipe.epochs}",
        unit="image",
        disable=None,
    )
    with bar:
        value = None
        while trainer.step < epoch * trainer.steps_per_epoch:
            yield value
            loss, value = trainer.train_step(), None
            bar.update(trainer.batch_size)
            if trainer.step % LOSS_EVERY == 0:
                value = loss.item()
                bar.set_postfix(
                    loss=f"{value:.3f}", lr=f"{trainer.lr:.4f}", size=trainer.size, refresh=False
                )


def _finish(
    config: Config,
    dataset: data.Dataset,
    trainer: Trainer,
    history: list[Row],
    folder: Path,
    initial: checkpoint.Weights | None,
) -> None:
    """Evaluate the final weights as they will be served, in fp32, and write them."""
    recipe = config.recipe
    weights = checkpoint.Weights(
        arch=config.arch,
        batch_norm=recipe.batch_norm,
        labels=dataset.classes,
        image_size=config.image_size,
        crop=recipe.crop,
        network_size=recipe.final_size,
        mean=trainer.mean.cpu(),
        std=trainer.std.cpu(),
        state=checkpoint.final_state(trainer.evaluated),
        training=Training(
            dataset=dataset.name,
            dataset_fingerprint=dataset.fingerprint,
            train_images=len(trainer.subset),
            recipe=recipe.name,
            epochs=recipe.epochs,
            seed=config.seed,
            precision=config.precision,
            commit=commit(),
            val_images=len(dataset.val),
            val_top1=math.nan,
            val_top5=math.nan,
            initial=None if initial is None else initial.training,
        ),
    )
    served = weights.served().to(trainer.device).to(memory_format=torch.channels_last)
    scores = {"single centre view": served_accuracy(served, *trainer.val)}
    if recipe.ten_crop:
        scores["ten crops"] = trainer.view_accuracy(
            served.network, recipe.final_size, augment.TEN_CROPS
        )
    single = scores["single centre view"]
    training = dataclasses.replace(weights.training, val_top1=single.top1, val_top5=single.top5)
    checkpoint.save_weights(folder, dataclasses.replace(weights, training=training))
    result = {views: _describe(score) for views, score in scores.items()}
    write_json(
        folder / "result.json",
        {**result, "training_seconds": sum(row["seconds"] for row in history)},
    )
    for views, score in scores.items():
        low, high = wilson_interval(score.correct_top1, score.images)
        print(
            f"{config.arch}, {views}: top-1 {100 * score.top1:.2f} % "
            f"({score.correct_top1} of {score.images}; 95 % {100 * low:.2f} to {100 * high:.2f}), "
            f"top-5 {100 * score.top5:.2f} %"
        )
    print(f"export it with: python -m training.export {folder} -o exported/", file=sys.stderr)


def _describe(score: Score) -> dict[str, Any]:
    return {
        "images": score.images,
        "correct_top1": score.correct_top1,
        "top1": score.top1,
        "top1_ci95": wilson_interval(score.correct_top1, score.images),
        "top5": score.top5,
        "loss": score.loss,
    }


def _configure(arguments: argparse.Namespace) -> tuple[Config, torch.device]:
    if arguments.arch not in ARCHS:
        raise UsageError(f"unknown architecture {arguments.arch!r} (known: {', '.join(ARCHS)})")
    overrides = {
        name: getattr(arguments, name)
        for name in ("epochs", "batch_size", "lr")
        if getattr(arguments, name) is not None
    }
    recipe = RECIPES[arguments.recipe](arguments.arch).changed(arguments.set)
    recipe = dataclasses.replace(recipe, **overrides)
    if arguments.limit_train is not None and arguments.limit_train < 1:
        raise UsageError("--limit-train must be at least 1")
    if not 0 <= arguments.seed < 2**64:
        raise UsageError("--seed must be from 0 to 2^64 - 1")
    device = _device(arguments.device)
    config = Config(
        arch=arguments.arch,
        recipe=recipe,
        seed=arguments.seed,
        precision=_precision(arguments.precision, device),
        image_size=64,
        limit_train=arguments.limit_train,
        init=None if arguments.init is None else pretrained.identify(arguments.init),
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
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


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
    add(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=JSON",
        help="change any field of the recipe, such as label_smoothing=0 (may be repeated)",
    )
    add("--data", type=Path, help=f"default: {data.DEFAULT_ROOT}, downloaded if it is not there")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="auto: fp16 on a GPU, bf16 on CPUs that have it, otherwise fp32",
    )
    add("--seed", type=int, default=0)
    add("--out", "-o", type=Path, help="default: runs/<arch>-<recipe>")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--limit-train", type=int, metavar="N", help="use only N training images")
    add(
        "--init",
        type=Path,
        metavar="RUN_OR_ONNX",
        help="start from the weights of a finished run or an exported file",
    )
    add("--skip-bad", action="store_true", help="go on without images that cannot be read")
    return parser


if __name__ == "__main__":
    sys.exit(main())
