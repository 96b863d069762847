"""Train one of the four networks, or plain20: ResNet-20 without its shortcuts.

Try it on a CPU in a minute, then for real::

    python -m training.fit --arch baseline --recipe cpu --limit-train 10000
    python -m training.fit --arch inception                     # Tiny ImageNet, the modern recipe
    python -m training.fit --arch resnet20 --recipe paper       # as in the paper
    python -m training.fit --arch resnet20 --data my_photos/
    torchrun --nproc-per-node=4 -m training.fit --arch resnet20     # on four GPUs

``my_photos/`` holds ``<class>/*``, or ``train/<class>/*`` and ``val/<class>/*``.

Stopped runs (Ctrl-C, SIGTERM, a crash) go on with the same command and ``--resume``. A run leaves
in its folder: ``config.json``, ``history.csv``, ``curves.png``, TensorBoard events,
``checkpoint.pt`` and, when it has finished, ``weights.pt`` and ``result.json``.
"""

import argparse
import dataclasses
import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from tinyserve.errors import TinyserveError, UsageError, describe_os_error
from tinyserve.modelfile import TaughtBy, Training
from tinyserve.report import wilson_interval
from training import augment, checkpoint, data, distill, distributed, hardware, pretrained
from training.calibrate import may_have_seen
from training.distributed import Workers
from training.evaluate import Score, served_accuracy
from training.hardware import PRECISIONS
from training.models import ARCHS, count_parameters
from training.notes import note, speaks
from training.recipes import RECIPES, SMALLEST_IMAGE, Recipe
from training.records import RESULT, SINGLE, TEN
from training.run import Config, Row, Run, opened
from training.trainer import Trainer

LARGEST_IMAGE = 1024
"""Pixels, of ``--image-size``."""

FEW_STEPS = 100
"""In fewer a network learns little."""

LOSS_EVERY = 20
"""Steps from one reading of the loss to the next."""


class StoppedError(TinyserveError):
    """The run was asked to stop; its checkpoint is written."""

    def __init__(self, reason: str, exit_code: int, trainer: Trainer, folder: Path) -> None:
        super().__init__(
            f"{reason} at step {trainer.step} of {trainer.steps}; checkpoint in {folder}, "
            "go on with the same command and --resume"
        )
        self.exit_code = exit_code


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()
    arguments = _parser().parse_args(argv)
    try:
        config, device = _configure(arguments)
        if arguments.show_recipe:
            print(json.dumps(dataclasses.asdict(config.recipe), indent=2))
            return 0
        if device.type == "cpu":
            hardware.keep_freed_memory()
        deadline = None if arguments.time_limit is None else started + arguments.time_limit
        with distributed.joined(device) as workers:
            _fit_from_files(arguments, config, device, workers, deadline)
    except TinyserveError as error:
        if speaks():
            print(f"training.fit: {error}", file=sys.stderr)
        return error.exit_code
    except torch.OutOfMemoryError:
        print(
            "training.fit: the GPU's memory is full: lower --batch-size or --image-size",
            file=sys.stderr,
        )
        return 1
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        print(
            "training.fit: the memory is full: lower --batch-size or --image-size", file=sys.stderr
        )
        return 1
    except OSError as error:
        print(f"training.fit: {describe_os_error(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("training.fit: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _fit_from_files(
    arguments: argparse.Namespace,
    config: Config,
    device: torch.device,
    workers: Workers,
    deadline: float | None,
) -> None:
    initial = None if arguments.init is None else pretrained.load(arguments.init)
    teachers: list[checkpoint.Weights] = []
    sources: list[distill.Source] = []
    if config.recipe.distill_once:
        sources = [
            distill.open_source(path, device, config.precision) for path in arguments.teacher
        ]
    else:
        teachers = [pretrained.load(path) for path in arguments.teacher]
    asked_about: list[checkpoint.Weights | distill.Source] = [*teachers, *sources]
    taught_by = tuple(
        TaughtBy(name=name, architecture=teacher.arch, training=teacher.training)
        for name, teacher in zip(config.teachers, asked_about, strict=True)
    )
    with workers.first_before_others():  # the first decodes the images, the others map its array
        dataset = data.load(
            data.locate(arguments.data),
            image_size=config.image_size,
            skip_bad=arguments.skip_bad,
            holdout=config.holdout,
        )
    asked = config.recipe
    config = _with_batches_to_fill(config, dataset, keep_lr=_names_lr(arguments))
    out = arguments.out or Path("runs") / f"{config.arch}-{config.recipe.name}"
    with opened(out, config, dataset, resume=arguments.resume, workers=workers) as run:
        answers = None
        if sources:
            with workers.first_before_others():  # as above
                answers = distill.kept_answers(sources, dataset, config.recipe.distill_temperature)
            sources.clear()  # and their memory with them
        trainer = Trainer(
            config,
            dataset,
            device,
            initial=initial,
            teachers=teachers,
            answers=answers,
            workers=workers,
        )
        if workers.first and run.saved is None:
            for words in _notes(trainer, dataset, asked, initial, taught_by):
                note(words)
        history = fit(trainer, run, deadline)
        _finish(dataset, trainer, run, history, initial, taught_by)


def _notes(
    trainer: Trainer,
    dataset: data.Dataset,
    asked: Recipe,
    initial: checkpoint.Weights | None,
    taught_by: Sequence[TaughtBy],
) -> Iterator[str]:
    """What is worth knowing before a run of a recipe begins."""
    recipe = trainer.config.recipe

    def saw_held_out(training: Training | None) -> bool:
        return len(dataset.held_out) > 0 and may_have_seen(
            training, dataset.fingerprint, dataset.described
        )

    if initial is not None:
        if initial.labels != dataset.classes:
            yield "its classes are others: the last layer starts anew"
        if saw_held_out(initial.training):
            yield (
                "the weights of --init may have been trained on images that are held out now: "
                "what is measured on these is too good"
            )
    for teacher in taught_by:
        if saw_held_out(teacher.training):
            yield (
                f"the teacher {teacher.architecture} may have been trained on images that are held "
                "out now: what is measured on these may be a little too good"
            )
    if asked.batch_size != recipe.batch_size:
        lower = f", and the learning rate is as much lower: {recipe.lr:.3g}"
        yield (
            f"a batch has all {recipe.batch_size} images, not {asked.batch_size}"
            f"{lower if asked.lr != recipe.lr else ''}"
        )
    if trainer.steps < FEW_STEPS:
        wanted = math.ceil(FEW_STEPS / trainer.steps_per_epoch)
        steps = "1 step is" if trainer.steps == 1 else f"{trainer.steps} steps are"
        yield (
            f"{steps} few to learn in; --epochs {wanted} makes {wanted * trainer.steps_per_epoch}"
        )


def fit(trainer: Trainer, run: Run, deadline: float | None = None) -> list[Row]:
    """Train to the last step, leaving in the run's folder what it takes to go on from there.

    Returns the history, a row for every epoch.

    A resumed run goes on from its checkpoint to the same weights, bit for bit on a CPU, as if it
    had never stopped. Raises :class:`StoppedError` after a signal, and once
    :func:`time.monotonic` has passed ``deadline``.
    """
    config, workers = trainer.config, trainer.workers
    recipe, title = config.recipe, f"{config.arch}, recipe {config.recipe.name}"
    history: list[Row] = []
    if run.saved is not None:
        trainer.load_state_dict(run.saved["trainer"])
        history = run.saved["history"]
        if history:  # the run may have been killed between its checkpoint and this
            run.write_history(history, title, recipe)
    if workers.first:
        if run.saved is not None:
            print(f"resumed at step {trainer.step} of {trainer.steps}", file=sys.stderr)
        print(_introduction(trainer, run), file=sys.stderr)
    meter = _Meter(trainer.device)
    with _events(trainer, run) as writer, _stop_signals(deadline) as stop:
        while trainer.step < trainer.steps:
            epoch = trainer.step // trainer.steps_per_epoch + 1
            for _ in _with_progress(trainer, epoch, meter, writer):
                if _should_stop(trainer, stop):
                    run.save_checkpoint({"trainer": trainer.state_dict(), "history": history})
                    raise StoppedError(*stop.reason(), trainer, run.folder)
            row = trainer.finish_epoch()
            # The latter is of the last step's weights, too.
            if not (math.isfinite(row["train_loss"]) and math.isfinite(row["val_loss"])):
                raise TinyserveError(
                    f"the loss is not finite in epoch {epoch}: lower --lr (now {recipe.lr})"
                )
            history.append(row)
            run.save_checkpoint({"trainer": trainer.state_dict(), "history": history})
            run.write_history(history, title, recipe)
            if writer is not None:
                for name, value in row.items():
                    writer.add_scalar(f"epoch/{name}", value, trainer.step)
            if workers.first:
                print(
                    f"epoch {epoch}: train loss {row['train_loss']:.3f} "
                    f"top-1 {100 * row['train_top1']:.2f} %, "
                    f"validation top-1 {100 * row['val_top1']:.2f} % at {row['size']} px, "
                    f"{row['images_per_second']:.0f} images/s",
                    file=sys.stderr,
                )
    return history


def _introduction(trainer: Trainer, run: Run) -> str:
    config, workers = trainer.config, trainer.workers
    processes = f" in {workers.count} processes" if workers.count > 1 else ""
    return (
        f"{config.arch}, {count_parameters(trainer.model):,} parameters, recipe "
        f"{config.recipe.name}: {config.recipe.epochs} epochs of {trainer.steps_per_epoch} steps "
        f"of {trainer.batch_size} images, {config.precision} on {hardware.name_of(trainer.device)}"
        f"{processes}, into {run.folder}"
    )


def _with_progress(
    trainer: Trainer, epoch: int, meter: "_Meter", writer: SummaryWriter | None
) -> Iterator[None]:
    """Run the rest of an epoch behind a progress bar; yields before every step."""
    bar = tqdm(
        total=trainer.steps_per_epoch * trainer.batch_size,
        initial=trainer.step % trainer.steps_per_epoch * trainer.batch_size,
        desc=f"epoch {epoch}/{trainer.config.recipe.epochs}",
        unit="image",
        disable=None if trainer.workers.first else True,
    )
    with bar:
        while trainer.step < epoch * trainer.steps_per_epoch:
            yield
            loss = trainer.train_step()
            bar.update(trainer.batch_size)
            if trainer.step % LOSS_EVERY:
                continue
            if writer is not None:
                writer.add_scalar("step/lr", trainer.lr, trainer.step)
            if reading := meter.read(loss, trainer.step):
                step, value = reading
                if writer is not None:
                    writer.add_scalar("step/loss", value, step)
                bar.set_postfix(
                    loss=f"{value:.3f}", lr=f"{trainer.lr:.4f}", size=trainer.size, refresh=False
                )


class _Meter:
    """Reads numbers off the device without waiting for them."""

    def __init__(self, device: torch.device) -> None:
        self._arrived = torch.cuda.Event() if device.type == "cuda" else None
        self._number = torch.zeros((), pin_memory=self._arrived is not None)
        self._pending: int | None = None

    def read(self, number: Tensor, step: int) -> tuple[int, float] | None:
        """Step and number of an earlier call that has arrived, None where none has; on a CPU this
        call's.

        ``number`` is a scalar on the device, which is copied for a later call.
        """
        if self._arrived is None:
            return step, number.item()
        if self._pending is not None and not self._arrived.query():
            return None
        earlier = None if self._pending is None else (self._pending, self._number.item())
        self._number.copy_(number, non_blocking=True)
        self._arrived.record()
        self._pending = step
        return earlier


def _finish(
    dataset: data.Dataset,
    trainer: Trainer,
    run: Run,
    history: list[Row],
    initial: checkpoint.Weights | None,
    taught_by: tuple[TaughtBy, ...],
) -> None:
    """Evaluate the final weights as they will be served, in fp32, and write them."""
    config, recipe = trainer.config, trainer.config.recipe
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
            dataset=dataset.described,
            dataset_fingerprint=dataset.fingerprint,
            train_images=len(trainer.subset),
            recipe=recipe.name,
            epochs=recipe.epochs,
            seed=config.seed,
            precision=config.precision,
            commit=run.commit,
            val_images=len(dataset.val),
            val_top1=math.nan,
            val_top5=math.nan,
            initial=None if initial is None else initial.training,
            teachers=taught_by,
        ),
    )
    if not trainer.workers.first:
        return

    def accuracy(views: augment.Views) -> Score:
        served = weights.served(views).to(trainer.device).to(memory_format=torch.channels_last)
        return served_accuracy(served, *trainer.val)

    scores = {SINGLE: accuracy(augment.CENTRE)}
    if recipe.ten_crop:
        scores[TEN] = accuracy(augment.TEN_CROPS)
    single = scores[SINGLE]
    training = dataclasses.replace(weights.training, val_top1=single.top1, val_top5=single.top5)
    # Before the weights, whose presence says that a run is done.
    run.write_json(
        RESULT,
        {
            **{views: _describe(score) for views, score in scores.items()},
            "training_seconds": sum(row["seconds"] for row in history),
            "parameters": count_parameters(trainer.model),
            "peak_memory_bytes": hardware.peak_memory(trainer.device),
            "train_images": len(trainer.subset),
            "held_out": len(dataset.held_out),
        },
    )
    run.save_weights(dataclasses.replace(weights, training=training))
    for views, score in scores.items():
        low, high = wilson_interval(score.correct_top1, score.images)
        print(
            f"{config.arch}, {views}: top-1 {100 * score.top1:.2f} % "
            f"({score.correct_top1} of {score.images}; 95 % {100 * low:.2f} to {100 * high:.2f}), "
            f"top-5 {100 * score.top5:.2f} %"
        )
    print(
        f"export it with: python -m training.export {shlex.quote(str(run.folder))} -o models/\n"
        f"try it with:    tinyserve classify IMAGES -m models/{config.arch}.onnx",
        file=sys.stderr,
    )


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
    if not SMALLEST_IMAGE <= arguments.image_size <= LARGEST_IMAGE:
        raise UsageError(f"--image-size must be from {SMALLEST_IMAGE} to {LARGEST_IMAGE}")
    recipe = RECIPES[arguments.recipe](arguments.arch).at(arguments.image_size)
    recipe = dataclasses.replace(recipe.changed(arguments.set), **overrides)
    if arguments.limit_train is not None and arguments.limit_train < 1:
        raise UsageError("--limit-train must be at least 1")
    if not 0 <= arguments.seed < 2**64:
        raise UsageError("--seed must be from 0 to 2^64 - 1")
    if arguments.holdout < 0:
        raise UsageError("--holdout must be at least 0")
    if recipe.crop > arguments.image_size:
        raise UsageError(f"crops of {recipe.crop} px do not fit images of {arguments.image_size}")
    if arguments.time_limit is not None and not arguments.time_limit >= 0:
        raise UsageError("--time-limit must be at least 0")
    _check_sizes(arguments.arch, recipe)
    device = hardware.device(arguments.device)
    config = Config(
        arch=arguments.arch,
        recipe=recipe,
        seed=arguments.seed,
        precision=hardware.precision(arguments.precision, device),
        image_size=arguments.image_size,
        limit_train=arguments.limit_train,
        holdout=arguments.holdout,
        init=None if arguments.init is None else pretrained.identify(arguments.init),
        teachers=tuple(pretrained.identify(path) for path in arguments.teacher),
        compile=arguments.compile,
    )
    return config, device


def _names_lr(arguments: argparse.Namespace) -> bool:
    return arguments.lr is not None or any(change.startswith("lr=") for change in arguments.set)


def _with_batches_to_fill(config: Config, dataset: data.Dataset, *, keep_lr: bool) -> Config:
    """Batches of no more images than there are; the learning rate falls in proportion."""
    images = len(dataset.train) - len(dataset.held_out)
    if config.limit_train is not None:
        images = min(images, config.limit_train)
    recipe = config.recipe
    if images >= recipe.batch_size:
        return config
    lr = recipe.lr if keep_lr else recipe.lr * images / recipe.batch_size
    recipe = dataclasses.replace(recipe, batch_size=images, lr=lr)
    return dataclasses.replace(config, recipe=recipe)


def _check_sizes(arch: str, recipe: Recipe) -> None:
    """Run every size through the network, without memory or time for it."""
    with torch.device("meta"):
        network = ARCHS[arch](2, image_size=recipe.final_size, batch_norm=recipe.batch_norm)
        for _, size in recipe.sizes:
            try:
                network(torch.zeros(2, 3, size, size))
            except RuntimeError as error:
                end = "" if size == recipe.final_size else f" and end at {recipe.final_size} px"
                raise UsageError(f"{arch} cannot be trained on {size} px{end}") from error


@contextmanager
def _events(trainer: Trainer, run: Run) -> Iterator[SummaryWriter | None]:
    """TensorBoard's log, in the first process."""
    if not trainer.workers.first:
        yield None
        return
    writer = SummaryWriter(str(run.folder), purge_step=trainer.step)
    try:
        yield writer
    finally:
        writer.close()


class _Stop:
    """Why a run should stop, if it should."""

    def __init__(self, deadline: float | None) -> None:
        self.signal_number: int | None = None
        self._deadline = deadline

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self.signal_number = number

    def __bool__(self) -> bool:
        passed = self._deadline is not None and time.monotonic() >= self._deadline
        return passed or self.signal_number is not None

    def reason(self) -> tuple[str, int]:
        """In words, and as an exit code. A time limit is no failure."""
        if self.signal_number is not None:
            return "stopped", 128 + self.signal_number
        return "time limit reached", 0


@contextmanager
def _stop_signals(deadline: float | None) -> Iterator[_Stop]:
    """SIGINT and SIGTERM set a flag that the loop reads between two steps."""
    stop = _Stop(deadline)
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _should_stop(trainer: Trainer, stop: _Stop) -> bool:
    workers = trainer.workers
    if workers.count == 1:
        return bool(stop)
    # All must stop at the same step. Asking the others waits for them, so not at every one.
    if trainer.step % LOSS_EVERY:
        return False
    wish = torch.tensor(float(bool(stop)), device=trainer.device)
    return bool(workers.total(wish) > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.fit",
        description=__doc__,
        epilog="Exit codes: 0 fine, also where --time-limit ended it; 1 failed, 2 wrong usage, 4\n"
        "a teacher's file is not what it was, 5 the device asked for cannot run, 130 stopped by\n"
        "Ctrl-C, 143 by SIGTERM.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--arch", required=True, metavar="NAME", help=f"one of {', '.join(ARCHS)}")
    add(
        "--recipe",
        choices=list(RECIPES),
        default="modern",
        help="modern: made for a GPU (the default); paper: as in the paper, ten epochs; cpu: a few "
        "epochs on small images",
    )
    add("--epochs", type=int, metavar="N", help="passes over all images (default: the recipe's)")
    add(
        "--batch-size",
        "-b",
        type=int,
        metavar="N",
        help="images a step, of all processes together (default: the recipe's)",
    )
    add(
        "--lr",
        type=float,
        metavar="RATE",
        help="peak learning rate at this batch size (default: the recipe's)",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=JSON",
        help="change any field of the recipe, such as label_smoothing=0 (may be repeated); "
        "training/recipes.py explains them",
    )
    add(
        "--show-recipe",
        action="store_true",
        help="print the fields of --arch's recipe as JSON, and end",
    )
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help=f"default: {data.DEFAULT_ROOT}, downloaded if it is not there",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="default: %(default)s, a GPU where there is one",
    )
    add(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="default: %(default)s, fp16 on a GPU, bf16 on CPUs that have it, otherwise fp32",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of all that is random (default: %(default)s)",
    )
    add("--out", "-o", type=Path, metavar="DIR", help="default: runs/<arch>-<recipe>")
    add(
        "--resume",
        action="store_true",
        help="go on with the run in --out: the other arguments as before",
    )
    add("--limit-train", type=int, metavar="N", help="use only N training images")
    add(
        "--init",
        type=Path,
        metavar="RUN_OR_ONNX",
        help="start from the weights of a finished run or an exported file",
    )
    add(
        "--teacher",
        type=Path,
        action="append",
        default=[],
        metavar="RUN_OR_ONNX",
        help="learn from this trained network, too (repeated: from the mean of several)",
    )
    add("--holdout", type=int, default=0, metavar="N", help="validate on N training images")
    add(
        "--image-size",
        type=int,
        default=64,
        metavar="N",
        help="side of stored images, in pixels (default: %(default)s)",
    )
    add("--time-limit", type=float, metavar="SECONDS", help="stop then, for --resume to go on")
    add("--compile", action="store_true", help="use torch.compile: pays back in long runs on GPUs")
    add("--skip-bad", action="store_true", help="go on without images that cannot be read")
    return parser


if __name__ == "__main__":
    sys.exit(main())
