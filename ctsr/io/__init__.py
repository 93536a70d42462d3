"""Files: strict NIfTI, atomic writes, lists and tables, provenance records."""
