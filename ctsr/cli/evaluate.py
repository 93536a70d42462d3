"""`ctsr evaluate`."""

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
