"""Run `axolotl train` on configurations whose Triton kernels the interpreter computes.

    python tests/integrations/axolotl/axolotl_interpreted.py CONFIG...

Each is trained in a fork of this process, which has imported Axolotl, because kernels replace
classes for a whole process. The first run that fails ends the script with its status.
"""

import gc
import os
import sys

import support.interpreted_triton  # noqa: F401


def main(*configs):
    from axolotl.cli.main import main as axolotl

    gc.freeze()  # Axolotl collects garbage often; frozen objects are not scanned
    for config in configs:
        if child := os.fork():
            _, status = os.waitpid(child, 0)
            if status:
                sys.exit(os.waitstatus_to_exitcode(status) % 256)
        else:
            sys.argv = ["axolotl", "train", config, "--launcher", "python"]
            axolotl()


if __name__ == "__main__":
    main(*sys.argv[1:])
