"""The arrows of the house: who may import whom (docs/architecture.md, design sec. 2).

Read from the source with ast, imports inside functions and under TYPE_CHECKING included; what really gets loaded is
seen from fresh processes.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"dsv4ckpt": ROOT / "dsv4ckpt", "dsv4model": ROOT / "dsv4model", "dsv4cli": ROOT / "cli"}
STDLIB = sys.stdlib_module_names | {"__future__"}

# Modules whose whole knowledge is fixed: nothing of ours but this. A smaller set is as good.
MAY_IMPORT = {
    "errors": set[str](),
    "formats": set[str](),
    "names": {"formats"},
    "strictjson": set[str](),
    "codec": {"formats"},
    "encode": {"codec", "formats"},
    "recast": {"codec", "formats"},
    "decode_plain": {"formats"},
    "probe": {"errors"},
    "shard": {"errors", "formats", "strictjson"},
    "sink": {"errors"},
    "contained": {"errors", "probe"},
    "temporaries": set[str](),
    "outdir": {"errors", "formats", "probe", "sink", "strictjson", "temporaries"},
    "config": {"errors", "formats", "strictjson"},
    "inventory": {"config", "formats", "names"},
    "release": {"config", "errors", "formats", "inventory", "names"},
    "source": {"config", "contained", "errors", "formats", "probe", "release", "shard", "strictjson"},
    "survey": {"config", "errors", "formats", "inventory", "names", "release", "source"},
    "tokenizer": {"strictjson"},
    "threads": set[str](),
    "stop": {"errors"},
    "ranks": {"stop"},
    "boxes": {"formats", "inventory"},
    "exchange": {"boxes", "errors", "formats", "held", "process_group", "ranks", "stop"},
    "held": {"codec", "formats", "inventory", "shard", "source", "survey", "values"},
    "process_group": {"errors", "ranks", "stop"},
    "paper": {
        "config",
        "errors",
        "formats",
        "inventory",
        "names",
        "release",
        "shard",
        "source",
        "strictjson",
    },
    "scaling": {"formats", "plan", "ranks", "steps"},
    "manifest": {"contained", "errors", "formats", "probe", "shard", "source", "strictjson"},
    "sidecar": {"contained", "errors", "formats", "probe", "shard", "strictjson"},
    "original": {"config", "contained", "errors", "formats", "shard", "sidecar", "steps", "survey"},
    "pickled": set[str](),
    "dcp_storage": {"errors", "formats", "probe"},
    "torchfile": {"formats", "pickled"},
    "dcp_metadata": {"errors", "formats", "pickled", "torchfile"},
    "dcp_layout": {"dcp_metadata", "formats", "inventory", "steps", "torchfile"},
    "steps": {"errors", "formats", "inventory", "shard", "source", "survey", "torchfile"},
    "card": {"errors", "formats", "manifest", "names", "release"},
    "hub": {"errors"},
    "hub_writer": {"errors", "hub"},
    "hub_fetch": {"errors", "formats", "hub", "sink", "stop"},
    "shelf": {"sink"},
    "outbox": {"errors", "hub_writer", "manifest", "push", "sink", "stop"},
    "hub_source": {
        "contained",
        "errors",
        "formats",
        "hub",
        "hub_fetch",
        "shard",
        "shelf",
        "sink",
        "source",
        "stop",
        "temporaries",
    },
    "push": {
        "card",
        "contained",
        "errors",
        "formats",
        "hub",
        "hub_writer",
        "manifest",
        "probe",
        "shard",
        "verify",
    },
    "oids": {"contained", "errors", "formats", "hub", "probe", "stop", "strictjson", "verify"},
    "values": {
        "codec",
        "errors",
        "formats",
        "inputs",
        "inventory",
        "names",
        "roundtrip",
        "source",
        "steps",
        "survey",
    },
}
# Modules that see much; these rooms stay closed to them.
MAY_NOT_IMPORT = {
    "plan": {"codec", "compare", "decode_plain", "encode", "outdir", "recast", "run", "sample", "verify"},
    "work": {"compare", "config", "decode_plain", "names", "outdir", "release", "sample", "verify"},
    "requantize": {"compare", "config", "decode_plain", "names", "outdir", "release", "sample", "verify"},
    "run": {"compare", "decode_plain", "sample", "verify"},
    # what checks a run shares no decoding or writing code with it
    "verify": {"codec", "encode", "outdir", "plan", "recast", "roundtrip", "run", "sample", "steps"},
    "compare": {"codec", "encode", "outdir", "plan", "recast", "roundtrip", "run", "sample", "steps"},
    "sample": {"compare", "run", "source", "survey", "verify"},
    "dcp": {"compare", "decode_plain", "sample", "verify"},
    "dcp_writer": {"codec", "compare", "decode_plain", "encode", "outdir", "sample", "verify", "work"},
    "export": {"codec", "compare", "decode_plain", "encode", "sample", "verify", "work"},
    "dcp_reader": {
        "compare",
        "decode_plain",
        "outdir",
        "plan",
        "run",
        "sample",
        "survey",
        "values",
        "verify",
    },
    "dcp_source": {"compare", "decode_plain", "outdir", "plan", "run", "sample", "values", "verify"},
}
COMPUTE = {  # these may load torch, all others may not
    "codec", "dcp", "dcp_reader", "dcp_source", "dcp_storage", "dcp_writer", "decode_plain", "desk", "encode",
    "exchange", "export", "held", "inputs", "process_group", "prove", "recast", "requantize", "roundtrip", "run",
    "sample", "threads", "values", "work",
}  # fmt: skip


def modules(package: str) -> dict[str, Path]:
    return {file.stem: file for file in sorted(PACKAGES[package].rglob("*.py"))}


@functools.cache
def imported(package: str, module: str) -> frozenset[str]:
    """Full names of what a module imports: `dsv4ckpt.formats`, `torch.nn`, `os`."""
    return frozenset(_imports(ast.parse(modules(package)[module].read_text()), package))


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, "no module climbs out of its package"
            owner = ".".join(filter(None, (package if node.level else "", node.module or "")))
            yield owner
            if owner in PACKAGES:  # from . import a, b
                yield from (f"{owner}.{alias.name}" for alias in node.names if alias.name in modules(owner))


def rooms(package: str, module: str) -> set[str]:
    """Modules of the same package that a module imports."""
    return {name.split(".")[1] for name in imported(package, module) if name.startswith(f"{package}.")}


def tops(package: str, module: str) -> set[str]:
    return {name.partition(".")[0] for name in imported(package, module)}


HUB = ("hub", "hub_writer")  # the only network
EVERY = [(package, module) for package in PACKAGES for module in modules(package)]


def test_the_packages_are_where_we_look() -> None:
    assert set(MAY_IMPORT) | set(MAY_NOT_IMPORT) <= set(modules("dsv4ckpt"))
    assert "main" in modules("dsv4cli")


@pytest.mark.parametrize("module", modules("dsv4ckpt"))
def test_dsv4ckpt_imports_nothing_but_itself_torch_and_the_standard_library(module: str) -> None:
    also = {"huggingface_hub"} if module in HUB else set()
    assert tops("dsv4ckpt", module) <= STDLIB | {"dsv4ckpt", "torch"} | also


@pytest.mark.parametrize("module", modules("dsv4model"))
def test_dsv4model_does_not_import_the_command_line(module: str) -> None:
    assert not tops("dsv4model", module) & {"dsv4cli", "cli", "click", "tqdm"}


@pytest.mark.parametrize("module", modules("dsv4cli"))
def test_cli_imports_its_own_modules_relatively_and_no_torch(module: str) -> None:
    """In a checkout the folder is `cli`, installed it is `dsv4cli`: only relative imports work in both."""
    text = PACKAGES["dsv4cli"].joinpath(f"{module}.py").read_text()
    absolute = {
        name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        )
    }
    assert not {name.partition(".")[0] for name in absolute} & {"cli", "dsv4cli", "torch"}


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_module_imports_only_what_it_may_know(module: str) -> None:
    assert rooms("dsv4ckpt", module) <= MAY_IMPORT[module]


@pytest.mark.parametrize("module", MAY_NOT_IMPORT)
def test_module_stays_out_of_closed_rooms(module: str) -> None:
    assert not rooms("dsv4ckpt", module) & MAY_NOT_IMPORT[module]


@pytest.mark.parametrize("module", ["formats", "names", "errors"])
def test_facts_import_no_torch_and_open_nothing(module: str) -> None:
    assert not tops("dsv4ckpt", module) & {"torch", "os", "io", "pathlib", "shutil", "tempfile", "json"}


@pytest.mark.parametrize("module", ["codec", "decode_plain", "names", "inventory", "plan"])
def test_arithmetic_and_planning_open_no_files(module: str) -> None:
    assert not tops("dsv4ckpt", module) & {"os", "io", "pathlib", "shutil", "tempfile", "mmap", "socket"}
    tree = ast.parse(modules("dsv4ckpt")[module].read_text())
    assert "open" not in {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }


def test_below_the_command_line_only_what_exports_values_imports_run() -> None:
    users = [module for module in modules("dsv4ckpt") if "run" in rooms("dsv4ckpt", module)]
    assert users == ["dcp_writer", "export"]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_form_no_cycle(package: str) -> None:
    graph = {module: rooms(package, module) - {module} for module in modules(package)}
    while leaves := {module for module, needs in graph.items() if not needs & graph.keys()}:
        graph = {module: needs for module, needs in graph.items() if module not in leaves}
    assert not graph, "these import each other"


NETWORK = {
    "aiohttp", "asyncio", "ftplib", "http", "httpx", "huggingface_hub", "requests", "smtplib", "ssl", "telnetlib",
    "urllib", "urllib3", "xmlrpc",
}  # fmt: skip


@pytest.mark.parametrize(("package", "module"), [pair for pair in EVERY if pair[1] not in HUB])
def test_only_hub_may_touch_the_network(package: str, module: str) -> None:
    assert not tops(package, module) & NETWORK
    if "socket" in tops(package, module):  # the host's name tells whose leftovers a temporary file is
        tree = ast.parse(modules(package)[module].read_text())
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "socket"
        }
        assert used == {"gethostname"}


def test_public_face_fits_on_a_screen() -> None:
    assert len((ROOT / "dsv4ckpt" / "__init__.py").read_text().splitlines()) <= 40


# ---- what is loaded in a fresh process

_LOADED = """
import importlib, sys
heavy = {"torch", "numpy", "safetensors", "transformers", "click", "tqdm", "dsv4cli", "dsv4model"}
for name in sys.argv[1:]:
    importlib.import_module(name)
    if heavy & sys.modules.keys():
        raise SystemExit(f"{name} loads {sorted(heavy & sys.modules.keys())}")
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_importing_everything_but_the_arithmetic_loads_no_torch() -> None:
    light = sorted(set(modules("dsv4ckpt")) - COMPUTE - {"__init__"})
    assert {"plan", "survey", "source", "inventory", "names", "formats", "verify"} <= set(light)
    done = run("-c", _LOADED, "dsv4ckpt", *(f"dsv4ckpt.{module}" for module in light))
    assert done.returncode == 0, done.stderr


_WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from dsv4cli.main import main; main()"


@pytest.mark.parametrize(
    "verb", ["--help", "--version", "inspect", "dry run", "convert --help", "sample --help"]
)
def test_command_that_reads_headers_only_works_without_torch(
    verb: str, flash_directory: Callable[[], Path], tmp_path: Path
) -> None:
    source, out = str(flash_directory()), str(tmp_path / "out")
    arguments = {
        "inspect": ["inspect", source],
        "dry run": ["convert", source, out, "--to", "bf16", "--dry-run"],
    }.get(verb, verb.split())
    done = run("-c", _WITHOUT_TORCH, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr


@pytest.fixture(scope="module")
def flash_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """The directory of a small sample, made when first asked for."""
    from dsv4ckpt import sample

    @functools.cache
    def made() -> Path:
        directory = tmp_path_factory.mktemp("arch") / "flash"
        sample.write_sample(sample.plan_sample(sample.SampleOptions(layers=1, experts=6)), str(directory))
        return directory

    return made
