"""The import hook, among imitations of torch, Transformers and PEFT that import in milliseconds.

Each test is one new interpreter without site-packages (`-S`), with a copy of the hook's files and of an entry point in
a directory on its path. The code it runs asserts; what it prints on stderr are the warnings.
"""

import os
import shutil
import statistics
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
HOOK_FILES = ["__init__.py", "integrations/__init__.py", "integrations/autoload.py"]

IMITATIONS = {
    "torch/__init__.py": """
        import os, threading, warnings
        from importlib.metadata import entry_points

        if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1":
            for backend in entry_points(group="torch.backends"):
                backend.load()()
    """,
    "transformers/__init__.py": "",
    "transformers/quantizers/__init__.py": "from . import auto",
    # as in Transformers: its import may be what imports torch, and makes torch call us
    "transformers/quantizers/auto.py": "import torch\nregistrations = []",
    "peft/__init__.py": "import torch\nfrom . import mapping_func",
    "peft/mapping_func.py": "registrations = []",
    "hf_gg/integrations/transformers.py": "from transformers.quantizers import auto\nauto.registrations.append('gg')",
    "hf_gg/integrations/peft.py": "from peft import mapping_func\nmapping_func.registrations.append('gg')",
}

REGISTERED = """
import sys
from transformers.quantizers import auto
from peft import mapping_func
assert auto.registrations == mapping_func.registrations == ["gg"], (auto.registrations, mapping_func.registrations)
"""


class Site:
    """A directory that plays site-packages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.empty = path / "empty"  # `-c` puts the current directory first on the path: it must not be the checkout
        self.empty.mkdir()
        self.write(IMITATIONS)
        for name in HOOK_FILES:
            shutil.copy(ROOT / "hf_gg" / name, path / "hf_gg" / name)
        self.add_entry_point("hf_gg", "hf_gg.integrations.autoload:install")

    def write(self, files: dict[str, str]) -> None:
        for name, text in files.items():
            file = self.path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(textwrap.dedent(text))

    def add_entry_point(self, name: str, target: str) -> None:
        """Writes what an installer writes, as far as torch looks at it."""
        self.write(
            {
                f"{name}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
                f"{name}-1.0.dist-info/entry_points.txt": f"[torch.backends]\n{name} = {target}\n",
            }
        )

    def run(self, code: str, *options: str, **environment: str) -> str:
        """Runs code in a new interpreter, fails where it fails, and returns its stderr."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_GG"))}
        finished = subprocess.run(
            [sys.executable, "-S", *options, "-c", textwrap.dedent(code)],
            cwd=self.empty,
            env={**inherited, "PYTHONPATH": str(self.path), **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        return finished.stderr


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.mark.parametrize(
    "imports",
    [
        "import torch",
        "import transformers.quantizers.auto, torch",
        "from transformers.quantizers import auto",
        "import peft",
        "import hf_gg, torch, peft",
        "import hf_gg.integrations.peft, hf_gg.integrations.transformers",
        "import hf_gg.integrations.transformers, peft",
    ],
)
def test_registers_once_in_any_order_of_imports(site: Site, imports: str):
    assert site.run(f"{imports}\n{REGISTERED}import hf_gg{REGISTERED}") == ""


def test_torch_alone_loads_the_hook_and_nothing_else(site: Site):
    site.run("""
        import sys
        from importlib import machinery, metadata
        import threading, warnings, zipfile
        loaded = set(sys.modules)
        import torch
        assert set(sys.modules) - loaded == {"torch", "hf_gg", "hf_gg.integrations", "hf_gg.integrations.autoload"}

        from transformers.quantizers import auto
        assert auto.registrations == ["gg"]
        assert type(auto.__loader__) is type(auto.__spec__.loader) is machinery.SourceFileLoader
    """)


@pytest.mark.parametrize("value", ["0", "False", " off "])
def test_switched_off(site: Site, value: str):
    code = f"""
import sys, peft, transformers.quantizers.auto as auto
assert auto.registrations == [] and peft.mapping_func.registrations == []
assert not any(name.startswith("hf_gg") for name in sys.modules)
import hf_gg  # what the user imports registers, even so
{REGISTERED}"""
    assert site.run(code, HF_GG_AUTOLOAD=value) == ""


@pytest.mark.parametrize("switch", ["HF_GG_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
@pytest.mark.parametrize("imports", ["import hf_gg", "import peft, hf_gg", "import transformers.quantizers, hf_gg"])
def test_explicit_import_survives_the_switches(site: Site, switch: str, imports: str):
    assert site.run(imports + REGISTERED, **{switch: "0"}) == ""


@pytest.mark.parametrize("imports", ["import torch", "import transformers.quantizers, hf_gg"])
@pytest.mark.parametrize("options", [(), ("-W", "error")])
@pytest.mark.parametrize("library", ["transformers", "peft"])
def test_failed_registration_is_one_warning(site: Site, imports: str, options: tuple[str, ...], library: str):
    site.write({f"hf_gg/integrations/{library}.py": "raise OSError('libgomp.so.1: not found')"})
    stderr = site.run(
        f"{imports}\nimport hf_gg, peft\nfrom transformers.quantizers import auto\nimport hf_gg", *options
    )
    assert stderr.count(f"could not register with {library} (OSError: libgomp.so.1: not found)") == 1
    assert f"pip install -U hf-gg {library}" in stderr
    assert "Traceback" not in stderr


def test_without_peft(site: Site):
    shutil.rmtree(site.path / "peft")
    stderr = site.run("""
        import torch, transformers.quantizers, importlib.util
        assert transformers.quantizers.auto.registrations == ["gg"]
        assert importlib.util.find_spec("peft") is None
        try:
            import peft.mapping_func
        except ModuleNotFoundError as error:
            assert error.name == "peft"
    """)
    assert stderr == ""


def test_a_library_that_does_not_import_fails_as_it_would_without_us(site: Site):
    site.write({"peft/mapping_func.py": "import os\nregistrations = [][:int(os.environ['REPAIRED'])]"})
    stderr = site.run(f"""
import os, torch
try:
    import peft
except KeyError as error:
    assert error.args == ("REPAIRED",)
os.environ["REPAIRED"] = "1"
{REGISTERED}""")
    assert stderr == ""


def test_module_that_makes_torch_call_us_and_fails(site: Site):
    """Its import is under way when the hook is placed, so that its loader cannot be wrapped."""
    site.write(
        {"transformers/quantizers/auto.py": "import os, torch\nregistrations = [][:int(os.environ['REPAIRED'])]"}
    )
    stderr = site.run(f"""
import os
try:
    import transformers.quantizers.auto
except KeyError as error:
    assert error.args == ("REPAIRED",)
os.environ["REPAIRED"] = "1"
import transformers.quantizers.auto as auto
assert type(auto.__spec__).__name__ == "ModuleSpec" and auto.__spec__._initializing is False
{REGISTERED}""")
    assert stderr == ""


def test_another_backend_loads_transformers_before_us(site: Site):
    site.write({"a_backend.py": "def start():\n    import transformers.quantizers.auto, peft"})
    site.add_entry_point("a_backend", "a_backend:start")
    assert site.run("import torch" + REGISTERED) == ""


def test_looking_for_a_module_does_not_register(site: Site):
    site.run("""
        import sys, torch, importlib.util, transformers
        sys.modules["transformers.quantizers"] = package = type(sys)("transformers.quantizers")
        package.__path__ = [transformers.__path__[0] + "/quantizers"]
        spec = importlib.util.find_spec("transformers.quantizers.auto")
        assert spec.loader.get_source(spec.name) .endswith("registrations = []") and spec.loader.path == spec.origin
        assert "hf_gg.integrations.transformers" not in sys.modules
        import transformers.quantizers.auto as auto
        assert auto.registrations == ["gg"]
    """)


def test_libraries_and_hook_in_a_zip_file(site: Site):
    with zipfile.ZipFile(site.path / "bundle.zip", "w") as bundle:
        for file in sorted(site.path.rglob("*")):
            if file.is_file() and file.suffix != ".zip":
                bundle.write(file, file.relative_to(site.path))
    assert site.run("import torch" + REGISTERED, PYTHONPATH=str(site.path / "bundle.zip")) == ""


@pytest.mark.parametrize("place", [0, 1, 99])
def test_finder_that_asks_all_the_others(site: Site, place: int):
    """As in an editable install: only this finder knows the libraries; and it asks all others first, us included."""
    (site.path / "elsewhere").mkdir()
    for name in ("transformers", "peft"):
        (site.path / name).rename(site.path / "elsewhere" / name)
    stderr = site.run(f"""
import sys, torch
from importlib.machinery import PathFinder

class Editable:
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        for finder in sys.meta_path:
            spec = finder is not cls and finder.find_spec(fullname, path, target)
            if spec:
                return spec
        return PathFinder.find_spec(fullname, path or [{str(site.path / "elsewhere")!r}])

sys.meta_path.insert({place}, Editable)
{REGISTERED}""")
    assert stderr == ""


def test_loader_of_the_old_protocol_is_left_alone(site: Site):
    site.run("""
        import sys, torch, warnings
        from importlib.machinery import ModuleSpec

        class Loader:
            def load_module(self, name):
                module = sys.modules[name] = type(sys)(name)
                return module

        class Finder:
            def find_spec(self, fullname, path=None, target=None):
                return ModuleSpec(fullname, Loader()) if fullname == "peft.mapping_func" else None

        sys.meta_path.append(Finder())
        sys.meta_path.insert(1, sys.meta_path.pop())
        warnings.simplefilter("ignore", ImportWarning)
        if sys.version_info < (3, 15):
            import peft.mapping_func
    """)


def test_placed_once_and_reloaded(site: Site):
    stderr = site.run(f"""
import importlib, sys, torch, hf_gg
from hf_gg.integrations import autoload
for _ in range(2):
    autoload.install()
    importlib.reload(hf_gg)
    importlib.reload(torch)
assert sum(isinstance(finder, autoload.PostImportFinder) for finder in sys.meta_path) == 1
importlib.reload(autoload).install()
{REGISTERED}
importlib.reload(hf_gg)
importlib.reload(autoload).install()
importlib.reload(torch)
{REGISTERED}""")
    assert stderr == ""


def test_threads(site: Site):
    """Some import the libraries, some our modules, so that each holds what another one waits for."""
    pause = "import time\ntime.sleep(0.05)\n"
    for name in ("transformers/quantizers/auto.py", "hf_gg/integrations/transformers.py"):
        lines = IMITATIONS[name].splitlines()
        site.write({name: pause + f"\n{pause}".join(lines)})
    stderr = site.run(f"""
import importlib, threading, torch

names = ["transformers.quantizers.auto", "peft", "hf_gg", "hf_gg.integrations.transformers", "json", "csv"] * 4
failed = []
barrier = threading.Barrier(len(names))

def load(name):
    barrier.wait()
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed.append((name, error))

threads = [threading.Thread(target=load, args=[name]) for name in names]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failed, failed
{REGISTERED}""")
    assert stderr == ""


def test_own_mistakes_do_not_end_the_import_of_torch(site: Site):
    stderr = site.run("""
        import sys
        class Sealed(list):
            def insert(self, index, item):
                raise TypeError("sealed")
        sys.meta_path = Sealed(sys.meta_path)
        import torch, transformers.quantizers
    """)
    assert stderr.count("hf_gg could not register with transformers (TypeError: sealed)") == 1


def test_public_names(site: Site):
    site.write({"hf_gg/formats/__init__.py": "def get_format(name): return name"})
    stderr = site.run("""
        import sys, hf_gg
        assert set(hf_gg.__all__) <= set(dir(hf_gg))
        assert "hf_gg.formats" not in sys.modules
        assert hf_gg.get_format("rf8") == "rf8" and "get_format" in vars(hf_gg)
        assert "torch" not in sys.modules
        try:
            hf_gg.getformat
        except AttributeError as error:
            assert str(error) == "module 'hf_gg' has no attribute 'getformat'"
        else:
            raise SystemExit("no error")
    """)
    assert stderr == ""


def test_cost_at_import_of_torch(site: Site):
    """What torch does with the entry point, in new processes: under 2 ms (measured figures: docs/autoload.md)."""
    code = f"""
import threading, time, warnings
from importlib.metadata import entry_points
[backend] = entry_points(group="torch.backends")
start = time.perf_counter()
backend.load()()
seconds = time.perf_counter() - start
open({str(site.path / "seconds")!r}, "w").write(str(seconds))
"""
    seconds = []
    for _ in range(7):
        site.run(code)
        seconds.append(float((site.path / "seconds").read_text()))
    assert min(seconds) < 0.002, statistics.median(seconds)
