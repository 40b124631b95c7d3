"""The command `tvrn`: thin verbs over the package's functions; torch is loaded by a verb that runs, not by --help."""

from .app import app, main

__all__ = ["app", "main"]
