"""`torchrun script_driver.py SCRIPT ARGUMENTS`: a script as it stands, and then out at once.

torch's threads may still want the interpreter while it leaves, which then aborts: now and then, with all work done.
"""

from __future__ import annotations

import os
import runpy
import sys

del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
