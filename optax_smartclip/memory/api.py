"""`jax.grad` and `jax.value_and_grad` that recompute by a plan."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax

from optax_smartclip.memory.call import Call
from optax_smartclip.memory.equations import is_inexact
from optax_smartclip.memory.executor import HeightCompressedExecutor
from optax_smartclip.memory.graph import Graph, capture_graph_jaxpr
from optax_smartclip.memory.planner import make_plan

_REAL_ONLY = (
    "`argnums` must choose trees of real arrays or floats. Pass integers and random keys as "
    "another argument. For an nnx.Module, write `graphdef, params, rest = "
    "nnx.split(model, nnx.Param, ...)`, differentiate `params`, and `nnx.merge` in the function."
)


class NoPlanWarning(UserWarning):
    """No plan could be made, and the gradient is that of `jax.grad`; the text says why."""


class _NoPlanError(Exception):
    pass


class HeightCompressedGradient:
    """The result of `height_compressed_grad` and `height_compressed_value_and_grad`.

    Attributes:
        last_executor: The program and the plan of the last call; `None` before the first call and
            if there was no plan.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        block_size: int | None,
        argnums: int | Sequence[int],
        has_aux: bool,
        memory_budget: int | None,
        with_value: bool,
    ) -> None:
        _check_size("block_size", block_size, "equations")
        _check_size("memory_budget", memory_budget, "bytes")
        self.last_executor: HeightCompressedExecutor | None = None
        self._fn, self._has_aux, self._with_value = fn, has_aux, with_value
        self._argnums = argnums
        self._block_size, self._memory_budget = block_size, memory_budget
        self._compiled: dict[Any, tuple[Callable[..., Any], list[HeightCompressedExecutor]]] = {}
        transform = jax.value_and_grad if with_value else jax.grad
        self._plain = transform(fn, argnums, has_aux=has_aux)
        functools.update_wrapper(self, fn, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the gradient, like `jax.grad` or `jax.value_and_grad`."""
        self.last_executor = None
        call = Call(self._argnums, args, kwargs)
        if not call.can_differentiate():
            # It raises, in its own words.
            try:
                return self._plain(*args, **kwargs)
            except TypeError as error:
                if call.in_range:
                    error.add_note(_REAL_ONLY)
                raise
        try:
            results, grads, self.last_executor = self._run(call)
        except _NoPlanError as error:
            reason = str(error)
        else:
            # With `has_aux`, the results are a pair.
            if self._with_value:
                return results, grads
            return (grads, results[1]) if self._has_aux else grads
        # If jax.grad refuses the call as well, its error is raised, without a warning.
        outcome = self._plain(*args, **kwargs)
        warnings.warn(
            f"No plan could be made, the gradient is that of jax.grad: {reason}",
            NoPlanWarning,
            stacklevel=2,
        )
        return outcome

    def _run(self, call: Call) -> tuple[Any, Any, HeightCompressedExecutor]:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in call.arrays):
            return self._trace(call, call.arrays)
        # Outside of all transformations: without compilation, a plan would save nothing.
        key = call.key()
        compiled, executors = self._compiled.get(key) or self._compile(call)
        results, grads = compiled(call.arrays)
        if key is not None:
            self._compiled[key] = compiled, executors
        return results, grads, executors[-1]

    def _compile(self, call: Call) -> tuple[Callable[..., Any], list[HeightCompressedExecutor]]:
        executors: list[HeightCompressedExecutor] = []
        without_arrays = call.without_arrays()

        def run(arrays: Sequence[Any]) -> tuple[Any, Any]:
            results, grads, executor = self._trace(without_arrays, arrays)
            executors.append(executor)
            return results, grads

        return jax.jit(run), executors

    def _trace(
        self, call: Call, arrays: Sequence[Any]
    ) -> tuple[Any, Any, HeightCompressedExecutor]:
        def flat(*arrays: Any) -> Any:
            args, kwargs = call.unflatten(arrays)
            return self._fn(*args, **kwargs)

        try:
            graph = capture_graph_jaxpr(flat, arrays)
            plan = make_plan(
                graph,
                frozenset(graph.inputs[i] for i in call.wanted),
                self._differentiated(graph),
                self._block_size,
                self._memory_budget,
            )
            # The closed-over values may be tracers, which must not outlive the trace.
            executor = HeightCompressedExecutor(graph.without_consts(), plan)
            results, grads = executor.value_and_grad(graph.consts, arrays, call.wanted)
        except Exception as error:
            raise _NoPlanError(f"{type(error).__name__}: {error}") from error
        return jax.tree.unflatten(graph.out_tree, results), call.as_arguments(grads), executor

    def _differentiated(self, graph: Graph) -> frozenset[int]:
        values: Any = jax.tree.unflatten(graph.out_tree, graph.outputs)
        if self._has_aux:
            if not isinstance(values, tuple) or len(values) != 2:
                raise TypeError("with has_aux, the function must return a pair")
            values = values[0]
        leaves = jax.tree.leaves(values)
        if len(leaves) != 1 or not _is_real_scalar(graph.avals[leaves[0]]):
            raise TypeError("the function must return a real scalar")
        return frozenset(leaves)


def _is_real_scalar(aval: Any) -> bool:
    return aval.shape == () and is_inexact(aval) and aval.dtype.kind != "c"


def _check_size(name: str, value: Any, unit: str) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (is_int and value >= 1):
        raise ValueError(
            f"`{name}` must be None or a Python int of at least 1 ({unit}), got {value!r}."
        )


def height_compressed_grad(
    fn: Callable[..., Any],
    block_size: int | None = None,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    memory_budget: int | None = None,
) -> HeightCompressedGradient:
    """Like `jax.grad`, with less memory: part of the forward pass is computed again.

    The function is traced and cut into blocks. Values inside of a block are not saved for the
    backward pass but computed again when it gets there. Under `jax.jit` and other transformations
    the plan becomes part of their program; outside of them each kind of call (structure, shapes,
    dtypes, and the values of non-array arguments) is compiled once, as by `jax.jit`.

    Where no plan can be made, the gradient is that of `jax.grad`, with a `NoPlanWarning` that names
    the exception, and `last_executor` is None. What `jax.grad` refuses as well raises its error.

    Blocks of about the square root of the number of layers are from Chen et al., `Training Deep
    Nets with Sublinear Memory Cost <https://arxiv.org/abs/1604.06174>`_, 2016.

    Args:
        fn: A function that returns a real scalar, or with `has_aux` a pair of one and anything.
        block_size: How many equations a block has. By default, blocks are chosen such that the
            predicted peak of the memory is the least.
        argnums: Which positional arguments to differentiate; trees of real arrays or floats. Pass
            integers and random keys, such as those of Dropout in an `nnx.Module`, in another one.
        has_aux: Whether `fn` returns a second result, which is not differentiated.
        memory_budget: Bytes of temporary memory. As little is computed again as the prediction
            allows; if it cannot be reached, the plan is that of the least peak, and
            `within_budget` in its `meta` is False. With `block_size`, the blocks stay as they are.

    Returns:
        A function with the arguments of `fn` that returns the gradient, with `has_aux` the gradient
        and the second result. Its attribute `last_executor` has the plan of the last call.

    Raises:
        ValueError: If `block_size` or `memory_budget` is neither None nor a positive Python int.

    Example:
        >>> import jax.numpy as jnp
        >>> from optax_smartclip.memory import height_compressed_grad
        >>> grad = height_compressed_grad(lambda x: jnp.sum(jnp.sin(jnp.sin(x))))
        >>> print(grad(jnp.zeros(2)))
        [1. 1.]
        >>> grad.last_executor.checkpoint_plan.meta["peak_frontier"]
        8
    """
    return HeightCompressedGradient(fn, block_size, argnums, has_aux, memory_budget, False)


def height_compressed_value_and_grad(
    fn: Callable[..., Any],
    block_size: int | None = None,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    memory_budget: int | None = None,
) -> HeightCompressedGradient:
    """Like `jax.value_and_grad`, with less memory; see `height_compressed_grad`.

    Args:
        fn: A function that returns a real scalar, or with `has_aux` a pair of one and anything.
        block_size: How many equations a block has; by default, planned.
        argnums: Which positional arguments to differentiate.
        has_aux: Whether `fn` returns a second result, which is not differentiated.
        memory_budget: Bytes of temporary memory; by default, as few as possible.

    Returns:
        A function with the arguments of `fn` that returns what `fn` returns and the gradient. Its
        attribute `last_executor` has the plan of the last call.

    Raises:
        ValueError: If `block_size` or `memory_budget` is neither None nor a positive Python int.

    Example:
        >>> import jax.numpy as jnp
        >>> from optax_smartclip.memory import height_compressed_value_and_grad
        >>> value, grad = height_compressed_value_and_grad(lambda x: jnp.sum(x**2))(jnp.ones(2))
        >>> print(value, grad)
        2.0 [2. 2.]
    """
    return HeightCompressedGradient(fn, block_size, argnums, has_aux, memory_budget, True)
