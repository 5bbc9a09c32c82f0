"""README.md and docs/: commands that the scripts understand, code that runs, links that lead somewhere."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from commands import ROOT, finish, only, start_script

from envs import runs

PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted((ROOT / "docs").rglob("*.md"))]
KNOWN = ("python", "pip", "torchrun", "wandb", "pytest", "pre-commit", "ruff", "python3")


def blocks(path: Path, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", path.read_text(), re.S)


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every script of ours that a page starts."""
    found = []
    for path in PAGES:
        for line in "".join(blocks(path, "bash")).splitlines():
            for part in line.split(" && "):
                words = shlex.split(part, comments=True)
                if words:
                    assert words[0] in (*KNOWN, "."), part
                    found.append((path.name, shlex.join(words)))
    return found


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("page, command", [c for c in commands() if re.search(r"(ernie|ermas|rma3c)\w*\.py", c[1])])
def test_commands_are_understood(page, command, monkeypatch):
    words = shlex.split(command)
    (at,) = [k for k, word in enumerate(words) if word.endswith(".py")]
    path, flags = Path(words[at]), words[at + 1 :]
    monkeypatch.syspath_prepend(ROOT / path.parent)
    script = importlib.import_module(path.stem)
    for given in ("--resume", "--evaluate"):  # that run does not exist
        if given in flags:
            k = flags.index(given)
            flags[k : k + 2] = []
            flags = [flag for k, flag in enumerate(flags) if "--backend" not in flags[max(0, k - 1) : k + 1]]
    monkeypatch.setattr(sys, "argv", [path.name, *flags])
    runs.parse_args(script.Args, script.__doc__, {"paper": getattr(script, "PAPER", {})})


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "python")], ids=lambda path: path.name)
def test_code_runs(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    if "runs/RUN" in "".join(blocks(path, "python")):
        flags = (
            "--total-timesteps=400 --learning-starts=100 --buffer-size=1000 --num-envs=4 --batch-size=32 --num-seeds=2"
        )
        finish(start_script("ernie_maddpg.py", *flags.split(), "--eval-episodes=0", "--wandb-mode=disabled"))
        only(tmp_path / "runs").rename(tmp_path / "runs" / "RUN")
    for code in blocks(path, "python"):
        scope = {"NonNegativeFloat": float}
        if "STUDIES" in code:
            import reproduce

            scope |= vars(reproduce) | {"STUDIES": {}}
        exec(code, scope)  # noqa: S102


def anchor(heading: str) -> str:
    """As forges make it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", path.read_text(), flags=re.S))
    for link in links:
        if link.startswith("http"):
            continue
        name, _, part = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        if part:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert part in map(anchor, headings), link
