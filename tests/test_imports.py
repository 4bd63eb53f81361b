"""The direction of imports, read from the sources: the library never imports a program, nor a program another."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

# A library module imports from its own line and the lines above. One that is not named here stands on a last line.
LINES = [
    {"streams", "errors"},
    {"config", "quantize", "sampling", "speculate", "atomic", "runtime"},
    {"forms", "layout"},
    {
        "settings",
        "nanotron_config",
        "nanotron_yaml",
        "sharding",
        "rope",
        "product",
        "shards",
        "corpus",
        "text",
        "strict_json",
        "row_files",
    },
    {"blocked_attention", "cudnn_attention", "splash_attention", "attention"},
    {"hf_config", "messages", "template", "guard", "processes", "sums"},
    {"tokenizer_file", "tokenizer", "encode", "executors", "chat", "special_tokens"},
    {"companions", "tensors", "fetch"},
    {"buffers"},
    {"model", "gguf_header", "hub"},
    {"loss", "exchange", "decode", "optim", "step"},
    {"gguf_tokenizer", "hf", "gguf", "nanotron"},
]

# Who may import what is not Python's own. A new dependency, or an old one in a new place, is a decision: make it here.
# torch and transformers are compared with in tests, benchmarks and `convert --verify`, and are nobody's dependency.
EVERYWHERE = {"jax", "numpy", "flax", "smoljax"}
THIRD_PARTY = {
    "optax": {"smoljax.optim", "smoljax.step"},
    "einops": {"smoljax.exchange"},
    "safetensors": {"smoljax.tensors"},
    "gguf": {"smoljax.gguf", "smoljax.gguf_header", "smoljax.gguf_tokenizer"},
    "jinja2": {"smoljax.template"},
    "huggingface_hub": {"smoljax.hub"},
    "orbax": {"smoljax.checkpoint"},
    "grain": {"smoljax.data"},
    "tokenizers": {"smoljax.special_tokens", "smoljax.tokenizer", "smoljax.weights", "smoljax.streaming"},
    "ml_dtypes": {"smoljax.tensors"},
    "ray": {"smoljax.executors"},
    "yaml": {"smoljax.nanotron_yaml"},
    "tensorboardX": {"smoljax.sinks"},
    "wandb": {"smoljax.sinks"},
    "trackio": {"smoljax.sinks"},
    "rich": {"smoljax.metrics", "smoljax.encode", "smoljax.progress"},
    "matplotlib": {"smoljax.curves"},
    "datatrove": {"smoljax.encode", "smoljax.executors"},
    "pyarrow": {"smoljax.text", "smoljax.row_files"},
    "torch": {"smoljax.verify", "smoljax.train.bench_peer", "smoljax.infer.bench_peer"},
    "transformers": {"smoljax.verify", "smoljax.train.bench_peer", "smoljax.infer.bench_peer"},
}


def sources() -> dict[str, Path]:
    """Dotted name, as installed -> file."""
    found = {"smoljax": REPO / "smoljax/__init__.py"}
    for folder, package in [("smoljax", ""), ("train", ".train"), ("infer", ".infer"), ("configs", ".configs")]:
        for file in (REPO / folder).glob("*.py"):
            if file.stem != "__init__":
                found[f"smoljax{package}.{file.stem}"] = file
    return found


SOURCES = sources()
LIBRARY = [name for name in SOURCES if name.count(".") == 1]
PROGRAMS = [name for name in SOURCES if name.startswith(("smoljax.train.", "smoljax.infer."))]
CONFIGS = [name for name in SOURCES if name.startswith("smoljax.configs.")]


def imports(text: str) -> set[str]:
    """Everything that a source imports, inside functions too; `from smoljax import rope` is smoljax.rope."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import; write `from smoljax.x import y`"
            if node.module in ("smoljax", "smoljax.train", "smoljax.infer", "smoljax.configs"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


IMPORTS = {name: imports(file.read_text()) for name, file in SOURCES.items()}


def line(module: str) -> int:
    stem = module.removeprefix("smoljax.")
    return next((i for i, stems in enumerate(LINES) if stem in stems), len(LINES))


def test_the_reader_of_imports():
    text = (
        "import a.b, c\nfrom smoljax import rope\nfrom smoljax.train.demo import main\ndef f():\n    from x import y\n"
    )
    assert imports(text) == {"a.b", "c", "smoljax.rope", "smoljax.train.demo", "x"}
    with pytest.raises(AssertionError, match="line 2: a relative import"):
        imports("import a\nfrom . import b")
    assert {"smoljax.model", "smoljax.__main__"} < set(LIBRARY) and PROGRAMS and CONFIGS


@pytest.mark.parametrize("module", LIBRARY)
def test_library(module):
    for other in IMPORTS[module]:
        assert not other.startswith(("smoljax.train", "smoljax.infer", "smoljax.configs", "train.", "infer.")), (
            f"{module} imports the program {other}"
        )
        if other in LIBRARY:
            assert other != "smoljax.__main__", f"{module} imports the command"
            assert line(other) <= line(module), f"{module} imports {other}, which stands above it; see LINES"


def test_library_has_no_circle():
    graph = {module: [other for other in IMPORTS[module] if other in LIBRARY] for module in LIBRARY}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, with the circle


@pytest.mark.parametrize("module", PROGRAMS)
def test_program(module):
    for other in IMPORTS[module]:
        assert not other.startswith(("smoljax.train", "smoljax.infer", "smoljax.__main__", "train.", "infer.")), (
            f"{module} imports the program {other}; what both need belongs in the library"
        )


@pytest.mark.parametrize("module", CONFIGS)
def test_config(module):
    own = IMPORTS[module] - {"smoljax.config"}
    assert all(other.partition(".")[0] in sys.stdlib_module_names for other in own), f"{module} imports {own}"


@pytest.mark.parametrize("module", SOURCES)
def test_third_party(module):
    for other in sorted({name.partition(".")[0] for name in IMPORTS[module]} - EVERYWHERE):
        if other not in sys.stdlib_module_names:
            assert module in THIRD_PARTY.get(other, ()), f"{module} imports {other}; see THIRD_PARTY"


@pytest.mark.parametrize(
    "module", ["smoljax", "smoljax.__main__", "smoljax.errors", "smoljax.config", "smoljax.settings"]
)
def test_light(module):
    """`smoljax --help`, and a mistake in a config, wait for nothing but Python's own."""
    for other in IMPORTS[module]:
        assert other.partition(".")[0] in {"smoljax", *sys.stdlib_module_names}


def test_no_library_module_takes_the_name_of_a_package():
    taken = {"train", "infer", "configs"}
    assert not taken & {name.removeprefix("smoljax.") for name in LIBRARY}
