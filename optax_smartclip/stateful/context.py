"""`apply_grads`, and `clip_context`, which clips the gradients that an optimizer is given."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import optax

from optax_smartclip.engine.trees import PyTree
from optax_smartclip.stateful.clipper import OnMetrics, StatefulClipper
from optax_smartclip.stateful.clippers import AutoClip

Update = Callable[..., Any]


def apply_grads(
    grads: PyTree,
    params: PyTree,
    clipper: StatefulClipper,
    on_metrics: OnMetrics | None = None,
) -> PyTree:
    """Clips a gradient, and lets the clipper learn from it.

    Works eagerly, under `jit` and in `scan`: the clipper's state is in mutable arrays, and a
    compiled step updates it. What holds of everything that a compiled function closes over holds of
    the clipper, too: a function that was compiled with one goes on using it.

    Args:
        grads: A tree of arrays of any shape and dtype.
        params: The parameters, a tree of the same structure. `AGC` compares with them; for the
            others it may be None.
        clipper: An `AutoClip`, `AGC` or `ZScoreClip`.
        on_metrics: Called with a `MetricsRecord`, a dict of Python values, once for each group and
            step: directly in eager steps, by an ordered host callback from compiled ones. What it
            raises ends an eager step as it is, and a compiled one as a `JaxRuntimeError` with its
            traceback in the message; that step took the clipper's state with it, so go on with a
            new clipper and the last `state_dict`. Without `on_metrics`, nothing in the program
            leaves the device.

    Returns:
        The clipped gradient, with the structure and dtypes of `grads`.

    Raises:
        TypeError: If `clipper` is something else.
        ValueError: If `params` is None and the clipper needs it, or the leaves fall into other
            groups or have other paths or shapes than those that the clipper was used with: use one
            clipper for each model. (Leaves that are None fit any.)

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax_smartclip as smartclip
        >>> clipper = smartclip.AutoClip(warmup_steps=5, min_history=0)
        >>> clip = jax.jit(lambda grads: smartclip.apply_grads(grads, None, clipper))
        >>> for norm in [1.0] * 10 + [1000.0]:
        ...     clipped = clip({"w": jnp.array([norm])})
        >>> print(clipped["w"], clipper.can_clip())
        [1.] True
    """
    if not isinstance(clipper, StatefulClipper):
        raise TypeError(
            f"`clipper` must be an AutoClip, AGC or ZScoreClip, got {type(clipper).__name__}. "
            "(Transformations such as autoclip() are links of an optax.chain.)"
        )
    return clipper.clip(grads, params, on_metrics)


@contextlib.contextmanager
def clip_context(
    model: Any,
    optimizer: Any = None,
    clipper: StatefulClipper | None = None,
    on_metrics: OnMetrics | None = None,
) -> Iterator[optax.GradientTransformationExtraArgs]:
    """Clips every gradient that is passed to `optimizer.update` within the block.

    It also yields a transformation that does the same. That is preferable, because it is explicit:
    its `update` clips, also in functions that were compiled before, and after the block.

        with clip_context(model, optimizer=tx) as clipping_tx:
            updates, opt_state = clipping_tx.update(grads, opt_state, params)

    Within the block, `optimizer` itself clips as well. A function that is traced within it is
    compiled with the clipping in it, and stays so. One that was traced before does not clip;
    therefore a block in which nothing was clipped is an error.

    Args:
        model: The model. It is ignored.
        optimizer: An `optax.GradientTransformation`, or any object with its `init` and `update`.
            The block restores it at its end, also after an exception. Blocks may be nested.
        clipper: An `AutoClip()` of this block if None.
        on_metrics: See `apply_grads`.

    Yields:
        A transformation whose `init` is that of `optimizer`, and whose `update` clips first.

    Raises:
        TypeError: If `optimizer` has no `init` and `update`, or its class cannot be exchanged.
        RuntimeError: At the end of the block, if nothing was clipped by it.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_smartclip as smartclip
        >>> tx = optax.sgd(1.0)
        >>> clipper = smartclip.AutoClip(warmup_steps=5, min_history=0)
        >>> with smartclip.clip_context(None, optimizer=tx, clipper=clipper):
        ...     for norm in [1.0] * 10 + [1000.0]:
        ...         updates, _ = tx.update(jnp.array([norm]), tx.init(jnp.zeros(1)))
        >>> print(updates)
        [-1.]
    """
    del model
    if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        raise TypeError(
            "`optimizer` must be a gradient transformation, with `init` and `update`, got "
            f"{optimizer!r}. (An nnx.Optimizer has one as its `tx`.)"
        )
    clipper = AutoClip() if clipper is None else clipper
    steps_before, num_calls = clipper.num_steps, 0

    def clip_before(update: Update) -> Update:
        def clipping_update(
            updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
        ) -> Any:
            nonlocal num_calls
            clipped = apply_grads(updates, params, clipper, on_metrics)
            num_calls += 1
            return update(clipped, state, params, **extra_args)

        return clipping_update

    # Looked up now: within the block, `update` is another.
    update = optimizer.update
    if isinstance(optimizer, optax.GradientTransformation) and not isinstance(
        optimizer, optax.GradientTransformationExtraArgs
    ):
        plain = optax.GradientTransformation(optimizer.init, update)
        update = optax.with_extra_args_support(plain).update
    wrapped = optax.GradientTransformationExtraArgs(optimizer.init, clip_before(update))
    with _exchanged_update(optimizer, clip_before):
        yield wrapped
    # A step compiled in an earlier block with the same clipper clips without calling `update`.
    if num_calls == 0 and clipper.num_steps == steps_before:
        raise RuntimeError(
            "Nothing was clipped within this clip_context: `update` of the optimizer was not "
            "called, or only by functions that had been compiled before, which do not see it. "
            "Compile the step within the block, or put the transformation that the block yields "
            "(`with clip_context(...) as tx`) or smartclip.autoclip() into the step."
        )


@contextlib.contextmanager
def _exchanged_update(optimizer: Any, wrap: Callable[[Update], Update]) -> Iterator[None]:
    """Lets `optimizer.update` be the wrapped one, by exchanging the object's class.

    The fields of a named tuple, as Optax's transformations are, cannot be set.
    """
    if not isinstance(optimizer, _Exchanged):
        _exchange_class(optimizer)
    wraps = type(optimizer).wraps
    wraps.append(wrap)
    try:
        yield
    finally:
        # Not necessarily the last one: blocks may be left in any order.
        wraps.remove(wrap)
        if not wraps:
            object.__setattr__(optimizer, "__class__", type(optimizer).original_class)


class _Exchanged:
    __slots__ = ()


def _exchange_class(optimizer: Any) -> None:
    original_update: Update = optimizer.update
    wrapped_by: list[Callable[[Update], Update]] = []

    try:

        class Exchanged(type(optimizer), _Exchanged):  # type: ignore[misc]
            __slots__ = ()
            wraps = wrapped_by
            original_class = type(optimizer)

            @property
            def update(self) -> Update:
                return functools.reduce(lambda f, wrap: wrap(f), wrapped_by, original_update)

        Exchanged.__name__ = type(optimizer).__name__
        object.__setattr__(optimizer, "__class__", Exchanged)
    except (TypeError, AttributeError) as error:
        raise TypeError(
            f"`optimizer` must be an object whose class can be exchanged, got {optimizer!r}. Use "
            "smartclip.autoclip() in an optax.chain instead."
        ) from error
