"""Weights on the Hub: `hf://org/repo@revision/file.safetensors` becomes a checked file in a folder of ours.

What lies in the folder is used as it is, and nobody is asked; only what is not there is downloaded: one request, whose
answer is held in memory and hashed before it gets a name. The Hub's own client would compare no checksum, wait as long
as a server says, and leave partial files; its session and its token are used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctsr import __version__
from ctsr.errors import CtsrError, NetworkError, ResourceError, UsageError, WeightsError
from ctsr.io.atomic import input_error, output_error, write_bytes, write_text

__all__ = [
    "Progress", "Reference", "cache_folder", "download", "read", "record_of", "resolve", "store", "stored",
]  # fmt: skip

TIMEOUT = 60.0  # seconds without progress
SLOWEST = 1000  # bytes/s over that time; less is no progress
WAITS = (1.0, 2.0, 4.0)  # seconds before another try
BUSY = (408, 429, 500, 502, 503, 504)

_NAME = r"[A-Za-z0-9_][\w.-]*"
_FILE = rf"(?:{_NAME}/)*{_NAME}\.safetensors"
_REFERENCE = re.compile(rf"hf://({_NAME}/{_NAME})(?:@({_NAME}))?/({_FILE})", re.ASCII)
_ACCESS = ("access denied", "accept the terms on the model's page, then set HF_TOKEN")
_REFUSALS = {  # by X-Error-Code, or by status
    "GatedRepo": _ACCESS,
    "RepoNotFound": ("no such repository, or a private one", "check it; if private, set HF_TOKEN"),
    "RevisionNotFound": ("the repository has no such revision", "a branch, a tag or a commit"),
    "EntryNotFound": ("the repository has no such file in this revision", "check its name"),
    401: _ACCESS,
    403: _ACCESS,
}

Record = dict[str, Any]
Progress = Callable[[Record, int], None]


@dataclass(frozen=True, slots=True)
class Reference:
    """A file on the Hub. revision: a branch, a tag or a commit."""

    repo: str
    revision: str
    file: str

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Take `hf://…` apart; without `@revision` it is main. Raises UsageError."""
        if (found := _REFERENCE.fullmatch(text)) is None:
            raise UsageError("is not hf://org/repo@revision/file.safetensors", path=text)
        return cls(found[1], found[2] or "main", found[3])

    def __str__(self) -> str:
        return f"hf://{self.repo}@{self.revision}/{self.file}"

    def under(self, root: Path) -> Path:
        """Where it lies in a folder of ours."""
        return root / f"{self.repo}@{self.revision}" / self.file

    def record(self, root: Path) -> Path:
        """Where its record lies."""
        return self.under(root).with_name(Path(self.file).name + ".json")


def cache_folder() -> Path:
    """CTSR_CACHE, else the user's cache."""
    if given := os.environ.get("CTSR_CACHE"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctsr"
    except RuntimeError as exc:
        raise ResourceError("no home folder to keep downloaded weights in", hint="set CTSR_CACHE") from exc


def resolve(reference: str) -> Path:
    """The checked file that `hf://…` stands for; downloaded if it is not in the cache.

    Raises UsageError (it does not parse), NetworkError, ResourceError (the cache), WeightsError (altered, foreign).
    """
    parsed, root = Reference.parse(reference), cache_folder()
    if record_of(parsed, root):
        read(parsed, root)
    else:
        download(parsed, root)
    return parsed.under(root)


def record_of(reference: Reference, root: Path) -> Record:
    """What was noted when the file came (commit, sha256, bytes, is_pinned, licence); empty where it is not there."""
    try:
        record = json.loads(reference.record(root).read_text("utf-8"))
        is_ours = isinstance(record["sha256"], str) and isinstance(record["bytes"], int)
        return record if is_ours and reference.under(root).is_file() else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def stored(root: Path) -> list[Reference]:
    """What lies in a folder of ours."""
    paths = (path.relative_to(root).as_posix() for path in sorted(root.glob("*/*@*/**/*.safetensors")))
    parsed = [Reference.parse(f"hf://{path}") for path in paths if _REFERENCE.fullmatch(f"hf://{path}")]
    return [reference for reference in parsed if record_of(reference, root)]


def read(reference: Reference, root: Path, *, sha256: str = "") -> bytes:
    """The bytes of a file in a folder of ours. Raises WeightsError where it is not there, or altered.

    sha256: pinned; else the record's.
    """
    path = reference.under(root)
    if not (record := record_of(reference, root)):
        raise WeightsError(f"not in {root}", path=str(reference), hint=f"ctsr download-weights {reference}")
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise WeightsError(input_error(exc, path).reason, path=path) from exc
    _check_hash(data, sha256 or record["sha256"], path, f"ctsr download-weights {reference} mends it")
    return data


def store(data: bytes, reference: Reference, root: Path, record: Record) -> None:
    """Check that the bytes are weights, and give them their name: the record first, the file last.

    A model of ours is checked whole; one of another layout is by whoever begins a training from it.
    """
    from ctsr.models import zoo

    metadata = zoo.read_header(data, str(reference)).get("__metadata__")
    if isinstance(metadata, dict) and "ctsr.format" in metadata:
        zoo.unpack(data, str(reference))
    text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    with _in_cache(root):
        reference.under(root).parent.mkdir(parents=True, exist_ok=True)
        write_text(reference.record(root), text, overwrite=True)
        write_bytes(reference.under(root), data, overwrite=True)


def download(
    reference: Reference,
    root: Path,
    *,
    sha256: str = "",
    licence: str = "not known here",
    timeout: float = TIMEOUT,
    progress: Progress = lambda record, done: None,
) -> Record:
    """Download, check and store a file, or leave nothing behind; returns its record.

    sha256: pinned; else the one that the hub names is checked. timeout: seconds without progress.
    progress: called with the record and the bytes that have come, first before any does.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        hint = "ctsr download-weights --to FOLDER where there is a network, then --from FOLDER here"
        raise NetworkError("not here, and HF_HUB_OFFLINE is set", path=str(reference), hint=hint)
    with _in_cache(root):
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
    record: Record = {"reference": str(reference), "is_pinned": bool(sha256), "licence": licence}

    def accept(found: Record) -> Record:
        if not re.fullmatch("[0-9a-f]{64}", sha256 or found["sha256"]):
            raise NetworkError("the hub names no sha256 for it (no LFS file)")
        if found["bytes"] > free:
            raise ResourceError(f"{_mb(found['bytes'])} are needed, {_mb(free)} are free", path=root)
        record.update(found | {"sha256": sha256 or found["sha256"]})
        return record

    for wait in (*WAITS, None):
        try:
            data = _fetch(reference, timeout, accept, progress)
            break
        except NetworkError as exc:
            exc.path = str(reference)
            if wait is None or not isinstance(exc, _PassingError):
                raise
            time.sleep(wait)
    _check_hash(data, record["sha256"], str(reference), "nothing was kept; download it again")
    store(bytes(data), reference, root, record)
    return record


class _PassingError(NetworkError):
    """The server was busy, or the connection broke: worth another try."""


def _fetch(
    reference: Reference, timeout: float, accept: Callable[[Record], Record], progress: Progress
) -> bytearray:
    """The bytes of a file; `accept` is asked when its commit, size and sha256 are known, before they come."""
    import huggingface_hub

    if (token := huggingface_hub.get_token()) and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise UsageError(
            "HF_TOKEN, or the token file, has characters that no token has"
        )  # a client's error shows it
    at = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    url = f"{at}/{reference.repo}/resolve/{reference.revision}/{reference.file}"
    headers = {"User-Agent": f"ctsr/{__version__}", "Accept-Encoding": "identity"}
    headers |= (
        {"Authorization": f"Bearer {token}"} if token else {}
    )  # a redirect to another host takes none along
    session: Any = huggingface_hub.get_session()
    data, where, seen, since = bytearray(), "", 0, time.monotonic()
    try:
        with session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as answer:
            record = accept(_facts(answer))
            progress(record, 0)
            for piece in answer.iter_bytes():
                data += piece
                where = f" at {len(data) / 1e6:.1f} of {_mb(record['bytes'])}"
                progress(record, len(data))
                if len(data) - seen > SLOWEST * timeout:
                    seen, since = len(data), time.monotonic()
                if len(data) > record["bytes"]:
                    break
                if time.monotonic() - since > timeout:
                    raise TimeoutError
    except CtsrError:
        raise
    except (
        Exception
    ) as exc:  # the kinds of its errors change with the client's version; their words may hold a token
        kind = type(exc).__name__
        if kind.endswith(("Timeout", "TimeoutError")):
            raise NetworkError(f"no progress for {timeout:g} s{where}", hint="try again") from exc
        if kind in ("ReadError", "RemoteProtocolError"):  # reset, or ended early
            raise _PassingError(f"connection lost{where}", hint="try again") from exc
        cause: BaseException | None = exc
        while cause is not None and not getattr(cause, "strerror", None):
            cause = cause.__cause__ or cause.__context__
        words = getattr(cause, "strerror", kind)
        raise NetworkError(f"no connection to the hub: {words}", hint="try again") from exc
    if len(data) < record["bytes"]:
        raise _PassingError(f"connection lost{where}", hint="try again")
    return data


def _facts(answer: Any) -> Record:
    """Commit, bytes and sha256 of a file, as the hub names them; NetworkError where it refuses, or is no hub."""
    status, headers = answer.status_code, answer.headers
    if found := _REFUSALS.get(headers.get("X-Error-Code", "")) or _REFUSALS.get(status):
        raise NetworkError(found[0], hint=found[1])
    if status in BUSY:
        raise _PassingError(f"the server is busy ({status})", hint="try later")
    if status != 200:
        raise NetworkError(f"the server answers {status}", hint="check the name, and HF_ENDPOINT")
    if "text/html" in headers.get("Content-Type", ""):
        raise NetworkError("the server sent a web page, not weights", hint="a proxy, or a login page?")
    hops = [hop.headers for hop in (*answer.history, answer) if "X-Repo-Commit" in hop.headers]
    told = hops[-1] if hops else {}  # where the hub redirects to, nobody knows the commit
    size = (told.get("X-Linked-Size") or headers.get("Content-Length", "")) if told else ""
    if not size.isdecimal() or int(size) == 0:
        raise NetworkError("not the answer of a hub: no commit or no size in it")
    sha256 = (told.get("X-Linked-Etag") or told.get("ETag", "")).strip('"')
    return {"commit": told["X-Repo-Commit"], "bytes": int(size), "sha256": sha256}


@contextlib.contextmanager
def _in_cache(root: Path) -> Iterator[None]:
    """A failure in here is about the folder, whatever kind of failure it is."""
    try:
        yield
    except (OSError, UsageError, ResourceError) as exc:
        reason = exc.reason if isinstance(exc, CtsrError) else output_error(exc, root).reason
        raise ResourceError(reason, path=root, hint="set CTSR_CACHE, or --to DIR") from exc


def _check_hash(data: bytes | bytearray, expected: str, path: str | Path, hint: str) -> None:
    if (found := hashlib.sha256(data).hexdigest()) != expected:
        raise WeightsError(f"sha256 is {found}, expected {expected}", path=path, hint=hint)


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
