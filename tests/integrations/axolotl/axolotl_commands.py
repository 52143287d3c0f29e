"""Axolotl's commands in processes of their own, forked from one that has only imported Axolotl.

The import takes ten seconds, a command on a tiny model two.
"""

import gc
import multiprocessing
import os
import sys

IMPORTED = [
    "axolotl.cli.main",
    "axolotl.cli.train",
    "axolotl.cli.preprocess",
    "axolotl.cli.evaluate",
    "axolotl.cli.merge_lora",
    "axolotl.core.builders",
    "axolotl.train",
]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(IMPORTED)


class Command:
    """A running command, with those methods of `subprocess.Popen` that the tests use."""

    def __init__(self, arguments, environment, log):
        self._log = log
        given = ([*map(str, arguments)], environment, os.getcwd(), str(log))
        self._process = FORKS.Process(target=_run, args=given)
        self._process.start()

    def communicate(self, timeout):
        self._process.join(timeout)
        if self._process.is_alive():
            self._process.kill()
            raise TimeoutError(self._log.read_text())
        return self._log.read_text(), None

    @property
    def returncode(self):
        return self._process.exitcode


def _run(arguments, environment, folder, log):
    gc.freeze()  # Axolotl collects garbage often; frozen objects are not scanned
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    sys.argv = ["axolotl", *arguments]
    from axolotl.cli.main import main

    main()
