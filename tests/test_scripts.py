"""What binds the scripts: the same name means the same code, and the sections come in the same order."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted([*ROOT.glob("er*_*.py"), *ROOT.glob("baselines/*.py")])


def definitions(path: Path) -> dict[str, str]:
    """Top-level functions and classes by name, as syntax trees without positions."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: ast.dump(node) for node in ast.parse(path.read_text()).body if isinstance(node, kinds)}


def clashes(
    sources: dict[str, dict[str, str]], own: tuple[str, ...] = ("Args", "run_labels", "act", "train", "main")
) -> list[str]:
    """Names defined differently in two scripts; `own` names are parts of every script that differ."""
    seen, found = {}, []
    for script, names in sources.items():
        for name, code in names.items():
            first, same = seen.setdefault(name, (script, code))
            if name not in own and same != code:
                found.append(f"{name} differs between {first} and {script}")
    return found


def test_same_name_same_code():
    assert {"ernie_maddpg.py", "rma3c.py"} <= {path.name for path in SCRIPTS}
    assert clashes({path.name: definitions(path) for path in SCRIPTS}) == []


def test_a_difference_is_found():
    one, two = ({"f": ast.dump(ast.parse(f"def f(): return {x}").body[0])} for x in (1, 2))
    assert clashes({"a.py": one, "b.py": two}) == ["f differs between a.py and b.py"]
    assert clashes({"a.py": one, "b.py": one}) == []


def test_scripts_import_no_script():
    names = {path.stem for path in SCRIPTS}
    for path in [*SCRIPTS, *(ROOT / "envs").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not names & set(modules), f"{path.name} imports another script"
