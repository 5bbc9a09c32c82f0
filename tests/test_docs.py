"""README.md and docs/: commands that the scripts understand, code that runs, links that lead somewhere, flags and
functions that exist."""

import ast
import functools
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from commands import ROOT, finish, only, start_script
from test_scripts import SCRIPTS

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
            places = re.findall(r'<a id="([\w-]+)">', target.read_text())
            assert part in [*map(anchor, headings), *places], link


@functools.cache
def defined(path: str | Path) -> set[str]:
    """Functions and classes of a file, and what it takes as flags: fields and parameters."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return names


def unknown(entry: str) -> list[str]:
    """What an entry names and the files that it links to do not have: `file.py: function` and flags."""
    places = re.findall(r"\[([\w/]+\.py)\]\(\.\./\1\):\s((?:`\w+`(?:,\s+)?)+)", entry)
    wrong = [] if places else ["no place"]
    for path, names in places:
        wrong += [f"{path}: {name}" for name in re.findall(r"\w+", names) if name not in defined(path)]
    known = set().union(*[defined(path) for path, _ in places])
    return wrong + [flag for flag in flags_in(entry) if field(flag) not in known]


def flags_in(text: str) -> list[str]:
    return re.findall(r"(?<![\w-])--[a-z][\w-]*", text)


def field(flag: str) -> str:
    return flag.removeprefix("--").removeprefix("no-").replace("-", "_")


def test_differences_to_the_papers_name_their_place():
    text = (ROOT / "docs/paper_to_code.md").read_text().split("## Where we read", 1)[1]
    entries = text.split("\n- ")[1:]
    assert len(entries) > 40
    for entry in entries:
        assert unknown(entry) == [], entry
    place = "[ernie_maddpg.py](../ernie_maddpg.py):"
    assert unknown(f"{place} `unroll`, `no_such` (`--no-such`)") == ["ernie_maddpg.py: no_such", "--no-such"]
    assert unknown("without a place") == ["no place"]


OTHERS = {"--help", "--nproc-per-node"}  # of tyro and torchrun


@pytest.mark.parametrize("path", [path for path in PAGES if path.name != "CHANGELOG.md"], ids=lambda path: path.name)
def test_flags_exist(path):
    """In the file that the same piece of code names, or in the page's own script or what that imports, or in any of
    ours."""
    files = [file for part in ("", "baselines/", "benchmarks/", "envs/") for file in ROOT.glob(f"{part}*.py")]
    own = [file for file in SCRIPTS if file.stem == path.stem]
    own += [file for file in files if own and f"envs/{path.stem.split('_')[-1]}.py" in str(file)]
    own = own or files
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    for code in re.findall(r"`([^`]+)`", text):
        named = [file for file in files if file.name in code] or own
        known = set().union(*[defined(file) for file in named])
        assert [flag for flag in flags_in(code) if flag not in OTHERS and field(flag) not in known] == [], code
