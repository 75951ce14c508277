"""The training step of each framework, with a clipper, trains like a plain loop.

The plain loop uses dictionaries, clips by hand in NumPy and leaves the rest to Optax. The tests
compare the norms and thresholds of each step, too.
"""

import collections
import functools
import itertools
import pickle
from collections.abc import Callable

import equinox as eqx
import fiddle as fdl
import flax.linen as nn
import grain
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from breadth import each_value
from compat import lenient
from fiddle.experimental import serialization
from flax.training.train_state import TrainState

import optax_smartclip as smartclip

WINDOW = 5

rng = np.random.default_rng(0)
INPUTS = np.float32(rng.normal(size=(8, 8, 3)))
TARGETS = np.float32(rng.normal(size=(8, 8, 2)))
TARGETS[5] *= 100
BATCHES = list(zip(INPUTS, TARGETS, strict=True))
PARAMS = {
    "body/b": np.zeros(4, np.float32),
    "body/w": np.float32(rng.normal(size=(3, 4))),
    "head/b": np.zeros(2, np.float32),
    "head/w": np.float32(rng.normal(size=(4, 2))),
}


def autoclip(**kwargs):
    return smartclip.autoclip(50.0, history=smartclip.ring_buffer(WINDOW), **kwargs)


ADAMW = lenient(optax.adamw(0.01))
ADAM = lenient(optax.adam(0.01))
SGD = optax.sgd(0.05, momentum=0.9)


class AutoclipByHand:
    """The percentile of the last norms of each group, including the current one."""

    def __init__(self, group_of=lambda name: "all", percentile=50.0, window=WINDOW):
        self.group_of, self.percentile, self.window = group_of, percentile, window
        self.norms, self.num_clipped = collections.defaultdict(list), collections.Counter()

    def __call__(self, grads, params):
        groups = {}
        for name in sorted(grads):
            groups.setdefault(self.group_of(name), {})[name] = grads[name]
        clipped, last = {}, []
        for label, members in groups.items():
            norms = self.norms[label]
            norms.append(reference.norm(members))
            limit = reference.percentile_thresholds(norms, self.percentile, self.window)[-1]
            over = norms[-1] > limit
            self.num_clipped[label] += over
            scale = np.float32(limit / norms[-1] if over else 1)
            clipped |= {name: scale * grad for name, grad in members.items()}
            last.append((norms[-1], limit, over, self.num_clipped[label]))
        return clipped, np.transpose(last)


class AgcByHand:
    """Each column of a matrix, and each vector, is cut to a tenth of the weights' norm."""

    def __init__(self):
        self.num_clipped = 0

    def __call__(self, grads, params):
        clipped, units = {}, []
        for name, grad in grads.items():
            norms, weights = (np.linalg.norm(np.float64(x), axis=0) for x in (grad, params[name]))
            limits = 0.1 * np.maximum(weights, 1e-3)
            clipped[name] = np.float32(grad * np.minimum(1, limits / norms))
            units += list(np.ravel(norms / limits))
        self.num_clipped += max(units) > 1
        share = np.mean(np.array(units) > 1)
        return clipped, np.array([max(1, *units), 1, share, self.num_clipped])


def layer_of(name):
    return name.split("/")[0]


def predict(params, inputs):
    hidden = jnp.tanh(inputs @ params["body/w"] + params["body/b"][None])
    return hidden @ params["head/w"] + params["head/b"][None]


@jax.jit
@jax.grad
def plain_gradient(params, inputs, targets):
    return jnp.mean(jnp.square(predict(params, inputs) - targets))


@functools.cache
def apply_with(optimizer):
    """The rest of a step, compiled once for all tests that share an optimizer."""

    @jax.jit
    def apply(params, grads, state):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return apply


def train_by_hand(params, clip, optimizer, batches=BATCHES, gradient=plain_gradient):
    """The parameters and the clipper's record after each step."""
    state = optimizer.init(params)
    history = []
    for batch in batches:
        clipped, record = clip(jax.tree.map(np.asarray, gradient(params, *batch)), params)
        params, state = apply_with(optimizer)(params, clipped, state)
        history.append((params, record))
    return history


def train(tx, params=PARAMS, batches=BATCHES):
    """Trains with the clipper and the optimizer in `tx`."""

    @jax.jit
    def step(params, state, inputs, targets):
        updates, state = tx.update(plain_gradient(params, inputs, targets), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    history = []
    for batch in batches:
        params, state = step(params, state, *batch)
        history.append((params, smartclip.metrics(state)))
    return history


def assert_same(history, expected):
    fields = ("grad_norm", "clip_threshold", "clipped", "num_clipped")
    for (params, record), (by_hand, values) in zip(history, expected, strict=True):
        assert sorted(params) == sorted(by_hand)
        for name in params:
            np.testing.assert_allclose(params[name], by_hand[name], rtol=1e-4, atol=1e-5)
        for field, value in zip(fields, values, strict=True):
            np.testing.assert_allclose(record[field], np.squeeze(value), rtol=1e-4, err_msg=field)
    assert min(np.min(record["clip_scale"]) for _, record in history) < 0.7


def test_linen_train_state_trains_like_a_plain_loop():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            return nn.Dense(2, name="head")(jnp.tanh(nn.Dense(4, name="body")(inputs)))

    def flat(params):
        names = {"b": "bias", "w": "kernel"}
        return {f"{layer}/{n}": params[layer][names[n]] for layer in params for n in names}

    model = Model()
    params = jax.jit(model.init)(jax.random.key(0), INPUTS[0])["params"]
    tx = optax.chain(autoclip(scope="per_layer"), ADAMW)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    assert smartclip.group_labels("per_layer", state.params) == ("body", "head")

    @jax.jit
    def step(state, inputs, targets):
        def loss(params):
            return jnp.mean(jnp.square(state.apply_fn({"params": params}, inputs) - targets))

        state = state.apply_gradients(grads=jax.grad(loss)(state.params))
        return state, smartclip.metrics(state.opt_state)

    history = []
    for batch in BATCHES:
        state, record = step(state, *batch)
        history.append((flat(state.params), record))
    clip = AutoclipByHand(layer_of)
    assert_same(history, train_by_hand(flat(params), clip, ADAMW))


class EquinoxModel(eqx.Module):
    """A module with leaves that are not arrays, whose gradients are None."""

    body: eqx.nn.Linear
    head: eqx.nn.Linear
    activation: Callable
    depth: int

    def __init__(self):
        keys = jax.random.split(jax.random.key(0))
        self.body = eqx.nn.Linear(3, 4, key=keys[0])
        self.head = eqx.nn.Linear(4, 2, key=keys[1])
        self.activation, self.depth = jnp.tanh, 2

    def __call__(self, inputs):
        return self.head(self.activation(self.body(inputs)))


equinox_model = functools.cache(eqx.filter_jit(EquinoxModel))


def flat_equinox(model):
    return {
        f"{layer}/{name}": value
        for layer in ("body", "head")
        for name, value in {
            "b": getattr(model, layer).bias,
            "w": getattr(model, layer).weight.T,
        }.items()
    }


EQUINOX = {
    "autoclip": (autoclip, AutoclipByHand),
    "agc": (lambda: smartclip.agc(0.1, unit_axes="equinox"), AgcByHand),
}
equinox_clippers = pytest.mark.parametrize(("clipper", "by_hand"), EQUINOX.values(), ids=EQUINOX)


def equinox_loss(model, inputs, targets):
    return jnp.mean(jnp.square(jax.vmap(model)(inputs) - targets))


@equinox_clippers
def test_an_equinox_module_trains_like_a_plain_loop(clipper, by_hand):
    tx = optax.chain(clipper(), ADAMW)

    @eqx.filter_jit
    def step(model, opt_state, inputs, targets):
        _, grads = eqx.filter_value_and_grad(equinox_loss)(model, inputs, targets)
        assert grads.activation is None
        assert grads.depth is None
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = tx.update(grads, opt_state, params)
        return eqx.apply_updates(model, updates), opt_state

    model = equinox_model()
    expected = train_by_hand(flat_equinox(model), by_hand(), ADAMW)
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    history = []
    for batch in BATCHES:
        model, opt_state = step(model, opt_state, *batch)
        history.append((flat_equinox(model), smartclip.metrics(opt_state)))
    assert model.activation is jnp.tanh
    assert_same(history, expected)


@pytest.mark.parametrize(("name", "init_with"), each_value(EQUINOX, ["trainable", "all"]))
def test_only_the_trained_part_of_an_equinox_module_counts(name, init_with):
    clipper, by_hand = EQUINOX[name]
    tx = optax.chain(clipper(), SGD)
    model = equinox_model()
    nothing = jax.tree.map(lambda _: False, model)
    trained = eqx.tree_at(lambda model: (model.head.weight, model.head.bias), nothing, (True, True))

    def params_of(model):
        return eqx.filter(model, trained if init_with == "trainable" else eqx.is_inexact_array)

    @eqx.filter_jit
    def step(model, opt_state, inputs, targets):
        trainable, frozen = eqx.partition(model, trained)

        def loss(trainable):
            return equinox_loss(eqx.combine(trainable, frozen), inputs, targets)

        _, grads = eqx.filter_value_and_grad(loss)(trainable)
        assert grads.body.weight is None
        updates, opt_state = tx.update(grads, opt_state, params_of(model))
        return eqx.apply_updates(model, updates), opt_state

    clip = by_hand()

    def clip_head(grads, params):
        heads = ({name: tree[name] for name in tree if "head" in name} for tree in (grads, params))
        clipped, record = clip(*heads)
        return {name: np.zeros_like(grads[name]) for name in grads} | clipped, record

    expected = train_by_hand(flat_equinox(model), clip_head, SGD)
    opt_state = tx.init(params_of(model))
    history = []
    for batch in BATCHES:
        model, opt_state = step(model, opt_state, *batch)
        history.append((flat_equinox(model), smartclip.metrics(opt_state)))
    assert_same(history, expected)


def test_groups_of_an_equinox_module_do_not_change_when_layers_are_frozen():
    params = eqx.filter(equinox_model(), eqx.is_inexact_array)
    assert smartclip.group_labels("per_layer", params) == ("body", "head")
    grads = jax.tree.map(np.ones_like, params)  # The head has ten elements.
    grads = eqx.tree_at(lambda tree: (tree.body.weight, tree.body.bias), grads, (None, None))
    tx = autoclip(scope="per_layer", max_norm=0.5)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    record = smartclip.metrics(state)
    np.testing.assert_allclose(record["grad_norm"], [0, np.sqrt(10)], rtol=1e-6)
    np.testing.assert_array_equal(record["clipped"], [False, True])
    assert updates.body.weight is None
    np.testing.assert_allclose(reference.norm(updates), 0.5, rtol=1e-6)


def test_haiku_parameters_train_like_a_plain_loop():
    @hk.without_apply_rng
    @hk.transform
    def network(inputs):
        return hk.nets.MLP([4, 2], activation=jnp.tanh)(inputs)

    def flat(params):
        layers = {"body": "mlp/~/linear_0", "head": "mlp/~/linear_1"}
        return {f"{layer}/{name}": params[layers[layer]][name] for layer in layers for name in "bw"}

    tx = optax.chain(autoclip(scope="per_param"), ADAMW)

    @jax.jit
    def step(params, opt_state, inputs, targets):
        def loss(params):
            return jnp.mean(jnp.square(network.apply(params, inputs) - targets))

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = jax.jit(network.init)(jax.random.key(0), INPUTS[0])
    assert smartclip.group_labels("per_param", params)[:2] == (
        "mlp/~/linear_0/b",
        "mlp/~/linear_0/w",
    )
    expected = train_by_hand(flat(params), AutoclipByHand(lambda name: name), ADAMW)
    opt_state = tx.init(params)
    history = []
    for batch in BATCHES:
        params, opt_state = step(params, opt_state, *batch)
        history.append((flat(params), smartclip.metrics(opt_state)))
    assert_same(history, expected)


@pytest.mark.long
def test_numpyro_svi_trains_like_a_plain_loop_over_its_elbo():
    # Imported here and below, because the import takes a second.
    import numpyro

    def regression(inputs, targets):
        normal = numpyro.distributions.Normal
        weights = numpyro.sample("w", normal(0.0, 1.0).expand((3,)).to_event(1))
        numpyro.sample("targets", normal(inputs @ weights, 1.0).to_event(1), obs=targets)

    start = {"w": jnp.zeros(3)}  # The default tries several starts, which is slow.
    guide = numpyro.infer.autoguide.AutoNormal(
        regression, init_loc_fn=numpyro.infer.init_to_value(values=start)
    )
    optimizer = numpyro.optim.optax_to_numpyro(optax.chain(autoclip(), ADAM))
    svi = numpyro.infer.SVI(regression, guide, optimizer, numpyro.infer.Trace_ELBO())
    batches = [(inputs, targets[:, 0]) for inputs, targets in BATCHES]
    state = svi.init(jax.random.key(0), *batches[0])
    params, key = svi.optim.get_params(state.optim_state), state.rng_key

    step = jax.jit(svi.update)
    history = []
    for batch in batches:
        state, _ = step(state, *batch)
        record = smartclip.metrics(state.optim_state)
        history.append((svi.optim.get_params(state.optim_state), record))

    @jax.jit
    @jax.grad
    def gradient(params, key, *batch):
        return svi.loss.loss(key, svi.constrain_fn(params), regression, guide, *batch)

    # SVI splits its key once per step.
    keys = []
    for _ in batches:
        key, key_now = jax.random.split(key)
        keys.append(key_now)
    keyed = [(key, *batch) for key, batch in zip(keys, batches, strict=True)]
    assert_same(history, train_by_hand(params, AutoclipByHand(), ADAM, keyed, gradient))


def test_numpyro_stable_update_hides_a_bad_step_from_the_clipper():
    import numpyro

    optimizer = numpyro.optim.optax_to_numpyro(optax.chain(autoclip(), SGD))

    @jax.jit
    def step(state, batch):
        def loss(params):
            return jnp.mean(jnp.square(predict(params, batch[0]) - batch[1])), None

        (value, _), state = optimizer.eval_and_stable_update(loss, state)
        return value, state

    inputs, targets = BATCHES[0]
    _, good = step(optimizer.init(PARAMS), (inputs, targets))
    value, bad = step(good, (inputs, np.full_like(targets, np.nan)))
    assert np.isnan(value)
    jax.tree.map(np.testing.assert_array_equal, bad, good)
    record = smartclip.metrics(bad)
    assert record["num_steps"] == 1
    assert record["num_nonfinite"] == 0


def optimizer_config():
    history = fdl.Config(smartclip.ring_buffer, size=WINDOW)
    clipper = fdl.Config(smartclip.autoclip, percentile=90.0, history=history)
    return fdl.Config(optax.chain, clipper, fdl.Config(optax.adamw, learning_rate=0.01))


def test_fiddle_builds_the_optimizer_that_a_config_describes():
    history = train(lenient(fdl.build(optimizer_config())))
    assert_same(history, train_by_hand(PARAMS, AutoclipByHand(percentile=90.0), ADAMW))


def test_fiddle_builds_a_clipper_by_itself():
    tx = fdl.build(fdl.Config(smartclip.autoclip, percentile=90.0))
    norms = [1.0, 2.0, 3.0, 100.0]
    update, state = jax.jit(tx.update), tx.init(np.zeros(1, np.float32))
    for norm in norms:
        updates, state = update(np.float32([norm]), state)
    np.testing.assert_allclose(updates, np.percentile(norms, 90.0), rtol=1e-6)


def test_a_fiddle_config_can_be_changed_and_saved_as_json():
    config = optimizer_config()
    config[0].percentile = 25.0
    config[0].history.size = 3
    restored = serialization.load_json(serialization.dump_json(config))
    assert restored == config
    expected = train_by_hand(PARAMS, AutoclipByHand(percentile=25.0, window=3), ADAMW)
    assert_same(train(lenient(fdl.build(restored))), expected)


def test_a_fiddle_partial_takes_other_arguments_of_the_clipper_later():
    factory = fdl.build(fdl.Partial(smartclip.autoclip, history=smartclip.ring_buffer(WINDOW)))
    expected = train_by_hand(PARAMS, AutoclipByHand(percentile=90.0), SGD)
    assert_same(train(optax.chain(factory(90.0), SGD)), expected)


def test_a_run_fed_by_grain_resumes_in_the_middle_like_an_uninterrupted_run():
    rows = [
        {"inputs": inputs, "targets": targets}
        for inputs, targets in zip(INPUTS.reshape(-1, 3), TARGETS.reshape(-1, 2), strict=True)
    ]
    dataset = grain.MapDataset.source(rows).shuffle(seed=0).batch(8)
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    tx = optax.chain(autoclip(), ADAMW)

    @jax.jit
    def step(params, opt_state, batch):
        grads = plain_gradient(params, batch["inputs"], batch["targets"])
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def run(iterator, params, opt_state, max_steps=None):
        history = []
        for batch in itertools.islice(iterator, max_steps):
            params, opt_state = step(params, opt_state, batch)
            history.append((params, opt_state))
        return history

    whole = run(iter(dataset), PARAMS, tx.init(PARAMS))
    batches = [(batch["inputs"], batch["targets"]) for batch in dataset]
    expected = train_by_hand(PARAMS, AutoclipByHand(), ADAMW, batches)
    assert_same([(params, smartclip.metrics(state)) for params, state in whole], expected)

    iterator = iter(dataset)
    first_half = run(iterator, PARAMS, tx.init(PARAMS), max_steps=4)
    saved = pickle.dumps((*first_half[-1], iterator.get_state()))
    params, opt_state, position = pickle.loads(saved)
    iterator = iter(dataset)
    iterator.set_state(position)
    resumed = run(iterator, params, opt_state)
    assert len(resumed) == len(whole) - 4
    jax.tree.map(np.testing.assert_array_equal, resumed[-1], whole[-1])

    # A clipper without its history would give other parameters.
    iterator.set_state(position)
    forgetful, _ = run(iterator, params, (tx.init(params)[0], *opt_state[1:]))[-1]
    assert not np.allclose(forgetful["head/w"], whole[-1][0]["head/w"], rtol=1e-3)
