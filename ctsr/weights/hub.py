"""Weights on the Hub: `hf://org/repo@revision/file.safetensors` becomes a checked file in a folder of ours.

What lies in the folder is used as it is, and nobody is asked; only what is not there is downloaded. The client
compares no checksum, so a file is hashed here, when it arrives and whenever it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ctsr.errors import CtsrError, NetworkError, ResourceError, UsageError, WeightsError
from ctsr.io.atomic import input_error, output_error, sweep, write_bytes, write_text

__all__ = [
    "Progress", "Reference", "cache_folder", "download", "read", "record_of", "resolve", "store", "stored",
]  # fmt: skip

TIMEOUT = 60.0  # seconds without progress
SLOWEST = 1000  # bytes/s over that time; less is no progress
WAITS = (1.0, 2.0, 4.0)  # seconds before another try
BUSY = (408, 429, 500, 502, 503, 504)
PIECE = 1 << 16  # bytes; the client's own, 10 MiB, would hide for minutes that something arrives

_NAME = r"[A-Za-z0-9_][\w.-]*"
_FILE = rf"(?:{_NAME}/)*{_NAME}\.safetensors"
_REFERENCE = re.compile(rf"hf://({_NAME}/{_NAME})(?:@({_NAME}))?/({_FILE})", re.ASCII)
_ACCESS = ("access denied", "accept the terms on the model's page, then set HF_TOKEN")
_REASONS = {
    "GatedRepoError": _ACCESS,
    "RepositoryNotFoundError": ("no such repository, or a private one", "check it; if private, set HF_TOKEN"),
    "RevisionNotFoundError": ("the repository has no such revision", "a branch, a tag or a commit"),
    "RemoteEntryNotFoundError": ("the repository has no such file in this revision", "check its name"),
    "HFValidationError": ("not a name that the hub allows", "hf://org/repo@revision/file.safetensors"),
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

    def on_answer(found: Any) -> Record:
        named = sha256 or found.etag or ""
        if not found.commit_hash or not found.size:
            raise NetworkError("not the answer of a hub: no commit or no size in it", path=str(reference))
        if not re.fullmatch("[0-9a-f]{64}", named):
            raise NetworkError("the hub names no sha256 for it (no LFS file)", path=str(reference))
        if (free := shutil.disk_usage(root).free) < found.size:
            raise ResourceError(f"{_mb(found.size)} are needed, {_mb(free)} are free", path=root)
        record = {"reference": str(reference), "commit": found.commit_hash, "sha256": named}
        record |= {"bytes": found.size, "is_pinned": bool(sha256), "licence": licence}
        progress(record, 0)
        return record

    sweep(root)
    folder = root / f".ctsr-{os.getpid()}-{secrets.token_hex(3)}.part"
    with _in_cache(root):
        folder.mkdir(parents=True)
    try:
        for wait in (*WAITS, None):
            try:
                record = _fetch(reference, folder, timeout, on_answer, progress)
                break
            except _PassingError:
                if wait is None:
                    raise
                time.sleep(wait)
        data = (folder / reference.file).read_bytes()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _check_hash(data, record["sha256"], str(reference), "nothing was kept; download it again")
    store(data, reference, root, record)
    return record


class _PassingError(NetworkError):
    """The server was busy, or the connection broke: worth another try."""


def _fetch(
    reference: Reference, folder: Path, timeout: float, on_answer: Callable[[Any], Record], progress: Progress
) -> Record:
    """Let the client work in a thread, and watch what arrives: it would sleep through a Retry-After of an hour."""
    record: Record = {}
    failed: list[Exception] = []

    def work() -> None:
        try:
            _run_client(reference, folder, lambda found: record.update(on_answer(found)))
        except Exception as exc:
            failed.append(exc)

    thread = threading.Thread(target=work, daemon=True, name=f"download of {reference}")
    thread.start()
    where, done, seen, since = "", 0, 0, time.monotonic()
    try:
        while thread.is_alive():
            thread.join(0.1)
            if record:
                with contextlib.suppress(OSError):  # renamed meanwhile
                    done = max([done, *(path.stat().st_size for path in folder.rglob("*"))])
                where = f" at {done / 1e6:.1f} of {_mb(record['bytes'])}"
                progress(record, done)
            if done - seen > SLOWEST * timeout:
                seen, since = done, time.monotonic()
            elif time.monotonic() - since > timeout:
                reason = f"no progress for {timeout:g} s{where}"
                raise NetworkError(reason, path=str(reference), hint="try again")
    finally:
        if thread.is_alive():  # its next answer ends it; what it just began to write is removed by the caller
            shutil.rmtree(folder, ignore_errors=True)
            thread.join(0.1)
    if failed:
        raise _as_ours(failed[0], reference, where) from failed[0]
    return record


def _run_client(reference: Reference, folder: Path, on_answer: Callable[[Any], None]) -> None:
    import huggingface_hub
    from huggingface_hub import constants, utils

    client, screen = cast(Any, huggingface_hub), cast(Any, utils)  # typed in part
    constants.HF_HUB_DISABLE_TELEMETRY = True
    constants.HF_HUB_DISABLE_XET = True  # plain HTTP, so that the folder shows what has arrived
    constants.DOWNLOAD_CHUNK_SIZE = PIECE
    screen.logging.set_verbosity_error()
    screen.disable_progress_bars()
    if (token := client.get_token()) and not re.fullmatch(r"[\x21-\x7e]+", token):  # its error would print it
        raise UsageError("HF_TOKEN, or the token file, has characters that no token has")

    def check_answer(response: Any) -> None:
        if not folder.is_dir():  # given up meanwhile: the client would make the folder again
            raise NetworkError("given up", path=str(reference))
        if response.status_code == 200 and "text/html" in response.headers.get("Content-Type", ""):
            reason = "the server sent a web page, not weights"
            raise NetworkError(reason, path=str(reference), hint="a proxy, or a login page?")

    session = client.get_session()
    session.event_hooks = session.event_hooks | {"response": [check_answer]}
    at = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None  # the client has read it when it was imported
    url = client.hf_hub_url(reference.repo, reference.file, revision=reference.revision, endpoint=at)
    found = client.get_hf_file_metadata(url, token=token, endpoint=at)
    on_answer(found)
    what = {"revision": found.commit_hash, "local_dir": folder, "token": token, "endpoint": at}
    client.hf_hub_download(reference.repo, reference.file, **what)


def _as_ours(exc: BaseException, reference: Reference, where: str) -> Exception:
    """The error that the client's failure stands for, in our words: the client's may hold a token."""
    if isinstance(exc, CtsrError):
        return exc
    if type(exc).__name__ == "LocalEntryNotFoundError" and exc.__cause__:  # its advice hides the reason
        exc = exc.__cause__
    if isinstance(exc, OSError) and exc.errno:  # the client's own have no number: it is the disk
        return output_error(exc, cache_folder())
    status, path = getattr(getattr(exc, "response", None), "status_code", None), str(reference)
    if known := _REASONS.get(type(exc).__name__) or (_ACCESS if status in (401, 403) else None):
        return NetworkError(known[0], path=path, hint=known[1])
    if status in BUSY:
        return _PassingError(f"the server is busy ({status})", path=path, hint="try later")
    if status is not None:
        return NetworkError(f"the server answers {status}", path=path, hint="check the name, and HF_ENDPOINT")
    if type(exc).__name__ in ("ReadError", "RemoteProtocolError"):  # reset, or ended early
        return _PassingError(f"connection lost{where}", path=path, hint="try again")
    root: BaseException | None = exc
    while root is not None and not getattr(root, "strerror", None):
        root = root.__cause__ or root.__context__
    reason = "connection lost" + where if where else "no connection to the hub"
    cause = getattr(root, "strerror", type(exc).__name__)
    return NetworkError(f"{reason}: {cause}", path=path, hint="try again")


@contextlib.contextmanager
def _in_cache(root: Path) -> Iterator[None]:
    """A failure in here is about the folder, whatever kind of failure it is."""
    try:
        yield
    except (OSError, UsageError, ResourceError) as exc:
        reason = exc.reason if isinstance(exc, CtsrError) else output_error(exc, root).reason
        raise ResourceError(reason, path=root, hint="set CTSR_CACHE, or --to DIR") from exc


def _check_hash(data: bytes, expected: str, path: str | Path, hint: str) -> None:
    if (found := hashlib.sha256(data).hexdigest()) != expected:
        raise WeightsError(f"sha256 is {found}, expected {expected}", path=path, hint=hint)


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
