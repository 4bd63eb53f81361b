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
        if f.type in (float, float | None) and type(value) is int:
            object.__setattr__(self, f.name, float(value))
        elif not isinstance(value, f.type) or (isinstance(value, bool) and f.type not in (bool, bool | None)):
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


# What the backward pass finds kept of a layer's forward pass, by the names that model.py and the attention backends
# give it; all else is computed again. From the fastest, which needs most memory, to the smallest; MaxText's names.
REMAT = {
    "minimal_with_context": ("qkv", "context", "attn_out", "gate_up"),  # no matrix product is computed again
    "save_dot_with_context_except_mlp": ("qkv", "context", "attn_out"),  # gate and up are
    "save_qkv_proj": ("qkv",),  # attention is too, and all products but those of q, k, v
    "save_context": ("context",),  # all products, not attention
    "full": (),
}


@dataclass(frozen=True)
class Compute:
    """How to run the same mathematics: passed at call, never exported."""

    dtype: str = (
        "float32"  # of activations and matrix products; norms, softmax, logits and the loss are f32 in any case
    )
    remat: str = "auto"  # one of REMAT; "none": what autodiff keeps; "auto": the first that fits into memory
    unroll: int = 1  # layers per iteration of the scan; num_hidden_layers unrolls it whole
    attention: str = "auto"  # the platform's own, or blocked, cudnn, splash: attention.py
    loss_chunk: int = 4096  # tokens on a device whose logits exist at a time

    def __post_init__(self):
        check(self)
        require(self.dtype in ("float32", "bfloat16"), f"compute.dtype is {self.dtype!r}, expected float32 or bfloat16")
        names = ("auto", "none", *REMAT)
        require(self.remat in names, f"compute.remat is {self.remat!r}, expected one of {', '.join(names)}")
        names = ("auto", "blocked", "cudnn", "splash")
        require(self.attention in names, f"compute.attention is {self.attention!r}, expected one of {', '.join(names)}")
        for name in ("unroll", "loss_chunk"):
            require(getattr(self, name) >= 1, f"compute.{name} is {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True)
class Data:
    """Which tokens, in which order: see data.py for the arithmetic."""

    sources: dict = field(default_factory=dict)  # folder of token shards -> weight; weights are normalised to 1
    seq_len: int = 2048  # T
    batch_size: int = 512  # rows a step, over all devices and micro-batches
    mask_documents: bool = False  # False: plain causal attention over the window, as SmolLM was trained
    chunk: int | None = None  # C: a source is shuffled in pieces of C tokens; None: the run's longest seq_len
    max_epochs: float | None = None  # a source that would be read more often stops the run before it starts
    seed: int = 0

    def __post_init__(self):
        check(self)
        check_sources(self.sources, "data.sources")
        require(self.seq_len >= 1, f"data.seq_len is {self.seq_len}, expected at least 1")
        require(self.batch_size >= 1, f"data.batch_size is {self.batch_size}, expected at least 1")
        require(self.chunk is None or self.chunk >= 1, f"data.chunk is {self.chunk}, expected none or at least 1")
        limit = self.max_epochs
        require(limit is None or limit > 0, f"data.max_epochs is {limit}, expected none or more than 0")
        require(0 <= self.seed < 2**32, f"data.seed is {self.seed}, expected 0 or more, below 2**32")


def check_sources(sources: dict, where: str):
    for folder, weight in sources.items():
        fine = type(weight) in (int, float) and math.isfinite(weight) and weight > 0
        require(fine, f"{where} gives {folder!r} the weight {weight!r}, expected a number above 0")


@dataclass(frozen=True)
class Stage:
    """What changes at update `start`; what is None stays as it was. `Data` and `Model` say how a run begins."""

    start: int  # the first update of the stage, counted from 0
    sources: dict | None = None  # a source that an earlier stage read goes on where it stopped
    seq_len: int | None = None  # beyond model.max_position_embeddings it raises that too
    batch_size: int | None = None  # None: as many tokens a step as before
    rope_theta: float | None = None
    mask_documents: bool | None = None

    def __post_init__(self):
        check(self)
        require(self.sources != {}, f"the stage at {self.start} has empty sources; leave them out to go on with those")
        check_sources(self.sources or {}, f"the stage at {self.start}")
        for name in ("start", "seq_len", "batch_size", "rope_theta"):
            value = getattr(self, name)
            require(value is None or (value > 0 and math.isfinite(value)), f"a stage's {name} is {value}, expected > 0")


@dataclass(frozen=True)
class Heldout:
    """Shards that are measured while training; the order of the training data does not know of them."""

    sets: dict = field(default_factory=dict)  # name -> folder of token shards
    every: int | None = None  # steps; the end of the run is measured in any case
    max_tokens: int = 1_000_000  # of each set, from its beginning

    def __post_init__(self):
        check(self)
        for name, folder in self.sets.items():
            fine = isinstance(folder, str) and isinstance(name, str) and name and "/" not in name
            require(
                bool(fine),
                f'heldout.sets has {name!r}: {folder!r}, expected names and folders: {{"web": "shards/web-heldout"}}',
            )
        for name in ("every", "max_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"heldout.{name} is {value}, expected at least 1")


@dataclass(frozen=True)
class Guard:
    """What a run does when something goes wrong."""

    max_skips: int = 3  # updates in a row that were skipped, for a loss or gradient not finite or a spike: it stops
    spike_window: int = 0  # steps that a loss or gradient norm is compared with; 0 takes none for a spike
    spike_sigma: float = 6.0  # standard deviations above their mean: the update is skipped
    leave_out: tuple = ()  # steps whose batch is read and not learned from, such as one that a dump showed to be bad
    grace_s: float = 60.0  # from SIGTERM to the exit, saved or not
    watchdog: float = 20.0  # no step for so many medians of a step's time, and for
    watchdog_s: float = 300.0  # so many seconds (a save has ten times as long): stacks of all threads, exit
    heartbeat_s: int = 100  # of several processes: one that is silent for so long is taken for dead
    check_every: int | None = None  # steps; then loss and gradient are computed twice, and replicas compared
    failed_saves: int = 2  # checkpoints in a row that could not be written: the run stops
    max_rss_gb: float | None = None  # of host memory: the run saves and exits before the machine kills it

    def __post_init__(self):
        if isinstance(self.leave_out, list):  # as JSON has it
            object.__setattr__(self, "leave_out", tuple(self.leave_out))
        check(self)
        fine = all(type(n) is int and n > 0 for n in self.leave_out)
        require(fine, f"guard.leave_out is {self.leave_out}, expected steps as in metrics.jsonl: 1201,1202")
        require(self.spike_window >= 0, f"guard.spike_window is {self.spike_window}, expected 0 or more")
        require(self.spike_window != 1, "guard.spike_window is 1, expected 0 or at least 2: one step has no deviation")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            fine = f.name in ("spike_window", "leave_out") or value is None or (value > 0 and math.isfinite(value))
            require(fine, f"guard.{f.name} is {value}, expected more than 0")


SINKS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class Optim:
    """AdamW or Muon, and the warmup-stable-decay schedule; defaults as in SmolLM's recipes."""

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
    kind: str = "adamw"  # or "muon" for the layers' matrices, AdamW for the rest (optim.py)
    mu_dtype: str = "float32"  # or "bfloat16": what the first moment, Muon's momentum, is kept in

    def __post_init__(self):
        check(self)
        require(self.kind in ("adamw", "muon"), f"optim.kind is {self.kind!r}, expected adamw or muon")
        kept = self.mu_dtype
        require(kept in ("float32", "bfloat16"), f"optim.mu_dtype is {kept!r}, expected float32 or bfloat16")
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

    def axes(self, devices: int) -> dict[str, int]:
        """{"data": ..., "fsdp": ..., "tensor": ...}, -1 filled in; a UsageError when they do not make up `devices`."""
        known = self.data * self.fsdp * self.tensor
        rest = devices // -known if known < 0 else 1
        total = abs(known) * rest
        require(
            total == devices,
            f"mesh data={self.data} fsdp={self.fsdp} tensor={self.tensor} needs {max(total, abs(known))} devices, "
            f"found {devices}; set mesh.data, mesh.fsdp, mesh.tensor to a product of {devices}",
        )
        return {name: rest if size == -1 else size for name, size in vars(self).items()}


@dataclass(frozen=True)
class Train:
    """One run of `smoljax pretrain`."""

    model: Model
    steps: int
    data: Data = Data()
    optim: Optim = Optim()
    compute: Compute = Compute()
    mesh: Mesh = Mesh()
    stages: tuple = ()  # of Stage, by their start: what changes on the way
    heldout: Heldout = Heldout()
    guard: Guard = Guard()
    sinks: tuple = ()  # where metrics go beside metrics.jsonl: tensorboard, wandb, trackio
    z_loss: float = (
        0.0  # this times the squared log of the softmax's denominator is minimised too; `train/loss` is without
    )
    accumulate: int = 1  # micro-batches a step; their gradients are summed in f32
    init_std: float = 0.02  # of a fresh model's weights; o and down get init_std / sqrt(2 * layers)
    seed: int = 0  # of the fresh weights
    init_from: str | None = None  # start from these weights instead: a run, a checkpoint or a Hugging Face folder
    xla_flags: str | None = None  # for XLA's compiler, as in XLA_FLAGS and behind what stands there
    run: str | None = None  # the run's folder; runs/<config's name> when not given
    log_every: int = 1  # steps
    save_every: int = 1000  # steps; the last step is always saved
    keep: int = 2  # newest checkpoints
    keep_every: int | None = None  # and every K-th step for good

    def __post_init__(self):
        for name in ("stages", "sinks"):  # as JSON has them
            object.__setattr__(self, name, tuple(v) if isinstance(v := getattr(self, name), list) else v)
        check(self)
        for name in ("steps", "accumulate", "log_every", "save_every", "keep", "init_std", "keep_every"):
            value = getattr(self, name)
            require(value is None or (value > 0 and math.isfinite(value)), f"{name} is {value}, expected more than 0")
        require(0 <= self.seed < 2**32, f"seed is {self.seed}, expected 0 or more, below 2**32")
        require(0 <= self.z_loss < math.inf, f"z_loss is {self.z_loss}, expected 0 or more")
        require(self.run != "", "run is empty, expected a folder")
        wrong = [word for word in (self.xla_flags or "").split() if not word.startswith("--xla_")]
        require(not wrong, f"xla_flags has {wrong[:1]}, expected flags such as --xla_gpu_autotune_level=5")
        ramps = self.optim.warmup_steps + self.optim.decay_steps
        require(
            ramps <= self.steps,
            f"optim.warmup_steps + optim.decay_steps = {ramps} do not fit into steps = {self.steps}; set all three",
        )
        beyond = [n for n in self.guard.leave_out if n > self.steps]
        require(not beyond, f"guard.leave_out names {beyond}, beyond steps = {self.steps}")
        every, k = self.save_every, self.keep_every
        require(k is None or k % every == 0, f"keep_every is {k}, expected a multiple of save_every = {every}")
        unknown = [sink for sink in self.sinks if sink not in SINKS]
        require(not unknown, f"sinks has {', '.join(map(str, unknown))}; expected some of {', '.join(SINKS)}")
        t, s = self.data.seq_len, self.model.max_position_embeddings
        require(t <= s, f"data.seq_len is {t}, beyond model.max_position_embeddings = {s}; raise the latter")
        self._check_stages()

    def _check_stages(self):
        keys = [f.name for f in dataclasses.fields(Stage)]
        for said in self.stages:  # as JSON has them
            known = not isinstance(said, dict) or ("start" in said and said.keys() <= set(keys))
            require(known, f"a stage says {said}; it needs start, and may say {', '.join(keys[1:])}, no more")
        stages = tuple(Stage(**s) if isinstance(s, dict) else s for s in self.stages)
        object.__setattr__(self, "stages", stages)
        wrong = [s for s in stages if not isinstance(s, Stage)]
        require(not wrong, f"stages holds {wrong[:1]}, expected Stage(start=..., ...)")
        _, *starts = self.starts
        require(starts == sorted(set(starts)), f"stages start at {starts}, expected each after the one before")
        require(
            not starts or starts[-1] < self.steps,
            f"a stage starts at {starts[-1:]}, which steps = {self.steps} does not reach; leave it out, or stages=[]",
        )
        a = self.accumulate
        for start in self.starts:
            b, t = (data := self.at(start).data).batch_size, data.seq_len
            where = f" of the stage at {start}" if start else ""
            require(b % a == 0, f"data.batch_size{where} is {b}, which accumulate = {a} does not divide")
            require(
                self.chunk % t == 0,
                f"data.seq_len{where} is {t}, which does not divide {self.chunk}, the pieces that sources are shuffled "
                "in; they are of the run's longest seq_len unless data.chunk says another",
            )

    @property
    def starts(self) -> list[int]:
        """The first update of each stage; the run begins with one that `data` and `model` say."""
        return [0, *(stage.start for stage in self.stages)]

    @property
    def chunk(self) -> int:
        """C: a source's tokens are shuffled in chunks of C, which every stage's T divides."""
        return self.data.chunk or max([self.data.seq_len, *(s.seq_len or 0 for s in self.stages)])

    def at(self, n: int) -> "Train":
        """The run as update n = 0, 1, ... sees it: one stage's data and model, and no stages."""
        data, model = dataclasses.replace(self.data, chunk=self.chunk), self.model
        for stage in self.stages:
            if stage.start > n:
                break
            said = {name: getattr(stage, name) for name in ("sources", "seq_len", "batch_size", "mask_documents")}
            said = {name: value for name, value in said.items() if value is not None}
            if "seq_len" in said and "batch_size" not in said:
                tokens = data.batch_size * data.seq_len
                fits = tokens % stage.seq_len == 0
                require(
                    fits,
                    f"the stage at {stage.start}: rows of {stage.seq_len} do not make up {tokens} tokens; "
                    "set its batch_size",
                )
                said["batch_size"] = tokens // stage.seq_len
            data = dataclasses.replace(data, **said)
            longest = max(model.max_position_embeddings, data.seq_len)
            theta = stage.rope_theta or model.rope_theta
            model = dataclasses.replace(model, rope_theta=theta, max_position_embeddings=longest)
        return self if not self.stages else dataclasses.replace(self, data=data, model=model, stages=())
