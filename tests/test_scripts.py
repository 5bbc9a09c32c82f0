"""What binds the scripts: short enough to read in one sitting, the same plumbing, no script imports another."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUDGET = {  # tokens
    "ernie_coma": 7_500,
    "ernie_maddpg": 7_000,
    "ernie_mappo": 7_500,
    "ernie_meanfield": 8_000,
    "ernie_qcombo": 7_500,
    "ermas_bimatrix": 8_000,
    "ermas_economy": 9_000,
    "rma3c": 6_500,
}
ENVS = ("particle", "economy", "traffic", "drones", "bimatrix")  # the simulators, of at most 14 tokens a line
PLUMBING = ("unroll", "own_first", "MLP", "init_mlp", "orthogonal_mlp")  # the same text everywhere
TRUST_REGION = ("conjugate_gradient", "mean_kl", "fisher_product", "trust_region_step")  # these too
SCRIPTS = [path for path in [*ROOT.glob("er*_*.py"), *ROOT.glob("baselines/*.py")] if path.stem in BUDGET]


def size(source: str) -> tuple[int, int]:
    """Tokens (names, numbers, strings, operators outside docstrings), and lines that hold one."""
    docstring = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstring.update(range(node.lineno, node.end_lineno + 1))
    kinds = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
    begin, end = (getattr(tokenize, name, None) for name in ("FSTRING_START", "FSTRING_END"))
    tokens, depth = [], 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        depth -= token.type == end  # from Python 3.12 on an f-string is many tokens: it counts as one
        if depth == 0 and (token.type in kinds or token.type == end) and token.start[0] not in docstring:
            tokens.append(token)
        depth += token.type == begin
    lines = {line for t in tokens for line in range(t.start[0], t.end[0] + 1)}
    return len(tokens), len(lines)


def definitions(path: Path) -> dict[str, str]:
    """Top-level functions and classes by name, as syntax trees without positions."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: ast.dump(node) for node in ast.parse(path.read_text()).body if isinstance(node, kinds)}


def clashes(sources: dict[str, dict[str, str]]) -> list[str]:
    """Plumbing that is defined differently in two scripts."""
    first: dict[str, tuple[str, str]] = {}
    found = []
    for script, names in sources.items():
        for name in PLUMBING + TRUST_REGION:
            if name in names:
                other, code = first.setdefault(name, (script, names[name]))
                if code != names[name]:
                    found.append(f"{name} differs between {other} and {script}")
    return found


def test_size_counts_tokens_and_lines_without_docstrings():
    assert size('"""One.\nTwo."""\n\nx = f(1,\n      "a")  # why\n') == (8, 2)
    assert size('x = f"{a + b} {c:.2f}"\n') == (3, 1)


@pytest.mark.parametrize("name", BUDGET)
def test_a_script_is_read_in_one_sitting(name):
    (path,) = [path for path in SCRIPTS if path.stem == name]
    tokens, lines = size(path.read_text())
    assert tokens <= BUDGET[name]
    assert tokens <= 12 * lines


@pytest.mark.parametrize("name", ENVS)
def test_an_environment_says_one_thing_a_line(name):
    tokens, lines = size((ROOT / "envs" / f"{name}.py").read_text())
    assert tokens <= 14 * lines


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_functions_have_six_parameters_at_most(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert len(node.args.args) + len(node.args.kwonlyargs) <= 6, node.name


def test_plumbing_is_the_same_text():
    assert {"ernie_maddpg", "rma3c"} <= {path.stem for path in SCRIPTS}
    assert clashes({path.name: definitions(path) for path in SCRIPTS}) == []


def test_a_difference_is_found():
    one, two = ({"unroll": ast.dump(ast.parse(f"def unroll(): return {x}").body[0])} for x in (1, 2))
    assert clashes({"a.py": one, "b.py": two}) == ["unroll differs between a.py and b.py"]
    assert clashes({"a.py": one, "b.py": one}) == []


def test_scripts_import_no_script():
    names = {path.stem for path in [*ROOT.glob("er*_*.py"), *ROOT.glob("baselines/*.py")]}
    for path in [*SCRIPTS, *(ROOT / "envs").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not names & set(modules), f"{path.name} imports another script"


def test_the_documentation_names_functions_that_exist():
    """In its table from paper equation to function."""
    text = (ROOT / "docs/paper_to_code.md").read_text().split("## From paper equation to function")[1].split("\n## ")[0]
    names = set(re.findall(r"`(?:robustness\.|envs\.perturb\.)?([a-z_]+)`", text))
    paths = [*ROOT.glob("*.py"), *ROOT.glob("envs/*.py")]
    defined = {node.name for path in paths for node in ast.walk(ast.parse(path.read_text())) if hasattr(node, "name")}
    assert len(names) > 30 and names <= defined, names - defined
