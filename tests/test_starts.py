"""The same command, the same program: starts from an empty cache, in processes of their own."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch import fake_devices
from test_hf import train_tokenizer
from test_model import CONFIG, make

from smoljax import hf

REPO = Path(__file__).resolve().parents[1]
# Every matrix has 512 x 512 numbers or more, so that its forms are timed (layout.TIMED).
WIDE = dataclasses.replace(CONFIG, vocab_size=512, hidden_size=512, intermediate_size=512, num_hidden_layers=2)
WIDE = dataclasses.replace(WIDE, num_attention_heads=8, num_key_value_heads=8)
# JAX's own counts of what it asked its cache for, and of what was there.
COUNTED = """
import collections, json, sys
from jax import monitoring
from infer import generate
counts = collections.Counter()
monitoring.register_event_listener(lambda name, **_: counts.update([name.rpartition("/")[2]]))
generate.main(sys.argv[1:])
print(json.dumps([counts["compile_requests_use_cache"], counts["cache_hits"]]), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("wide")
    train_tokenizer(place / "tokenizer.json")
    hf.save(place / "hf", make(WIDE), WIDE, tokenizer=place)
    return place / "hf"


def started(folder, cache, *flags) -> subprocess.Popen:
    env = os.environ | fake_devices(1) | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    env.pop("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")  # the suite's; a user has none
    argv = [str(folder), "--prompt", "the cat", "--max-new-tokens", "12", "--json", "--logprobs", "3", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", COUNTED, *argv], env=env, cwd=REPO, **pipes)


def ended(process: subprocess.Popen) -> tuple[str, int, int]:
    """What it printed, tokens and log-probabilities; how often the cache was asked, and had the program."""
    out, err = process.communicate()
    assert process.returncode == 0, err
    asked, there = json.loads(err.splitlines()[-1])
    assert len(json.loads(out)["logprobs"]) == len(json.loads(out)["tokens"])
    return out, asked, there


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--int8",)])
def test_three_starts_are_one_program(folder, tmp_path, flags):
    """Two at once begin, from an empty cache; what they settled on, the next ones take, and compile nothing."""
    first = [started(folder, tmp_path, *flags) for _ in range(2)]
    (printed, asked, there), (other, _, _) = map(ended, first)
    assert other == printed and asked > there
    for _ in range(2):
        again, asked, there = ended(started(folder, tmp_path, *flags))
        assert again == printed
        assert asked == there > 0
