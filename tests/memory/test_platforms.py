"""A program orders its blocks as the platform that it is compiled for needs it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowered import conditionals, lowered_for, operations
from programs import W, X, assert_same, chain, mapped

from optax_smartclip.memory import height_compressed_grad

BARRIER = "stablehlo.optimization_barrier"


def layered(ws, x):
    # Three equations for each layer.
    for w in ws:
        x = jnp.tanh(x @ w) + x
    return jnp.mean(x**2)


@pytest.mark.parametrize(
    ("platform", "barriers", "branches"), [("cpu", 0, 6), ("tpu", 6, 0), ("cuda", 6, 0)]
)
def test_blocks_wait_by_branches_on_the_cpu_and_by_barriers_elsewhere(platform, barriers, branches):
    compressed = height_compressed_grad(chain, 3)
    module = lowered_for(platform, compressed, W, X)
    assert compressed.last_executor.checkpoint_plan.meta["num_recomputed"] == 6
    assert len(list(operations(module, BARRIER))) == barriers
    assert len(list(conditionals(module))) == branches


def test_a_barrier_waits_for_the_gradients_of_the_weights_of_the_previous_block():
    ws = [W] * 6
    module = lowered_for("tpu", height_compressed_grad(layered, 3), ws, X)
    main = next(
        f for f in operations(module, "func.func") if "main" in str(f.attributes["sym_name"])
    )
    (returned,) = operations(main, "func.return")
    waited = [any(use.owner.name == BARRIER for use in grad.uses) for grad in returned.operands]
    # Nothing comes after the first layer.
    assert waited == [False, *[True] * 5]


@pytest.fixture
def barriers(monkeypatch):
    """Uses the barriers of other platforms on the CPU."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))


@pytest.mark.usefixtures("barriers")
@pytest.mark.parametrize("program", [chain, layered])
def test_barriers_do_not_change_the_gradient(program):
    w = W if program is chain else [W, 2 * W, -W]
    compressed = height_compressed_grad(program, 3, argnums=(0, 1))
    expected = jax.jit(jax.grad(program, (0, 1)))(w, X)
    assert_same(compressed(w, X), expected)
    of_batch = jax.jit(jax.vmap(compressed, (None, 0)))(w, np.stack([X, X]))
    assert_same(jax.tree.map(lambda leaf: leaf[1], of_batch), expected)


@pytest.mark.usefixtures("barriers")
def test_barriers_do_not_change_second_derivatives():
    def of(gradient):
        return jax.jit(jax.grad(lambda w: jnp.sum(jnp.sin(gradient(w, X)))))(W)

    assert_same(of(height_compressed_grad(chain, 3)), of(jax.grad(chain)))


@pytest.mark.usefixtures("barriers")
def test_barriers_accept_values_that_vary_over_the_devices_of_a_shard_map():
    compressed = height_compressed_grad(chain, 3)
    mean = mapped(lambda w, x: jax.lax.pmean(compressed(w, x), "data"))
    gradient = jax.block_until_ready(jax.jit(mean)(W, np.concatenate([X, 2 * X])))
    plain = jax.jit(jax.grad(chain))
    assert_same(gradient, np.asarray(plain(W, X)) + np.asarray(plain(W, 2 * X)))
    assert compressed.last_executor is not None
