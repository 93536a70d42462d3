"""How the DICOM reader ends on damaged series: python tests/benchmarks/fuzz_dicom.py [N] [SEED]

Each input is a series made of one real file (or a real file alone) with one to four faults in one file or in all,
in a folder or an archive. Prints how they ended, the slowest, and the peak memory of the reader and its decoders.
"""

from __future__ import annotations

import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from machine import provenance, reference_data

from tests.io.dicom.mutate import series_from, try_source, write

LARGEST = 400_000  # bytes of a file; larger ones spend the time on pixels


def main(n: int, seed: int) -> None:
    found = sorted((reference_data().parent / "dicom").rglob("*"))
    files = [series_from(path) for path in found if path.is_file() and path.stat().st_size < LARGEST]
    shared_memory = Path("/dev/shm")
    ends: Counter[str] = Counter()
    slowest, start = (0.0, -1), time.perf_counter()
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as folder:
        for k in range(n):
            rng = random.Random(seed * 1_000_003 + k)
            of_series = rng.choice(files)
            source = write(of_series, Path(folder) / "source", rng)
            try:
                outcome = try_source(source, len(of_series) if source.is_dir() else None)
            except Exception:
                ends["crashed"] += 1
                print(f"input {k} of seed {seed}:\n{traceback.format_exc()}")
                continue
            ends["inputs with a volume"] += outcome.read > 0
            ends["inputs with a refusal"] += outcome.refused > 0
            ends["inputs with a skipped file"] += outcome.skipped > 0
            slowest = max(slowest, (outcome.seconds, k))
    seconds = time.perf_counter() - start
    peak = [
        resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    print(f"{n:,} inputs from {len(files)} files, seed {seed}, {seconds:.0f} s")
    print(f"crashed: {ends.pop('crashed', 0)}")
    for name, count in sorted(ends.items()):
        print(f"{name}: {count:,}")
    print(f"slowest: {slowest[0]:.2f} s (input {slowest[1]})")
    print(f"peak memory: {peak[0]:.0f} MiB, of a decoder {peak[1]:.0f} MiB")
    print(provenance(f"python tests/benchmarks/fuzz_dicom.py {n} {seed}"))


if __name__ == "__main__":
    main(*(int(argument) for argument in [*sys.argv[1:], *("20000", "0")[len(sys.argv) - 1 :]]))
