"""The planned gradient under transformations, on meshes, with effects, and differentiated again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from breadth import each_value
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from programs import W, X, assert_same, chain, mapped

from optax_smartclip.memory import height_compressed_grad


def recurrent(w, x):
    # A compiler could compute the products with the inputs too early.
    h = jnp.zeros((2, 4))
    for t in range(3):
        h = jnp.tanh(h @ w + x[2 * t : 2 * t + 2] @ w)
    return jnp.sum(h)


def test_composes_with_jit_vmap_and_scan():
    compressed = height_compressed_grad(recurrent, 3)
    plain = jax.grad(recurrent)
    xs = np.stack([X, 2 * X])

    def results(gradient):
        def descend():
            step = lambda w, _: (w - 0.1 * gradient(w, X), None)  # noqa: E731
            return jax.lax.scan(step, jnp.array(W), None, length=3)[0]

        return jax.jit(lambda: (gradient(W, X), jax.vmap(gradient, (None, 0))(W, xs), descend()))()

    assert_same(results(compressed), results(plain))


def test_second_derivatives_are_those_of_jax():
    def of(gradient):
        return lambda w: jnp.sum(jnp.sin(gradient(w, X)))

    def both(fn):
        return jax.jit(lambda w: (jax.grad(fn)(w), jax.jvp(fn, (w,), (w,))))(W)

    compressed, plain = of(height_compressed_grad(recurrent, 3)), of(jax.grad(recurrent))
    expected = both(plain)
    assert_same(both(compressed), expected)
    assert_same(jax.jit(height_compressed_grad(plain, 6))(W), expected[0])


KINDS = [AxisType.Auto, AxisType.Explicit]


@pytest.mark.parametrize(("kind", "program"), each_value(KINDS, [chain, recurrent]))
def test_sharded_arguments_keep_their_shardings(kind, program):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    spec = PartitionSpec("data") if program is chain else PartitionSpec()
    x = jax.device_put(X, NamedSharding(mesh, spec))
    w = jax.device_put(W, NamedSharding(mesh, PartitionSpec()))
    compressed = height_compressed_grad(program, 4, argnums=(0, 1))
    gradient = jax.block_until_ready(jax.jit(compressed)(w, x))
    assert compressed.last_executor is not None
    assert_same(jax.device_get(gradient), jax.jit(jax.grad(program, (0, 1)))(W, X))
    assert gradient[1].sharding.is_equivalent_to(x.sharding, 2)


def test_a_function_with_a_shard_map_inside_has_a_plan():
    def loss(w, x):
        inner = lambda w, x: jax.lax.pmean(jnp.mean(jnp.tanh(x @ w) ** 2), "data")  # noqa: E731
        return mapped(inner)(w, jnp.sin(x @ w))

    compressed = height_compressed_grad(loss, 1)
    gradient = jax.block_until_ready(jax.jit(compressed)(W, X))
    plain = jax.grad(lambda w: jnp.mean(jnp.tanh(jnp.sin(X @ w) @ w) ** 2))
    assert_same(gradient, jax.jit(plain)(W))
    assert compressed.last_executor.checkpoint_plan.meta["num_recomputed"] > 1


@pytest.mark.parametrize("program", [chain, recurrent])
def test_shard_map_around_the_gradient(program):
    compressed = height_compressed_grad(program, 3)
    mean = mapped(lambda w, x: jax.lax.pmean(compressed(w, x), "data"))
    gradient = jax.block_until_ready(jax.jit(mean)(W, np.concatenate([X, 2 * X])))
    plain = jax.jit(jax.grad(program))
    # JAX sums the gradient of replicated weights before the mean.
    assert_same(gradient, np.asarray(plain(W, X)) + np.asarray(plain(W, 2 * X)))
    assert compressed.last_executor is not None


@pytest.mark.parametrize("block_size", [3, 50])
@pytest.mark.parametrize("ordered", [False, True])
def test_effects_happen_once_and_in_order(ordered, block_size):
    seen = []

    def loss(w):
        x = X
        for step in range(3):
            x = jnp.sin(x @ w)
            jax.debug.callback(lambda _, step=step: seen.append(step), x[0, 0], ordered=ordered)
        return jnp.sum(x)

    compressed = height_compressed_grad(loss, block_size)
    gradient = jax.block_until_ready(jax.jit(compressed)(W))
    jax.effects_barrier()
    assert compressed.last_executor is not None
    assert (seen if ordered else sorted(seen)) == [0, 1, 2]
    plain = jax.grad(lambda w: jnp.sum(jnp.sin(jnp.sin(jnp.sin(X @ w) @ w) @ w)))
    assert_same(gradient, jax.jit(plain)(W))


def test_an_effect_in_a_scan_happens_once_in_each_iteration():
    seen = []

    def loss(w, report=seen.append):
        def body(x, _):
            jax.debug.callback(lambda v: report(float(v)), x[0, 0])
            return jnp.sin(x @ w), None

        x, _ = jax.lax.scan(body, jnp.sin(X @ w), None, length=3)
        return jnp.sum(jnp.sin(x @ w))

    compressed = height_compressed_grad(loss, 2)
    gradient = jax.block_until_ready(jax.jit(compressed)(W))
    jax.effects_barrier()
    assert len(seen) == 3
    assert compressed.last_executor is not None
    assert_same(gradient, jax.jit(jax.grad(lambda w: loss(w, lambda _: None)))(W))
