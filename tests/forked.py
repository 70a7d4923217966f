"""The command as its user starts it, in a child forked from one process that has imported torch: it costs no start.

A child has the caller's directory and environment, one thread for tensors, and imports its verb itself.  Where the
start or the end of a process is the matter, or a signal or a pipe, tests start `python -m dsv4cli` instead.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from typing import NoReturn

SECONDS = 120  # nobody takes so long
CRASHED = 99  # the code of a command that raised something


def dsv4(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Returns when the command has ended; the code is minus the number of the signal that ended it."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    command = [str(argument) for argument in arguments]
    server.stdin.write(json.dumps([command, os.getcwd(), dict(os.environ)]) + "\n")
    server.stdin.flush()
    code, out, err = json.loads(server.stdout.readline())
    return subprocess.CompletedProcess(command, code, out, err)


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Started when it is first asked; it ends with this process, which holds its stdin."""
    pipe, environment = subprocess.PIPE, {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, text=True, env=environment)


# ---- the other process


def _serve() -> None:
    import dsv4cli.main  # noqa: F401
    import torch  # noqa: F401

    gc.freeze()  # a child that looked through all of this would copy it
    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if not child:
                _carry_out(*json.loads(line), out.fileno(), err.fileno())
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said = [
                os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode() for file in (out, err)
            ]
        print(json.dumps([code, *said]), flush=True)


def _carry_out(command: list[str], place: str, environment: dict[str, str], out: int, err: int) -> NoReturn:
    """In the child, which becomes what a process of its own would be, and ends here."""
    from dsv4cli.main import main

    code = CRASHED
    try:
        nothing = os.open(os.devnull, os.O_RDONLY)
        for ours, standard in ((nothing, 0), (out, 1), (err, 2)):
            os.dup2(ours, standard)
        os.chdir(place)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv[1:] = command
        signal.alarm(SECONDS)
        main()
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:  # noqa: BLE001 - told to whoever reads it
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
