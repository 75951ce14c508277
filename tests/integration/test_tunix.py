"""Tunix: its `PeftTrainer` with a clipper trains like a plain loop that clips by hand.

The trainer runs on one machine, without checkpoints, and writes no files.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from tunix.sft import hooks
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

import optax_smartclip as smartclip

pytestmark = [
    pytest.mark.usefixtures("no_trace"),
    # Tunix calls deprecated functions of JAX and Optax.
    pytest.mark.filterwarnings(
        "ignore:jax.interpreters.pxla.thread_resources is deprecated:DeprecationWarning"
    ),
    pytest.mark.filterwarnings(
        "ignore:optax.global_norm is deprecated in favor of optax.tree.norm:DeprecationWarning"
    ),
]

RATE = 0.1
WINDOW = 5

rng = np.random.default_rng(0)
BATCHES = [
    {"inputs": inputs, "targets": targets}
    for inputs, targets in zip(
        np.float32(rng.normal(size=(8, 8, 3))), np.float32(rng.normal(size=(8, 8, 2))), strict=True
    )
]
BATCHES[5]["targets"] *= 8  # The trainer logs exp(loss), which must not overflow.


class Model(nnx.Module):
    """Two layers; with `lora`, the last one has an adapter."""

    def __init__(self, lora=False):
        rngs = nnx.Rngs(0)
        self.body = nnx.Linear(3, 4, rngs=rngs)
        self.head = (
            nnx.LoRALinear(4, 2, lora_rank=2, rngs=rngs) if lora else nnx.Linear(4, 2, rngs=rngs)
        )

    def __call__(self, inputs):
        return self.head(jnp.tanh(self.body(inputs)))


def loss(model, inputs, targets):
    return jnp.mean(jnp.square(model(inputs) - targets))


def optimizer():
    clipper = smartclip.autoclip(50.0, history=smartclip.ring_buffer(WINDOW))
    return optax.chain(clipper, optax.sgd(RATE, momentum=0.9))


def train_by_hand(model, wrt, accumulate=1):
    """The parameters, the norm and the threshold after each update."""
    gradient = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, wrt)))
    params = nnx.to_pure_dict(nnx.state(model, wrt))
    trace = jax.tree.map(np.zeros_like, params)
    history, norms, seen = [], [], []
    for batch in BATCHES:
        grads = nnx.to_pure_dict(gradient(model, **batch))
        seen.append(jax.tree.map(np.float64, grads))
        if len(seen) < accumulate:
            continue
        grads, seen = jax.tree.map(lambda *grads: np.mean(grads, axis=0), *seen), []
        norms.append(reference.norm(grads))
        limit = reference.percentile_thresholds(norms, 50.0, WINDOW)[-1]
        clipped = optax.tree.scale(min(1, limit / norms[-1]), grads)
        trace = jax.tree.map(lambda old, grad: np.float32(0.9 * old + grad), trace, clipped)
        params = jax.tree.map(lambda param, step: param - np.float32(RATE) * step, params, trace)
        nnx.update(model, params)
        history.append((params, norms[-1], limit))
    return history


class Recorder(hooks.TrainingHooks):
    """Records parameters and metrics before each step and after the last one."""

    def __init__(self, wrt):
        self.wrt, self.history = wrt, []

    def read(self, trainer):
        params = nnx.to_pure_dict(nnx.state(trainer.model, self.wrt))
        record = smartclip.metrics(trainer.optimizer.opt_state)
        # Copied, because the next step donates the optimizer's buffers.
        self.history.append(jax.tree.map(np.array, (params, record)))

    def on_train_step_start(self, trainer):
        self.read(trainer)

    def on_train_end(self, trainer):
        self.read(trainer)

    def on_train_start(self, trainer):
        """Does nothing."""

    def on_train_step_end(self, trainer, step, loss):
        """Does nothing: the trainer calls it a step late, after it has written its log."""

    on_eval_step_start = on_eval_step_end = on_train_start


@pytest.fixture
def no_trace(tmp_path, monkeypatch):
    """Checks that no file is written, and keeps the listeners of other tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax.monitoring, "clear_event_listeners", lambda: None)
    yield
    assert not list(tmp_path.iterdir())


def train(model, wrt, **config):
    """A trainer after all batches, and the parameters and metrics before and after each step."""
    config = TrainingConfig(eval_every_n_steps=100, **config)
    trainer = PeftTrainer(model, optimizer(), config).with_loss_fn(loss)
    recorder = Recorder(wrt)
    trainer.with_training_hooks(recorder)
    trainer.train(BATCHES)
    return trainer, recorder.history


def assert_same(history, expected):
    for (params, record), (by_hand, norm, limit) in zip(history, expected, strict=True):
        assert jax.tree.structure(params) == jax.tree.structure(by_hand)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(by_hand), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(record["grad_norm"], norm, rtol=1e-4)
        np.testing.assert_allclose(record["clip_threshold"], limit, rtol=1e-4)
    assert min(record["clip_scale"] for _, record in history) < 0.7


@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
def test_peft_trainer_trains_like_a_plain_loop(lora):
    wrt = nnx.LoRAParam if lora else nnx.Param
    trainer, history = train(Model(lora), wrt)
    assert_same(history[1:], train_by_hand(Model(lora), wrt))
    logged = trainer.metrics_logger.get_metric_history("", "grad_norm", "train")
    norms = [record["grad_norm"] for _, record in history[1:]]
    np.testing.assert_allclose(logged, norms, rtol=1e-5)


def test_peft_trainer_accumulates_gradients_before_they_are_clipped():
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides float32 by int32.
        _, history = train(Model(), nnx.Param, gradient_accumulation_steps=2)
    num_steps = [int(record["num_steps"]) for _, record in history]
    assert num_steps == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert_same(history[2::2], train_by_hand(Model(), nnx.Param, accumulate=2))
