"""The record beside an output (`out.json` for `out.nii.gz`): how it came about, and which bytes it speaks of.

The record is put in place first and the image last. So an image that is there is complete, and a record whose
`output_sha256` and `output_size_bytes` do not fit the image tells of a run that was cut between the two.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ctsr.errors import InputError, UsageError
from ctsr.io.atomic import OutputFile, PathLike, check_output, input_error, write_text
from ctsr.io.lists import VOLUME_SUFFIXES, stem

__all__ = [
    "check_image_output", "read_record", "read_sidecar", "record_first", "sha256_of", "sidecar_length", "sidecar_path",
    "write_record",
]  # fmt: skip

_LARGEST = 1 << 24  # bytes; dcm2niix writes a few kB


def sidecar_path(image: PathLike) -> Path:
    """Where the record of an image lies: out.json for out.nii.gz."""
    return Path(image).parent / f"{stem(image)}.json"


def read_sidecar(image: PathLike) -> dict[str, Any]:
    """What the JSON beside an image says; empty where there is none, InputError where it is damaged."""
    return read_record(sidecar_path(image))


def read_record(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none, InputError where it is damaged."""
    if not os.path.isfile(path):  # False too where the name is too long
        return {}
    try:
        if (size := path.stat().st_size) > _LARGEST:
            raise InputError(f"{size:,} bytes are too many for a record", path=path)
        found = json.loads(path.read_bytes().decode("utf-8-sig"), parse_constant=_refuse)
    except OSError as exc:
        raise input_error(exc, path) from exc
    except (ValueError, RecursionError) as exc:
        raise InputError("is not valid JSON", path=path, hint="mend it or move it away") from exc
    if not isinstance(found, dict):
        raise InputError("is not a JSON object", path=path, hint="mend it or move it away")
    return found


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def sidecar_length(sidecar: Mapping[str, Any], key: str) -> float | None:
    """A length in mm that a sidecar holds, such as SliceThickness; None where it is absent or no length."""
    value: Any = sidecar.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 < value < 1e3 else None


def write_record(path: PathLike, record: Mapping[str, Any], *, overwrite: bool) -> None:
    """Write a record as JSON, sorted and indented, so that `diff` compares two. ValueError on NaN."""
    text = json.dumps(record, indent=2, sort_keys=True, allow_nan=False)
    write_text(path, text + "\n", overwrite=overwrite)


def record_first(
    image: PathLike, record: Mapping[str, Any], *, overwrite: bool
) -> Callable[[OutputFile], None]:
    """A `before_commit` step that puts the record of `image` in place just before the image itself.

    `record` is read when the image is complete, so it may be filled while the image is being written.
    """

    def put_in_place(file: OutputFile) -> None:
        complete = {**record, "output_sha256": file.sha256, "output_size_bytes": file.size}
        write_record(sidecar_path(image), complete, overwrite=overwrite or _is_left_over(image))

    return put_in_place


def _is_left_over(image: PathLike) -> bool:
    """Whether a run was killed between its record and its image: a record without an image may go."""
    beside = [sidecar_path(image).with_suffix(suffix) for suffix in VOLUME_SUFFIXES]
    try:
        return not any(map(os.path.lexists, (image, *beside))) and "output_sha256" in read_sidecar(image)
    except InputError:
        return False


def check_image_output(image: PathLike, *, overwrite: bool, inputs: Iterable[PathLike] = ()) -> None:
    """`check_output` for an image and for its record, which must not be the sidecar of an input either."""
    inputs, record = list(inputs), sidecar_path(image)
    check_output(image, overwrite=overwrite, inputs=inputs)
    if os.path.realpath(record) in (os.path.realpath(sidecar_path(i)) for i in inputs):  # there or not yet
        raise UsageError("is the place of the input's sidecar, too", path=record, hint="name another output")
    check_output(record, overwrite=overwrite or _is_left_over(image))


def sha256_of(path: PathLike) -> str:
    """sha256 of a file's bytes, hexadecimal."""
    try:
        with open(os.fspath(path), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise input_error(exc, path) from exc
