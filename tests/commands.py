"""What the tests of all scripts share: starting one as a user does, and reading what it left."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def start_script(script: str, *flags, **environment) -> subprocess.Popen:
    """The script as a user starts it."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out, err


def only(tmp_path) -> Path:
    (folder,) = tmp_path.iterdir()
    return folder


def without_speed(rows):
    return [{name: value for name, value in row.items() if name != "charts/SPS"} for row in rows]
