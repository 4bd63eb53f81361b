"""product.py is einsum, in values and gradients: only the order of the factors is its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smoljax.product import product

# model.py's four, each with x narrower than the result and wider than it: the gradient's two orders of factors.
SIZES = {
    "BTD,DNH->BTNH": [dict(D=6, N=3, H=4), dict(D=24, N=3, H=4)],
    "BTD,DKH->BTKH": [dict(D=6, K=2, H=4), dict(D=24, K=2, H=4)],
    "BTNH,NHD->BTD": [dict(D=24, N=3, H=4), dict(D=6, N=3, H=4)],
    "BTD,DF->BTF": [dict(D=6, F=16), dict(D=16, F=6)],
    "BTF,FD->BTD": [dict(D=16, F=6), dict(D=6, F=16)],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", SIZES)
def test_product_is_einsum(form, dtype):
    """Against f64: in bf16 each result is off by its own rounding, not by that of the sums before it."""
    xs, ws, ys = form.replace("->", ",").split(",")
    for n, sizes in enumerate(SIZES[form]):
        random = np.random.default_rng(n)
        x, w, dy = (
            random.standard_normal([dict(B=2, T=5, **sizes)[letter] for letter in letters]) for letters in (xs, ws, ys)
        )
        x, w, dy = (jnp.asarray(a, dtype) for a in (x, w, dy))
        assert (x.size > dy.size) == n
        y, vjp = jax.vjp(lambda x, w: product(form, x, w), x, w)
        wide = [np.asarray(a, np.float64) for a in (x, w, dy)]
        expected = [
            np.einsum(form, *wide[:2]),
            np.einsum(f"{ys},{ws}->{xs}", wide[2], wide[1]),
            np.einsum(f"{xs},{ys}->{ws}", wide[0], wide[2]),
        ]
        for got, true in zip((y, *vjp(dy)), expected, strict=True):
            assert got.dtype == dtype and got.shape == true.shape
            close = dict(rtol=1e-5, atol=1e-5) if dtype == "float32" else dict(rtol=2**-8, atol=1e-5)
            np.testing.assert_allclose(np.asarray(got, np.float64), true, **close)


@pytest.mark.parametrize("sizes, first", [((6, 16), "x"), ((16, 6), "dy")])
def test_the_narrower_factor_goes_first(sizes, first):
    """What XLA's CPU compiler turns around is the first factor of the weight's gradient."""
    D, F = sizes
    x, w, dy = jnp.zeros((2, 5, D)), jnp.zeros((D, F)), jnp.zeros((2, 5, F))

    def dweight(x, w, dy):
        return jax.vjp(lambda w: product("BTD,DF->BTF", x, w), w)[1](dy)

    dots = [e for e in jax.make_jaxpr(dweight)(x, w, dy).eqns if e.primitive.name == "dot_general"]
    (tokens,) = [e for e in dots if e.params["dimension_numbers"][0] == ((0, 1), (0, 1))]
    assert tokens.invars[0].aval.shape == {"x": x, "dy": dy}[first].shape
