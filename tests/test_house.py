"""The rules of the house: who may import whom, and what no file may contain.

Every table here is literal. A rule that must be broken is broken in its table, with the reason beside it.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import without_torch

ROOT = Path(__file__).parents[1]
ROOMS = ("extract", "distill", "evaluate")
FOLDERS = ("hdcache", *ROOMS, "benchmarks")
MAX_LINES = 350

# A core file imports only files of its own line or of a line above it.
LAYERS = [
    ["errors"],
    ["draws", "host_memory", "records", "resources", "stages", "tap_names"],
    ["stored_objects"],
    ["schema"],
    ["array_metadata", "durable"],
    ["leases", "object_files", "shards"],
    ["row_arrays"],
    [
        "arrays",
        "checkpoints",
        "chunks",
        "dataset_specs",
        "klt",
        "listings",
        "masks",
        "order",
        "photometric",
        "pixels",
        "plain_encodings",
        "progress",
        "relations",
        "soft_labels",
        "stopping",
        "student_files",
        "video",
        "video_vit",
        "views",
    ],
    ["croissant", "dataset_rows", "held", "klt_decoding", "store", "taps"],
    ["ledgers"],
    ["index"],
    ["integrity"],
    ["leftovers"],
    ["sharing", "sharing.objects"],
    ["sharing.folder"],
    ["sharing.places", "sharing.selection"],
    ["sharing.held_notes"],
    ["sharing.merging"],
    ["sharing.transfer"],
    ["backbones", "encodings", "hub_datasets", "shrinking", "tap_requests", "targets"],
    ["geometry", "packed", "stored_rows"],
    ["datasets", "info", "teachers"],
    ["batch", "doctor", "options", "reader", "samples"],
    ["rendering", "runs", "target_sources"],
    ["sharing.object_cache"],
    ["sharing.streaming"],
    ["collation", "finishing"],
    ["loader"],
    [
        "sharing.export",
        "sharing.export_folder",
        "sharing.exported_rows",
        "sharing.exported_shards",
        "sharing.layouts",
    ],
    ["sharing.catalogue_entries", "sharing.colours", "sharing.connections"],
    ["sharing.catalogue", "sharing.originals"],
    ["sharing.catalogue_text", "sharing.catalogue_urls", "sharing.look"],
    ["sharing.pages"],
    ["sharing.site"],
    ["sharing.server"],
    ["api", "chain"],
    ["__init__"],
    ["cli_options", "quickstart"],
    ["cli_check", "cli_distill", "cli_extract", "cli_recipes", "cli_share"],
    ["cli"],
    ["__main__"],
]

# The core files that know the rooms; True where the room must be imported inside a function.
KNOWS_ROOMS = {
    "cli": True,
    "cli_check": True,
    "cli_distill": True,
    "cli_extract": True,
    "cli_recipes": True,
    "__init__": True,
    "quickstart": False,
    "chain": False,
}

# The one file that may import a library.
ONLY_IMPORTER = {
    "zarr": "hdcache/arrays.py",
    "zarrs": "hdcache/arrays.py",
    "faiss": "evaluate/knn.py",
    "obstore": "hdcache/sharing/places.py",
}

# Source files without a test file of their own.
NO_OWN_TEST = {
    "hdcache/__main__.py": "one call; test_cli.py runs python -m hdcache",
    "hdcache/batch.py": "a record, and a hand-over between CUDA streams that needs a GPU: tests/test_loader.py has both",
    "hdcache/cli_distill.py": "the commands are called in test_cli.py, test_live.py and test_chain.py",
    "hdcache/cli_extract.py": "the commands are called in test_cli.py and test_plan.py",
    "hdcache/cli_share.py": "the commands are called in test_export.py and test_transfer.py",
    "hdcache/sharing/export_folder.py": "what is kept, written again and refused is seen through export_store(), in test_export.py",
    "hdcache/sharing/exported_rows.py": "rows are seen through export_store(), in test_export.py",
    "hdcache/sharing/exported_shards.py": "shards are seen through export_store(), in test_export.py",
    "hdcache/cli_recipes.py": "the commands are called in test_cli.py",
    "extract/checked_rows.py": "which rows are drawn and how their images are opened is seen in test_replay.py and test_audit.py",
    "extract/copying.py": "what is taken and what is not is seen through repair(), in test_repair.py",
    "extract/damage.py": "what is found, and of what it is, is seen through repair(), in test_repair.py",
    "extract/mending.py": "every way is seen through repair(), in test_repair.py",
    "extract/record_mending.py": "every way is seen through repair(), in test_repair.py",
    "extract/repair_requests.py": "every refusal is seen through repair(), in test_repair.py",
    "extract/remaking.py": "what it makes is compared by repair(), in test_repair.py",
    "extract/rows.py": "which rows a shard has, and what becomes of a bad one, is seen in test_pipeline.py",
    "extract/engines.py": "types, and four calls that every test of extract() makes",
    "extract/opening.py": "what it opens and refuses is seen through extract(), in test_extract_run.py and test_pipeline.py",
    "hdcache/collation.py": "batches are seen through Loader, in test_loader.py",
    "hdcache/finishing.py": "batches are seen through Loader, in test_loader.py",
    "hdcache/sharing/catalogue_entries.py": "entries are made, searched and compared in test_catalogue.py",
    "hdcache/sharing/site.py": "every address is asked for over a socket in test_server.py, and seen in test_browser.py",
    "hdcache/errors.py": "each class is matched where it is raised, in the tests of the files that raise it",
    "hdcache/dataset_specs.py": "every spec and its messages are seen through open_dataset, in test_datasets.py",
    "hdcache/dataset_rows.py": "ids, labels and fingerprints are seen through open_dataset, in test_datasets.py",
    "hdcache/plain_encodings.py": "every encoding is seen through Encoder, in test_encodings.py",
    "distill/published_amd.py": "data; test_recipes.py builds and checks every recipe",
    "distill/published_baselines.py": "data; test_recipes.py builds and checks every recipe",
    "distill/published_hybrid.py": "data; test_recipes.py builds and checks every recipe",
    "distill/published_sdssl.py": "data; test_recipes.py builds and checks every recipe",
    "distill/published_tinymim.py": "data; test_recipes.py builds and checks every recipe",
    "distill/run_report.py": "what is said and written is seen through distill(), in test_distill_run.py and test_run_views.py",
    "distill/run_settings.py": "every refusal is seen through distill(), in test_distill_run.py and test_live.py",
    "hdcache/listings.py": "listings are seen through open_dataset, in test_datasets.py",
}

# Uses of a global or version-dependent random generator.
GLOBAL_RANDOM: dict[tuple[str, str], str] = {}

DRAWERS = ("utils", "util", "helpers", "helper", "common", "misc", "manager")
PICKLES = ("pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")


class Import(NamedTuple):
    """One imported module: dotted name, line, inside a function, under ``if TYPE_CHECKING``."""

    module: str
    line: int
    in_function: bool
    type_checking: bool


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "hdcache" else ("hdcache", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


MODULES = {module_of(path): path for path in sources("hdcache", *ROOMS)}


def dotted(node: ast.AST) -> str:
    """``a.b.c`` for the expression of that spelling, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (head := dotted(node.value)):
        return f"{head}.{node.attr}"
    return ""


def _targets(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        # The version is a word, not a dependency: any file may take it from the package.
        inner = [f"{node.module}.{alias.name}" for alias in node.names if alias.name != "__version__"]
        return [name if name in MODULES else node.module for name in inner]
    if isinstance(node, ast.Call) and dotted(node.func) in ("importlib.import_module", "import_module", "__import__"):
        return [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return []


def _walk(node: ast.AST, in_function: bool, type_checking: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        checking = type_checking or (isinstance(child, ast.If) and dotted(child.test).endswith("TYPE_CHECKING"))
        for target in _targets(child):
            yield Import(target, getattr(child, "lineno", 0), inside, checking)
        yield from _walk(child, inside, checking)


@cache
def imports_of(path: Path) -> tuple[Import, ...]:
    """Every import of a file, those inside functions and ``import_module("a.b")`` included."""
    return tuple(_walk(tree_of(path), False, False))


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "hdcache" and len(parts) > 1 and parts[1] in ROOMS else None


def core_of(module: str) -> str | None:
    """The name in LAYERS of the core file that ``module`` is, ``__init__`` for the package itself."""
    parts = module.split(".")
    if parts[0] != "hdcache" or room_of(module):
        return None
    return ".".join(parts[1:]) if len(parts) > 1 else "__init__"


def layer_of(path: Path) -> str:
    """The name of a core file in LAYERS: its stem, after the folder's name where it lies in a folder of the core."""
    parts = path.relative_to(ROOT / "hdcache").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


# Who may import whom


def test_rooms_do_not_know_each_other_nor_the_command_line() -> None:
    wrong = []
    for path in sources(*ROOMS):
        mine = room_of(module_of(path))
        for item in imports_of(path):
            if room_of(item.module) not in (None, mine):
                wrong.append(f"{name_of(path)}:{item.line} imports {item.module}: rooms meet on disk only")
            if core_of(item.module) in ("chain", "cli", "quickstart"):
                wrong.append(f"{name_of(path)}:{item.line} imports {item.module}, which imports the rooms")
            if item.module.split(".")[0] in (*ROOMS, "benchmarks", "tests"):
                wrong.append(f"{name_of(path)}:{item.line} imports {item.module}, which no installed copy has")
    assert not wrong, "\n".join(wrong)


def test_core_imports_rooms_only_where_listed() -> None:
    wrong = []
    for path in sources("hdcache"):
        for item in imports_of(path):
            if not room_of(item.module) or item.type_checking:
                continue
            if layer_of(path) not in KNOWS_ROOMS:
                wrong.append(f"{name_of(path)}:{item.line} imports {item.module}: the core knows no room")
            elif KNOWS_ROOMS[layer_of(path)] and not item.in_function:
                wrong.append(f"{name_of(path)}:{item.line} imports {item.module} outside a function")
    assert not wrong, "\n".join(wrong)


def test_core_imports_point_down() -> None:
    rank = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    unlisted = [name_of(path) for path in sources("hdcache") if layer_of(path) not in rank]
    assert not unlisted, f"list {', '.join(unlisted)} in LAYERS of {name_of(Path(__file__))}"
    gone = rank.keys() - {layer_of(path) for path in sources("hdcache")}
    assert not gone, f"no such core files, drop from LAYERS: {sorted(gone)}"
    wrong = []
    for path in sources("hdcache"):
        for item in imports_of(path):
            other = core_of(item.module)
            if other is None or item.module not in MODULES:
                continue
            if rank[other] > rank[layer_of(path)]:
                wrong.append(f"{name_of(path)}:{item.line} imports {item.module}, which LAYERS puts above it")
    assert not wrong, "\n".join(wrong)


def test_imports_of_ours_exist() -> None:
    wrong = [
        f"{name_of(path)}:{item.line} imports {item.module}"
        for path in sources(*FOLDERS)
        for item in imports_of(path)
        if item.module.split(".")[0] == "hdcache" and item.module not in MODULES
    ]
    assert not wrong, "no such module:\n" + "\n".join(wrong)


def test_no_import_cycles() -> None:
    def needs(name: str, path: Path) -> list[str]:
        # What the package itself hands out lazily, it fetches once it is loaded.
        items = [item for item in imports_of(path) if name != "hdcache" or not (item.in_function or item.type_checking)]
        return sorted({item.module for item in items} & (MODULES.keys() - {name}))

    graph = {name: needs(name, path) for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "import cycle: " + " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_one_file_imports_zarr_and_one_faiss() -> None:
    wrong = []
    for path in sources("hdcache", *ROOMS):
        for item in imports_of(path):
            only = ONLY_IMPORTER.get(item.module.split(".")[0])
            if only not in (None, name_of(path)):
                wrong.append(f"{name_of(path)}:{item.line} imports {item.module}; only {only} may")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("stem", without_torch.MODULES)
def test_store_side_loads_no_torch(stem: str) -> None:
    queue, trail = [f"hdcache.{stem}"], {f"hdcache.{stem}": f"hdcache.{stem}", "hdcache": "hdcache"}
    assert queue[0] in MODULES, f"hdcache/{stem}.py is gone: edit MODULES of tests/without_torch.py"
    queue += ["hdcache"] * ("hdcache" in MODULES)
    while queue:
        name = queue.pop()
        for item in imports_of(MODULES[name]):
            if item.in_function or item.type_checking:
                continue
            chain = f"{trail[name]} -> {item.module}"
            assert item.module.split(".")[0] not in ("torch", "timm", "torchvision"), f"{chain}, when imported"
            if item.module in MODULES and item.module not in trail:
                trail[item.module] = chain
                queue.append(item.module)


# What no file may contain


def test_no_long_files() -> None:
    long = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in sources(*FOLDERS)}
    long = {name: lines for name, lines in long.items() if lines > MAX_LINES}
    assert not long, f"more than {MAX_LINES} lines; split by reason: {long}"


def test_no_drawers() -> None:
    paths = sources(*FOLDERS, "tests")
    wrong = [name_of(path) for path in paths if {path.parent.name, *path.stem.split("_")} & set(DRAWERS)]
    assert not wrong, f"name the idea, not the drawer: {wrong}"


def test_no_relative_imports() -> None:
    wrong = [
        f"{name_of(path)}:{node.lineno}"
        for path in sources(*FOLDERS, "tests")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not wrong, f"relative imports: {wrong}"


def test_nothing_is_unpickled() -> None:
    wrong = []
    for path in sources(*FOLDERS, "tests"):
        pickles = [item for item in imports_of(path) if item.module.split(".")[0] in PICKLES]
        wrong += [f"{name_of(path)}:{item.line} imports {item.module}" for item in pickles]
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Call):
                continue
            given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            if dotted(node.func) == "torch.load" and given.get("weights_only") is not True:
                wrong.append(f"{name_of(path)}:{node.lineno} torch.load without weights_only=True")
            if given.get("allow_pickle") is True:
                wrong.append(f"{name_of(path)}:{node.lineno} allow_pickle=True")
    assert not wrong, "\n".join(wrong)


def _global_random(path: Path) -> Iterator[tuple[str, int]]:
    for item in imports_of(path):
        if item.module == "random" or item.module.startswith("numpy.random"):
            yield item.module, item.line
    for node in ast.walk(tree_of(path)):
        name = dotted(node)
        if re.fullmatch(r"(np|numpy)\.random\.\w+", name) and not name.endswith(".Philox"):
            yield name.replace("numpy", "np"), node.lineno
        if re.fullmatch(r"torch\.(cuda\.)?(manual_)?seed(_all)?", name):
            yield name, node.lineno


def test_no_global_random_state() -> None:
    found = {(name_of(p), name): line for p in sources("hdcache", *ROOMS) for name, line in _global_random(p)}
    wrong = [f"{file}:{line} uses {name}" for (file, name), line in found.items() if (file, name) not in GLOBAL_RANDOM]
    assert not wrong, "draw with hdcache.draws, or list it in GLOBAL_RANDOM with a reason:\n" + "\n".join(wrong)
    stale = GLOBAL_RANDOM.keys() - found.keys()
    assert not stale, f"no longer used, drop from GLOBAL_RANDOM: {sorted(stale)}"


# What every file has


def test_readme_names_every_source_file_with_a_caption() -> None:
    captions: dict[str, str] = {}
    folder = ""
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        plain = line.translate(str.maketrans("│├└─|`*#", "        ")).strip()
        if match := re.match(r"(?:(\w+)/)?(\w+\.py)\b[^\w]*(.*)", plain):
            captions.setdefault(f"{match[1] or folder}/{match[2]}", match[3].strip())
        elif match := re.match(r"(\w+(?:/\w+)*)/(\s|$)", plain):
            folder = match[1]
    files = [name_of(path) for path in sources(*FOLDERS) if path.name != "__init__.py"]
    missing = [file for file in files if not captions.get(file)]
    assert not missing, f"README.md has no line '<file>  <caption>' for: {missing}"
    gone = [file for file in captions if file.split("/")[0] in FOLDERS and not (ROOT / file).exists()]
    assert not gone, f"README.md names files that do not exist: {gone}"


def test_every_source_file_has_its_test_file() -> None:
    files = [path for path in sources("hdcache", *ROOMS) if path.name != "__init__.py"]
    stems = Counter(path.stem for path in files)
    missing, needless = [], []
    for path in files:
        names = [f"test_{path.parent.name}_{path.stem}.py"]
        if path.stem != "run" and (stems[path.stem] == 1 or path.parent.name == "hdcache"):
            names.append(f"test_{path.stem}.py")
        has = any((ROOT / "tests" / name).exists() for name in names)
        if not has and name_of(path) not in NO_OWN_TEST:
            missing.append(f"{name_of(path)}: tests/{names[-1]}")
        if has and name_of(path) in NO_OWN_TEST:
            needless.append(name_of(path))
    assert not missing, "add the test file, or list in NO_OWN_TEST with a reason:\n" + "\n".join(missing)
    needless += [name for name in NO_OWN_TEST if not (ROOT / name).exists()]
    assert not needless, f"drop from NO_OWN_TEST: {needless}"


# Spelled in two halves, so that this file passes its own test.
FORBIDDEN = {
    rf"(?<![\w.:/~-])/{'work'}/": "a path of a build machine",
    rf"(?<![\w.:/~-])/{'root'}/": "a path of a build machine",
    r"pypi\." + "org": "a package registry",
    r"files\.python" + r"hosted\.org": "a package registry",
    r"registry\.npm" + r"js\.org": "a package registry",
    r"download\.py" + r"torch\.org": "a package registry",
}


def tracked() -> list[Path]:
    """The files git tracks or would track; in a tree without git, those of the folders we know."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        found = [path for folder in (*FOLDERS, "tests", "docs", ".ci") for path in (ROOT / folder).rglob("*")]
        return [path for path in (*found, *ROOT.glob("*")) if path.is_file() and "__pycache__" not in path.parts]
    return [path for name in listed if name and (path := ROOT / name).is_file()]


def test_no_forbidden_words() -> None:
    wrong = []
    for path in tracked():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        for pattern, what in FORBIDDEN.items():
            hits = [number for number, line in enumerate(lines, 1) if re.search(pattern, line)]
            wrong += [f"{name_of(path)}:{number} holds {what}" for number in hits]
    assert not wrong, "\n".join(wrong)
