"""What no product file may contain: dangerous calls, prints outside the command line, machine paths, stray geometry.

Read with ast, so that words in comments and docstrings do not count.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = sorted([*(ROOT / "dsv4ckpt").rglob("*.py"), *(ROOT / "dsv4model").rglob("*.py")])
PRODUCT = [*LIBRARIES, *sorted((ROOT / "cli").rglob("*.py"))]
CORE = sorted((ROOT / "dsv4ckpt").rglob("*.py"))


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def nodes(file: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(file.read_text(encoding="utf-8"), name_of(file)))


def dotted(node: ast.AST) -> str:
    """`yaml.load` for the expression yaml.load; '' for what is no plain name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    return ((dotted(node.func), node) for node in nodes(file) if isinstance(node, ast.Call))


def imports(file: Path) -> set[str]:
    found = set()
    for node in nodes(file):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found


def is_constant(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


# ---- dangerous calls

MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "ctypes",
    "code",
    "pty",
}
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.execvp", "os.spawnv",
    "subprocess.getoutput", "subprocess.getstatusoutput", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "torch.load", "torch.hub.load", "np.load", "numpy.load", "shutil.unpack_archive", "tempfile.mktemp",
}  # fmt: skip
METHODS = {"extractall", "extract"}  # of archives: members may lead anywhere
KEYWORDS = {
    "shell": True,
    "trust_remote_code": True,
    "weights_only": False,
    "allow_pickle": True,
    "verify": False,
}


@pytest.mark.parametrize("file", PRODUCT, ids=name_of)
def test_no_module_that_runs_what_it_reads_is_imported(file: Path) -> None:
    assert not imports(file) & MODULES


@pytest.mark.parametrize("file", PRODUCT, ids=name_of)
def test_no_call_that_runs_text_or_loads_objects(file: Path) -> None:
    found = [name for name, _ in calls(file) if name in CALLS or name.rpartition(".")[2] in METHODS]
    assert found == []


@pytest.mark.parametrize("file", PRODUCT, ids=name_of)
def test_no_keyword_that_switches_safety_off(file: Path) -> None:
    found = [
        (name, keyword.arg)
        for name, call in calls(file)
        for keyword in call.keywords
        if keyword.arg in KEYWORDS and is_constant(keyword.value, KEYWORDS[keyword.arg])
    ]
    assert found == []


@pytest.mark.parametrize("file", PRODUCT, ids=name_of)
def test_files_are_never_mapped_into_memory(file: Path) -> None:
    """A mapped input that is truncated under us kills the process; anonymous memory (-1) is fine."""
    for name, call in calls(file):
        if name.rpartition(".")[2] == "mmap":
            assert call.args and ast.unparse(call.args[0]) == "-1"
        assert name not in ("np.memmap", "numpy.memmap", "torch.from_file")
        assert not [keyword for keyword in call.keywords if keyword.arg == "mmap"]


@pytest.mark.parametrize("file", PRODUCT, ids=name_of)
def test_no_bare_or_swallowing_except(file: Path) -> None:
    """`except Exception` may stand in the cli's last line, or where the exception goes on."""
    for node in nodes(file):
        if not isinstance(node, ast.ExceptHandler):
            continue
        assert node.type is not None, f"bare except in line {node.lineno}"
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        if {dotted(kind) for kind in kinds} & {"Exception", "BaseException"} and file.name != "main.py":
            assert any(isinstance(inner, ast.Raise) for inner in ast.walk(node)), f"line {node.lineno}"


# ---- only cli speaks

STREAMS = {"sys.argv", "sys.stdout", "sys.stderr", "sys.stdin", "sys.__stdout__", "os.environ", "os.environb"}
SPEAKING = {
    "print",
    "input",
    "pprint",
    "breakpoint",
    "warnings.warn",
    "os.getenv",
    "exit",
    "quit",
    "sys.exit",
}


@pytest.mark.parametrize("file", LIBRARIES, ids=name_of)
def test_libraries_print_nothing_and_read_no_arguments_or_environment(file: Path) -> None:
    assert [name for name, _ in calls(file) if name in SPEAKING] == []
    assert not {dotted(node) for node in nodes(file) if isinstance(node, ast.Attribute)} & STREAMS
    assert not imports(file) & {"argparse", "click", "getopt", "logging", "optparse", "tqdm", "warnings"}


@pytest.mark.parametrize("file", LIBRARIES, ids=name_of)
def test_libraries_know_no_time(file: Path) -> None:
    """Equal inputs give equal bytes."""
    assert not imports(file) & {"time", "datetime", "uuid", "getpass", "platform"}


# ---- geometry is read, never assumed

GEOMETRY_LIVES_IN = {"formats.py", "sample.py"}
OTHER_128 = {  # file: the one line where 128 is something else
    "errors.py": "EXIT_SIGNAL = 128",  # what shells add to a signal's number
    "survey.py": '128: "HCA (ratio 128)"',  # a compression ratio, and its name
}


@pytest.mark.parametrize("file", [file for file in CORE if file.name not in GEOMETRY_LIVES_IN], ids=name_of)
def test_no_literal_128_outside_formats(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    found = [
        lines[node.lineno - 1].strip()
        for node in nodes(file)
        if isinstance(node, ast.Constant) and node.value == 128
    ]
    assert [line for line in found if OTHER_128.get(file.name, "\0") not in line] == []


# ---- tracked files

# the brackets keep these patterns from matching themselves
PLACES = re.compile(r"(?<![\w.~$}])/(?:wo[r]k|ro[o]t|ho[m]e|Use[r]s|m[n]t|scr[a]tch)/[\w.][\w./-]*")
HOSTS = re.compile(
    r"https?://(?:\d+\.\d+\.\d+\.\d+|local[h]ost|[\w.-]+\.(?:inte[r]nal|loc[a]l|co[r]p|la[n]))\b"
    r"|art[i]factory|nex[u]s/repository|dev[p]i|pypi[.]org/simple|files[.]pythonhosted[.]org"
    r"|(?:extra-)?index[-_]url[ =]+(?!https://download\.pytorch\.org)\S+|trusted[-_]ho[s]t",
    re.IGNORECASE,
)


def tracked() -> list[Path]:
    """Files that are in the repository or about to be."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def lines_matching(pattern: re.Pattern[str]) -> list[str]:
    found = []
    for file in tracked():
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if match := pattern.search(line):
                found.append(f"{name_of(file)}:{number}: {match[0]}")
    return found


def test_no_tracked_file_names_a_place_on_some_machine() -> None:
    assert lines_matching(PLACES) == []


def test_no_tracked_file_names_a_registry_or_a_host_of_some_network() -> None:
    assert lines_matching(HOSTS) == []


@pytest.mark.parametrize("folder", ["work", "root", "home", "Users", "mnt"])
def test_the_pattern_for_places_finds_them(folder: str) -> None:
    assert PLACES.search(f"see '/{folder}/.x/y'")
    assert not PLACES.search(f"see demo/{folder}/y or $HOME/{folder}/y")


@pytest.mark.parametrize(
    ("form", "host"),
    [
        ("http://{}/x", "10.0.0.1"),
        ("https://{}", "build.internal"),
        ("pip install --{} https://x.y", "index-url"),
        ("{} = x.y", "extra-index-url"),
    ],
)
def test_the_pattern_for_hosts_finds_them(form: str, host: str) -> None:
    assert HOSTS.search(form.format(host))


def test_no_tracked_file_is_large_or_binary() -> None:
    for file in tracked():
        data = file.read_bytes()
        assert len(data) < 1_000_000, name_of(file)
        assert b"\0" not in data, name_of(file)
        assert file.suffix not in {".pyc", ".safetensors", ".pt", ".bin", ".pkl", ".so"}, name_of(file)
