"""The projection that makes a thin volume agree with the measured thick one.

x ← x̂ + P (y − A x̂) with P = Aᵀ (A Aᵀ + λI)⁻¹ is, for λ = 0, the volume nearest to x̂ (in the sum of
squares) that satisfies A x = y. λ is the smallest that keeps ‖A‖₂ ‖P‖₂ ≤ 3, so that noise in y is never blown
up; it is 0 up to a thickness of about 1.47 spacings at factor 2 and 1.3 at factor 5, and agreement is then
exact.
"""

from __future__ import annotations

import numpy as np

__all__ = ["NORM_LIMIT", "damping", "projection_matrix", "projector"]

NORM_LIMIT = 3.0  # ‖A‖₂ ‖P‖₂: the most that the projection may amplify
_SOLVABLE = 1e-13  # λ/‖A‖₂² at least: two thick slices may see the same thin ones; costs 10⁻¹² of exactness


def damping(A: np.ndarray) -> float:
    """The smallest λ ≥ 0 with ‖A‖₂ ‖P‖₂ ≤ 3. It depends on the length of the stack where it is not 0."""
    singular = np.sqrt(np.clip(np.linalg.eigvalsh(A @ A.T), 0.0, None))
    largest = float(singular[-1])
    # σ/(σ² + λ) ≤ limit/σ₁ for every σ  ⇔  λ ≥ σ (σ₁/limit − σ)
    return max(_SOLVABLE * largest**2, float((singular * (largest / NORM_LIMIT - singular)).max()))


def projection_matrix(A: np.ndarray, lam: float | None = None) -> np.ndarray:
    """P = Aᵀ (A Aᵀ + λI)⁻¹, (m, n) float64, for A (n, m). lam: λ, where it is not A's own `damping`."""
    lam = damping(A) if lam is None else lam
    return np.linalg.solve(A @ A.T + lam * np.eye(len(A)), A).T


def projector(A: np.ndarray, P: np.ndarray) -> np.ndarray:
    """I − P A, (m, m): what of a change the measurement does not determine."""
    hidden: np.ndarray = np.eye(A.shape[1]) - P @ A
    return hidden
