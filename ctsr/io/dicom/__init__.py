"""DICOM CT: what a folder holds, its volumes in HU, and a derived series back out."""
