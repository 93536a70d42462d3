"""Devices and number formats: named exactly, never replaced in silence."""

from __future__ import annotations

import pytest
import torch

from ctsr.errors import ResourceError, UsageError
from ctsr.infer.device import choose_device, choose_dtype


@pytest.mark.parametrize("name", ["CPU", "cuda:-1", "cuda:07", "xyz", "meta", "", "cuda:", "cpu "])
def test_a_name_that_is_no_device_is_a_usage_error(name):
    with pytest.raises(UsageError, match="--device"):
        choose_device(name)


def test_a_device_that_is_not_there_is_a_resource_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ResourceError, match="no CUDA device"):
        choose_device("cuda:7")
    with pytest.raises(ResourceError, match="no Apple GPU"):
        choose_device("mps")
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


def test_a_number_format_is_as_asked_or_explained(monkeypatch):
    cpu = torch.device("cpu")
    assert choose_dtype("bf16", cpu)[0] is torch.bfloat16
    for has_bf16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has_bf16: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        made, reason = choose_dtype("auto", cpu)
        assert made is expected
        assert ":" in reason
    with pytest.raises(UsageError, match="--dtype"):
        choose_dtype("fp64", cpu)
