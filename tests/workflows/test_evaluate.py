from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ctsr
from ctsr.core.geometry import canonical_turn
from ctsr.core.volume import Volume
from ctsr.core.zgrid import ZGrid
from ctsr.errors import InputError, RequirementNotMet, SomeCasesFailed, UsageError
from ctsr.io.lists import read_table, write_table
from ctsr.io.nifti import read_volume, write_volume
from ctsr.metrics.masks import Regions
from ctsr.metrics.report import score
from ctsr.models.simple_unet3d import SimpleUNet3D, SimpleUNet3DConfig
from ctsr.models.zoo import pack
from ctsr.physics.operator import grid_operator
from ctsr.physics.profile import SliceProfile
from ctsr.physics.simulation import simulate_volume
from ctsr.workflows.evaluate import EvaluateOptions, evaluate_volumes
from ctsr.workflows.evaluate_files import evaluate_files, evaluate_thin_files
from ctsr.workflows.evaluate_thin import ThinOptions, evaluate_thin
from ctsr.workflows.evaluation import Evaluation
from ctsr.workflows.figures import Picture
from ctsr.workflows.folder import Report
from ctsr.workflows.requests import Wanted
from ctsr.workflows.thinner import Thinner
from tests.train.tiny import body
from tests.workflows.test_upsample_diffusion import make_project

SPACING = 1.25  # mm, of the thin slices


def scan(depth: int = 14, seed: int = 0, spacing: float = SPACING) -> Volume:
    """A thin body in the usual file order: left to right and front to back are stored backwards."""
    affine = np.diag([-0.8, -0.8, spacing, 1.0])
    affine[:3, 3] = 100, 120, -300
    data = np.asfortranarray(body(seed, (depth, 32, 30)).transpose(2, 1, 0))
    return Volume(data, affine, slice_axis=2)


def stack(volume: Volume) -> np.ndarray:
    return canonical_turn(volume.affine, 2).apply(volume.data)


def upended(volume: Volume) -> Volume:
    """The same patient with the slices stored from head to foot."""
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, 2] * (volume.shape[2] - 1)
    affine[:3, 2] *= -1
    return replace(volume, data=volume.data[:, :, ::-1], affine=affine)


@pytest.fixture(scope="module")
def thin() -> Volume:
    return scan()


@pytest.fixture(scope="module")
def thick(thin) -> Volume:
    return simulate_volume(thin, factor=2)[0]


@pytest.fixture(scope="module")
def result(thick) -> Volume:
    return Thinner(model="inverse", factor=2)(thick).volume


# --- volumes -----------------------------------------------------------------------------------------------


def test_ten_hu_too_much_is_52_24508_db_in_every_mask(thin):
    higher = replace(thin, data=thin.data + np.int16(10))
    for mask in ("body", "none"):
        row = evaluate_volumes(higher, thin, mask=mask)
        assert row["psnr_4095_db"] == pytest.approx(52.24508, abs=1e-5)
        assert (row["mae_hu"], row["bias_hu"], row["bias_hu_soft"]) == (10, 10, pytest.approx(10))


def test_what_is_identical_says_so(thin):
    row = evaluate_volumes(thin, replace(thin))
    assert (row["identical"], row["psnr_4095_db"], row["ssim_coronal"]) == (True, None, 1)


def test_the_residual_is_a_x_minus_y(thick, result):
    row = evaluate_volumes(result, thick=thick)
    grid = ZGrid(7, 2.0)
    A = grid_operator(grid, SliceProfile(), spacing=2.5, thickness=2.5)
    residual = np.abs(np.tensordot(A, stack(result).astype(float), axes=1) - stack(thick))
    assert row["residual_mean_hu"] == pytest.approx(residual.mean(), abs=1e-4)  # float32 products
    assert row["residual_max_hu"] == pytest.approx(residual.max(), abs=1e-3)
    assert 0 < row["residual_mean_hu_soft"] < 0.5  # rounding alone
    assert row["against"]["cubic"]["residual_mean_hu"] > 10 * row["residual_mean_hu"]
    assert "psnr_4095_db" not in row


def test_the_residual_is_that_of_the_record(thick):
    made = Thinner(model="inverse", factor=2, thickness=3.0)(thick)
    row = evaluate_volumes(made.volume, thick=thick, thickness=3.0, against=())
    assert row["residual_mean_hu"] == pytest.approx(made.record["consistency_residual_mean_hu"], abs=1e-4)
    other = evaluate_volumes(made.volume, thick=thick, against=())
    assert other["residual_mean_hu"] > 2 * row["residual_mean_hu"]


def test_padding_and_what_its_type_limits_count_nowhere(thick, result):
    """As in the record: 50 pixels are padding in every slice; then one thin voxel is at int16's end."""
    padded = thick.data.copy(order="F")
    padded[12:17, 10:20] = -2048
    padded_thick = replace(thick, data=padded)
    made = Thinner(model="inverse", factor=2)(padded_thick)
    assert (made.volume.data == -2048).any()
    row = evaluate_volumes(made.volume, thick=padded_thick, against=())
    assert row["residual_counted_percent"] == pytest.approx(100 * (1 - 50 / (30 * 32)))
    assert row["residual_max_hu"] < 1
    unpadded = evaluate_volumes(result, thick=padded_thick, against=())
    assert unpadded["residual_counted_percent"] == row["residual_counted_percent"]
    assert unpadded["residual_max_hu"] < 1
    limited = result.data.copy(order="F")
    limited[15, 16, 6] = 32767
    row = evaluate_volumes(replace(result, data=limited), thick=thick, against=())
    assert row["residual_counted_percent"] < 100
    assert row["residual_max_hu"] < 1


def test_the_others_are_made_and_scored_on_the_same_voxels(thin, thick, result):
    row = evaluate_volumes(result, thin, thick=thick)
    assert list(row["against"]) == ["nearest", "linear", "cubic"]
    truth = stack(thin)
    for name, other in row["against"].items():
        made = stack(Thinner(model=name, factor=2)(thick).volume)
        alone = score(made, truth, Regions.of(truth), spacing_z_mm=SPACING)
        assert {k: other[k] for k in alone} == alone
    gain = row["psnr_4095_db"] - row["against"]["cubic"]["psnr_4095_db"]
    assert row["gain_db"] == gain > 0.5
    assert row["against"]["cubic"]["gain_db"] == 0


def test_the_storage_order_changes_nothing(thin, thick, result):
    straight = evaluate_volumes(result, thin, thick=thick, against=("cubic",))
    turned = evaluate_volumes(*map(upended, (result, thin)), thick=upended(thick), against=("cubic",))
    assert turned == straight


def test_a_mask_says_which_voxels_count(thin):
    inside = np.zeros(thin.shape, bool)
    inside[6:18, 8:20] = True
    data = thin.data.copy(order="F")
    data[~inside] += 100
    changed = replace(thin, data=data)
    assert evaluate_volumes(changed, thin, mask=inside)["identical"]
    assert evaluate_volumes(changed, thin, mask=~inside)["bias_hu"] == 100
    with pytest.raises(UsageError, match="liver"):
        evaluate_volumes(changed, thin, mask="liver")


def test_padding_counts_as_air(thin):
    """Two readers' paddings differ by 1024 HU, and mean the same."""
    outside = stack(thin) == stack(thin).min()
    one, other = (stack(thin).astype(np.int16).copy() for _ in range(2))
    one[outside], other[outside] = -2000, -3024
    rows = evaluate_volumes(*(replace(thin, data=d.transpose(2, 1, 0)) for d in (one, other)), mask="none")
    assert rows["identical"]


@pytest.mark.parametrize(("n", "factor"), [(5, 2.5), (7, 1.5), (6, 11 / 6), (9, 5 / 3)])
def test_a_factor_that_float32_spacings_blur_is_recognised(n, factor):
    """5 slices at 2.5 are 13, by a hair: 2.4999999 would make them 12."""
    for spacing in np.linspace(3, 5, 12):
        thick = Volume(body(0, (n, 8, 8)).transpose(2, 1, 0), np.diag([0.8, 0.8, spacing, 1]))
        made = Thinner(model="cubic", factor=factor)(thick).volume
        assert made.shape[2] == ZGrid(n, factor).m
        blurred = [replace(v, affine=v.affine.astype(np.float32)) for v in (made, thick)]
        row = evaluate_volumes(blurred[0], thick=blurred[1], against=(), mask="none")
        assert row["residual_counted_percent"] == 100


def moved(volume: Volume, mm: float, axis: int = 2) -> Volume:
    affine = volume.affine.copy()
    affine[axis, 3] += mm
    return replace(volume, affine=affine)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: replace(v, data=v.data[:, :, :12]), "has 30 × 32 × 12 voxels, {} has 30 × 32 × 14"),
        (lambda v: moved(v, 0.625), "a corner lies 0.625 mm from where {} has it"),
        (lambda v: moved(v, 0.0015, axis=0), "a corner lies 0.0015 mm from where {} has it"),
    ],
)
def test_another_grid_is_refused_with_both(thin, thick, result, change, words):
    for other, whose in (
        ({"ref": thin}, "the reference"),
        ({"thick": thick}, "the grid in the slab of 7 thick slices of 2.5 mm"),
    ):
        with pytest.raises(InputError) as caught:
            evaluate_volumes(change(result), **other)
        assert caught.value.reason == words.format(whose)


def test_a_ten_thousandth_of_a_millimetre_is_no_other_grid(thin, thick, result):
    assert evaluate_volumes(moved(result, 0.0005), thin, thick=thick)["psnr_4095_db"] > 30


def test_a_stack_that_is_not_thinner_is_refused(thick):
    with pytest.raises(InputError, match=r"2\.5 mm apart, the thick file's 2\.5 mm"):
        evaluate_volumes(thick, thick=thick)


def test_the_public_name_is_this(thin):
    assert ctsr.evaluate is evaluate_volumes
    with pytest.raises(UsageError, match="nothing to compare with"):
        ctsr.evaluate(thin)


# --- thin: simulate, upsample, score -----------------------------------------------------------------------


def test_thin_is_simulate_upsample_and_score_on_the_slab_they_share():
    """14 slices at factor 3: four thick ones, which 12 thin ones made; two take no part."""
    truth = scan(14)
    rows = evaluate_thin(truth, factors=(3.0,), methods=("inverse",))
    thick = simulate_volume(truth, factor=3)[0]
    made = stack(Thinner(model="inverse", factor=3)(thick).volume)
    expected = score(made, stack(truth)[:12], Regions.of(stack(truth)[:12]), spacing_z_mm=SPACING)
    assert [row["method"] for row in rows] == ["inverse", "cubic"]
    assert {k: rows[0][k] for k in expected} == expected
    assert rows[0]["gain_db"] == rows[0]["psnr_4095_db"] - rows[1]["psnr_4095_db"] > 0.5
    assert rows[0]["residual_mean_hu"] < 0.5 < rows[1]["residual_mean_hu"]


def test_a_patient_stored_upside_down_scores_the_same():
    fields = {"factors": (3.0,), "methods": ("inverse",)}
    rows = [evaluate_thin(volume, **fields) for volume in (scan(14), upended(scan(14)))]
    for row in (row for part in rows for row in part):
        row.pop("seconds")
    assert rows[0] == rows[1]


def test_what_is_told_may_differ_from_what_is_true(thin):
    told = {
        (true, told): {row["method"]: row for row in evaluate_thin(
            thin, methods=("inverse",), ratio=true, told_ratio=told)}
        for true, told in ((1.0, None), (1.0, 0.8), (0.8, 1.0))
    }  # fmt: skip
    right, less, narrower = told.values()
    assert less["cubic"]["psnr_4095_db"] == right["cubic"]["psnr_4095_db"]  # it does not listen
    assert less["inverse"]["gain_db"] < right["inverse"]["gain_db"]
    assert (less["inverse"]["true_ratio"], less["inverse"]["told_ratio"]) == (1.0, pytest.approx(0.8))
    assert narrower["cubic"]["psnr_4095_db"] > right["cubic"]["psnr_4095_db"]  # sharper slices, easier
    box = evaluate_thin(
        thin, methods=("inverse",), profile=SliceProfile("box"), told_profile=SliceProfile("gaussian")
    )
    assert (box[0]["true_profile"], box[0]["told_profile"]) == ("box", "gaussian")
    assert box[0]["psnr_4095_db"] != right["inverse"]["psnr_4095_db"]


def test_a_network_of_ones_own_is_scored(thin, tmp_path):
    config = SimpleUNet3DConfig(channels=(8, 8))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tensors = SimpleUNet3D(config).state_dict()
    path = tmp_path / "own.safetensors"
    card = {"ranges": {"input_spacing_mm": [3, 6]}}
    path.write_bytes(pack("baseline", {"channels": [8, 8]}, tensors, card=card))
    write_volume(thin, tmp_path / "thin.nii")
    options = ThinOptions(methods=("baseline",), checkpoint=str(path), device="cpu")
    found = evaluate_thin_files(tmp_path / "thin.nii", options)
    row = found.rows[0]
    assert (row["method"], row["weights"]) == ("baseline", "own.safetensors")
    assert row["residual_mean_hu"] < 0.5
    inverse = evaluate_thin(thin, methods=("inverse",))[0]
    assert row["psnr_4095_db"] == pytest.approx(inverse["psnr_4095_db"], abs=0.1)  # untrained it adds little
    assert any("slice spacing 2.5 mm, trained for 3…6" in note for note in found.notes)


def test_a_diffusion_of_ones_own_is_scored(thin, tmp_path):
    row = evaluate_thin(thin, methods=("diffusion",), checkpoint=str(make_project(tmp_path)), device="cpu")[0]
    assert (row["method"], row["weights"]) == ("diffusion", "best.safetensors")
    assert row["residual_mean_hu"] < 0.5


@pytest.mark.parametrize(
    "fields",
    [{"ratio": 5.0}, {"told_ratio": 0.1}, {"factors": ()}, {"methods": ("cubic",), "checkpoint": "x"}],
)
def test_what_can_not_be_simulated_is_usage(fields):
    with pytest.raises(UsageError):
        ThinOptions(**fields)


# --- files -------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, thin, thick, result) -> Path:
    for name, volume in (("thin", thin), ("thick", thick), ("result", result)):
        write_volume(volume, tmp_path / f"{name}.nii.gz")
    return tmp_path


def run(folder: Path, pred: str, ref: str | None, thick: str | None = None, **more) -> Evaluation:
    options = EvaluateOptions(mask=more.pop("mask", "body"), against=more.pop("against", ("cubic",)))
    paths = [None if name is None else folder / name for name in (ref, thick)]
    report = more.pop("report", Report())
    return evaluate_files(folder / pred, *paths, options, Wanted(**more), report)


def test_a_file_gives_the_rows_of_its_volumes(files, thin, thick, result):
    found = run(files, "result.nii.gz", "thin.nii.gz", "thick.nii.gz")
    alone = evaluate_volumes(result, thin, thick=thick, against=("cubic",))
    assert [row["method"] for row in found.rows] == ["result", "cubic"]
    assert found.rows[0]["psnr_4095_db"] == alone["psnr_4095_db"]
    assert found.rows[1]["residual_mean_hu"] == alone["against"]["cubic"]["residual_mean_hu"]
    assert (found.rows[0]["case"], found.rows[0]["mask"]) == ("result.nii.gz", "body")
    found.raise_for_outcome(None)


def test_the_thickness_comes_from_the_sidecar(files):
    right = run(files, "result.nii.gz", None, "thick.nii.gz", against=()).rows[0]
    (files / "thick.json").write_text('{"SliceThickness": 3.5}')
    wrong = run(files, "result.nii.gz", None, "thick.nii.gz", against=()).rows[0]
    assert wrong["residual_mean_hu"] > 3 * right["residual_mean_hu"]


def test_the_csv_holds_every_row_and_the_json_the_summary_too(files):
    out = {kind: files / f"out.{kind}" for kind in ("csv", "json")}
    for path in out.values():
        found = run(files, "result.nii.gz", "thin.nii.gz", "thick.nii.gz", out=path)
    table, document = read_table(out["csv"]), json.loads(out["json"].read_text())
    assert [row["method"] for row in table] == ["result", "cubic"]
    for name in ("psnr_4095_db", "psnr_2000_db", "ssim_coronal", "residual_mean_hu_soft", "gain_db"):
        assert float(table[0][name]) == document["rows"][0][name] == found.rows[0][name]
    assert document["summary"][0]["metrics"]["psnr_4095_db"]["n"] == 1
    with pytest.raises(UsageError, match="exists"):
        run(files, "result.nii.gz", "thin.nii.gz", out=out["csv"])


def test_the_figure_is_a_picture_with_and_without_a_truth(files):
    for name, ref, thick in (("a", "thin.nii.gz", "thick.nii.gz"), ("b", None, "thick.nii.gz")):
        path = files / f"{name}.png"
        run(files, "result.nii.gz", ref, thick, figure=path)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_figure_shows_the_error_and_the_spectrum():
    truth = np.full((6, 8), 40.0)
    spectrum = {"result": (np.linspace(0.1, 0.5, 5), np.ones(5))}

    def drawn(truth: np.ndarray, result: np.ndarray, spectra=None) -> bytes:
        return Picture(1.0, {"truth": (truth, 1.0), "result": (result, 1.0)}, spectra or {}).png("a $5 case")

    assert drawn(truth, truth + 60, spectrum) != drawn(truth, truth + 60)
    white = truth + 1e4  # in every window
    assert drawn(white, white + 60) != drawn(white, white)


def test_a_mask_file_lies_on_the_results_grid(files, thin):
    inside = np.zeros(thin.shape, np.uint8)
    inside[6:18, 8:20] = 1
    write_volume(Volume(inside, thin.affine), files / "mask.nii.gz")
    found = run(files, "result.nii.gz", "thin.nii.gz", mask=str(files / "mask.nii.gz")).rows[0]
    pred = read_volume(files / "result.nii.gz")
    assert found["mae_hu"] == evaluate_volumes(pred, thin, mask=inside > 0)["mae_hu"]
    write_volume(Volume(inside[:, :, :-1], thin.affine), files / "short.nii.gz")
    with pytest.raises(InputError, match="30 × 32 × 13") as caught:
        run(files, "result.nii.gz", "thin.nii.gz", mask=str(files / "short.nii.gz"))
    assert caught.value.path == str(files / "short.nii.gz")


def test_the_reference_itself_is_no_result(files):
    (files / "link.nii.gz").symlink_to(files / "thin.nii.gz")
    with pytest.raises(InputError, match="is the reference itself"):
        run(files, "link.nii.gz", "thin.nii.gz")


def test_a_label_map_is_no_reference(files, thin):
    labels = np.zeros(thin.shape, np.uint8)
    labels[5:20, 5:20] = 2
    write_volume(Volume(labels, thin.affine), files / "labels.nii.gz")
    with pytest.raises(InputError, match="label map"):
        run(files, "result.nii.gz", "labels.nii.gz")


def test_conditions_are_about_the_result_alone(files):
    found = run(files, "result.nii.gz", "thin.nii.gz", "thick.nii.gz", require=["gain>=0.5", "psnr>=10"])
    found.raise_for_outcome(None)  # cubic's own gain is 0
    out = files / "out.json"
    found = run(files, "result.nii.gz", "thin.nii.gz", require=["psnr>=99"], out=out)
    with pytest.raises(
        RequirementNotMet, match=r"result.nii.gz: psnr_4095_db is .*, required >= 99"
    ) as caught:
        found.raise_for_outcome(None)
    assert caught.value.report == json.loads(out.read_text())


@pytest.mark.parametrize(
    ("ref", "other", "condition", "words"),
    [
        (None, "thick.nii.gz", "psnr>=35", "needs REF"),
        ("thin.nii.gz", None, "residual_mean<=1", "needs --thick"),
        ("thin.nii.gz", None, "gain>=1", "needs --thick"),
    ],
)
def test_a_condition_on_what_is_not_measured_is_usage(files, ref, other, condition, words):
    with pytest.raises(UsageError, match=words):
        run(files, "result.nii.gz", ref, other, require=[condition])


# --- folders -----------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path, thin, result) -> Path:
    """Results and references of three cases; b's is damaged, and another reference has no result."""
    for name in ("a", "sub/c", "b"):
        for folder, volume in (("res", result), ("ref", thin)):
            path = tmp_path / folder / f"{name}.nii"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_volume(volume, path)
    (tmp_path / "res/b.nii").write_bytes((tmp_path / "res/b.nii").read_bytes()[:-100])
    (tmp_path / "ref/a.nii").unlink()
    write_volume(thin, tmp_path / "ref/a.nii.gz")  # another suffix, the same case
    write_volume(thin, tmp_path / "ref/lonely.nii")
    return tmp_path


def test_a_bad_case_does_not_stop_the_rest(tree):
    told: list[str] = []
    found = run(tree, "res", "ref", report=Report(warn=told.append), out=tree / "out.csv")
    assert [(row["case"], row["status"]) for row in found.rows] == [
        ("a.nii", "ok"), ("b.nii", "failed"), ("sub/c.nii", "ok"),
    ]  # fmt: skip
    assert "truncated" in told[0]
    assert any("lonely" in note for note in found.notes)
    with pytest.raises(SomeCasesFailed, match=r"1 of 3 cases failed, the first is b.nii"):
        found.raise_for_outcome(tree / "res")
    mean = found.summary()[0]["metrics"]["mae_hu"]
    assert (mean["n"], mean["mean"]) == (2, pytest.approx(found.rows[0]["mae_hu"]))
    rows = read_table(tree / "out.csv")
    assert [row["statistic"] for row in rows] == ["", "", "", "n", "mean", "min", "max"]
    assert float(rows[4]["mae_hu"]) == mean["mean"]
    assert rows[1]["reason"].startswith("truncated")


def test_a_result_without_its_reference_is_a_failed_case(tree):
    (tree / "ref/sub/c.nii").unlink()
    found = run(tree, "res", "ref")
    assert [row["case"] for row in found.rows if row["status"] == "failed"] == ["b.nii", "sub/c.nii"]
    assert found.rows[2]["reason"] == "does not exist"


@pytest.mark.parametrize(
    ("pred", "ref", "more", "words"),
    [
        ("res", "ref/b.nii", {}, "is not a folder"),
        ("res/a.nii", "ref", {}, "is a folder"),
        ("res", "ref", {"figure": Path("x.png")}, "one case"),
        ("res", "ref", {"out": Path("x.txt")}, "neither .csv nor .json"),
    ],
)
def test_what_does_not_go_together_is_usage(tree, pred, ref, more, words):
    with pytest.raises(UsageError, match=words):
        run(tree, pred, ref, **more)


def test_what_is_not_there_is_named(tree):
    for pred, ref, thick in (("no", "ref", None), ("res", "no", None), ("res/a.nii", "ref/b.nii", "no")):
        with pytest.raises(InputError, match="does not exist") as refused:
            run(tree, pred, ref, thick)
        assert refused.value.path == str(tree / "no")


def test_a_pairs_file_names_truth_and_thick_and_results_are_found_by_name(tmp_path):
    """15 slices at factor 2 are 7 thick ones: the last takes no part, in the truth neither."""
    pairs = []
    for name in ("a", "sub/b", "gone"):
        truth = scan(15, seed=len(pairs))
        thick, _ = simulate_volume(upended(truth) if name == "sub/b" else truth, factor=2)
        files = {"data": truth, "thick": thick, "res": Thinner(model="inverse", factor=2)(thick).volume}
        if name == "sub/b":
            files["data"] = upended(truth)
        for folder, volume in files.items():
            path = tmp_path / folder / f"{name}.nii"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_volume(volume, path)
        pairs.append({"thin": f"../data/{name}.nii", "thick": f"{name}.nii"})
    (tmp_path / "res/gone.nii").unlink()
    write_table(tmp_path / "thick/pairs.csv", ["thin", "thick"], pairs, overwrite=False)
    found = run(tmp_path, "res", "thick/pairs.csv", require=["gain>=0.5", "residual_mean<=0.5"])
    assert [(row["case"], row["method"]) for row in found.rows] == [
        ("a.nii", "result"), ("a.nii", "cubic"),
        ("sub/b.nii", "result"), ("sub/b.nii", "cubic"), ("gone.nii", ""),
    ]  # fmt: skip
    assert found.unmet() == []
    (tmp_path / "res/sub/b.nii").rename(tmp_path / "res/b.nii")  # flat: found by its bare name
    assert run(tmp_path, "res", "thick/pairs.csv").rows[2]["status"] == "ok"
    with pytest.raises(UsageError, match="named by the pairs file"):
        run(tmp_path, "res", "thick/pairs.csv", "thick")
    with pytest.raises(UsageError, match="folder of the results"):
        run(tmp_path, "res/a.nii", "thick/pairs.csv")


def test_an_interval_needs_eight_cases():
    rows = [
        {"case": f"{i}", "method": "result", "status": "ok", "mask": "body", "mae_hu": float(i)}
        for i in range(8)
    ]
    for n, has_one in ((7, False), (8, True)):
        found = Evaluation(rows[:n]).summary()[0]["metrics"]["mae_hu"]
        assert (found["n"], found["mean"], found["max"]) == (n, (n - 1) / 2, n - 1)
        assert (found["interval_95"] is not None) == has_one
    title, table = Evaluation(rows).tables()[1]
    assert title == "summary"
    assert table[0]["mae_hu, mean (min…max)"] == "3.5 (0…7)"


def test_a_folder_of_thin_scans_is_a_row_a_case_factor_and_method(tmp_path):
    for i in range(2):
        write_volume(scan(12, seed=i), tmp_path / f"{i}.nii")
    (tmp_path / "bad.nii").write_bytes(b"no image")
    options = ThinOptions(factors=(2.0, 3.0), methods=("inverse", "cubic"))
    found = evaluate_thin_files(tmp_path, options, Wanted(require=["gain>=9"]))
    ok = [(row["case"], row["factor"], row["method"]) for row in found.rows if row["status"] == "ok"]
    assert ok == [
        (f"{i}.nii", factor, method) for i in range(2) for factor in (2, 3) for method in ("inverse", "cubic")
    ]
    assert len(found.unmet()) == 4  # the first method's
    assert [group["metrics"]["gain_db"]["n"] for group in found.summary()] == [2, 2, 2, 2]
    with pytest.raises(SomeCasesFailed, match=r"1 of 3 cases failed, the first is bad.nii"):
        found.raise_for_outcome(tmp_path)
