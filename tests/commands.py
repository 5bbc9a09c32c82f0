"""What the tests of all scripts share: starting one as a user does, and reading what it left."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def refusal(script, monkeypatch, capsys, *flags) -> str:
    """Runs script.main() in this process, which must end with exit code 2; returns its one line on stderr."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"{script.__name__}.py: error: ")
    return error


def bad_value(script, monkeypatch, capsys, name, value, *flags) -> None:
    """The refusal of this value names its flag, the rule and the value."""
    flag = f"--{name.replace('_', '-')}"
    error = refusal(script, monkeypatch, capsys, *flags, f"{flag}={value}")
    assert f"{flag} must be" in error and str(value) in error


def only(tmp_path) -> Path:
    (folder,) = tmp_path.iterdir()
    return folder


def without_speed(rows):
    return [{name: value for name, value in row.items() if name != "charts/SPS"} for row in rows]
