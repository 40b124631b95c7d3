"""`python -m modeling_tvrn.cli`, where the command `tvrn` is not on the path."""

from .app import main

main()
