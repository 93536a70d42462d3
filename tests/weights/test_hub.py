"""A file of the Hub is here whole and checked, or it is not here, and one line says why."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ctsr.errors import NetworkError, ResourceError, UsageError, WeightsError
from ctsr.weights import hub, registry
from ctsr.weights.hub import Reference
from tests.models.test_zoo import model
from tests.weights.local_hub import COMMIT, prepare, running

TEXT = "hf://org/repo@main/m.safetensors"
REFERENCE = Reference.parse(TEXT)


@pytest.fixture(scope="module")
def data():
    return model()


@pytest.fixture
def server(data, tmp_path, monkeypatch):
    """A fresh one for each test: a transfer that an earlier one gave up may still ask its own."""
    with running(data) as server:
        prepare(monkeypatch, server, tmp_path)
        yield server


def files(tmp_path: Path) -> list[str]:
    return sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())


def test_a_reference_is_taken_apart_and_put_together():
    found = Reference.parse("hf://org/a.repo-1@v1.0/sub/m.safetensors")
    assert found == Reference("org/a.repo-1", "v1.0", "sub/m.safetensors")
    assert Reference.parse(str(found)) == found
    assert Reference.parse("hf://org/repo/m.safetensors") == REFERENCE


@pytest.mark.parametrize(
    "text",
    [
        "hf://", "hf://org/m.safetensors", "hf://org/repo@main/m.ckpt", "hf://org/repo@/m.safetensors",
        "hf://org/repo@main/../../m.safetensors", "hf://../repo@main/m.safetensors", "hf://org/repo@../m.safetensors",
        "hf://org/repo@main//m.safetensors", "HF://org/repo/m.safetensors", "hf://org/repo@main/m.safetensors\n",
        "hf://örg/repo/m.safetensors", "hf:/org/repo/m.safetensors", "hf://org/repo@main/m.safetensors?x",
    ],
)  # fmt: skip
def test_what_is_no_reference_is_a_usage_error(text):
    with pytest.raises(UsageError, match=r"is not hf://org/repo@revision/file\.safetensors"):
        Reference.parse(text)


def test_a_file_is_downloaded_once_and_then_nobody_is_asked(server, tmp_path):
    path = hub.resolve(TEXT)
    assert path.read_bytes() == server.data
    assert files(tmp_path) == ["cache/org/repo@main/m.safetensors", "cache/org/repo@main/m.safetensors.json"]
    record = json.loads(path.with_name("m.safetensors.json").read_text())
    assert record == {
        "reference": TEXT, "commit": COMMIT, "sha256": server.sha256, "bytes": len(server.data), "is_pinned": False,
        "licence": "not known here",
    }  # fmt: skip
    assert {entry[1] for entry in server.log} <= {
        f"/org/repo/resolve/{r}/m.safetensors" for r in ("main", COMMIT)
    }
    server.log.clear()
    assert hub.resolve(TEXT) == path
    network, _ = registry.load_model(TEXT, kind="baseline")
    assert isinstance(network, torch.nn.Module)
    assert server.log == []


def test_a_redirect_takes_no_token_along(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with running(server.data) as server.cdn:
        assert hub.resolve(TEXT).read_bytes() == server.data
    assert any("hf_secret" in str(entry[2]) for entry in server.log)
    assert server.cdn.asked("GET") == 1
    assert not any("hf_secret" in str(entry) for entry in server.cdn.log)


@pytest.mark.parametrize(
    ("reference", "method", "fault", "words"),
    [
        ("hf://org/other/m.safetensors", "", {}, "no such repository, or a private one"),
        ("hf://org/repo@v2/m.safetensors", "", {}, "the repository has no such revision"),
        ("hf://org/repo/n.safetensors", "", {}, "the repository has no such file in this revision"),
        ("hf://org/re..po/n.safetensors", "", {}, "not a name that the hub allows"),
        (TEXT, "HEAD", {"status": 404}, "the server answers 404"),
        (TEXT, "HEAD", {"missing": "repository", "status": 401}, "no such repository, or a private one"),
        (TEXT, "HEAD", {"missing": "gated", "status": 403}, "access denied .*then set HF_TOKEN"),
        (TEXT, "HEAD", {"status": 401}, "access denied .*then set HF_TOKEN|no such repository"),
        (TEXT, "GET", {"status": 403}, "access denied .*then set HF_TOKEN"),
        (TEXT, "HEAD", {"status": 503}, r"the server is busy \(503\) \(try later\)"),
        (TEXT, "GET", {"status": 500}, r"the server is busy \(500\)"),
        (TEXT, "HEAD", {"without": ["X-Repo-Commit"]}, "not the answer of a hub"),
        (TEXT, "HEAD", {"size": 0}, "not the answer of a hub"),
        (TEXT, "HEAD", {"etag": "abc"}, "the hub names no sha256"),
        (TEXT, "HEAD", {"headers": {"Content-Type": "text/html"}}, "a web page, not weights"),
        (
            TEXT,
            "GET",
            {"data": b"<html>Log in", "headers": {"Content-Type": "text/html; charset=utf-8"}},
            "a web page, not weights",
        ),
        (TEXT, "HEAD", {"size": 10**15}, "are needed, .* are free"),
        (TEXT, "HEAD", {"size": 10**5}, "connection lost at .* of 0.1 MB"),
        (TEXT, "GET", {"data": b"short"}, "connection lost at .* of 0.0 MB"),
        (TEXT, "GET", {"cut": 1000, "by": "reset"}, "connection lost at .* of 0.0 MB .try again"),
        (TEXT, "GET", {"cut": 1000, "by": "stall"}, "no progress for 1 s at 0.0 of 0.0 MB"),
        (TEXT, "GET", {"cut": 0}, "no progress for 1 s at|connection lost at"),
        (TEXT, "HEAD", {"wait": 5}, r"no progress for 1 s \(try again\)"),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v)),
)
def test_a_failure_leaves_nothing_and_says_why(
    server, tmp_path, monkeypatch, reference, method, fault, words
):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(hub, "TIMEOUT", 1.0)
    if method:
        server.fail(method, **fault)
    with pytest.raises((NetworkError, ResourceError), match=words) as told:
        hub.download(Reference.parse(reference), tmp_path / "cache", timeout=1.0 if "1 s" in words else 60.0)
    assert told.value.exit_code == (4 if "are free" in words else 6)
    assert "hf_secret" not in f"{told.value} {told.value.__cause__}"
    assert files(tmp_path) == []


def test_an_answer_that_comes_after_all_changes_nothing(server, tmp_path):
    server.fail("HEAD", times=1, wait=1.5)
    before = set(threading.enumerate())
    with pytest.raises(NetworkError, match="no progress for 1 s"):
        hub.download(REFERENCE, tmp_path / "cache", timeout=1.0)
    for thread in set(threading.enumerate()) - before:
        if TEXT in thread.name:
            thread.join(20)
    assert (server.asked("HEAD"), server.asked("GET"), files(tmp_path)) == (1, 0, [])


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_server_that_was_busy_once_is_asked_again(server, method):
    server.fail(method, times=1, status=503)
    assert hub.resolve(TEXT).read_bytes() == server.data


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_server_that_stays_busy_is_given_up_after_as_many_tries_as_there_are_waits(server, method):
    server.fail(method, status=503)
    with pytest.raises(NetworkError, match="busy"):
        hub.resolve(TEXT)
    assert server.asked(method) == len(hub.WAITS) + 1


@pytest.mark.parametrize("by", ["end", "reset"])
def test_a_connection_that_breaks_once_is_taken_up_again(server, by):
    server.fail("GET", times=1, cut=1000, by=by)
    assert hub.resolve(TEXT).read_bytes() == server.data


def test_a_refused_connection_and_an_unknown_host_are_network_errors(server, monkeypatch, tmp_path):
    for url, words in (("http://127.0.0.1:9", "onnection refused"), ("http://none.invalid", "no connection")):
        monkeypatch.setenv("HF_ENDPOINT", url)
        with pytest.raises(NetworkError, match=words):
            hub.resolve(TEXT)
    assert files(tmp_path) == []


@pytest.mark.parametrize("pin", ["", "0" * 64], ids=["the hub's sha256", "a pinned sha256"])
def test_other_bytes_than_those_named_are_refused(server, tmp_path, pin):
    if not pin:
        server.fail("GET", data=server.data[:-1] + bytes([server.data[-1] ^ 1]))
    with pytest.raises(WeightsError, match=f"sha256 is [0-9a-f]{{64}}, expected {pin or server.sha256}"):
        hub.download(REFERENCE, tmp_path / "cache", sha256=pin)
    assert files(tmp_path) == []


def test_a_pin_that_fits_is_recorded(server, tmp_path):
    assert hub.download(REFERENCE, tmp_path / "cache", sha256=server.sha256)["is_pinned"] is True


def altered(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_an_altered_file_in_the_cache_is_refused(server):
    altered(hub.resolve(TEXT))
    with pytest.raises(WeightsError, match=r"sha256 is .*, expected .*\(ctsr download-weights .* mends it"):
        hub.resolve(TEXT)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x80\x02pickle", "a pickle, not safetensors"),
        (b"PK\x03\x04" + bytes(9), "a pickle in a zip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html>", "a web page"),
        (model()[:-4], "damaged or truncated"),
        (model(ctsr_format="99"), "model format 99"),
    ],
    ids=["pickle", "zip", "LFS", "HTML", "cut", "format"],
)
def test_what_is_no_weights_is_refused_although_its_hash_fits(server, tmp_path, data, words):
    server.data = data
    server.fail("HEAD", etag=hashlib.sha256(data).hexdigest())
    with pytest.raises(WeightsError, match=words):
        hub.resolve(TEXT)
    assert files(tmp_path) == []


def test_weights_of_another_layout_are_kept(server):
    """A training may begin from them; whoever loads them checks their kind."""
    server.data = safetensors.torch.save({"encoder.conv_in.weight": torch.ones(2, 2)})
    server.fail("HEAD", etag=hashlib.sha256(server.data).hexdigest())
    assert hub.resolve(TEXT).read_bytes() == server.data
    with pytest.raises(WeightsError, match="not a ctsr model"):
        registry.load_model(TEXT, kind="baseline")


def test_without_a_network_only_what_is_here_is_used(server, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        NetworkError, match=r"not here, and HF_HUB_OFFLINE is set \(ctsr download-weights --to"
    ):
        hub.resolve(TEXT)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    path = hub.resolve(TEXT)
    server.log.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.resolve(TEXT) == path
    assert server.log == []


@pytest.mark.parametrize("token", ["hf_ä", "hf_a b", "hf_\x7f"])
def test_a_token_that_no_header_can_hold_is_never_sent_or_shown(server, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UsageError, match="characters that no token has") as told:
        hub.resolve(TEXT)
    assert token not in str(told.value)
    assert server.log == []


def test_a_cache_that_takes_nothing_is_named_before_the_network_is_asked(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CTSR_CACHE", str(tmp_path / "file"))
    with pytest.raises(ResourceError, match=r"file: .*\(set CTSR_CACHE, or --to DIR\)"):
        hub.resolve(TEXT)
    assert server.log == []


def test_what_a_killed_download_left_is_swept(server, tmp_path):
    orphan = tmp_path / "cache" / ".ctsr-4194304-abcdef.part"
    orphan.mkdir(parents=True)
    os.utime(orphan, (0, 0))
    hub.resolve(TEXT)
    assert not orphan.exists()


def test_a_published_name_is_used_from_the_cache_and_never_downloads(server, monkeypatch):
    entry = registry.Published("test", REFERENCE, "MIT", 1, server.sha256)
    monkeypatch.setitem(registry.PUBLISHED, "published", entry)
    with pytest.raises(
        WeightsError, match=r"not in .*\(ctsr download-weights hf://org/repo@main/m\.safetensors"
    ):
        registry.locate("published")
    assert server.log == []
    path = hub.resolve(TEXT)
    assert registry.locate("published") == path
    altered(path)
    with pytest.raises(WeightsError, match="sha256 is"):
        registry.locate("published")
