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

from dsv4ckpt import formats

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = sorted([*(ROOT / "dsv4ckpt").rglob("*.py"), *(ROOT / "dsv4model").rglob("*.py")])
PRODUCT = [*LIBRARIES, *sorted((ROOT / "cli").rglob("*.py"))]
CORE = sorted((ROOT / "dsv4ckpt").rglob("*.py"))


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), name_of(file))


def nodes(file: Path) -> Iterator[ast.AST]:
    return ast.walk(tree_of(file))


def imported_as(tree: ast.AST) -> dict[str, str]:
    """Local name -> what it stands for: {"load": "torch.load"} after `from torch import load`."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dotted(node: ast.AST, aliases: dict[str, str] | None = None) -> str:
    """`yaml.load` for the expression yaml.load; '' for what is no plain name."""
    if isinstance(node, ast.Name):
        return (aliases or {}).get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, aliases)}.{node.attr}"
    return ""


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    aliases = imported_as(tree)
    return (
        (dotted(node.func, aliases).removeprefix("builtins."), node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    )


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found


def is_constant(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


# ---- dangerous calls

MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "jsonpickle", "marshal", "shelve", "ctypes",
    "code", "codeop", "pty", "runpy", "imp",
}  # fmt: skip
CALLS = {
    "eval", "exec", "compile", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all",
    "torch.load", "torch.hub.load", "torch.jit.load", "torch.serialization.load", "np.load", "numpy.load",
    "pandas.read_pickle", "shutil.unpack_archive", "tempfile.mktemp",
}  # fmt: skip
FAMILIES = ("os.exec", "os.spawn")
METHODS = {"extractall", "extract"}  # of archives: members may lead anywhere
SAFE = {  # keyword: the one value that it may have
    "shell": False,
    "trust_remote_code": False,
    "weights_only": True,
    "allow_pickle": False,
    "verify": True,
}
MAPPING = {"np.memmap", "numpy.memmap", "torch.from_file", "torch.UntypedStorage.from_file"}
EVERYTHING = [*PRODUCT, *sorted((ROOT / "benchmarks").rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]
NEEDED = {  # file: what it may use all the same
    "benchmarks/hub.py": {"mmap.mmap"},  # sparse files that it has written itself
    "tests/ckpt/test_oids.py": {"exec"},  # the example that our own --help shows
    "tests/crash/signals_driver.py": {"os.execv"},  # our own command, in a forked child
    "tests/ckpt/test_dcp_metadata.py": {"pickle"},  # what torch pickles, made here
    "tests/ckpt/test_torchfile.py": {"torch.load"},  # weights only, of our own bytes
    "tests/dcp/test_reshard.py": {"pickle"},  # what we wrote ourselves, as torch reads it
    "tests/dcp/test_written_by_ranks.py": {"pickle"},  # what torch wrote in the test, as it reads it
    "tests/dcp/script_driver.py": {"runpy"},  # a script of our own documentation
    "tests/dcp/gangs.py": {"pickle"},  # our own functions, to forked children and back
    "tests/hostile/test_dcp.py": {"pickle"},  # what torch pickles, made here
    "tests/model/test_model_mutants.py": {
        "compile",
        "exec",
    },  # copies of our own modules with passages replaced
}


def dangers(tree: ast.AST) -> set[str]:
    """Whatever could run what it reads, load objects, or die of a file that shrinks."""
    found = imports(tree) & MODULES
    for name, call in calls(tree):
        last = name.rpartition(".")[2]
        if name in CALLS or name.startswith(FAMILIES) or last in METHODS or name in MAPPING:
            found.add(name)
        if last == "__import__" and not (call.args and isinstance(call.args[0], ast.Constant)):
            found.add(name)
        # a mapped input that is truncated under us kills the process; anonymous memory is fine
        if name in ("mmap", "mmap.mmap") and not (call.args and ast.unparse(call.args[0]) == "-1"):
            found.add(name)
        for keyword in call.keywords:
            safe = SAFE.get(keyword.arg or "")
            if safe is not None and not is_constant(keyword.value, safe):
                found.add(f"{keyword.arg}={ast.unparse(keyword.value)}")
            if keyword.arg == "mmap":
                found.add("mmap=")
    return found


@pytest.mark.parametrize("file", EVERYTHING, ids=name_of)
def test_nothing_runs_what_it_reads_or_maps_files(file: Path) -> None:
    assert dangers(tree_of(file)) - NEEDED.get(name_of(file), set()) == set()


def test_exceptions_are_needed() -> None:
    for name, allowed in NEEDED.items():
        assert allowed <= dangers(tree_of(ROOT / name)), name
    assert not {file.split("/")[0] for file in NEEDED} & {"dsv4ckpt", "dsv4model", "cli"}


@pytest.mark.parametrize(
    "snippet",
    [
        "import pickle", "from pickle import loads", "import marshal as m", "import shelve", "import runpy",
        "eval(text)", "exec(text)", "compile(text, '', 'exec')", "import builtins; builtins.eval(text)",
        "__import__(name)", "import builtins; builtins.__import__(name)",
        "import subprocess; subprocess.run(text, shell=True)", "run(text, shell=wanted)",
        "import os; os.system(text)", "from os import system; system(text)", "import os as o; o.popen(text)",
        "os.execvp(a, b)", "os.spawnl(0, a)",
        "Model.from_pretrained(name, trust_remote_code=True)", "load(file, weights_only=False)",
        "import torch; torch.load(file)", "from torch import load; load(file)", "import torch as t; t.load(file)",
        "np.load(file, allow_pickle=flag)", "import yaml; yaml.load(text)", "archive.extractall(place)",
        "import tarfile; tarfile.open(file).extract(member)", "import mmap; mmap.mmap(fd, 0)",
        "from mmap import mmap; mmap(fd, 0)", "torch.from_file(path)", "read(path, mmap=True)",
    ],
)  # fmt: skip
def test_danger_in_a_bad_snippet_is_found(snippet: str) -> None:
    assert dangers(ast.parse(snippet))


@pytest.mark.parametrize(
    "snippet",
    [
        "import re; re.compile(text)", "import mmap; mmap.mmap(-1, 4096)", "self.load(file)",
        "import json; json.load(file)",
        "__import__('json')", "run(command, shell=False)", "'eval(text)'", "model.eval()", "yaml.safe_load(text)",
        "torch.package", "from .torch import load; load(file)",
    ],
)  # fmt: skip
def test_danger_is_not_seen_in_a_harmless_snippet(snippet: str) -> None:
    assert not dangers(ast.parse(snippet))


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
    assert [name for name, _ in calls(tree_of(file)) if name in SPEAKING] == []
    assert not {dotted(node) for node in nodes(file) if isinstance(node, ast.Attribute)} & STREAMS
    assert not imports(tree_of(file)) & {
        "argparse",
        "click",
        "getopt",
        "logging",
        "optparse",
        "tqdm",
        "warnings",
    }


@pytest.mark.parametrize("file", LIBRARIES, ids=name_of)
def test_libraries_know_no_time(file: Path) -> None:
    """Equal inputs give equal bytes."""
    assert not imports(tree_of(file)) & {"time", "datetime", "uuid", "getpass", "platform"}


NETWORK = {
    "aiohttp",
    "ftplib",
    "http",
    "httpx",
    "huggingface_hub",
    "requests",
    "ssl",
    "urllib",
    "urllib3",
    "xmlrpc",
}


@pytest.mark.parametrize("file", PRODUCT, ids=name_of)
def test_product_opens_no_connection(file: Path) -> None:
    """Of `socket` it may ask the host's name."""
    tree = tree_of(file)
    assert not imports(tree) & NETWORK - (
        {"huggingface_hub"} if name_of(file) in ("dsv4ckpt/hub.py", "dsv4ckpt/hub_writer.py") else set()
    )
    known = imported_as(tree)
    used = {dotted(node, known) for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name)}
    assert {name for name in used if name.startswith("socket.")} <= {"socket.gethostname"}


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


# ---- SECURITY.md

SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_security_page_points_to_tests_that_exist() -> None:
    links = re.findall(r"\]\((tests/[\w/.]+)\)", SECURITY)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_security_page_tells_the_limits_that_hold() -> None:
    told = {
        name: int(value.replace(",", ""))
        for name, value in re.findall(r"\| `(MAX_\w+)`.*\| ([\d,]+) \|", SECURITY)
    }
    assert len(told) == 9
    assert told == {name: getattr(formats, name) for name in told}
