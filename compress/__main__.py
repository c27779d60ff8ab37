"""``python -m compress``: the command, for launchers that start modules."""

from compress.cli import main

main()
