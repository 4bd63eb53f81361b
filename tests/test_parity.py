"""smoljax against transformers' LlamaForCausalLM and torch's AdamW, on small random copies of the six models."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import SHAPES, forward, make, tokens

from smoljax import generation, hf
from smoljax.config import Data, Optim, Train
from smoljax.optim import wsd
from smoljax.step import init_state, train_step


@pytest.fixture(scope="module", autouse=True)
def peers():
    """Imported where they are used: 4 CPU s, in each of the suite's processes."""
    global torch, transformers
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


def theirs(model, config, folder):
    """transformers' model with our weights, by way of our export."""
    hf.save(folder, model, config)
    return transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


def logits(model, rows):
    with torch.no_grad():
        return model(torch.tensor(rows)).logits.numpy()


@pytest.mark.parametrize("name", SHAPES)
def test_export_gives_the_same_logits(name, tmp_path):
    config = SHAPES[name]
    model, rows = make(config), tokens(2, 200)
    other = theirs(model, config, tmp_path / "hf")
    expected = logits(other, rows)
    assert np.abs(expected).max() > 1  # of a size at which 1e-4 says something
    np.testing.assert_allclose(forward(model, rows), expected, atol=1e-4)

    lengths = (90, 1, 109)
    segments = np.repeat([[1, 2, 3]], 2, axis=0).repeat(lengths, axis=1)
    packed = np.split(forward(model, rows, segments), np.cumsum(lengths)[:-1], axis=1)
    for ours, document in zip(packed, np.split(rows, np.cumsum(lengths)[:-1], axis=1), strict=True):
        np.testing.assert_allclose(ours, logits(other, document), atol=1e-4)


def to_transformers(config) -> dict:
    """The arguments of a LlamaConfig."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return dataclasses.asdict(config) | {"rope_parameters": rope, "tie_word_embeddings": True}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_import_is_exact(name, dtype, tmp_path):
    config = SHAPES[name]
    torch.manual_seed(0)
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**to_transformers(config)))
    other = other.to(getattr(torch, dtype))
    other.save_pretrained(tmp_path / "theirs")
    model, read = hf.load(tmp_path / "theirs")
    assert read == config and model.embed.dtype == jnp.dtype(dtype)
    embed = other.model.embed_tokens.weight.detach()
    np.testing.assert_array_equal(np.asarray(model.embed, np.float32), embed.float().numpy())

    # Back again: transformers finds each of its own tensors, bit for bit.
    hf.save(tmp_path / "ours", model, config)
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    assert back.dtype == other.dtype
    expected = other.state_dict()
    assert expected.keys() == back.state_dict().keys()
    for key, value in back.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize(
    "accumulate, optim",
    [
        (1, Optim(decay="1-sqrt")),
        (4, Optim(decay="linear")),
        pytest.param(
            1,
            Optim(decay="cosine", weight_decay_on="matrices", weight_decay=0.3, min_lr=1e-4),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["plain", "accumulated", "decay-on-matrices"],
)
def test_training_follows_torch(accumulate, optim, tmp_path):
    model, optim = make(), dataclasses.replace(optim, lr=3e-3, warmup_steps=4, decay_steps=8)
    data = Data(seq_len=32, batch_size=8)
    config = Train(model.config, steps=20, data=data, optim=optim, accumulate=accumulate)
    peer = Torch(theirs(model, model.config, tmp_path / "hf"), config)
    step = jax.jit(functools.partial(train_step, config=config), donate_argnums=0)
    state = init_state(config, model)
    for n in range(20):
        rows = tokens(8, 33, seed=n % 4)  # seen again and again, so that there is something to learn
        labels = rows[:, 1:].copy()
        labels[n % 8, : n + 5] = -1
        expected = peer.step(rows[:, :-1], labels, lr=float(wsd(optim, 20)(n)))
        state, metrics = step(state, {"tokens": rows[:, :-1], "labels": labels})
        assert float(metrics["loss"]) == pytest.approx(expected["loss"], abs=1e-4), f"step {n}"
        assert float(metrics["grad_norm"]) == pytest.approx(expected["grad_norm"], rel=1e-3), f"step {n}"
    assert float(metrics["loss"]) < 5  # from 7: the weights did move


class Torch:
    """The same training as torch users write it."""

    def __init__(self, model, config):
        self.model, o = model, config.optim
        names = dict(model.named_parameters())
        bare = [k for k in names if "norm" in k or "embed" in k] if o.weight_decay_on == "matrices" else []
        groups = [
            {"params": [p for k, p in names.items() if k not in bare], "weight_decay": o.weight_decay},
            {"params": [p for k, p in names.items() if k in bare], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=o.lr, betas=(o.b1, o.b2), eps=o.eps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, lambda n: self.wsd(n, o, config.steps))
        self.accumulate, self.clip = config.accumulate, o.clip

    @staticmethod
    def wsd(n, o, steps):
        if n < o.warmup_steps:
            return n / o.warmup_steps
        t, floor = max(0.0, (n - (steps - o.decay_steps)) / o.decay_steps), o.min_lr / o.lr
        fall = {"linear": 1 - t, "1-sqrt": 1 - t**0.5, "cosine": (1 + np.cos(np.pi * t)) / 2}[o.decay]
        return floor + (1 - floor) * fall

    def step(self, rows, labels, lr) -> dict:
        assert self.schedule.get_last_lr()[0] == pytest.approx(lr, rel=1e-5, abs=1e-9)
        self.adam.zero_grad()
        count, total = int((labels != -1).sum()), 0.0
        for part in np.split(np.arange(len(rows)), self.accumulate):
            logits = self.model(torch.tensor(rows[part])).logits.flatten(0, 1)
            target = torch.tensor(labels[part]).flatten()
            loss = torch.nn.functional.cross_entropy(logits, target, ignore_index=-1, reduction="sum") / count
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.adam.step()
        self.schedule.step()
        return {"loss": total, "grad_norm": norm.item()}


def test_greedy_generation_is_the_same(tmp_path):
    model = make()
    other = theirs(model, model.config, tmp_path / "hf")
    for prompt in ([5], [7, 8, 9], tokens(40).tolist()):
        expected = other.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None)
        assert generation.generate(model, [prompt], 24) == [expected[0, len(prompt) :].tolist()]


def test_tokenizer_loads_in_transformers(tmp_path):
    from test_hf import TEXT, train_tokenizer

    words = train_tokenizer(tmp_path / "tokenizer.json")
    config = dataclasses.replace(SHAPES["smollm-1.7b"], bos_token_id=1, eos_token_id=2, pad_token_id=2)
    hf.save(tmp_path / "hf", make(config), config, tokenizer=tmp_path)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (TEXT[:2000], "In 2024, 3.14 + 42", "I'm don't  we'll\n\n   x", "<|im_start|>user\né 你好<|im_end|>"):
        assert auto(text).input_ids == words.encode(text).ids
        assert auto.decode(auto(text).input_ids) == text
    assert (auto.bos_token, auto.eos_token, auto.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id) == (1, 2, 2)
