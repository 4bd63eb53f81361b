"""attend() and its backends, each against all scores at once, written out in f64 with the gradients by hand."""

import functools
import itertools
import os
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax.sharding import NamedSharding
from test_loss import compiled, largest

from smoljax import attention, cudnn_attention, sharding, splash_attention, step
from smoljax.attention import attend, choose
from smoljax.blocked_attention import TILE, blocked
from smoljax.config import REMAT, Compute, Data, Mesh, Model, Optim, Train
from smoljax.cudnn_attention import cudnn, missing, offsets
from smoljax.errors import Error, UsageError

# ------------------------------------------------------------------------------------------ what is right, and cases


def case(B: int, T: int, K: int, G: int, H: int = 8, dtype: str = "float32"):
    """q, k, v, and the gradient that comes back."""
    random = np.random.default_rng(T + G)
    shapes = [(B, T, K, G, H), (B, T, K, H), (B, T, K, H), (B, T, K, G, H)]
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


def rows(*lengths) -> np.ndarray:
    """starts, BT, of rows that are made up of documents of these lengths."""
    return np.array([np.repeat(np.cumsum([0, *row[:-1]]), row) for row in lengths], np.int32)


def mixed(T: int) -> np.ndarray:
    """Two rows: documents between random borders; single tokens, then one document over several tiles."""
    borders = np.sort(np.random.default_rng(T).choice(np.arange(1, T), min(6, T - 1), replace=False))
    single = [1] * (T // 4)
    return rows(np.diff([0, *borders, T]), [*single, T - len(single)])


def dense(q, k, v, dout, starts=None):
    """(out, dq, dk, dv) in f64, and of each how far the same in bf16 may be from it.

    bf16's rounding is at most u = 2**-8 of a number. Rounded are: the weights p before their sum, and the sum; the
    softmax's gradient, whose `inner` is from a rounded sum, before its products, and these. H**-0.5 must be exact.
    """
    q, dout = (np.asarray(x, np.float64).transpose(0, 2, 3, 1, 4) for x in (q, dout))  # BKGTH
    k, v = (np.asarray(x, np.float64).transpose(0, 2, 1, 3)[:, :, None] for x in (k, v))  # BK1SH
    T, H = q.shape[3:]
    u, scale = 2.0**-8, H**-0.5
    t, s = np.arange(T)[:, None], np.arange(T)
    visible = (s <= t) & (s >= (0 if starts is None else np.asarray(starts)[:, None, None, :, None]))
    scores = np.where(visible, q @ k.swapaxes(3, 4) * scale, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = dout @ v.swapaxes(3, 4)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))

    def products(p, ds, q, k, v, dout):
        dk, dv = ((a.swapaxes(3, 4) @ b).sum(axis=2) for a, b in ((ds * scale, q), (p, dout)))
        return p @ v, ds @ k * scale, dk, dv

    exact, sizes = products(p, ds, q, k, v, dout), [np.abs(x) for x in (q, k, v, dout)]
    off_out = 2 * u * (p @ sizes[2])
    off_ds = u * np.abs(ds) + p * (sizes[3] * off_out).sum(-1, keepdims=True)
    off = [a + u * np.abs(x) for a, x in zip(products(u * p, off_ds, *sizes), exact, strict=True)]
    return [[np.moveaxis(x, -2, 1) for x in all] for all in (exact, off)]


def pulled(f):
    """(out, dq, dk, dv) of f(q, k, v, starts), as `dense` has them."""

    def both(q, k, v, dout, starts=None):
        out, vjp = jax.vjp(lambda q, k, v: f(q, k, v, starts), q, k, v)
        return out, *vjp(dout)

    return jax.jit(both)


all_of_blocked = pulled(blocked)


def close(got, expected, tolerance=1e-5):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance)


def within(got, expected, bounds):
    for a, b, off in zip(got, expected, bounds, strict=True):
        assert a.dtype == jnp.bfloat16 and (np.abs(np.asarray(a, np.float64) - b) <= off + 1e-6).all()


# ------------------------------------------------------------------------------------------------------------ blocked


@pytest.mark.parametrize("documents", [False, True], ids=["row", "documents"])
@pytest.mark.parametrize("T, K, G", [(1, 3, 3), (12, 3, 3), (128, 3, 3), (200, 3, 3), (200, 4, 1), (384, 3, 3)])
def test_blocked_is_dense(T, K, G, documents):
    args = *case(2, T, K, G), mixed(T) if documents else None
    close(all_of_blocked(*args), dense(*args)[0])


@pytest.mark.parametrize("documents", [False, True], ids=["row", "documents"])
def test_blocked_in_bf16_rounds_what_it_says(documents):
    args = *case(2, 200, 3, 3, 64, "bfloat16"), mixed(200) if documents else None
    within(all_of_blocked(*args), *dense(*args))


def test_packed_documents_equal_each_alone():
    lengths = (12, 1, 128)
    args = case(2, sum(lengths), 3, 3)
    packed = all_of_blocked(*args, rows(lengths, lengths))
    at = 0
    for n in lengths:
        alone = all_of_blocked(*(x[:, at : at + n] for x in args))
        close([x[:, at : at + n] for x in packed], alone)
        at += n


def test_documents_get_no_gradient_from_each_other():
    """Exactly none, nor from what comes before. What comes back enters at one place, in the middle of the row."""
    q, k, v, dout = case(2, 200, 3, 3)
    starts, t = rows((20, 120, 60), (20, 120, 60)), 135
    _, dq, dk, dv = all_of_blocked(q, k, v, jnp.zeros_like(dout).at[:, t].set(dout[:, t]), starts)
    for gradient, touched in ((dq, [t]), (dk, range(20, t + 1)), (dv, range(20, t + 1))):
        found = np.abs(np.asarray(gradient)).max(axis=(0, *range(2, gradient.ndim)))
        assert set(np.flatnonzero(found)) == set(touched)


def test_tiles_that_nobody_sees_are_not_computed():
    """0 times NaN is NaN: a masked key that is one shows in the output where its tile is computed, and only there."""
    T, second = 3 * TILE, 2 * TILE
    q, k, v, dout = case(2, T, 3, 3)
    starts = rows((second, T - second), (second, T - second))

    def finite(bad: slice, starts):
        spoilt = [x.at[:, bad].set(jnp.nan) for x in (k, v)]
        kept = jnp.ones(T, bool).at[bad].set(False)[:, None, None, None]
        out, dq, dk, dv = all_of_blocked(q, *spoilt, jnp.where(kept, dout, 0), starts)
        return [np.flatnonzero(np.isfinite(x).all(axis=(0, *range(2, x.ndim)))).tolist() for x in (out, dq, dk, dv)]

    before, after = list(range(second)), list(range(second, T))
    assert finite(slice(0, second), starts) == [after] * 4  # another document's tiles
    assert finite(slice(second, T), None)[:2] == [before] * 2  # tiles after the diagonal
    starts[0, second - 1 :] = second - 1  # a document that begins within a tile of the first: that one is computed
    assert finite(slice(0, second), starts)[0] == []


def test_memory_is_linear_and_the_program_does_not_grow():
    """Beside what does not depend on T, memory doubles with T; scores of all tokens would be four times as large."""

    def program(f, T):
        q, k, starts = (1, T, 1, 1, 16), (1, T, 1, 16), jax.ShapeDtypeStruct((1, T), jnp.int32)
        return compiled(pulled(f), *(jax.ShapeDtypeStruct(x, jnp.float32) for x in (q, k, k, q)), starts)

    def at_once(q, k, v, starts):
        scores = jnp.where(jnp.tri(q.shape[1], dtype=bool), jnp.einsum("BTKGH,BSKH->BKGTS", q, k), -jnp.inf)
        return jnp.einsum("BKGTS,BSKH->BTKGH", jax.nn.softmax(scores), v)

    programs = [program(blocked, T) for T in (1024, 2048, 4096)]
    small, middle, large = (p.memory_analysis().temp_size_in_bytes for p in programs)
    assert large - middle == pytest.approx(2 * (middle - small), rel=0.01)
    assert largest(programs[2]) == 4096 * 16 and largest(program(at_once, 512)) >= 512**2
    assert len({len(p.as_text().splitlines()) for p in programs}) == 1


def kernels(f, args, platform: str, *calls: str) -> dict:
    """How often forward and backward call what looks so, in a layer that keeps the attention's output or nothing."""
    policies = jax.checkpoint_policies
    policies = {"context": policies.save_only_these_names("context"), "full": policies.nothing_saveable}

    def count(policy):
        program = pulled(jax.checkpoint(f, policy=policy)).trace(*args).lower(lowering_platforms=(platform,))
        return [len(re.findall(call, program.as_text())) for call in calls]

    return {name: count(policy) for name, policy in policies.items()}


def test_blocked_is_not_run_twice_by_a_layer_that_keeps_its_output():
    """Two loops each way, of which a layer that keeps nothing goes through the first two again."""
    args = *case(2, 256, 3, 3), rows([256], [100, 156])
    assert kernels(blocked, args, "cpu", r"stablehlo\.while") == {"context": [4], "full": [6]}


def flat(f):
    """`attend` takes query heads in one axis."""
    return lambda q, k, v, starts: f(q.reshape(*q.shape[:2], -1, q.shape[-1]), k, v, starts).reshape(q.shape)


@pytest.mark.parametrize(
    "sizes, K, G, documents",
    [((2, 2, 2), 4, 2, True), ((2, 2, 2), 4, 2, False), ((2, 2, 2), 3, 3, False), ((1, 4, 2), 3, 3, True)],
    ids=str,
)
def test_attend_on_eight_devices(sizes, K, G, documents):
    """Rows and heads where they divide (not 3 heads over 2 devices). Devices tell each other nothing, but that those
    which have the same heads add their gradients up, each its share."""
    B, T = 8, 140
    args = case(B, T, K, G)
    starts = np.concatenate([mixed(T)] * (B // 2)) if documents else None
    mesh = sharding.mesh(Mesh(*sizes))
    with jax.set_mesh(mesh):
        placed = []
        for dims, x in zip(("BTKGH", "BTKH", "BTKH", "BTKGH", "BT"), (*args, starts), strict=True):
            if x is not None:
                spec = sharding.spec(dims, x.shape, sharding.ACTIVATIONS, mesh)
                placed.append(jax.device_put(x, NamedSharding(mesh, spec)))
        program = compiled(pulled(flat(attend)), *placed)
        got = program(*placed)
    close(got, dense(*args, starts)[0])
    ways = 4 * (2 if K % 2 == 0 else 1)
    assert all(x.addressable_shards[0].data.size * ways == x.size for x in got)
    exchanges = re.findall(r" (all-[a-z]+|collective-[a-z]+|reduce-scatter)[(-]", program.as_text())
    assert set(exchanges) == (set() if K % 2 == 0 else {"all-reduce"})


# ------------------------------------------------------------------------------------------------------------- splash


@pytest.mark.parametrize("documents", [False, True], ids=["row", "documents"])
def test_splash_is_dense(documents, monkeypatch):
    """Interpreted; 256 tokens in two blocks."""
    monkeypatch.setattr(splash_attention, "BLOCK", 128)
    args = *case(2, 256, 2, 2, 64), mixed(256) if documents else None
    close(pulled(flat(functools.partial(attend, backend="splash")))(*args), dense(*args)[0])


@pytest.mark.parametrize("documents", [False, True], ids=["row", "documents"])
def test_splash_lowers_for_a_tpu(documents, monkeypatch):
    """Compiled by nothing here; a layer that keeps "context" calls the forward kernel once, not twice."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    args = *case(2, 256, 3, 3, 64, "bfloat16"), rows([256], [100, 156]) if documents else None
    assert kernels(splash_attention.splash, args, "tpu", "tpu_custom_call") == {"context": [2], "full": [3]}


# -------------------------------------------------------------------------------------------------------------- cudnn


def test_offsets_on_paper():
    """Rows with as many documents as there is room for, with fewer, with one, and with more."""
    starts = rows((2, 3, 7), (5, 7), (12,), (1, 1, 4, 6))
    lengths, places = jax.jit(offsets, static_argnums=1)(starts, 3)
    assert lengths.tolist() == [[2, 3, 7], [5, 7, -1], [12, -1, -1], [1, 1, 4]]
    assert places.tolist() == [[0, 2, 5, -1], [0, 5, -1, -1], [0, -1, -1, -1], [0, 1, 2, 6]]
    assert lengths.dtype == places.dtype == jnp.int32


@pytest.mark.parametrize("K, G", [(4, 1), (3, 3)])
def test_what_jax_makes_of_offsets(K, G):
    """All rows' documents behind each other, their beginnings in elements of the queries, and of the keys. jax 0.10.2
    has the latter wrong where heads are grouped, and is refused."""
    B, T, H, most = 3, 12, 8, 4
    lengths, places = jax.jit(offsets, static_argnums=1)((rows((2, 3, 7), (12,), (1, 1, 4, 6))), most)
    q, k, fix = jnp.zeros((B, T, K * G, H)), jnp.zeros((B, T, K, H)), jax.jit(fused._fix_seqlen_offsets)
    q_lengths, k_lengths, q_places, k_places = fix(lengths, lengths, places, places, q, k)
    documents = [2, 3, 7, 12, 1, 1, 4, 6]
    expected = documents + [0] * (B * most - len(documents))
    assert q_lengths.ravel().tolist() == k_lengths.ravel().tolist() == expected
    begins = np.array(
        [0, 2, 5, T, 2 * T, 2 * T + 1, 2 * T + 2, 2 * T + 6] + [B * T] * (B * (most + 1) - len(documents))
    )
    np.testing.assert_array_equal(q_places.ravel(), begins * K * G * H)
    wrong = jax.__version_info__ < (0, 11, 2)
    np.testing.assert_array_equal(k_places.ravel(), begins * K * (G if wrong else 1) * H)
    if wrong:
        assert missing(True) == f"needs jax 0.11.2 for masked documents, found {jax.__version__}"


@pytest.fixture
def cuda(monkeypatch):
    """What lowering for a GPU asks a GPU for."""
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda capability: False)
    monkeypatch.setattr(attention, "no_cudnn", lambda *_: None)


FORWARD, BACKWARD = r"@__cudnn\$fmhaSoftmax\(", r"@__cudnn\$fmhaSoftmaxBackward\("


def by_jax(q, k, v, starts):
    B, T, K, G, H = q.shape
    out = jax.nn.dot_product_attention(q.reshape(B, T, -1, H), k, v, is_causal=True, implementation="cudnn")
    return out.reshape(q.shape)


@pytest.mark.parametrize("documents", [False, True], ids=["row", "documents"])
def test_cudnn_lowers_for_cuda(documents, cuda):
    """A layer that keeps "context" calls the forward kernel once: jax.nn.dot_product_attention would twice."""
    if documents and missing(True):
        pytest.skip(missing(True))
    args = *case(2, 256, 3, 3, 64, "bfloat16"), rows([256], [100, 156]) if documents else None
    mask = rf"mask_type\\22: \\22{'PADDING_CAUSAL' if documents else 'CAUSAL'}\\22"
    found = kernels(cudnn, args, "cuda", FORWARD, BACKWARD, mask)
    assert found == {"context": [1, 1, 2], "full": [2, 1, 3]}
    if not documents:
        assert kernels(by_jax, args, "cuda", FORWARD)["context"] == [2]


@pytest.mark.parametrize("remat", ["none", *REMAT])
@pytest.mark.parametrize("documents", [False, True], ids=["row", "documents"])
def test_a_whole_step_lowers_for_cuda(remat, documents, cuda):
    if documents and missing(True):
        pytest.skip(missing(True))
    config = Train(
        model=Model(32, 64, 2, 4, 2, head_dim=8, vocab_size=96, max_position_embeddings=128),
        steps=10,
        data=Data(seq_len=128, batch_size=2),
        optim=Optim(warmup_steps=2, decay_steps=2),
        compute=Compute(dtype="bfloat16", attention="cudnn", remat=remat),
    )
    names = ("tokens", "labels", *(["segments"] if documents else []))
    batch = {name: jax.ShapeDtypeStruct((2, 128), jnp.int32) for name in names}
    state = step.abstract_state(config)
    train_step = jax.jit(functools.partial(step.train_step, config=config))
    text = train_step.trace(state, batch).lower(lowering_platforms=("cuda",)).as_text()
    forward = 2 if remat != "none" and "context" not in REMAT[remat] else 1
    assert [len(re.findall(call, text)) for call in (FORWARD, BACKWARD)] == [forward, 1]
    assert ("PADDING_CAUSAL" in text) == documents


@pytest.mark.parametrize("version, refused", [((0, 10, 1), True), ((0, 13, 0), True), ((0, 12, 5), False)])
def test_a_jax_that_nobody_has_tried_is_refused(version, refused, cuda, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", version)
    assert bool(missing(False)) == refused
    if refused:
        assert missing(False) == f"is known to fit jax 0.10.2 up to 0.12, found {jax.__version__}"


def test_another_private_function_or_no_cudnn_is_refused(cuda, monkeypatch):
    assert missing(False) is None
    monkeypatch.setattr(fused, "_dot_product_attention_fwd_rule", lambda *args: None)
    assert missing(False).startswith("does not know args of")
    monkeypatch.undo()
    assert missing(False) == "needs cuDNN (cuDNN is not detected.)"


@pytest.mark.skipif("cuda" not in os.environ["JAX_PLATFORMS"], reason="needs an NVIDIA GPU: JAX_PLATFORMS=cuda")
@pytest.mark.parametrize("documents", ["none", "some", "many"])
def test_cudnn_on_a_gpu(documents):
    """As near to the truth as blocked is, in bf16. There is room for 16 documents in a row of 512 tokens."""
    few = [1, 31, 100, 1, 379]
    starts = {"none": None, "some": rows([512], few), "many": rows(few, [2] * 256)}[documents]
    if reason := attention.no_cudnn("bfloat16", 512, starts is not None):
        pytest.skip(reason)
    args = *case(2, 512, 3, 3, 64, "bfloat16"), starts
    exact, off = dense(*args)
    within(all_of_blocked(*args), exact, off)
    within(pulled(cudnn)(*args), exact, off)


# ------------------------------------------------------------------------------------------------------------- choose


def gpu(kind: str, capability: str, platform: str = "PJRT C API\ncuda 13000"):
    return SimpleNamespace(
        device_kind=kind, compute_capability=capability, client=SimpleNamespace(platform_version=platform)
    )


CPU, TPU, H100 = ("cpu", None), ("tpu", None), ("gpu", gpu("NVIDIA H100", "9.0"))
A100, T4 = ("gpu", gpu("NVIDIA A100", "8.0")), ("gpu", gpu("Tesla T4", "7.5"))
B300, MI300 = ("gpu", gpu("NVIDIA B300", "10.3")), ("gpu", gpu("AMD MI300X", "gfx942", "rocm 70000"))
PLATFORMS = (CPU, TPU, H100, A100, T4, B300, MI300)
AUTO = [
    (CPU, "float32", 200, True, ("blocked", "on cpu")),
    (CPU, "bfloat16", 2048, False, ("blocked", "on cpu")),
    (H100, "bfloat16", 2048, False, ("cudnn", "on gpu")),
    (H100, "bfloat16", 2000, True, ("cudnn", "on gpu")),
    (B300, "bfloat16", 2048, True, ("cudnn", "on gpu")),
    (H100, "float32", 2048, False, ("blocked", "cudnn needs compute.dtype=bfloat16, found float32")),
    (A100, "bfloat16", 2048, False, ("cudnn", "on gpu")),
    (A100, "bfloat16", 2048, True, ("blocked", "cudnn needs compute capability 9.0 for masked documents, found 8")),
    (T4, "bfloat16", 2048, False, ("blocked", "cudnn needs compute capability 8.0, found 7.5")),
    (MI300, "bfloat16", 2048, False, ("blocked", "cudnn needs an NVIDIA GPU, found AMD MI300X")),
    (TPU, "bfloat16", 2048, True, ("splash", "on tpu")),
    (TPU, "float32", 128, False, ("splash", "on tpu")),
    (TPU, "bfloat16", 200, False, ("blocked", "splash needs rows of a multiple of 128 tokens, found 200")),
]


@pytest.fixture
def on(monkeypatch):
    """JAX on another platform, as far as `choose` can see, with all that cuDNN needs."""

    def to(platform, device):
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        monkeypatch.setattr(jax, "devices", lambda: [device])
        monkeypatch.setattr(cudnn_attention, "missing", lambda documents: None)

    return to


@pytest.mark.parametrize("place, dtype, T, documents, expected", AUTO)
def test_choose(place, dtype, T, documents, expected, on, monkeypatch):
    on(*place)
    assert choose(Compute(dtype=dtype), T, documents) == expected
    monkeypatch.setattr(cudnn_attention, "missing", lambda documents: "needs cuDNN (not detected)")
    if expected[0] == "cudnn":
        assert choose(Compute(dtype=dtype), T, documents) == ("blocked", "cudnn needs cuDNN (not detected)")


@pytest.mark.parametrize("asked", ["blocked", "cudnn", "splash"])
def test_what_was_asked_for_is_taken_or_refused(asked, on):
    """Auto takes something wherever a run may be; the same that it leaves out is refused when asked for by name."""
    for place in PLATFORMS:
        on(*place)
        for dtype, T, documents in itertools.product(("float32", "bfloat16"), (128, 200), (False, True)):
            taken, reason = choose(Compute(dtype=dtype), T, documents)
            compute = Compute(dtype=dtype, attention=asked)
            if asked in (taken, "blocked"):
                assert choose(compute, T, documents) == (asked, "as asked for")
                continue
            with pytest.raises(UsageError, match=f"^compute.attention={asked} needs .*; set compute.attention=") as e:
                choose(compute, T, documents)
            assert e.value.code == 2 and reason.removeprefix(asked) in str(e.value) or not reason.startswith(asked)


def test_cudnn_on_a_cpu_is_a_usage_error():
    with pytest.raises(UsageError) as e:
        choose(Compute(dtype="bfloat16", attention="cudnn"), 2048, False)
    sentence = "compute.attention=cudnn needs an NVIDIA GPU, JAX runs on cpu; set compute.attention=auto or blocked"
    assert str(e.value) == sentence and e.value.code == 2


def test_a_program_without_its_kernel_is_refused(on):
    compute, data = Compute(dtype="bfloat16"), Data(seq_len=2048)
    program = SimpleNamespace(as_text=lambda: 'custom_call_target="__cudnn$fmhaSoftmax"')
    for place in (CPU, H100):
        on(*place)
        attention.check_compiled(program, compute, data)
    on(*TPU)
    with pytest.raises(Error, match="attention is splash, but the compiled program has no tpu_custom_call"):
        attention.check_compiled(program, compute, data)
