"""Patients stay together, stay where they are, and leave no set empty."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctsr.data.splits import SETS, assign, list_path, update_lists
from ctsr.errors import InputError
from ctsr.io.lists import read_file_list

PATIENTS = st.sets(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=40)


@given(PATIENTS)
def test_no_set_is_empty_from_three_patients_on(patients):
    counts = Counter(assign(patients).values())
    assert sum(counts.values()) == len(patients)
    if len(patients) >= 3:
        assert min(counts[name] for name in SETS) >= 1


@pytest.mark.parametrize(
    ("n", "train", "val", "test"),
    [(1, 1, 0, 0), (2, 2, 0, 0), (3, 1, 1, 1), (4, 2, 1, 1), (15, 11, 2, 2), (100, 80, 10, 10)],
)
def test_shares_are_rounded(n, train, val, test):
    counts = Counter(assign([f"p{i}" for i in range(n)]).values())
    assert [counts[name] for name in SETS] == [train, val, test]


@given(PATIENTS, st.randoms(use_true_random=False))
def test_the_order_of_patients_does_not_matter(patients, random):
    shuffled = sorted(patients)
    random.shuffle(shuffled)
    assert assign(shuffled) == assign(patients)


@given(PATIENTS, PATIENTS)
def test_who_stands_in_a_set_stays_there(before, later):
    kept = assign(before)
    assert {p: s for p, s in assign(before | later, kept=kept).items() if p in kept} == kept


def test_names_alone_do_not_decide():
    sets = assign([f"{i:03d}" for i in range(100)])
    assert {sets[f"{i:03d}"] for i in range(10)} != {"val"}
    assert len({i // 25 for i in range(100) if sets[f"{i:03d}"] != "train"}) == 4  # from all over the names


def folder_with(tmp_path: Path, *files: str) -> Path:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    return tmp_path


def written(data: Path, name: str) -> list[str]:
    path = list_path(data, name)
    return [f.relative_to(data).as_posix() for f in read_file_list(path)] if path.read_text() else []


def test_the_lists_are_what_training_reads(tmp_path):
    patient_of = {f"p{i}/scan{k}.nii.gz": f"p{i}" for i in range(5) for k in range(2)}
    data = folder_with(tmp_path, *patient_of)
    sets = update_lists(data, patient_of)
    assert written(data, "all") == sorted(patient_of)
    for name in SETS:
        assert written(data, name) == sorted(f for f, s in sets.items() if s == name)
    for i in range(5):
        assert sets[f"p{i}/scan0.nii.gz"] == sets[f"p{i}/scan1.nii.gz"]


def test_a_row_that_stands_in_a_list_keeps_its_place_and_draws_its_patient(tmp_path):
    data = folder_with(tmp_path, *(f"{i}.nii.gz" for i in range(6)), "by-hand.nii.gz")
    list_path(data, "test").write_text("0.nii.gz\n1.nii.gz\n2.nii.gz\nby-hand.nii.gz\n")
    patients = {f"{i}.nii.gz": "0" if i == 5 else str(i) for i in range(6)}
    sets = update_lists(data, patients)
    assert [sets[f"{i}.nii.gz"] for i in (0, 1, 2, 5)] == ["test"] * 4
    assert written(data, "test") == ["0.nii.gz", "1.nii.gz", "2.nii.gz", "5.nii.gz", "by-hand.nii.gz"]
    assert update_lists(data, patients) == sets


def test_a_patient_in_two_lists_is_refused(tmp_path):
    data = folder_with(tmp_path, "a.nii.gz", "b.nii.gz")
    list_path(data, "train").write_text("a.nii.gz\n")
    list_path(data, "test").write_text("b.nii.gz\n")
    with pytest.raises(InputError, match=r"stand in train_files\.txt and in test_files\.txt"):
        update_lists(data, {"a.nii.gz": "p", "b.nii.gz": "p"})


def test_a_file_in_two_lists_is_refused(tmp_path):
    data = folder_with(tmp_path, "a.nii.gz")
    list_path(data, "train").write_text("a.nii.gz\n")
    list_path(data, "val").write_text("a.nii.gz\n")
    with pytest.raises(InputError, match=r"stands in train_files\.txt too"):
        update_lists(data, {"a.nii.gz": "p"})


@given(PATIENTS, st.sampled_from([(10, 45, 45), (80, 10, 10), (34, 33, 33), (1, 98, 1)]), st.integers(0, 9))
def test_whatever_the_shares_no_set_is_empty_from_three_patients_on(patients, percent, seed):
    shares = {"val": percent[1] / 100, "test": percent[2] / 100}
    counts = Counter(assign(patients, shares=shares, seed=seed).values())
    assert sum(counts.values()) == len(patients)
    if len(patients) >= 3:
        assert min(counts[name] for name in SETS) >= 1


def test_a_share_of_nothing_is_an_empty_set():
    patients = [f"p{i}" for i in range(10)]
    assert set(assign(patients, shares={"val": 0.0, "test": 0.0}).values()) == {"train"}
    assert set(assign(patients, shares={"val": 0.5, "test": 0.5}).values()) == {"val", "test"}


def test_another_seed_is_another_split():
    patients = [f"p{i}" for i in range(100)]
    assert assign(patients, seed=1) != assign(patients)
    assert assign(patients, seed=0) == assign(patients)
