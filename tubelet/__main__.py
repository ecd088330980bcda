"""`python -m tubelet` is the command line."""

from tubelet.cli import main

main()
