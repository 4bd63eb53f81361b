"""What a run is: frozen dataclasses, checked when they are made, before JAX starts.

A run is a Python file that says `config = Train(...)`; settings.py reads it and applies typed overrides. `Model` has
exactly the keys of a Hugging Face config.json; how to compute (`Compute`) is not what to compute and is never exported.
Layers see `Model` and `Compute` only, never `Train`.
"""

import dataclasses
import math
from dataclasses import dataclass, field

from smoljax.errors import UsageError, require


def check(self):
    """Every field has its declared type: a config written by hand is checked as one typed on the command line."""
    for f in dataclasses.fields(self):
        value = getattr(self, f.name)
        if f.type is float and type(value) is int:
            object.__setattr__(self, f.name, float(value))
        elif not isinstance(value, f.type) or (isinstance(value, bool) and f.type is not bool):
            raise UsageError(f"{type(self).__name__}.{f.name} is {getattr(f.type, '__name__', f.type)}, got {value!r}")


@dataclass(frozen=True)
class Model:
    """The architecture, key for key as in a Hugging Face config.json of a LlamaForCausalLM with tied embeddings."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 64  # need not be hidden_size / num_attention_heads
    vocab_size: int = 49152
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02  # Hugging Face's field, kept for the export; training uses Train.init_std
    bos_token_id: int | None = 0
    eos_token_id: int | tuple | None = 0  # several ids may end a text
    pad_token_id: int | None = None

    def __post_init__(self):
        if isinstance(self.eos_token_id, list):  # as JSON has it
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        check(self)
        layers = self.num_hidden_layers
        require(layers <= 10_000, f"model.num_hidden_layers is {layers}, expected at most 10,000")
        for f in dataclasses.fields(self):
            if f.type in (int, float):
                value = getattr(self, f.name)
                require(value > 0 and math.isfinite(value), f"model.{f.name} is {value}, expected more than 0")
        n, k = self.num_attention_heads, self.num_key_value_heads
        require(
            n % k == 0,
            f"model.num_attention_heads is {n}, not a multiple of model.num_key_value_heads = {k}; change one of them",
        )
        require(self.head_dim % 2 == 0, f"model.head_dim is {self.head_dim}, but rotary embedding needs an even size")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            require(value != (), f"model.{name} is an empty list, expected none or an id")
            for id in value if isinstance(value, tuple) else [value]:
                require(
                    id is None or (type(id) is int and 0 <= id < self.vocab_size),
                    f"model.{name} is {value}, expected none or an id below model.vocab_size = {self.vocab_size}",
                )

    @property
    def parameters(self) -> int:
        """Exact count, tied embedding once: 134,515,008 / 361,821,120 / 1,711,376,384 for the released sizes."""
        d, f, h = self.hidden_size, self.intermediate_size, self.head_dim
        attention = 2 * d * h * (self.num_attention_heads + self.num_key_value_heads)
        return self.vocab_size * d + self.num_hidden_layers * (attention + 3 * d * f + 2 * d) + d


# The six base models as released (config.json on the Hub). Pretraining ran at 2,048 positions and theta 10,000 in
# all of them: a recipe says so itself. SmolLM2's 8k thetas are 100k, 100k, 130k.
SIZES = {
    "smollm-135m": Model(576, 1536, 30, 9, 3),
    "smollm-360m": Model(960, 2560, 32, 15, 5),
    "smollm-1.7b": Model(2048, 8192, 24, 32, 32),
    "smollm2-135m": Model(
        576, 1536, 30, 9, 3, max_position_embeddings=8192, rope_theta=100_000.0, initializer_range=1 / 24
    ),
    "smollm2-360m": Model(960, 2560, 32, 15, 5, max_position_embeddings=8192, rope_theta=100_000.0),
    "smollm2-1.7b": Model(2048, 8192, 24, 32, 32, max_position_embeddings=8192, rope_theta=130_000.0),
}


@dataclass(frozen=True)
class Compute:
    """How to run the same mathematics: passed at call, never exported."""

    dtype: str = (
        "float32"  # of activations and matrix products; norms, softmax, logits and the loss are f32 in any case
    )
    remat: bool = False  # recompute each layer in the backward pass: memory for 1/3 more time
    unroll: int = 1  # layers per iteration of the scan; num_hidden_layers unrolls it whole

    def __post_init__(self):
        check(self)
        require(self.dtype in ("float32", "bfloat16"), f"compute.dtype is {self.dtype!r}, expected float32 or bfloat16")
        require(self.unroll >= 1, f"compute.unroll is {self.unroll}, expected at least 1")


@dataclass(frozen=True)
class Data:
    """Which tokens, in which order: see data.py for the arithmetic."""

    sources: dict = field(default_factory=dict)  # folder of token shards -> weight; weights are normalised to 1
    seq_len: int = 2048  # T
    batch_size: int = 512  # rows a step, over all devices and micro-batches
    mask_documents: bool = False  # False: plain causal attention over the window, as SmolLM was trained
    seed: int = 0

    def __post_init__(self):
        check(self)
        for folder, weight in self.sources.items():
            fine = type(weight) in (int, float) and math.isfinite(weight) and weight > 0
            require(fine, f"data.sources gives {folder!r} the weight {weight!r}, expected a number above 0")
        require(self.seq_len >= 1, f"data.seq_len is {self.seq_len}, expected at least 1")
        require(self.batch_size >= 1, f"data.batch_size is {self.batch_size}, expected at least 1")
        require(0 <= self.seed < 2**32, f"data.seed is {self.seed}, expected 0 or more, below 2**32")


@dataclass(frozen=True)
class Optim:
    """AdamW and the warmup-stable-decay schedule; defaults as in SmolLM's recipes."""

    lr: float = 3e-3  # of the stable part
    warmup_steps: int = 2000
    decay_steps: int = 0  # the last steps of the run
    decay: str = "linear"
    min_lr: float = 0.0  # the floor that the decay ends at
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    weight_decay_on: str = "all"  # "all", as SmolLM's trainer did, or "matrices": neither norms nor the embedding
    clip: float = 1.0  # global norm of the gradient

    def __post_init__(self):
        check(self)
        shapes = ("linear", "1-sqrt", "cosine")
        require(self.decay in shapes, f"optim.decay is {self.decay!r}, expected one of {', '.join(shapes)}")
        on = self.weight_decay_on
        require(on in ("all", "matrices"), f"optim.weight_decay_on is {on!r}, expected all or matrices")
        for name in ("lr", "eps", "clip"):
            value = getattr(self, name)
            require(value > 0 and math.isfinite(value), f"optim.{name} is {value}, expected more than 0")
        for name in ("warmup_steps", "decay_steps", "min_lr", "weight_decay"):
            value = getattr(self, name)
            require(value >= 0 and math.isfinite(value), f"optim.{name} is {value}, expected 0 or more")
        for name in ("b1", "b2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name} is {getattr(self, name)}, expected 0 <= {name} < 1")
        require(self.min_lr <= self.lr, f"optim.min_lr is {self.min_lr}, above optim.lr = {self.lr}")


@dataclass(frozen=True)
class Mesh:
    """Sizes of the three mesh axes; one may be -1, the devices that are left."""

    data: int = 1  # replicas: batch split, weights whole
    fsdp: int = -1  # batch and weights split
    tensor: int = 1  # heads, mlp and vocabulary split

    def __post_init__(self):
        check(self)
        sizes = dataclasses.astuple(self)
        require(
            all(s == -1 or s >= 1 for s in sizes) and sizes.count(-1) <= 1,
            f"mesh is data={self.data} fsdp={self.fsdp} tensor={self.tensor}; expected sizes of 1 or more, "
            "at most one of them -1",
        )


@dataclass(frozen=True)
class Train:
    """One run of `smoljax pretrain`."""

    model: Model
    steps: int
    data: Data = Data()
    optim: Optim = Optim()
    compute: Compute = Compute()
    mesh: Mesh = Mesh()
    accumulate: int = 1  # micro-batches a step; their gradients are summed in f32
    init_std: float = 0.02  # of a fresh model's weights; o and down get init_std / sqrt(2 * layers)
    seed: int = 0  # of the fresh weights
    init_from: str | None = None  # start from these weights instead: a run, a checkpoint or a Hugging Face folder
    run: str | None = None  # the run's folder; runs/<config's name> when not given
    log_every: int = 1  # steps
    save_every: int = 1000  # steps; the last step is always saved
    keep: int = 2  # newest checkpoints
    keep_every: int | None = None  # and every K-th step for good

    def __post_init__(self):
        check(self)
        for name in ("steps", "accumulate", "log_every", "save_every", "keep", "init_std", "keep_every"):
            value = getattr(self, name)
            require(value is None or (value > 0 and math.isfinite(value)), f"{name} is {value}, expected more than 0")
        require(0 <= self.seed < 2**32, f"seed is {self.seed}, expected 0 or more, below 2**32")
        require(self.run != "", "run is empty, expected a folder")
        ramps = self.optim.warmup_steps + self.optim.decay_steps
        require(
            ramps <= self.steps,
            f"optim.warmup_steps + optim.decay_steps = {ramps} do not fit into steps = {self.steps}; set all three",
        )
        b, a = self.data.batch_size, self.accumulate
        require(b % a == 0, f"data.batch_size is {b}, which accumulate = {a} does not divide")
        t, s = self.data.seq_len, self.model.max_position_embeddings
        require(t <= s, f"data.seq_len is {t}, beyond model.max_position_embeddings = {s}; raise the latter")
