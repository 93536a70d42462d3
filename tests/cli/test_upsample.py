"""Every refusal of `ctsr upsample`: its code, one line, nothing written, old outputs untouched."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.io.make import affine_of, ct, nifti, put

ISOTROPIC = affine_of((0.7, 0.7, 0.75))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder that one stands in, with inputs of all kinds and outputs that are there already."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path, nifti(), "in.nii")
    put(tmp_path, nifti(ct(), ISOTROPIC), "isotropic.nii")
    put(tmp_path, nifti(ct((9, 8, 1))), "one.nii")
    labels = np.zeros((9, 8, 7), np.uint8)
    labels[2:6, 2:6, 2:5] = 3
    put(tmp_path, nifti(labels), "labels.nii")
    put(tmp_path, nifti()[:1000], "cut.nii")
    put(tmp_path, nifti(), "old.nii")
    (tmp_path / "old.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "some").mkdir()
    put(tmp_path / "some", nifti(), "a.nii")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "zip.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    (tmp_path / "page.safetensors").write_bytes(b"<!DOCTYPE html><html></html>")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "profile.txt").write_text("0 1\n")
    (tmp_path / "words.txt").write_text("a b\n")
    (tmp_path / "nothing.txt").write_text("")
    (tmp_path / "unknown.toml").write_text("fcator = 3\n")
    (tmp_path / "type.toml").write_text('factor = "many"\n')
    (tmp_path / "broken.toml").write_text("factor = = 3\n")
    (tmp_path / "latin.toml").write_bytes(b'model = "\xe9"\n')
    return tmp_path


def snapshot(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        found[str(path)] = path.read_bytes() if path.is_file() else None
        found[f"{path} changed"] = path.stat().st_mtime_ns if path.is_file() else None
    return found


IN = ("in.nii", "out.nii")
REFUSED = [
    # usage
    (("--factor", "0", *IN), 2, "--factor: 0 "),
    (("--factor", "-1", *IN), 2, "--factor: -1 "),
    (("--factor", "0.5", *IN), 2, "--factor: 0.5 "),
    (("--factor", "1", *IN), 2, "--factor: 1 "),
    (("--factor", "20.1", *IN), 2, "at most 20"),
    (("--factor", "1e9", *IN), 2, "--factor: 1e+09 "),
    (("--factor", "nan", *IN), 2, "not a finite number"),
    (("--factor", "inf", *IN), 2, "not a finite number"),
    (("--factor", "1e400", *IN), 2, "not a finite number"),
    (("--factor", "", *IN), 2, "--factor"),
    (("--factor", "2", "--spacing", "1", *IN), 2, "exclude each other"),
    (("--samples", "3", *IN), 2, "not with --model baseline"),
    (("--model", "diffusion", "--samples", "0", *IN), 2, "--samples: 0 is not in 1…1000"),
    (("--model", "diffusion", "--sampler", "euler", *IN), 2, "--sampler: euler is not multistep, ddim, ancestral"),
    (("--model", "diffusion", "--estimate", "median", *IN), 2, "--estimate: median is not mean or sample"),
    (("--model", "diffusion", "--guidance-scale", "nan", *IN), 2, "not a finite number"),
    (("--model", "cubic", "--stage-one", "x", *IN), 2, "--stage-one has no meaning"),
    (("--save-uncertainty", "u.nii", *IN), 2, "--save-uncertainty needs --model diffusion"),
    (("--model", "diffusion", *IN), 5, "train-diffusion"),
    (("--model", "diffusion", "--checkpoint", "pickle.safetensors", *IN), 5, "a pickle"),
    (("--model", "diffusion", "--project", ".", *IN), 5, "no such model file"),
    (("--spacing", "2.5", *IN), 2, "--spacing: 2.5 mm"),
    (("--spacing", "7", *IN), 2, "--spacing: 7 mm"),
    (("--spacing", "0", *IN), 2, "--spacing: 0 mm"),
    (("--spacing", "nan", *IN), 2, "not a finite number"),
    (("--thickness", "0", *IN), 2, "--thickness: 0 mm"),
    (("--thickness", "-1", *IN), 2, "--thickness: -1 mm"),
    (("--out-thickness", "2.5", *IN), 2, "--out-thickness"),
    (("--out-thickness", "1", "--profile", "box", *IN), 2, "no meaning with --profile box"),
    (("--model", "best", *IN), 2, "--model: best is not baseline"),
    (("--model", "cubic", "--checkpoint", "x", *IN), 2, "no meaning"),
    (("--model", "cubic", "--project", ".", *IN), 2, "--project have no meaning"),
    (("--skip-existing", "--overwrite", *IN), 2, "exclude each other"),
    (("--checkpoint", "x", "--project", ".", *IN), 2, "exclude each other"),
    (("--consistency", "soft", *IN), 2, "'soft' is not one of 'hard', 'off'"),
    (("--profile", "round", *IN), 2, "--profile: round"),
    (("--profile", "profile.txt", *IN), 2, "three rows"),
    (("--profile", "words.txt", *IN), 2, "profile"),
    (("--profile", "nothing.txt", *IN), 2, "profile"),
    (("--patch-size", "0", "8", "8", *IN), 2, "side below 1"),
    (("--patch-size", "8", "-8", "8", *IN), 2, "side below 1"),
    (("--patch-size", "8", "7", "8", *IN), 2, "no multiples of"),
    (("--patch-size", "8", "8", "in.nii", "out.nii"), 2, ""),
    (("--patch-size", "8", "8", "8", "--overlap", "8", *IN), 2, "--overlap: 8 is not below"),
    (("--overlap", "8", *IN), 2, "--overlap has no meaning without --patch-size"),
    (("--overlap", "-1", *IN), 2, "--overlap"),
    (("--device", "CPU", *IN), 2, "--device: CPU"),
    (("--device", "cuda:-1", *IN), 2, "--device: cuda:-1"),
    (("--model", "cubic", "--device", "meta", *IN), 2, "--device: meta"),
    (("--dtype", "fp8", *IN), 2, "--dtype: fp8"),
    (("--form", "tform", *IN), 2, "--form: tform"),
    (("--hu-offset", "nan", *IN), 2, "not a finite number"),
    (("--axis", "3", *IN), 2, "--axis"),
    (("--max-memory", "abc", *IN), 2, "not a size such as 2G"),
    (("--max-memory", "-1G", *IN), 2, "not a size"),
    (("--max-memory", "0", *IN), 2, "not a size"),
    (("--threads", "0", *IN), 2, "--threads"),
    (("--threads", "1000000", *IN), 2, "--threads: 1000000 is not in 1…"),
    (("--seed", "-1", *IN), 2, "--seed"),
    (("--seed", str(2**64), *IN), 2, "--seed"),
    (("--seed", "x", *IN), 2, "--seed"),
    (("--shard", "1/3", *IN), 2, "folder of cases"),
    (("--shard", "4/3", "some", "out"), 2, "--shard: 4/3"),
    (("--shard", "env", "some", "out"), 2, "--shard env"),
    (("--config", "unknown.toml", *IN), 2, "did you mean factor?"),
    (("--config", "type.toml", *IN), 2, "--factor"),
    (("--config", "broken.toml", *IN), 2, "line 1"),
    (("--config", "latin.toml", *IN), 2, "latin.toml"),
    (("--config", "none.toml", *IN), 2, "none.toml: does not exist"),
    (("--config", "fifo", *IN), 2, "fifo: is not a file"),
    (("--no-such-option", *IN), 2, "--no-such-option"),
    (("in.nii",), 2, "OUT"),
    ((), 2, "SRC"),
    (("in.nii", "out.nii", "more.nii"), 2, "more.nii"),
    (("-", "out.nii"), 2, "-: reading from standard input"),
    (("in.nii", "-"), 2, "standard"),
    (("-in.nii", "out.nii"), 2, ""),
    # outputs in the way
    (("in.nii", "old.nii"), 2, "old.nii: exists already (--overwrite replaces it)"),
    (("in.nii", "in.nii"), 2, "in.nii: is the input itself"),
    (("in.nii", "./in.nii", "--overwrite"), 2, "is the input itself"),
    (("in.nii", "none/out.nii"), 2, "folder does not exist"),
    (("in.nii", "folder"), 2, "folder"),
    (("in.nii", "folder/"), 2, "folder"),
    (("in.nii", "out"), 2, "neither .nii nor .nii.gz"),
    (("in.nii", "out.mha"), 2, "neither .nii nor .nii.gz"),
    (("in.nii", "/dev/null"), 2, "/dev/null"),
    (("in.nii", "fifo"), 2, "fifo"),
    (("in.nii", "old.nii.gz"), 2, "old.json: exists"),
    (("in.nii", "out.nii", "--preview", "out.json"), 2, "out.json: does not end in .png"),
    (("in.nii", "out.nii", "--preview", "none/p.png"), 2, "folder does not exist"),
    (("in.nii", "out.nii", "--save-added", "out.nii"), 2, "two outputs"),
    (("in.nii", "out.nii", "--save-added", "added"), 2, "neither"),
    (("some", "old.nii"), 2, "old.nii"),
    (("some", "out.nii.gz"), 2, "names a file"),
    (("some", "some/out"), 2, "inside the input folder"),
    (("some", "folder", "--preview", "p.png"), 2, "one file"),
    (("folder", "out"), 2, "holds no files"),
    # weights
    (("--checkpoint", "none.safetensors", *IN), 5, "none.safetensors: no such model file"),
    (("--checkpoint", "folder", *IN), 5, "a folder, not a model file"),
    (("--checkpoint", "fifo", *IN), 5, "fifo"),
    (("--checkpoint", "pickle.safetensors", *IN), 5, "a pickle"),
    (("--checkpoint", "zip.safetensors", *IN), 5, "a pickle in a zip"),
    (("--checkpoint", "page.safetensors", *IN), 5, "a web page"),
    (("--checkpoint", "empty.safetensors", *IN), 5, "empty.safetensors"),
    (("--checkpoint", "in.nii", *IN), 5, "in.nii"),
    (("--project", ".", *IN), 5, "checkpoints/baseline/best.safetensors: no such model file"),
    (("--checkpoint", "page.safetensors", "none.nii", "out.nii"), 5, "a web page"),  # before the input is looked at
    (("--checkpoint", "page.safetensors", "in.nii", "old.nii"), 2, "exists"),  # and after the outputs are
    # inputs
    (("none.nii", "out.nii"), 3, "none.nii: does not exist"),
    (("fifo", "out.nii"), 3, "fifo: is a FIFO"),
    (("/dev/zero", "out.nii"), 3, "/dev/zero"),
    (("cut.nii", "out.nii"), 3, "cut.nii: truncated"),
    (("old.json", "out.nii"), 3, "old.json"),
    (("isotropic.nii", "out.nii"), 3, "already near-isotropic (0.70 × 0.70 × 0.75 mm)"),
    (("one.nii", "out.nii"), 3, "1 slice: it has no neighbour"),
    (("labels.nii", "out.nii"), 3, "label map"),
    (("labels.nii", "out.nii", "--model", "cubic"), 3, "label map"),
    (("--thickness", "25", *IN), 3, "25 mm at a spacing of 2.5 mm"),
    (("--thickness", "0.4", *IN), 3, "outside 0.2…4"),
    # resources
    (("--max-memory", "1K", *IN), 4, "GB at least, 0.00 GB may be used"),
    (("--max-memory", "10M", "--model", "cubic", *IN), 4, "0.01 GB may be used"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "words"), REFUSED, ids=lambda v: " ".join(v) if isinstance(v, tuple) else ""
)
def test_a_refusal_is_one_line_and_writes_nothing(ctsr, here, weights, arguments, code, words):
    before = snapshot(here)
    if not {"--checkpoint", "--model", "--project"} & set(arguments):
        arguments = (*arguments, "--checkpoint", weights)
    ran = ctsr("upsample", *arguments)
    assert (ran.code, ran.out) == (code, "")
    assert ran.line.startswith("error: ")
    assert words in ran.line
    assert sum(line.startswith("error:") for line in ran.err.splitlines()) == 1
    assert all(line.startswith(("note: ", "warning: ")) for line in ran.err.splitlines()[:-1])
    assert snapshot(here) == before


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [REFUSED[0], REFUSED[-1], REFUSED[-7], (("--factor", "x", *IN), 2, "--factor")],
)
@pytest.mark.parametrize("how", [("-q",), ("-v",), ("--json",), ("-q", "--json")])
def test_a_refusal_does_not_depend_on_how_it_is_told(ctsr, here, weights, arguments, code, words, how):
    if "--model" not in arguments:
        arguments = (*arguments, "--checkpoint", weights)
    ran = ctsr("upsample", *arguments, *how)
    plain = ctsr("upsample", *arguments)
    assert (ran.code, ran.line) == (plain.code, plain.line)
    if "-q" in how:
        assert ran.err == ran.line + "\n"
    if "--json" in how:
        told = json.loads(ran.out)
        assert (told["ok"], told["error"]["code"]) == (False, code)
        assert words in told["error"]["reason"]


def test_missing_shipped_weights_are_refused(ctsr, here, monkeypatch):
    from ctsr.weights import registry

    monkeypatch.setitem(registry.SHIPPED, "baseline", "gone.safetensors")
    before = snapshot(here)
    ran = ctsr("upsample", *IN)
    assert (ran.code, ran.out) == (5, "")
    assert "no such model file" in ran.line
    assert snapshot(here) == before


def test_a_gpu_that_is_not_there_is_not_replaced(ctsr, here, weights, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ran = ctsr("upsample", *IN, "--checkpoint", weights, "--device", "cuda")
    assert (ran.code, ran.line) == (4, "error: --device cuda: this machine has no CUDA device (--device cpu)")


def test_a_file_is_thinned_and_told(ctsr, here, weights):
    ran = ctsr("upsample", *IN, "--checkpoint", weights)
    assert ran.code == 0
    assert ran.out.startswith(
        "out.nii: 14 slices of 1.25 mm from 7 of 2.5 mm; measured slices reproduced to "
    )
    assert ran.err.splitlines()[0].startswith("note: weights: tiny.safetensors, sha256 ")
    assert "note: in.nii: slice thickness taken to be the spacing" in ran.err
    assert (here / "out.json").exists()


def test_a_label_map_is_repeated_by_nearest(ctsr, here):
    assert ctsr("upsample", "labels.nii", "out.nii", "--model", "nearest").code == 0


def test_quiet_says_nothing_but_the_result(ctsr, here, weights):
    ran = ctsr("upsample", *IN, "--checkpoint", weights, "-q")
    assert ran.err == ""
    assert len(ran.out.splitlines()) == 1


def test_verbose_says_what_was_chosen_and_why(ctsr, here, weights):
    ran = ctsr("upsample", *IN, "--checkpoint", weights, "-v", "--threads", "1")
    assert "tiny.safetensors on cpu, " in ran.err
    assert "1 thread(s), 1 slab along z" in ran.err
    assert "1 window in plane (exact)" in ran.err


def test_json_is_one_document(ctsr, here, weights):
    told = json.loads(ctsr("upsample", *IN, "--checkpoint", weights, "--json").out)
    assert told["ok"] is True
    assert (told["status"], told["slices_out"]) == ("ok", 14)
    (here / "some" / "b.nii").write_bytes(b"no volume")
    ran = ctsr("upsample", "some", "outs", "--model", "cubic", "--json")
    told = json.loads(ran.out)
    assert (ran.code, told["ok"], told["error"]["code"]) == (7, False, 7)
    assert [(case["case"], case["status"]) for case in told["cases"]] == [
        ("a.nii", "ok"),
        ("b.nii", "failed"),
    ]
    (here / "some" / "b.nii").unlink()
    told = json.loads(ctsr("upsample", "some", "again", "--model", "cubic", "--json").out)
    assert [case["status"] for case in told["cases"]] == ["ok"]


def test_a_folder_with_a_bad_case_ends_with_a_table_and_7(ctsr, here):
    (here / "some" / "b.nii").write_bytes(b"no volume")
    ran = ctsr("upsample", "some", "outs", "--model", "cubic")
    assert ran.code == 7
    assert ran.line == "error: some: 1 of 2 cases failed, the first is b.nii"
    table = ran.out.splitlines()
    assert table[0].split()[:3] == ["case", "status", "reason"]
    assert "failed" in table[2]
    assert (here / "outs" / "a.nii").exists()
    assert (here / "outs" / "summary.csv").read_text().count("\n") == 3


def test_a_share_without_a_case_is_no_failure(ctsr, here):
    ran = ctsr("upsample", "some", "outs", "--shard", "9/9")
    assert (ran.code, ran.out, ran.line) == (0, "", "note: some: 1 cases, none for share 9/9")
    assert json.loads(ctsr("upsample", "some", "outs", "--shard", "9/9", "--json").out) == {
        "ok": True,
        "cases": [],
    }
    assert not (here / "outs").exists()


def test_a_dry_run_says_what_it_would_take(ctsr, here, weights):
    before = snapshot(here)
    ran = ctsr("upsample", *IN, "--checkpoint", weights, "--dry-run", "--threads", "2")
    assert ran.code == 0
    assert snapshot(here) == before
    for words in ("GB at most", "1 slab(s)", "1 window(s)", "2 thread(s)", "about 0 s"):
        assert words in ran.out
    ran = ctsr("upsample", "some", "outs", "--checkpoint", weights, "--dry-run", "--threads", "2")
    names, first = (line.split() for line in ran.out.splitlines())
    assert names[-5:] == ["peak_gb", "slabs", "windows", "threads", "estimate_seconds"]
    assert (float(first[-5]) > 0.1, first[-4:-1]) == (True, ["1", "1", "2"])


def test_a_second_run_skips_and_says_so(ctsr, here):
    assert ctsr("upsample", *IN, "--model", "cubic").code == 0
    before = snapshot(here)
    ran = ctsr("upsample", *IN, "--model", "cubic", "--skip-existing")
    assert (ran.code, ran.out) == (0, "out.nii: is there and agrees, skipped\n")
    ran = ctsr("upsample", *IN, "--model", "cubic", "--skip-existing", "--factor", "3")
    assert ran.code == 2
    assert "factor 2.0, asked for is 3.0" in ran.line
    ran = ctsr("upsample", *IN, "--model", "cubic", "--skip-existing", "--preview", "p.png")
    assert (ran.code, "p.png: is not there, out.nii is" in ran.line) == (2, True)
    assert snapshot(here) == before


def test_an_output_is_replaced_when_asked(ctsr, here):
    ran = ctsr("upsample", "in.nii", "old.nii", "--model", "cubic", "--overwrite")
    assert ran.code == 0
    assert json.loads((here / "old.json").read_text())["model"] == "cubic"


def test_a_config_file_gives_options_and_the_command_line_wins(ctsr, here):
    text = '\ufeffmodel = "cubic"\nfactor = 3\nmax-memory = "2G"\noverwrite = true\npatch-size = [8, 8, 8]\n'
    (here / "run.toml").write_text(text, encoding="utf-8")
    assert "21 slices" in ctsr("upsample", *IN, "--config", "run.toml").out
    assert "28 slices" in ctsr("upsample", *IN, "--config", "run.toml", "--factor", "4").out


def test_a_config_file_may_ask_for_json_and_a_traceback_of_an_error(ctsr, here):
    (here / "run.toml").write_text("json = true\ndebug = true\n")
    ran = ctsr("upsample", "none.nii", "out.nii", "--config", "run.toml")
    assert (ran.code, json.loads(ran.out)["error"]["code"]) == (3, 3)
    assert "Traceback" in ran.err


@pytest.mark.parametrize("key", ["thickness", "seed", "model", "checkpoint"])
def test_true_in_a_config_file_is_no_number_and_no_name(ctsr, here, key):
    (here / "run.toml").write_text(f"{key} = true\n")
    ran = ctsr("upsample", *IN, "--config", "run.toml")
    assert (ran.code, ran.line) == (2, f"error: run.toml: {key} takes a value, not true")


@pytest.mark.parametrize(
    "value", ["3", '"x"', "true", "[1, 2]", "1.5", "{a = 1}", "1979-05-27", "-1", "inf", '"\\u001b[31m"']
)
@pytest.mark.parametrize(
    "key", ["factor", "preview", "quiet", "patch-size", "seed", "model", "max-memory", "config"]
)
def test_no_value_in_a_config_file_is_an_internal_error(ctsr, here, key, value):
    (here / "run.toml").write_text(f"{key} = {value}\n")
    ran = ctsr("upsample", "none.nii", "out.nii", "--config", "run.toml")
    assert ran.code in (2, 3)
    assert "\x1b" not in ran.err
    assert sum(line.startswith("error:") for line in ran.err.splitlines()) == 1


NAMES = [
    "a [x].nii",
    "a\nb.nii",
    "a\x1b[31mb.nii",
    "-dash.nii",
    "é日本.nii",
    os.fsdecode(b"a\xff\xfeb.nii"),
    "a'\"b .nii",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_may_be_any(ctsr, here, name):
    put(here, nifti(), name)
    target = name.replace(".nii", "-out.nii.gz")
    ran = ctsr("upsample", "--model", "cubic", "--", name, target)
    assert ran.code == 0
    assert (here / target).exists()
    assert "\x1b" not in ran.out + ran.err
    assert len(ran.out.splitlines()) == 1
    if "[" in name and "\x1b" not in name:
        assert "a [x]-out.nii.gz" in ran.out
    ran = ctsr("upsample", "--model", "cubic", "--json", "--", name + "?", target + "2.nii")
    assert ran.code == 3
    assert json.loads(ran.out)["error"]["path"] == name + "?"
    assert len([line for line in ran.err.splitlines() if line.startswith("error:")]) == 1
    assert "\x1b" not in ran.err


def test_a_profile_of_another_area_is_scaled_with_a_note(ctsr, here):
    rows = [f"{z:.2f}, {200 * np.exp(-(z**2)):.4f}" for z in np.linspace(-2.5, 2.5, 41)]
    (here / "wide.csv").write_text("# mm, weight\n" + "\n".join(rows))
    ran = ctsr("upsample", *IN, "--model", "inverse", "--profile", "wide.csv")
    assert ran.code == 0
    assert "note: wide.csv: the weights have an area of 354." in ran.err
