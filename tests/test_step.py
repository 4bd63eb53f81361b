"""The training step's structure, read from its program: what no loss or gradient shows, and speed depends on."""

import jax
import jax.numpy as jnp
import numpy as np
from test_model import operations

from smoljax.config import Compute, Data, Model, Optim, Train
from smoljax.step import abstract_state, gradient

L, A = 3, 2
MODEL = Model(32, 96, L, 4, 2, head_dim=8, vocab_size=128, max_position_embeddings=64)


def program(**changes):
    """The jaxpr of one step's gradient in bf16."""
    compute = Compute(dtype="bfloat16", remat="minimal_with_context")
    config = Train(MODEL, 9, Data(seq_len=32, batch_size=8), Optim(warmup_steps=1), compute, **changes)
    row = jax.ShapeDtypeStruct((8, 32), jnp.int32)
    model = abstract_state(config).model
    return jax.make_jaxpr(lambda m, b: gradient(m, b, config)[:2])(model, {"tokens": row, "labels": row}).jaxpr


def scans(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from scans(inner)


def casts_of_layers(jaxpr) -> int:
    """Conversions to bf16 of arrays that are stacked along L, inside loops and calls too."""

    def count(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "convert_element_type":
                out = eqn.outvars[0].aval
                yield out.dtype == jnp.bfloat16 and out.ndim > 2 and out.shape[0] == L
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from count(inner)

    return sum(count(jaxpr))


def test_weights_are_cast_once_and_not_in_each_micro_batch():
    jaxpr = program(accumulate=A)
    micros = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan" and eqn.params["length"] == A)
    assert casts_of_layers(jaxpr) == 7  # q, k, v, o, gate, up, down
    assert casts_of_layers(micros.params["jaxpr"].jaxpr) == 0


def test_the_residual_stream_stays_in_bf16():
    """What goes from layer to layer, forward and backward, is no f32 array of B, T and D."""
    given = [aval for eqn in scans(program()) if eqn.params["length"] == L for aval in eqn.params["jaxpr"].in_avals]
    streams = [aval for aval in given if aval.shape == (8, 32, MODEL.hidden_size)]
    assert len(streams) >= 2 and all(aval.dtype == jnp.bfloat16 for aval in streams), given


def test_gradients_are_summed_in_f32():
    jaxpr = program(accumulate=A)
    micros = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan" and eqn.params["length"] == A)
    sums = [v.aval for v in micros.outvars]
    assert len(sums) == 1 + 11 and {aval.dtype for aval in sums} == {np.dtype("float32")}
    assert "dot_general" in {name for name, _ in operations(jaxpr)}  # the reader reads into loops
