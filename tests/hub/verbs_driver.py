"""Carries out commands in forked children of one process that has imported torch and the client: each costs no start.

Reads a JSON list of arguments from each line; answers with the child's number when it begins, and when it has ended
with its exit code and what it said.  HF_TOKEN and the like are those that this process was started with.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback

import huggingface_hub.hf_api  # noqa: F401
from dsv4cli import convert, inspect, push, verify  # noqa: F401
from dsv4cli.main import main as dsv4

from dsv4ckpt import run  # noqa: F401


def carried_out(arguments: list[str], out: int, err: int) -> None:
    """The child: it ends here."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    code = 99
    try:
        dsv4(arguments)
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:  # noqa: BLE001 - told to whoever reads it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if not child:
                carried_out(json.loads(line), out.fileno(), err.fileno())
            print(child, flush=True)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said = [(file.seek(0), file.read().decode())[1] for file in (out, err)]
            print(json.dumps([code, *said]), flush=True)


if __name__ == "__main__":
    main()
