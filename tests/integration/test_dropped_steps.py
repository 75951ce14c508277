"""Models with batch statistics: with `where_skipped`, a dropped step does not change them.

A run with a NaN in one batch and a spike in another equals, bit for bit, the run without the two.
"""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from breadth import long_but
from flax import nnx
from flax.training import train_state
from flax.training.dynamic_scale import DynamicScale
from trees import assert_same_bits

import optax_smartclip as smartclip

rng = np.random.default_rng(0)
INPUTS = np.float32(rng.normal(size=(12, 8, 3)))
TARGETS = np.float32(rng.normal(size=(12, 8, 2)))
NAN, SPIKE = 6, 9
INPUTS[NAN, 2, 1] = np.nan
INPUTS[SPIKE] += 50
TARGETS[SPIKE] *= 1000
EVERY = range(12)
GOOD = [batch for batch in EVERY if batch not in (NAN, SPIKE)]


def optimizer():
    inner = optax.sgd(optax.linear_schedule(0.1, 0.0, 20), momentum=0.9)
    return smartclip.skip_spikes(inner, sigma=30.0, window=8, warmup_steps=4)


def error(outputs, targets):
    return jnp.mean(jnp.square(outputs - targets))


def new_in_every_step(opt_state, old, new):
    """A training step without `where_skipped`."""
    del opt_state, old
    return new


# Each takes `where_skipped` or a replacement. It returns a function of the batches that returns a
# dictionary of the trained state.


def linen(where):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            hidden = nn.BatchNorm(use_running_average=False, momentum=0.9)(nn.Dense(4)(inputs))
            return nn.Dense(2)(nn.tanh(hidden))

    class TrainState(train_state.TrainState):
        rest: dict

    model = Model()
    variables = jax.jit(model.init)(jax.random.key(0), INPUTS[0])
    params = variables["params"]
    rest = {"stats": variables["batch_stats"], "average": params, "key": jax.random.key(1)}
    start = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer(), rest=rest)

    @jax.jit
    def step(state, inputs, targets):
        next_key, key = jax.random.split(state.rest["key"])
        inputs += 0.1 * jax.random.normal(key, inputs.shape)

        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.rest["stats"]}
            outputs, mutated = state.apply_fn(variables, inputs, mutable=["batch_stats"])
            return error(outputs, targets), mutated["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        average = optax.incremental_update(params, state.rest["average"], 0.1)
        rest = {"stats": stats, "average": average, "key": next_key}
        step, rest = where(opt_state, (state.step, state.rest), (state.step + 1, rest))
        return state.replace(step=step, params=params, opt_state=opt_state, rest=rest)

    def train(batches):
        state = start
        for batch in batches:
            state = step(state, INPUTS[batch], TARGETS[batch])
        rest = state.rest | {"key": jax.random.key_data(state.rest["key"]), "step": state.step}
        return rest | {"params": state.params, "opt_state": state.opt_state}

    return train


def of_nnx(where):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.body = nnx.Linear(3, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, inputs):
            return self.head(self.dropout(jnp.tanh(self.norm(self.body(inputs)))))

    @nnx.jit
    def step(model, trainer, inputs, targets):
        def rest():
            return nnx.as_pure(nnx.state((model, trainer.step), nnx.Not(nnx.Param)))

        old = rest()
        loss, grads = nnx.value_and_grad(lambda model: error(model(inputs), targets))(model)
        trainer.update(model, grads, value=loss)
        nnx.update((model, trainer.step), where(trainer.opt_state, old, rest()))

    def train(batches):
        model = Model(nnx.Rngs(0))
        trainer = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)
        for batch in batches:
            step(model, trainer, INPUTS[batch], TARGETS[batch])
        stats, params, count, _ = nnx.as_pure(
            nnx.state(model, nnx.BatchStat, nnx.Param, nnx.RngCount, ...)
        )
        learned = {"stats": stats, "params": params, "drawn": count, "step": trainer.step[...]}
        return learned | {"opt_state": nnx.as_pure(trainer.opt_state)}

    return train


def equinox(where, mode="batch"):
    class Model(eqx.Module):
        body: eqx.nn.Linear
        norm: eqx.nn.BatchNorm
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key)
            self.body = eqx.nn.Linear(3, 4, key=keys[0])
            self.norm = eqx.nn.BatchNorm(4, "batch", momentum=0.9, mode=mode)
            self.head = eqx.nn.Linear(4, 2, key=keys[1])

        def __call__(self, inputs, state):
            hidden, state = self.norm(self.body(inputs), state)
            return self.head(jnp.tanh(hidden)), state

    tx = optimizer()

    @eqx.filter_jit
    def train_step(model, opt_state, state, step, inputs, targets):
        def loss_fn(model):
            apply = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
            outputs, next_state = apply(inputs, state)
            return error(outputs, targets), next_state

        (loss, next_state), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model)
        params = eqx.filter(model, eqx.is_array)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        state, step = where(opt_state, (state, step), (next_state, step + 1))
        return eqx.apply_updates(model, updates), opt_state, state, step

    def train(batches):
        model, state = eqx.nn.make_with_state(Model)(jax.random.key(0))
        run = model, tx.init(eqx.filter(model, eqx.is_array)), state, jnp.int32(0)
        for batch in batches:
            run = train_step(*run, INPUTS[batch], TARGETS[batch])
        model, opt_state, state, step = run
        params = eqx.filter(model, eqx.is_array)
        stats = jax.tree.leaves(state)
        return {"params": params, "opt_state": opt_state, "stats": stats, "step": step}

    return train


def haiku(where):
    @hk.transform_with_state
    def net(inputs):
        norm = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)
        return hk.Linear(2)(jnp.tanh(norm(hk.Linear(4)(inputs), is_training=True)))

    tx = optimizer()

    @jax.jit
    def train_step(params, opt_state, state, step, inputs, targets):
        def loss_fn(params):
            outputs, next_state = net.apply(params, state, None, inputs)
            return error(outputs, targets), next_state

        (loss, next_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        state, step = where(opt_state, (state, step), (next_state, step + 1))
        return optax.apply_updates(params, updates), opt_state, state, step

    def train(batches):
        params, state = jax.jit(net.init)(jax.random.key(0), INPUTS[0])
        run = params, tx.init(params), state, jnp.int32(0)
        for batch in batches:
            run = train_step(*run, INPUTS[batch], TARGETS[batch])
        return dict(zip(("params", "opt_state", "stats", "step"), run, strict=True))

    return train


FRAMEWORKS = {"linen": linen, "nnx": of_nnx, "equinox": equinox, "haiku": haiku}
every_framework = pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)


@pytest.fixture(autouse=True)
def lenient_layers():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def num_skipped(run):
    return int(smartclip.metrics(run["opt_state"])["num_skipped"])


def count_of_optimizer(run):
    return int(optax.tree.get(run["opt_state"].inner_state, "count"))


@every_framework
def test_a_run_with_bad_batches_equals_the_run_without_them(framework):
    train = framework(smartclip.where_skipped)
    run, expected = train(EVERY), train(GOOD)
    assert (num_skipped(run), num_skipped(expected)) == (2, 0)
    assert int(run["step"]) == count_of_optimizer(run) == len(GOOD)
    assert_same_bits(
        run | {"opt_state": run["opt_state"].inner_state},
        expected | {"opt_state": expected["opt_state"].inner_state},
    )


@pytest.mark.parametrize("framework", long_but({"haiku"}, FRAMEWORKS))
def test_without_it_the_statistics_stay_nan_and_the_step_is_ahead(framework):
    run = FRAMEWORKS[framework](new_in_every_step)(EVERY)
    assert num_skipped(run) == int(run["step"]) - count_of_optimizer(run) == 2
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(run["params"]))
    assert any(np.any(np.isnan(leaf)) for leaf in jax.tree.leaves(run["stats"]))


@pytest.mark.parametrize(
    ("where", "skipped"),
    [
        (smartclip.where_skipped, 1),
        pytest.param(new_in_every_step, SPIKE - NAN, marks=pytest.mark.long),
    ],
)
def test_if_training_uses_the_statistics_only_where_skipped_lets_steps_after_a_nan_pass(
    where, skipped
):
    assert num_skipped(equinox(where, mode="ema")(range(SPIKE))) == skipped


def test_a_dynamic_loss_scale_must_change_in_dropped_steps():
    tx = smartclip.skip_spikes(optax.sgd(0.1))

    @functools.partial(jax.jit, static_argnums=3)
    def step(params, opt_state, scale, undo):
        def loss_fn(params):
            return jnp.square(params).astype(jnp.float16)

        next_scale, _, loss, grads = scale.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        if undo:
            next_scale = smartclip.where_skipped(opt_state, scale, next_scale)
        return optax.apply_updates(params, updates), opt_state, next_scale

    for undo in (False, True):
        params = jnp.ones(())
        # Four times the largest number of float16.
        run = params, tx.init(params), DynamicScale(scale=jnp.float32(2**18))
        for _ in range(8):
            run = step(*run, undo)
        skipped = int(smartclip.metrics(run[1])["num_skipped"])
        assert (skipped == 8, float(run[0]) == 1) == (undo, undo)
