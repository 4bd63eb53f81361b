"""Next-token cross-entropy."""

import jax
import jax.numpy as jnp

IGNORE = -1  # a label that is no prediction: padding, or the first token of the next document


def cross_entropy(logits, labels):  # BTV BT -> BT, nats; 0 where the label is IGNORE
    """By comparing with an iota rather than a gather, so that a vocabulary split over devices stays split."""
    V = logits.shape[-1]
    target = jnp.sum(jnp.where(jnp.arange(V) == labels[..., None], logits, 0.0), axis=-1)
    return jnp.where(labels == IGNORE, 0.0, jax.nn.logsumexp(logits, axis=-1) - target)
