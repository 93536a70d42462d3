"""A model file is read whole and checked, or refused; nothing in it is ever run."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ctsr.errors import WeightsError
from ctsr.models import zoo
from ctsr.models.simple_unet3d import SimpleUNet3D, SimpleUNet3DConfig

CONFIG = SimpleUNet3DConfig(channels=(4, 4))


def tensors() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SimpleUNet3D(CONFIG).state_dict()


def model(**changes: object) -> bytes:
    """A whole model file; `metadata` entries replaced as named, tensors by `tensors`."""
    data = zoo.pack("baseline", CONFIG.to_dict(), changes.pop("tensors", tensors()), card={"seed": 0})  # type: ignore[arg-type]
    header, body = taken_apart(data)
    header["__metadata__"] |= {k.replace("_", "."): v for k, v in changes.items()}
    return put_together(header, body)


def taken_apart(data: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_together(header: dict | str | bytes, body: bytes = b"") -> bytes:
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw + body


def changed(change, **metadata: object) -> bytes:
    """A model file whose header was changed by hand."""
    header, body = taken_apart(model(**metadata))
    return put_together(change(header) or header, body)


def _with(name: str, tensor: torch.Tensor | None) -> bytes:
    named = tensors() | {name: tensor}
    return model(tensors={n: t for n, t in named.items() if t is not None})


def _config(**values: object) -> bytes:
    return model(config=json.dumps(CONFIG.to_dict() | values))


def _torch_saved() -> bytes:
    import io

    file = io.BytesIO()
    torch.save(tensors(), file)
    return file.getvalue()


def _swap(header: dict) -> None:
    header["head.bias"]["data_offsets"] = header["head.weight"]["data_offsets"]


def _twice(header: dict) -> bytes:
    text = json.dumps(header)
    entry = json.dumps(header["head.bias"])
    return (text[:-1] + f', "head.bias": {entry}}}').encode()


def _dtype(header: dict) -> None:
    header["head.bias"]["dtype"] = "F64"


def _huge(header: dict) -> None:
    header["head.bias"]["shape"] = [2**62, 2**62]


def _number(header: dict) -> None:
    header["__metadata__"] = 5


def _mixed(header: dict) -> None:
    header["__metadata__"]["kind"] = ["baseline"]


NAN, FOUR = torch.tensor([float("nan")] * 8), torch.zeros(4)
BAD = {
    "empty": (lambda: b"", "truncated weights: 0 bytes"),
    "seven bytes": (lambda: model()[:7], "truncated weights: 7 bytes"),
    "cut in its header": (lambda: model()[:100], "truncated weights: 100 bytes, the header alone needs"),
    "cut in its data": (lambda: model()[:-100], "damaged or truncated weights"),
    "bytes after the end": (lambda: model() + b"\0" * 8, "damaged or truncated weights"),
    "a header of 2^62": (lambda: struct.pack("<Q", 2**62) + b"{", "header would have"),
    "a header of spaces": (lambda: put_together("{" + " " * (1 << 20) + "}"), "header would have"),
    "a key twice": (lambda: changed(_twice), "a key stands twice"),
    "metadata that is a number": (lambda: changed(_number), "no table of tensors"),
    "metadata that is no text": (lambda: changed(_mixed), "not a ctsr model"),
    "bad UTF-8": (lambda: put_together(b'{"\xff": {}}'), "not safetensors"),
    "nested a thousand times": (lambda: put_together('{"a":' * 5000 + "1" + "}" * 5000), "not safetensors"),
    "a list": (lambda: put_together("[1]"), "not safetensors"),
    "overlapping tensors": (lambda: changed(_swap), "damaged or truncated weights"),
    "a shape that is not its bytes": (lambda: changed(_huge), "damaged or truncated weights"),
    "float64": (lambda: changed(_dtype), "tensor head.bias is F64, expected F32"),
    "float16": (lambda: _with("head.bias", FOUR.half()), "tensor head.bias is F16, expected F32"),
    "a weight that is not finite": (lambda: _with("head.bias", NAN), "1 tensors are not finite, .*head.bias"),
    "another project's file": (lambda: safetensors.torch.save({"w": FOUR}), "not a ctsr model"),
    "format 99": (lambda: model(ctsr_format="99"), "model format 99, expected 1"),
    "an unknown kind": (lambda: model(kind="gan"), "a model of kind 'gan', expected one of baseline"),
    "no JSON": (lambda: model(config="{"), "not strict JSON"),
    "NaN": (lambda: model(config='{"hu_scale": NaN}'), "NaN is not JSON"),
    "infinity": (lambda: model(config='{"hu_scale": 1e999}'), "1e999 is not JSON"),
    "a number of 5000 digits": (lambda: model(config='{"unshuffle": %s}' % ("9" * 5000)), "not strict JSON"),
    "a configuration that is a list": (lambda: model(config="[1]"), "no JSON object"),
    "a configuration key twice": (lambda: model(config='{"unshuffle": 2, "unshuffle": 2}'), "stands twice"),
    "an unknown entry": (lambda: _config(depth=3), "makes no network.*depth"),
    "10^9 channels": (lambda: _config(channels=[10**9]), "a value outside 0…4096"),
    "no channels": (lambda: _config(channels=[]), "not 1…8 levels"),
    "nine levels": (lambda: _config(channels=[4] * 9), "not 1…8 levels"),
    "channels that are one number": (lambda: _config(channels=4), "makes no network"),
    "channels that are no number": (lambda: _config(channels=["4"]), "a value outside 0…4096"),
    "half a channel": (lambda: _config(channels=[4.5, 4]), "makes no network|do not fit"),
    "a missing tensor": (
        lambda: _with("head.bias", None),
        r"1 tensors do not fit .*head.bias: missing, expected \(8,\)",
    ),
    "an extra tensor": (lambda: _with("extra", FOUR), r"extra: \(4,\), expected none"),
    "another shape": (lambda: _with("head.bias", FOUR), r"head.bias: \(4,\), expected \(8,\)"),
    "another network's tensors": (lambda: _config(channels=[8, 4]), r"\d+ tensors do not fit"),
    "a pickle": (lambda: b"\x80\x04\x95junk", "a pickle, not safetensors: not opened"),
    "torch.save": (_torch_saved, "a pickle in a zip"),
    "a Git LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "a web page": (lambda: b"<!DOCTYPE html><html>", "a web page"),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_is_no_model_is_refused_in_words(fault):
    make, words = BAD[fault]
    with pytest.raises(WeightsError, match=words) as told:
        zoo.build(zoo.unpack(make(), "x.safetensors"), "x.safetensors")
    assert told.value.exit_code == 5
    assert told.value.path == "x.safetensors"
    assert len(str(told.value)) < 400  # a line, not a screen


def test_many_differences_show_three_and_their_number():
    file = zoo.unpack(model(tensors={n + "x": t for n, t in tensors().items()}), "x")
    with pytest.raises(WeightsError) as told:
        zoo.build(file, "x")
    assert f"{2 * len(tensors())} tensors do not fit" in str(told.value)
    assert str(told.value).count(";") == 2


def test_what_was_packed_comes_back():
    card = {"seed": 3, "trained_on": ["a"], "ranges": {"relative_width": [0.75, 2.1]}}
    named = tensors()
    data = zoo.pack("baseline", CONFIG.to_dict(), named, card=card, training={"raw/a": torch.ones(2)})
    file = zoo.unpack(data, "x")
    assert (file.kind, file.card) == ("baseline", card)
    assert file.sha256 == hashlib.sha256(data).hexdigest()
    assert file.training.keys() == {"raw/a"}
    assert file.tensors.keys() == named.keys()
    network = zoo.build(file, "x")  # which passes a training's own tensors by
    assert not network.training
    assert network.config == CONFIG
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, named[name])


@pytest.mark.parametrize("length", range(0, 264, 8))
def test_a_header_of_any_length_is_read(length):
    """A length whose low byte is 0x80 looks like the first byte of a pickle."""
    card = {"pad": "x" * length}
    data = zoo.pack("baseline", CONFIG.to_dict(), tensors(), card=card)
    assert zoo.unpack(data, "x").card == card


def test_the_same_content_gives_the_same_bytes():
    """The metadata stand in our order: safetensors writes a hash table's, another in every process."""
    data = zoo.pack("baseline", CONFIG.to_dict(), tensors(), card={"b": 1, "seed": 0})
    assert data == zoo.pack("baseline", CONFIG.to_dict(), tensors(), card={"seed": 0, "b": 1})
    header, _ = taken_apart(data)
    assert list(header["__metadata__"]) == ["ctsr.format", "kind", "config", "card"]
    assert struct.unpack("<Q", data[:8])[0] % 8 == 0
    assert safetensors.torch.load(data).keys() == tensors().keys()


def test_what_is_not_finite_is_not_packed():
    with pytest.raises(ValueError, match="not JSON compliant"):
        zoo.pack("baseline", {}, {}, card={"best": float("inf")})


def test_no_pickle_is_imported_to_read_weights():
    root = Path(zoo.__file__).parents[1]
    for path in root.rglob("*.py"):
        text = path.read_text("utf-8")
        assert "import pickle" not in text, path
        assert "torch.load(" not in text.replace("safetensors.torch.load(", ""), path
