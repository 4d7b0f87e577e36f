"""`python -m atom_compile` is `atom-compile`."""

from .cli import main

main()
