"""Start of the launcher: `python -I -S <this file> --data-dir DIR --key-file FILE [--socket PATH]
[--foreground]`.

Nothing is on the module path but the standard library, and no package's `__init__` may run (the worker's
would import third-party code): the packages are made here, bare, and their modules found by file.
"""

import os
import sys

BARE = ("worker", "worker.launcher", "worker.platform", "worker.platform.linux", "worker.platform.darwin")


def make_packages() -> None:
    """Put empty packages in `sys.modules`, whose modules are those of the tree this file stands in."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    for name in BARE:
        package = type(sys)(name)
        package.__path__ = [os.path.join(root, *name.split("."))]
        sys.modules[name] = package


if __name__ == "__main__":
    make_packages()
    from worker.launcher.main import main

    sys.exit(main(sys.argv[1:]))
