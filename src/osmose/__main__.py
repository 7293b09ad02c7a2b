"""`python -m osmose`."""

from osmose.cli.main import main

main()
