"""`ctsr download-weights`, against a hub on loopback: what is shown, where files go, how it fails."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.io.make import affine_of, nifti, put
from tests.models.test_zoo import model
from tests.weights.local_hub import COMMIT, prepare, running

TEXT = "hf://org/repo@main/m.safetensors"


@pytest.fixture
def server(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with running(model()) as server:
        prepare(monkeypatch, server, tmp_path)
        yield server


def left(tmp_path: Path) -> list[str]:
    return sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())


def test_a_reference_is_fetched_shown_first_and_used_by_upsample(ctsr, server, tmp_path):
    done = ctsr("download-weights", TEXT)
    stored = tmp_path / "cache/org/repo@main/m.safetensors"
    assert (done.code, done.out) == (0, f"{stored}\n")
    assert done.err == (
        f"note: {TEXT}: commit {COMMIT}, {len(server.data) / 1e6:.1f} MB, sha256 {server.sha256} (not pinned: what"
        " the hub names), licence not known here\n"
    )
    assert left(tmp_path) == [
        f"cache/org/repo@main/{name}" for name in ("m.safetensors", "m.safetensors.json")
    ]
    server.log.clear()
    put(tmp_path / "here", nifti(np.zeros((16, 16, 6), np.int16), affine_of((0.7, 0.7, 2.5))), "in.nii")
    done = ctsr("upsample", "in.nii", "out.nii", "--checkpoint", TEXT)
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "here/out.json").read_text())
    assert (record["weights"], record["weights_sha256"]) == (TEXT, server.sha256)
    assert server.log == []


def test_a_download_that_is_tried_again_is_told_once(ctsr, server):
    server.fail("GET", times=2, status=503)
    assert ctsr("download-weights", TEXT).err.count("note: ") == 1
    assert server.asked("GET") == 3


def test_weights_travel_by_folder_to_a_machine_without_a_network(ctsr, server, monkeypatch):
    assert ctsr("download-weights", TEXT, "--to", "stick").out == "stick/org/repo@main/m.safetensors\n"
    server.log.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = ctsr("download-weights", TEXT)
    assert (done.code, done.out) == (6, "")
    assert "HF_HUB_OFFLINE is set (ctsr download-weights --to FOLDER" in done.err
    done = ctsr("download-weights", TEXT, "--from", "stick", "--json")
    (row,) = json.loads(done.out)["weights"]
    assert (row["sha256"], row["commit"], row["is_pinned"]) == (server.sha256, COMMIT, False)
    assert Path(row["path"]).read_bytes() == server.data
    assert ctsr("download-weights", "mri-autoencoder", "--from", "stick").code == 5
    assert server.log == []


def test_what_was_altered_is_found_and_mended(ctsr, server, tmp_path):
    stored = Path(ctsr("download-weights", TEXT).out.strip())
    done = ctsr("download-weights", "--verify")
    assert (done.code, done.out.count("whole")) == (0, 2)
    stored.write_bytes(server.data[:-1] + b"\x00")
    done = ctsr("download-weights", "--verify", "--json")
    states = {row["name"]: row["state"] for row in json.loads(done.out)["weights"]}
    assert (done.code, states["baseline"]) == (5, "whole")
    assert states[TEXT].startswith("sha256 is ")
    assert "1 of 2 are not whole" in done.err
    done = ctsr("download-weights", TEXT)
    assert done.code == 0
    assert stored.read_bytes() == server.data


def test_the_list_names_everything_and_asks_nobody(ctsr, server):
    rows = json.loads(ctsr("download-weights", "--list", "--json").out)["weights"]
    assert [row["name"] for row in rows] == ["baseline", "mri-autoencoder"]
    shown = ctsr("download-weights", "--list").out
    for words in (
        "inside the package",
        "hf://microsoft/mri-autoencoder-v0.1",
        "221 MB",
        "MIT",
        "not pinned",
        "main",
    ):
        assert words in shown
    assert server.log == []


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        ([], 2, "no weights named (ctsr download-weights --list shows them)"),
        (["baselin"], 2, "baselin: no weights of this name (did you mean baseline?)"),
        (["hf://org/m"], 2, "hf://org/m: is not hf://org/repo@revision/file.safetensors"),
        (["baseline", "--revision", "v2"], 2, "baseline: --revision has no meaning for it: it is inside the package"),
        ([TEXT, "--revision", "v2"], 6, "hf://org/repo@v2/m.safetensors: the repository has no such revision"),
        ([TEXT, "--revision", "../v2"], 2, "hf://org/repo@../v2/m.safetensors: is not hf://"),
        (["--all"], 6, "hf://microsoft/mri-autoencoder-v0.1@main/diffusion_pytorch_model.safetensors: no such rep"),
        ([TEXT, "--from", "nowhere"], 5, f"{TEXT}: not in nowhere"),
        (["--verify", TEXT], 5, f"{TEXT}: not in "),
        (["--verify", "--from", "stick"], 2, "--list and --verify stand without"),
        (["--verify", "--list"], 2, "--list and --verify stand without"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)  # fmt: skip
def test_a_failure_is_one_line_and_a_code(ctsr, server, tmp_path, words, code, line):
    done = ctsr("download-weights", *words)
    assert (done.code, done.out) == (code, "")
    assert done.err.splitlines()[-1].startswith(f"error: {line}")
    assert len(done.err.splitlines()) == 1
    assert left(tmp_path) == []


def test_what_is_inside_the_package_needs_no_hub(ctsr, server):
    done = ctsr("download-weights", "baseline", "--verify")
    assert (done.code, "whole" in done.out) == (0, True)
    assert ctsr("download-weights", "baseline").out.endswith("ctsr/weights/baseline.safetensors\n")
    assert server.log == []


def test_a_branch_that_moved_is_fetched_when_asked_for(ctsr, server):
    assert ctsr("download-weights", TEXT).code == 0
    server.log.clear()
    assert ctsr("download-weights", TEXT).code == 0
    assert server.log == []
    assert ctsr("download-weights", TEXT, "--overwrite").code == 0
    assert server.asked("GET") == 1
    assert ctsr("download-weights", TEXT, "--revision", COMMIT).out.endswith(f"repo@{COMMIT}/m.safetensors\n")


def test_a_token_is_shown_nowhere(ctsr, server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for method, fault in (("HEAD", {"status": 401}), ("GET", {"cut": 100, "by": "reset"}), ("HEAD", {})):
        server.faults.clear()
        server.fail(method, **fault)
        done = ctsr("download-weights", TEXT, "--debug", "--json", "--timeout", 3)
        assert any("hf_secret" in str(entry[2]) for entry in server.log)
        assert "hf_secret" not in done.out + done.err
    assert not any("hf_secret" in path.read_text("latin-1") for path in tmp_path.rglob("*") if path.is_file())
