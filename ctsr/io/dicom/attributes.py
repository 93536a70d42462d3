"""The attributes that a derived slice may copy: of their kind, public, wherever the source keeps them."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from ctsr.io.dicom.records import Slice

if TYPE_CHECKING:
    from pydicom.dataelem import DataElement
    from pydicom.dataset import Dataset

__all__ = ["Attributes", "public_copy"]

# what pydicom raises on bytes that are no such value, on sequences that end too early, and on private tags
_UNREADABLE = (ValueError, TypeError, KeyError, OverflowError, NotImplementedError, EOFError, OSError)
_AGE = re.compile(r"\d{3}[DWMY]")
_IN_ENHANCED = {  # classic integer strings that multi-frame objects hold as binary numbers
    "ExposureTime": "ExposureTimeInms",
    "XRayTubeCurrent": "XRayTubeCurrentInmA",
    "Exposure": "ExposureInmAs",
    "AcquisitionNumber": "FrameAcquisitionNumber",
}


class Attributes:
    """The attributes of one source slice, wherever its object keeps them: frame, shared groups, top level."""

    def __init__(self, slice_: Slice) -> None:
        self._places = [slice_.header]
        if slice_.frame is not None:
            per_frame, shared = (
                _element(slice_.header, f"{which}FunctionalGroupsSequence")
                for which in ("PerFrame", "Shared")
            )
            groups = [per_frame.value[slice_.frame]] if per_frame else []
            groups += [shared.value[0]] if shared else []
            # keys(): a data set itself yields its elements, decoded
            held = [_element(group, tag) for group in groups for tag in group.keys()]  # noqa: SIM118
            self._places[:0] = [e.value[0] for e in held if e is not None and e.VR == "SQ"]

    def find(self, keyword: str) -> DataElement | None:
        """The element, if it has values that can be read."""
        for place in self._places:
            for name in (keyword, _IN_ENHANCED.get(keyword)):
                if name and (element := _element(place, name)):
                    return element
        return None

    def value(self, keyword: str) -> Any:
        element = self.find(keyword)
        return None if element is None else element.value


def _element(place: Dataset, name: Any) -> DataElement | None:
    """An element that has values, of the kind that the dictionary asks for: KVP "120 kV" is as good as absent."""
    from pydicom.datadict import dictionary_VM, dictionary_VR
    from pydicom.errors import BytesLengthException

    if name not in place:
        return None
    try:
        element: DataElement = place[name]
        if dictionary_VR(element.tag) != element.VR or element.is_empty:
            return None
        values = list(element.value) if element.VM > 1 or element.VR == "SQ" else [element.value]
        is_one = len(values) == 1 or dictionary_VM(element.tag) != "1"
        if element.VR in ("DS", "IS", "FD", "US") and not (is_one and all(map(math.isfinite, values))):
            return None
        if element.VR == "AS" and not all(map(_AGE.fullmatch, values)):
            return None
    except (*_UNREADABLE, BytesLengthException):
        return None
    return element


def public_copy(item: Dataset) -> Dataset:
    """A copy of a sequence's item without what is private or can't be read, at any depth."""
    from pydicom.dataset import Dataset

    out = Dataset()
    for tag in item.keys():  # noqa: SIM118
        if (element := _element(item, tag)) is not None:
            value = [public_copy(i) for i in element.value] if element.VR == "SQ" else element.value
            out.add_new(tag, element.VR, value)
    return out
