"""The gradient equals that of `jax.grad` for all kinds of programs and arguments."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import W, X, assert_same, chain

from optax_smartclip.memory import (
    NoPlanWarning,
    api,
    height_compressed_grad,
    height_compressed_value_and_grad,
)


def scanned(w, x):
    x, _ = jax.lax.scan(lambda x, _: (jnp.sin(x @ w), None), x, None, length=3)
    return jnp.sum(jnp.cos(x))


def branching(w, x):
    x = jax.lax.cond(w[0, 0] < 0, jnp.sin, jnp.cos, x @ w)
    return jnp.sum(jax.nn.logsumexp(x * x, axis=-1))


def activations(w, x):
    for f in (jax.nn.softmax, jax.nn.relu, jax.nn.gelu, jax.nn.silu):
        x = jnp.sin(f(x @ w))
    return jnp.sum(x)


def noisy(w, x):
    key = jax.random.key(3)
    for _ in range(3):
        key, now = jax.random.split(key)
        x = jnp.where(jax.random.bernoulli(now, 0.5, x.shape), jnp.sin(x @ w), 0)
    return jnp.sum(x)


def checkpointed(w, x):
    for _ in range(3):
        x = jax.checkpoint(lambda w, x: jnp.sin(x @ w))(w, x)
    return jnp.sum(x)


def linear(w, x):
    # The cotangents are constants, which a compiler may fold.
    for _ in range(4):
        x = x @ w
    return jnp.sum(x)


def unused(w, x):
    return jnp.sum(jnp.sin(x)) + 0.0 * jnp.sum(jax.lax.stop_gradient(w))


def convolved(w, x):
    for _ in range(3):
        x = jnp.sin(jax.lax.conv(x[None, None], w[None, None], (1, 1), "SAME")[0, 0])
    return jnp.sum(x)


@jax.custom_vjp
def halved(x):
    return x * 1.0


halved.defvjp(lambda x: (halved(x), None), lambda _, ct: (ct / 2,))


def own_rule(w, x):
    return jnp.sum(jnp.sin(halved(jnp.sin(x @ w)) @ w))


def mixed(w, x):
    # A cotangent passes through bfloat16 and complex64.
    for _ in range(3):
        x = jnp.tanh((x.astype(jnp.bfloat16) * jnp.bfloat16(2)).astype(jnp.float32) @ w)
        z = jnp.exp(jax.lax.complex(x, -x))
        x = jnp.real(z * z) + jnp.imag(z)
    return jnp.sum(x)


PROGRAMS = [
    chain, mixed, scanned, branching, activations, noisy, checkpointed, linear, unused, own_rule,
    convolved,
]  # fmt: skip
PLANNED = [chain, noisy, unused, convolved]


@pytest.mark.parametrize(
    ("program", "block_size"),
    [*((program, 2) for program in PROGRAMS), *((program, None) for program in PLANNED)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_gradient_is_that_of_jax(program, block_size):
    compressed = height_compressed_grad(program, block_size, argnums=(0, 1))
    assert_same(compressed(W, X), jax.jit(jax.grad(program, (0, 1)))(W, X))
    assert compressed.last_executor.checkpoint_plan.meta["num_blocks"] >= 1


def test_value_gradient_and_aux_come_in_the_order_of_jax():
    def loss(w, x, scale=2):
        return chain(w, x) * scale, {"x": x, "n": jnp.int32(3)}

    both = height_compressed_value_and_grad(loss, 3, has_aux=True)
    expected = jax.jit(jax.value_and_grad(loss, has_aux=True))
    assert_same(both(W, X, scale=3), expected(W, X, scale=3))
    only = height_compressed_grad(loss, 3, has_aux=True, argnums=-1)
    assert_same(only(W, X), jax.jit(jax.grad(loss, 1, has_aux=True))(W, X))


def test_a_gradient_with_respect_to_closed_over_values_is_that_of_jax():
    def outer(transform, scale):
        gradient = transform(lambda w: chain(w, X * scale))
        return jnp.sum(gradient(jnp.array(W)) ** 2)

    compressed = functools.partial(height_compressed_grad, block_size=3)
    expected = jax.jit(jax.grad(functools.partial(outer, jax.grad)))(1.5)
    assert_same(jax.grad(functools.partial(outer, compressed))(1.5), expected)


def test_keys_integers_and_bools_pass_through():
    def loss(w, key, rows, mask):
        x = jnp.where(mask, X, 0)[rows]
        for _ in range(3):
            x = jnp.sin(x @ w) + jax.random.normal(key, x.shape)
        return jnp.sum(x)

    args = (W, jax.random.key(0), np.array([0, 2, 1]), X > 0)
    assert_same(height_compressed_grad(loss, 2)(*args), jax.jit(jax.grad(loss))(*args))


def test_without_a_plan_the_gradient_is_that_of_jax_and_a_warning_gives_the_reason():
    compressed = height_compressed_grad(lambda x: jnp.sin(x) if x > 0 else x)
    with pytest.warns(NoPlanWarning, match="TracerBoolConversionError: Attempted boolean"):
        gradient = compressed(1.0)
    assert_same(gradient, np.cos(np.float32(1.0)))
    assert compressed.last_executor is None


def test_an_error_of_the_planner_is_named_in_the_warning(monkeypatch):
    def fail(*_):
        raise KeyError("no such node")

    monkeypatch.setattr("optax_smartclip.memory.api.make_plan", fail)
    compressed = height_compressed_grad(chain)
    with pytest.warns(NoPlanWarning, match="KeyError: 'no such node'"):
        assert_same(compressed(W, X), jax.jit(jax.grad(chain))(W, X))
    assert compressed.last_executor is None


def raising(w):
    raise ValueError("no such layer")


# Warnings are errors in these tests, so there is no warning.
@pytest.mark.parametrize(
    ("fn", "argument"),
    [
        (raising, W),
        (lambda w: jnp.sum(w.nothing), W),
        (lambda w: w, W),
        (lambda w: "a", W),
        (lambda w: jnp.sum(w) * 1j, W),
        (jnp.sum, np.arange(3)),
        (jnp.sum, "a"),
    ],
    ids=["value", "attribute", "array", "text", "complex", "int argument", "text argument"],
)
@pytest.mark.parametrize("transform", [lambda gradient: gradient, jax.jit], ids=["eager", "jit"])
def test_errors_of_the_function_and_its_arguments_equal_those_of_jax(fn, argument, transform):
    with pytest.raises(Exception) as expected:  # noqa: PT011
        transform(jax.grad(fn))(argument)
    with pytest.raises(type(expected.value)) as actual:
        transform(height_compressed_grad(fn))(argument)
    # The rest of the message may name the function.
    assert str(actual.value)[:30] == str(expected.value)[:30]


@pytest.mark.parametrize(
    ("name", "unit"), [("block_size", "equations"), ("memory_budget", "bytes")]
)
@pytest.mark.parametrize("value", [0, -1, True])
def test_sizes_must_be_positive_ints(name, unit, value):
    message = f"`{name}` must be None or a Python int of at least 1 ({unit}), got {value!r}."
    for transform in (height_compressed_grad, height_compressed_value_and_grad):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            transform(chain, **{name: value})


@pytest.mark.parametrize("value", [2.5, "4"])
def test_sizes_that_are_not_ints_are_refused_with_the_same_message(value):
    # In these tests, a type checker refuses the argument of the public function.
    with pytest.raises(ValueError, match=f"got {value!r}"):
        api._check_size("block_size", value, "equations")


def test_argnums_out_of_range_are_refused_as_by_jax():
    with pytest.raises((ValueError, TypeError)) as expected:
        jax.grad(chain, 5)(W, X)
    with pytest.raises(type(expected.value)):
        height_compressed_grad(chain, argnums=5)(W, X)


def test_a_plain_call_traces_once():
    traces = []

    def loss(w, x, power):
        traces.append(power)
        return chain(w, x) ** power

    compressed = height_compressed_grad(loss, 3)
    first, second = compressed(W, X, 2), compressed(2 * W, X, 2)
    assert traces == [2]
    compressed(W, X, 3)
    assert traces == [2, 3]
    plain = jax.jit(jax.grad(loss), static_argnums=2)
    assert_same((first, second), (plain(W, X, 2), plain(2 * W, X, 2)))
