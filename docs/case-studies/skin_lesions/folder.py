"""A folder of pictures with a table of labels: what there is, what cannot be read, and a split into two halves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm.auto import tqdm

import clip_lens_ext as cle
from clip_lens_ext.data import IMAGE_SUFFIXES
from clip_lens_ext.errors import InputError, near

LEAST_OF_A_CLASS = 4
TRUE, FALSE = {"1", "1.0", "true", "yes"}, {"0", "0.0", "false", "no"}


@dataclass(frozen=True, eq=False)
class LabelledFolder:
    """Pictures of two classes.

    Attributes:
        files: one path for each picture.
        labels: 0 or 1, `[picture]`: the number of the class in `classes`.
        classes: the two names.
        annotations: what else the table says of each picture: name -> 0 or 1, `[picture]`. Only checks read them.
        skipped: every picture that was left out, and why.
    """

    files: tuple[Path, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, str]
    annotations: dict[str, NDArray[np.int64]]
    skipped: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def select(self, rows: NDArray[np.int64]) -> LabelledFolder:
        """Some of the pictures, by number."""
        return replace(
            self,
            files=tuple(self.files[row] for row in rows),
            labels=self.labels[rows],
            annotations={name: column[rows] for name, column in self.annotations.items()},
        )

    def split(self, share: float = 0.5, *, seed: int = 0) -> tuple[LabelledFolder, LabelledFolder]:
        """Pictures to train the classifier on and pictures to test it on, the same share of each class.

        Raises:
            InputError: a class has fewer than four pictures, or the share leaves one side without a class.
        """
        counts = np.bincount(self.labels, minlength=2)
        if counts.min() < LEAST_OF_A_CLASS:
            found = ", ".join(f"{n} of {name!r}" for n, name in zip(counts, self.classes, strict=True))
            raise InputError(f"each class needs {LEAST_OF_A_CLASS} pictures that can be read; there are {found}")
        rng = np.random.default_rng(seed)
        train: list[int] = []
        for label in (0, 1):
            rows = rng.permutation(np.flatnonzero(self.labels == label))
            n_train = round(share * len(rows))
            if not 2 <= n_train <= len(rows) - 2:
                raise InputError(
                    f"a share of {share} to train on leaves too few of the {len(rows)} {self.classes[label]!r}"
                )
            train += rows[:n_train].tolist()
        chosen = np.sort(np.array(train))
        return self.select(chosen), self.select(np.setdiff1d(np.arange(len(self)), chosen))


def read_folder(
    folder: Path,
    table: Path,
    classes: Sequence[str],
    *,
    annotations: Sequence[str] = (),
    file_column: str = "file",
    label_column: str = "label",
    progress: bool = True,
) -> LabelledFolder:
    """Read a table of labels, and open every picture once.

    A file that is missing or damaged, and a picture of a third class, is left out and named.

    Args:
        folder: where the files are; `file` is a path in it.
        table: CSV with a row for each picture.
        classes: the two labels that are told apart; the second is the one that a positive score speaks for.
        annotations: columns of 1 and 0 that say what else is on a picture. Only checks read them.
        file_column: the column of the files, with or without their suffix, and with or without the subfolder.
        label_column: the column of the labels.
        progress: draw a bar.

    Raises:
        InputError: no such folder or table, a column is missing, a file is there twice, an annotation is no 0 or 1, no
            picture can be read, or all that can be are of one class.
    """
    if len(classes) != 2 or classes[0] == classes[1]:
        raise InputError(f"two classes are told apart, got {list(classes)}")
    rows = _read_table(folder, table, (file_column, label_column, *annotations))
    files, labels, kept, skipped = [], [], [], []
    by_name, names = _by_name(folder), dict[Path, str]()
    for number, (name, label) in enumerate(
        tqdm(
            zip(rows[file_column], rows[label_column], strict=True),
            total=len(rows),
            desc="reading",
            disable=not progress,
        )
    ):
        if label not in classes:
            skipped.append(f"{name}: its label is {label!r}")
            continue
        try:
            path = _path(folder, name, by_name)
            cle.read_image(path)
        except InputError as error:
            skipped.append(f"{name}: {error}")
            continue
        if (same := path.resolve()) in names:
            raise InputError(f"{names[same]!r} and {name!r} are one picture, {path}: a picture has one label")
        names[same] = name
        files.append(path)
        labels.append(classes.index(label))
        kept.append(number)
    found = np.array(labels, dtype=np.int64)
    if len(np.unique(found)) < 2:
        there = f"all {len(found)} are {classes[labels[0]]!r}" if labels else "there is none"
        shown = "; ".join(skipped[:3])
        raise InputError(
            f"pictures of both {classes[0]!r} and {classes[1]!r} are needed, and {there}"
            f" ({len(skipped)} of {len(rows)} left out{': ' + shown if shown else ''})"
        )
    told = {name: _flags(name, rows[name].iloc[kept]) for name in annotations}
    return LabelledFolder(tuple(files), found, (classes[0], classes[1]), told, tuple(skipped))


def _read_table(folder: Path, table: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    if not folder.is_dir():
        raise InputError(f"there is no folder {str(folder)!r}")
    if not table.is_file():
        raise InputError(f"there is no table {str(table)!r}: a CSV with the columns {', '.join(columns)}")
    try:
        rows = pd.read_csv(table, dtype=str, keep_default_na=False, skipinitialspace=True)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the table {str(table)!r}: {error}") from error
    rows = rows.rename(columns=str.strip).apply(lambda column: column.str.strip())
    for needed in columns:
        if needed not in rows.columns:
            raise InputError(
                f"{str(table)!r} has no column {needed!r}{near(needed, rows.columns)}; "
                f"it has: {', '.join(rows.columns)}"
            )
    if rows.empty:
        raise InputError(f"{str(table)!r} has no rows")
    twice = rows[columns[0]][rows[columns[0]].duplicated()].tolist()
    if twice:
        raise InputError(f"{twice[0]!r} stands in {str(table)!r} more than once: a picture has one label")
    return rows


def _by_name(folder: Path) -> dict[str, list[Path]]:
    """The pictures of a folder and its subfolders, by name and by name without suffix."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            for name in (path.name, path.stem):
                found.setdefault(name, []).append(path)
    return found


def _path(folder: Path, name: str, by_name: dict[str, list[Path]]) -> Path:
    """The file of a row; tables of the public archives leave out the suffix, and the subfolder.

    Raises:
        InputError: several files have that name.
    """
    path = folder / name
    if path.is_file() or not name:
        return path
    found = by_name.get(name) or [one for one in by_name.get(path.name, []) if one.parent == path.parent]
    if len(found) > 1:
        there = ", ".join(str(one.relative_to(folder)) for one in found[:3])
        raise InputError(f"several files are called so ({there}): give the path in the folder, with its suffix")
    return found[0] if found else path


def _flags(name: str, column: pd.Series) -> NDArray[np.int64]:
    told = column.str.strip().str.lower()
    wrong = [value for value in told if value not in TRUE | FALSE]
    if wrong:
        raise InputError(f"the column {name!r} holds {wrong[0]!r}: an annotation is 1 or 0 for every picture")
    return told.isin(TRUE).to_numpy().astype(np.int64)
