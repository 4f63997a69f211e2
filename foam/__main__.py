"""``python -m foam``: the same as the ``foam`` command."""

from foam.cli import main

main()
