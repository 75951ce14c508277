"""Trains a Flax NNX model on a mesh of devices, stops, and resumes from a checkpoint.

The example shows the place of a clipper in an ordinary training program: inside the gradient
accumulation, before the optimizer. The batch is split over the mesh axis `data` and the weights
over `model`, which does not concern the clipper. Without accelerators, the devices are simulated.

    python examples/train_on_mesh.py --devices=8 --steps=200
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import app, flags, logging
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

import optax_smartclip as smartclip

DEVICES = flags.DEFINE_integer("devices", 8, "Simulated devices, if there are no others.")
STEPS = flags.DEFINE_integer("steps", 200, "Optimizer steps, half of them before the stop.")

TEXT = np.frombuffer("\n".join(topics.values()).encode("ascii", "replace"), np.uint8)
WIDTH, LENGTH, BATCH = 64, 32, 16
MICRO_STEPS = 4


class Block(nnx.Module):
    """A causal convolution and a perceptron, whose weights are split over `model`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.lecun_normal()
        split = nnx.with_partitioning(init, (None, "model"))
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.mix = nnx.Conv(WIDTH, WIDTH, kernel_size=4, padding="CAUSAL", rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, kernel_init=split, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        """Applies one residual layer."""
        return x + self.down(nnx.gelu(self.up(self.mix(self.norm(x)))))


class Model(nnx.Module):
    """Predicts the next character."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(128, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, text: Int[Array, "batch length"]) -> Float[Array, "batch length 128"]:
        """Returns the logits of each next character."""
        x = self.embed(text)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


def make_optimizer(model: Model) -> nnx.Optimizer:
    """Makes the optimizer. Inside MultiSteps, the clipper sees the mean gradient of each step."""
    tx = optax.chain(smartclip.autoclip(), optax.adamw(3e-3))
    accumulating = optax.MultiSteps(tx, every_k_schedule=MICRO_STEPS)
    return nnx.Optimizer(model, accumulating.gradient_transformation(), wrt=nnx.Param)


@nnx.jit
def train_step(
    model: Model, optimizer: nnx.Optimizer, text: Int[Array, "batch length"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Trains on one micro-batch; returns the loss and the clipper's metrics."""

    def loss_fn(model: Model) -> Float[Array, ""]:
        losses = optax.softmax_cross_entropy_with_integer_labels(model(text[:, :-1]), text[:, 1:])
        return jnp.mean(losses)

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss, smartclip.metrics(optimizer.opt_state)


def batches(first: int, last: int) -> Iterator[Int[np.ndarray, "batch length"]]:
    """Yields the micro-batches of the steps from `first` to `last`, each from its own seed."""
    for seed in range(first * MICRO_STEPS, last * MICRO_STEPS):
        starts = np.random.default_rng(seed).integers(len(TEXT) - LENGTH - 1, size=BATCH)
        yield np.int32(TEXT[starts[:, None] + np.arange(LENGTH + 1)])


def train(model: Model, optimizer: nnx.Optimizer, first: int, last: int, split: Any) -> None:
    """Trains from step `first` to `last`, and prints every tenth; one has MICRO_STEPS batches."""
    for number, text in enumerate(batches(first, last), start=first * MICRO_STEPS + 1):
        loss, record = train_step(model, optimizer, jax.device_put(text, split))
        # Simulated devices share the host's threads, and block each other if steps pile up.
        jax.block_until_ready(loss)
        if number % (10 * MICRO_STEPS) == 0:
            print(
                f"step {number // MICRO_STEPS:4d}  loss {loss:.4f}"
                f"  norm {record['grad_norm']:.4f}  threshold {record['clip_threshold']:.4f}"
                f"  clipped {record['num_clipped']} of {record['num_steps']}"
            )


def main(_: list[str]) -> None:
    """Trains for half of the steps, saves, and trains the restored model for the other half."""
    logging.set_verbosity(logging.WARNING)
    jax.config.update("jax_num_cpu_devices", DEVICES.value)
    num_devices = jax.device_count()
    columns = 2 if num_devices % 2 == 0 else 1
    mesh = jax.make_mesh(
        (num_devices // columns, columns), ("data", "model"), axis_types=(AxisType.Auto,) * 2
    )
    split = NamedSharding(mesh, P("data"))
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        model = Model(nnx.Rngs(0))
        optimizer = make_optimizer(model)
        print("one of the weights is", model.blocks[0].up.kernel.sharding)
        train(model, optimizer, 0, STEPS.value // 2, split)

        # The optimizer's state contains the clipper's, so the checkpoint does as well.
        checkpointer = ocp.StandardCheckpointer()
        checkpointer.save(Path(folder) / "run", nnx.state((model, optimizer)))
        checkpointer.wait_until_finished()

        model = Model(nnx.Rngs(1))
        optimizer = make_optimizer(model)
        target = nnx.state((model, optimizer))
        nnx.update((model, optimizer), checkpointer.restore(Path(folder) / "run", target))
        print("resumed")
        train(model, optimizer, STEPS.value // 2, STEPS.value, split)


if __name__ == "__main__":
    app.run(main)
