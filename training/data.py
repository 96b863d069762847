"""A data set as one uint8 array a split, decoded once.

Two layouts are read: Tiny ImageNet as it was published, and any tree of class folders,
``train/<class>/**`` and ``val/<class>/**``, or ``<class>/**`` alone. Classes are the folders below
``train``, sorted. Without ``val`` a tenth of the training images is held out.

The decoded arrays are kept beside the data (``.tinyserve-cache/``), or in the user's cache folder
where that is not writable, and memory-mapped on every later start.
"""

import contextlib
import hashlib
import http.client
import json
import math
import os
import re
import shutil
import sys
import urllib.request
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tinyserve import images, kept
from tinyserve.dataset import ANNOTATIONS, no_images, read_annotations, walk_images, with_label
from tinyserve.errors import DataError, ImageError, os_reason
from tinyserve.files import candidate
from tinyserve.images import is_image_name
from tinyserve.modelfile import HELD_OUT, Label
from training.notes import note, speaks

DEFAULT_ROOT = Path("data/tiny-imagenet-200")
URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
ZIP_BYTES = 248_100_043
ZIP_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"

HOLDOUT = 0.1
"""Share of the training images that is held out where there is no validation split."""

_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
"""Names that are meant for splits, not for classes."""
_WANTED = "wanted <class>/*, or train/<class>/* and val/<class>/*"
_CACHE_FOLDER = ".tinyserve-cache"
_CHUNK = 1 << 20


Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Split:
    """Images and what they show.

    ``images``: uint8 ``(n, size, size, 3)``, RGB. ``labels``: int64 ``(n,)``, indices into
    :attr:`Dataset.classes`.
    """

    images: Pixels
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class Dataset:
    name: str
    classes: tuple[Label, ...]
    train: Split
    val: Split
    held_out: NDArray[np.int64]
    """Indices into ``train`` of the images that are not to be trained on: where there is something
    here, they are what is in ``val``."""
    root: Path
    fingerprint: str
    """SHA-256 over the relative path and size of every file that was read: the same for every copy
    of the data. Damaged images that were left out do not count, as none of them can be held out,
    and neither does what is in ``val/`` where images are held out in its place."""

    @property
    def described(self) -> str:
        """The name, and how many images are held out."""
        held_out = f", {len(self.val):,}{HELD_OUT}" if len(self.held_out) else ""
        return self.name + held_out


def name_of(described: str) -> str:
    """The name in what :attr:`Dataset.described` says."""
    return described.removesuffix(held_out_of(described))


def held_out_of(described: str) -> str:
    """What :attr:`Dataset.described` says after the name; empty where nothing is held out."""
    found = re.search(rf", [0-9,]+{HELD_OUT}$", described)
    return found[0] if found else ""


def load(root: Path, *, image_size: int = 64, skip_bad: bool = False, holdout: int = 0) -> Dataset:
    """The data set below ``root``, every image resized to ``image_size`` x ``image_size``.

    ``holdout`` training images, evenly of all classes and always the same, become the validation
    split. So does :data:`HOLDOUT` of a tree that has no ``val/``. ``skip_bad`` leaves damaged
    images out instead of stopping. Raises :class:`DataError` where the layout is not understood, a
    split has no images, or an image is damaged.
    """
    if not root.is_dir():
        raise DataError(f"no such folder: {root}")
    train_folder = root / "train"
    if not train_folder.is_dir():
        if (root / "val").is_dir():
            raise DataError(f"{root} has a folder val/, but no train/: {_WANTED}")
        train_folder = root
    names = sorted(
        entry.name
        for entry in train_folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    )
    if not names:
        raise DataError(f"{train_folder} has no class folders: {_WANTED}")
    if len(names) == 1:
        raise DataError(f"{train_folder} has one class folder, {names[0]}/: wanted two or more")
    if _SPLITS.issuperset(name.lower() for name in names):
        raise DataError(
            f"{train_folder} has the folders {', '.join(names)}, which look like splits, not like "
            "classes: name them train and val"
        )
    index = {name: position for position, name in enumerate(names)}
    train_files = [
        (path, index[name]) for name in names for path in walk_images(train_folder / name)
    ]
    if not train_files:
        raise DataError(no_images(train_folder))
    if empty := sorted(set(names) - {names[label] for _, label in train_files}):
        note(f"class folders without training images: {_some(empty)}")
    has_val = (root / "val").is_dir() and not holdout
    _note_others([*(train_folder / name for name in names), *([root / "val"] if has_val else [])])
    _note_loose(train_folder)
    _note_deep(train_folder, train_files, names)
    train, train_files = _decode_split(root, "train", train_files, image_size, skip_bad=skip_bad)

    val_files: list[tuple[str, int]] = []
    held_out = np.array([], dtype=np.int64)
    if has_val:
        val_files = _val_files(root / "val", index)
        if not val_files:
            raise DataError(no_images(root / "val"))
        val, val_files = _decode_split(root, "val", val_files, image_size, skip_bad=skip_bad)
        _warn_of_duplicates(train.images, val)
    else:
        held_out = _evenly(train.labels, holdout or math.ceil(HOLDOUT * len(train)))
        val = Split(train.images[held_out], train.labels[held_out])
        why = "" if holdout else f"{root} has no val/: "
        note(f"{why}{len(val):,} of {len(train):,} training images are held out for validation")
        if not holdout:
            _note_other_splits(root)
        rest = np.setdiff1d(np.arange(len(train)), held_out)
        _note_classes(
            "classes of which all images are held out, so that they are not learnt",
            names,
            val.labels,
            train.labels[rest],
        )
        _warn_of_duplicates((train.images[place] for place in rest), val)
    if not holdout:
        trained = np.delete(train.labels, held_out)
        _note_classes("classes without validation images", names, trained, val.labels)
    return Dataset(
        name=root.absolute().name,
        root=root,
        classes=_labels(root, names),
        train=train,
        val=val,
        held_out=held_out,
        fingerprint=_fingerprint(root, train_files + val_files, with_time=False),
    )


def _note_others(folders: Iterable[Path]) -> None:
    """Say how many files below folders are left out, as none of the formats that are read; hidden
    files and texts are not meant to be."""
    count, suffixes = 0, set()
    for folder in folders:
        for _, _, names in os.walk(folder):
            for name in names:
                suffix = os.path.splitext(name)[1].lower()
                if not (is_image_name(name) or name.startswith(".") or suffix == ".txt"):
                    count += 1
                    suffixes.add(suffix or "no suffix")
    if count:
        what = (
            "1 file is no image that is"
            if count == 1
            else f"{count:,} files are no images that are"
        )
        note(f"{what} known here ({_some(sorted(suffixes))}), and left out")


def _note_loose(folder: Path) -> None:
    """Say how many images are beside the class folders, where none has a class."""
    count = sum(
        is_image_name(entry.name) and not entry.name.startswith(".") and entry.is_file()
        for entry in folder.iterdir()
    )
    if count:
        what = "1 image is" if count == 1 else f"{count:,} images are"
        note(f"{what} in no class folder but in {folder} itself, and left out")


def _note_deep(root: Path, files: Iterable[tuple[str, int]], names: list[str]) -> None:
    """Say how many images will have another label when they are classified."""
    known = set(names)

    def served(folder: str) -> str | None:
        item = with_label(os.path.join(folder, "1.jpg"), root=os.path.abspath(root))
        return next((name for name in item.possible_labels if name in known), None)

    folders: dict[tuple[str, int], int] = {}
    for path, label in files:
        folder = os.path.dirname(path), label
        folders[folder] = folders.get(folder, 0) + 1
    count = sum(
        images for (folder, label), images in folders.items() if served(folder) != names[label]
    )
    if count:
        what = "1 image lies" if count == 1 else f"{count:,} images lie"
        note(
            f"{what} inside of class folders in folders named as another class: tinyserve classify "
            "takes them for that, the nearest"
        )


def _note_other_splits(root: Path) -> None:
    """Say what may be meant for a validation split, where there is none of that name."""
    if found := [
        entry.name
        for entry in sorted(root.iterdir())
        if entry.name.lower() in _SPLITS - {"train", "val"} and entry.is_dir()
    ]:
        note(f"not read: {_some([f'{name}/' for name in found])}; name a validation split val/")


def _note_classes(
    what: str, names: list[str], of: NDArray[np.int64], without: NDArray[np.int64]
) -> None:
    """Say which classes that have images among ``of`` have none among ``without``."""
    if missing := np.setdiff1d(of, without).tolist():
        note(f"{what}: {_some([names[label] for label in missing])}")


def _evenly(labels: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Indices of ``count`` images, drawn at random, but the same share of every class."""
    if not 0 < count < len(labels):
        raise DataError(f"cannot hold {count:,} of {len(labels):,} training images out")
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    sizes = np.bincount(labels)
    starts = np.cumsum(sizes) - sizes
    place = np.arange(len(labels)) - starts[labels[order]]
    # The image in the middle of the n-th k-th of its class comes n-th of its class: no class gives
    # its last image before every other has given the same share.
    share = (place + 0.5) / sizes[labels[order]]
    return np.sort(order[np.argsort(share, kind="stable")[:count]])


def _warn_of_duplicates(train: Iterable[Pixels], val: Split) -> None:
    """Say how many validation images are training images, too, pixel for pixel."""
    digests = {hashlib.blake2b(image.data, digest_size=16).digest() for image in train}
    twice = sum(
        hashlib.blake2b(image.data, digest_size=16).digest() in digests for image in val.images
    )
    if twice:
        note(f"{twice:,} of {len(val):,} validation images are training images, too")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def locate(root: Path | None) -> Path:
    """The folder to read: the one given, or Tiny ImageNet's, downloaded if it is not there yet."""
    if root is not None:
        return root
    if not DEFAULT_ROOT.is_dir():
        download(DEFAULT_ROOT)
    return DEFAULT_ROOT


def download(
    root: Path, *, url: str = URL, md5: str = ZIP_MD5, size: int = ZIP_BYTES, timeout: float = 10
) -> None:
    """Fetch a zip that holds one folder of the name of ``root`` and unpack it there.

    Goes on where an earlier download stopped, checks size and MD5 before it unpacks, and makes
    ``root`` appear complete or not at all. ``timeout`` in seconds. Raises :class:`DataError`.
    """
    archive = root.with_name(root.name + ".zip.part")
    archive.parent.mkdir(parents=True, exist_ok=True)
    _fetch(url, archive, size, timeout, wanted=root)
    if (have := archive.stat().st_size) < size:
        raise DataError(f"{url} broke off after {have:,} of {size:,} bytes; try again to go on")
    digest = hashlib.md5(usedforsecurity=False)
    with archive.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if archive.stat().st_size != size or digest.hexdigest() != md5:
        archive.unlink()
        raise DataError(
            f"{url} is not the file expected (MD5 {digest.hexdigest()}); removed, try again"
        )
    unpacked = root.with_name(root.name + ".unpacking")
    shutil.rmtree(unpacked, ignore_errors=True)
    with zipfile.ZipFile(archive) as bundle:
        for member in tqdm(bundle.infolist(), desc="unpack", unit="file", disable=None):
            bundle.extract(member, unpacked)
    os.replace(unpacked / root.name, root)
    shutil.rmtree(unpacked)
    archive.unlink()


def _fetch(url: str, archive: Path, size: int, timeout: float, *, wanted: Path) -> None:
    have = archive.stat().st_size if archive.exists() else 0
    if have >= size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            if have and response.status != 206:  # the server starts over, so must we
                have = 0
            bar = tqdm(
                total=size, initial=have, desc="download", unit="B", unit_scale=True, disable=None
            )
            with archive.open("ab" if have else "wb") as file, bar:
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
    except (OSError, http.client.HTTPException) as error:  # no network, cut off, disk full
        raise DataError(
            f"cannot download {url} ({getattr(error, 'reason', error)}); "
            f"unpack tiny-imagenet-200.zip into {wanted}, or name another folder with --data"
        ) from error


def _val_files(folder: Path, index: dict[str, int]) -> list[tuple[str, int]]:
    annotations = folder / ANNOTATIONS
    if annotations.exists():
        labels = read_annotations(annotations)
        named = [(path, labels.get(os.path.basename(path), "")) for path in walk_images(folder)]
    else:
        _note_loose(folder)
        named = [
            (path, entry.name)
            for entry in sorted(folder.iterdir())
            if entry.is_dir() and not entry.name.startswith(".")
            for path in walk_images(entry)
        ]
    unknown = sorted({label for _, label in named} - index.keys())
    if unknown:
        raise DataError(f"{folder}: not a class of train/: {', '.join(map(repr, unknown[:5]))}")
    return [(path, index[label]) for path, label in named]


def _labels(root: Path, names: list[str]) -> tuple[Label, ...]:
    """Labels of the class folders: with words.txt, folders are WordNet ids and get their words."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{root}: the name of the class folder {name!r} is not UTF-8"
            ) from error
    words = root / "words.txt"
    if not words.exists():
        return tuple(Label(wnid=None, name=name) for name in names)
    first_word = {}
    try:
        lines = words.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{words} is not UTF-8") from error
    for line in lines:
        wnid, _, synonyms = line.partition("\t")
        first_word[wnid] = synonyms.partition(",")[0].strip()
    return tuple(Label(wnid=name, name=first_word.get(name) or name) for name in names)


def _decode_split(
    root: Path, split: str, files: list[tuple[str, int]], size: int, *, skip_bad: bool
) -> tuple[Split, list[tuple[str, int]]]:
    """The images of a split, and those of ``files`` that they are of."""
    key = _fingerprint(root, files, with_time=True)[:16]
    folder = cache_folder(root)
    array_path = folder / f"{split}-{size}px-{key}.npy"
    bad_path = array_path.with_suffix(".bad.json")
    kept = array_path.exists()
    if not kept:
        paths = [path for path, _ in files]
        try:
            # The array's own name appears last: where it exists, both files are complete.
            with candidate(array_path) as hidden:
                bad = _decode_into(hidden, paths, size, desc=f"decode {split}")
                bad_path.write_text(json.dumps(bad))
        except OSError as error:
            raise DataError(
                f"cannot keep the decoded images in {folder}: {os_reason(error)}"
            ) from error
    pixels: Pixels = np.load(array_path, mmap_mode="c")  # torch wants it writable
    labels = np.array([label for _, label in files], dtype=np.int64)
    bad = {int(position): reason for position, reason in json.loads(bad_path.read_text()).items()}
    if bad and kept:
        bad = _decode_again(array_path, bad_path, bad, files)
    if not bad:
        return Split(pixels, labels), files
    if not skip_bad:
        listed = "; ".join(f"{files[i][0]}: {reason}" for i, reason in list(bad.items())[:5])
        raise DataError(
            f"{len(bad)} of {len(files)} {split} images cannot be read ({listed}); "
            "--skip-bad goes on without them"
        )
    if speaks():
        for position, reason in bad.items():
            tqdm.write(f"skipped {files[position][0]}: {reason}", file=sys.stderr)
        tqdm.write(f"skipped {len(bad)} of {len(files)} {split} images", file=sys.stderr)
    if len(bad) == len(files):
        raise DataError(f"none of the {len(files)} {split} images below {root} can be read")
    good = np.setdiff1d(np.arange(len(files)), list(bad))
    return Split(pixels[good], labels[good]), [files[position] for position in good]


def _decode_again(
    array_path: Path, bad_path: Path, bad: dict[int, str], files: list[tuple[str, int]]
) -> dict[int, str]:
    """What is still wrong with images that could not be read: permissions and networks change, and
    a file's time and size do not show it."""
    array = np.load(array_path, mmap_mode="r+")
    left = {}
    for position in bad:
        try:
            array[position] = images.load(files[position][0], size=array.shape[1])
        except ImageError as error:
            left[position] = str(error)
    if left != bad:
        array.flush()
        bad_path.write_text(json.dumps(left))
    return left


def _decode_into(target: Path, paths: list[str], size: int, *, desc: str) -> dict[int, str]:
    """Decode all images into a new .npy file; returns position and reason of the damaged ones."""
    array = np.lib.format.open_memmap(
        target, mode="w+", dtype=np.uint8, shape=(len(paths), size, size, 3)
    )
    if hasattr(os, "posix_fallocate"):
        # Of a full disk a mapped file says nothing until the process is killed.
        with target.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, target.stat().st_size)
    bad = {}

    def decode(position: int) -> str | None:
        try:
            array[position] = images.load(paths[position], size=size)
        except ImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        reasons = pool.map(decode, range(len(paths)))
        bar = tqdm(reasons, total=len(paths), desc=desc, unit="image", disable=None)
        for position, reason in enumerate(bar):
            if reason is not None:
                bad[position] = reason
    array.flush()
    return bad


def cache_folder(root: Path) -> Path:
    """Where to keep what is computed from the data below ``root``: beside it, or in the user's
    cache folder where that is not writable."""
    beside = root / _CACHE_FOLDER
    with contextlib.suppress(OSError):
        beside.mkdir(exist_ok=True)
    if os.access(beside, os.W_OK):
        return beside
    user_cache = kept.folder()
    user_cache.mkdir(parents=True, exist_ok=True)
    return user_cache


def _fingerprint(root: Path, files: Iterable[tuple[str, int]], *, with_time: bool) -> str:
    digest = hashlib.sha256()
    # As walk_images gives paths. Of a hundred thousand, os.path.relpath would take seconds.
    above = os.path.join(root, "").removeprefix(f".{os.sep}")
    for path, label in files:
        try:
            status = os.stat(path)
            size, time = status.st_size, status.st_mtime_ns if with_time else 0
        except OSError:  # a link to nothing; decoding says so
            size, time = -1, 0
        name = path.removeprefix(above).replace(os.sep, "/")
        line = f"{name}\t{label}\t{size}\t{time}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
