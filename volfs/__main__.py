"""`python -m volfs` is the volfs command."""

from volfs.cli import main

main()
