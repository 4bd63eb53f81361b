"""What an installation is: one importable name, light until JAX is needed."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import smoljax
from smoljax import settings
from smoljax.__main__ import VERBS

REPO = Path(__file__).resolve().parents[1]


def python(*argv, **kwargs):
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy without build products: setuptools would take over what an earlier build left there."""
    # Not imported: it refuses to be, where another library has imported Python's own distutils.
    if int(version("setuptools").partition(".")[0]) < 77:
        pytest.skip("`make test` brings setuptools>=77")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("smoljax", "train", "infer", "configs"):
        shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_smoljax_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    info = {top for top in tops if top.endswith(".dist-info")}
    assert tops - info == {"smoljax"} and len(info) == 1
    ours = {f"smoljax/{f.name}" for f in (REPO / "smoljax").glob("*.py")}
    ours |= {f"smoljax/{p}/{f.name}" for p in ("train", "infer", "configs") for f in (REPO / p).glob("*.py")}
    ours.add("smoljax/infer/bench_llama_cpp.mjs")
    assert {name for name in names if name.startswith("smoljax/")} == ours
    assert any(name.endswith("LICENSE") for name in names)


def test_wheel_works(wheel, tmp_path):
    """Unpacked elsewhere: the verbs and the shipped configs are found there and not in a checkout."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "import smoljax.settings as s, smoljax.__main__ as m\n"
        "print(s.__file__)\n"
        "print(len(s.shipped()), s.load('smollm2-135m').steps)\n"
        "import importlib.util\n"
        "names = [f'smoljax.{p}.' + v.partition('-')[0] for v, (p, _) in m.VERBS.items()]\n"
        "print(all(map(importlib.util.find_spec, names)))\n"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    file, configs, verbs = python("-c", program, cwd=tmp_path, env=env).splitlines()
    assert Path(file).is_relative_to(tmp_path)
    assert configs == f"{len(settings.shipped())} 2000000" and verbs == "True"


def test_light():
    """Seconds are not measured here; what costs them is: `import smoljax` and `smoljax --help` import no JAX."""
    heavy = "{'jax', 'flax', 'numpy', 'grain', 'orbax', 'datatrove', 'matplotlib', 'rich', 'tokenizers', 'torch'}"
    for program in ("import smoljax", "from smoljax.__main__ import dispatch; dispatch(['--help'])"):
        python("-c", f"import sys\n{program}\nassert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)")


def test_exports():
    for name in smoljax.__all__:
        assert getattr(smoljax, name) is not None
        assert not (REPO / f"smoljax/{name}.py").exists(), f"smoljax.{name} would be a module or a function by chance"
    assert set(smoljax.__all__) <= set(dir(smoljax))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        smoljax.__getattr__("nonsense")


def test_the_command(capsys):
    from smoljax.__main__ import dispatch
    from smoljax.errors import run

    assert run(dispatch, ["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb} " in out for verb in VERBS)
    assert run(dispatch, []) == 2
    capsys.readouterr()
    assert run(dispatch, ["pretran"]) == 2
    assert "smoljax: no verb 'pretran'; did you mean 'pretrain'?" in capsys.readouterr().err
    assert run(dispatch, ["--version"]) == 0
    assert capsys.readouterr().out.startswith("smoljax ")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_a_program(verb):
    """`python -m train.pretrain` works from the root of a checkout, with the same help as `smoljax pretrain`."""
    folder, program = VERBS[verb][0], verb.partition("-")[0]  # bench-train is train/bench.py
    assert (REPO / folder / f"{program}.py").is_file()
    out = python("-m", f"{folder}.{program}", "--help", cwd=REPO)
    assert f"smoljax {verb}" in out
