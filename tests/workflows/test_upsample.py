"""The laws of `upsample`: places, values, measured slices, and files that are whole or not there."""

from __future__ import annotations

import hashlib
import itertools
import json
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ctsr
from ctsr.core.volume import AIR, Volume
from ctsr.core.zgrid import ZGrid
from ctsr.errors import CtsrError, GeometryError, InputError, ResourceError, UsageError, WeightsError
from ctsr.physics.operator import grid_operator
from ctsr.physics.profile import ProfileKind, SliceProfile
from ctsr.workflows import upsample as module
from ctsr.workflows.folder import Report
from ctsr.workflows.requests import FileOptions
from ctsr.workflows.thinner import Thinner
from ctsr.workflows.upsample import upsample_files
from tests.infer.tiny import checkpoint
from tests.io.make import affine_of, ct, nifti, put
from tests.strategies import rotation, volumes

MATRICES = ["nearest", "linear", "cubic", "inverse"]
MODELS = ["baseline", *MATRICES]
FACTORS = [2.0, 3.0, 4.0, 5.0, 2.5, 1.3]


@pytest.fixture(scope="module", autouse=True)
def _weights(tmp_path_factory):
    """Every `baseline` here is a small random network."""
    weights.path = checkpoint(tmp_path_factory.mktemp("weights"))
    yield
    thinner.cache_clear()


def weights() -> str:
    return str(weights.path)


@cache
def thinner(model: str = "baseline", **options) -> Thinner:
    """In fp32 unless told otherwise: what must not change the HU moves them by less there."""
    told = {"checkpoint": weights() if model == "baseline" else None, "dtype": "fp32"}
    return Thinner(model=model, **(told | options))


def volume(shape=(9, 8, 7), affine=None, seed=0) -> Volume:
    return Volume(ct(shape, seed), affine_of() if affine is None else affine)


def run(source, target, model="baseline", *, report=Report(), files=None, **options):
    (row,) = upsample_files(source, target, thinner(model, **options), files or FileOptions(), report)
    return row


def turned(v: Volume, order, flips) -> Volume:
    """The same patient, stored with its axes in another order and direction."""
    affine = np.array(v.affine)
    affine[:3, :3] = affine[:3, order]
    data = v.data.transpose(order)
    for axis, flip in enumerate(flips):
        if flip:
            affine[:3, 3] += affine[:3, axis] * (data.shape[axis] - 1)
            affine[:3, axis] *= -1
            data = np.flip(data, axis)
    return Volume(data, affine)


def assert_same_patient(model, v, made, order, flips):
    of_turned = thinner(model)(turned(v, order, flips)).volume
    expected = turned(made, order, flips)
    np.testing.assert_array_equal(of_turned.data, expected.data)
    np.testing.assert_allclose(of_turned.affine, expected.affine, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("model", ["baseline", "inverse"])
def test_the_storage_order_changes_nothing(model):
    affine = affine_of()
    affine[:3, :3] = rotation(np.array([0.9, 0.2, 0.1, 0.3])) @ affine[:3, :3]
    v = volume((6, 5, 4), affine=affine)
    made = thinner(model)(v).volume
    for order in itertools.permutations(range(3)):
        for flips in itertools.product((False, True), repeat=3):
            assert_same_patient(model, v, made, list(order), flips)


@given(
    v=volumes(max_side=6, min_slices=2),
    order=st.permutations(range(3)),
    flips=st.tuples(*[st.booleans()] * 3),
    model=st.sampled_from(MODELS),
)
def test_the_storage_order_changes_nothing_in_any_direction(v, order, flips, model):
    assert_same_patient(model, v, thinner(model)(v).volume, list(order), flips)


def test_flipping_the_patient_flips_the_result():
    v = volume()
    mirror = Volume(v.data[:, :, ::-1], v.affine)
    for model in MATRICES:  # a network has no such law
        one, other = (thinner(model)(each).volume.data for each in (v, mirror))
        assert np.abs(one.astype(int) - other[:, :, ::-1]).max() <= 1  # half a HU may round either way


@given(v=volumes(max_side=6, min_slices=2), factor=st.one_of(st.sampled_from(FACTORS), st.floats(1.01, 20)))
def test_the_slab_stays_where_it_was(v, factor):
    made = Thinner(model="linear", factor=factor)(v).volume
    axis = int(np.argmax(v.spacing))
    n, m, s = v.shape[axis], made.shape[axis], v.spacing[axis]
    np.testing.assert_allclose(made.spacing[axis], s / factor, rtol=1e-6)
    assert abs(m * s / factor - n * s) <= s / factor / 2 + 1e-6
    middle = [(np.array([*each.shape, 1]) - [1, 1, 1, 0]) / [2, 2, 2, 1] for each in (v, made)]
    np.testing.assert_allclose(v.affine @ middle[0], made.affine @ middle[1], atol=1e-4)
    others = [i for i in range(3) if i != axis]
    np.testing.assert_array_equal(made.affine[:3, others], v.affine[:3, others])


@pytest.mark.parametrize("flip", [False, True])
def test_nibabel_sees_the_slices_in_their_places(tmp_path, flip):
    """15° oblique: the direction does not turn; 5 → 2.5 mm moves the first centre by −1.25 mm along it."""
    tilt = np.deg2rad(15)
    affine = affine_of((0.7, 0.7, 5.0))
    affine[:3, :3] = rotation(np.array([np.cos(tilt / 2), np.sin(tilt / 2), 0, 0])) @ affine[:3, :3]
    if flip:
        affine[:3, 2] *= -1
    put(tmp_path, nifti(ct(), affine))
    run(tmp_path / "x.nii", tmp_path / "out.nii.gz")
    before, after = nib.load(tmp_path / "x.nii"), nib.load(tmp_path / "out.nii.gz")
    assert after.shape == (9, 8, 14)
    along = before.affine[:3, 2] / 5
    np.testing.assert_allclose(after.affine[:3, 2], 2.5 * along, atol=1e-6)
    np.testing.assert_allclose(after.affine[:3, :2], before.affine[:3, :2], atol=1e-6)
    np.testing.assert_allclose(after.affine[:3, 3] - before.affine[:3, 3], -1.25 * along, atol=1e-4)
    assert after.header["sform_code"] == after.header["qform_code"] == 1
    np.testing.assert_allclose(after.get_qform(), after.get_sform(), atol=1e-3)
    assert after.header.get_data_dtype() == np.int16


def test_a_wire_stays_at_its_height():
    data = np.full((9, 9, 12), -1000, np.int16)
    data[4, 4, 6] = 1000
    v = Volume(data, affine_of())
    for model in ("linear", "cubic", "inverse"):
        made = thinner(model, factor=5.0)(v).volume
        weight = made.data[4, 4].astype(float) + 1000
        k = (weight * np.arange(60)).sum() / weight.sum()
        height = made.affine @ [4, 4, k, 1]
        np.testing.assert_allclose(height, v.affine @ [4, 4, 6, 1], atol=0.02 * 2.5)


@pytest.mark.parametrize("model", MATRICES)
@pytest.mark.parametrize("factor", [2.0, 2.5, 1.3])
def test_a_uniform_volume_keeps_its_hu(model, factor):
    data = np.empty((6, 5, 8), np.float32)
    for value in (-1024, -1000, 0, 40, 3071, 32767):
        data[:] = value
        made = thinner(model, factor=factor)(Volume(data.copy(), affine_of())).volume
        np.testing.assert_allclose(made.data, value, atol=1e-3 * max(1, abs(value) / 3071))


def stored(kind: str) -> bytes:
    hu = ct()
    return {
        "int16": lambda: nifti(hu),
        "uint16 + 1024": lambda: nifti((hu + 1024).astype(np.uint16), inter=-1024),
        "uint8 × 16": lambda: nifti(((hu + 1024) // 16).astype(np.uint8), slope=16, inter=-1024),
        "int32": lambda: nifti(hu.astype(np.int32)),
        "float32": lambda: nifti(hu.astype(np.float32)),
        "float64": lambda: nifti(hu.astype(np.float64)),
        "big-endian": lambda: big_endian(hu),
        "slope −1": lambda: nifti(-hu, slope=-1),
    }[kind]()


def big_endian(hu: np.ndarray) -> bytes:
    image = nib.Nifti1Image(hu, affine_of(), nib.Nifti1Header(endianness=">"), dtype=hu.dtype)
    image.set_sform(affine_of(), 1)
    image.set_qform(affine_of(), 1)
    image.header.set_xyzt_units("mm")
    raw = image.to_bytes()
    assert raw[:4] == b"\0\0\1\x5c"
    return raw


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("int16", np.int16),
        ("uint16 + 1024", np.int16),
        ("int32", np.int32),
        ("float32", np.float32),
        ("float64", np.float32),
        ("big-endian", np.int16),
        ("slope −1", np.int16),
    ],
)
@pytest.mark.parametrize("model", ["baseline", "cubic"])
def test_a_type_of_storage_changes_no_hu(tmp_path, kind, dtype, model):
    put(tmp_path, stored(kind))
    run(tmp_path / "x.nii", tmp_path / "out.nii", model)
    made = nib.load(tmp_path / "out.nii")
    expected = thinner(model)(Volume(ct().astype(np.float32), affine_of())).volume.data
    if np.dtype(dtype).kind == "i":
        expected = np.rint(expected)
    assert made.get_data_dtype() == dtype
    assert made.dataobj.slope == 1
    assert made.dataobj.inter == 0
    np.testing.assert_allclose(np.asarray(made.dataobj), expected, atol=0.01)


def test_eight_bits_with_a_slope_become_int16(tmp_path):
    put(tmp_path, stored("uint8 × 16"))
    run(tmp_path / "x.nii", tmp_path / "out.nii", "inverse")
    made = nib.load(tmp_path / "out.nii")
    assert made.get_data_dtype() == np.int16
    assert np.asarray(made.dataobj).min() < -900


def test_an_unsigned_type_does_not_wrap():
    data = np.zeros((6, 5, 8), np.uint16)
    data[:, :, 4:] = 3000
    made = thinner("cubic")(Volume(data, affine_of())).volume.data  # overshoots below 0
    assert made.dtype == np.uint16
    assert made.max() < 4000


@pytest.mark.parametrize("model", MODELS)
def test_metal_keeps_its_value_and_does_not_wrap(model):
    data = ct((8, 8, 20))
    data[2:5, 2:5] = 3071
    data[6:, 6:, 5:] = 32767
    made = thinner(model)(Volume(data, affine_of())).volume.data
    assert made.min() > -20000  # a wrapped overshoot would be near −32768
    if model != "baseline":  # a random network changes what it likes
        assert (made[2:5, 2:5] == 3071).all()
        assert (made[6:, 6:, 30:] == 32767).all()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("factor", [2.0, 2.5])
def test_padding_is_kept_and_does_not_bleed(model, factor):
    data = ct((8, 8, 12))
    holes = np.zeros(data.shape, bool)
    holes[:2], holes[5, 5, 3:6] = True, True
    data[holes] = -2000
    data[0, 0, 0] = -3024
    made = thinner(model, factor=factor)(Volume(data, affine_of())).volume.data
    nearest = np.floor(ZGrid(12, factor).centres).astype(int)
    padded = holes[:, :, nearest]
    np.testing.assert_array_equal(made[padded], data[:, :, nearest][padded])
    filled = Volume(np.where(holes, np.int16(AIR), data), affine_of())
    as_air = thinner(model, factor=factor)(filled).volume.data
    np.testing.assert_array_equal(made[~padded], as_air[~padded])


def residual(target: Path, thick: np.ndarray, factor: float, ratio: float, profile: SliceProfile):
    """|A x − y|, from the file by nibabel and an A of our own."""
    x = np.asarray(nib.load(target).dataobj).astype(np.float64)
    A = grid_operator(ZGrid(thick.shape[2], factor), profile, spacing=2.5, thickness=2.5 * ratio)
    return np.abs(x @ A.T - thick)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("model", ["baseline", "inverse"])
@pytest.mark.parametrize("ratio", [0.8, 1.25])
def test_measured_slices_survive_rounding(tmp_path, model, factor, ratio):
    put(tmp_path, nifti())
    out = tmp_path / "out.nii"
    run(tmp_path / "x.nii", out, model, factor=factor, thickness=2.5 * ratio)
    found = residual(out, ct(), factor, ratio, SliceProfile())
    assert found.max() <= 0.75
    assert found.mean() <= (0.2 if factor >= 2 else 0.3)
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["consistency_residual_max_hu"] == pytest.approx(found.max(), abs=0.01)
    assert record["consistency_residual_mean_hu"] == pytest.approx(found.mean(), abs=0.01)
    assert record["consistency_left_out_share"] == 0


@pytest.mark.parametrize("kind", ["box", "triangle", "file"])
def test_measured_slices_survive_with_every_profile(tmp_path, kind):
    z = np.linspace(-2.5, 2.5, 41)
    profile = (
        SliceProfile(ProfileKind.FILE, np.column_stack([z, np.exp(-(z**2))]))
        if kind == "file"
        else SliceProfile(ProfileKind(kind))
    )
    put(tmp_path, nifti())
    out = tmp_path / "out.nii"
    upsample_files(
        tmp_path / "x.nii",
        out,
        Thinner(checkpoint=weights(), factor=3, profile=profile),
        FileOptions(),
    )
    assert residual(out, ct(), 3, 1, profile).max() <= 0.75


def test_without_consistency_the_record_says_so_and_the_residual_shows_it(tmp_path):
    put(tmp_path, nifti())
    run(tmp_path / "x.nii", tmp_path / "out.nii", factor=3.0, is_consistent=False)
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["consistency"] == "off"
    assert record["consistency_residual_max_hu"] > 1


def test_what_padding_and_limits_reach_is_left_out_of_the_residual():
    data = ct((8, 8, 12))
    data[:2] = -2000
    made = thinner()(Volume(data, affine_of()))
    assert made.record["consistency_left_out_share"] == pytest.approx(0.25)
    assert made.record["consistency_residual_max_hu"] <= 0.75


def test_a_spacing_is_reached_exactly():
    made = thinner("inverse", spacing=0.8)(volume())
    np.testing.assert_allclose(made.volume.spacing, [0.7, 0.8, 0.8], rtol=1e-9)
    assert made.volume.shape[2] == 22  # 7 × 2.5 mm / 0.8 mm = 21.9
    assert made.record["factor"] == pytest.approx(3.125)


def test_a_thickness_for_the_result_is_recorded_and_smooths():
    v = volume()
    sharp, smooth = (thinner(factor=4.0, out_thickness=t)(v) for t in (None, 2.0))
    assert (sharp.record["SliceThickness"], smooth.record["SliceThickness"]) == (0.625, 2.0)
    steps = [np.abs(np.diff(made.volume.data.astype(float), axis=2)).mean() for made in (sharp, smooth)]
    assert steps[1] < steps[0]


def fewer_bytes(model: str, v: Volume, **options) -> Thinner:
    """A thinner that may take so much less than the whole would take that it needs three slabs or more."""
    options |= {"model": model, "checkpoint": weights() if model == "baseline" else None, "dtype": "fp32"}
    whole = Thinner(**options).job(v).plan.peak_bytes
    for less in np.geomspace(1e3, 1e8, 80):
        candidate = Thinner(**options, max_memory=whole - less)
        if len(candidate.job(v).plan.slabs) > 2:
            return candidate
    raise AssertionError("no limit cuts this volume into slabs")


@pytest.mark.parametrize("model", ["baseline", "inverse"])
@pytest.mark.parametrize("factor", [2.0, 2.5])
def test_a_small_memory_changes_no_hu(model, factor):
    v = Volume(ct((14, 12, 120)).astype(np.float32), affine_of())
    whole = thinner(model, factor=factor)(v)
    slabs = fewer_bytes(model, v, factor=factor)(v)
    np.testing.assert_allclose(slabs.volume.data, whole.volume.data, atol=0.05)
    for key in ("consistency_residual_mean_hu", "consistency_residual_max_hu", "consistency_left_out_share"):
        assert slabs.record[key] == pytest.approx(whole.record[key], abs=0.01)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_windows_change_no_hu(dtype):
    v = Volume(ct((40, 36, 8)).astype(np.float32), affine_of())
    whole, one, other = (thinner(patch=p, dtype=dtype)(v).volume.data for p in (None, (8, 8, 8), (3, 16, 24)))
    np.testing.assert_allclose(one, whole, atol=0.05)
    np.testing.assert_allclose(one, other, atol=0.05)


def test_slabs_come_in_the_order_of_the_file(tmp_path):
    """Written as they are computed, with the slices stored from foot to head and from head to foot."""
    for step, name in ((2.5, "up"), (-2.5, "down")):
        affine = affine_of()
        affine[2, 2] = step
        put(tmp_path, nifti(ct((12, 10, 60)), affine), f"{name}.nii")
        v = Volume(ct((12, 10, 60)), affine)
        slabs = fewer_bytes("inverse", v)
        assert slabs.job(v, is_streamed=True).can_stream
        upsample_files(tmp_path / f"{name}.nii", tmp_path / f"{name}-out.nii", slabs, FileOptions())
        made = np.asarray(nib.load(tmp_path / f"{name}-out.nii").dataobj)
        np.testing.assert_array_equal(made, thinner("inverse")(v).volume.data)


@pytest.mark.parametrize("model", ["baseline", "cubic"])
def test_the_same_run_gives_the_same_bytes(tmp_path, model):
    put(tmp_path, nifti(), "x.nii.gz")
    for name in ("a", "b"):
        run(tmp_path / "x.nii.gz", tmp_path / f"{name}.nii.gz", model)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("a", "b")]
    for record in records:
        record.pop("seconds_compute")
    assert records[0] == records[1]


def test_a_record_tells_how_the_output_came_about(tmp_path):
    raw = put(tmp_path, nifti()).read_bytes()
    row = run(tmp_path / "x.nii", tmp_path / "out.nii.gz", dtype="fp32")
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["input_sha256"] == hashlib.sha256(raw).hexdigest()
    assert record["output_sha256"] == hashlib.sha256((tmp_path / "out.nii.gz").read_bytes()).hexdigest()
    assert record["weights_sha256"] == hashlib.sha256(Path(weights()).read_bytes()).hexdigest()
    assert record["weights"] == "tiny.safetensors"
    assert "research use only" in record["notice"]
    assert (record["SliceThickness"], record["SpacingBetweenSlices"]) == (1.25, 1.25)
    assert (record["device"], record["dtype"], record["model"]) == ("cpu", "fp32", "baseline")
    assert row["slices_out"] == record["slices_out"] == 14


def test_our_output_can_be_the_next_input(tmp_path):
    put(tmp_path, nifti(ct(), affine_of((0.3, 0.3, 5.0))))
    run(tmp_path / "x.nii", tmp_path / "one.nii", "inverse", out_thickness=3.0)
    run(tmp_path / "one.nii", tmp_path / "two.nii", "inverse")
    assert json.loads((tmp_path / "two.json").read_text())["input_slice_thickness_mm"] == 3.0


def test_a_picture_and_the_added_detail_are_written(tmp_path):
    put(tmp_path, nifti())
    files = FileOptions(preview=tmp_path / "p.png", save_added=tmp_path / "added.nii")
    run(tmp_path / "x.nii", tmp_path / "out.nii", files=files)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    added, out = (nib.load(tmp_path / name) for name in ("added.nii", "out.nii"))
    np.testing.assert_allclose(added.affine, out.affine)
    assert residual(tmp_path / "added.nii", 0 * ct(), 2, 1, SliceProfile()).max() < 0.25
    inverse = thinner("inverse")(Volume(ct().astype(np.float32), affine_of())).volume.data
    np.testing.assert_allclose(np.asarray(out.dataobj), inverse + np.asarray(added.dataobj), atol=0.51)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Stop(BaseException):
    """As a signal would come."""


@pytest.mark.parametrize("fault", [Stop, MemoryError, OSError])
@pytest.mark.parametrize("is_there", [False, True])
def test_a_run_that_breaks_off_leaves_all_as_it_was(tmp_path, fault, is_there):
    put(tmp_path, nifti(), "x.nii.gz")
    if is_there:
        (tmp_path / "out.nii.gz").write_bytes(b"old")
        (tmp_path / "out.json").write_text("{}")
    before = snapshot(tmp_path)

    def progress(share, words):
        raise fault

    files = FileOptions(overwrite=True, preview=tmp_path / "p.png", save_added=tmp_path / "added.nii")
    with pytest.raises(fault):
        run(
            tmp_path / "x.nii.gz", tmp_path / "out.nii.gz",
            report=Report(progress=progress), files=files,
        )  # fmt: skip
    assert snapshot(tmp_path) == before


def test_the_image_comes_last(tmp_path, monkeypatch):
    put(tmp_path, nifti())
    monkeypatch.setattr(module, "write_bytes", lambda *a, **k: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        run(tmp_path / "x.nii", tmp_path / "out.nii", files=FileOptions(preview=tmp_path / "p.png"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.nii"]


def test_a_dry_run_writes_nothing_and_says_what_it_would_take(tmp_path):
    put(tmp_path, nifti())
    row = run(tmp_path / "x.nii", tmp_path / "out.nii", files=FileOptions(is_dry_run=True))
    assert [p.name for p in tmp_path.iterdir()] == ["x.nii"]
    assert row["status"] == "planned"
    assert row["peak_gb"] > 0.1
    assert (row["slabs"], row["windows"], row["slices_out"]) == (1, 1, 14)


def test_two_outputs_of_one_name_are_refused(tmp_path):
    put(tmp_path, nifti())
    out = tmp_path / "out.nii"
    with pytest.raises(UsageError, match="two outputs"):
        run(tmp_path / "x.nii", out, files=FileOptions(save_added=tmp_path / "." / "out.nii"))
    with pytest.raises(UsageError, match="neither"):
        run(tmp_path / "x.nii", out, files=FileOptions(save_added=tmp_path / "added.png"))


def test_the_sidecar_of_the_input_is_not_overwritten(tmp_path):
    put(tmp_path, nifti(), "x.nii.gz")
    (tmp_path / "x.json").write_text('{"SliceThickness": 2.5}')
    with pytest.raises(UsageError, match=r"x\.json"):
        run(tmp_path / "x.nii.gz", tmp_path / "x.nii", files=FileOptions(overwrite=True))
    assert json.loads((tmp_path / "x.json").read_text()) == {"SliceThickness": 2.5}


@pytest.mark.parametrize(
    ("v", "options", "error", "words"),
    [
        (volume((9, 8, 1)), {}, GeometryError, "1 slice"),
        (Volume(ct(), affine_of((0.7, 0.7, 0.75))), {}, GeometryError, "near-isotropic"),
        (volume(), {"thickness": 25.0}, InputError, "25 mm at a spacing of 2.5 mm"),
        (volume(), {"thickness": 0.4}, InputError, "outside 0.2…4"),
        (volume(), {"spacing": 2.5}, UsageError, "--spacing: 2.5 mm"),
        (volume(), {"spacing": 0.1}, UsageError, "--spacing: 0.1 mm"),
        (volume(), {"out_thickness": 2.5}, UsageError, "--out-thickness: 2.5 mm is not below"),
        (volume(), {"patch": (4, 5, 8)}, UsageError, "no multiples of 4"),
        (volume(), {"max_memory": 1e8}, ResourceError, "GB at least, 0.10 GB may be used"),
        (volume((2, 2, 2000)), {"factor": 17.0}, UsageError, "34,000 slices"),
    ],
)
def test_what_can_not_be_done_right_is_refused(v, options, error, words):
    with pytest.raises(error, match=words) as caught:
        Thinner(checkpoint=weights(), **options)(v)
    assert caught.type is error


def test_one_slice_can_be_repeated():
    made = thinner("nearest", factor=3.0)(volume((9, 8, 1))).volume
    assert (made.data == ct((9, 8, 1))).all()


@pytest.mark.parametrize("shape", [(9, 8, 2), (9, 8, 3), (1, 1, 9), (1, 9, 9), (2, 3, 40)])
@pytest.mark.parametrize("model", MODELS)
def test_small_volumes_work(shape, model):
    made = thinner(model, factor=2.5)(volume(shape)).volume
    assert made.shape == (*shape[:2], ZGrid(shape[2], 2.5).m)


def test_a_slice_axis_may_be_any_and_may_be_chosen():
    v = Volume(ct((7, 9, 8)), np.diag([2.5, 0.7, 0.8, 1.0]))
    assert thinner("linear")(v).volume.shape == (14, 9, 8)
    assert Thinner(model="linear", axis=1, factor=2)(v).volume.shape == (7, 18, 8)


@pytest.mark.parametrize(
    ("ranges", "words"),
    [({"input_spacing_mm": [3, 5]}, "slice spacing 2.5 mm"), ({"input_spacing_mm": [1, 5]}, "")],
)
def test_inputs_unlike_the_training_are_told(tmp_path, ranges, words):
    path = str(checkpoint(tmp_path, {"ranges": ranges}))
    made = Thinner(checkpoint=path)(volume())
    assert words in "".join(made.record["outside_trained_range"])
    assert bool(made.record["outside_trained_range"]) == bool(words)
    if words:
        with pytest.raises(InputError, match=words):
            Thinner(checkpoint=path, is_strict=True)(volume())


def test_missing_weights_never_become_random_ones(tmp_path):
    made = Thinner(checkpoint=str(tmp_path / "none.safetensors"))
    with pytest.raises(WeightsError, match="no such model file"):
        made(volume())


def test_the_library_neither_prints_nor_exits(capfd, tmp_path):
    put(tmp_path, nifti())
    v = ctsr.read(tmp_path / "x.nii")
    thin = ctsr.upsample(v, checkpoint=weights(), dtype="fp32")
    ctsr.write(thin, tmp_path / "out.nii")
    run(tmp_path / "x.nii", tmp_path / "file.nii")
    assert (tmp_path / "out.nii").read_bytes()[352:] == (tmp_path / "file.nii").read_bytes()[352:]
    with pytest.raises(CtsrError):
        ctsr.Upsampler(factor=0.5)
    assert capfd.readouterr() == ("", "")


def test_an_upsampler_keeps_its_network():
    keeps = ctsr.Upsampler(checkpoint=weights())
    first, second = keeps(volume()), keeps(volume())
    np.testing.assert_array_equal(first.volume.data, second.volume.data)
    assert keeps._engine is not None
    assert any("thickness" in note for note in first.notes)
