"""The ``foam`` command, also as ``python -m foam``."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line.

    A node draws no tables, but the log library loads the drawing one wherever it finds it: 4 MB of
    the 60 that an idle node may take.
    """
    if sys.argv[1:2] == ["node"]:
        sys.modules["rich"] = None  # type: ignore[assignment]  # how an import is blocked
    from foam.cli import main as run

    run()


if __name__ == "__main__":
    main()
