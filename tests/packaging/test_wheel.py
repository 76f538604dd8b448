"""What is built, what it exports, and what each role may do without the other."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("common", "client", "server")
UNPICKLES = re.compile(
    r"\b(c?pickle|cloudpickle|dill|joblib|marshal|shelve)\b|torch\.(load|save)\(|allow_pickle=True"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built by the project's own build backend."""
    from hatchling.builders.wheel import WheelBuilder

    folder = tmp_path_factory.mktemp("wheel")
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel):
    names = wheel.namelist()
    tops = {name.split("/")[0] for name in names}
    (info,) = {top for top in tops if top.endswith(".dist-info")}
    assert tops - {info} == set(PACKAGES)
    inside = {name for name in names if not name.startswith(info)}
    sources = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert inside == sources
    assert not any("test" in Path(name).parts for name in names)


def test_the_wheel_names_its_command_and_its_extras(wheel):
    (entry,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "wardround = common.cli:main" in wheel.read(entry).decode()
    (metadata,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    told = wheel.read(metadata).decode()
    extras = set(re.findall(r"^Provides-Extra: (.+)$", told, re.MULTILINE))
    assert extras == {"client", "simulation", "ray", "dev"}
    plain = [
        line
        for line in told.splitlines()
        if line.startswith("Requires-Dist:") and "extra ==" not in line
    ]
    assert not any(re.search(r"torch|transformers|opacus", line) for line in plain)


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def code_of(path: Path) -> str:
    """The source without its documentation strings and comments."""
    return ast.unparse(_Undocumented().visit(ast.parse(path.read_text())))


class _Undocumented(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node


def test_nothing_in_the_wheel_unpickles():
    guilty = [str(path) for path in sources() if _unpickles(path)]
    assert guilty == []


def _unpickles(path: Path) -> bool:
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(UNPICKLES.search(a.name) for a in node.names):
            return True
        if isinstance(node, ast.ImportFrom) and UNPICKLES.search(node.module or ""):
            return True
        if isinstance(node, ast.Call) and UNPICKLES.search(ast.unparse(node.func) + "("):
            return True
    return False


@pytest.mark.parametrize(
    "line", ["import pickle", "from joblib import load", "import torch\ntorch.load(x)"]
)
def test_control_a_module_that_unpickles_is_noticed(tmp_path, line):
    path = tmp_path / "module.py"
    path.write_text(line + "\n")
    assert _unpickles(path)


def test_every_exported_name_exists():
    for path in sources():
        tree = ast.parse(path.read_text())
        exported: list[str] = []
        defined: set[str] = set()
        for node in tree.body:
            if isinstance(node, ast.Assign) and any(
                isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets
            ):
                exported = [str(e.value) for e in node.value.elts if isinstance(e, ast.Constant)]  # type: ignore[attr-defined]
            defined |= _names(node)
        assert set(exported) <= defined, f"{path}: {sorted(set(exported) - defined)}"


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.If):
        return {name for inner in node.body for name in _names(inner)}
    if isinstance(node, ast.Assign):
        return {n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    return set()


def python(
    code: str, *, hidden: tuple[str, ...] = (), folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run `code` where the packages in `hidden` are not installed."""
    house = folder / "house"
    house.mkdir()
    for name in PACKAGES:
        if name not in hidden:
            (house / name).symlink_to(ROOT / name)
    guard = f"""
import sys
from pathlib import Path
sys.path = [{str(house)!r}, *(p for p in sys.path if Path(p).resolve() != Path({str(ROOT)!r}))]
HIDDEN = {tuple(name for name in hidden if name not in PACKAGES)!r}
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.split(".")[0])
sys.meta_path.insert(0, Guard())
"""
    return subprocess.run(
        [sys.executable, "-I", "-c", guard + code],
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )


HEAVY = ("torch", "opacus", "transformers", "peft", "pyarrow", "matplotlib")


def test_the_coordinators_code_imports_no_torch(tmp_path):
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sources()
        if path.parts[len(ROOT.parts)] in {"common", "server"}
    ]
    # The roots that compose a whole federation in one place; no coordinator loads them.
    roots = {"server.records", "server.simulate", "server.ray"}
    names = [n.removesuffix(".__init__") for n in names if n not in roots]
    code = "\n".join(f"import {name}" for name in names)
    done = python(code + "\nprint(sorted(sys.modules))", folder=tmp_path, hidden=(*HEAVY, "client"))
    assert done.returncode == 0, done.stderr
    assert not any(f"'{name}'" in done.stdout for name in HEAVY)


def test_control_an_import_of_torch_is_noticed(tmp_path):
    done = python("import client.training", folder=tmp_path, hidden=HEAVY)
    assert done.returncode == 1
    assert "torch" in done.stderr


MAIN = "from common.cli import main\nraise SystemExit(main({words!r}))"


@pytest.mark.parametrize(
    ("hidden", "words", "status", "says"),
    [
        ("client", ["check", "{configs}/simulation.yaml"], 0, "ok"),
        (
            "client",
            ["plan", "{configs}/diagnosis-minilm.yaml", "--parameters", "1925"],
            0,
            "quorum",
        ),
        ("client", ["audit", "verify", "nowhere"], 7, "WR-6043"),
        ("client", ["doctor"], None, "python"),
        ("client", ["errors", "WR-5001"], 0, "quorum"),
        ("client", ["--help"], 0, "not installed here"),
        ("client", ["privacy", "x"], 2, "WR-7002"),
        ("client", ["demo"], 2, "WR-7002"),
        ("client", ["simulate", "{configs}/simulation.yaml"], 2, "WR-7002"),
        ("server", ["check", "{configs}/site.yaml"], 0, "ok"),
        ("server", ["privacy", "nowhere"], 7, "WR-3006"),
        ("server", ["predict", "nowhere", "x.csv"], 3, "WR-2"),
        ("server", ["study", "build", "nowhere.yaml"], 2, "WR-1002"),
        ("server", ["doctor"], None, "python"),
        ("server", ["--help"], 0, "not installed here"),
        ("server", ["simulate", "x.yaml"], 2, "WR-7002"),
        ("server", ["audit", "verify", "x"], 7, "WR-6043"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_each_role_works_without_the_other(tmp_path, hidden, words, status, says):
    filled = [word.format(configs=ROOT / "configs") for word in words]
    done = python(MAIN.format(words=filled), hidden=(hidden,), folder=tmp_path)
    told = done.stdout + done.stderr
    assert "Traceback" not in told, told
    assert says in told, told
    if status is not None:
        assert done.returncode == status, told


@pytest.mark.parametrize(
    ("missing", "words", "extra"),
    [
        ("torch", ["demo"], "client"),
        ("torch", ["simulate", "{configs}/simulation.yaml"], "client"),
        ("transformers", ["study", "build", "{configs}/diagnosis-minilm.yaml"], "client"),
        ("torch", ["plan", "{configs}/diagnosis-minilm.yaml"], "client"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_without_an_extra_a_verb_names_what_to_install(tmp_path, missing, words, extra):
    filled = [word.format(configs=ROOT / "configs") for word in words]
    done = python(MAIN.format(words=filled), hidden=(missing,), folder=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"needs {missing}, which is not installed here" in done.stderr
    assert f'pip install "wardround[{extra}]"' in done.stderr


def test_control_another_missing_module_is_a_bug_and_surfaces(tmp_path):
    done = python(MAIN.format(words=["check", "x.yaml"]), hidden=("yaml",), folder=tmp_path)
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("data", [None, "patient,hospital,note,label\na,b,c,d\n"])
@pytest.mark.parametrize("verb", ["simulate", "plan", "study build"])
def test_a_fault_in_the_data_is_told_before_anything_heavy_is_loaded(tmp_path, verb, data):
    text = (ROOT / "configs" / "simulation.yaml").read_text()
    (tmp_path / "study.yaml").write_text(text.replace("data/synthetic-notes.csv", "notes.csv"))
    if data is not None:
        (tmp_path / "notes.csv").write_text(data)
    code = """
from common.cli import main
status = main([*"VERB".split(), "study.yaml"])
heavy = [name for name in ("torch", "transformers", "opacus", "dp_accounting", "matplotlib",
                           "numpy", "rich", "server.simulate", "client.site", "client.daemon")
         if name in sys.modules]
print(status, heavy, "client.data.tables" in sys.modules)
"""
    done = python(code.replace("VERB", verb), folder=tmp_path)
    assert done.stdout.splitlines()[-1] == "3 [] True", done.stdout + done.stderr


def test_locked_requirements_carry_hashes_and_no_address():
    files = sorted((ROOT / "requirements").glob("*.txt"))
    assert [path.stem for path in files] == ["client", "coordinator", "dev", "ray", "simulation"]
    for path in files:
        text = path.read_text()
        assert not re.search(r"://|--index|--find-links|--extra-index|(^|\s)/\w", text), path
        pins = re.findall(r"^([A-Za-z0-9_.\[\]-]+)==(\S+)", text, re.MULTILINE)
        blocks = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]
        assert len(blocks) == len(pins) > 10
        assert all("--hash=sha256:" in block for block in blocks), path
    names = {
        path.stem: {
            p.lower() for p, _ in re.findall(r"^([\w.-]+)==(\S+)", path.read_text(), re.MULTILINE)
        }
        for path in files
    }
    assert names["coordinator"] < names["client"] < names["simulation"] < names["dev"]
    assert names["simulation"] < names["ray"]
    assert "torch" not in names["coordinator"]
    assert "torch" in names["client"]


def test_every_dependency_of_the_project_is_locked():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    told = {"coordinator": project["dependencies"], **extras}
    for role, needs in told.items():
        text = (ROOT / "requirements" / f"{role}.txt").read_text()
        for need in needs:
            name = re.split(r"[<>=\[ ]", need)[0].lower().replace("_", "-")
            if name != "wardround":
                assert re.search(rf"^{re.escape(name)}(\[\w+\])?==", text, re.MULTILINE), (
                    role,
                    name,
                )
