"""Policy gradients on a cart that balances a pole (Barto, Sutton and Anderson, 1983)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key
from study.tasks.layers import mlp, mlp_init
from study.training import Task

PyTree = Any
States = Float[Array, "carts 4"]

NUM_CARTS = 4
NUM_HELD_OUT = 64
HORIZON = 256

GRAVITY, CART_MASS, POLE_MASS, HALF_LENGTH = 9.8, 1.0, 0.1, 0.5
FORCE, SECONDS = 10.0, 0.02
MAX_POSITION, MAX_ANGLE = 2.4, 0.2095


def push(states: States, actions: Int[Array, " carts"]) -> States:
    """Advances position, speed, angle and angular speed by one step of Euler's method."""
    _, speed, angle, turning = states.T
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    mass = CART_MASS + POLE_MASS
    push = (FORCE * (2 * actions - 1) + POLE_MASS * HALF_LENGTH * turning**2 * sine) / mass
    turn = (GRAVITY * sine - cosine * push) / (HALF_LENGTH * (4 / 3 - POLE_MASS * cosine**2 / mass))
    force = push - POLE_MASS * HALF_LENGTH * turn * cosine / mass
    change = jnp.stack([speed, force, turning, turn], axis=1)
    return states + SECONDS * change


def is_up(states: States) -> Bool[Array, " carts"]:
    """Whether the pole stands and the cart is on its track."""
    return (jnp.abs(states[:, 0]) < MAX_POSITION) & (jnp.abs(states[:, 2]) < MAX_ANGLE)


def roll_out(
    params: PyTree, key: Key[Array, ""], count: int
) -> tuple[Float[Array, "steps carts"], Bool[Array, "steps carts"]]:
    """Returns the log-probabilities of the drawn actions, and whether the pole was up before."""
    start, actions = jax.random.split(key)
    states = jax.random.uniform(start, (count, 4), minval=-0.05, maxval=0.05)

    def step(
        carry: tuple[States, Bool[Array, " carts"]], key: Key[Array, ""]
    ) -> tuple[tuple[States, Bool[Array, " carts"]], tuple[Array, Array]]:
        states, up = carry
        logits = jax.nn.log_softmax(mlp(params, states))
        action = jax.random.categorical(key, logits)
        chosen = jnp.take_along_axis(logits, action[:, None], axis=1)[:, 0]
        # A cart that has failed stands still. Otherwise its state would grow without bound.
        states = jnp.where(up[:, None], push(states, action), states)
        return (states, up & is_up(states)), (chosen, up)

    keys = jax.random.split(actions, HORIZON)
    _, (chosen, up) = jax.lax.scan(step, (states, jnp.ones(count, bool)), keys)
    return chosen, up


def reinforce_loss(params: PyTree, key: Key[Array, ""]) -> Float[Array, ""]:
    """The loss of REINFORCE (Williams, 1992), with the mean over carts as the baseline."""
    chosen, up = roll_out(params, key, NUM_CARTS)
    to_go = jnp.cumsum(jnp.float32(up)[::-1], axis=0)[::-1]
    advantages = jnp.where(up, to_go - to_go.mean(axis=1, keepdims=True), 0.0)
    return -jnp.sum(chosen * jax.lax.stop_gradient(advantages)) / NUM_CARTS


def cartpole(title: str) -> Task:
    """Trains a policy to keep the pole up for 256 steps."""
    held_out_key = jax.random.key(-1)

    def share_of_steps_down(params: PyTree) -> Float[Array, ""]:
        _, up = roll_out(params, held_out_key, NUM_HELD_OUT)
        return 1.0 - up.mean()

    return Task(
        title=title,
        unit="share of time down",
        steps=100,
        rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        optimizer=optax.adam,
        init=lambda key: mlp_init(key, 4, 32, 2),
        batch=lambda key: key,
        loss=reinforce_loss,
        held_out=share_of_steps_down,
    )
