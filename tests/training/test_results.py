import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.recipes import paper
from training.records import rate_of
from training.report import main, not_run

ROOT = Path(__file__).resolve().parents[2]

PAPER = {
    "name": "paper",
    "epochs": 10,
    "batch_size": 256,
    "lr": 0.1,
    "schedule": "cosine-restarts",
    "label_smoothing": 0.0,
    "sizes": [[0.0, 56]],
}
CPU = {
    "name": "cpu",
    "epochs": 2,
    "batch_size": 128,
    "lr": 0.05,
    "schedule": "warmup-cosine",
    "warmup": 0.15,
    "label_smoothing": 0.05,
    "sizes": [[0.0, 24], [0.55, 32]],
    "ema": None,
}
H100 = {"gpu": "NVIDIA H100", "cpus": 16, "cpu": "Intel Xeon", "processes": 1}
DIGEST = "bb9a56e23f8d8bf976be5d0825753cf91e27417a74040bd09f6445bc7537d1a3"
BLUE, GREEN, ORANGE, RED = (31, 119, 180), (44, 160, 44), (255, 127, 14), (214, 39, 40)


def write_record(
    folder: Path,
    arch: str,
    recipe: dict,
    correct: int,
    *,
    ten_crops: int | None = None,
    images: int = 10_000,
    val: tuple[float, ...] | None = None,
    seconds: float = 100.0,
    speed: float = 900.0,
    finished: bool = True,
    environment: dict | None = None,
    measured: dict | None = None,
    data: str = "tiny-imagenet-200",
    fingerprint: str = "5c28aecb7bbfd195f6a35fb022f1",
    **config: object,
) -> Path:
    """The record of a run whose loss falls from 5 and whose accuracy rises to ``correct``."""
    folder.mkdir(parents=True)
    if recipe is PAPER:
        recipe = {**PAPER, "lr": paper(arch).lr}
    steps = 100_000 // recipe["batch_size"]
    document = {
        "config": {
            "arch": arch,
            "recipe": recipe,
            "seed": 0,
            "precision": "bf16",
            "image_size": 64,
            "limit_train": None,
            **config,
        },
        "dataset": {"name": data, "fingerprint": fingerprint},
        "data": "/secret/place",
        "environment": {
            "python": "3.11.7",
            "torch": "2.15.0",
            "commit": "bdb11536ddfe",
            "machine": "x86_64",
            "cpus": 2,
            "gpu": None,
            **(environment or {}),
        },
    }
    (folder / "config.json").write_text(json.dumps(document))
    epochs = recipe["epochs"]
    val = val or tuple(correct / images * (i + 1) / epochs for i in range(epochs))
    rows = [
        {
            "epoch": i + 1,
            "step": (i + 1) * steps,
            "size": 64,
            "lr": 0.01,
            "train_loss": 5 - 2 * (i + 1) / epochs,
            "train_top1": top1 + 0.031,
            "val_loss": 5 - 2 * (i + 1) / epochs,
            "val_top1": top1,
            "val_top5": min(1, 2 * top1),
            "images_per_second": speed,
            "seconds": seconds,
        }
        for i, top1 in enumerate(val)
    ]
    with (folder / "history.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    if finished:
        scores = {"single centre view": correct, "ten crops": ten_crops}
        result = {
            views: {
                "images": images,
                "correct_top1": right,
                "top1": right / images,
                "top1_ci95": [0, 1],
                "top5": 0.6302,
                "loss": 2.5,
            }
            for views, right in scores.items()
            if right is not None
        }
        result |= {"training_seconds": seconds * len(rows), **(measured or {})}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def report(tmp_path: Path, runs: Path):
    """Runs the command on ``runs``; returns the sections of what it wrote, by heading."""

    def run() -> dict[str, str]:
        output = tmp_path / "out" / "RESULTS.md"
        assert main([str(runs), "-o", str(output), "--figures", str(tmp_path / "figures")]) == 0
        parts = re.split(r"^#+ (.*)\n", output.read_text(encoding="utf-8"), flags=re.M)
        return dict(zip(["", *parts[1::2]], [parts[0], *parts[2::2]], strict=True))

    return run


def rows_of(section: str) -> list[dict[str, str]]:
    """The rows of a section's only table, by heading."""
    lines = [line.strip("| ") for line in section.splitlines() if line.startswith("|")]
    header, _, *rows = [line.split(" | ") for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


def section(sections: dict[str, str], start: str) -> str:
    (found,) = (text for heading, text in sections.items() if heading.startswith(start))
    return found


def colours_of(path: Path) -> dict[tuple[int, ...], int]:
    """How many pixels have each colour."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    return dict(zip(map(tuple, colours.tolist()), counts.tolist(), strict=True))


def test_tables_3_and_4_stand_beside_the_papers_numbers(runs, report):
    write_record(
        runs / "resnet20-paper",
        "resnet20",
        PAPER,
        5540,
        ten_crops=5701,
        seconds=360,
        environment=H100,
        measured={"parameters": 11_276_232},
    )
    write_record(runs / "plain-paper", "baseline", PAPER, 3301, speed=1234.4)
    write_record(runs / "resnet20-short", "resnet20", {**PAPER, "epochs": 3}, 4100)
    write_record(runs / "resnet20-part", "resnet20", PAPER, 4200, limit_train=20_000)
    write_record(runs / "resnet20-held", "resnet20", PAPER, 2100, images=5000, holdout=5000)
    write_record(runs / "resnet20-faster", "resnet20", {**PAPER, "lr": 0.2}, 5800)
    write_record(runs / "my-photos", "resnet20", PAPER, 9900, data="my_photos")
    write_record(runs / "resnet20-helped", "resnet20", PAPER, 5900, init=f"other.onnx {DIGEST}")
    write_record(runs / "resnet20-cpu", "resnet20", CPU, 3557)
    written = report()

    table, apart = section(written, "Table 3").split("**not to be compared with the paper**")
    baseline, resnet20 = rows_of(table)
    assert baseline["model"] == "baseline"
    assert (baseline["paper, train %"], baseline["paper, val %"]) == ("34.40", "33.04")
    assert baseline["ours, val top-1 %, ten crops"] == "–"
    assert (resnet20["paper, train %"], resnet20["paper, val %"]) == ("58.40", "55.40")
    assert resnet20["ours, train %"] == "58.50"
    # The bounds are those of R's prop.test(5540, 10000, correct = FALSE).
    assert resnet20["ours, val top-1 %, single view"] == "55.40 (54.42 to 56.37)"
    assert resnet20["ours, val top-1 %, ten crops"].startswith("57.01 (")
    assert resnet20["n"] == "10,000"
    assert "augmented" in table

    assert {(row["run"], row["epochs"], row["train images"]) for row in rows_of(apart)} == {
        ("`resnet20-short`", "3", "all"),
        ("`resnet20-part`", "10", "20,000"),
        ("`resnet20-held`", "10", "all but 5,000"),
        ("`resnet20-faster`", "10", "all"),
        ("`my-photos`", "10", "all"),
        ("`resnet20-helped`", "10 after other.onnx", "all"),
    }

    baseline, resnet20 = rows_of(section(written, "Table 4"))
    assert resnet20["parameters"] == "11,276,232"
    assert (resnet20["paper, h"], resnet20["ours, h"]) == ("14", "1.00")
    assert resnet20["hardware"] == "NVIDIA H100"
    assert (baseline["parameters"], baseline["paper, h"]) == ("–", "–")
    assert baseline["images/s"] == "1,234"
    assert baseline["hardware"] == "x86_64, 2 CPUs"


def test_what_has_not_been_run_says_so(runs, report):
    write_record(runs / "inception-cpu", "inception", CPU, 2703)
    written = report()
    groups = {"Table 3": "paper", "Table 4": "paper", "Section 4.2.3": "precision"}
    groups |= {"Ablation": "ablation", "Do resid": "ablation", "Seconds to": "modern"}
    script = (ROOT / "benchmarks" / "train_all.sh").read_text()
    for heading, group in groups.items():
        words = f"This has not been run yet; `benchmarks/train_all.sh {group}` runs it."
        assert section(written, heading).strip() == words, heading
        assert f"\n{group}() {{" in script
    assert not_run("paper")[1:] in section(written, "Figures")
    for heading in ("All finished", "How these"):
        assert "has not been run" not in section(written, heading)


def test_figures_are_of_each_recipe_the_papers_first(runs, report, tmp_path):
    write_record(runs / "resnet20-cpu", "resnet20", CPU, 3557)
    write_record(runs / "inception-cpu", "inception", CPU, 2703)
    write_record(runs / "alexnet-modern", "alexnet", {**CPU, "name": "modern"}, 4000)
    write_record(runs / "precision-fp32-baseline", "baseline", {**CPU, "name": "odd"}, 1000)
    names = ("learning-rate", "validation-top1", "train-loss")
    figures = tmp_path / "figures"

    shown = section(report(), "Figures")
    expected = [f"{name}-{recipe}.png" for recipe in ("cpu", "modern") for name in names]
    assert re.findall(r"!\[.*recipe \w+\]\(\.\./figures/(.*)\)", shown) == expected
    assert sorted(path.name for path in figures.iterdir()) == sorted(expected)
    for name in names:
        colours = colours_of(figures / f"{name}-cpu.png")
        # Each line has hundreds of pixels of its colour, its entry in the legend a few dozen.
        assert min(colours[BLUE], colours[GREEN]) > 150
        assert ORANGE not in colours

    write_record(runs / "alexnet-paper", "alexnet", PAPER, 4000)
    shown = section(report(), "Figures")
    assert re.findall(r"\(\.\./figures/(.*)\)", shown) == [
        *(f"{name}-paper.png" for name in names),
        *expected,
    ]
    colours = colours_of(figures / "train-loss-paper.png")
    assert colours[ORANGE] > 150
    assert BLUE not in colours


def test_the_learning_rate_is_the_one_of_the_run():
    # From the history of a run of alexnet with two epochs of 781 steps: the last step of each.
    assert rate_of(CPU, 780, 781) == pytest.approx(0.03189845214133741, rel=1e-12)
    assert rate_of(CPU, 1561, 781) == pytest.approx(6.998575389771667e-08, rel=1e-6)
    rise = 0.15 * 1562
    assert rate_of(CPU, 99, 781) == pytest.approx(0.05 * 100 / (rise + 1))
    for epoch in range(10):
        start = epoch * 390
        assert rate_of(PAPER, start, 390) == 0.1
        assert rate_of(PAPER, start + 195, 390) == pytest.approx(0.05)
        last = 0.05 * (math.cos(math.pi * 389 / 390) + 1)
        assert rate_of(PAPER, start + 389, 390) == pytest.approx(last)


def test_precisions_are_compared_with_fp32_on_the_same_hardware_and_data(runs, report):
    for precision, speed, memory, gpu in (
        ("fp32", 4000, 12_000_000_000, H100),
        ("bf16", 9000, 6_600_000_000, H100),
        ("fp16", 10_000, None, {}),
    ):
        write_record(
            runs / f"precision-{precision}-resnet20",
            "resnet20",
            CPU,
            3000,
            speed=speed,
            precision=precision,
            environment=gpu,
            measured={"peak_memory_bytes": memory},
        )
    write_record(
        runs / "precision-photos-resnet20",
        "resnet20",
        CPU,
        3000,
        speed=8000,
        precision="bf16",
        environment=H100,
        data="photos",
        fingerprint=DIGEST,
    )
    columns = ("precision", "images/s", "speed ratio", "peak memory, GB", "memory ratio")
    rows = rows_of(section(report(), "Section 4.2.3"))
    assert [tuple(row[name] for name in columns) for row in rows] == [
        ("fp32", "4,000", "1.00", "12.00", "1.00"),
        ("bf16", "9,000", "2.25", "6.60", "0.55"),
        ("fp16", "10,000", "–", "–", "–"),
        ("bf16", "8,000", "–", "–", "–"),
    ]
    assert {row["top-1 %, single view"] for row in rows} == {"30.00 (29.11 to 30.91)"}


def test_every_finished_run_is_listed_with_what_it_came_from(runs, report):
    write_record(
        runs / "resnet20-cpu2",
        "resnet20",
        CPU,
        2100,
        images=5000,
        holdout=5000,
        init=f"my resnet20.onnx {DIGEST}",
        teachers=[f"big-one {DIGEST}", f"big-two {DIGEST}"],
        seed=3,
        seconds=617.2,
        environment={"cpu": "AMD EPYC", "processes": 2},
    )
    write_record(runs / "baseline-cpu", "baseline", CPU, 1897)
    written = report()
    old, new = rows_of(section(written, "All finished"))
    assert old["run"] == "`baseline-cpu`"
    assert (old["epochs"], old["teachers"], old["train images"]) == ("2", "–", "all")
    assert old["validated on"] == "validation split"
    assert new == {
        "model": "resnet20",
        "run": "`resnet20-cpu2`",
        "recipe": "cpu",
        "epochs": "2 after my resnet20.onnx",
        "seed": "3",
        "precision": "bf16",
        "training sizes, px": "24, 32 from 55 %",
        "train images": "all but 5,000",
        "teachers": "big-one, big-two",
        "training, s": "1,234",
        "hardware": "AMD EPYC, 2 CPUs, 2 processes",
        "top-1 %, single view": "42.00 (40.64 to 43.37)",
        "top-1 %, ten crops": "–",
        "top-5 %, single view": "63.02",
        "n": "5,000",
        "validated on": "5,000 images held out of train",
    }
    everything = "".join(written.values())
    assert DIGEST not in everything
    assert "/secret/place" not in everything


def test_images_held_out_for_want_of_a_validation_split_are_said(runs, report):
    counts = {"train_images": 162, "held_out": 18}
    write_record(runs / "all", "baseline", CPU, 9, images=18, measured=counts)
    write_record(runs / "some", "baseline", CPU, 9, images=18, measured=counts, limit_train=1000)
    rows = rows_of(section(report(), "All finished"))
    assert [row["train images"] for row in rows] == ["all but 18", "162"]
    assert {row["validated on"] for row in rows} == {"18 images held out of train"}


def test_unfinished_runs_are_named_and_otherwise_left_out(runs, report):
    write_record(runs / "inception-cpu", "inception", CPU, 2703)
    write_record(runs / "begun", "resnet20", {**PAPER, "name": "cpu"}, 9000, finished=False)
    bare = write_record(runs / "bare", "resnet20", PAPER, 9000, finished=False)
    (bare / "history.csv").unlink()
    (runs / "notes").mkdir()
    written = report()
    finished = written.pop("All finished runs")
    assert "`begun` (10 of 10 epochs)" in finished
    assert "`bare` (0 of 10 epochs)" in finished
    assert [row["run"] for row in rows_of(finished)] == ["`inception-cpu`"]
    for text in written.values():
        assert "begun" not in text and "bare" not in text and "90.00" not in text
    assert section(written, "Seconds to").strip() == not_run("modern")


def test_all_unfinished_is_no_error(runs, report):
    write_record(runs / "begun", "resnet20", CPU, 9000, finished=False)
    written = report()
    assert not_run("modern") in section(written, "All finished")
    assert section(written, "How these").strip() == not_run("modern")


def test_an_ablation_says_what_differs_from_its_base(runs, report):
    newer = {**CPU, "cutmix": 0.0, "mixup": 0.0}
    write_record(runs / "ablation-base", "resnet20", CPU, 3000)
    write_record(
        runs / "ablation-a-smooth",
        "resnet20",
        {**newer, "name": "other", "label_smoothing": 0.1, "cutmix": 0.5, "sizes": [[0, 32]]},
        3123,
        teachers=[f"big-one {DIGEST}"],
    )
    write_record(runs / "ablation-same", "resnet20", newer, 2990, holdout=0, compile=False)
    no_dropout = {**newer, "dropout": 0.0}
    write_record(runs / "ablation-zero", "resnet20", no_dropout, 2990, compile=False)
    write_record(runs / "ablation-inception-base", "inception", CPU, 2500, limit_train=20_000)
    write_record(runs / "ablation-inception-fp32", "inception", CPU, 2400, precision="fp32")
    text = section(report(), "Ablation")
    first, second = re.findall(r"(?:^\|.*\n)+", text, re.M)
    columns = ("run", "what differs from the base", "difference, points", "train images")
    assert [tuple(row[name] for name in columns) for row in rows_of(first)] == [
        ("`ablation-base`", "(the base)", "–", "all"),
        (
            "`ablation-a-smooth`",
            "label_smoothing 0.05 → 0.1; sizes 24, 32 from 55 % → 32; "
            "teachers none → big-one; cutmix 0 → 0.5",
            "+1.23",
            "all",
        ),
        ("`ablation-same`", "nothing", "-0.10", "all"),
        ("`ablation-zero`", "dropout none → 0", "-0.10", "all"),
    ]
    assert [tuple(row[name] for name in columns) for row in rows_of(second)] == [
        ("`ablation-inception-base`", "(the base)", "–", "20,000"),
        (
            "`ablation-inception-fp32`",
            "precision bf16 → fp32; limit_train 20000 → none",
            "-1.00",
            "all",
        ),
    ]


def test_an_ablation_without_its_base_shows_no_differences(runs, report):
    write_record(runs / "ablation-base", "resnet20", CPU, 3000, finished=False)
    write_record(runs / "ablation-smooth", "resnet20", CPU, 3100)
    text = section(report(), "Ablation")
    assert "`ablation-base`, has not finished" in text
    (row,) = rows_of(text)
    assert (row["what differs from the base"], row["difference, points"]) == ("–", "–")


@pytest.mark.parametrize(
    ("base", "plain"),
    [
        ("ablation-base", "ablation-plain20"),
        ("resnet20-cpu", "plain20-cpu"),
        ("ablation-resnet20-base", "ablation-resnet20-plain"),
    ],
)
def test_residual_connections_are_judged_by_the_run_that_has_them(
    runs, report, tmp_path, base, plain
):
    write_record(runs / "resnet20-another", "resnet20", {**CPU, "lr": 0.2}, 9000)
    write_record(runs / base, "resnet20", CPU, 3320)
    write_record(runs / plain, "plain20", CPU, 3010)
    text = section(report(), "Do residual")
    assert f"Without shortcuts (`{plain}`) 30.10 (" in text
    assert f"with them (`{base}`) 33.20 (" in text
    assert "+3.10 points. What differs: arch resnet20 → plain20.\n" in text
    assert [row["run"] for row in rows_of(text)] == [f"`{base}`", f"`{plain}`"]
    assert "(../figures/residual-connections.png)" in text
    colours = colours_of(tmp_path / "figures" / "residual-connections.png")
    assert min(colours[BLUE], colours[RED]) > 300


def test_plain20_alone_is_compared_with_nothing(runs, report, tmp_path):
    write_record(runs / "plain20-cpu", "plain20", CPU, 3010)
    write_record(runs / "resnet20-cpu", "resnet20", {**CPU, "lr": 0.2}, 3320)
    text = section(report(), "Do residual")
    assert text.strip() == "`plain20-cpu` has no finished run of resnet20 to be compared with."
    assert not (tmp_path / "figures" / "residual-connections.png").exists()


def test_the_race_is_won_in_training_time(runs, report):
    three = {**CPU, "epochs": 3}
    write_record(runs / "slow", "resnet20", three, 5700, val=(0.5539, 0.554, 0.57), seconds=2000)
    write_record(runs / "fast", "resnet20", three, 5600, val=(0.1, 0.2, 0.56), seconds=300.25)
    write_record(runs / "never", "resnet20", three, 5539)
    write_record(runs / "inception", "inception", three, 6000)
    write_record(runs / "ahead", "resnet20", three, 6000, init="fast 0123")
    write_record(runs / "elsewhere", "resnet20", three, 9900, data="my_photos")
    rows = rows_of(section(report(), "Seconds to 55.40 %"))
    assert [(row["run"], row["seconds"], row["in epoch"]) for row in rows] == [
        ("`fast`", "900.8", "3"),
        ("`slow`", "4,000.0", "2"),
    ]


def test_a_race_that_nobody_finished(runs, report):
    write_record(runs / "one", "resnet20", CPU, 3000, val=(0.41, 0.3))
    write_record(runs / "two", "resnet20", CPU, 4000, holdout=5000)
    text = section(report(), "Seconds to")
    assert "No run has reached it yet" in text
    assert "41.00 %, of `one` (validation split)" in text


def test_how_the_numbers_were_made(runs, report):
    write_record(runs / "one", "resnet20", PAPER, 3000, ten_crops=3100, environment=H100)
    write_record(runs / "two", "inception", CPU, 150, images=500, environment={"commit": None})
    text = section(report(), "How these")
    two, one = rows_of(text)
    assert one == {
        "run": "`one`",
        "data": "`tiny-imagenet-200`, fingerprint 5c28aecb7bbf",
        "n": "10,000",
        "views": "single centre view, ten crops",
        "hardware": "NVIDIA H100",
        "Python": "3.11.7",
        "PyTorch": "2.15.0",
        "commit": "bdb11536ddfe",
    }
    assert (two["n"], two["views"], two["commit"]) == ("500", "single centre view", "–")


def test_the_same_records_give_the_same_bytes_without_torch(tmp_path, monkeypatch, capsys):
    records = [("resnet20", 4000), ("inception", 3000), ("mynet", 2000), ("alexnet", 1000)]
    for cwd, ordered in (("here", records), ("there", records[::-1])):
        for arch, correct in ordered:
            write_record(tmp_path / cwd / "docs" / "runs" / f"{arch}-cpu", arch, CPU, correct)
    (tmp_path / "here" / "RESULTS.md").write_text("something old")
    monkeypatch.chdir(tmp_path / "here")
    assert main([]) == 0
    figures = [f"docs/figures/{n}-cpu.png" for n in ("learning-rate", "validation-top1")]
    figures.append("docs/figures/train-loss-cpu.png")
    assert capsys.readouterr().out.split() == ["RESULTS.md", *figures]

    code = "import sys; sys.modules['torch'] = None; from training.report import main; main([])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "there",
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    for name in ("RESULTS.md", *figures):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    text = (tmp_path / "here" / "RESULTS.md").read_text()
    assert text.startswith("<!-- Generated by `python -m training.report docs/runs`: do not edit.")
    assert "(docs/figures/learning-rate-cpu.png)" in text
    assert list((tmp_path / "here").rglob("*.candidate")) == []


DAMAGED = {
    "config.json cut": ("config.json", '{"config": {"arch": "resn'),
    "config.json a list": ("config.json", "[]"),
    "config.json empty of settings": ("config.json", '{"config": {}, "dataset": {}}'),
    "history.csv empty": ("history.csv", ""),
    "history.csv without rows": ("history.csv", "epoch,step\n"),
    "history.csv without a column": ("history.csv", "epoch,step\n1,100\n"),
    "history.csv cut": (
        "history.csv",
        "epoch,step,train_loss,train_top1,val_top1,images_per_second,seconds\n1,100,4.2,0.",
    ),
    "history.csv no text": ("history.csv", "\udcff\udcfe"),
    "history.csv missing": ("history.csv", None),
    "config.json missing": ("config.json", None),
    "result.json cut": ("result.json", '{"single centre view": {"images": 10000,'),
    "result.json without accuracy": ("result.json", '{"training_seconds": 3}'),
    "result.json impossible": (
        "result.json",
        '{"single centre view": {"images": 10, "correct_top1": 11, "top5": 1}, '
        '"training_seconds": 3}',
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_record_is_one_line_that_names_the_file(runs, tmp_path, capsys, case):
    name, text = DAMAGED[case]
    write_record(runs / "good", "resnet20", CPU, 3000)
    path = write_record(runs / "bad", "resnet20", CPU, 3000) / name
    path.unlink()
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    output = tmp_path / "RESULTS.md"
    assert main([str(runs), "-o", str(output), "--figures", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"training\.report: {re.escape(str(path))} .+\n", err)
    assert not output.exists()


def test_a_schedule_that_cannot_be_drawn_names_the_file(runs, tmp_path, capsys):
    write_record(runs / "odd", "resnet20", {**CPU, "schedule": "zigzag"}, 3000)
    assert main([str(runs), "-o", str(tmp_path / "r.md"), "--figures", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err == (
        f"training.report: {runs / 'odd' / 'config.json'} is damaged: "
        "the schedule 'zigzag' is not known\n"
    )


@pytest.mark.parametrize("exists", [True, False])
def test_no_runs_is_a_usage_error(runs, tmp_path, capsys, exists):
    if exists:
        (runs / "empty").mkdir(parents=True)
    assert main([str(runs), "-o", str(tmp_path / "r.md"), "--figures", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"training.report: {runs} holds no runs: no folder with a config.json in it\n"
    )


def test_figures_that_cannot_be_written_are_a_usage_error(runs, tmp_path, capsys):
    write_record(runs / "one", "resnet20", CPU, 3000)
    (tmp_path / "file").write_text("")
    figures = tmp_path / "file" / "figures"
    assert main([str(runs), "-o", str(tmp_path / "r.md"), "--figures", str(figures)]) == 2
    assert re.fullmatch(
        rf"training\.report: cannot write {re.escape(str(figures))}: .+\n", capsys.readouterr().err
    )


def test_a_finished_run_is_kept_without_the_path_of_its_data(tmp_path, capsys):
    runs, records = tmp_path / "runs", tmp_path / "records"
    write_record(runs / "baseline-paper", "baseline", PAPER, 3300)
    before = (runs / "baseline-paper" / "config.json").read_text()
    config = {**json.loads(before), "data": "/home/somebody/pictures"}
    (runs / "baseline-paper" / "config.json").write_text(json.dumps(config))
    command = [str(records), "-o", str(tmp_path / "R.md"), "--figures", str(tmp_path / "figures")]
    assert main([*command, "--keep", str(runs / "baseline-paper")]) == 0
    kept = records / "baseline-paper"
    assert sorted(path.name for path in kept.iterdir()) == [
        "config.json",
        "history.csv",
        "result.json",
    ]
    assert "somebody" not in (kept / "config.json").read_text()
    assert json.loads((kept / "config.json").read_text())["config"] == config["config"]
    assert "`baseline-paper`" in (tmp_path / "R.md").read_text()
    (runs / "baseline-paper" / "result.json").unlink()
    assert main([*command, "--keep", str(runs / "baseline-paper")]) == 1
    assert "result.json cannot be read" in capsys.readouterr().err
