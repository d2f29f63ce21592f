"""Runs a script as `python script ...` would, but in this process: a start of its own costs seconds of imports."""

from __future__ import annotations

import io
import os
import runpy
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch


def run_in_process(script: Path, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """The exit code and what it said. An error that the script does not handle itself is raised here.

    Only for scripts that leave no state behind (signals, groups of ranks, locks of the process), and for no test of
    such state.
    """
    command = [str(script), *map(str, arguments)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    here = Path.cwd()
    try:
        os.chdir(cwd or here)
        with patch("sys.argv", command), redirect_stdout(out), redirect_stderr(err):
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        os.chdir(here)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())
