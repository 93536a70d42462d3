"""`python -m ctsr`, and what `torchrun -m ctsr COMMAND` starts."""

from ctsr.cli.main import main

main()
