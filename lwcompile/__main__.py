"""`python -m lwcompile`, and `torchrun -m lwcompile`."""

from lwcompile.cli import main

main()
