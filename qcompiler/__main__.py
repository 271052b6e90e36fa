"""`python -m qcompiler`: the command."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the current folder, where a file of the user's may have the name of a plug-in
    from qcompiler.cli import main

    main()
