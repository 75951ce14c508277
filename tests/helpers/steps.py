"""A transformation that is run over a list of gradients, compiled once for all of its runs."""

import jax


def runner(tx, params, place=lambda tree: tree):
    """A function of gradients that returns the updates of all steps, and the last state."""
    params = place(params)
    update = jax.jit(tx.update)

    def run(grads):
        state = tx.init(params)
        updates = []
        for gradient in grads:
            # On simulated devices, steps in flight together can starve each other of threads.
            clipped, state = jax.block_until_ready(update(place(gradient), state, params))
            updates.append(clipped)
        return updates, state

    return run


def run(tx, params, grads, place=lambda tree: tree):
    """The updates of all steps, and the last state."""
    return runner(tx, params, place)(grads)
